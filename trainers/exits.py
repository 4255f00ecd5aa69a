"""How a run ends, as the exit code by which launchers decide whether to start it again."""

import enum
import signal


class Exit(enum.IntEnum):
    """Exit codes. RESTARTABLE says which of all there are, these and a shell's own, are worth a restart."""

    DONE = 0
    BAD_INPUT = 2  # configuration or data: never restart
    DIVERGED = 3  # a loss or gradient that is not finite: never restart
    PREEMPTED = 42  # told to stop, saved, stopped: restart
    HUNG = 43  # no step for too long, or a dead worker: restart
    INTERRUPTED = 130  # Ctrl-C: the user's wish


# Beside ours: aborted, as jax ends a process whose fellow is gone; killed; segmentation fault; SIGTERM before the loop.
RESTARTABLE = (int(Exit.PREEMPTED), int(Exit.HUNG), 134, 137, 139, 143)

# By name: importing the classes would load jax.
_NAMED = {"Diverged": Exit.DIVERGED, "Interrupted": Exit.PREEMPTED}
TO_MEND = (ValueError, NotImplementedError, FileNotFoundError, NotADirectoryError, PermissionError)


def ending_of(error: BaseException) -> Exit | None:
    """The code that an error ends a run with; None for a fault of the program, whose traceback is to be seen."""
    if getattr(error, "signal", None) == signal.SIGINT:
        return Exit.INTERRUPTED
    return _NAMED.get(type(error).__name__) or (Exit.BAD_INPUT if isinstance(error, TO_MEND) else None)
