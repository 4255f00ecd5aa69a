"""Reward functions in processes of their own, with a deadline: a function that hangs is killed and costs a score, not
the run.

N answers, F functions. Nothing but lines of JSON goes to and fro.
"""

import contextlib
import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from trainers.reward_call import Scored

log = logging.getLogger(__name__)

MOST_FAILURES = 0.2  # of the answers that a function is asked about
_ROOT = Path(__file__).resolve().parents[1]
_TO_START = 60.0  # seconds that a process has to load the functions
_WHOLE, _ENDED = object(), object()  # all of a call was said; the process is gone


class RewardFunctions:
    """Functions by name (`rewards.REWARDS`, `file.py:function`, `module:function`), in `workers` processes; `kwargs`
    are their settings by name. Use it as a context: the processes begin and end with it, with a ValueError for a
    function that cannot be loaded. A function has `timeout` seconds for the answers of one call, from when a process is
    free for it: one that hangs takes no time of the others.
    """

    def __init__(self, specs: Sequence[str], *, kwargs: Mapping[str, Mapping[str, Any]], timeout: float, workers: int):
        self._specs, self._timeout = list(specs), timeout
        self._functions = [[spec, dict(kwargs.get(spec, {}))] for spec in specs]
        self._one_by_one: list[bool] = []  # of each function, whether it has verl's form
        self._workers: queue.Queue[_Worker] = queue.Queue()
        self._count = workers
        self.failures = 0

    @property
    def names(self) -> tuple[str, ...]:
        """What the functions are called in the log: two of one name by their file too."""
        short = [spec.rpartition(":")[2] for spec in self._specs]
        return tuple(name if short.count(name) == 1 else spec for name, spec in zip(short, self._specs, strict=True))

    def __enter__(self) -> "RewardFunctions":
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for _ in range(self._count):
                worker = _Worker(self._functions)
                self._workers.put(worker)
                self._one_by_one = worker.one_by_one
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        while not self._workers.empty():
            self._workers.get().kill()

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> np.ndarray:
        """The scores float64 [N, F], NaN where a function has no opinion or failed. ValueError where one failed for
        more than a fifth of the answers: it names the function, its place and its first failure.
        """
        given = {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        count = len(completions)
        found = np.full((count, len(self._specs)), np.nan)
        with ThreadPoolExecutor(max_workers=self._count) as pool:
            calls = [(f, places) for f in range(len(self._specs)) for places in self._parts(f, count)]
            asked = [(f, pool.submit(self._ask, f, given, places)) for f, places in calls]
        failed: dict[int, list[str]] = {}
        for f, call in asked:
            for each in call.result():
                if each.failure is not None:
                    failed.setdefault(f, []).append(each.failure)
                elif each.score is not None:
                    found[each.place, f] = each.score
        for f, failures in failed.items():
            self._tell(f, failures, count)
        return found

    def _parts(self, f: int, count: int) -> list[list[int]]:
        """The answers of each call: a function of single answers runs in all processes at once."""
        parts = min(self._count, count) if self._one_by_one[f] else 1
        return [list(range(part, count, parts)) for part in range(parts)]

    def _ask(self, f: int, given: Mapping[str, Any], places: list[int]) -> list[Scored]:
        worker = self._workers.get()
        try:
            found, whole = worker.ask({"function": f, "given": given, "places": places}, self._timeout)
            if not whole:
                why = worker.death() or f"no score within {self._timeout:g} s (training.reward_timeout)"
                worker.kill()
                worker = _Worker(self._functions)
                answered = {each.place for each in found}
                left = [place for place in places if place not in answered]
                found += [Scored(place, None, f"answer {place}: {why}") for place in left]
            return found
        finally:
            self._workers.put(worker)

    def _tell(self, f: int, failures: list[str], count: int) -> None:
        self.failures += len(failures)
        text = f"reward function {self._specs[f]} failed for {len(failures)} of {count} answers: {failures[0]}"
        if len(failures) > MOST_FAILURES * count:
            raise ValueError(f"{text}; mend it, or take it out of training.reward_functions")
        log.warning("%s; they have no score of it", text)


class _Worker:
    """A process, and the thread that reads what it says."""

    def __init__(self, functions: list[list[Any]]):
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        lifeline, held = os.pipe()
        self._lifeline = os.fdopen(held, "w")  # it ends with this process, however that ends
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trainers.reward_worker", str(lifeline)],
            pass_fds=[lifeline],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},  # the devices are the trainer's
            text=True,
            encoding="utf-8",
        )
        os.close(lifeline)
        self._said: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self._write({"functions": functions})
        opened, whole = self._heard(_TO_START)
        wrong = next((each.failure for each in opened if each.failure is not None), None)
        if wrong is None and not whole:
            wrong = f"training.reward_functions: not loaded within {_TO_START:g} s; {self.death() or ''}"
        if wrong is not None:
            self.kill()
            raise ValueError(wrong)
        self.one_by_one = [bool(each.score) for each in opened]

    def ask(self, call: Mapping[str, Any], seconds: float) -> tuple[list[Scored], bool]:
        """The scores that came in time, and whether that is all; if not, the process is of no more use."""
        self._write(call)
        return self._heard(seconds)

    def death(self) -> str | None:
        """How the process ended, if it did by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.01)
        code = self._process.poll()
        return None if code is None else f"its process ended with code {code}"

    def kill(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._lifeline):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _write(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then nothing will be said either
            self._process.stdin.write(json.dumps(message, default=_plain) + "\n")
            self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError):  # it was closed
            for line in self._process.stdout:
                found = json.loads(line)
                self._said.put(_WHOLE if found is None else Scored(*found))
        self._said.put(_ENDED)

    def _heard(self, seconds: float) -> tuple[list[Scored], bool]:
        until = time.monotonic() + seconds
        found: list[Scored] = []
        with contextlib.suppress(queue.Empty):
            while (said := self._said.get(timeout=max(0.0, until - time.monotonic()))) is not _ENDED:
                if said is _WHOLE:
                    return found, True
                found.append(said)
        return found, False


def _plain(value: Any) -> Any:
    """What JSON does not know, as it does: arrays and scalars of numpy; the rest as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
