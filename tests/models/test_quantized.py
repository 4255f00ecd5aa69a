"""A quantised base computes with what its numbers stand for, which are the library's and the paper's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from models.config import Compute, DecoderConfig, Layer
from models.decoder import hidden_states, init_params
from models.quantized import FORMATS, dequantise, quantised, unquantised
from models.rope import Rope
from models.sharding import make_mesh, parameter_shardings, paths

CONFIG = DecoderConfig(
    vocabulary=64,
    width=128,
    heads=4,
    kv_heads=2,
    head_width=16,
    mlp_width=96,
    activation="silu",
    norm_eps=1e-5,
    tied_head=True,
    initializer_range=0.1,
    each=(Layer(None, Rope(tuple(float(10000.0 ** -(i / 16)) for i in range(0, 16, 2)))),) * 2,
)
TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)
NF4 = np.array(  # arXiv:2305.14314, appendix E
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


@pytest.fixture(scope="module")
def params() -> dict:
    return init_params(jax.random.key(0), CONFIG, dtype=jnp.float32)


@jax.jit
def output(params: dict) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(12)[None, :], (2, 12))
    ones = jnp.ones((2, 12), jnp.int32)
    return hidden_states(params, CONFIG, tokens_BL=TOKENS, positions_BL=positions, segments_BL=ones, compute=Compute())


@pytest.mark.parametrize("form", FORMATS)
def test_a_quantised_model_computes_what_its_dequantised_kernels_do(form: str, params: dict) -> None:
    small = quantised(params, form)
    np.testing.assert_allclose(output(small), output(unquantised(small, jnp.float32)), atol=1e-5)
    assert 1e-4 < np.abs(output(small) - output(params)).max() < 2.0


@pytest.mark.parametrize("form", FORMATS)
def test_dequantised_kernels_are_the_librarys(form: str, params: dict) -> None:
    import qwix

    kernel = params["layers"]["attention"]["q"]["kernel"]
    expected = qwix.dequantize(qwix.quantize(kernel, FORMATS[form], channelwise_axes=(0, 2), tiled_axes={1: 64}))
    leaves = quantised(params, form)["layers"]["attention"]["q"]
    np.testing.assert_array_equal(dequantise(leaves["kernel_values"], leaves["kernel_scale"]), expected)


def test_nf4_is_the_nearest_of_the_papers_sixteen_numbers_times_the_blocks_largest(params: dict) -> None:
    kernel = np.asarray(params["layers"]["mlp"]["up"]["kernel"])  # [2, 128, 96]
    blocks = kernel.reshape(2, 2, 64, 96)
    largest = np.abs(blocks).max(axis=2, keepdims=True)
    nearest = np.abs((blocks / largest)[..., None] - NF4).argmin(axis=-1)
    expected = (NF4[nearest] * largest).reshape(kernel.shape)
    ours = unquantised(quantised(params, "nf4"), jnp.float32)["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_all_linear_layers_and_nothing_else_are_quantised(params: dict) -> None:
    before, after = paths(params), paths(quantised(params, "nf4"))
    gone = set(before) - set(after)
    modules = ("attention/q", "attention/k", "attention/v", "attention/o", "mlp/gate", "mlp/up", "mlp/down")
    assert gone == {f"layers/{module}/kernel" for module in modules}
    assert {str(after[path].dtype) for path in set(after) - set(before)} == {"uint4", "float32"}


def test_what_is_trained_stays_whole(params: dict) -> None:
    trained = "layers/mlp/down/kernel"
    after = paths(quantised(params, "nf4", but={trained}))
    np.testing.assert_array_equal(after[trained], paths(params)[trained])
    assert "layers/mlp/up/kernel_values" in after


def test_a_block_is_shorter_where_64_does_not_divide_the_inputs(params: dict) -> None:
    scale = quantised(params, "int8")["layers"]["mlp"]["down"]["kernel_scale"]
    assert scale.shape == (2, 96 // 32, 128)


def test_split_over_devices_it_is_the_same(params: dict) -> None:
    small, mesh = quantised(params, "nf4"), make_mesh({"fsdp": 4, "tensor": 2})
    placed = jax.device_put(small, parameter_shardings(small, mesh))
    assert placed["layers"]["mlp"]["up"]["kernel_values"].sharding.spec == P(None, "fsdp", "tensor")
    np.testing.assert_allclose(output(placed), output(small), atol=1e-5)


def test_an_unknown_format_is_refused_with_those_there_are(params: dict) -> None:
    with pytest.raises(ValueError, match="'int3' is not one of nf4, fp4, int8"):
        quantised(params, "int3")
