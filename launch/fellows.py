"""The processes of one run end together: what stops one of them is said by all, with the same exit code.

Who fails writes it under a key of the service that jax's processes meet at, unless another was first; everyone looks
there twice a second from a thread of its own, since its main one may wait for those that are gone. A process that is
killed writes nothing: the others' collectives fail, which the first to notice tells; where these only hang, or where
process 0 is gone, and with it that service, jax aborts them once heartbeats are missing (launch/distributed.py).
"""

import contextlib
import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import Any, NamedTuple

import jax

from trainers.exits import Exit, ending_of

LOOK = 0.5
PATIENCE = 5.0  # of process 0, without which nobody can read why the run ended
TO_THE_END = 3_600_000  # milliseconds; process 0 writes and sends more than the others
_FIRST, _READ = "einkorn/failure", "einkorn/read"
_BROKEN = ("gloo", "nccl", "connection", "peer", "socket", "unavailable", "heartbeat", "remote process")


class Ending(NamedTuple):
    """What a process says as it ends, and its exit code."""

    code: int
    text: str


def ending(error: BaseException, *, process: int, processes: int) -> Ending:
    """How a run ends for all of its processes where one of them has this error."""
    if isinstance(error, KeyboardInterrupt):
        return Ending(Exit.INTERRUPTED, "stopped at once, by Ctrl-C")
    if (code := ending_of(error)) is not None:
        return Ending(code, str(error) or type(error).__name__)
    what = (str(error).strip() or "no message").splitlines()[0][:300]
    if isinstance(error, jax.errors.JaxRuntimeError) and any(word in str(error).lower() for word in _BROKEN):
        again = "a new start goes on from the last checkpoint"
        return Ending(Exit.HUNG, f"another process of this run is gone, or out of reach; {again} ({what})")
    return Ending(1, f"process {process} of {processes}: {type(error).__name__}: {what}")


class Together:
    """While this is open, an error in any of the run's processes ends them all; of one process it does nothing. What
    all of them raise at once, since they agreed to stop, goes its way.
    """

    def __init__(self) -> None:
        from jax._src.distributed import global_state  # jax has no public way to its key-value store

        self._store: Any = global_state.client if global_state.num_processes > 1 else None
        self._over = threading.Event()
        self._ends = threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        if self._store is not None:
            self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._store is None:
            return
        if error is not None and type(error).__name__ not in ("Interrupted", "Diverged"):
            found = ending(error, process=jax.process_index(), processes=jax.process_count())
            if found.code == 1 or os.environ.get("EINKORN_DEBUG"):
                traceback.print_exception(error)
            self._end(self._first(found))
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # while the others are at work, they may still fail
            self._store.wait_at_barrier("einkorn/end", TO_THE_END)
        self._over.set()
        self._thread.join()

    def _first(self, found: Ending) -> Ending:
        """What the first process to fail has said: this one, if no other was."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first, or there is nobody to ask
            self._store.key_value_set(_FIRST, json.dumps(found))
        return self._said() or found

    def _said(self) -> Ending | None:
        try:
            return Ending(*json.loads(self._store.key_value_try_get(_FIRST)))
        except jax.errors.JaxRuntimeError:
            return None

    def _watch(self) -> None:
        while not self._over.wait(LOOK):
            if (said := self._said()) is not None:
                self._end(said)

    def _end(self, said: Ending) -> None:
        """Say it and leave, at once: jax's own way out waits for all processes."""
        self._ends.acquire()  # for good: whoever comes second must not
        for line in said.text.splitlines():
            print(f"error: {line}", file=sys.stderr)
        for child in multiprocessing.active_children():
            child.kill()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._store.key_value_set(f"{_READ}/{jax.process_index()}", "")
            until = time.monotonic() + PATIENCE * (jax.process_index() == 0)
            while time.monotonic() < until and len(self._store.key_value_dir_get(_READ)) < jax.process_count():
                time.sleep(0.05)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(said.code)
