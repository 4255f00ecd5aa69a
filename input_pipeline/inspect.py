"""What the model will see: a row token by token with the trained ones marked, and how long the rows are."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from input_pipeline.collate import bucket_length
from input_pipeline.reading import Data

TRAINED, CONTEXT = "bold green", "dim"
OPEN, CLOSE = "⟦", "⟧"  # around trained tokens where there is no colour
_BAR = 48  # characters of the longest bar


class TokenView(NamedTuple):
    """A token as text (a piece of a character shows as the tokenizer's own name for it), its id, and whether it is in
    the loss."""

    text: str
    id: int
    trained: bool


class Bar(NamedTuple):
    """Rows of `low` to `high` tokens."""

    low: int
    high: int
    rows: int


def view_row(data: Data, row: int, tokenizer: Any) -> list[TokenView]:
    """The tokens of a row of the store. The first is never in the loss: nothing predicts it."""
    if not 0 <= row < len(data.store):
        raise ValueError(f"there is no row {row}: the data has rows 0 to {len(data.store) - 1}")
    ids, trained = data.store[row]
    texts = [_text_of(int(token), tokenizer) for token in ids]
    return [TokenView(*view) for view in zip(texts, ids.tolist(), [False, *trained[1:].tolist()], strict=True)]


def length_histogram(data: Data) -> list[Bar]:
    """How many rows have how many tokens, in the lengths that rows are padded to."""
    lengths = data.store.lengths
    bars, low = [], 1
    while low <= lengths.max():
        high = bucket_length(low, max(data.max_length, int(lengths.max())))
        bars.append(Bar(low, high, int(np.count_nonzero((lengths >= low) & (lengths <= high)))))
        low = high + 1
    return bars


def print_row(console: Console, data: Data, row: int, tokenizer: Any, *, ids: bool = False) -> None:
    """Print a row with its trained tokens coloured, or in brackets where the console has no colour (a pipe, a file);
    with `ids`, one token a line with its id.
    """
    views = view_row(data, row, tokenizer)
    in_loss = sum(view.trained for view in views)
    bare = console.color_system is None or console.no_color
    title = f"{data.name_of(row)}: {len(views)} tokens, {in_loss} trained"
    console.print(Text(title + (f": {OPEN}in these{CLOSE}" if bare and not ids else ""), style="bold"))
    if ids:
        for view in views:
            line = f"{view.id:>8}  {'trained' if view.trained else '       '}  {view.text!r}"
            console.print(Text(line, style=TRAINED if view.trained else CONTEXT))
        return
    console.print(Text.assemble(*_pieces(views, OPEN if bare else "", CLOSE if bare else "")))


def print_histogram(console: Console, data: Data) -> None:
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


def _pieces(views: Sequence[TokenView], opening: str, closing: str) -> Iterator[tuple[str, str]]:
    """Text and style of each run of tokens that are trained, or are not."""
    for trained, run in itertools.groupby(views, lambda view: view.trained):
        text = "".join(view.text for view in run)
        yield (f"{opening}{text}{closing}", TRAINED) if trained else (text, CONTEXT)


def _text_of(token: int, tokenizer: Any) -> str:
    text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text if "\ufffd" not in text else tokenizer.convert_ids_to_tokens(token)
