"""What a run shows while it trains: a bar that redraws itself on a terminal, one plain line a logging event anywhere
else.

On process 0 alone; on the others every call does nothing. What it starts with and ends with are the blocks of text at
the end of this file.
"""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress


def duration(seconds: float) -> str:
    """`0:42`, `12:33`, `1:02:33`, `2 d 01:02:33`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def metric_texts(values: Mapping[str, Any]) -> list[str]:
    """The numbers of one logging event in words, the well-known ones first: `["loss 1.2345", "lr 1.80e-05", …]`."""
    known = {
        "epoch": lambda value: f"epoch {value:.2f}",
        "loss": lambda value: f"loss {value:.4f}",
        "eval_loss": lambda value: f"eval_loss {value:.4f}",
        "eval_perplexity": lambda value: f"perplexity {value:,.2f}",
        "eval_bits_per_byte": lambda value: f"{value:.4f} bits a byte",
        "learning_rate": lambda value: f"lr {value:.2e}",
        "grad_norm": lambda value: f"grad_norm {value:.3f}",
        "tokens_per_second": lambda value: f"{value:,.0f} tok/s{_per_device(values)}",
        "mfu": lambda value: f"MFU {100 * value:.1f} %",
        "data_wait": lambda value: f"data wait {100 * value:.0f} %",
        "goodput": lambda value: f"goodput {100 * value:.0f} %",
        "eta_seconds": lambda value: f"ETA {duration(value)}",
    }
    texts = []
    for name, worded in known.items():
        if name in values:
            texts.append(worded(values[name]))
        elif name == "mfu" and "tokens_per_second" in values:
            texts.append("MFU n/a")
    unsaid = {"step", "steps_per_second", "tokens_per_second_per_device", *known}
    others = {name: value for name, value in values.items() if name not in unsaid and isinstance(value, (int, float))}
    return texts + [f"{name} {_number(value)}" for name, value in others.items()]


def event_line(step: int, total_steps: int, values: Mapping[str, Any]) -> str:
    """One logging event as a line: `step 120/1000 (12 %)  loss 1.2345  lr 1.80e-05  …`."""
    width = len(str(total_steps))
    share = 100 * step // max(total_steps, 1)
    return "  ".join([f"step {step:{width}}/{total_steps} ({share} %)", *metric_texts(values)])


class Progress:
    """The run's progress from `done_steps` to `total_steps`, on `file` (standard output)."""

    def __init__(self, total_steps: int, *, done_steps: int = 0, file: TextIO | None = None):
        self._total = total_steps
        self._file = file
        self._bar: RichProgress | None = None
        self._enabled = jax.process_index() == 0
        console = Console(file=file)
        if self._enabled and console.is_terminal and not console.is_dumb_terminal:
            said = TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[said]}", markup=False)
            self._bar = RichProgress(BarColumn(bar_width=None), said, console=console, expand=True)
            self._task = self._bar.add_task("train", total=total_steps, completed=done_steps, said="compiling …")
            self._bar.start()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advance(self, step: int) -> None:
        """Step `step` is dispatched."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def show(self, step: int, values: Mapping[str, Any]) -> None:
        """A logging event: into the bar, or a line of its own where there is no bar and for evaluations."""
        if self._bar is not None and "loss" in values:
            shown = ("loss", "learning_rate", "tokens_per_second", "mfu", "eta_seconds")
            said = " · ".join(metric_texts({name: values[name] for name in shown if name in values}))
            self._bar.update(self._task, completed=step, said=said)
        else:
            self.note(event_line(step, self._total, values))

    def note(self, text: str) -> None:
        """A text that stays, above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._enabled:
            print(text, file=self._file or sys.stdout, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is. A second call does nothing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def start_block(
    *,
    title: str,
    device_kind: str,
    devices: int,
    processes: int,
    mesh: Mapping[str, int],
    parameters: int,
    trained: int,
    rows_per_step: int,
    row_length: int | None,
    total_steps: int,
    done_steps: int,
    epochs: float | None,
    resumed_from: str | None,
    output_dir: str | Path,
    more: Sequence[tuple[str, str]] = (),
) -> str:
    """What a run is about to do: devices, mesh, parameters, tokens a step, steps, where it goes on from. `more`:
    further rows.
    """
    split = " × ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"
    share = "all trained" if trained == parameters else f"{trained:,} trained ({100 * trained / parameters:.2g} %)"
    tokens = f" of up to {row_length:,} tokens = {rows_per_step * row_length:,} tokens" if row_length else ""
    passes = f" ({epochs:g} epochs)" if epochs else ""
    rows = [
        ("devices", f"{devices} × {device_kind}" + (f" in {processes} processes" if processes > 1 else "")),
        ("mesh", split),
        ("parameters", f"{parameters:,}, {share}"),
        ("a step", f"{rows_per_step:,} rows{tokens}"),
        ("steps", f"{total_steps:,}{passes}" + (f", {done_steps:,} of them done" if done_steps else "")),
        ("goes on from", resumed_from or "nothing, a fresh start"),
        ("output", str(output_dir)),
        *more,
    ]
    return _table(title, rows)


def final_block(
    *,
    output_dir: str | Path,
    steps: int,
    seconds: float,
    values: Mapping[str, Any],
    report: str | Path | None,
    exported: bool,
    adapter_of: str | None = None,
    sees: bool = False,
) -> str:
    """What a run has done, where its model lies, and what loads it. `values`: last metrics, such as loss; `adapter_of`:
    the model that an exported adapter belongs to; `sees`: whether the model takes pictures.
    """
    folder = Path(output_dir)
    rows = [("model", str(folder) if exported else "not exported (training.save_final_model is false)")]
    if report is not None:
        rows.append(("report", str(report)))
    if exported:
        model = "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"
        library, kind = ("transformers", model) if adapter_of is None else ("peft", "AutoPeftModel")
        command = f"from {library} import {kind}; {kind}.from_pretrained({json.dumps(str(folder))})"
        rows += [("load it", f"python -c {shlex.quote(command)}"), ("serve it", serve_command(folder, adapter_of))]
    numbers = "".join(f", {text}" for text in metric_texts(values))
    return _table(f"Done: {steps:,} steps in {duration(seconds)}{numbers}", rows)


def serve_command(folder: Path, adapter_of: str | None) -> str:
    """The command that serves what lies in a folder, a model or an adapter of one."""
    if adapter_of is None:
        return f"vllm serve {shlex.quote(str(folder))}"
    module = shlex.quote(f"{folder.name}={folder}")
    return f"vllm serve {shlex.quote(adapter_of)} --enable-lora --lora-modules {module}"


def _table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:{width}}  {text}" for name, text in rows)])


def _per_device(values: Mapping[str, Any]) -> str:
    rate = values.get("tokens_per_second_per_device")
    return "" if rate is None or rate == values["tokens_per_second"] else f" ({rate:,.0f} a device)"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
