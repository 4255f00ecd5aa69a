"""Checkpoints `output_dir/checkpoint-N/`: asynchronous, atomic, verified. The only file that knows Orbax.

    checkpoint-40/
      state/             arrays, one entry a leaf, under the leaf's path: params/embed/embedding, opt_state/0/mu/…, step
      data_state.json    where the data iterator stands
      meta.json          what the caller says (config, mesh, tokens seen, …) and the tree: dtype and shape of every leaf
      manifest.json      size and checksum of each file above and of those the caller adds (trainer_state.json)

A save writes into `checkpoint-40.orbax-checkpoint-tmp` and is renamed when all of it, manifest included, lies on disk:
a folder of the right name is a finished one, and a kill at any moment leaves the older ones as they were. Arrays go to
and come from shards directly, so a checkpoint of one mesh restores onto another. With many processes `output_dir` must
be one folder that all of them see, and every method is called by every process.

Why Orbax's AsyncCheckpointer and not its CheckpointManager (read in 0.12.8): the manager names folders `checkpoint_N`,
saves step 1 unasked, drops the save of an older step without a word, and would still leave damage and falling back to
us. Its callback `post_finalization_callback` runs on process 0 after every process has written and before the rename,
which is what lets the manifest be part of the commit: no moment exists in which a finished checkpoint is unverifiable.
"""

import base64
import contextlib
import datetime
import errno
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from trainers.checkpoint_files import (
    clear_leftovers,
    delete,
    finished_steps,
    folder_of,
    move_aside,
    newest_whole,
    refuse_damaged,
    size_of,
)
from trainers.environment import versions
from trainers.manifest import write_manifest
from trainers.processes import on_any_process, on_process_0
from trainers.runlock import RunLock

STATE, DATA_STATE, META = "state", "data_state.json", "meta.json"
MAX_FAILED_SAVES = 3
_SAVE_ERRORS = (OSError, ValueError, RuntimeError)  # files: OSError; TensorStore: ValueError; barriers: RuntimeError

log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """What a checkpoint gives back: `state` on the shardings asked for, `data_state` and `meta` as they were saved."""

    step: int
    state: Any
    data_state: Any
    meta: dict[str, Any]


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their paths: `{"params/embed/embedding": …, "opt_state/0/count": …}`."""
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in leaves:
            raise ValueError(f"two leaves of the train state have the path {name!r}")
        leaves[name] = leaf
    return leaves


def fingerprint(tree: Any) -> dict[str, str]:
    """Dtype and shape of every leaf: `{"params/norm/scale": "float32[576]"}`."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves_by_path(tree).items()}


def read_meta(folder: str | Path) -> dict[str, Any]:
    """The `meta` of a checkpoint folder as given to `save`, with `checkpoint` (step, tree, versions, …) added."""
    return _from_json((Path(folder) / META).read_text(encoding="utf-8"))


def restore_folder(folder: str | Path, abstract_state: Any) -> Restored:
    """Restores the checkpoint in `folder`, whose files are taken to be whole.

    `abstract_state`: the tree of the state to fill, each leaf a `jax.ShapeDtypeStruct` with a sharding (or an array,
    which then lends its own). Raises ValueError naming the leaves whose path, shape or dtype differ: nothing is cast
    (Orbax alone would).
    """
    folder = Path(folder)
    meta = read_meta(folder)
    _refuse_other_tree(folder.name, saved=meta["checkpoint"]["tree"], wanted=fingerprint(abstract_state))
    wanted = {name: _abstract(name, leaf) for name, leaf in leaves_by_path(abstract_state).items()}
    with contextlib.closing(ocp.Checkpointer(ocp.StandardCheckpointHandler())) as orbax:
        found = orbax.restore(folder.absolute() / STATE, args=ocp.args.StandardRestore(wanted))
    state = jax.tree.unflatten(jax.tree.structure(abstract_state), [found[name] for name in wanted])
    data_state = _from_json((folder / DATA_STATE).read_text(encoding="utf-8"))
    return Restored(meta["checkpoint"]["step"], state, data_state, meta)


def restore_part(folder: str | Path, part: str, abstract: Any) -> Any:
    """Restores one branch of the state in `folder`, such as "params", and reads nothing else; see `restore_folder`."""
    folder = Path(folder)
    prefixed = {f"{part}/{name}": leaf for name, leaf in leaves_by_path(abstract).items()}
    saved = read_meta(folder)["checkpoint"]["tree"]
    found_there = {name: text for name, text in saved.items() if name.startswith(f"{part}/")}
    _refuse_other_tree(folder.name, saved=found_there, wanted=fingerprint(prefixed))
    wanted = {name: _abstract(name, leaf) for name, leaf in prefixed.items()}
    how = ocp.checkpoint_utils.construct_restore_args(wanted)
    with contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler())) as orbax:
        request = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
        found = orbax.restore(folder.absolute() / STATE, args=request)
    return jax.tree.unflatten(jax.tree.structure(abstract), [found[name] for name in wanted])


class Checkpoints:
    """The checkpoints of one run, which alone may write to `output_dir` until `close()`.

    Making one takes the folder's lock and clears away what killed saves left. `keep`: how many finished checkpoints
    stay (None: all); while a save is under way there is one more. A save that fails (disk full) is told and survived;
    the third in a row raises. Raises ValueError where another run holds the folder.
    """

    def __init__(self, output_dir: str | Path, *, keep: int | None = None):
        if "://" in str(output_dir):
            raise ValueError(
                f"not implemented yet: training.output_dir {output_dir}; mount the bucket and give its path"
            )
        if keep is not None and keep < 1:
            raise ValueError(f"keep is {keep}; at least 1 checkpoint is kept, None keeps all")
        self.folder = Path(output_dir).absolute()
        self._keep = keep
        self._protected: int | None = None
        self._lock: RunLock | None = None  # on process 0
        self._whole: set[Path] = set()  # verified already, or written by this run
        self._base = 0  # the newest step of this course of training: the one gone on from, then the last one saved
        self._saved_before = False
        self._under_way: tuple[Path, dict[str, str]] | None = None  # the folder to be, and its small files
        self._start_error: Exception | None = None
        self._failures = 0
        on_process_0(self._open)
        _quiet_orbax()
        options = ocp.options.AsyncOptions(post_finalization_callback=self._complete)
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(STATE), async_options=options)
        self._closed = False

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or jax.process_count() == 1:
            self.close()
        else:
            self._release()  # the other processes are elsewhere: waiting for them here would hang

    def steps(self) -> list[int]:
        """The steps of the finished checkpoints on disk, ascending."""
        return finished_steps(self.folder)

    def latest(self) -> int | None:
        """The newest step whose files are whole, or None where there is no checkpoint at all.

        A damaged one on the way to it is renamed `checkpoint-N.corrupt` and told. Raises ValueError where all are
        damaged: a run that was meant to go on never starts afresh by itself.
        """
        self.wait()
        step = on_process_0(lambda: newest_whole(self.folder, trusted=self._whole))
        if step is not None:
            self._whole.add(folder_of(self.folder, step))
        return step

    def find(self, which: int | str | Path) -> Path:
        """The verified folder of a step of this run or of any checkpoint by path; ValueError if missing or damaged."""
        folder = folder_of(self.folder, which) if isinstance(which, int) else Path(which).absolute()
        if folder not in self._whole:
            on_process_0(lambda: refuse_damaged(folder))
            self._whole.add(folder)
        return folder

    def restore(self, which: int | str | Path, abstract_state: Any) -> Restored:
        """Verifies and restores a step of this run, or any checkpoint by path, as `restore_folder` says.

        From here on this run continues that checkpoint: later ones in `output_dir` are moved aside when it first saves.
        """
        self.wait()
        folder = self.find(which)
        restored = restore_folder(folder, abstract_state)
        self._base = restored.step if folder.parent == self.folder else 0
        return restored

    def protect(self, step: int | None) -> None:
        """Keeps this one step (say, the best by evaluation) from being deleted for `keep`, towards which it counts."""
        self._protected = step

    def save(
        self, step: int, state: Any, *, data_state: Any, meta: Mapping[str, Any], files: Mapping[str, str] | None = None
    ) -> None:
        """Starts saving `state` as `checkpoint-{step}`; when it returns, `state` is off the devices and may be donated.

        state: a pytree of jax arrays. data_state, meta: JSON values (bytes allowed). files: further small text files,
        name → content. Does nothing where this very step was the last one saved or restored. Raises ValueError for what
        cannot be saved at all, RuntimeError at the third save in a row that failed.
        """
        self.wait()
        folder, size = folder_of(self.folder, step), _bytes_of(state)
        if step == self._base and folder in self._whole:
            return None
        texts = dict(files or {}) | {DATA_STATE: _to_json(data_state), META: _to_json(dict(meta) | _about(step, state))}
        if not on_process_0(lambda: self._make_way(folder, size)):
            return self._failed(folder, OSError(f"the disk has no room for its {size / 1e6:,.1f} MB"))
        self._under_way = (folder, texts)
        try:
            self._orbax.save(folder, args=ocp.args.Composite(state=ocp.args.StandardSave(leaves_by_path(state))))
        except _SAVE_ERRORS as error:
            self._start_error = error  # told by the next `wait`, where all processes meet
        return None

    def wait(self) -> int | None:
        """Waits for the save under way, deletes what is over `keep`, and returns the newest finished step."""
        if self._under_way is not None:
            folder, problem, self._start_error = self._under_way[0], self._start_error, None
            try:
                self._orbax.wait_until_finished()
            except _SAVE_ERRORS as error:
                problem = problem or error
            if on_any_process(problem is not None):
                self._failed(folder, problem or OSError("another process could not write its part"))
            else:
                self._under_way, self._failures = None, 0
                self._whole.add(folder)
                self._base = int(folder.name.removeprefix("checkpoint-"))
                on_process_0(self._prune)
        return max(self.steps(), default=None)

    def close(self) -> None:
        """Finishes the save under way and gives the folder free. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self.wait()
        finally:
            self._orbax.close()
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _failed(self, folder: Path, error: Exception) -> None:
        """Tells a failed save, clears its remains and, if the disk was full, makes room; the third in a row raises."""

        def clear() -> str:
            clear_leftovers(self.folder)
            if _is_disk_full(error) and (droppable := self._droppable()):
                delete(droppable[0])
            return ", ".join(f"checkpoint-{step}" for step in self.steps()) or "none"

        self._under_way = None
        self._failures += 1
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        message = f"saving {folder.name} failed ({reason}); finished checkpoints: {on_process_0(clear)}"
        if self._failures >= MAX_FAILED_SAVES:
            raise RuntimeError(f"{message}; {self._failures} saves in a row have failed") from error
        log.warning("%s; training goes on", message)

    # The rest runs on process 0 alone.

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = RunLock(self.folder)
        clear_leftovers(self.folder)

    def _make_way(self, folder: Path, size: int) -> bool:
        """Frees the name and the room for a save of `size` bytes, or says that there is no room."""
        if not self._saved_before:
            for step in self.steps():
                if step > self._base:
                    name = move_aside(folder_of(self.folder, step), "superseded")
                    log.warning(
                        "checkpoint-%d is not of this run, which began at step %d: now %s", step, self._base, name
                    )
            self._saved_before = True
        if folder.exists():
            raise ValueError(f"{folder} exists already, and this run went on from step {self._base}")
        self._prune()
        missing = size * 1.05 - shutil.disk_usage(self.folder).free
        droppable = self._droppable()
        if missing > sum(map(size_of, droppable)):
            return False
        while missing > 0:
            missing -= size_of(droppable[0])
            delete(droppable.pop(0))
        return True

    def _complete(self) -> None:
        """Adds the small files and the manifest to the folder about to be renamed; called in Orbax's thread."""
        assert self._under_way is not None
        final, texts = self._under_way
        folder = Path(self._orbax.get_temporary_path(final).get())
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        write_manifest(folder)

    def _prune(self) -> None:
        while self._keep is not None and len(self.steps()) > self._keep and (droppable := self._droppable()):
            delete(droppable[0])

    def _droppable(self) -> list[Path]:
        """What may be deleted, oldest first: never the newest, the protected one, or any where all are to be kept."""
        steps = [] if self._keep is None else self.steps()[:-1]
        return [folder_of(self.folder, step) for step in steps if step != self._protected]


def _about(step: int, state: Any) -> dict[str, Any]:
    about = {
        "format": 1,
        "step": step,
        "saved_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "versions": versions(),
        "tree": fingerprint(state),
    }
    return {"checkpoint": about}


def _bytes_of(state: Any) -> int:
    total = 0
    for name, leaf in leaves_by_path(state).items():
        if not isinstance(leaf, jax.Array):
            raise ValueError(f"{name} is a {type(leaf).__name__}: a train state holds jax arrays only")
        total += leaf.nbytes
    return total


def _abstract(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
    if getattr(leaf, "sharding", None) is None:
        raise ValueError(f"{name}: the abstract leaf has no sharding, which says where to restore it")
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _refuse_other_tree(name: str, *, saved: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    problems = [
        f"{leaf} is {saved.get(leaf, 'absent')} in the checkpoint, {wanted.get(leaf, 'absent')} here"
        for leaf in sorted(saved.keys() | wanted.keys())
        if saved.get(leaf) != wanted.get(leaf)
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{name} does not fit this run: {'; '.join(problems[:5])}{more}. Use the model and optimizer settings it "
            f"was saved with (they are in its {META}), or start afresh in another training.output_dir"
        )


def _is_disk_full(error: Exception) -> bool:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "RESOURCE_EXHAUSTED" in str(error) or "No space left" in str(error)


def _to_json(value: Any) -> str:
    def more(item: Any) -> Any:
        if isinstance(item, bytes):
            return {"__bytes__": base64.b64encode(item).decode()}
        raise ValueError(f"{type(item).__name__} cannot be saved in a checkpoint's JSON: {item!r}")

    return json.dumps(value, default=more, indent=1)


def _from_json(text: str) -> Any:
    return json.loads(text, object_hook=lambda d: base64.b64decode(d["__bytes__"]) if d.keys() == {"__bytes__"} else d)


def _quiet_orbax() -> None:
    """Orbax logs through absl, tracebacks of failed saves included; what goes wrong is told here, in one line."""
    logger = logging.getLogger("absl")
    if _not_from_orbax not in logger.filters:
        logger.addFilter(_not_from_orbax)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts
