"""Every family of the registry is what transformers computes: logits, all gradients, far positions, padded and packed
rows, with a cache, and byte for byte through a folder.

A new line in `models.families.FAMILIES` is tested by itself with the sizes of TINY; VARIANTS adds what matters for one.
Models with a vision tower are in test_vision.py.
"""

import functools
import importlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from models.decoder import Compute, cached_hidden_states, empty_cache, head, hidden_states
from models.families import FAMILIES, decoder_config
from models.sharding import paths
from models.weights import load_params, save_folder

B, L, VOCABULARY, FAR = 2, 24, 96, 9_000
QUICK = {"xla_backend_optimization_level": 0}  # the same operations, in machine code that is made in half the time
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,  # five times the usual, so that attention is not all but uniform
    "max_position_embeddings": 16_384,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ABSENT = {  # what a configuration class does not have; it would be kept in config.json and be refused
    "gpt2": set(TINY) - {"vocab_size", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id"},
    "gpt_neox": {"num_key_value_heads"},
}


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [3.0, 5.0, 7.0, 9.0]}
BIASES = {"attention_bias": True, "mlp_bias": True}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 16_384}

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "plain": {},
        "llama3, biases, wide heads": {**rope("llama3", **LLAMA3), **BIASES, **TIED, "head_dim": 16},
        "dynamic": {**rope("dynamic", factor=2.0), "num_key_value_heads": 4, "max_position_embeddings": 64},
        "yarn": {**rope("yarn", **YARN), "num_key_value_heads": 1, "hidden_act": "gelu"},
    },
    "mistral": {"a window": {"sliding_window": 8}, "none": {"sliding_window": None, "head_dim": 16, **TIED}},
    "qwen2": {
        "plain": {},
        "windows from layer 1": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, **TIED},
    },
    "qwen3": {
        "wide heads": {"head_dim": 16},
        "biases": {"attention_bias": True, "head_dim": 8, **TIED, **rope("yarn", **YARN)},
    },
    "gemma": {
        "plain": {"head_dim": 16},
        "one key head": {"head_dim": 8, "num_key_value_heads": 1, "attention_bias": True},
    },
    "gemma2": {
        "caps": {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 5, "query_pre_attn_scalar": 13},
        "none": {
            "head_dim": 8,
            "sliding_window": 8,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            **UNTIED,
        },
    },
    "gemma3_text": {
        "five to one": {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 8},
        "scaled": {
            "head_dim": 8,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
            "final_logit_softcapping": 5.0,
        },
    },
    "phi": {
        "plain": {},
        "normed heads": {"qk_layernorm": True, "num_key_value_heads": 4, **rope("default", partial_rotary_factor=0.25)},
    },
    "phi3": {
        "a window": {"sliding_window": 8},
        "longrope": {**rope("longrope", **LONG), "original_max_position_embeddings": 4096, **TIED},
        "short of longrope": {**rope("longrope", **LONG), "original_max_position_embeddings": 12_000},
    },
    "gpt2": {"plain": GPT2, "other": {**GPT2, "n_inner": 40, "activation_function": "relu", **UNTIED}},
    "gpt_neox": {
        "parallel": {},
        "in turn": {
            "use_parallel_residual": False,
            "attention_bias": False,
            **rope("default", partial_rotary_factor=1.0),
            **TIED,
        },
    },
    "olmo2": {"plain": {}, "biases": {"attention_bias": True, "num_key_value_heads": 1, **TIED}},
    "olmo3": {
        "windows": {"sliding_window": 8, "num_hidden_layers": 6},
        "yarn": {
            "sliding_window": 8,
            "num_hidden_layers": 4,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
                "full_attention": {"rope_type": "yarn", "rope_theta": 1000.0, **YARN},
            },
            **TIED,
        },
    },
    "smollm3": {
        "plain": {"num_hidden_layers": 5},
        "windows": {"use_sliding_window": True, "sliding_window": 8, "num_hidden_layers": 4, **UNTIED, **BIASES},
    },
    "granite": {
        "multipliers": {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.2,
        },
        "biases": {**BIASES, **TIED},
    },
    "starcoder2": {"a window": {"sliding_window": 8}, "no biases": {"use_bias": False, **UNTIED}},
    "stablelm": {
        "plain": {},
        "parallel": {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True, **TIED},
    },
    "cohere": {"plain": {}, "normed heads": {"use_qk_norm": True, "attention_bias": True, "logit_scale": 0.5}},
    "cohere2": {
        "windows": {"sliding_window": 8, "num_hidden_layers": 6},
        "biases": {"sliding_window": 6, "attention_bias": True, "logit_scale": 1.0, **UNTIED},
    },
    "glm4": {
        "plain": {"head_dim": 16},
        "all rotated": {"head_dim": 8, "attention_bias": False, **rope("default", partial_rotary_factor=1.0), **TIED},
    },
    "mixtral": {
        "two of four": {"num_local_experts": 4},
        "one of three": {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 8, **TIED},
    },
    "qwen2_moe": {
        "plain": {**MIXTURE, "shared_expert_intermediate_size": 40},
        "renormalised": {**MIXTURE, "shared_expert_intermediate_size": 16, "norm_topk_prob": True, "qkv_bias": False},
    },
    "qwen3_moe": {
        "plain": {**MIXTURE, "head_dim": 16},
        "renormalised": {**MIXTURE, "head_dim": 8, "norm_topk_prob": True, "attention_bias": True, **TIED},
    },
    "olmoe": {
        "plain": {"num_experts": 4, "num_experts_per_tok": 2},
        "renormalised": {"num_experts": 3, "num_experts_per_tok": 1, "norm_topk_prob": True, **TIED},
    },
    "gpt_oss": {
        "plain": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8},
        "other": {
            "num_local_experts": 3,
            "num_experts_per_tok": 3,
            "head_dim": 16,
            "sliding_window": 6,
            "num_hidden_layers": 4,
            **rope("default"),
        },
    },
}
ALONE = [kind for kind, module in FAMILIES.items() if not hasattr(importlib.import_module(module), "table")]
CASES = [(kind, name) for kind in ALONE for name in VARIANTS.get(kind, {"as it comes": {}, "tied": TIED})]


class Case(NamedTuple):
    """A random model of transformers, what it computes, and ours read from its folder."""

    folder: Path
    config: Any
    params: Any
    tokens: np.ndarray  # [B, L]
    logits: np.ndarray  # at positions 0, 1, …
    far_logits: np.ndarray  # at positions FAR, FAR + 1, …
    grads: Any  # of the mean cross-entropy, as our tree


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    kind, name = request.param
    sizes = {key: value for key, value in TINY.items() if key not in ABSENT.get(kind, ())}
    changes = VARIANTS.get(kind, {"as it comes": {}, "tied": TIED})[name]
    folder = tmp_path_factory.mktemp(kind)
    torch.manual_seed(0)
    hf_config = CONFIG_MAPPING[kind](**(sizes | changes))
    reference = AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager").eval()
    with torch.no_grad():  # biases and norms start out trivial, which would hide a mistake
        for path, parameter in reference.named_parameters():
            if parameter.ndim == 1 or "norm" in path or "bias" in path:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    reference.save_pretrained(folder)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (B, L)).astype(np.int32)
    tokens[:, 5] = TINY["pad_token_id"]  # whose lookup has no gradient in most families, wherever it stands
    ids = torch.tensor(tokens, dtype=torch.long)
    logits = reference(ids).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1)).backward()
    with torch.no_grad():
        far = reference(ids, position_ids=torch.arange(FAR, FAR + L)[None, :].expand(B, L)).logits.numpy()
        for parameter in reference.parameters():  # its gradients then go through the same files as its weights
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    reference.save_pretrained(folder / "grads")
    config = decoder_config(json.loads((folder / "config.json").read_text()))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = load_params(folder, config, shardings=place, dtype="float32")
    grads = load_params(folder / "grads", config, shardings=place, dtype="float32")
    return Case(folder, config, params, tokens, logits.detach().numpy(), far, grads)


class Row(NamedTuple):
    """Inputs of one run, [B, L] each: weights of the cross-entropy of the next token, and of a sum over hidden
    states.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    ce_weights: np.ndarray
    hidden_weights: np.ndarray


def plain_row(case: Case, *, first_position: int = 0) -> Row:
    positions = np.tile(np.arange(first_position, first_position + L, dtype=np.int32), (B, 1))
    weights = np.ones((B, L), np.float32)
    weights[:, -1] = 0
    return Row(case.tokens, positions, np.ones((B, L), np.int32), weights, np.zeros((B, L), np.float32))


@functools.partial(jax.jit, static_argnums=2, compiler_options=QUICK)
def run(params: Any, row: Row, config: Any) -> tuple[jax.Array, Any]:
    """(logits, gradients): all tests of a case share this one compilation."""

    def objective(params: Any) -> tuple[jax.Array, jax.Array]:
        hidden = hidden_states(
            params,
            config,
            tokens_BL=row.tokens,
            positions_BL=row.positions,
            segments_BL=row.segments,
            compute=Compute(),
        )
        logits = head(params, config).logits(hidden)
        next_tokens = jnp.roll(row.tokens, -1, axis=1)
        ce = -jnp.take_along_axis(jax.nn.log_softmax(logits), next_tokens[..., None], axis=-1)[..., 0]
        total = (row.ce_weights * ce).sum() / jnp.maximum(row.ce_weights.sum(), 1)
        return total + (row.hidden_weights[..., None] * jnp.sin(hidden)).sum(), logits

    grads, logits = jax.grad(objective, has_aux=True)(params)
    return logits, grads


def off(ours: Any, theirs: Any) -> float:
    """The largest difference relative to the largest value."""
    theirs = np.asarray(theirs)
    return float(np.abs(np.asarray(ours) - theirs).max() / max(np.abs(theirs).max(), 1e-30))


def test_logits_are_those_of_transformers(case: Case) -> None:
    assert off(run(case.params, plain_row(case), case.config)[0], case.logits) <= 2e-5


def test_logits_at_far_positions_are_those_of_transformers(case: Case) -> None:
    logits = run(case.params, plain_row(case, first_position=FAR), case.config)[0]
    # An angle of 9,000 radians is known to 5e-4 in float32, in both programs, and not the same way.
    assert off(logits, case.far_logits) <= 2e-5


def test_all_gradients_are_those_of_transformers(case: Case) -> None:
    ours, theirs = paths(run(case.params, plain_row(case), case.config)[1]), paths(case.grads)
    assert set(ours) == set(theirs)
    for path, expected in theirs.items():
        scale = np.abs(expected).max() if np.abs(expected).max() > 1e-7 else 1e-3
        assert np.abs(np.asarray(ours[path]) - np.asarray(expected)).max() <= 1e-4 * scale, path


@pytest.mark.slow
def test_padding_on_either_side_changes_nothing(case: Case) -> None:
    length, expected = 17, run(case.params, plain_row(case), case.config)[0]
    for first in (0, L - length):
        row = plain_row(case)
        tokens, positions, segments = np.zeros((3, B, L), np.int32)
        there = slice(first, first + length)
        tokens[:, there] = row.tokens[:, :length]
        positions[:, there] = np.arange(length)
        segments[:, there] = 1
        logits, _ = run(case.params, row._replace(tokens=tokens, positions=positions, segments=segments), case.config)
        assert off(logits[:, there], expected[:, :length]) <= 1e-5


def test_packed_documents_are_as_when_apart_and_have_no_influence_on_each_other(case: Case) -> None:
    first, second = 10, L - 10
    row, apart = plain_row(case), run(case.params, plain_row(case), case.config)[0]
    tokens, positions, segments = row.tokens.copy(), row.positions.copy(), row.segments.copy()
    tokens[:, first:] = row.tokens[:, :second]
    positions[:, first:] = np.arange(second)
    segments[:, first:] = 2
    # Tokens of their own: whatever moves their embedding moves this document.
    tokens[:, :first] = tokens[:, :first] % 40 + 3
    tokens[:, first:] = tokens[:, first:] % 40 + 50
    alone = plain_row(case)._replace(tokens=np.concatenate([tokens[:, first:], tokens[:, :first]], axis=1))
    apart = run(case.params, alone, case.config)[0][:, :second]
    ce, hidden = np.zeros_like(row.ce_weights), np.zeros_like(row.hidden_weights)
    hidden[:, first:] = 1
    packed = Row(tokens, positions, segments, ce, hidden)
    logits, grads = run(case.params, packed, case.config)
    assert off(logits[:, first:], apart) <= 1e-5
    embedding = np.asarray(grads["embed"]["embedding"])
    assert not embedding[np.unique(tokens[:, :first])].any()
    assert embedding[np.unique(tokens[:, first:])].any(axis=1).all()


@functools.partial(jax.jit, static_argnums=2, compiler_options=QUICK)
def one_by_one(params: Any, tokens_BL: jax.Array, config: Any) -> jax.Array:
    """Logits [B, L, V] of a row that is fed token by token through a cache."""

    def step(cache: Any, token: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        token_B, position_B = token
        hidden, cache = cached_hidden_states(
            params, config, cache, tokens_BL=token_B[:, None], positions_BL=position_B[:, None], compute=Compute()
        )
        return cache, head(params, config).logits(hidden[:, 0])

    cache = empty_cache(config, rows=B, slots=L + 3, dtype=jnp.float32)
    positions_LB = jnp.tile(jnp.arange(L, dtype=jnp.int32)[:, None], (1, B))
    return jax.lax.scan(step, cache, (tokens_BL.T, positions_LB))[1].swapaxes(0, 1)


def test_decoding_with_a_cache_is_the_full_forward_pass(case: Case) -> None:
    assert off(one_by_one(case.params, case.tokens, case.config), case.logits) <= 2e-5


def test_a_folder_comes_back_byte_for_byte_and_loads_in_transformers(case: Case, tmp_path: Path) -> None:
    hf_config = json.loads((case.folder / "config.json").read_text())
    save_folder(tmp_path / "out", case.params, case.config, hf_config=hf_config, dtype="float32")
    before, after = (load_file(folder / "model.safetensors") for folder in (case.folder, tmp_path / "out"))
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert tensor.tobytes() == after[name].tobytes(), name
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        logits = model(torch.tensor(case.tokens, dtype=torch.long)).logits.numpy()
    assert off(logits, case.logits) <= 1e-5
