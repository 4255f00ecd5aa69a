"""Where metrics go: `metrics.jsonl` always, TensorBoard and Weights & Biases if asked, `trainer_state.json` at saves.

`metrics.jsonl` is the truth, one JSON object an event: {"step": 10, "epoch": 0.5, "loss": 1.25, …, "time": seconds
since 1970}. A resumed run cuts it back to its step and goes on, so no step stands in it twice. Trackers never stop
training, nor does a full disk: what cannot be written is kept and tried again. Process 0 alone writes; the others may
call everything.
"""

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

METRICS, TRAINER_STATE, TENSORBOARD = "metrics.jsonl", "trainer_state.json", "tensorboard"

log = logging.getLogger(__name__)


class Window:
    """Means over the steps since the last log, from (total, count) pairs: sum of totals over sum of counts. A total
    that is NaN is of a step that had nothing to count, and is left out.

    Totals and counts stay on the devices until `means`, so adding a step waits for nothing. What is to be a mean of
    step means, as transformers logs its loss, is added as (mean, 1).
    """

    def __init__(self) -> None:
        self._steps: list[dict[str, Any]] = []

    def add(self, sums: Mapping[str, Any]) -> None:
        """Adds one step: name → a pair (total, count), such as a `Sum`."""
        self._steps.append(dict(sums))

    def means(self) -> dict[str, float]:
        """The means in float64, of what was counted at all; the window is empty afterwards."""
        totals: dict[str, np.ndarray] = {}
        for sums in jax.device_get(self._steps):
            for name, pair in sums.items():
                if not math.isnan(pair[0]):
                    totals[name] = totals.get(name, np.zeros(2)) + np.asarray([float(part) for part in pair])
        self._steps.clear()
        return {name: float(total / count) for name, (total, count) in totals.items() if count}


class Metrics:
    """The metrics of one run.

    resume_step: the step the run goes on from, None for a fresh start (an older `metrics.jsonl` is then kept under
    another name). logging_dir: TensorBoard's folder, None for `output_dir/tensorboard`. wandb: arguments of
    `wandb.init` (project, name, config, id), None for none.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        resume_step: int | None = None,
        tensorboard: bool = True,
        logging_dir: str | Path | None = None,
        wandb: Mapping[str, Any] | None = None,
    ):
        self.folder = Path(output_dir)
        self.history: list[dict[str, Any]] = []
        self._file: _Lines | None = None
        self._board: Any = None
        self._wandb: Any = None
        if jax.process_index() != 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / METRICS
        if resume_step is None:
            set_aside(path)
        else:
            self.history = _cut_back(path, resume_step)
        self._file = _Lines(path)
        if tensorboard:
            self._board = _tensorboard(Path(logging_dir) if logging_dir else self.folder / TENSORBOARD, resume_step)
        if wandb is not None:
            self._wandb = _start_wandb(self.folder, wandb)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def wandb_id(self) -> str | None:
        """The run's id at Weights & Biases, to be saved with checkpoints so that a resumed run goes on with it."""
        return None if self._wandb is None else self._wandb.id

    def log(self, step: int, values: Mapping[str, Any], *, epoch: float | None = None) -> dict[str, Any]:
        """Writes one event and returns it; numbers (jax scalars too) go everywhere, other JSON values to the file."""
        epochs = {} if epoch is None else {"epoch": round(epoch, 6)}
        fetched = [_plain(value) for value in jax.device_get(list(values.values()))]
        event = {"step": step} | epochs | dict(zip(values, fetched, strict=True))
        self.history.append(event)
        if self._file is not None:
            self._file.write(json.dumps(_spelled_out(event) | {"time": round(time.time(), 3)}))
        numbers = {name: value for name, value in event.items() if isinstance(value, (int, float)) and name != "step"}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(_tag(name), value, step)
        if self._wandb is not None:
            self._to_wandb({_tag(name): value for name, value in numbers.items()}, step)
        return event

    def trainer_state(
        self, step: int, *, max_steps: int, epoch: float, num_train_epochs: float = 0, saved_steps: Iterable[int] = ()
    ) -> str:
        """The text of `trainer_state.json`, as `transformers.TrainerState` reads it.

        saved_steps: steps with a checkpoint; the one of lowest `eval_loss` among them is the best.
        """
        saved = set(saved_steps)
        evaluated = [event for event in self.history if event["step"] in saved and _is_finite(event.get("eval_loss"))]
        best = min(evaluated, key=lambda event: event["eval_loss"], default=None)
        state = {
            "best_global_step": None if best is None else best["step"],
            "best_metric": None if best is None else best["eval_loss"],
            "best_model_checkpoint": None if best is None else str(self.folder / f"checkpoint-{best['step']}"),
            "epoch": epoch,
            "global_step": step,
            "is_hyper_param_search": False,
            "is_local_process_zero": True,
            "is_world_process_zero": True,
            "log_history": [_spelled_out(event) for event in self.history],
            "max_steps": max_steps,
            "num_train_epochs": num_train_epochs,
        }
        return json.dumps(state, indent=2) + "\n"

    def write_trainer_state(self, text: str) -> None:
        """Puts `trainer_state.json` into the run's folder, whole or not at all."""
        if self._file is not None:
            _replace(self.folder / TRAINER_STATE, text)

    def flush(self) -> None:
        """Sees that TensorBoard's events lie on disk, where a kill cannot lose them."""
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Ends all sinks. A second call does nothing."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file = self._board = self._wandb = None

    def _to_wandb(self, values: dict[str, float], step: int) -> None:
        import wandb

        try:
            self._wandb.log(values, step=step)
        except (wandb.errors.Error, OSError, RuntimeError, ValueError) as error:
            log.warning("Weights & Biases failed (%s): going on without it, metrics stay in %s", error, METRICS)
            self._wandb = None


class _Lines:
    """A file of lines, each written whole and at once; what a full disk refuses is kept for the next time."""

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._waiting: list[bytes] = []
        self._told = False

    def write(self, line: str) -> None:
        self._waiting.append(line.encode() + b"\n")
        size = self._file.tell()
        try:
            while self._waiting:
                size = self._file.tell()
                if self._file.write(self._waiting[0]) != len(self._waiting[0]):
                    raise OSError("the disk took a part of the line only")
                self._waiting.pop(0)
        except OSError as error:
            self._file.truncate(size)
            self._file.seek(size)
            if not self._told:
                log.warning("cannot write %s (%s): its lines are kept and tried again", self._path, error)
                self._told = True

    def close(self) -> None:
        if self._waiting:
            log.warning("%d last lines of %s could not be written", len(self._waiting), self._path)
        self._file.close()


def read_events(path: str | Path) -> list[dict[str, Any]]:
    """The events of a `metrics.jsonl`, non-finite numbers as floats; a last line that a kill cut short is left out."""
    events = []
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            events.append(_read_back(json.loads(line)) if line.strip() else None)
        except ValueError:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not a JSON object: {line[:80]}") from None
    return [event for event in events if event]


def _cut_back(path: Path, step: int) -> list[dict[str, Any]]:
    """Leaves only the events up to `step` in the file, and returns them without their times."""
    events = [event for event in read_events(path) if event["step"] <= step] if path.exists() else []
    _replace(path, "".join(json.dumps(_spelled_out(event)) + "\n" for event in events))
    return [{name: value for name, value in event.items() if name != "time"} for event in events]


def set_aside(path: Path) -> None:
    """Keep a file of an earlier run under another name, which says when it ended."""
    if path.exists() and path.stat().st_size:
        ended = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
        older = path.with_name(f"{path.stem}-until-{ended}{path.suffix}")
        path.rename(older)
        log.warning("%s of an earlier run is now %s", path, older.name)


def _replace(path: Path, text: str) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def _plain(value: Any) -> Any:
    """numpy scalars and 0-d arrays as Python numbers."""
    return value.item() if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0 else value


def _spelled_out(event: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no word for what is not finite: it becomes the strings "nan", "inf", "-inf", which `float` reads."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in event.items()
    }


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _read_back(event: Any) -> dict[str, Any]:
    if not isinstance(event, dict) or "step" not in event:
        raise ValueError("not an event")
    return {name: float(value) if value in ("nan", "inf", "-inf") else value for name, value in event.items()}


def _tag(name: str) -> str:
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name.removeprefix('train_')}"


def _tensorboard(folder: Path, resume_step: int | None) -> Any:
    from tensorboardX import SummaryWriter

    # Event files are only ever added to: the purge step tells TensorBoard to drop what a resumed run will write again.
    return SummaryWriter(str(folder), purge_step=None if resume_step is None else resume_step + 1)


def _start_wandb(folder: Path, arguments: Mapping[str, Any]) -> Any:
    """A run at Weights & Biases; an offline one where the service or the key is missing; None where that fails too."""
    try:
        import wandb
    except ImportError:
        log.warning("wandb is not installed (pip install 'einkorn[wandb]'): metrics go to %s only", METRICS)
        return None
    arguments = {
        "project": os.environ.get("WANDB_PROJECT", "einkorn"),
        "resume": "allow",
        "dir": str(folder),
        **arguments,
    }
    settings = wandb.Settings(init_timeout=30, login_timeout=15)
    for mode in (None, "offline"):
        try:
            return wandb.init(mode=mode, settings=settings, **arguments)
        except (wandb.errors.Error, OSError, RuntimeError, ValueError) as error:
            after = "trying offline" if mode is None else f"going on without it, metrics go to {METRICS}"
            log.warning("Weights & Biases failed (%s): %s", str(error).splitlines()[0], after)
    return None
