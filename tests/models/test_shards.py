"""Pieces of a parameter: where they lie in the files, read shard by shard, and given back as they were."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from models.families import AsStored
from models.safetensors_file import Spec, copy_rows, read_header, write_tensors
from models.sharding import make_mesh
from models.shards import Staging, fetch_tensor, find_place, read_leaf


class Leaf(NamedTuple):
    """A parameter, what a family's table says of it, and whether its tensors have their last two axes exchanged."""

    path: str
    shape: tuple[int, ...]
    name: str
    turned: bool


LEAVES = {
    "kernels of layers": Leaf("layers/mlp/up/kernel", (4, 8, 16), "model.layers.{i}.mlp.up_proj.weight", True),
    "kernels of layers and experts": Leaf("layers/moe/experts/up/kernel", (4, 8, 4, 6), "{i}.experts.{e}.w3", True),
    "scales of layers and heads": Leaf("layers/attention/q_norm/scale", (4, 8, 6), "{i}.norms.{e}.weight", False),
    "stacked kernels": Leaf("layers/moe/experts/gate_up/kernel", (4, 8, 4, 6), "{i}.experts.gate_up", True),
    "stacked kernels as ours": Leaf(
        "layers/moe/experts/gate_up/kernel", (4, 8, 4, 6), AsStored("{i}.experts.gate_up_proj"), False
    ),
    "stacked biases": Leaf("layers/moe/experts/gate_up/bias", (4, 8, 6), "{i}.experts.gate_up_proj_bias", False),
    "Conv1D": Leaf("layers/attention/qkv/kernel", (4, 8, 16), AsStored("h.{i}.attn.c_attn.weight"), False),
    "positions": Leaf("positions/embedding", (16, 8), "transformer.wpe.weight", False),
    "head": Leaf("head/kernel", (8, 16), "lm_head.weight", True),
    "bias of the head": Leaf("head/bias", (16,), "lm_head.bias", False),
}


def tensors_of(leaf: Leaf, whole: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of a leaf with these values, by name, the last number counting fastest."""
    spread, name = {}, leaf.name
    for at in np.ndindex(leaf.shape[: leaf.name.count("{")]):
        for axis, number in zip(("{i}", "{e}"), at, strict=False):
            name = name.replace(axis, str(number))
        spread[name], name = (whole[at].swapaxes(-1, -2) if leaf.turned else whole[at]), leaf.name
    return spread


@pytest.mark.parametrize("case", LEAVES)
@pytest.mark.parametrize("axes", [(), ("fsdp",), (None, "fsdp"), (None, "fsdp", "tensor"), (None, None, "tensor")])
def test_a_leaf_is_read_from_its_tensors_and_gives_them_back(axes: tuple, case: str, tmp_path: Path) -> None:
    leaf, file = LEAVES[case], tmp_path / "one.safetensors"
    whole = np.random.default_rng(0).normal(size=leaf.shape).astype(np.float32)
    tensors = tensors_of(leaf, whole)
    specs = {name: Spec(tensors[name].shape, whole.dtype) for name in sorted(tensors, reverse=True)}
    write_tensors(file, specs, tensors.__getitem__, metadata={})

    place, stored = find_place(leaf.path, leaf.shape, leaf.name), read_header(file)
    assert place.names == tuple(tensors)
    assert {tensor.shape for tensor in tensors.values()} == {place.hf_shape}
    sharding = NamedSharding(make_mesh({"fsdp": 4, "tensor": 2}), PartitionSpec(*axes[: len(leaf.shape)]))
    with ThreadPoolExecutor(2) as pool:
        array = read_leaf(
            jax.ShapeDtypeStruct(leaf.shape, "float32"),
            [stored[name] for name in place.names],
            place,
            sharding=sharding,
            pool=pool,
            staging=Staging(),
        )
    assert array.sharding == sharding
    np.testing.assert_array_equal(array, whole)
    for number, tensor in enumerate(tensors.values()):
        np.testing.assert_array_equal(fetch_tensor(array, number, place, dtype=whole.dtype), tensor)


@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    dtype=st.sampled_from(["float32", "float16"]),
)
def test_any_slice_of_a_stored_tensor_reads_as_numpy_slices_it(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, shape: list[int], dtype: str
) -> None:
    array = np.arange(np.prod(shape), dtype=dtype).reshape(shape)
    file = tmp_path_factory.mktemp("slices") / "one.safetensors"
    other = np.ones(3, np.float32)  # something before it, so that it does not begin where the data begins
    specs = {"other": Spec(other.shape, other.dtype), "array": Spec(array.shape, array.dtype)}
    write_tensors(file, specs, lambda name: {"other": other, "array": array}[name], metadata={})
    index = []
    for size in shape:
        start = data.draw(st.integers(0, size - 1))
        index.append(slice(start, data.draw(st.integers(start + 1, size))))
    target = np.empty(array[tuple(index)].shape, np.float64)
    copy_rows(read_header(file)["array"], tuple(index), target)
    np.testing.assert_array_equal(target, array[tuple(index)])
