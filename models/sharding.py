"""The device mesh, where each parameter lies on it, and the constraints on activations.

Axes: `data` (whole copies of the model), `fsdp` (parameters split, gathered when used), `expert` (each device has some
of a layer's experts), `tensor` (matrices split by head and by hidden unit), `context` (the sequence split; parameters
too, as by `fsdp`). Rows of a batch are split over the first three. The same code runs on one device, on eight fake ones
and on a pod; an axis that does not divide a dimension is left out for it.
"""

import contextlib
import contextvars
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "expert", "tensor", "context")
ROWS = ("data", "fsdp", "expert")
GATHERED = ("fsdp", "context")  # what "fsdp" means in RULES: devices that share weights and gather them when used

# Path in the parameter tree → what each dimension is split over. The first match holds; layers carry a leading, unsplit
# axis.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed/embedding", ("tensor", "fsdp")),
    (r"head/kernel", ("fsdp", "tensor")),
    (r"layers/moe/experts/(gate|up|gate_up)/kernel", (None, "expert", "fsdp", "tensor")),
    (r"layers/moe/experts/(gate|up|gate_up)/bias", (None, "expert", "tensor")),
    (r"layers/moe/experts/down/kernel", (None, "expert", "tensor", "fsdp")),
    (r"layers/moe/experts/down/bias", (None, "expert")),
    (
        r"(vision/|vision/further/|looking/|projector/)?layers/.*/(q|k|v|qkv|gate|up|gate_up)/kernel(_values|_scale)?",
        (None, "fsdp", "tensor"),
    ),
    (r"(vision/|vision/further/|looking/|projector/)?layers/.*/(q|k|v|qkv|gate|up|gate_up)/bias", (None, "tensor")),
    (
        r"(vision/|vision/further/|looking/|projector/)?layers/.*/(o|down)/kernel(_values|_scale)?",
        (None, "tensor", "fsdp"),
    ),
    # As an MLP's: both as ("fsdp", "tensor"), XLA computed wrong gradients of `up` on data 2 × fsdp 2 × tensor 2.
    (r"projector/up/kernel", ("fsdp", "tensor")),
    (r"projector/down/kernel", ("tensor", "fsdp")),
    (r".*", ()),
)


_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def platform() -> str:
    """What programs are compiled for: "cpu", "gpu" or "tpu"."""
    return _PLATFORM.get() or jax.default_backend()


@contextlib.contextmanager
def compiled_for(platform: str) -> Iterator[None]:
    """Programs that are traced herein are for another platform than this machine's."""
    token = _PLATFORM.set(platform)
    try:
        yield
    finally:
        _PLATFORM.reset(token)


_APART: contextvars.ContextVar[str | None] = contextvars.ContextVar("apart", default=None)
EACH = "each"  # the name of the mapped axis inside of `each_apart`


def each_apart(function: Callable, *, axis: str, in_axes: Any) -> Callable:
    """`jax.vmap` over parts that lie along a mesh axis: each of its devices computes `function` with its own part, and
    nothing moves along that axis, which those constraints that `function` makes then leave alone.
    """

    def alone(*args: Any) -> Any:
        token = _APART.set(axis)
        try:
            return function(*args)
        finally:
            _APART.reset(token)

    return jax.vmap(alone, in_axes=in_axes, axis_name=EACH, spmd_axis_name=axis)


def anywhere(yes: jax.Array) -> jax.Array:
    """Whether it holds for one of the parts of `each_apart`; of a program without parts the same bool."""
    return yes if _APART.get() is None else jax.lax.pmax(yes.astype(jnp.int32), EACH) > 0


def cooperating() -> int:
    """How many devices of the current mesh compute together: all, but for those along `each_apart`'s axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size // mesh.shape.get(_APART.get(), 1)


def make_mesh(sizes: Mapping[str, int], *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices; one size may be -1 for the rest. ValueError if the sizes do not multiply to the devices
    there are.

    Of several slices (TPU pods that a slower network joins) each holds whole copies of the model: `data` goes over
    them first, so that nothing but the gradients of a step passes between them.
    """
    devices = jax.devices() if devices is None else devices
    shape = [sizes.get(axis, 1) for axis in AXES]
    asked = dict(zip(AXES, shape, strict=True))
    fixed = math.prod(size for size in shape if size != -1)
    if shape.count(-1) > 1 or min(size for size in (*shape, 1) if size != -1) < 1:
        raise ValueError(f"mesh: {asked}: sizes are positive, and one of them at most is -1 for the rest")
    if len(devices) % fixed or (-1 not in shape and fixed != len(devices)):
        raise ValueError(
            f"mesh: {asked} takes a multiple of {fixed} devices, and there are {len(devices)}; change mesh.*"
        )
    shape = [len(devices) // fixed if size == -1 else size for size in shape]
    slices = slices_of(devices)
    if shape[0] % len(slices):
        raise ValueError(f"mesh.data: {shape[0]} copies cannot lie on {len(slices)} slices alike; set a multiple of it")
    shape[0] //= len(slices)
    kinds = (AxisType.Auto,) * len(AXES)
    each = [jax.make_mesh(tuple(shape), AXES, axis_types=kinds, devices=one) for one in slices]
    return each[0] if len(each) == 1 else Mesh(np.concatenate([one.devices for one in each]), AXES, axis_types=kinds)


def slices_of(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """The devices by the slice they are of, where there are several; all of them where there is one."""
    numbers = sorted({getattr(device, "slice_index", 0) or 0 for device in devices})
    return [[device for device in devices if (getattr(device, "slice_index", 0) or 0) == one] for one in numbers]


def paths(tree: Any) -> dict[str, Any]:
    """The leaves of a tree of dicts by their path, `layers/mlp/up/kernel`."""
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of dicts with these leaves by path: the inverse of `paths`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *rooms, last = path.split("/")
        room = tree
        for name in rooms:
            room = room.setdefault(name, {})
        room[last] = leaf
    return tree


def parameter_shardings(params: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a parameter tree (arrays or ShapeDtypeStructs), or of several in a NamedTuple, by
    RULES.
    """

    def one(path: tuple, leaf: Any) -> NamedSharding:
        name = "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        axes = next(axes for pattern, axes in RULES if re.fullmatch(pattern, name))
        return NamedSharding(mesh, P(*_dividing(gathered(axes, leaf.shape, mesh.shape), leaf.shape, mesh.shape)))

    return jax.tree_util.tree_map_with_path(one, params)


def gathered(axes: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int]) -> list[Any]:
    """The axes of a rule with GATHERED, or as many of these as divide the dimension, in the place of "fsdp"."""

    def over(axis: str | None, length: int) -> Any:
        more = axis == "fsdp" and sizes["context"] > 1 and length % (sizes["fsdp"] * sizes["context"]) == 0
        return GATHERED if more else axis

    return [over(axis, length) for axis, length in zip(axes, shape, strict=False)]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of a batch [A, B, L]: rows over ROWS, tokens over `context`."""
    return NamedSharding(mesh, P(None, ROWS, "context"))


def also_over(axis: str, place: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """The same place, and split over one axis more: along the longest dimension that it divides, if there is one."""
    spec = [*place.spec, *(None,) * (len(shape) - len(place.spec))]
    for number in sorted(range(len(shape)), key=lambda number: -shape[number]):
        names = (spec[number],) if isinstance(spec[number], str) else spec[number] or ()
        if shape[number] % math.prod(place.mesh.shape[name] for name in (*names, axis)) == 0:
            spec[number] = (*names, axis)
            return NamedSharding(place.mesh, P(*spec))
    return place


def replicas(mesh: Mesh | AbstractMesh) -> int:
    """How many parts a batch's rows are split into: devices that share a row (tensor, context) count as one."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Ask XLA to keep `x` split over these mesh axes, one entry for each dimension; nothing where there is
    no current mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, dividing_spec(x.shape, *axes))


def looked_up(table_VD: jax.Array, tokens_BL: jax.Array, dtype: Any) -> jax.Array:
    """Rows of an embedding [B, L, D], in this dtype. Where its columns are split by GATHERED, each device looks up its
    own of all tokens, and these go to where their tokens belong one axis after the other: XLA would copy all to every
    device for two.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["context"] == 1:
        return table_VD[tokens_BL].astype(dtype)
    x_BLD = constrain(table_VD[constrain(tokens_BL, "data", None)].astype(dtype), "data", None, GATHERED)
    return constrain(constrain(x_BLD, ("data", "fsdp"), None, "context"), ("data", "fsdp"), "context", None)


def dividing_spec(shape: Sequence[int], *axes: str | tuple[str, ...] | None) -> P:
    """How an array of this shape is split over these axes of the current mesh, one entry for each dimension."""
    apart = _APART.get()
    axes = tuple(
        (None if axis == apart else axis)
        if isinstance(axis, str)
        else tuple(name for name in axis or () if name != apart)
        for axis in axes
    )
    return P(*_dividing(axes, shape, jax.sharding.get_abstract_mesh().shape))


def split_heads(q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> tuple[jax.Array, jax.Array, P, P]:
    """Keys and values as a kernel inside of `jax.shard_map` needs them, and how queries and keys are split: each device
    has its rows, its heads with their keys', and with `context` its queries, for which it has all keys.
    """
    q_spec = dividing_spec(q_BLNH.shape, ROWS, "context", "tensor", None)
    heads = jax.sharding.get_abstract_mesh().shape["tensor"] if q_spec[2] else 1
    times = heads // math.gcd(heads, k_BSKH.shape[2])
    if times > 1:  # query heads of several devices share a key head
        k_BSKH, v_BSKH = (jnp.repeat(x, times, axis=2) for x in (k_BSKH, v_BSKH))
    return k_BSKH, v_BSKH, q_spec, dividing_spec(k_BSKH.shape, ROWS, None, q_spec[2], None)


def varying_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The same arrays, inside of `jax.shard_map` each marked as differing along every axis that one of them differs
    along: loops and `jax.custom_vjp` want one type for what belongs together.
    """
    varying = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    every = frozenset[str]().union(*varying)
    return tuple(
        jax.lax.pcast(x, tuple(sorted(every - own)), to="varying") for x, own in zip(arrays, varying, strict=True)
    )


def _dividing(axes: Sequence[Any], shape: Sequence[int], sizes: Mapping[str, int]) -> list[Any]:
    """The axes, without those whose number of devices does not divide the dimension."""
    kept: list[Any] = []
    for axis, length in zip(axes, shape, strict=False):
        names = (axis,) if isinstance(axis, str) else axis or ()
        kept.append(axis if names and length % math.prod(sizes[name] for name in names) == 0 else None)
    return kept
