"""`einkorn parity`: the same model in einkorn and in transformers, and by how much they differ.

Both compute in float32, and each in bfloat16 as well: what the rounding of bfloat16 does to the numbers of one program
is the scale on which a difference between the two is to be read.
"""

import importlib.util
import json
import math
import random
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from input_pipeline.tokenizer import load_tokenizer
from launch.parity_einkorn import Measured, Sample, measure_einkorn
from models import hub

SHOWN, TRAINED, NEW = 16, 256, 32  # tokens: whose logits are compared; of loss and gradients; of a continuation
PROMPTS = (
    "Einkorn was among the first grains that people sowed instead of gathering. Its ears carry a single kernel in each",
    'def median(values):\n    """The middle one of the sorted values, or the mean of the middle two."""\n    ordered =',
)
# Relative differences that rounding in float32 explains. SmolLM2 is seen at 3e-6, 5e-6 and 3e-4, most of which is how
# far transformers in float32 is from itself in float64.
ALLOWED = {"logits": 1e-4, "loss": 5e-5, "gradient": 1e-3}
BFLOAT16 = 2.0  # logits of einkorn in bfloat16 may stray so many times as far as those of transformers
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


class Row(NamedTuple):
    """A line of the table: relative differences of einkorn from transformers, and of bfloat16 from float32 in each."""

    name: str
    difference: float
    allowed: float
    theirs: float
    ours: float

    def show(self, number: float) -> str:
        """A number of this row as it is printed: counts whole, the rest in two digits."""
        return f"{number:.0f}" if self.allowed == 0 else f"{number:.1e}"

    @property
    def holds(self) -> bool:
        noisy = self.name.startswith("logits") and self.ours > max(BFLOAT16 * self.theirs, self.allowed)
        return self.difference <= self.allowed and not noisy  # what is not a number holds nowhere


def run(name: str, *, against: str | None, length: int, text: Path | None, json_file: Path | None) -> bool:
    """Measure, print the table and the verdict; whether the two programs agree.

    transformers loads `against`, or the same model; `length` bounds the tokens of the long text. Raises ValueError
    without torch, for a model that cannot be read, and for a text that is too short.
    """
    if importlib.util.find_spec("torch") is None:
        raise ValueError("parity compares with PyTorch, which is not installed: pip install 'einkorn[parity]'")
    from launch.parity_torch import measure_transformers

    folder = hub.resolve(name)
    sample = sample_of(folder, length=length, text=text)
    dtypes = ("float32", "bfloat16")
    theirs = _told("transformers", measure_transformers(hub.resolve(against or name), sample, dtypes))
    ours = _told("einkorn", measure_einkorn(folder, sample, dtypes))
    (theirs32, theirs16), (ours32, ours16) = theirs, ours
    rows = compare(sample, theirs32=theirs32, theirs16=theirs16, ours32=ours32, ours16=ours16)
    Console().print(_table(name, sample, rows))
    failed = [row for row in rows if not row.holds]
    print(verdict(rows))
    if json_file is not None:
        numbers = {
            "model": name,
            "against": against or name,
            "tokens": len(sample.text),
            "holds": not failed,
            "rows": [{**row._asdict(), "holds": row.holds} for row in rows],
            "transformers": {"float32": _plain(theirs32), "bfloat16": _plain(theirs16)},
            "einkorn": {"float32": _plain(ours32), "bfloat16": _plain(ours16)},
        }
        json_file.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    return not failed


def sample_of(folder: Path, *, length: int, text: Path | None) -> Sample:
    """What both sides compute on: tokens of the text (einkorn's own source, if none is given), at most `length` and
    as many as the model has positions; random ids where the folder has no tokenizer.
    """
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    longest = min(length, fields.get("max_position_embeddings") or fields.get("n_positions") or length)
    if any((folder / file).is_file() for file in TOKENIZERS):
        tokenizer = load_tokenizer(str(folder))
        written = _own_source() if text is None else text.read_text(encoding="utf-8")
        ids = tokenizer(written, verbose=False)["input_ids"][:longest]
        prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    elif text is not None:
        raise ValueError(f"--text {text}: {folder} has no tokenizer to read it with; leave --text out for random ids")
    else:
        draw = random.Random(0)
        ids, *prompts = (draw.choices(range(fields["vocab_size"]), k=k) for k in (longest, SHOWN, SHOWN))
    if len(ids) <= SHOWN:
        raise ValueError(f"parity needs more than {SHOWN} tokens, and there are {len(ids)}: give a longer --text")
    return Sample(ids, SHOWN, ids[:TRAINED], prompts, NEW)


def compare(sample: Sample, *, theirs32: Measured, theirs16: Measured, ours32: Measured, ours16: Measured) -> list[Row]:
    """The lines of the table. Logits differ relative to the largest of them, all else relative to itself; of greedy
    tokens those that are not the same count, up to where the two best were a tie. The fifth line is the layer, or
    other parameter, whose gradient's norm is the most apart.
    """
    pairs = ((ours32, theirs32), (theirs16, theirs32), (ours16, ours32))

    def row(name: str, allowed: float, of: Any) -> Row:
        difference, theirs, ours = (of(*pair) for pair in pairs)
        return Row(name, difference, allowed, theirs, ours)

    last = f"logits, tokens {len(sample.text) - sample.shown + 1:,}–{len(sample.text):,}"
    apart = {name: _apart(ours32.gradient.get(name), norm) for name, norm in theirs32.gradient.items()}
    worst = max(apart, key=lambda name: math.inf if math.isnan(apart[name]) else apart[name])
    tie = ALLOWED["logits"] * float(np.abs(theirs32.long).max())
    return [
        row(f"logits, tokens 1–{sample.shown}", ALLOWED["logits"], lambda a, b: _largest(a.short, b.short)),
        row(last, ALLOWED["logits"], lambda a, b: _largest(a.long, b.long)),
        row(f"loss, {theirs32.loss:.4f}", ALLOWED["loss"], lambda a, b: _apart(a.loss, b.loss)),
        row("gradient norm", ALLOWED["gradient"], lambda a, b: _apart(_norm(a.gradient), _norm(b.gradient))),
        row(
            f"gradient norm, {worst}",
            ALLOWED["gradient"],
            lambda a, b: _apart(a.gradient.get(worst), b.gradient.get(worst)),
        ),
        row(
            f"greedy tokens, of {sample.new * len(sample.prompts)}",
            0,
            lambda a, b: _differing(a.greedy, b.greedy, theirs32.margins if a is ours32 else None, tie),
        ),
    ]


def verdict(rows: list[Row]) -> str:
    """One line: whether all rows hold, with the numbers that say so or the first that do not."""
    if failed := [row for row in rows if not row.holds]:
        return "parity FAILS: " + "; ".join(
            f"{row.name}: bfloat16 strays by {row.show(row.ours)}, that of transformers by {row.show(row.theirs)}"
            if row.difference <= row.allowed
            else f"{row.name}: {row.show(row.difference)}, allowed {row.show(row.allowed)}"
            for row in failed
        )
    logits = max((row for row in rows if row.name.startswith("logits")), key=lambda row: row.difference)
    return (
        f"parity holds: logits differ by {logits.difference:.1e} of the largest, "
        f"{logits.theirs / max(logits.difference, 1e-12):,.0f} times less than bfloat16 makes of them in transformers"
    )


def _own_source() -> str:
    files = sorted(Path(hub.__file__).parent.glob("*.py"))
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def _told(program: str, measured: Iterator[Measured]) -> list[Measured]:
    print(f"{program} computes in float32 and bfloat16 …", file=sys.stderr)
    return list(measured)


def _largest(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def _apart(a: float | None, b: float | None) -> float:
    return math.nan if a is None or b is None else abs(a - b) / max(abs(b), 1e-30)


def _norm(gradient: Mapping[str, float]) -> float:
    return math.hypot(*gradient.values())


def _differing(a: list[list[int]], b: list[list[int]], margins: list[list[float]] | None, tie: float) -> int:
    """How many tokens differ; none from where on b's two best were a tie, after which anything may follow."""
    count = 0
    for row, (mine, yours) in enumerate(zip(a, b, strict=True)):
        different = [i for i, pair in enumerate(zip(mine, yours, strict=True)) if pair[0] != pair[1]]
        if different and not (margins and margins[row][different[0]] <= tie):
            count += len(different)
    return count


def _plain(measured: Measured) -> dict[str, Any]:
    return {"loss": measured.loss, "gradient_norms": measured.gradient, "greedy": measured.greedy}


def _table(name: str, sample: Sample, rows: list[Row]) -> Table:
    table = Table(title=f"{name}, {len(sample.text):,} tokens", title_justify="left", caption_justify="left")
    table.add_column("\nrelative difference")
    columns = ("einkorn –\ntransformers", "\nallowed", "transformers\nin bfloat16", "einkorn in\nbfloat16")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        numbers = (row.difference, row.allowed, row.theirs, row.ours)
        table.add_row(row.name, *map(row.show, numbers), style="" if row.holds else "bold red")
    return table
