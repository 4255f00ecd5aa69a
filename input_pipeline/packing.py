"""Several documents in one row.

Best fit ("bfd", and "bfd_split" after cutting what is too long) puts whole documents into rows, longest first, over the
whole dataset; concatenate-then-split ("wrapped") lays them on end and cuts every `length` tokens.

All lengths are known before the first step (see `store.py`), so rows are planned and not filled as documents come by.
That packs tighter than a packer that sees a window of the stream (short chats in rows of 512: 97–99.8 % useful
tokens, against 94–98 % for Grain's best-fit packer with a million tokens open), keeps every document in every epoch
exactly once, makes the number of rows the same in every epoch, and lets any row be built on its own, so that a run
resumes at once. `stream.py` packs what is not known beforehand.
"""

import bisect
import functools
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grain
import numpy as np

from input_pipeline.collate import Line
from input_pipeline.order import permutation


@dataclass(frozen=True)
class Plan:
    """Which documents share a row, by their rank in order of length, longest first: `plan[r]` are those of row r."""

    ranks: np.ndarray = field(repr=False)
    starts: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.ranks[self.starts[row] : self.starts[row + 1]]


def plan(lengths: np.ndarray, length: int) -> Plan:
    """Put documents into rows of `length` tokens: the longest first, each into the fullest row that has room.

    Among rows equally full, the one that has been so longest. This is TRL's "bfd" over the whole dataset (TRL packs
    every 1000 documents by themselves).
    """
    rows: list[list[int]] = []
    with_room: defaultdict[int, deque[int]] = defaultdict(deque)  # room → rows that have just so much
    rooms: list[int] = []  # the keys of `with_room` that hold rows, ascending
    for rank, tokens in enumerate(np.sort(lengths)[::-1].tolist()):
        fit = bisect.bisect_left(rooms, tokens)
        if fit == len(rooms):
            row, room = len(rows), length
            rows.append([])
        else:
            room = rooms[fit]
            row = with_room[room].popleft()
            if not with_room[room]:
                del rooms[fit]
        rows[row].append(rank)
        if left := room - tokens:
            if not with_room[left]:
                bisect.insort(rooms, left)
            with_room[left].append(row)
    starts = np.cumsum([0, *map(len, rows)])
    return Plan(np.asarray([rank for row in rows for rank in row], np.int64), starts)


class Packed(grain.MapDataset):
    """Lines of several documents by a plan; documents of the same length change places from epoch to epoch.

    The parent gives lines of one document.
    """

    def __init__(
        self, parent: grain.MapDataset, *, lengths: np.ndarray, plan: Plan, seed: int | None, isolate: bool = True
    ):
        super().__init__(parent)
        self._lengths = lengths
        self._plan = plan
        self._seed = seed
        self._isolate = isolate
        self._by_rank = functools.lru_cache(maxsize=2)(self._documents_by_rank)

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, row = divmod(index, len(self._plan))
        documents = self._by_rank(epoch)[self._plan[row]]
        return join([self._parent[int(document)] for document in documents], isolate=self._isolate)

    def _documents_by_rank(self, epoch: int) -> np.ndarray:
        order = permutation(len(self._lengths), self._seed, epoch, 1)
        return order[np.argsort(-self._lengths[order], kind="stable")]


class Wrapped(grain.MapDataset):
    """Every epoch's documents on end, in an order drawn from (seed, epoch), cut into lines of `length` tokens; the last
    one is shorter.

    `piece(document, start, stop)` is the line of some tokens of a document.
    """

    def __init__(
        self,
        piece: Callable[[int, int, int], Line],
        *,
        lengths: np.ndarray,
        length: int,
        seed: int | None,
        isolate: bool = True,
    ):
        super().__init__()
        self._piece = piece
        self._lengths = lengths
        self._length = length
        self._seed = seed
        self._isolate = isolate
        self._tokens = int(lengths.sum())
        self._laid = functools.lru_cache(maxsize=2)(self._laid_on_end)

    def __len__(self) -> int:
        return -(-self._tokens // self._length)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, row = divmod(index, len(self))
        order, ends = self._laid(epoch)
        start, stop = row * self._length, min((row + 1) * self._length, self._tokens)
        place, lines = int(np.searchsorted(ends, start, side="right")), []
        while start < stop:
            document, first = int(order[place]), int(ends[place] - self._lengths[order[place]])
            end = min(int(ends[place]), stop)
            lines.append(self._piece(document, start - first, end - first))
            start, place = end, place + 1
        return join(lines, isolate=self._isolate)

    def _laid_on_end(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = permutation(len(self._lengths), self._seed, epoch, 1)
        return order, np.cumsum(self._lengths[order])


def cut(lengths: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents cut into pieces of at most `length` tokens: the document of each piece, and where it starts in it."""
    pieces = -(-lengths // length)
    documents = np.repeat(np.arange(len(lengths)), pieces)
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    return documents, (np.arange(len(documents)) - first) * length


def join(lines: Sequence[Line], *, isolate: bool = True) -> Line:
    """One line of several documents: segments 1, 2, …, positions from 0 in each; or, without `isolate`, one segment."""
    lengths = [len(line.columns) for line in lines]
    total = sum(lengths)
    return Line(
        columns=np.concatenate([line.columns for line in lines]),
        segments=np.repeat(np.arange(1, len(lines) + 1, dtype=np.int32), lengths)
        if isolate
        else np.ones(total, np.int32),
        positions=np.concatenate([line.positions for line in lines]) if isolate else np.arange(total, dtype=np.int32),
        rows=tuple(row for line in lines for row in line.rows),
    )
