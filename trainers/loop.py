"""The training loop, for every method: a batch, a step, a line in the log, now and then an evaluation and a checkpoint.

The host stays one step ahead of the devices: what a step found is read while the next one runs. Only a log line, an
evaluation or a checkpoint waits for the devices.
"""

import contextlib
import logging
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from input_pipeline.batches import Part, merged
from models.sharding import batch_sharding
from trainers.checkpoint import Checkpoints
from trainers.losses import Sum
from trainers.metrics import Metrics, Window
from trainers.processes import Highest, of_all_processes
from trainers.progress import Progress
from trainers.step import Batch, Leaves, Step, TrainState
from trainers.throughput import Throughput

log = logging.getLogger(__name__)

HostBatch = dict[str, np.ndarray]


class Diverged(RuntimeError):
    """The loss or a gradient was not finite."""


class _Found(NamedTuple):
    """What a step found, not yet looked at, and the rows it was made with."""

    step: int
    metrics: dict[str, jax.Array]
    rows: tuple[int, ...]


class _Mean(NamedTuple):
    """The sum of the losses of so many steps, on the host."""

    total: float = 0.0
    steps: int = 0


class Interrupted(RuntimeError):
    """A signal asked the run to stop, and its state was saved; `signal` is its number."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.signal = number


class Every(NamedTuple):
    """When something is due: every so many steps, at the end of each epoch, or never (None and False)."""

    steps: int | None = None
    epoch: bool = False

    def due(self, step: int, steps_per_epoch: float | None) -> bool:
        """Whether it is due after optimizer step `step` (from 1)."""
        if self.steps:
            return step % self.steps == 0
        if self.epoch and steps_per_epoch:
            return math.floor(step / steps_per_epoch + 1e-6) > math.floor((step - 1) / steps_per_epoch + 1e-6)
        return False


@dataclass(frozen=True)
class Schedule:
    """How long a run goes, and what it does on the way."""

    steps: int
    steps_per_epoch: float | None
    log: Every
    log_first: bool
    evaluate: Every
    save: Every


@dataclass
class Run:
    """The parts of one run. `batches` is an `input_pipeline.batches.Batches` of all processes, or, where the policy
    makes its own, a `rollout.Rollouts`, of which `sampled` gives the next one, and `logged` what is to be logged of it.
    `evaluation` makes a fresh iterator over the validation split, and `measures` says what its sums mean beside their
    means; or `judged` says all that an evaluation finds. `meta` is saved with every checkpoint; `shapes` are those of
    the batches so far, each compiled once."""

    step: Step
    frozen: Any
    mesh: Mesh
    batches: Any
    schedule: Schedule
    learning_rate: Callable[[int], Any]
    metrics: Metrics
    meter: Throughput
    progress: Progress
    checkpoints: Checkpoints
    sampled: Callable[[TrainState], HostBatch] | None = None
    logged: Callable[[], dict[str, float]] = dict
    evaluation: Callable[[], Iterator[HostBatch]] | None = None
    measures: Callable[[Mapping[str, Sum]], dict[str, float]] = lambda sums: {}
    judged: Callable[[TrainState], dict[str, float]] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    tokens_seen: int = 0
    shapes: set[tuple[int, ...]] = field(default_factory=set)


def train(run: Run, state: TrainState) -> TrainState:
    """Train from `state` to the last step, and return the state then.

    Raises Diverged where the loss is not finite (the state is as before that step, and its checkpoint is named),
    Interrupted after a SIGTERM or Ctrl-C, once the state is saved: on all processes after the same step.
    """
    window = Window()
    start = done = int(state.step)
    leaves = jax.tree.leaves(state)
    losses = _Mean()
    before: _Found | None = None
    highest = Highest(run.mesh)
    with _signals() as stop:
        while done < run.schedule.steps:
            host = _next_batch(run, leaves)
            batch = device_batch(host, run.mesh, part=run.batches.part)
            leaves, found = run.step.train_leaves(leaves, run.frozen, batch)
            done += 1
            asked = highest(stop.number)  # the same on all processes, whichever the signal reached
            _judge(run, before)
            before = _Found(done, found, run.batches.rows)
            amounts = _amounts(host, run.batches.part)
            run.tokens_seen += amounts["tokens"]
            run.meter.step(**amounts)
            window.add({name: (value, 1.0) for name, value in (found | run.logged()).items() if name != "halted"})
            last = done == run.schedule.steps or bool(asked)
            if _due(run, run.schedule.log, done) or (done == 1 and run.schedule.log_first) or last:
                _judge(run, before)
                losses = _log(run, window, done, losses, steps=done - start - losses.steps)
            run.progress.advance(done)
            if (run.evaluation or run.judged) and _due(run, run.schedule.evaluate, done):
                _judge(run, before)
                _evaluate(run, run.step.state(leaves), done)
            if _due(run, run.schedule.save, done) or asked:
                _judge(run, before)
                _save(run, run.step.state(leaves), done)
            if asked:
                run.checkpoints.wait()
                name = signal.Signals(asked).name
                raise Interrupted(f"{name}: stopped at step {done}, saved as checkpoint-{done}", asked)
        _judge(run, before)
    run.metrics.log(
        done, {**run.meter.summary(), "train_loss": losses.total / max(losses.steps, 1)}, epoch=_epoch(run, done)
    )
    return run.step.state(leaves)


def _next_batch(run: Run, leaves: Leaves) -> HostBatch:
    if run.sampled is None:
        with run.meter.waiting_for_data():
            host = next(run.batches)
    else:
        host = run.sampled(run.step.state(leaves))
    _tell_shape(run, host)
    return host


def device_batch(host: HostBatch, mesh: Mesh, *, part: Part | None = None) -> Batch:
    """Put a host batch on the mesh: [A, B, L] of all processes, of which each hands over the part that its devices
    hold; or only that `part` of it.
    """
    sharding = batch_sharding(mesh)

    def whole(value: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)

    def piece(value: np.ndarray) -> jax.Array:
        assert part is not None
        A, _, *rest = value.shape

        def held(index: Any) -> np.ndarray:
            start, stop, _ = index[1].indices(part.rows)
            return value[(index[0], slice(start - part.first, stop - part.first), *index[2:])]

        return jax.make_array_from_callback((A, part.rows, *rest), sharding, held)

    return {name: whole(value) if part is None else piece(value) for name, value in host.items()}


def _amounts(host: HostBatch, part: Part | None) -> dict[str, int]:
    """Tokens, rows, patches and pairs of these that see one another, of a batch; of a part, whose rows are packed full,
    as many as that makes of the whole.
    """
    amounts = {"tokens": np.count_nonzero(host["segments"]), "rows": host["segments"].any(axis=-1).sum()}
    if "patch_segments" in host:
        segments = host["patch_segments"].reshape(-1, host["patch_segments"].shape[-1])
        of_picture = np.concatenate([np.bincount(row[row > 0]) for row in segments])
        amounts |= {"patches": of_picture.sum(), "pairs": np.square(of_picture).sum()}
    share = 1.0 if part is None else part.rows / part.count
    return {name: round(amount * share) for name, amount in amounts.items()}


def evaluate(step: Step, params: Any, frozen: Any, mesh: Mesh, batches: Iterator[HostBatch]) -> dict[str, Sum]:
    """The method's sums over all batches: exact over tokens, however they are batched."""
    sums: dict[str, Sum] | None = None
    for host in batches:
        found = step.evaluate(params, frozen, device_batch(host, mesh))
        sums = found if sums is None else jax.tree.map(jax.numpy.add, sums, found)
    if sums is None:
        raise ValueError("the validation split has no usable rows")
    return sums


def _log(run: Run, window: Window, done: int, losses: _Mean, *, steps: int) -> _Mean:
    """Log the means of the last `steps` steps; returns the mean over all so far."""
    means = window.means()
    rates = run.meter.read()
    values = {**means, "learning_rate": float(run.learning_rate(done - 1)), "num_tokens": run.tokens_seen, **rates}
    run.progress.show(done, run.metrics.log(done, values, epoch=_epoch(run, done)))
    return _Mean(losses.total + means["loss"] * steps, losses.steps + steps)


def _evaluate(run: Run, state: TrainState, done: int) -> None:
    with run.meter.pause():
        if run.judged is not None:
            found = run.judged(state)
        else:
            assert run.evaluation is not None
            sums = evaluate(run.step, state.params, state.frozen(run.frozen), run.mesh, run.evaluation())
            found = {name: float(each.mean()) for name, each in sums.items() if float(each.count)} | run.measures(sums)
    values = {f"eval_{name}": value for name, value in found.items()}
    run.progress.show(done, run.metrics.log(done, values, epoch=_epoch(run, done)))


def _save(run: Run, state: TrainState, done: int) -> None:
    epoch = _epoch(run, done) or 0.0
    with run.meter.pause():
        text = run.metrics.trainer_state(
            done, max_steps=run.schedule.steps, epoch=epoch, saved_steps=[*run.checkpoints.steps(), done]
        )
        meta = {**run.meta, "tokens_seen": run.tokens_seen, "wandb_id": run.metrics.wandb_id}
        run.metrics.flush()
        run.checkpoints.save(
            done,
            state,
            data_state=merged(of_all_processes(run.batches.get_state())),
            meta=meta,
            files={"trainer_state.json": text},
        )


def _judge(run: Run, found: _Found | None) -> None:
    """Wait for a step's metrics and raise if it was not finite."""
    if found is None or not bool(found.metrics["halted"]):
        return
    run.checkpoints.wait()
    saved = run.checkpoints.steps()
    good = f"checkpoint-{saved[-1]} is the last good one" if saved else "there is no checkpoint"
    rows = ", ".join(map(run.batches.name_of, found.rows[:8])) + (
        f" and {len(found.rows) - 8} more" if len(found.rows) > 8 else ""
    )
    loss, norm = float(found.metrics["loss"]), float(found.metrics["grad_norm"])
    raise Diverged(
        f"step {found.step} gave loss {loss} and gradient norm {norm}, and was not applied; {good}. Its rows: {rows}. "
        f"Look at them with `einkorn inspect`, or lower training.learning_rate"
    )


def _tell_shape(run: Run, host: HostBatch) -> None:
    """A batch of a new shape takes long, since the step is compiled for it: say so, once."""
    shape = host["tokens"].shape
    if shape not in run.shapes:
        run.shapes.add(shape)
        count = len(run.shapes)
        many = f"{count} shape{'s' if count > 1 else ''} so far"
        run.progress.note(f"compiling for rows of {shape[-1]:,} tokens; {many}")


def _due(run: Run, every: Every, done: int) -> bool:
    return every.due(done, run.schedule.steps_per_epoch)


def _epoch(run: Run, done: int) -> float | None:
    return done / run.schedule.steps_per_epoch if run.schedule.steps_per_epoch else None


class _Stop:
    """Which signal has asked to stop; 0: none."""

    number: int = 0


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    """Let the first SIGTERM or Ctrl-C finish the step and save; the second one acts at once."""
    stop = _Stop()
    former: dict[int, Any] = {}

    def ask(number: int, frame: FrameType | None) -> None:
        stop.number = number
        log.warning("%s: saving after this step; once more to stop at once", signal.Signals(number).name)
        signal.signal(number, former[number])

    try:
        for asked in (signal.SIGTERM, signal.SIGINT):
            former[asked] = signal.signal(asked, ask)
    except ValueError:
        former = {}  # not the main thread: signals are somebody else's
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
