"""One run in one `output_dir`: a lock that the operating system lets go of when its process dies, however it dies.

`flock` decides, so there is no such thing as a stale lock to be judged by age or process id; host and pid in the file
are for the message. The lock holds across machines where the file system passes locks on (NFS 4, Lustre with `flock`),
else within one machine.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

LOCK = "run.lock"
_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}

log = logging.getLogger(__name__)


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"


class RunLock:
    """Holds `folder/run.lock` from its making to `release()`.

    Raises ValueError, naming the holder, where another living process has it.
    """

    def __init__(self, folder: Path):
        self._path = folder / LOCK
        self._file: int | None = None
        while self._file is None:
            self._file = self._try()
        record = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(self._file, 0)
        os.write(self._file, json.dumps(record).encode())

    def _try(self) -> int | None:
        """One attempt: the locked descriptor, or None where the holder removed the file in between."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise ValueError(
                f"{self._path.parent} is in use by {_owner(self._path)}; two runs there would overwrite each other's "
                "checkpoints: wait for it, stop it, or choose another training.output_dir"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                os.close(file)
                raise
            log.warning("%s cannot lock files: nothing stops a second run there", self._path.parent)
            return file
        try:
            ours = os.fstat(file).st_ino == self._path.stat().st_ino
        except FileNotFoundError:
            ours = False
        if not ours:
            os.close(file)
        return file if ours else None

    def release(self) -> None:
        """Removes the file and lets go; a second call does nothing."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)  # while it is still ours: nobody else can have locked this name
            os.close(self._file)
            self._file = None
