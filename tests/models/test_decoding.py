"""What decoding on CPU reads in the place of the parameters computes the same, in fewer and turned products."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import Compute, DecoderConfig, Layer
from models.decoder import cached_hidden_states, empty_cache, head, hidden_states, init_params, layers_apart
from models.decoding import for_decoding
from models.lora import Lora, init_adapter, merged
from models.quantized import quantised
from models.rope import Rope
from models.sharding import paths

ROPE = Rope(tuple(100.0 ** -(p / 4) for p in range(4)))
PLAIN = DecoderConfig(
    vocabulary=96,
    width=32,
    heads=4,
    kv_heads=2,
    head_width=8,
    mlp_width=64,
    activation="silu",
    norm_eps=1e-5,
    tied_head=True,
    initializer_range=0.3,
    each=(Layer(4, ROPE), Layer(None, ROPE)),
)
KINDS = {
    "tied": {},
    "head and biases": {"tied_head": False, "head_bias": True, "qkv_bias": True, "mlp_bias": True, "o_bias": True},
    "fused already": {"fused_qkv": "heads", "fused_gate_up": True, "kv_heads": 4},
    "no gate": {"gated": False, "qk_norm": "head"},
}
LORA = Lora(rank=4, alpha=8, init="random", modules=("layers/attention/q", "layers/mlp/down"))
TOKENS_BL = np.random.default_rng(0).integers(0, 96, (3, 10))


def step_by_step(params, config, compute):
    """Logits [B, L, V] of a token at a time."""
    decoding, joined = for_decoding(params, config=config, compute=compute, apart=True)
    B, L = TOKENS_BL.shape
    cache = layers_apart(empty_cache(config, rows=B, slots=L, dtype=compute.dtype), config.layers)

    @jax.jit
    def step(decoding, cache, tokens_B1, at):
        hidden_B1D, cache = cached_hidden_states(
            decoding, joined, cache, tokens_BL=tokens_B1, positions_BL=jnp.full((B, 1), at), compute=compute
        )
        return cache, head(decoding, joined).logits(hidden_B1D[:, 0])

    found = []
    for at in range(L):
        cache, logits_BV = step(decoding, cache, jnp.asarray(TOKENS_BL[:, at : at + 1]), jnp.int32(at))
        found.append(logits_BV)
    return jnp.stack(found, axis=1)


def at_once(params, config, compute):
    B, L = TOKENS_BL.shape
    positions_BL = jnp.broadcast_to(jnp.arange(L), (B, L))

    @jax.jit
    def all_of(params):
        hidden_BLD = hidden_states(
            params,
            config,
            tokens_BL=jnp.asarray(TOKENS_BL),
            segments_BL=jnp.ones((B, L), jnp.int32),
            positions_BL=positions_BL,
            compute=compute,
        )
        return head(params, config).logits(hidden_BLD)

    return all_of(params)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_at_a_time_gives_the_logits_of_all_at_once(kind):
    config = dataclasses.replace(PLAIN, **KINDS[kind])
    params = init_params(jax.random.key(1), config, dtype=jnp.float32)
    leaves = {path: leaf + 0.1 if path.endswith("bias") else leaf for path, leaf in paths(params).items()}
    params = jax.tree.unflatten(jax.tree.structure(params), leaves.values())
    np.testing.assert_allclose(
        step_by_step(params, config, Compute()), at_once(params, config, Compute()), atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize("form", [None, "nf4"])
def test_an_adapter_and_a_quantised_kernel_are_those_of_training(form):
    params = init_params(jax.random.key(1), PLAIN, dtype=jnp.float32)
    params = merged(init_adapter(jax.random.key(3), params, LORA), quantised(params, form) if form else params)
    compute = Compute(lora=LORA)
    np.testing.assert_allclose(
        step_by_step(params, PLAIN, compute), at_once(params, PLAIN, compute), atol=2e-5, rtol=1e-4
    )


def test_a_model_that_has_no_adapter_yet_decodes_as_it_is():
    params = init_params(jax.random.key(1), PLAIN, dtype=jnp.float32)
    np.testing.assert_array_equal(
        step_by_step(params, PLAIN, Compute(lora=LORA)), step_by_step(params, PLAIN, Compute())
    )


def leaves_of(params, config, compute):
    decoding, joined = for_decoding(params, config=config, compute=compute, apart=True)
    return {path: leaf.shape for path, leaf in paths(decoding["layers"][0]).items() if "norm" not in path}, joined


def test_queries_keys_and_values_are_one_product_and_an_adapter_is_added_to_its_kernels():
    params = init_params(jax.random.key(1), PLAIN, dtype=jnp.float32)
    adapted = merged(init_adapter(jax.random.key(3), params, LORA), params)
    for each, compute in ((params, Compute()), (adapted, Compute(lora=LORA))):
        leaves, joined = leaves_of(each, PLAIN, compute)
        assert leaves == {
            "attention/qkv/kernel_turned": (1, 64, 32),
            "attention/o/kernel_turned": (1, 32, 32),
            "mlp/gate_up/kernel_turned": (1, 128, 32),
            "mlp/down/kernel_turned": (1, 32, 64),
        }
        assert (joined.fused_qkv, joined.fused_gate_up) == ("blocks", True)


def test_an_adapter_stays_beside_kernels_in_a_narrower_dtype():
    params = init_params(jax.random.key(1), PLAIN, dtype=jnp.float32)
    adapted = merged(init_adapter(jax.random.key(3), params, LORA), params)
    leaves, joined = leaves_of(adapted, PLAIN, Compute(lora=LORA, dtype=jnp.bfloat16))
    assert {"attention/q/kernel_turned", "attention/q/lora_a", "mlp/gate_up/kernel_turned"} < leaves.keys()
    assert (joined.fused_qkv, joined.fused_gate_up) == ("", True)


def test_a_head_that_is_the_embedding_stays_one_array_and_another_is_turned():
    params = init_params(jax.random.key(1), PLAIN, dtype=jnp.float32)
    decoding, _ = for_decoding(params, config=PLAIN, compute=Compute(), apart=True)
    assert decoding["head"]["kernel_turned"] is decoding["embed"]["embedding"]
    config = dataclasses.replace(PLAIN, tied_head=False)
    params = init_params(jax.random.key(1), config, dtype=jnp.float32)
    decoding, _ = for_decoding(params, config=config, compute=Compute(dtype=jnp.bfloat16), apart=True)
    assert decoding["head"]["kernel_turned"].shape == (96, 32)
    assert decoding["head"]["kernel_turned"].dtype == jnp.bfloat16
