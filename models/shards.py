"""Pieces of one parameter between the files and the devices: the part of `models/weights.py` that moves numbers.

Our leaf stacks the layers on a leading axis and keeps kernels as [in, out]; the files hold one tensor a layer, with
kernels as [out, in]. A `Place` says which tensors a leaf is and how they are turned.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.safetensors_file import Stored, copy_rows

BLOCK_BYTES = 64 * 2**20  # of a tensor, fetched from the devices at a time

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


def read_rows(leaf: jax.Array, layer: int, place: Place, *, dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
    """One tensor as the files have it, in blocks of rows, each fetched from the devices when its turn comes."""
    rows, *rest = place.hf_shape
    step = max(1, BLOCK_BYTES // (math.prod(rest) * leaf.dtype.itemsize))
    for start in range(0, rows, step):
        ranges = [(start, min(start + step, rows)), *((0, size) for size in rest)]
        ranges = ranges[::-1] if place.transposed else ranges
        block = _fetch(leaf, [(layer, layer + 1), *ranges] if place.stacked else ranges, dtype)
        block = block[0] if place.stacked else block
        yield block.T if place.transposed else block


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


def _fetch(leaf: jax.Array, ranges: Ranges, dtype: np.dtype[Any]) -> np.ndarray:
    """`leaf[ranges]` on the host, wherever its shards lie; collective where other processes hold some of them."""
    if not leaf.is_fully_addressable:
        assert isinstance(leaf.sharding, NamedSharding), f"{leaf.sharding} spans processes without a mesh"
        gather = _gather(leaf.sharding.mesh, _sizes(ranges), dtype)
        return np.asarray(gather(leaf, _starts(ranges)).addressable_data(0))
    host = np.empty(_sizes(ranges), dtype)
    for shard in leaf.addressable_shards:
        held = _ranges(shard.index, leaf.shape)
        common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(ranges, held, strict=True)]
        if shard.replica_id == 0 and all(start < stop for start, stop in common):
            piece = _slice(shard.data, _starts(_relative(common, held)), sizes=_sizes(common), dtype=dtype)
            host[tuple(slice(*one) for one in _relative(common, ranges))] = piece
    return host


def _cut(x: jax.Array, starts: jax.Array, *, sizes: tuple[int, ...], dtype: Any) -> jax.Array:
    """`x[starts : starts + sizes]`, with traced starts: all layers of a leaf share one compiled slice."""
    return jax.lax.dynamic_slice(x, list(starts), sizes).astype(dtype)


_slice = jax.jit(_cut, static_argnames=("sizes", "dtype"))


@functools.cache
def _gather(mesh: Mesh, sizes: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """`_cut` of an array spread over processes: the block ends up on every device."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(functools.partial(_cut, sizes=sizes, dtype=dtype), out_shardings=everywhere)


def _ranges(index: Any, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple((one.indices(size)[0], one.indices(size)[1]) for one, size in zip(index, shape, strict=True))


def _relative(ranges: Ranges, origin: Ranges) -> list[tuple[int, int]]:
    return [(start - zero, stop - zero) for (start, stop), (zero, _) in zip(ranges, origin, strict=True)]


def _sizes(ranges: Ranges) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in ranges)


def _starts(ranges: Ranges) -> np.ndarray:
    return np.array([start for start, _ in ranges], np.int32)
