"""Profiles of some steps: what host and devices did meanwhile, as files that Perfetto, TensorBoard and xprof open.

A profile begins once the step before is done and ends once its own last step is: it holds those steps and no others,
each under the mark `train` with its number. Waiting for that is all that profiling changes about a run.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax


class When(NamedTuple):
    """Which steps are profiled, as torch.profiler.schedule has it: after `skip_first` steps, cycles of `wait` and
    `warmup` steps that are not, and `active` ones that are; `repeat` cycles, or with 0 to the end.
    """

    skip_first: int = 1  # it compiles
    wait: int = 0
    warmup: int = 1
    active: int = 3
    repeat: int = 1

    def place(self, count: int) -> int | None:
        """Which of a cycle's profiled steps the run's `count`-th one (from 1) is, from 0 on; None: it is not one."""
        cycle, place = divmod(count - 1 - self.skip_first, self.wait + self.warmup + self.active)
        place -= self.wait + self.warmup
        return None if cycle < 0 or 0 < self.repeat <= cycle or place < 0 else place


class Profiler:
    """Profiles steps of `around(train)`. `done_steps`: of the optimizer, before this process began; `host`: whether
    it is looked at closely, as devices always are; `say`: told of each file. Each process profiles itself, in `folder`.
    """

    def __init__(
        self,
        folder: Path,
        when: When,
        *,
        done_steps: int,
        host: bool,
        say: Callable[[str], None],
    ):
        self._folder, self._when, self._say = folder, when, say
        self._before, self._count = done_steps, 0
        self._options = jax.profiler.ProfileOptions()
        self._options.host_tracer_level = 2 if host else 1  # 1: the steps' marks
        self._options.python_tracer_level = 0  # every call of Python would slow the host by far more than it tells
        self._writes: Path | None = None
        self._found: Any = None
        self._profiles = 0

    def around(self, train: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
        """The step `train(leaves, …) -> (leaves, metrics)`, profiled where its turn has come."""

        def call(*args: Any) -> tuple[Any, Any]:
            self._count += 1
            step, place = self._before + self._count, self._when.place(self._count)
            if place == 0:
                self._start(step, step + self._when.active - 1)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                leaves, self._found = train(*args)
            if place == self._when.active - 1:
                self._stop()
            return leaves, self._found

        return call

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._writes:
            self._stop()
        elif not self._profiles and kind is None:
            self._say(f"nothing was profiled: of {self._count} steps none is one of training.profiler.schedule")

    def _start(self, first: int, last: int) -> None:
        jax.block_until_ready(self._found)
        process = f"process-{jax.process_index()}" if jax.process_count() > 1 else ""
        self._writes = self._folder / f"steps-{first}-{last}" / process
        jax.profiler.start_trace(self._writes, profiler_options=self._options)

    def _stop(self) -> None:
        jax.block_until_ready(self._found)
        jax.profiler.stop_trace()
        assert self._writes is not None
        files = self._writes.glob("plugins/profile/*/*.trace.json.gz")
        self._say(f"profile for ui.perfetto.dev: {max(files, key=lambda file: file.stat().st_mtime)}")
        self._writes, self._profiles = None, self._profiles + 1
