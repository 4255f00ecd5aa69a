"""`einkorn plan`: whether a run fits some accelerators and how fast it could be, before any is paid for.

For a TPU the real step is compiled ahead of time for that topology, on this machine, by libtpu (the extra `tpu`); no
weights are read or allocated, of a model's folder nothing but config.json. Without libtpu, and for GPUs, there is an
estimate by formulas, which says that it is one.
"""

import contextlib
import importlib.util
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from configs import derived
from configs.load import Loaded
from launch import assemble
from launch.assemble import Model
from launch.chips import GIB, Target, target_of
from launch.flops import flops_of
from launch.hlo import Collective, collectives
from launch.method import Method, method_of
from launch.planned_batch import Shapes, abstract_batch, patches_of, shapes_of
from launch.train import step_of
from models.config import Compute
from models.sharding import compiled_for, make_mesh, parameter_shardings, replicas

TOO_MUCH = "does not fit"


@dataclass(frozen=True)
class Found:
    """What a compiled step says of itself, in bytes a device."""

    arguments: float
    temporaries: float
    outputs: float  # beside those that take an argument's place
    seconds: float  # that compiling took
    said: Mapping[str, Collective]


class TooLarge(Exception):
    """A program that does not fit the memory of its devices; the message is the compiler's."""


def run(loaded: Loaded, *, target: str) -> bool:
    """Print the plan of a configuration for a target; whether it fits. ValueError for what cannot be planned."""
    console, fits = Console(highlight=False), True
    goal = target_of(target)
    for name, text in _lines(loaded.config, goal, console):
        console.print(f"{name:>22}  {text}", markup=False, soft_wrap=True)
        fits &= name != TOO_MUCH
    return fits


def _lines(config: ConfigDict, goal: Target, console: Console) -> Iterator[tuple[str, str]]:
    """What there is to say, a name and a text each."""
    compiles = goal.topology is not None and importlib.util.find_spec("libtpu") is not None
    mesh = _mesh(config, goal, real=compiles)
    model = assemble.open_model(config, only_config=True)
    shapes = shapes_of(config, model, mesh)
    method = method_of(config, model, longest_document=shapes.length, together=shapes.together)
    count = assemble.parameter_count(model)
    yield "model", f"{config.model.model_name}, {count.total:,} parameters, {count.trained:,} of them trained"
    split = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    yield "devices", f"{goal.chips} × {goal.name.split('-')[0] if goal.topology else goal.name.split('x')[1]}, {split}"
    yield (
        "step",
        f"{shapes.accumulation} × {shapes.rows} rows of {shapes.length:,} tokens, {config.training.trainer_type}",
    )
    lasting = lasting_bytes(config, model, mesh, method)
    for name, size in lasting.items():
        yield name, f"{size / GIB:.2f} GiB a device"
    compute = assemble.compute_of(config, model, longest_document=shapes.length)
    if not compiles:
        why = "no libtpu here: install the extra `tpu`" if goal.topology else "GPU programs cannot be compiled here"
        activations = activation_bytes(model, mesh, shapes, compute)
        needed = sum(lasting.values()) + activations
        yield "activations", f"about {activations / GIB:.2f} GiB a device"
        yield from _verdict(needed, goal, f"an estimate by formulas, good to some 30 % ({why})")
        yield from _speed(config, model, mesh, goal, shapes, method, lasting, None)
        return
    console.print(f"{'':>22}  compiling for {goal.topology} …", markup=False)
    try:
        found = compiled(config, model, mesh, method, shapes)
    except TooLarge as error:
        yield TOO_MUCH, str(error)
        return
    yield "batch and constants", f"{max(0.0, found.arguments - sum(lasting.values())) / GIB:.2f} GiB a device"
    yield "temporaries", f"{found.temporaries / GIB:.2f} GiB a device: activations, gradients, what is gathered"
    yield from _verdict(found.arguments + found.temporaries + found.outputs, goal, "by the compiler")
    for kind, one in found.said.items():
        yield kind, f"{one.runs:,} a step, {one.sent / GIB:.3f} GiB sent by a device"
    yield from _speed(config, model, mesh, goal, shapes, method, lasting, found.said)
    yield "compiled in", f"{found.seconds:.0f} s"


def _verdict(needed: float, goal: Target, how: str) -> Iterator[tuple[str, str]]:
    fits = "fits" if needed <= goal.chip.hbm else TOO_MUCH
    yield fits, f"{needed / GIB:.2f} GiB of {goal.chip.hbm / GIB:.2f} a device, {how}"


def _mesh(config: ConfigDict, goal: Target, *, real: bool) -> Any:
    """The run's mesh over the target's devices, or with so many that there are none of, for shapes alone."""
    sizes = derived.mesh_axes(config)
    if real:
        return make_mesh(sizes, devices=_devices(goal))
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if goal.chips % fixed or (-1 not in sizes.values() and fixed != goal.chips):
        raise ValueError(f"mesh: {sizes} takes a multiple of {fixed} devices, and {goal.name} has {goal.chips}")
    whole = {axis: goal.chips // fixed if size == -1 else size for axis, size in sizes.items()}
    return jax.sharding.AbstractMesh(tuple(whole.values()), tuple(whole))


def _devices(goal: Target) -> list[Any]:
    """Descriptions of the devices of a slice, which programs can be compiled for."""
    for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    assert goal.topology is not None
    return list(topologies.get_topology_desc(platform="tpu", topology_name=goal.topology).devices)


def compiled(config: ConfigDict, model: Model, mesh: Mesh, method: Method, shapes: Shapes) -> Found:
    """The run's own step compiled for the devices of `mesh`; TooLarge where the compiler says so."""
    step, parts = step_of(config, model, mesh, lambda step: 1e-5, method), assemble.abstract_parts(model)
    frozen = method.frozen(parts)

    def placed(tree: Any, shardings: Any) -> Any:
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, shardings
        )

    state = placed(jax.eval_shape(step.init.jitted, parts.trained), step.shardings)  # type: ignore[attr-defined]
    held = None if frozen is None else placed(frozen, parameter_shardings(frozen, mesh))
    begun = time.perf_counter()
    with jax.set_mesh(mesh), compiled_for(mesh.devices.flat[0].platform), _no_cache():
        lowered = step.train.jitted.lower(state, held, abstract_batch(config, model, mesh, shapes))  # type: ignore[attr-defined]
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if said := too_large(str(error)):
                raise TooLarge(f"{said} (the compiler)") from None
            raise
    memory = program.memory_analysis()
    return Found(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        seconds=time.perf_counter() - begun,
        said=collectives(program.as_text()),
    )


def too_large(message: str) -> str | None:
    """What an error of the compiler says of memory that does not suffice; None where it is another."""
    used, needed = (
        r"Used [\d.]+\w+ of [\d.]+\w+ hbm\. Exceeded hbm capacity by [\d.]+\w+",
        r"the total memory.*? HBM \(.*?\)",
    )
    found = re.search(f"{used}|{needed}", message)
    return None if found is None else found[0]


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
    """Without the cache of compiled programs: what it holds has no memory analysis of its own."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def lasting_bytes(config: ConfigDict, model: Model, mesh: Any, method: Method) -> dict[str, float]:
    """Bytes a device of what lies there between steps, by kind; exact."""
    parts = assemble.abstract_parts(model)
    frozen = method.frozen(parts)
    moments = {"ADAMW": 2, "ADAMW_TORCH": 2, "ADAM": 2, "ADAMW_TORCH_FUSED": 2, "LION": 1, "SGD": 0}
    trained = _bytes(parts.trained, mesh)
    name = str(config.training.optimizer).upper()
    found = {
        "parameters": trained + (0.0 if frozen is None else _bytes(frozen, mesh)),
        "optimizer": trained * moments.get(name, 2),
    }
    return found if method.sync is None else found | {"reference": trained}


def activation_bytes(model: Model, mesh: Any, shapes: Shapes, compute: Compute) -> float:
    """About how much a device holds beside what lasts: activations that are kept, gradients, a chunk of logits."""
    c, width = model.config, compute.dtype.itemsize
    tokens = shapes.rows / replicas(mesh) * shapes.length / (mesh.shape["context"] * mesh.shape["tensor"])
    whole = width * (8 * c.width + 3 * c.heads * c.head_width + 4 * c.mlp_width)
    kept = {"none": whole, "dots": whole / 2, "full": width * c.width}[compute.remat]
    gradients = _bytes(assemble.abstract_parts(model).trained, mesh)
    return gradients + tokens * (c.layers * kept + (whole if compute.remat != "none" else 0)) + 12e3 * c.vocabulary


def _bytes(tree: Any, mesh: Any) -> float:
    sizes = jax.tree.map(
        lambda leaf, place: math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        tree,
        parameter_shardings(tree, mesh),
    )
    return float(sum(jax.tree.leaves(sizes)))


def _speed(
    config: ConfigDict,
    model: Model,
    mesh: Any,
    goal: Target,
    shapes: Shapes,
    method: Method,
    lasting: Mapping[str, float],
    said: Mapping[str, Collective] | None,
) -> Iterator[tuple[str, str]]:
    """FLOPs, what bounds the step, and what that leaves of the peak."""
    each, rows = flops_of(model, context=shapes.length, forwards=method.forwards), shapes.accumulation * shapes.rows
    patches = patches_of(model)
    flops = shapes.tokens * each.token + rows * (patches * each.patch + patches**2 * each.pair)
    remat = {"none": 1.0, "dots": 1.0, "full": 4 / 3}[derived.remat_policy(config)]
    passes = 3 * shapes.accumulation
    times = {
        "matrix products": flops * remat / (goal.chip.flops * goal.chips),
        "memory": (passes * lasting["parameters"] + 2 * lasting.get("optimizer", 0.0)) / goal.chip.hbm_rate,
    }
    if said is not None:
        times["links between chips"] = sum(one.sent for one in said.values()) / goal.chip.link_rate
    bound, seconds = max(times.items(), key=lambda item: item[1])
    useful = flops / (goal.chip.flops * goal.chips) / seconds
    yield "FLOPs of a step", f"{flops:.3g} by formula, {shapes.tokens:,} tokens"
    yield "at least", ", ".join(f"{name} {1e3 * value:.0f} ms" for name, value in times.items())
    yield (
        "bound",
        f"{bound}: {seconds:.3g} s a step at least, {shapes.tokens / seconds:,.0f} tokens/s, MFU {useful:.0%} at most",
    )
