"""Lanes: readers of a stream, side by side, each with a place of its own that is plain JSON.

A stream is read by a fixed number of lanes, whatever the number of processes: a process runs those whose rows it needs.
Each reads its share of the shards (whole ones where there are many, else a part of each), in blocks of rows that are
drawn from the mixture, shuffled and tokenised together, and packs them into lines. A lane's state is where its current
block began and how much of it is used, so that going on means reading one block again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from input_pipeline.catalog import Stream
from input_pipeline.collate import Line, line_of, shift
from input_pipeline.counts import Counts
from input_pipeline.encode import Tokens
from input_pipeline.order import permutation
from input_pipeline.packing import cut, join, plan
from input_pipeline.records import Record, Shard
from input_pipeline.store import Encoder, Row

State = dict[str, Any]  # JSON
_MANY = 8  # from so many shards a lane on, lanes share whole shards: their shares differ by an eighth at most
_MAX_BARREN = 1000  # blocks without a usable row, or epochs without any, before a lane gives up


class Place(NamedTuple):
    """Which row of a stream: dataset, shard of it, the part of the shard that a lane reads (None: whole), number."""

    dataset: int
    shard: int
    part: int | None
    number: int


class Found(NamedTuple):
    """What became of rows that were read, and remarks for the log."""

    counts: Counts = Counts()
    notices: frozenset[str] = frozenset()

    def plus(self, later: "Found") -> "Found":
        """These and `later` ones."""
        return Found(self.counts.plus(later.counts), self.notices | later.notices)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a stream becomes lines.

    `proportions` are the streams' shares of the rows; None reads them as one. `limits`: rows of each that an epoch has
    at most. With `seed` None everything comes in the order stored. A `block` is so many rows; a line has at most
    `length` tokens, `packing` is "bfd", "bfd_split", "wrapped" or None. `repeat`: begin again at the end, each stream
    by itself; else `all_exhausted` says whether a mixture ends with the first stream that does, or with the last.
    """

    streams: tuple[Stream, ...]
    encoder: Encoder
    proportions: tuple[float, ...] | None
    limits: tuple[int | None, ...]
    seed: int | None
    mix_seed: int
    lanes: int
    block: int
    length: int
    packing: str | None
    isolate: bool
    repeat: bool
    all_exhausted: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """What the streams are called."""
        return tuple(stream.name for stream in self.streams)

    def name_of(self, place: Place) -> str:
        """Where a row comes from, such as "row 17 of data/train.jsonl"."""
        shard = self.streams[place.dataset].shards[place.shard]
        return _part(shard, place.part, self.lanes).where(place.number)

    def groups(self) -> list[list[tuple[int, int]]]:
        """(dataset, shard) of what is drawn from: each stream, or without proportions all of them as one."""
        groups = [[(d, s) for s in range(len(stream.shards))] for d, stream in enumerate(self.streams)]
        return groups if self.proportions else [[each for group in groups for each in group]]


class Lane:
    """An endless or finite iterator over lines, with a state."""

    def __init__(self, recipe: Recipe, lane: int, state: Mapping[str, Any] | None = None):
        self._recipe = recipe
        self._lane = lane
        state = state or {"block": 0, "cursors": [None] * len(recipe.groups()), "used": 0, "offset": 0}
        self._start = {"block": state["block"], "cursors": state["cursors"]}
        self._cursors: list[Any] = list(state["cursors"])  # where the next block begins
        self._readers: list[Iterator[_Read]] | None = None
        self._ended: set[int] = set()  # groups that have come to an end, where nothing repeats
        self._over = False
        self._units: list[Any] | None = None  # of this block: lines, or when wrapped documents
        self._used, self._offset = int(state["used"]), int(state["offset"])
        self._found = Found()

    def __iter__(self) -> "Lane":
        return self

    def __next__(self) -> Line:
        if self._recipe.packing == "wrapped":
            return self._wrapped()
        line = self._unit()
        self._used += 1
        return line

    def state(self) -> State:
        """Where the next line begins."""
        return {**self._start, "used": self._used, "offset": self._offset}

    def found(self) -> Found:
        """What became of the rows read since the last call."""
        found, self._found = self._found, Found()
        return found

    def _wrapped(self) -> Line:
        pieces: list[Line] = []
        room = self._recipe.length
        while room:
            try:
                row = self._unit()
            except StopIteration:
                if pieces:
                    break
                raise
            piece = _line(row, self._offset, self._offset + room)
            pieces.append(piece)
            room -= len(piece.columns)
            self._offset += len(piece.columns)
            if self._offset == len(row[0].ids):
                self._used, self._offset = self._used + 1, 0
        return join(pieces, isolate=self._recipe.isolate)

    def _unit(self) -> Any:
        """The first unit not yet used; StopIteration where there is none."""
        barren = 0
        while self._units is None or self._used >= len(self._units):
            fresh = self._units is not None
            barren += 1
            if barren > _MAX_BARREN:
                names = ", ".join(self._recipe.names)
                raise ValueError(f"no usable row in {barren * self._recipe.block:,} rows on end of {names}")
            if fresh:
                self._start = {"block": self._start["block"] + 1, "cursors": list(self._cursors)}
                self._units, self._used = [], 0
            self._units = _units(
                self._read_block(), self._recipe, seed=self._start["block"] * self._recipe.lanes + self._lane
            )
        return self._units[self._used]

    def _read_block(self) -> list[tuple[Tokens, Place]]:
        """Draw, shuffle and tokenise the rows of a block, those that can be used; StopIteration after the last."""
        recipe, number = self._recipe, self._start["block"]
        if self._readers is None:
            self._readers = [self._reader(group) for group in range(len(self._cursors))]
        rows, places = [], []
        for group in self._draws(number):
            read = None if self._over else self._take(group)
            if read is None:
                self._over = True
                break
            where = partial(read.shard.where, read.record.number)
            rows.append(Row(read.record.row, read.place.dataset, where))
            places.append(read.place)
        if not rows:
            raise StopIteration
        encoded = recipe.encoder(rows)
        usable = [(tokens, place) for tokens, place in zip(encoded.rows, places, strict=True) if tokens is not None]
        order = permutation(len(usable), recipe.seed, number * recipe.lanes + self._lane, 1)
        self._found = self._found.plus(Found(encoded.counts, encoded.notices))
        return [usable[i] for i in order]

    def _draws(self, block: int) -> list[int]:
        """Which group each row of a block is drawn from."""
        recipe = self._recipe
        if not recipe.proportions:
            return [0] * recipe.block
        key = np.asarray([recipe.mix_seed % 2**64, block * recipe.lanes + self._lane], np.uint64)
        raw = np.random.Philox(key=key).random_raw(recipe.block)
        bounds = np.cumsum(recipe.proportions)[:-1]
        return np.searchsorted(bounds, raw / 2.0**64, side="right").tolist()

    def _take(self, group: int) -> "_Read | None":
        """The next row of a group; None where the lane ends."""
        assert self._readers is not None
        recipe = self._recipe
        while True:
            read = next(self._readers[group], None)
            if read is not None:
                self._cursors[group] = read.cursor
                return read
            nothing = group in self._ended and self._cursors[group] is None  # not even after beginning again
            self._ended.add(group)
            if nothing or not recipe.all_exhausted or len(self._ended) == len(self._readers):
                return None
            self._cursors[group] = None
            self._readers[group] = self._reader(group)

    def _reader(self, group: int) -> "Iterator[_Read]":
        return _read(self._recipe, self._recipe.groups()[group], self._lane, self._cursors[group])


class _Read(NamedTuple):
    record: Record
    shard: Shard  # the part that was read
    place: Place
    cursor: dict[str, Any]  # where the row after this one begins


def _read(recipe: Recipe, shards: Sequence[tuple[int, int]], lane: int, cursor: Any) -> Iterator[_Read]:
    """A lane's rows of some shards, from `cursor` on, without end if the recipe repeats."""
    lanes = recipe.lanes
    whole = len(shards) % lanes == 0 or len(shards) >= _MANY * lanes
    cursor = cursor or {"epoch": 0, "place": 0, "position": None, "taken": [0] * len(recipe.streams)}
    epoch, place, position, taken = cursor["epoch"], cursor["place"], cursor["position"], list(cursor["taken"])
    barren = 0
    while True:
        # From epoch to epoch a lane goes on to its neighbour's share: a share may be empty where there are few rows.
        share = (lane + epoch) % lanes
        order = permutation(len(shards), recipe.seed, epoch)
        mine = order[share::lanes] if whole else order
        part, barren = None if whole else share, barren + 1
        for there in range(place, len(mine)):
            dataset, number = shards[mine[there]]
            shard = _part(recipe.streams[dataset].shards[number], part, lanes)
            limit = recipe.limits[dataset]
            allowed = None if limit is None else limit * (share + 1) // lanes - limit * share // lanes
            for record in () if allowed is not None and taken[dataset] >= allowed else shard.read(position):
                taken[dataset] += 1
                barren = 0
                cursor = {"epoch": epoch, "place": there, "position": record.next, "taken": list(taken)}
                yield _Read(record, shard, Place(dataset, number, part, record.number), cursor)
                if taken[dataset] == allowed:
                    break
            position = None
        if not recipe.repeat:
            return
        if barren > _MAX_BARREN:
            raise ValueError(f"dataset {', '.join(recipe.names)} has 0 rows")
        epoch, place, taken = epoch + 1, 0, [0] * len(taken)


def _part(shard: Shard, part: int | None, count: int) -> Shard:
    return shard if part is None else shard.part(part, count)


def _units(rows: list[tuple[Tokens, Place]], recipe: Recipe, *, seed: int) -> list[Any]:
    """What a block's rows are used by: lines; documents when they are wrapped."""
    if recipe.packing == "wrapped":
        return rows
    lines = [_line(row) for row in rows]
    if recipe.packing is None or not rows:
        return lines
    lengths = np.asarray([len(tokens.ids) for tokens, _ in rows])
    if recipe.packing == "bfd_split":
        documents, starts = cut(lengths, recipe.length)
        pieces = zip(documents.tolist(), starts.tolist(), strict=True)
        lines = [_line(rows[document], start, start + recipe.length) for document, start in pieces]
        lengths = np.asarray([len(line.columns) for line in lines])
    by_rank = np.argsort(-lengths, kind="stable")
    packed = plan(lengths, recipe.length)
    joined = [join([lines[i] for i in by_rank[packed[row]]], isolate=recipe.isolate) for row in range(len(packed))]
    order = permutation(len(joined), recipe.seed, seed)  # else a block would begin with its longest rows
    return [joined[i] for i in order]


def _line(row: tuple[Tokens, Place], start: int = 0, stop: int | None = None) -> Line:
    """Tokens `start` up to `stop`, or to the end, of a row."""
    tokens, place = row
    return line_of(shift(tokens.ids, tokens.trained, start, stop), place)
