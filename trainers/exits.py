"""How a run ends, as the exit code by which launchers decide whether to start it again."""

import enum


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
