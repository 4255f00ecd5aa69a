"""`einkorn plan`: whether a run fits some accelerators and how fast it could be, before any is paid for.

For a TPU the real step is compiled ahead of time for that topology, on this machine, by libtpu (the extra `tpu`); no
weights are read or allocated, of a model's folder nothing but config.json. Without libtpu, and for GPUs, there is an
estimate by formulas, which says that it is one.
"""

import itertools
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from configs import derived
from configs.load import Loaded
from launch import assemble, planned_generation
from launch.ahead import TooLarge, can_compile, compiled_step, mesh_for
from launch.chips import GIB, Target, target_of
from launch.estimate import Times, lasting_bytes, passing_bytes, sent_bytes, state_bytes, times_of
from launch.planned_batch import Planned, planned_on
from models.generate import BLOCK

TOO_MUCH = "does not fit"


def run(loaded: Loaded, *, target: str) -> bool:
    """Print the plan of a configuration for a target; whether it fits. ValueError for what cannot be planned."""
    console, fits = Console(highlight=False), True
    goal = target_of(target)
    compiles, config = can_compile(goal), loaded.config
    mesh = mesh_for(config, goal, real=compiles)
    planned = planned_on(mesh, config, assemble.open_model(config, only_config=True))
    for name, text in itertools.chain(
        _step(planned, goal, compiles=compiles), _answers(planned, goal, compiles=compiles)
    ):
        console.print(f"{name:>22}  {text}", markup=False, soft_wrap=True)
        fits &= name != TOO_MUCH
    return fits


def _step(planned: Planned, goal: Target, *, compiles: bool) -> Iterator[tuple[str, str]]:
    """What there is to say of an update, a name and a text each."""
    config, model, mesh, shapes = planned.config, planned.model, planned.mesh, planned.shapes
    count = assemble.parameter_count(model)
    yield "model", f"{config.model.model_name}, {count.total:,} parameters, {count.trained:,} of them trained"
    yield "devices", f"{goal.chips} × {kind_of(goal)}, {split_of(mesh)}"
    yield (
        "step",
        f"{shapes.accumulation} × {shapes.rows} rows of {shapes.length:,} tokens, {config.training.trainer_type}",
    )
    lasting, passing = lasting_bytes(planned), passing_bytes(planned)
    for name, size in lasting.items():
        yield name, f"{size / GIB:.2f} GiB a device"
    if derived.memory(config)["on_host"]:
        yield "on the host", f"{state_bytes(planned) / GIB:.2f} GiB for each device: the optimizer's state"
    about = ", ".join(f"{name} {size / GIB:.2f}" for name, size in passing.items())
    if not compiles:
        yield "temporaries", f"about {sum(passing.values()) / GIB:.2f} GiB a device: {about}"
        yield verdict(sum(lasting.values()) + sum(passing.values()), goal, estimated(goal))
        sent = sent_bytes(planned)
        yield "sent by a device", "about " + _sizes(sent)
        yield from _speed(times_of(planned, goal, sent=sum(sent.values())), goal, planned)
        return
    yield "", f"compiling for {goal.topology} …"
    try:
        found = compiled_step(planned)
    except TooLarge as error:
        yield "temporaries", f"by formulas about {about} GiB a device"
        yield TOO_MUCH, str(error)
        return
    yield "batch and constants", f"{max(0.0, found.arguments - sum(lasting.values())) / GIB:.2f} GiB a device"
    yield "temporaries", f"{found.temporaries / GIB:.2f} GiB a device; by formulas about {about}"
    yield verdict(found.needed, goal, "by the compiler")
    for name, one in found.said.items():
        yield name, f"{one.runs:,} a step, {one.sent / GIB:.3f} GiB sent by a device"
    sent_in_all = sum(one.sent for one in found.said.values())
    yield from _speed(times_of(planned, goal, sent=sent_in_all), goal, planned)
    yield "compiled in", f"{found.seconds:.0f} s"


def _answers(planned: Planned, goal: Target, *, compiles: bool) -> Iterator[tuple[str, str]]:
    """What there is to say of the answers of a run that learns from its own; nothing of another."""
    generation = planned_generation.generation_of(planned)
    if generation is None:
        return
    passing = planned_generation.passing_bytes(planned, generation)
    yield "generation", f"{generation.slots} answers at once, {generation.places:,} places each in the cache"
    yield "cache", f"{passing.pop('cache') / GIB:.2f} GiB a device: keys and values"
    about, needed, sent = _sizes(passing), planned_generation.needed_bytes(planned, generation), None
    yield "beside it", f"about {about} a device"
    if compiles:
        yield "", f"compiling a block of decoding for {goal.topology} …"
        try:
            found = planned_generation.compiled_block(planned, generation)
        except TooLarge as error:
            yield TOO_MUCH, f"{error}, in generation"
            return
        needed = planned_generation.needed_bytes(planned, generation, found)
        sent = sum(one.sent for one in found.said.values()) / BLOCK
        yield (
            "temporaries",
            f"{found.temporaries / GIB:.2f} GiB a device while it decodes, compiled in {found.seconds:.0f} s",
        )
        for name, one in found.said.items():
            yield name, f"{one.runs:,} in {BLOCK} steps of decoding, {one.sent / GIB:.3f} GiB sent by a device"
    name, text = verdict(needed, goal, "by the compiler" if compiles else estimated(goal))
    yield name, f"{text}, in generation"
    times = planned_generation.times_of(planned, goal, generation, sent=sent)
    bound = max(times, key=lambda name: times[name])
    yield "a token of each at least", ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in times.items())
    yield "bound", f"{bound}: {generation.slots / times[bound]:,.0f} tokens/s of answers at most"


def kind_of(goal: Target) -> str:
    """The name of a target's chips."""
    return goal.name.split("-")[0].split("x")[-1] if goal.topology else goal.name.split("x")[1]


def split_of(mesh: Any) -> str:
    """A mesh in words."""
    return " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"


def estimated(goal: Target) -> str:
    """That there is an estimate only, and why."""
    why = "no libtpu here: install the extra `tpu`" if goal.topology else "GPU programs cannot be compiled here"
    return f"an estimate by formulas, up to 20 % off where it was tried ({why})"


def verdict(needed: float, goal: Target, how: str) -> tuple[str, str]:
    """Whether so many bytes fit a device."""
    fits = "fits" if needed <= goal.chip.hbm else TOO_MUCH
    return fits, f"{needed / GIB:.2f} GiB of {goal.chip.hbm / GIB:.2f} a device, {how}"


def _sizes(sizes: dict[str, float]) -> str:
    return ", ".join(f"{name} {size / GIB:.3f}" for name, size in sizes.items() if size) + " GiB"


def _speed(times: Times, goal: Target, planned: Planned) -> Iterator[tuple[str, str]]:
    """FLOPs, what bounds the step, and what that leaves of the peak."""
    tokens, useful = planned.shapes.tokens, times.flops / (goal.chip.flops * goal.chips) / times.least
    yield "FLOPs of a step", f"{times.flops:.3g} by formula, {tokens:,} tokens"
    yield "at least", ", ".join(f"{name} {1e3 * value:.0f} ms" for name, value in times.seconds.items())
    yield (
        "bound",
        f"{times.bound}: {times.least:.3g} s a step at least, {tokens / times.least:,.0f} tokens/s, "
        f"MFU {useful:.0%} at most",
    )
