"""Rows become batches: targets shifted within each document, rows padded to one length, microbatches stacked."""

# A accumulation steps, B rows of a microbatch over all processes, L tokens of a row, n tokens of a line

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

BUCKET = 64  # the shortest padded row


class Line(NamedTuple):
    """A row of a batch before padding, of one document or several: `columns` int32 [n, 3] of token, target, weight
    (0 or 1), `segments` and `positions` int32 [n]; which rows it was made of, as `name_of` of the
    batches knows them; and `more` arrays [n] by name, which every line of a batch has."""

    columns: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    rows: tuple[Any, ...]
    more: Mapping[str, np.ndarray] = {}  # never written to


def shift(ids: np.ndarray, trained: np.ndarray, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Columns int32 [n, 3] of a document's tokens `start` up to `stop`: token, the next token as its target, and
    whether that one is trained.

    The document's last token has no target (0, weight 0): it must never predict the first of another document. The last
    one of a piece has: the first of the next piece.
    """
    stop = len(ids) if stop is None else min(stop, len(ids))
    columns = np.zeros((stop - start, 3), np.int32)
    columns[:, 0] = ids[start:stop]
    targets = ids[start + 1 : stop + 1]
    columns[: len(targets), 1] = targets
    columns[: len(targets), 2] = trained[start + 1 : stop + 1]
    return columns


def line_of(columns: np.ndarray, row: Any) -> Line:
    """The line of one document."""
    return Line(columns, np.ones(len(columns), np.int32), np.arange(len(columns), dtype=np.int32), (row,))


def bucket_length(longest: int, max_length: int) -> int:
    """The smallest allowed row length that holds `longest` tokens: 64, 128, 192, 256, 384, 512, 768, … or `max_length`.

    There are few, since each is a shape that the step is compiled for.
    """
    length = BUCKET
    while length < longest:
        power_of_two = length & (length - 1) == 0
        length = 2 * length if length == BUCKET else length * 3 // 2 if power_of_two else length * 4 // 3
    return max(longest, min(length, max_length))


def collate(lines: Sequence[Line], *, accumulation: int, rows: int, length: int) -> dict[str, np.ndarray]:
    """A batch of arrays [A, B, L] from up to A * B lines, the first B of them in the first microbatch; the rest stays
    empty.

    Returns tokens, targets, segments, positions (int32) and weights (float32), and what `more` the lines have, all 0
    where there is no token.
    """
    columns_RL3 = np.zeros((accumulation * rows, length, 3), np.int32)
    segments_RL, positions_RL = np.zeros(columns_RL3.shape[:2], np.int32), np.zeros(columns_RL3.shape[:2], np.int32)
    more = {name: np.zeros(segments_RL.shape, array.dtype) for name, array in lines[0].more.items()}
    for r, line in enumerate(lines):
        length = len(line.columns)
        columns_RL3[r, :length] = line.columns
        segments_RL[r, :length] = line.segments
        positions_RL[r, :length] = line.positions
        for name, array in line.more.items():
            more[name][r, :length] = array
    arrays = {
        "tokens": np.ascontiguousarray(columns_RL3[..., 0]),
        "targets": np.ascontiguousarray(columns_RL3[..., 1]),
        "weights": columns_RL3[..., 2].astype(np.float32),
        "segments": segments_RL,
        "positions": positions_RL,
        **more,
    }
    return {name: array.reshape(accumulation, rows, -1) for name, array in arrays.items()}
