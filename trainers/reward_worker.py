"""A process in which reward functions run: `python -m trainers.reward_worker LIFELINE`, started by `reward_workers.py`.

It reads a line of JSON from its input, {"functions": [[name, settings], …]} first, then {"function": number, "given":
{…}, "places": […]} for each call, and writes a line for each answer, [place, score, failure], and null at a call's end;
first of all one for each function, whose score says whether it has verl's form. What functions print goes to the log.
The process ends with its input, whatever a function does then, so that it does not outlive the one who started it: a
thread sees it, and where a function holds the interpreter so that no thread runs, the lifeline's end is a signal.
"""

import contextlib
import fcntl
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from typing import IO, Any

from trainers.reward_call import Scored, one_by_one, scores, told
from trainers.rewards import reward_function

MOST_MEMORY = 4 * 2**30  # bytes


def main() -> None:
    """Answer calls until the input ends."""
    for asked in (signal.SIGINT, signal.SIGTERM):
        signal.signal(asked, signal.SIG_IGN)  # the one who started it decides, and finishes its step first
    _end_with(int(sys.argv[1]))
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        _limit_memory()
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_listen, args=(lines,), daemon=True).start()
        functions = _opened(lines.get(), out)
        while True:
            call = json.loads(lines.get())
            function, settings = functions[call["function"]]
            for each in scores(function, call["given"], call["places"], settings):
                _write(out, each)
            _write(out, None)


def _listen(lines: "queue.Queue[str]") -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def _end_with(lifeline: int) -> None:
    """Nothing is ever written to this pipe: its only news is its end, whose signal ends the process on Linux."""
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)


def _opened(line: str, out: IO[str]) -> list[tuple[Callable[..., Any], dict[str, Any]]]:
    """The functions; where one cannot be had, why not is written and the process ends."""
    functions = []
    for name, settings in json.loads(line)["functions"]:
        try:
            functions.append((reward_function(name), settings))
            _write(out, Scored(len(functions) - 1, float(one_by_one(functions[-1][0]))))
        except Exception as error:  # a user's module may raise anything
            own = str(error).startswith("training.reward_functions")
            _write(out, Scored(0, None, str(error) if own else f"training.reward_functions {name!r}: {told(error)}"))
            raise SystemExit(1) from error
    _write(out, None)
    return functions


def _write(out: IO[str], found: Scored | None) -> None:
    out.write(json.dumps(found) + "\n")
    out.flush()


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # there is no such limit everywhere
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))


if __name__ == "__main__":
    main()
