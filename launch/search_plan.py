"""`einkorn plan --search`: which mesh, rematerialisation and microbatch take the least time of those that fit.

All candidates are ranked by formulas; where there is a compiler the best are compiled, and the fastest that fits is
recommended. Every candidate trains on as many rows a step as the configuration asks for.
"""

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh
from ml_collections import ConfigDict
from rich.console import Console

from configs import derived
from configs.load import Loaded
from configs.methods import GRPO
from launch import assemble, planned_generation
from launch.ahead import TooLarge, can_compile, compiled_step, mesh_for
from launch.assemble import Model
from launch.chips import GIB, Target, target_of
from launch.estimate import Times, lasting_bytes, passing_bytes, sent_bytes, step_flops, times_of
from launch.plan import estimated, kind_of
from launch.planned_batch import Planned, planned_on
from models.sharding import AXES, replicas

REMAT = ("none", "dots", "full")
ROOM = 0.8  # of the memory, where nothing but formulas says what is needed
FEWEST_TOKENS = 256  # of a row, that a device has along `context`
MOST_TENSOR = 16  # devices that share a layer's matrices
SHOWN = 8


class Candidate(NamedTuple):
    """A way to run: what it changes in the configuration, by key; what it needs and takes by formulas, and where it was
    compiled, by the compiler: bytes a device, infinite where it said no more than that they are too many.
    """

    changes: dict[str, Any]
    mesh: dict[str, int]
    remat: str
    rows: str
    estimated: float
    times: Times
    needed: float | None = None

    @property
    def seconds(self) -> float:
        """About how long a step takes, were devices as fast as they can be."""
        return self.times.least + self.times.waits

    @property
    def order(self) -> tuple[Any, ...]:
        """What candidates are ranked by: seconds, then those of all that can bound a step together, then what is
        computed again beside matrix products, then bytes.
        """
        seconds = [float(f"{value:.3g}") for value in (self.seconds, sum(self.times.seconds.values()))]
        return (*seconds, REMAT.index(self.remat), self.estimated, *self.mesh.values(), self.rows)

    def fits(self, goal: Target) -> bool:
        """Whether it may be recommended."""
        return self.estimated <= ROOM * goal.chip.hbm if self.needed is None else self.needed <= goal.chip.hbm


def run(loaded: Loaded, *, target: str, compiles: int) -> bool:
    """Print the best ways to run on a target, compiled so many times at most, and what to change for the first; whether
    there is one that fits.
    """
    console, goal = Console(highlight=False), target_of(target)
    model = assemble.open_model(loaded.config, only_config=True)
    ranked = candidates(loaded.config, goal, model)
    say = functools.partial(console.print, markup=False, soft_wrap=True)
    say(f"{len(ranked)} ways to run on {goal.chips} × {kind_of(goal)}, each with the rows a step that are asked for")
    if can_compile(goal) and compiles:

        def judge(one: Candidate) -> Candidate:
            say(f"compiling {_split(one)}, remat {one.remat}, {one.rows} rows …")
            return by_compiler(loaded.config, goal, model, one)

        ranked = judged(ranked, goal, most=compiles, judge=judge)
    else:
        say(f"{estimated(goal)}; {ROOM:.0%} of the memory may be needed by it")
    for line in table(ranked, goal):
        say(line)
    chosen = recommended(ranked, goal)
    if chosen is None:
        say("does not fit: none of these; take more devices, shorter rows, fewer rows a step, or an adapter")
        return False
    say("recommended, on the command line:")
    say("  " + " ".join(f"--{word}" for word in overrides(chosen)))
    say("or in the file:")
    for section, keys in itertools.groupby(chosen.changes, key=lambda key: key.partition(".")[0]):
        for line in _yaml(section, {key.partition(".")[2]: chosen.changes[key] for key in keys}):
            say(f"  {line}")
    return True


def candidates(config: ConfigDict, goal: Target, model: Model) -> list[Candidate]:
    """All ways that keep the batch, best first, whether they fit or not."""
    asked = planned_on(mesh_for(config, goal, real=False), config, model)
    scratch = _copy(config)
    found, flops = [], dict[Any, float]()
    for sizes in meshes(goal.chips, model, length=asked.shapes.length):
        if sizes["data"] % goal.slices:  # each slice has whole copies
            continue
        mesh, lasting = AbstractMesh(tuple(sizes.values()), tuple(sizes)), None
        for changes in batches(config, asked, mesh):
            _change(scratch, changes)
            try:
                planned = planned_on(mesh, scratch, model)
            except ValueError:  # such a method has no such batch
                continue
            if step_rows(planned) != step_rows(asked):
                continue
            lasting = lasting or lasting_bytes(planned)
            if planned.shapes not in flops:
                flops[planned.shapes] = step_flops(planned)
            for remat in REMAT:
                one = planned._replace(compute=dataclasses.replace(planned.compute, remat=remat))
                every = {f"mesh.{axis}": size for axis, size in sizes.items()} | {"training.remat_policy": remat}
                rows = f"{one.shapes.accumulation} × {one.shapes.rows // replicas(mesh)}"
                sent = sum(sent_bytes(one).values())
                times = times_of(one, goal, sent=sent, flops=flops[planned.shapes], lasting=lasting)
                needed = sum(lasting.values()) + most_passing(one)
                found.append(Candidate(every | changes, sizes, remat, rows, needed, times))
    return sorted(found, key=lambda one: one.order)


def meshes(chips: int, model: Model, *, length: int) -> Iterator[dict[str, int]]:
    """Every mesh of so many devices whose axes divide what they split: heads and units of the MLP, experts, tokens."""
    c = model.config
    for tensor, context, expert in itertools.product(_divisors(chips), repeat=3):
        left = chips // (tensor * context * expert)
        whole_heads = c.heads % tensor == 0 and (c.kv_heads % tensor == 0 or tensor % c.kv_heads == 0)
        if left * tensor * context * expert != chips or tensor > MOST_TENSOR or not whole_heads or c.mlp_width % tensor:
            continue
        if context > 1 and (length % context or length // context < FEWEST_TOKENS):
            continue
        if expert > 1 and (c.experts is None or c.experts.count % expert):
            continue
        for data in _divisors(left):
            sizes = {"data": data, "fsdp": left // data, "expert": expert, "tensor": tensor, "context": context}
            yield {axis: sizes[axis] for axis in AXES}


def batches(config: ConfigDict, asked: Planned, mesh: Any) -> Iterator[dict[str, Any]]:
    """Every way to cut a step's rows into microbatches on a mesh: what is changed for it."""
    training, rows = config.training, asked.shapes.accumulation * asked.shapes.rows * asked.shapes.together
    if rows % replicas(mesh):
        return
    of_device = rows // replicas(mesh)
    for each in _divisors(of_device):
        changes = {"training.per_device_train_batch_size": each}
        if training.trainer_type != "VERL_GRPO":  # which says how many answers an update has, and not how often
            changes["training.gradient_accumulation_steps"] = of_device // each
        if training.trainer_type == "TRL_GRPO" and training.trainer_kwargs.steps_per_generation:
            answers = derived.rollout(config, replicas=replicas(asked.mesh)).answers
            if answers % (each * replicas(mesh)):
                continue
            changes["training.trainer_kwargs.steps_per_generation"] = answers // (each * replicas(mesh))
        yield changes


def step_rows(planned: Planned) -> tuple[int, ...]:
    """What a step trains on, however it is cut: its rows; of own answers the prompts, answers and updates too."""
    if planned.config.training.trainer_type not in GRPO:
        return (planned.shapes.accumulation * planned.shapes.rows,)
    asks = derived.rollout(planned.config, replicas=replicas(planned.mesh))
    return asks.prompts, asks.generations, asks.updates, asks.passes, asks.accumulation * asks.microbatch


def most_passing(planned: Planned) -> float:
    """Bytes a device by formulas beside what lasts, in the update or in the generation, whichever needs more."""
    passing = sum(passing_bytes(planned).values())
    if (generation := planned_generation.generation_of(planned)) is not None:
        passing = max(passing, sum(planned_generation.passing_bytes(planned, generation).values()))
    return passing


def judged(
    ranked: Sequence[Candidate], goal: Target, *, most: int, judge: Callable[[Candidate], Candidate]
) -> list[Candidate]:
    """The candidates, best first, so many of them as `judge` finds them. Where one needs more than formulas say, others
    are taken to need that much more too.
    """
    found, left, more = list[Candidate](), list(ranked), 1.0
    for _ in range(most):
        best = min((one.seconds for one in found if one.fits(goal)), default=math.inf)
        left = [one for one in left if one.estimated * more <= goal.chip.hbm]
        if not left or left[0].seconds >= best:
            break
        one, *left = left
        found.append(judge(one))
        assert found[-1].needed is not None
        if not found[-1].fits(goal):
            needed = 1.05 * goal.chip.hbm if math.isinf(found[-1].needed) else found[-1].needed
            more = max(more, needed / one.estimated)
    return sorted(found, key=lambda one: (not one.fits(goal), one.order)) + left


def by_compiler(config: ConfigDict, goal: Target, model: Model, one: Candidate) -> Candidate:
    """A candidate as the compiler finds it."""
    changed = _copy(config)
    _change(changed, one.changes)
    planned = planned_on(mesh_for(changed, goal, real=True), changed, model)
    try:
        found = compiled_step(planned)
    except TooLarge as error:
        return one._replace(needed=error.used or math.inf)
    times = times_of(planned, goal, sent=sum(each.sent for each in found.said.values()))
    return one._replace(needed=found.needed, times=times)


def recommended(ranked: Sequence[Candidate], goal: Target) -> Candidate | None:
    """The fastest that fits, of those that were compiled if any was."""
    asked = [one for one in ranked if one.needed is not None] or ranked
    return min((one for one in asked if one.fits(goal)), key=lambda one: one.order, default=None)


def overrides(one: Candidate) -> list[str]:
    """What `einkorn train` is told to run so, without the dashes."""
    return [f"{key}={value}" for key, value in one.changes.items()]


def table(ranked: Sequence[Candidate], goal: Target) -> Iterator[str]:
    """The best of them as lines."""
    yield f"{'mesh':36} {'remat':5} {'rows':>9} {'GiB, about':>10} {'compiled':>8} {'s a step':>8}  bound"
    fitting = [one for one in ranked if one.needed is not None or one.fits(goal)] or list(ranked)
    for one in fitting[:SHOWN]:
        needed = "" if one.needed is None else "too many" if one.needed > goal.chip.hbm else f"{one.needed / GIB:.2f}"
        yield (
            f"{_split(one):36} {one.remat:5} {one.rows:>9} {one.estimated / GIB:10.2f} {needed:>8} {one.seconds:8.3g}  "
            f"{one.times.bound}"
        )


def _split(one: Candidate) -> str:
    return " × ".join(f"{axis} {size}" for axis, size in one.mesh.items() if size > 1) or "one device"


def _yaml(section: str, keys: dict[str, Any]) -> Iterator[str]:
    yield f"{section}: {{{', '.join(f'{key}: {value}' for key, value in keys.items())}}}"


def _copy(config: ConfigDict) -> ConfigDict:
    own = copy.deepcopy(config)
    own.unlock()
    return own


def _change(config: ConfigDict, changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        *sections, last = key.split(".")
        section = config
        for name in sections:
            section = section[name]
        section[last] = value


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
