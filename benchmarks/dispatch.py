"""What the host does for a step of a model of 28 layers: starting it, the loop around it, and waiting for the device.

    python -m benchmarks.dispatch
    python -m benchmarks.dispatch --width 256 --tokens 512      a device that is busy for longer

The real loop (`trainers.loop.train`) runs a random model on one device in float32, so narrow that the step is short. A
step is started while the device is still busy with the one before, as in training. Times are medians over steps without
a log line, of the wall clock and, where it says CPU, of the main thread's own processor time: that leaves out what it
waits for, and what other programs took from it. Waits are what that thread fetches from the device, as jax's profiler
sees it: whether the step before diverged.
"""

import argparse
import contextlib
import dataclasses
import gzip
import io
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.config import Compute, DecoderConfig, Layer
from models.decoder import abstract_params, init_params
from models.rope import Rope
from models.sharding import make_mesh
from trainers import optim
from trainers.checkpoint import Checkpoints
from trainers.loop import Every, Run, Schedule, device_batch, train
from trainers.metrics import Metrics
from trainers.profiler import Profiler, When
from trainers.progress import Progress
from trainers.sft import sft_loss
from trainers.step import Step, TrainState, build_step
from trainers.throughput import Throughput

LAYERS, VOCABULARY, HEAD, WARM = 28, 256, 16, 20
BAR = 0.3e-3  # seconds of a dispatch


class Same:
    """One batch, again and again, as the loop asks for batches."""

    part, rows = None, (0,)

    def __init__(self, rows: int, tokens: int):
        ids = np.random.default_rng(0).integers(1, VOCABULARY, (1, rows, tokens + 1), np.int32)
        ones = np.ones((1, rows, tokens), np.int32)
        places = np.broadcast_to(np.arange(tokens, dtype=np.int32), ones.shape)
        self._batch = {"tokens": ids[..., :-1], "targets": ids[..., 1:], "weights": ones.astype(np.float32)}
        self._batch |= {"segments": ones, "positions": places}

    def __next__(self) -> dict[str, np.ndarray]:
        return dict(self._batch)


class Call(NamedTuple):
    """A call of the step: when it began and ended, the main thread's processor seconds at both, and whether the step
    before was done when it began."""

    began: float
    ended: float
    cpu_began: float
    cpu_ended: float
    before_done: bool


class Found(NamedTuple):
    """Medians in seconds (`dispatch_least`: the shortest tenth are shorter), how often the host waited in a step, and
    the share of steps that began before the one before had ended."""

    dispatch: float
    dispatch_least: float
    dispatch_cpu: float
    loop_cpu: float
    batch_cpu: float
    device: float
    waits: float
    ahead: float


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder), options.width, options.tokens, steps=options.steps)
    print(f"{LAYERS} layers of width {options.width}, {options.tokens} tokens a step, {options.steps} steps, float32")
    print(
        f"  dispatch {1e3 * found.dispatch:.3f} ms, {1e3 * found.dispatch_cpu:.3f} ms of them CPU; the shortest tenth"
        f" below {1e3 * found.dispatch_least:.3f} ms; bar {1e3 * BAR:.1f} ms"
    )
    print(
        f"  loop     {1e3 * found.loop_cpu:.3f} ms CPU from one dispatch to the next, {1e3 * found.batch_cpu:.3f} ms of"
        f" them a batch put on the device"
    )
    print(f"  device   {1e3 * found.device:.3f} ms from a step's start to its end, alone")
    print(
        f"  waits    {found.waits:.2f} of the host a step; {100 * found.ahead:.0f} % of the steps were started before"
        f" the one before was done"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--width", type=int, default=32, help="of the model (default: %(default)s)")
    add("--tokens", type=int, default=64, help="of a row; a step has one (default: %(default)s)")
    add("--steps", type=int, default=400, help="steps measured (default: %(default)s)")
    return parser.parse_args()


def model_of(width: int) -> DecoderConfig:
    """A llama of 28 layers, as narrow as it is told."""
    rope = Rope(tuple(float(10000.0 ** -(i / HEAD)) for i in range(0, HEAD, 2)))
    return DecoderConfig(
        vocabulary=VOCABULARY,
        width=width,
        heads=width // HEAD,
        kv_heads=1,
        head_width=HEAD,
        mlp_width=2 * width,
        activation="silu",
        norm_eps=1e-5,
        tied_head=True,
        initializer_range=0.02,
        each=(Layer(None, rope),) * LAYERS,
    )


@contextlib.contextmanager
def run_of(
    folder: Path, width: int, tokens: int, *, steps: int, log_steps: int | None = None
) -> Iterator[tuple[Run, TrainState]]:
    """A run as `einkorn train` makes it, of the random model on one device, and its first state."""
    mesh, config = make_mesh({"data": 1}, devices=jax.devices()[:1]), model_of(width)
    betas = (0.9, 0.999)
    optimizer = optim.build(
        "adamw_torch", schedule=lambda step: 1e-4, weight_decay=0.0, betas=betas, eps=1e-8, momentum=0.0
    )
    loss = sft_loss(config, compute=Compute())
    step = build_step(loss, optimizer, abstract_params(config, dtype=jnp.float32), mesh=mesh, max_grad_norm=1.0)
    params = init_params(jax.random.key(0), config, dtype=jnp.float32)
    never = Every()
    with Metrics(folder, tensorboard=False) as metrics, Checkpoints(folder) as checkpoints:
        run = Run(
            step=step,
            frozen=None,
            mesh=mesh,
            batches=Same(1, tokens),
            schedule=Schedule(steps, None, log=Every(log_steps), log_first=False, evaluate=never, save=never),
            learning_rate=lambda step: 1e-4,
            metrics=metrics,
            meter=Throughput(total_steps=steps),
            progress=Progress(steps, file=io.StringIO()),
            checkpoints=checkpoints,
        )
        yield run, step.init(jax.device_put(params, step.shardings.params))


def watched(step: Step, calls: list[Call]) -> Step:
    """The step, of whose calls each is noted."""
    before: dict[str, jax.Array] = {}

    def call(*args: Any) -> Any:
        nonlocal before
        done = all(value.is_ready() for value in before.values())
        began, cpu_began = time.perf_counter(), time.thread_time()
        leaves, before = step.train_leaves(*args)
        calls.append(Call(began, time.perf_counter(), cpu_began, time.thread_time(), done))
        return leaves, before

    return step._replace(train_leaves=call)


def measured(folder: Path, width: int, tokens: int, *, steps: int) -> Found:
    """The loop by the clock, its step alone, and the loop once more under the profiler."""
    calls: list[Call] = []
    with run_of(folder / "timed", width, tokens, steps=WARM + steps) as (run, state):
        state = train(dataclasses.replace(run, step=watched(run.step, calls)), state)
        host = next(run.batches)
        batch = device_batch(host, run.mesh)

        def alone() -> None:
            nonlocal state
            state, metrics = run.step.train(state, None, batch)
            jax.block_until_ready(metrics)

        device = timed(alone, clock=time.perf_counter)
        put = timed(lambda: device_batch(host, run.mesh), clock=time.thread_time)
    calls = calls[WARM:]
    pairs = list(itertools.pairwise(calls))
    return Found(
        dispatch=statistics.median(call.ended - call.began for call in calls),
        dispatch_least=statistics.quantiles((call.ended - call.began for call in calls), n=10)[0],
        dispatch_cpu=statistics.median(call.cpu_ended - call.cpu_began for call in calls),
        loop_cpu=statistics.median(after.cpu_began - before.cpu_ended for before, after in pairs),
        batch_cpu=put,
        device=device,
        waits=waits_of_a_step(folder / "profiled", width, tokens),
        ahead=statistics.mean(not call.before_done for call in calls),
    )


def timed(work: Callable[[], object], *, clock: Callable[[], float], times: int = 50) -> float:
    """The median of a piece of work, in seconds of a clock."""
    seconds = []
    for _ in range(times):
        start = clock()
        work()
        seconds.append(clock() - start)
    return statistics.median(seconds)


def waits_of_a_step(folder: Path, width: int, tokens: int, *, steps: int = 50) -> float:
    """How often the thread that starts the steps fetched something from a device, a step, by a profile of the loop."""
    with run_of(folder, width, tokens, steps=WARM + steps) as (run, state):
        when = When(skip_first=WARM - 1, wait=0, warmup=0, active=steps)
        with Profiler(folder, when, done_steps=0, host=True, say=lambda text: None) as profiler:
            profiled = run.step._replace(train_leaves=profiler.around(run.step.train_leaves))
            train(dataclasses.replace(run, step=profiled), state)
    (file,) = folder.glob("steps-*/plugins/profile/*/*.trace.json.gz")
    with gzip.open(file) as text:
        events = [event for event in json.load(text)["traceEvents"] if event.get("ph") == "X"]
    marks = [event for event in events if event["name"] == "train"]
    first, last = min(mark["ts"] for mark in marks), max(mark["ts"] for mark in marks)
    fetched = [event for event in events if event["name"] == "np.asarray(jax.Array)" and first <= event["ts"] < last]
    return sum(event["tid"] == marks[0]["tid"] for event in fetched) / (len(marks) - 1)


if __name__ == "__main__":
    main()
