"""Pieces of one parameter between the files and the devices: the part of `models/weights.py` that moves numbers.

Our leaf stacks the layers on a leading axis, the experts of a layer on a second one, and keeps kernels as [in, out];
the files hold one tensor a layer, or one for every expert of every layer, with kernels as [out, in]. A `Place` says
which tensors a leaf is and how they are turned.
"""

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from models.families import AsStored, OfLayers
from models.safetensors_file import Stored, copy_rows

Ranges = Sequence[tuple[int, int]]  # start and stop along each axis
READERS = min(8, os.cpu_count() or 1)  # threads that copy tensors of one leaf at the same time
SPREAD = ("{i}", "{e}")  # in a tensor's name: the layer, and the expert or head; as axes they lead, in this order


class Place(NamedTuple):
    """Where one leaf lies in the files: the lengths of the leading axes that are spread over tensors, their names in
    the order of these axes, the shape of each, and whether its last two dimensions are the other way round.
    """

    spread: tuple[int, ...]
    names: tuple[str, ...]
    hf_shape: tuple[int, ...]
    transposed: bool


def find_place(path: str, shape: tuple[int, ...], name: str) -> Place:
    """The place of the leaf `path` of this shape, whose tensors are called `name`, with `{i}` and `{e}` where numbers
    stand. Kernels are transposed, unless their name is `AsStored`.
    """
    axes = [axis for axis in SPREAD if axis in name]
    spread, one = shape[: len(axes)], shape[len(axes) :]
    layers = name.layers if isinstance(name, OfLayers) else None
    transposed = path.endswith("/kernel") and not isinstance(name, AsStored)
    places = ((layers[n[0]], *n[1:]) if layers else n for n in np.ndindex(spread))
    names = tuple(_numbered(name, axes, numbers) for numbers in places)
    return Place(spread, names, (*one[:-2], one[-1], one[-2]) if transposed else one, transposed)


class Staging:
    """Host memory in which shards are put together: two pieces in turn, so that one is filled while the other is on its
    way to the devices. Used again and again, it costs no fresh pages.
    """

    def __init__(self) -> None:
        self._pieces = [np.empty(0, np.uint8), np.empty(0, np.uint8)]
        self._leaving: list[list[jax.Array]] = [[], []]  # what was last sent from each piece

    def take(self, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """An array to fill, of what the last but one `send` has left."""
        self._pieces.reverse()
        self._leaving.reverse()
        jax.block_until_ready(self._leaving[0])
        self._leaving[0] = []
        size = math.prod(shape) * jnp.dtype(dtype).itemsize
        if self._pieces[0].size < size:
            self._pieces[0] = np.empty(0, np.uint8)  # let go of the old one first
            self._pieces[0] = _off_the_grid(size)
        return self._pieces[0][:size].view(dtype).reshape(shape)

    def send(self, host: np.ndarray, devices: Sequence[jax.Device]) -> list[jax.Array]:
        """The array that was taken last, on its way to these devices."""
        self._leaving[0] = [jax.device_put(host, device, may_alias=False) for device in devices]
        return self._leaving[0]


def _off_the_grid(size: int) -> np.ndarray:
    """Memory that begins eight bytes past a multiple of 64: what is aligned, `jax.device_put` on CPU does not copy but
    shares, with `may_alias=False` too (jax 0.10.2), and what is filled anew would change the array.
    """
    memory = np.empty(size + 72, np.uint8)
    first = (8 - memory.ctypes.data) % 64
    return memory[first : first + size]


def read_leaves(
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    stored: Mapping[str, Stored],
    places: Mapping[str, Place],
    *,
    shardings: Mapping[str, jax.sharding.Sharding],
    keep: Callable[[str, jax.Array], Mapping[str, jax.Array]] | None = None,
) -> dict[str, jax.Array]:
    """All leaves by path, one after the other; `keep` turns each into those by path that take its place."""
    loaded: dict[str, jax.Array] = {}
    staging = Staging()
    with ThreadPoolExecutor(READERS) as pool:
        for path, leaf in leaves.items():
            tensors = [stored[name] for name in places[path].names]
            array = read_leaf(leaf, tensors, places[path], sharding=shardings[path], pool=pool, staging=staging)
            loaded |= {path: array} if keep is None else keep(path, array)
    return jax.block_until_ready(loaded)  # what is under way still reads the staging memory


def read_leaf(
    leaf: jax.ShapeDtypeStruct,
    tensors: Sequence[Stored],
    place: Place,
    *,
    sharding: jax.sharding.Sharding,
    pool: ThreadPoolExecutor,
    staging: Staging,
) -> jax.Array:
    """One leaf, shard by shard: each distinct shard is read once, for all devices of this process that hold it."""
    devices_of: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        devices_of.setdefault(_ranges(index, leaf.shape), []).append(device)
    shards: list[jax.Array] = []
    for ranges, devices in devices_of.items():
        host = staging.take([stop - start for start, stop in ranges], leaf.dtype)
        _read_shard(host, ranges, tensors, place, pool)
        shards += staging.send(host, devices)
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def fetch_tensor(leaf: jax.Array, number: int, place: Place, *, dtype: np.dtype[Any]) -> np.ndarray:
    """The tensor `place.names[number]` as the files have it, cut out, turned and cast on the devices; collective if
    it spans processes.
    """
    everywhere = None
    if not leaf.is_fully_addressable:
        assert isinstance(leaf.sharding, NamedSharding), f"{leaf.sharding} spans processes without a mesh"
        everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    at = np.array(np.unravel_index(number, place.spread), np.int32)
    tensor = _take(everywhere, len(place.spread), place.transposed, dtype)(leaf, at)
    return np.asarray(tensor if everywhere is None else tensor.addressable_data(0))


@functools.cache
def _take(out: NamedSharding | None, spread: int, transposed: bool, dtype: np.dtype[Any]) -> Any:
    """Jitted `(leaf, numbers) → tensor`; the numbers are arguments, so that all tensors of a leaf share one
    compilation.
    """

    def take(leaf: jax.Array, at: jax.Array) -> jax.Array:
        for axis in range(spread):  # the layer first: where experts are on several devices, only its own are gathered
            leaf = jax.lax.dynamic_index_in_dim(leaf, at[axis], keepdims=False)
        return (jnp.swapaxes(leaf, -1, -2) if transposed else leaf).astype(dtype)

    return jax.jit(take, out_shardings=out)


def _read_shard(
    host: np.ndarray, ranges: Ranges, tensors: Sequence[Stored], place: Place, pool: ThreadPoolExecutor
) -> None:
    across, within = ranges[: len(place.spread)], ranges[len(place.spread) :]
    chosen = np.arange(len(tensors)).reshape(place.spread)[tuple(slice(*one) for one in across)].ravel()
    targets = host.reshape(chosen.size, *host.shape[len(place.spread) :])
    index = [slice(*one) for one in within]
    if place.transposed:
        targets = np.swapaxes(targets, -1, -2)
        index[-2:] = index[:-3:-1]
    for _ in pool.map(lambda number, target: copy_rows(tensors[number], tuple(index), target), chosen, targets):
        pass  # taking the results raises what a reader raised


def _numbered(name: str, axes: Sequence[str], numbers: Sequence[int]) -> str:
    for axis, number in zip(axes, numbers, strict=True):
        name = name.replace(axis, str(number))
    return name


def _ranges(index: Any, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple((one.indices(size)[0], one.indices(size)[1]) for one, size in zip(index, shape, strict=True))
