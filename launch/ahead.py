"""Programs compiled ahead of time, for devices that are not here: what they need and say, without any array.

TPU programs are compiled by libtpu (the extra `tpu`), which needs no TPU.
"""

import contextlib
import importlib.util
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from configs import derived
from launch import assemble
from launch.chips import Target
from launch.hlo import Collective, collectives
from launch.planned_batch import Planned, abstract_batch
from launch.update import step_of
from models.sharding import compiled_for, make_mesh, parameter_shardings


class Found(NamedTuple):
    """What a compiled program says of itself, in bytes a device."""

    arguments: float
    temporaries: float
    outputs: float  # beside those that take an argument's place
    seconds: float  # that compiling took
    said: Mapping[str, Collective]

    @property
    def needed(self) -> float:
        """All that a device holds while it runs."""
        return self.arguments + self.temporaries + self.outputs


class TooLarge(Exception):
    """A program that does not fit the memory of its devices; the message is the compiler's, and the bytes a device that
    it would use, if that says so.
    """

    @property
    def used(self) -> float | None:
        """Bytes a device."""
        said = re.search(r"Used ([\d.]+)([KMGT])", str(self))
        return None if said is None else float(said[1]) * 1024.0 ** ("KMGT".index(said[2]) + 1)


def can_compile(goal: Target) -> bool:
    """Whether there is a compiler for a target here."""
    return goal.topology is not None and importlib.util.find_spec("libtpu") is not None


def mesh_for(config: ConfigDict, goal: Target, *, real: bool) -> Any:
    """The run's mesh over the target's devices, or with so many that there are none of, for shapes alone."""
    sizes = derived.mesh_axes(config, slices=goal.slices)
    if real:
        return make_mesh(sizes, devices=_devices(goal))
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if goal.chips % fixed or (-1 not in sizes.values() and fixed != goal.chips):
        raise ValueError(f"mesh: {sizes} takes a multiple of {fixed} devices, and {goal.name} has {goal.chips}")
    whole = {axis: goal.chips // fixed if size == -1 else size for axis, size in sizes.items()}
    if whole["data"] % goal.slices:
        raise ValueError(f"mesh.data: {whole['data']} copies cannot lie on {goal.slices} slices alike")
    return AbstractMesh(tuple(whole.values()), tuple(whole))


def _devices(goal: Target) -> list[Any]:
    """Descriptions of the devices of a target's slices, which programs can be compiled for."""
    for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    assert goal.topology is not None
    several = {"num_slices": goal.slices} if goal.slices > 1 else {}
    return list(topologies.get_topology_desc(platform="tpu", topology_name=goal.topology, **several).devices)


def placed(tree: Any, shardings: Any) -> Any:
    """A tree of ShapeDtypeStructs, each with where it lies."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, shardings
    )


def compiled_step(planned: Planned) -> Found:
    """The run's own step compiled for the devices of its mesh; TooLarge where the compiler says so."""
    config, model, mesh, method = planned.config, planned.model, planned.mesh, planned.method
    step, parts = step_of(config, model, mesh, lambda step: 1e-5, method), assemble.abstract_parts(model)
    frozen = method.frozen(parts)
    state = placed(jax.eval_shape(step.init, parts.trained), step.shardings)
    held = None if frozen is None else placed(frozen, parameter_shardings(frozen, mesh))
    batch = abstract_batch(config, model, mesh, planned.shapes)
    return compiled(step.train_leaves, (jax.tree.leaves(state), held, batch), {}, mesh=mesh)


def compiled(jitted: Any, arguments: tuple[Any, ...], settings: Mapping[str, Any], *, mesh: Mesh) -> Found:
    """A jitted function of these arguments, which have shapes and places only, compiled for the devices of `mesh`."""
    begun, platform = time.perf_counter(), mesh.devices.flat[0].platform
    with jax.set_mesh(mesh), compiled_for(platform), _no_cache():
        lowered = jitted.lower(*arguments, **settings)
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if said := too_large(str(error)):
                raise TooLarge(f"{said} (the compiler)") from None
            raise
    memory = program.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporaries = memory.temp_size_in_bytes
    if platform == "tpu":
        # What is alive at the fullest moment; libtpu 0.0.42's own sum of temporaries is half as much again as what it
        # lays out, and above what it takes for a chip's memory when it compiles.
        temporaries = max(0, memory.peak_memory_in_bytes - memory.argument_size_in_bytes - outputs)
    return Found(
        arguments=memory.argument_size_in_bytes,
        temporaries=temporaries,
        outputs=outputs,
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
