"""What the model will see: a row token by token with the trained ones marked, and how long the rows are."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from input_pipeline.collate import bucket_length
from input_pipeline.prompts import Prompts
from input_pipeline.reading import Data

STYLES = {0: "dim", 1: "bold green", 2: "bold red"}  # not trained; trained; of an answer that is to become unlikely
BRACKETS = {0: ("", ""), 1: ("⟦", "⟧"), 2: ("⟪", "⟫")}  # around them where there is no colour
NAMES = {0: "", 1: "trained", 2: "unwanted"}
_MANY = 9  # of the same token
_BAR = 48  # characters of the longest bar


class TokenView(NamedTuple):
    """A token as text (a piece of a character shows as the tokenizer's own name for it), its id, and how it is in the
    loss: 0 not, 1 trained, 2 of an unwanted answer (`answers.py`)."""

    text: str
    id: int
    mark: int


class Bar(NamedTuple):
    """Rows of `low` to `high` tokens."""

    low: int
    high: int
    rows: int


def view_row(data: Data | Prompts, row: int, tokenizer: Any) -> list[TokenView]:
    """The tokens of a row of the store. The first is never in the loss: nothing predicts it."""
    if not 0 <= row < len(data.store):
        raise ValueError(f"there is no row {row}: the data has rows 0 to {len(data.store) - 1}")
    ids, trained = data.store[row]
    texts = [_text_of(int(token), tokenizer) for token in ids]
    return [TokenView(*view) for view in zip(texts, ids.tolist(), [0, *map(int, trained[1:])], strict=True)]


def length_histogram(data: Data | Prompts) -> list[Bar]:
    """How many rows have how many tokens, in the lengths that rows are padded to."""
    lengths = data.store.lengths
    bars, low = [], 1
    while low <= lengths.max():
        high = bucket_length(low, max(data.max_length, int(lengths.max())))
        bars.append(Bar(low, high, int(np.count_nonzero((lengths >= low) & (lengths <= high)))))
        low = high + 1
    return bars


def print_row(console: Console, data: Data | Prompts, row: int, tokenizer: Any, *, ids: bool = False) -> None:
    """Print a row with its trained tokens coloured, or in brackets where the console has no colour (a pipe, a file);
    with `ids`, one token a line with its id.
    """
    views = view_row(data, row, tokenizer)
    counts = Counter(view.mark for view in views)
    bare = console.color_system is None or console.no_color
    parts = [f"{data.name_of(row)}: {len(views)} tokens"]
    for mark in (1, 2) if counts[2] else (1,):
        opening, closing = BRACKETS[mark]
        parts.append(f"{counts[mark]} {NAMES[mark]}" + (f" {opening}in these{closing}" if bare and not ids else ""))
    console.print(Text(", ".join(parts), style="bold"))
    for number, picture in enumerate(data.pictures.shown(row) if data.pictures is not None else [], 1):
        width, height = picture.size
        where = f"tokens {picture.first} to {picture.last}" if picture.tokens > 1 else f"token {picture.first}"
        console.print(Text(f"picture {number}: {width} x {height}, {where}: {picture.name}", style="cyan"))
    if ids:
        for view in views:
            console.print(Text(f"{view.id:>8}  {NAMES[view.mark]:<8}  {view.text!r}", style=STYLES[view.mark]))
        return
    console.print(Text.assemble(*_pieces(views, bare=bare)))


def print_histogram(console: Console, data: Data | Prompts) -> None:
    """Print how long the rows are, and what became of them."""
    counts, lengths = data.counts, data.store.lengths
    bars = length_histogram(data)
    most = max(bar.rows for bar in bars)
    console.print(
        f"{counts.used} of {counts.read} rows used (bad {counts.bad}, no trained token {counts.untrained}, cut to"
        f" max_length {counts.over_long}); {counts.tokens} tokens, {counts.trained_tokens} of them trained;"
        f" {lengths.min()} to {lengths.max()} a row, half have up to {int(np.median(lengths))}",
        highlight=False,
    )
    for bar in bars:
        line = f"{bar.low:>6} – {bar.high:<6} {bar.rows:>8}  {'█' * -(-bar.rows * _BAR // most)}"
        console.print(Text(line))


def _pieces(views: Sequence[TokenView], *, bare: bool) -> Iterator[tuple[str, str]]:
    """Text and style of each run of tokens of one mark."""
    for mark, run in itertools.groupby(views, lambda view: view.mark):
        text = "".join(_told(token.text, len(list(same))) for token, same in itertools.groupby(run))
        opening, closing = BRACKETS[mark] if bare else ("", "")
        yield f"{opening}{text}{closing}", STYLES[mark]


def _told(text: str, times: int) -> str:
    """A token that stands so many times in a row; many times, as those of pictures do, in short."""
    return text * times if times < _MANY else f"{text} × {times} "


def _text_of(token: int, tokenizer: Any) -> str:
    text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text if "\ufffd" not in text else tokenizer.convert_ids_to_tokens(token)
