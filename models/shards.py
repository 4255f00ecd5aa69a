"""Pieces of one parameter between the files and the devices: the part of `models/weights.py` that moves numbers.

Our leaf stacks the layers on a leading axis and keeps kernels as [in, out]; the files hold one tensor a layer, with
kernels as [out, in]. A `Place` says which tensors a leaf is and how they are turned.
"""

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from models.safetensors_file import Stored, copy_rows

Ranges = Sequence[tuple[int, int]]  # start and stop along each axis


class Place(NamedTuple):
    """Where one leaf lies in the files: its tensors (one a layer if stacked), their shape, and whether they turn."""

    names: tuple[str, ...]
    stacked: bool
    transposed: bool
    hf_shape: tuple[int, ...]


def read_leaf(
    leaf: jax.ShapeDtypeStruct,
    tensors: Sequence[Stored],
    place: Place,
    *,
    sharding: jax.sharding.Sharding,
    pool: ThreadPoolExecutor,
) -> jax.Array:
    """One leaf, shard by shard: each distinct shard is read once, for all devices of this process that hold it."""
    devices_of: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        devices_of.setdefault(_ranges(index, leaf.shape), []).append(device)
    shards: list[jax.Array] = []
    for ranges, devices in devices_of.items():
        host = _read_shard(ranges, leaf.dtype, tensors, place, pool)
        # wait: a transfer under way keeps its source, and the sources of all shards together are the whole leaf
        shards += jax.block_until_ready([jax.device_put(host, device) for device in devices])
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def fetch_tensor(leaf: jax.Array, layer: int, place: Place, *, dtype: np.dtype[Any]) -> np.ndarray:
    """One tensor as the files have it, cut out, turned and cast on the devices; collective if it spans processes."""
    everywhere = None
    if not leaf.is_fully_addressable:
        assert isinstance(leaf.sharding, NamedSharding), f"{leaf.sharding} spans processes without a mesh"
        everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    tensor = _take(everywhere, place.stacked, place.transposed, dtype)(leaf, layer)
    return np.asarray(tensor if everywhere is None else tensor.addressable_data(0))


@functools.cache
def _take(out: NamedSharding | None, stacked: bool, transposed: bool, dtype: np.dtype[Any]) -> Any:
    """Jitted `(leaf, layer) → tensor`; the layer is an argument, so that all layers of a leaf share one compilation."""

    def take(leaf: jax.Array, layer: jax.Array) -> jax.Array:
        one = jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False) if stacked else leaf
        return (one.T if transposed else one).astype(dtype)

    return jax.jit(take, out_shardings=out)


def _read_shard(
    ranges: Ranges, dtype: Any, tensors: Sequence[Stored], place: Place, pool: ThreadPoolExecutor
) -> np.ndarray:
    host = np.empty([stop - start for start, stop in ranges], dtype)
    if place.stacked:
        (first, last), *ranges = ranges
        tensors, layers = tensors[first:last], list(host)
    else:
        layers = [host]
    index = tuple(slice(*one) for one in (ranges[::-1] if place.transposed else ranges))
    targets = [layer.T if place.transposed else layer for layer in layers]
    for _ in pool.map(lambda tensor, target: copy_rows(tensor, index, target), tensors, targets):
        pass  # taking the results raises what a reader raised
    return host


def _ranges(index: Any, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple((one.indices(size)[0], one.indices(size)[1]) for one, size in zip(index, shape, strict=True))
