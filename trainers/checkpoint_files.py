"""The `checkpoint-N` folders of an output folder as files: which are there, which are whole, and how one goes away.

A folder named exactly `checkpoint-N` is a finished checkpoint. Everything else about it is in the ending of its name:

    .orbax-checkpoint-tmp   a save under way, or the remains of a killed one
    .deleting               a deletion under way, or the remains of a killed one
    .corrupt                its files were not as they were saved; the run went on from an older one
    .superseded             of a course that was given up: the run went on from an earlier step, or started afresh
"""

import logging
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from trainers.manifest import find_damage

_NAME = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"checkpoint-\d+\.(orbax-checkpoint-tmp.*|deleting)")

log = logging.getLogger(__name__)


def folder_of(output_dir: Path, step: int) -> Path:
    """`output_dir/checkpoint-{step}`."""
    return output_dir / f"checkpoint-{step}"


def finished_steps(output_dir: Path) -> list[int]:
    """The steps of the finished checkpoints in `output_dir`, ascending."""
    matches = [_NAME.fullmatch(path.name) for path in output_dir.glob("checkpoint-*") if path.is_dir()]
    return sorted(int(match[1]) for match in matches if match)


def clear_leftovers(output_dir: Path) -> None:
    """Deletes what killed saves and deletions left."""
    for path in list(output_dir.glob("checkpoint-*.*")):
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path)


def newest_whole(output_dir: Path, *, trusted: Collection[Path] = ()) -> int | None:
    """The newest step whose files are as they were saved, or None where there is no checkpoint.

    Folders in `trusted` are not read again. Damaged ones on the way are told and renamed `.corrupt`.
    Raises ValueError where all are damaged, and renames none.
    """
    damaged: list[tuple[int, str]] = []
    for step in reversed(finished_steps(output_dir)):
        folder = folder_of(output_dir, step)
        reason = None if folder in trusted else find_damage(folder)
        if reason is None:
            for bad, why in damaged:
                name = move_aside(folder_of(output_dir, bad), "corrupt")
                log.warning("checkpoint-%d is damaged (%s): now %s; going back to checkpoint-%d", bad, why, name, step)
            return step
        damaged.append((step, reason))
    if damaged:
        listed = "; ".join(f"checkpoint-{step} ({reason})" for step, reason in damaged)
        raise ValueError(
            f"every checkpoint in {output_dir} is damaged: {listed}. Start afresh in another training.output_dir"
        )
    return None


def refuse_damaged(folder: Path) -> None:
    """Raises ValueError, naming the checkpoints beside it, where `folder` is missing or not as it was saved."""
    if not folder.is_dir():
        raise ValueError(f"no checkpoint at {folder}; there {_listing(folder)}")
    if reason := find_damage(folder):
        raise ValueError(f"{folder} is damaged ({reason}); beside it there {_listing(folder)}")


def move_aside(folder: Path, why: str) -> str:
    """Renames `checkpoint-40` to `checkpoint-40.{why}` (or `.{why}-2`, …) and returns the new name."""
    names = [f"{folder.name}.{why}"] + [f"{folder.name}.{why}-{n}" for n in range(2, 1000)]
    name = next(name for name in names if not (folder.parent / name).exists())
    folder.rename(folder.parent / name)
    return name


def delete(folder: Path) -> None:
    """Deletes a checkpoint by way of a rename, so that a kill meanwhile leaves no half of one under a good name."""
    doomed = folder.with_name(f"{folder.name}.deleting")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def size_of(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _listing(folder: Path) -> str:
    others = [
        f"checkpoint-{step}" for step in finished_steps(folder.parent) if folder_of(folder.parent, step) != folder
    ]
    return f"is {', '.join(others)}" if others else "is none"
