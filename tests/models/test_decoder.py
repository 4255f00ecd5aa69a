"""The decoder computes what transformers computes: logits, gradients, long positions, packed rows, and with a cache."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from models.decoder import Compute, cached_hidden_states, empty_cache, head, hidden_states
from models.families import decoder_config
from models.sharding import paths
from models.stack import cast
from models.weights import load_params

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,  # five times the usual, so that attention is not all but uniform
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "plain": {},
    "one key head for each query head": {"num_key_value_heads": 4},
    "another base of rotation": {"rope_parameters": {"rope_type": "default", "rope_theta": 1234.5}},
    "llama3 scaling": {"rope_parameters": LLAMA3},
    "linear scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "heads wider than width / heads": {"head_dim": 16},
    "tied head": {"tie_word_embeddings": True},
    "gelu and another epsilon": {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-3},
}


def made(tmp_path: Path, **changes: Any) -> tuple[LlamaForCausalLM, Any, Any]:
    """A random llama in transformers, and ours read from its folder: (reference, params, config)."""
    torch.manual_seed(0)
    reference = LlamaForCausalLM(LlamaConfig(**(TINY | changes))).eval()
    with torch.no_grad():  # biases and norms start out trivial, which would hide a mistake
        for name, parameter in reference.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    reference.save_pretrained(tmp_path)
    return reference, *ours(tmp_path)


def ours(folder: Path) -> tuple[Any, Any]:
    config = decoder_config(json.loads((folder / "config.json").read_text()))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return load_params(folder, config, shardings=sharding, dtype="float32"), config


def logits(params: Any, config: Any, tokens: np.ndarray, positions=None, segments=None, **compute: Any) -> jax.Array:
    places = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1)) if positions is None else positions
    segments = np.ones_like(tokens) if segments is None else segments
    return _compiled(params, tokens, places, segments, config, Compute(**compute))


@functools.partial(jax.jit, static_argnums=(4, 5))
def _compiled(params, tokens, positions, segments, config, compute):
    hidden = hidden_states(
        params, config, tokens_BL=tokens, positions_BL=positions, segments_BL=segments, compute=compute
    )
    return head(params, config).logits(hidden)


def reference_logits(reference: Any, tokens: np.ndarray, **kwargs: Any) -> np.ndarray:
    with torch.no_grad():
        return reference(torch.tensor(tokens, dtype=torch.long), **kwargs).logits.numpy()


def some_tokens(rows: int, length: int, vocabulary: int = 96) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocabulary, (rows, length)).astype(np.int32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant, tmp_path):
    reference, params, config = made(tmp_path, **VARIANTS[variant])
    tokens = some_tokens(2, 48)
    np.testing.assert_allclose(logits(params, config, tokens), reference_logits(reference, tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", ["plain", "llama3 scaling", "linear scaling"])
def test_logits_agree_at_positions_far_beyond_the_context(variant, tmp_path):
    reference, params, config = made(tmp_path, **VARIANTS[variant])
    tokens = some_tokens(1, 32)
    positions = np.arange(100_000, 100_032, dtype=np.int32)[None, :]
    expected = reference_logits(reference, tokens, position_ids=torch.tensor(positions, dtype=torch.long))
    # An angle of 1e5 radians has an error of 4e-3 in float32, in both programs and not the same one.
    np.testing.assert_allclose(logits(params, config, tokens, positions), expected, atol=2e-2, rtol=0)
    near = logits(params, config, tokens)
    assert np.abs(near - expected).max() < 5e-2  # rotary attention depends on distances alone


def test_older_files_with_rope_theta_and_rope_scaling_mean_the_same(tmp_path):
    reference, _, config = made(tmp_path, **VARIANTS["llama3 scaling"])
    hf = reference.config.to_dict()
    parameters = dict(hf.pop("rope_parameters"))
    older = {k: v for k, v in hf.items() if v is not None and k not in ("is_encoder_decoder", "pretraining_tp")}
    older |= {"rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters}
    known = set((tmp_path / "config.json").read_text().split('"')[1::2]) | {"rope_theta", "rope_scaling"}
    assert decoder_config({k: v for k, v in older.items() if k in known}) == config


def test_gradients_are_those_of_transformers(tmp_path):
    reference, params, config = made(tmp_path, **VARIANTS["biases"])
    tokens = some_tokens(2, 24)
    expected = reference(torch.tensor(tokens, dtype=torch.long), labels=torch.tensor(tokens, dtype=torch.long))
    expected.loss.backward()

    def loss(params: Any) -> jax.Array:
        log_p = jax.nn.log_softmax(logits(params, config, tokens)[:, :-1])
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).mean()

    value, grads = jax.value_and_grad(loss)(params)
    np.testing.assert_allclose(value, expected.loss.item(), rtol=1e-6)
    grads = paths(grads)
    for ours, theirs, transposed in (
        ("layers/attention/q/kernel", "self_attn.q_proj.weight", True),
        ("layers/attention/k/bias", "self_attn.k_proj.bias", False),
        ("layers/mlp/down/kernel", "mlp.down_proj.weight", True),
        ("layers/post_norm/scale", "post_attention_layernorm.weight", False),
    ):
        for i, layer in enumerate(reference.model.layers):
            gradient = layer.get_parameter(theirs).grad.numpy()
            np.testing.assert_allclose(grads[ours][i], gradient.T if transposed else gradient, atol=2e-6, rtol=1e-4)
    np.testing.assert_allclose(
        grads["embed/embedding"], reference.model.embed_tokens.weight.grad.numpy(), atol=2e-6, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("remat", "unroll"),
    [
        ("none", 3),
        ("full", 1),
        ("dots", 3),
        *(pytest.param(remat, n, marks=pytest.mark.slow) for remat, n in (("none", 1), ("full", 3), ("dots", 1))),
    ],
)
def test_recomputing_and_unrolling_change_nothing(remat, unroll, tmp_path):
    _, params, config = made(tmp_path)
    tokens = some_tokens(2, 16)

    def loss(params: Any, **compute: Any) -> jax.Array:
        return jnp.square(logits(params, config, tokens, **compute)).mean()

    plain = jax.grad(loss)(params)
    other = jax.grad(lambda params: loss(params, remat=remat, scan_unroll=unroll))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), plain, other)


def test_packed_documents_do_not_see_one_another(tmp_path):
    _, params, config = made(tmp_path)
    first, second = some_tokens(1, 10), some_tokens(1, 15)[:, ::-1].copy()
    row = np.concatenate([first, second, np.zeros((1, 7), np.int32)], axis=1)
    segments = np.array([[1] * 10 + [2] * 15 + [0] * 7], np.int32)
    positions = np.array([[*range(10), *range(15), *range(7)]], np.int32)
    packed = logits(params, config, row, positions, segments)
    np.testing.assert_allclose(packed[:, :10], logits(params, config, first), atol=1e-5)
    np.testing.assert_allclose(packed[:, 10:25], logits(params, config, second), atol=1e-5)


def test_no_gradient_flows_from_one_document_to_another(tmp_path):
    _, params, config = made(tmp_path)
    row = some_tokens(1, 20)
    segments = np.array([[1] * 8 + [2] * 12], np.int32)
    positions = np.array([[*range(8), *range(12)]], np.int32)

    def of_second(embedding: jax.Array) -> jax.Array:
        return logits({**params, "embed": {"embedding": embedding}}, config, row, positions, segments)[:, 8:].sum()

    only_first = sorted(set(row[0, :8]) - set(row[0, 8:]))
    gradient = jax.grad(of_second)(params["embed"]["embedding"])
    assert only_first
    assert np.abs(gradient[np.array(only_first)]).max() == 0


def test_a_cache_gives_what_the_whole_row_gives(tmp_path):
    _, params, config = made(tmp_path)
    tokens = some_tokens(2, 20)
    whole = logits(params, config, tokens)
    cache = empty_cache(config, rows=2, slots=24, dtype=jnp.float32)
    positions = np.tile(np.arange(20, dtype=np.int32), (2, 1))
    pieces = []
    for start, stop in ((0, 12), (12, 13), (13, 20)):
        hidden, cache = cached_hidden_states(
            params,
            config,
            cache,
            tokens_BL=tokens[:, start:stop],
            positions_BL=positions[:, start:stop],
            compute=Compute(),
        )
        pieces.append(head(params, config).logits(hidden))
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, atol=1e-5)


def test_bfloat16_is_no_further_from_float32_than_transformers_bfloat16(tmp_path):
    reference, params, config = made(tmp_path)
    tokens = some_tokens(4, 64)
    exact = reference_logits(reference, tokens)
    with torch.no_grad():
        half = reference.to(torch.bfloat16)(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()
    theirs = np.sqrt(np.mean((half - exact) ** 2))
    mine = np.asarray(logits(params, config, tokens, dtype=jnp.bfloat16), np.float32)
    assert np.sqrt(np.mean((mine - exact) ** 2)) <= 1.25 * theirs


@pytest.mark.parametrize(("remat", "layers"), [("full", 3), ("dots", 5)])
def test_float32_layers_cast_one_by_one_give_the_gradients_of_layers_cast_before(remat, layers, tmp_path):
    _, params, config = made(tmp_path, num_hidden_layers=layers)
    if layers == 5:  # four unlike layers and one more
        near, far = config.each[0]._replace(window=8), config.each[0]
        config = replace(config, each=(near, near, near, far, near))
    tokens = some_tokens(2, 24)

    @jax.jit
    def gradients(params):
        def loss(params):
            return jnp.square(logits(params, config, tokens, dtype=jnp.bfloat16, remat=remat)).sum()

        return jax.grad(loss)(params)

    before = {**params, "layers": cast(params["layers"], jnp.bfloat16)}
    mine, theirs = gradients(params), gradients(before)
    assert {leaf.dtype for leaf in jax.tree.leaves(mine)} == {jnp.dtype(jnp.float32)}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b.astype(jnp.float32), rtol=0.02, atol=0.02 * np.abs(a).max()),
        mine,
        theirs,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "not implemented yet: model_type 'mamba'"),
        ({"logit_scale": 3.0}, "fields that the 'llama' port does not know: logit_scale"),
        ({"rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}}, "not implemented yet: rope type 'axial'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "rope of type 'linear'.*factor"),
    ],
)
def test_a_configuration_that_would_compute_something_else_is_refused(change, message):
    plain = LlamaConfig(**TINY).to_diff_dict() | {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_theta": 1e4}}
    decoder_config(plain)
    with pytest.raises(ValueError, match=message):
        decoder_config(plain | change)


def test_what_older_files_say_of_every_model_is_no_reason_to_refuse_one():
    """As Llama 3.2 Vision's text_config has it: whatever transformers 4 could say of any model, written out."""
    plain = LlamaConfig(**TINY).to_diff_dict() | {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_theta": 1e4}}
    usual = {"add_cross_attention": False, "is_encoder_decoder": False, "tie_encoder_decoder": False}
    usual |= {"cross_attention_hidden_size": None, "pruned_heads": {}}
    unused = {"torchscript": False, "use_bfloat16": False, "tf_legacy_loss": False, "prefix": None}
    unused |= {"num_beams": 1, "temperature": 1.0, "top_k": 50, "max_length": 20, "bad_words_ids": None}
    assert decoder_config(plain | usual | unused) == decoder_config(plain)
    with pytest.raises(ValueError, match="does not know: pruned_heads"):
        decoder_config(plain | usual | {"pruned_heads": {"0": [1]}})


def test_dropout_that_a_file_asks_for_is_named_in_the_log_and_not_applied(caplog):
    plain = LlamaConfig(**TINY).to_diff_dict() | {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_theta": 1e4}}
    assert decoder_config(plain | {"attention_dropout": 0.1}) == decoder_config(plain)
    assert "attention_dropout 0.1: dropout inside the model is not applied" in caplog.text


@pytest.mark.parametrize("length", [8, 128, 512, pytest.param(2048, marks=pytest.mark.slow)])
def test_the_real_smollm2_has_transformers_logits(length, smollm2_folder):
    params, config = ours(smollm2_folder)
    reference = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()
    text = (Path(__file__).resolve().parents[2] / "LICENSE").read_text()
    tokens = np.array([AutoTokenizer.from_pretrained(smollm2_folder)(text)["input_ids"][:length]], np.int32)
    assert tokens.shape == (1, length)
    np.testing.assert_allclose(logits(params, config, tokens), reference_logits(reference, tokens), atol=2e-4, rtol=0)
