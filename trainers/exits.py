"""How a run ends, as the exit code by which launchers decide whether to start it again."""

import enum


class Exit(enum.IntEnum):
    """Exit codes. Beside these, 134, 137 and 139 (aborted, killed, segmentation fault) are worth a restart, others are
    not.
    """

    DONE = 0
    BAD_INPUT = 2  # configuration or data: never restart
    DIVERGED = 3  # a loss or gradient that is not finite: never restart
    PREEMPTED = 42  # told to stop, saved, stopped: restart
    HUNG = 43  # no step for too long, or a dead worker: restart
    INTERRUPTED = 130  # Ctrl-C: the user's wish
