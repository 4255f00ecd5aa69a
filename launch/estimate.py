"""What a step holds, computes, reads and sends, by formulas: what a plan says where nothing is compiled, and what it
ranks by where something is.

Bytes that lie there between steps are exact. Activations are good to some 40 %. What is sent is counted around rings,
which is the least; tests/launch/test_estimate.py holds it against compiled steps.
"""

import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from configs import derived
from launch import assemble
from launch.chips import Target
from launch.flops import flops_of
from launch.planned_batch import Planned, patches_of
from launch.update import optimizer_of
from models.config import Compute, DecoderConfig
from models.sharding import ROWS, nested, parameter_shardings, paths, replicas
from trainers.step import Memory, places

TOKENS = (*ROWS, "context")  # the axes that a batch's tokens are split over
CHUNK = 1024  # tokens that meet the vocabulary together, on up to eight devices
LOGITS = 12  # bytes of one: its value, its probability and its gradient in float32
EXPERTS = "layers/moe/experts/"
WORDS = ("embed/embedding", "head/kernel")  # leaves that no layer has


class Times(NamedTuple):
    """Seconds a step takes at least, by what would bound it, the FLOPs that are useful in it, and about how long its
    layers wait for one another's devices, which nothing hides.
    """

    flops: float
    seconds: dict[str, float]
    waits: float

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def least(self) -> float:
        """Seconds of a step, if everything else is done beside what bounds it."""
        return self.seconds[self.bound]


def lasting_bytes(planned: Planned) -> dict[str, float]:
    """Bytes a device of what lies there between steps, by kind; exact."""
    config, mesh, method = planned.config, planned.mesh, planned.method
    parts, memory = assemble.abstract_parts(planned.model), Memory(**derived.memory(config))
    frozen = method.frozen(parts)
    trained = split_bytes(parts.trained, mesh)
    found = {
        "parameters": trained + (0.0 if frozen is None else split_bytes(frozen, mesh)),
        "optimizer": 0.0 if memory.on_host else state_bytes(planned),
    }
    return found if method.sync is None else found | {"reference": trained}


def state_bytes(planned: Planned) -> float:
    """Bytes of a device's part of the optimizer's state, which may lie on the host; exact."""
    config, mesh, params = planned.config, planned.mesh, assemble.abstract_parts(planned.model).trained
    optimizer = optimizer_of(config, planned.model, mesh, lambda step: 1e-5)
    lies = places(optimizer, params, parameter_shardings(params, mesh), Memory(**derived.memory(config)))[0]
    sizes = jax.tree.map(
        lambda leaf, place: math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        jax.eval_shape(optimizer.init, params),
        lies,
    )
    return float(sum(jax.tree.leaves(sizes)))


def split_bytes(tree: Any, mesh: Any, *, width: int = 8) -> float:
    """Bytes a device of parameters, as the mesh splits them; of `width` bytes a number at most."""
    return float(sum(part * min(width, leaf.dtype.itemsize) for _, leaf, part, _ in _leaves(tree, mesh)))


def passing_bytes(planned: Planned) -> dict[str, float]:
    """About how many bytes a device holds in the midst of a step, beside what lasts, by kind."""
    _, model, mesh, shapes, _, compute = planned
    c, width = model.config, compute.dtype.itemsize
    rows = shapes.rows / replicas(mesh)
    parts = assemble.abstract_parts(model)
    gradients = sum(
        part * leaf.dtype.itemsize if path in WORDS else part * min(width, leaf.dtype.itemsize)
        for path, leaf, part, _ in _leaves(parts.trained, mesh)
    )
    if shapes.accumulation > 1:  # and their sum over microbatches, in float32
        gradients += 4 * sum(part for _, _, part, _ in _leaves(parts.trained, mesh))
    activations = _kept(c, rows * shapes.length / mesh.shape["context"], mesh, compute)
    if (vision := c.vision) is not None:
        for stack in (vision.layers, vision.further):
            activations += 0.0 if stack is None else _kept(stack, rows * patches_of(model), mesh, compute)
    trees = [tree for tree in parts if tree is not None]
    if compute.remat == "none":
        activations += sum(gathered_bytes(_experts(tree), mesh, width) for tree in trees)
    layers = sum(gathered_bytes({"layers": tree.get("layers", {})}, mesh, width) for tree in trees)
    return {
        "gradients": gradients,
        "activations": activations,
        "logits of a chunk": CHUNK * max(1, mesh.size // 8) * LOGITS * c.vocabulary / mesh.size,
        "gathered weights": 2 * layers / c.layers,  # of a layer, and of the next one
    }


def _kept(stack: DecoderConfig, tokens: float, mesh: Any, compute: Compute) -> float:
    """About how many bytes a device keeps of a stack's layers for so many tokens of its own, until they are used: all
    that is computed, matrix products alone, what goes into each layer, or, where that waits on the host, nothing; and
    where something is computed again, all of one layer.
    """
    width = compute.dtype.itemsize
    inside = width * (3 * stack.heads * stack.head_width + 4 * _mlp_width(stack)) / mesh.shape["tensor"]
    whole = width * 8 * stack.width + inside
    enters = width * stack.width
    kept = {"none": whole, "dots": 2 * enters + inside / 2, "full": enters, "offload": 0.0}[compute.remat]
    return tokens * (stack.layers * kept + (whole if compute.remat != "none" else 0))


def sent_bytes(planned: Planned) -> dict[str, float]:
    """About how many bytes a device sends in a step, by what it sends or along which axis.

    Of each microbatch: parameters, gathered once forward and once backward along the axes of tokens that split them,
    and their gradients, summed along all axes of tokens (of copies of the model that meet once a step, once); along
    `tensor` the stream, summed behind attention and MLP, and its gradient likewise; along `context` keys and values,
    gathered twice, and their gradients; along `expert` tokens, there and back; and for the vocabulary, of which each
    device has a part, every token's hidden state, its gradient, and what is looked up.
    """
    _, model, mesh, shapes, method, compute = planned
    c, width = model.config, compute.dtype.itemsize
    parts, forwards = assemble.abstract_parts(model), method.forwards
    copies, tensor = copies_apart(planned), mesh.shape["tensor"]
    rows, parties = shapes.rows / replicas(mesh), mesh.size // tensor // copies
    tokens = rows * shapes.length / mesh.shape["context"]  # of a device
    again = int(compute.remat in ("full", "offload"))
    stream = tokens * c.width * width
    keys = 2 * rows * shapes.length * c.kv_heads * c.head_width * width / min(tensor, c.kv_heads)
    weights = sum(sent_to_gather(_layered(tree), mesh, width) for tree in parts if tree is not None)
    kept = sum(sent_to_gather(_experts(tree), mesh, width) for tree in parts if tree is not None)
    words = split_bytes({name: parts.trained[name] for name in ("embed", "head") if name in parts.trained}, mesh)
    crossed = 0 if c.experts is None else mesh.shape["expert"] - 1
    once = {
        "parameters": (2 + forwards) * weights - (kept if compute.remat == "none" else 0.0),
        "gradients": _summed(parts.trained, mesh, width, apart=copies > 1),
        "tensor": c.layers * (4 + again + 2 * forwards) * 2 * _share(tensor) * stream,
        "context": c.layers * (3 + forwards) * _share(mesh.shape["context"]) * keys,
        "expert": c.layers * 2 * (2 + forwards) * crossed * stream,
        "vocabulary": ((2 + forwards) * (parties - 1) + 2 * _share(tensor)) * stream
        + (2 * _share(parties) + 2 * _share(tensor)) * stream
        + 2 * _share(parties) * words,
    }
    each = {name: shapes.accumulation * size for name, size in once.items()}
    if copies == 1:
        return each
    return each | {"copies' gradients": 2 * _share(copies) * 4 * sum(p for _, _, p, _ in _leaves(parts.trained, mesh))}


def copies_apart(planned: Planned) -> int:
    """How many copies of the model add up gradients by themselves, and meet once a step (`trainers.step`)."""
    shared = derived.memory(planned.config)["split_gradients"]
    apart = planned.method.by_rows and not planned.method.draws and planned.shapes.accumulation > 1 and not shared
    return planned.mesh.shape["data"] if apart else 1


def step_flops(planned: Planned) -> float:
    """The arithmetic that a step is useful for."""
    shapes, patches = planned.shapes, patches_of(planned.model)
    each = flops_of(planned.model, context=shapes.length, forwards=planned.method.forwards)
    rows = shapes.accumulation * shapes.rows
    return shapes.tokens * each.token + rows * (patches * each.patch + patches**2 * each.pair)


def times_of(
    planned: Planned, goal: Target, *, sent: float, flops: float | None = None, lasting: dict[str, float] | None = None
) -> Times:
    """How long a step takes at least: matrix products at the peak, the weights of every pass and the state read from
    memory once, and so many bytes sent by a device. `flops` and `lasting` are those of the step, where they are known.
    """
    _, model, mesh, shapes, method, compute = planned
    flops = step_flops(planned) if flops is None else flops
    again = {"none": 1.0, "dots": 1.0}.get(compute.remat, 4 / 3)
    parts, lasting = assemble.abstract_parts(model), lasting or lasting_bytes(planned)
    weights = sum(gathered_bytes(tree, mesh, compute.dtype.itemsize) for tree in parts if tree is not None)
    state = lasting["optimizer"] + split_bytes(parts.trained, mesh)
    between = 2 * _share(goal.slices) * 4 * sum(part for _, _, part, _ in _leaves(parts.trained, mesh))
    meetings = 1 if copies_apart(planned) > 1 else shapes.accumulation
    waited_for = sum(size for name, size in sent_bytes(planned).items() if name in ("tensor", "context", "expert"))
    rate = goal.chip.link_rate / (goal.chip.dimensions if goal.topology else 1)  # of one dimension of a torus
    return Times(
        flops,
        {
            "matrix products": flops * again / (goal.chip.flops * goal.chips),
            "memory": (shapes.accumulation * (3 + method.forwards) * weights + 2 * state) / goal.chip.hbm_rate,
            "links between chips": sent / goal.chip.link_rate,
        }
        | ({"links between slices": meetings * between / goal.chip.slice_rate} if goal.slices > 1 else {}),
        waited_for / rate,
    )


def _mlp_width(c: Any) -> int:
    """Units of an MLP that a token goes through."""
    return c.mlp_width if c.experts is None else c.experts.per_token * c.experts.width + c.experts.shared_width


def _share(group: int) -> float:
    """What part of a whole a device sends, or does not have, of so many."""
    return (group - 1) / group


def _leaves(tree: Any, mesh: Any) -> Iterator[tuple[str, Any, int, frozenset[str]]]:
    """Path, leaf, numbers a device of it, and the axes it is split over."""
    for path, leaf in paths(tree).items():
        yield path, leaf, *_split(path, leaf.shape, mesh)


@functools.lru_cache(maxsize=10_000)  # a search asks for few leaves, many times
def _split(path: str, shape: tuple[int, ...], mesh: Any) -> tuple[int, frozenset[str]]:
    place = paths(parameter_shardings(nested({path: jax.ShapeDtypeStruct(shape, jnp.float32)}), mesh))[path]
    names = [axis for entry in place.spec for axis in ((entry,) if isinstance(entry, str) else entry or ())]
    return math.prod(place.shard_shape(shape)), frozenset(axis for axis in names if mesh.shape[axis] > 1)


def _gathering(path: str, axes: frozenset[str]) -> list[str]:
    """The axes of tokens along which a leaf is gathered: tokens go to their experts, and not these to them."""
    stays = "expert" if path.startswith(EXPERTS) else None
    return [axis for axis in TOKENS if axis in axes and axis != stays]


def gathered_bytes(tree: Any, mesh: Any, width: int) -> float:
    """Bytes a device of parameters as it computes with them, gathered along the axes of tokens."""
    return float(
        sum(
            part * _group(_gathering(path, axes), mesh) * min(width, leaf.dtype.itemsize)
            for path, leaf, part, axes in _leaves(tree, mesh)
        )
    )


def sent_to_gather(tree: Any, mesh: Any, width: int) -> float:
    """Bytes that a device sends so that all have these parameters once."""
    return gathered_bytes(tree, mesh, width) - split_bytes(tree, mesh, width=width)


def _layered(tree: Any) -> Any:
    """Parameters without the words, which are nowhere gathered."""
    return {name: part for name, part in tree.items() if name not in ("embed", "head")}


def _experts(tree: Any) -> Any:
    """The experts' own parameters, which are kept as gathered where nothing is computed again."""
    return nested({path: leaf for path, leaf in paths(tree).items() if path.startswith(EXPERTS)})


def _group(axes: Iterable[str], mesh: Any) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _summed(tree: Any, mesh: Any, width: int, *, apart: bool) -> float:
    """Bytes that a device sends to sum gradients: a part of those that are gathered, and all of those that are not; of
    copies that are `apart`, those of one copy.
    """
    total = 0.0
    along = [axis for axis in TOKENS if not (apart and axis == "data")]
    for path, leaf, part, axes in _leaves(tree, mesh):
        group = 1 if path in WORDS else _group(_gathering(path, axes), mesh)
        own = {"expert"} if path.startswith(EXPERTS) else set()
        others = _group((axis for axis in along if axis not in axes | own), mesh)
        total += (group - 1 + 2 * _share(others)) * part * min(width, leaf.dtype.itemsize)
    return total
