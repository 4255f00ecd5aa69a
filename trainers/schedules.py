"""Learning-rate schedules by Hugging Face's names, with its step indexing: update number t = 1, 2, … uses f(t - 1).

A schedule is a rise over the first `warmup` steps and a fall after them, both factors of the peak rate. Rise and fall
are written once, over `xp`: a Python step is computed by numpy in float64 (logs, plots), a traced one by jax.numpy in
float32 inside the step. Whatever decides between two branches is compared in whole numbers, so both agree on it.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

Factor = Callable[[Any, Any], Any]  # (step, xp) -> share of the peak rate


def schedule(
    name: str,
    *,
    learning_rate: float,
    steps: int,
    warmup_steps: int | float | None = None,
    warmup_ratio: float | None = None,
    **kwargs: Any,
) -> Callable[[Any], Any]:
    """Returns f(step) -> learning rate, where `step` counts the updates made before this one.

    `steps` is the whole run in optimizer updates; `kwargs` are `training.lr_scheduler_kwargs`. A Python step gives a
    Python float, a traced step a float32 scalar.
    Raises ValueError for an unknown name or option, and for a missing or impossible one.
    """
    if name in NEED_METRICS:
        raise ValueError(f"not implemented yet: lr_scheduler_type {name!r}, which follows a metric; {_allowed()}")
    if name not in SCHEDULES:
        raise ValueError(f"lr_scheduler_type is {name!r}; {_allowed()}")
    shape, options = SCHEDULES[name], list(inspect.signature(SCHEDULES[name]).parameters)[1:]
    if unknown := sorted(set(kwargs) - set(options)):
        raise ValueError(f"lr_scheduler_kwargs has {', '.join(unknown)}; {name!r} takes {', '.join(options) or 'none'}")
    run = Run(learning_rate, steps, warmup(steps, warmup_steps=warmup_steps, warmup_ratio=warmup_ratio))
    rise, fall = shape(run, **kwargs)

    def rate(step):
        if isinstance(step, (int, np.integer)):
            return float(learning_rate * (rise if step < run.warmup else fall)(int(step), np))
        return learning_rate * jnp.where(step < run.warmup, rise(step, jnp), fall(step, jnp)).astype(jnp.float32)

    return rate


def warmup(steps: int, *, warmup_steps: int | float | None, warmup_ratio: float | None) -> int:
    """Returns the number of warmup updates: `warmup_steps` if it is set, else the share `warmup_ratio`, rounded up.

    A `warmup_steps` below 1 is a share too, as in transformers 5. Raises ValueError for what is neither.
    """
    if warmup_steps is not None and warmup_steps < 0:
        raise ValueError(f"warmup_steps is {warmup_steps}; allowed: a number of steps, or a share of the run below 1")
    if warmup_ratio is not None and not 0 <= warmup_ratio <= 1:
        raise ValueError(f"warmup_ratio is {warmup_ratio}; allowed: 0 to 1")
    if warmup_steps:
        return int(warmup_steps) if warmup_steps >= 1 else math.ceil(steps * warmup_steps)
    return math.ceil(steps * (warmup_ratio or 0.0))


class Run(NamedTuple):
    """What every shape is drawn over: peak learning rate, updates in the whole run, updates of warmup."""

    peak: float
    steps: int
    warmup: int

    def rise(self, s, xp):
        """The straight line from 0: with any warmup, the first update has rate exactly 0."""
        return s / max(1, self.warmup)

    def progress(self, s):
        """The share of the fall that lies behind: 0 at the end of warmup, 1 at the end of the run."""
        return (s - self.warmup) / max(1, self.steps - self.warmup)


def _half_cosine(turns, xp):
    """(1 + cos(2 pi turns)) / 2, written as a square so that float32 does not cancel near 0."""
    return xp.square(xp.cos(math.pi * turns))


def _above(factor, floor):
    """`factor` of 1..0 squeezed into 1..floor."""
    return factor * (1.0 - floor) + floor


def _floor(run: Run, min_lr: float | None, min_lr_rate: float | None) -> float:
    if min_lr_rate is not None and min_lr is None:
        return min_lr_rate
    if min_lr is None or min_lr_rate is not None:
        raise ValueError("lr_scheduler_kwargs needs one of min_lr and min_lr_rate, and only one")
    if run.peak <= 0:
        raise ValueError(f"min_lr is a share of learning_rate, which is {run.peak}; set min_lr_rate")
    return min_lr / run.peak


def _constant(run: Run) -> tuple[Factor, Factor]:
    """No warmup, even where one is asked for: that is `constant_with_warmup`."""

    def flat(s, xp):
        return xp.ones(())

    return flat, flat


def _constant_with_warmup(run: Run) -> tuple[Factor, Factor]:
    return run.rise, lambda s, xp: xp.ones(())


def _linear(run: Run) -> tuple[Factor, Factor]:
    return run.rise, lambda s, xp: xp.maximum(0.0, (run.steps - s) / max(1, run.steps - run.warmup))


def _cosine(run: Run, *, num_cycles: float = 0.5) -> tuple[Factor, Factor]:
    return run.rise, lambda s, xp: _half_cosine(num_cycles * run.progress(s), xp)


def _cosine_with_restarts(run: Run, *, num_cycles: int = 1) -> tuple[Factor, Factor]:
    if num_cycles != int(num_cycles) or num_cycles < 1:
        raise ValueError(f"num_cycles is {num_cycles}; 'cosine_with_restarts' takes a whole number from 1")
    length = max(1, run.steps - run.warmup)

    def fall(s, xp):
        turns = (int(num_cycles) * (s - run.warmup)) % length / length / 2
        return xp.where(s - run.warmup >= length, 0.0, _half_cosine(turns, xp))

    return run.rise, fall


def _cosine_with_min_lr(
    run: Run, *, min_lr: float | None = None, min_lr_rate: float | None = None, num_cycles: float = 0.5
) -> tuple[Factor, Factor]:
    floor = _floor(run, min_lr, min_lr_rate)
    return run.rise, lambda s, xp: xp.maximum(0.0, _above(_half_cosine(num_cycles * run.progress(s), xp), floor))


def _cosine_warmup_with_min_lr(
    run: Run,
    *,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
    num_cycles: float = 0.5,
) -> tuple[Factor, Factor]:
    """The one shape that is a step ahead: its first update is not at 0, and its last is at the floor."""
    floor = _floor(run, min_lr, min_lr_rate)

    def rise(s, xp):
        if warmup_lr_rate is None:
            return (s + 1) / max(1, run.warmup)
        return warmup_lr_rate + (1.0 - warmup_lr_rate) * s / max(1, run.warmup - 1)

    def fall(s, xp):
        return xp.maximum(0.0, _above(_half_cosine(num_cycles * run.progress(s + 1), xp), floor))

    return rise, fall


def _polynomial(run: Run, *, lr_end: float = 1e-7, power: float = 1.0) -> tuple[Factor, Factor]:
    if lr_end >= run.peak:
        raise ValueError(f"lr_end is {lr_end}; 'polynomial' needs it below learning_rate, which is {run.peak}")

    def fall(s, xp):
        left = xp.maximum(0.0, (run.steps - s) / max(1, run.steps - run.warmup))
        return _above(left**power, lr_end / run.peak)

    return run.rise, fall


def _inverse_sqrt(run: Run, *, timescale: int | None = None) -> tuple[Factor, Factor]:
    scale = timescale or run.warmup or 10_000
    # where() computes both sides: before the end of warmup the root's argument is held at a legal value
    return run.rise, lambda s, xp: xp.sqrt(scale / (xp.maximum(s, run.warmup) + (scale - run.warmup)))


def _warmup_stable_decay(
    run: Run,
    *,
    num_decay_steps: int | None = None,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> tuple[Factor, Factor]:
    """Up, along, and down over `num_decay_steps`; what is not stable steps of the run is the lowest rate."""
    curves = ("linear", "cosine", "1-sqrt")
    for option, value in (("warmup_type", warmup_type), ("decay_type", decay_type)):
        if value not in curves:
            raise ValueError(f"lr_scheduler_kwargs.{option} is {value!r}; allowed: {', '.join(curves)}")
    if num_decay_steps is None:
        raise ValueError("'warmup_stable_decay' needs lr_scheduler_kwargs.num_decay_steps")
    if num_stable_steps is None:
        num_stable_steps = run.steps - run.warmup - num_decay_steps
    if num_stable_steps < 0:
        raise ValueError(
            f"'warmup_stable_decay' has {run.warmup} steps of warmup and {num_decay_steps} of decay in a run of "
            f"{run.steps}; lower lr_scheduler_kwargs.num_decay_steps, or the warmup"
        )
    turn, end = run.warmup + num_stable_steps, run.warmup + num_stable_steps + num_decay_steps

    def curve(kind, left, xp, cycles=0.5):
        """From 1 at left = 1 to 0 at left = 0."""
        if kind == "linear":
            return left
        return _half_cosine(cycles * (1.0 - left), xp) if kind == "cosine" else 1.0 - xp.sqrt(1.0 - left)

    def rise(s, xp):
        left = xp.minimum(1.0, s / max(1, run.warmup))
        return xp.maximum(0.0, _above(curve(warmup_type, left, xp), min_lr_ratio))

    def fall(s, xp):
        left = xp.clip((end - s) / max(1, num_decay_steps), 0.0, 1.0)
        down = xp.maximum(0.0, _above(curve(decay_type, left, xp, num_cycles), min_lr_ratio))
        return xp.where(s < turn, 1.0, xp.where(s < end, down, min_lr_ratio))

    return rise, fall


def _allowed() -> str:
    return "allowed: " + ", ".join(SCHEDULES)


SCHEDULES: dict[str, Callable[..., tuple[Factor, Factor]]] = {
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "cosine_warmup_with_min_lr": _cosine_warmup_with_min_lr,
    "constant": _constant,
    "constant_with_warmup": _constant_with_warmup,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "warmup_stable_decay": _warmup_stable_decay,
}
NEED_METRICS = ("reduce_lr_on_plateau", "greedy")
