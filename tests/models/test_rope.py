"""Rotary positions are those of transformers, for every way to scale them and every form of config.json."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, Olmo3Config, Phi3Config, StableLmConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.cohere import modeling_cohere
from transformers.models.glm4 import modeling_glm4
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

from models.families import Fields, decoder_config
from models.rope import Rope, document_lengths, rope_config, rotate

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
LONG = {"short_factor": [1 + 0.02 * i for i in range(32)], "long_factor": [1.3**i for i in range(32)]}
SCALED = {
    "linear": {"rope_type": "linear", "factor": 8.0},
    "linear, odd factor": {"rope_type": "linear", "factor": 2.7},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "dynamic, odd factor": {"rope_type": "dynamic", "factor": 5.3},
    "llama 3.1": {"rope_type": "llama3", **LLAMA3},
    "llama 3.2": {"rope_type": "llama3", **LLAMA3, "factor": 32.0},
    "llama3, short": {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 64, "high_freq_factor": 3.3},
    "yarn of qwen": {"rope_type": "yarn", **YARN},
    "yarn of gpt_oss": {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
    "yarn, with betas": {"rope_type": "yarn", **YARN, "beta_fast": 20, "beta_slow": 2},
    "yarn, magnitudes": {"rope_type": "yarn", **YARN, "mscale": 0.707, "mscale_all_dim": 1.3},
    "yarn, its own attention": {"rope_type": "yarn", **YARN, "attention_factor": 1.25},
    "yarn, shrunk": {"rope_type": "yarn", **YARN, "factor": 0.5},
    "yarn, no ramp": {"rope_type": "yarn", **YARN, "original_max_position_embeddings": 4},
    "yarn, factor from the lengths": {"rope_type": "yarn", **YARN, "factor": None},
    "longrope": {"rope_type": "longrope", **LONG, "original_max_position_embeddings": 4096},
    "longrope, factor": {"rope_type": "longrope", **LONG, "factor": 6.0, "original_max_position_embeddings": 4096},
    "longrope, attention": {
        "rope_type": "longrope",
        **LONG,
        "attention_factor": 1.1,
        "original_max_position_embeddings": 8192,
    },
}
CONTEXT = 16384


def llama(parameters: dict[str, Any], *, head_width: int = 64, theta: float = 10000.0) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=2 * head_width,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_theta": theta, **parameters},
    )


def ours(hf_config: Any, **options: Any) -> Rope:
    stored = hf_config if isinstance(hf_config, dict) else hf_config.to_dict()
    width = stored.get("head_dim") or stored["hidden_size"] // stored["num_attention_heads"]
    return rope_config(Fields(stored), head_width=width, **options)


def off_by(ours: Any, theirs: torch.Tensor) -> np.ndarray:
    """By how many units in the last place two float32 vectors differ; of transformers' own powers about one in a
    hundred is not the nearest float32.
    """
    mine, other = np.asarray(ours, np.float32), theirs.numpy()
    assert mine.shape == other.shape
    return np.abs(mine.view(np.int32).astype(np.int64) - other.view(np.int32))


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1e6])
def test_frequencies_are_those_of_transformers_to_the_last_bit(name, theta):
    hf_config = llama(SCALED[name], theta=theta)
    rope = ours(hf_config)
    frequencies, factor = ROPE_INIT_FUNCTIONS[SCALED[name]["rope_type"]](hf_config)
    assert not off_by(rope.frequencies, frequencies).any()
    assert rope.factor == factor


@pytest.mark.parametrize("theta", [1234.5, 10000.0, 150000.0, 500000.0, 1e6, 2e6, 8e6])
@pytest.mark.parametrize("head_width", [8, 64, 80, 96, 128, 256])
def test_plain_frequencies_are_the_nearest_float32_and_so_nearly_always_those_of_transformers(theta, head_width):
    hf_config = llama({"rope_type": "default"}, head_width=head_width, theta=theta)
    frequencies, _ = modeling_llama.LlamaRotaryEmbedding.compute_default_rope_parameters(hf_config)
    off = off_by(ours(hf_config).frequencies, frequencies)
    assert off.max() <= 2  # one of the power, which may become two of its inverse
    assert np.count_nonzero(off) <= max(1, len(off) // 12)


@pytest.mark.parametrize("length", [CONTEXT + 1, 20000, 131072])
@pytest.mark.parametrize("factor", [2.0, 5.3])
def test_dynamic_frequencies_grow_with_the_document_as_in_transformers(length, factor):
    hf_config = llama({"rope_type": "dynamic", "factor": factor})
    rope = ours(hf_config)
    frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](hf_config, seq_len=torch.tensor(length))
    np.testing.assert_allclose(rope.beyond.at(jnp.array([[length]]))[0, 0], frequencies.numpy(), rtol=1e-6)


def test_longrope_has_other_frequencies_beyond_the_original_context():
    hf_config = llama(SCALED["longrope"])
    frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](hf_config, seq_len=4097)
    assert not off_by(ours(hf_config).beyond.frequencies, frequencies).any()


@pytest.mark.parametrize("last", [50, 4095, 4096, CONTEXT - 1, CONTEXT, 131072])
@pytest.mark.parametrize("name", ["plain", "linear", "dynamic", "llama 3.1", "yarn of qwen", "longrope"])
def test_cosines_and_sines_are_those_of_transformers_up_to_position_131072(name, last):
    hf_config = llama(SCALED.get(name, {"rope_type": "default"}))
    positions = np.unique(np.linspace(0, last, 97, dtype=np.int32))[None, :]
    module = modeling_llama.LlamaRotaryEmbedding(hf_config)
    expected = module(torch.zeros(1), torch.tensor(positions, dtype=torch.long))
    got = jax.jit(ours(hf_config).tables)(positions)
    # The power of a grown base has an error of one unit in the last place, which the position multiplies.
    atol = 2e-7 * last if name == "dynamic" and last >= CONTEXT else 3e-7
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, theirs[..., : mine.shape[-1]].numpy(), atol=atol, rtol=0)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_packed_documents_rotate_as_each_would_alone(name):
    rope = ours(llama(SCALED[name]) if name == "longrope" else llama(SCALED[name]).to_dict())
    lengths = [5000, 20000, 3, 4096]
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths] + [np.zeros(7, np.int32)])[None, :]
    segments = np.repeat(np.array([1, 2, 3, 4, 0], np.int32), [*lengths, 7])[None, :]
    whole = rope.tables(jnp.asarray(positions), document_lengths(jnp.asarray(positions), jnp.asarray(segments)))
    start = 0
    for n in lengths:
        alone = rope.tables(jnp.arange(n, dtype=jnp.int32)[None, :])
        for packed, own in zip(whole, alone, strict=True):
            np.testing.assert_array_equal(packed[:, start : start + n], own)
        start += n


def test_each_token_knows_the_length_of_its_document():
    positions = jnp.array([[0, 1, 2, 0, 1, 0, 0, 0], [0, 0, 7, 8, 9, 10, 11, 12]])
    segments = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1]])
    lengths = document_lengths(positions, segments)
    assert lengths[0, :6].tolist() == [3, 3, 3, 2, 2, 1]
    assert lengths[1, 2:].tolist() == [13] * 6
    assert lengths.dtype == jnp.int32


def some_heads(width: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.normal(size=(2, 9, 3, width)).astype(np.float32), random.integers(0, 5000, (2, 9)).astype(np.int32)


def turned(hf_config: Any, modeling: Any, module: str, x_BLNH: np.ndarray, positions_BL: np.ndarray) -> np.ndarray:
    """Queries rotated by a module of transformers."""
    cos, sin = getattr(modeling, module)(hf_config)(torch.zeros(1), torch.tensor(positions_BL, dtype=torch.long))
    q_BNLH = torch.tensor(x_BLNH).transpose(1, 2)
    return modeling.apply_rotary_pos_emb(q_BNLH, q_BNLH, cos, sin)[0].transpose(1, 2).numpy()


def test_a_part_of_each_head_rotates_and_the_rest_stays():
    hf_config = GPTNeoXConfig(hidden_size=64, num_attention_heads=2, rope_parameters={"partial_rotary_factor": 0.25})
    x, positions = some_heads(32)
    rope = ours(hf_config)
    got = rotate(jnp.asarray(x), *rope.tables(jnp.asarray(positions)))
    expected = turned(hf_config, modeling_gpt_neox, "GPTNeoXRotaryEmbedding", x, positions)
    assert len(rope.frequencies) == 4
    np.testing.assert_allclose(got, expected, atol=2e-6)
    np.testing.assert_array_equal(got[..., 8:], x[..., 8:])


@pytest.mark.parametrize("family", ["Cohere", "Glm4"])
def test_neighbouring_pairs_rotate_as_in_transformers(family):
    modeling = {"Cohere": modeling_cohere, "Glm4": modeling_glm4}[family]
    hf_config = getattr(modeling, f"{family}Config")(hidden_size=64, num_attention_heads=2, head_dim=32)
    x, positions = some_heads(32)
    rope = ours(hf_config, interleaved=True)
    got = rotate(jnp.asarray(x), *rope.tables(jnp.asarray(positions)), interleaved=rope.interleaved)
    np.testing.assert_allclose(got, turned(hf_config, modeling, f"{family}RotaryEmbedding", x, positions), atol=2e-6)


def test_rotation_keeps_the_dtype():
    cos, sin = ours(llama({"rope_type": "default"})).tables(jnp.zeros((1, 2), jnp.int32))
    assert rotate(jnp.ones((1, 2, 1, 64), jnp.bfloat16), cos, sin).dtype == jnp.bfloat16


SMALL = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
OLDER = {
    "linear": {"rope_theta": 50000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "plain": {"rope_theta": 50000.0, "rope_scaling": None},
    "both names": {"rope_theta": 1e4, "rope_scaling": {"type": "llama3", "rope_type": "llama3", **LLAMA3}},
    "yarn": {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **YARN}},
    "yarn for the whole context": {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 2.0}},
}


@pytest.mark.parametrize("name", OLDER)
def test_older_files_of_llama_mean_what_transformers_takes_them_for(name):
    stored = SMALL | {"max_position_embeddings": 65536} | OLDER[name]
    assert ours(stored) == ours(LlamaConfig(**stored))


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_older_files_of_phi3_mean_what_transformers_takes_them_for(kind):
    stored = SMALL | {
        "rope_theta": 10000.0,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": kind, **LONG},
    }
    rope = ours(stored)
    named_now = stored | {"rope_scaling": {"type": "longrope", **LONG}}  # transformers 5 has forgotten "su"
    assert rope == ours(Phi3Config(**named_now, pad_token_id=0))
    assert rope.factor == pytest.approx(1.190238)  # sqrt(1 + ln 32 / ln 4096)
    assert rope.beyond.context == 4096


def test_older_files_say_what_part_of_a_head_rotates():
    neox = SMALL | {"rotary_pct": 0.5, "rotary_emb_base": 5000}
    assert ours(neox, partial=0.25) == ours(GPTNeoXConfig(**neox), partial=0.25)
    assert len(ours(neox, partial=0.25).frequencies) == 16
    stable = SMALL | {"partial_rotary_factor": 0.75, "rope_theta": 10000}
    assert ours(stable, partial=0.25) == ours(StableLmConfig(**stable), partial=0.25)
    del stable["partial_rotary_factor"]
    assert ours(stable, partial=0.25) == ours(StableLmConfig(**stable))


LAYERED = {
    "gemma3, 4b": (Gemma3TextConfig, {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}),
    "gemma3, 1b": (Gemma3TextConfig, {"rope_theta": 2e6, "rope_local_base_freq": 5000.0}),
    "gemma3, new": (
        Gemma3TextConfig,
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 3e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 7000.0},
            }
        },
    ),
    "olmo3": (
        Olmo3Config,
        {
            "rope_theta": 500000,
            "rope_scaling": {"rope_type": "yarn", **YARN, "original_max_position_embeddings": 8192},
        },
    ),
}
BASES = {
    Gemma3TextConfig: {"full_attention": 1e6, "sliding_attention": 1e4},
    Olmo3Config: {"full_attention": 5e5, "sliding_attention": 5e5},
}


@pytest.mark.parametrize("name", LAYERED)
@pytest.mark.parametrize("layer_type", ["full_attention", "sliding_attention"])
def test_layers_of_each_type_rotate_as_in_transformers_in_older_files_and_new_ones(name, layer_type):
    config_class, older = LAYERED[name]
    stored = SMALL | {"num_key_value_heads": 1, "max_position_embeddings": 65536, "head_dim": 64} | older
    hf_config = config_class(**stored)
    base = BASES[config_class][layer_type]
    rope = ours(stored, layer_type=layer_type, theta=base)
    assert rope == ours(hf_config, layer_type=layer_type)
    parameters = hf_config.rope_parameters[layer_type]
    if parameters["rope_type"] != "default":
        frequencies, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](hf_config, layer_type=layer_type)
        assert off_by(rope.frequencies, frequencies).max() <= 2
        assert rope.factor == factor


@pytest.mark.parametrize("name", LAYERED)
def test_a_decoder_of_layers_of_two_types_is_the_same_from_an_older_file(name):
    config_class, older = LAYERED[name]
    sizes = {"num_key_value_heads": 1, "max_position_embeddings": 65536, "head_dim": 64, "num_hidden_layers": 8}
    written_now = config_class(**SMALL | sizes | older).to_diff_dict()
    of_rotation = {"rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq"}
    written_then = {key: value for key, value in written_now.items() if key not in of_rotation} | older
    assert decoder_config(written_then).each == decoder_config(written_now).each
    assert len({layer.rope for layer in decoder_config(written_now).each}) == 2


@pytest.mark.parametrize(
    ("stored", "options", "message"),
    [
        ({}, {}, "lacks the base of its rotary positions"),
        ({"rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}}, {}, "not implemented yet: rope type 'axial'"),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear"}}, {}, "rope of type 'linear'.*factor"),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}}, {}, "mrope_sec"),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, {}, "max_position_embeddings is mi"),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 2.0}}, {}, "original_max_position_embedding"),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "longrope", **LONG}}, {}, "original_max_position_embeddings is"),
        (
            {
                "rope_theta": 1e4,
                "original_max_position_embeddings": 8,
                "max_position_embeddings": 16,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
            },
            {},
            "1 and 1 factors for 32 pairs",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, {}, "rotation by type of layer.*full_attention"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            {"layer_type": "full_attention"},
            "no entry for 'full_attention', but rope_type, rope_theta",
        ),
    ],
)
def test_a_rotation_that_is_not_computed_is_refused(stored, options, message):
    with pytest.raises(ValueError, match=message):
        ours(SMALL | stored, **options)


def test_a_rope_is_a_key_of_compiled_functions():
    one, other = (ours(llama(SCALED["longrope"])) for _ in range(2))
    assert one == other
    assert len({one, other, ours(llama(SCALED["dynamic"]))}) == 2
