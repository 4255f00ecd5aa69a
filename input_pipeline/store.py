"""Every row of the training data tokenised once, in three flat arrays.

That gives all lengths before the first step, and with them the number of steps; and batches then need no tokenizer. A
large dataset is tokenised by several processes; the result is the same.
"""

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import xxhash

from input_pipeline.catalog import Dataset, Meaning
from input_pipeline.chat import LossMask, Rendered, render
from input_pipeline.encode import Tokens, encode
from input_pipeline.examples import Chat, Example, RowError
from input_pipeline.sources import read
from input_pipeline.template import Template

_CHUNK = 512  # rows that a worker is given at a time
_MANY_ROWS = 50_000  # from here on "auto" uses several processes: starting them takes seconds


class Counts(NamedTuple):
    """What became of the rows."""

    read: int = 0
    used: int = 0
    bad: int = 0  # skipped, with on_bad_row: skip
    untrained: int = 0  # dropped: no trained token left within max_length
    over_long: int = 0  # cut to max_length (some of them are untrained then)
    tokens: int = 0  # of the rows used
    trained_tokens: int = 0  # of these, the ones in the loss


def too_many_bad(counts: Counts, fraction: float | None) -> None:
    """ValueError where a greater share than `fraction` of the rows read was bad; None allows any."""
    if fraction is not None and counts.bad > fraction * counts.read:
        raise ValueError(
            f"{counts.bad:,} of {counts.read:,} rows are bad, more than max_bad_row_fraction {fraction:g}; mend them,"
            " or raise data.<split>.max_bad_row_fraction"
        )


@dataclass(frozen=True)
class TokenStore:
    """Rows of tokens by index: `ids` int32 [T] and `trained` bool [T] of all R rows on end, `offsets` int64 [R + 1]
    where each begins, and `sources` int64 [R, 2], which row of which dataset it came from.
    """

    ids: np.ndarray = field(repr=False)
    trained: np.ndarray = field(repr=False)
    offsets: np.ndarray = field(repr=False)
    sources: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        row = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[row], self.trained[row]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self.offsets)

    def fingerprint(self) -> str:
        """A hash of all tokens, their flags and the rows' order."""
        digest = xxhash.xxh3_128()
        for array in (self.ids, self.trained, self.offsets):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


class Row(NamedTuple):
    """A row to be tokenised: as stored (or the error of reading it), which dataset it is of, what names its place."""

    stored: Any
    dataset: int
    where: Callable[[], str]


class Encoded(NamedTuple):
    """What became of some rows: the tokens of each, None where it is not used; counts; the first bad one; remarks."""

    rows: list[Tokens | None]
    counts: Counts
    first_bad: str | None
    notices: frozenset[str]


@dataclass(frozen=True)
class Encoder:
    """Turns rows into tokens; picklable, so that a worker process can hold it."""

    meanings: tuple[Meaning, ...]  # of each dataset
    masks: tuple[LossMask, ...]
    template: Template
    max_length: int | None
    skip_bad_rows: bool
    required: tuple[str, ...] = ()  # strings that every rendered chat must contain

    def __call__(self, rows: Sequence[Row]) -> Encoded:
        bad: list[RowError] = []
        notices: set[str] = set()
        good, rendered = [], []
        for place, row in enumerate(rows):
            try:
                rendered.append(self._render(row, notices))
                good.append(place)
            except RowError as error:
                self._refuse(error, bad)
        tokens: list[Tokens | None] = [None] * len(rows)
        over_long = 0
        for place, found in zip(
            good, encode(rendered, self.template.tokenizer, max_length=self.max_length), strict=True
        ):
            if isinstance(found, RowError):
                self._refuse(found.at(rows[place].where()), bad)
                continue
            over_long += found.over_long
            if found.trained[1:].any():  # nothing predicts the first token
                tokens[place] = found
        used = [row for row in tokens if row is not None]
        counts = Counts(
            read=len(rows),
            used=len(used),
            bad=len(bad),
            untrained=len(rows) - len(bad) - len(used),
            over_long=over_long,
            tokens=sum(len(row.ids) for row in used),
            trained_tokens=sum(int(row.trained[1:].sum()) for row in used),
        )
        return Encoded(tokens, counts, str(bad[0]) if bad else None, frozenset(notices))

    def _render(self, row: Row, notices: set[str]) -> Rendered:
        if isinstance(row.stored, RowError):
            raise row.stored
        meaning = self.meanings[row.dataset]
        example = meaning.example(row.stored, row.where)
        try:
            rendered = render(example, self.template, self.masks[row.dataset])
            self._check(example, rendered, (*self.required, *meaning.required), notices)
        except RowError as error:
            raise error.at(row.where()) from error
        return rendered

    def _check(self, example: Example, rendered: Rendered, required: tuple[str, ...], notices: set[str]) -> None:
        if not isinstance(example, Chat):
            return
        if example.tools and not self.template.renders_tools:
            notices.add("the chat template does not render tool definitions; those of the data are not trained on")
        for string in required:
            if string.strip() not in rendered.text:
                raise RowError(
                    f"the template string {string!r} does not occur in the rendered chat; leave it out, since what is"
                    " trained is found from the chat template itself",
                    "template",
                )

    def _refuse(self, error: RowError, bad: list[RowError]) -> None:
        if not self.skip_bad_rows:
            raise error
        bad.append(error)


class Chunk(NamedTuple):
    """The used rows of some picks, on end."""

    ids: np.ndarray
    trained: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray
    counts: Counts
    first_bad: str | None
    notices: frozenset[str]

    @classmethod
    def of(cls, encoded: Encoded, sources: np.ndarray) -> "Chunk":
        """Lay rows on end; `sources` [n, 2] says where each of them came from."""
        used = [place for place, row in enumerate(encoded.rows) if row is not None]
        rows = [row for row in encoded.rows if row is not None]
        ids = np.concatenate([np.empty(0, np.int32), *(row.ids for row in rows)])
        trained = np.concatenate([np.empty(0, bool), *(row.trained for row in rows)])
        lengths = np.asarray([len(row.ids) for row in rows], np.int64)
        return cls(ids, trained, lengths, sources.reshape(-1, 2)[used], *encoded[1:])


@dataclass(frozen=True)
class Tokenizing:
    """Tokenises picked rows, [n, 2] of (dataset, row)."""

    datasets: tuple[Dataset, ...]
    encoder: Encoder

    def __call__(self, picks: np.ndarray) -> Chunk:
        rows = [self._row(int(dataset), int(row)) for dataset, row in picks]
        return Chunk.of(self.encoder(rows), picks)

    def _row(self, dataset: int, row: int) -> Row:
        rows = self.datasets[dataset].rows
        try:
            stored = read(rows, row)
        except RowError as error:
            stored = error
        return Row(stored, dataset, functools.partial(rows.where, row))

    def where(self, dataset: int, row: int) -> str:
        """What names a row of a dataset."""
        return self.datasets[dataset].rows.where(row)


def tokenize_rows(
    tokenizing: Tokenizing,
    picks: np.ndarray,
    *,
    workers: int | str | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[TokenStore, Counts, tuple[str, ...]]:
    """Tokenise the picked rows [R, 2]; `progress` is told how many rows were read since the last call.

    `workers`: so many processes; None and "auto" take one, and for a large dataset up to 8. Returns the store, what
    became of the rows, and remarks for the log.
    """
    pieces = [picks[i : i + _CHUNK] for i in range(0, len(picks), _CHUNK)]
    chunks = []
    for chunk in _run(tokenizing, pieces, _number_of_workers(workers, len(picks))):
        chunks.append(chunk)
        if progress is not None:
            progress(chunk.counts.read)
    empty = Chunk.of(Encoded([], Counts(), None, frozenset()), np.empty((0, 2), np.int64))
    ids, trained, lengths, sources = (np.concatenate([empty[i], *(c[i] for c in chunks)]) for i in range(4))
    store = TokenStore(ids, trained, np.concatenate([[0], np.cumsum(lengths)]), sources)
    counts = Counts(*map(sum, zip(*(c.counts for c in [empty, *chunks]), strict=True)))
    notices = sorted(set().union(*(c.notices for c in chunks)))
    first_bad = next((c.first_bad for c in chunks if c.first_bad), None)
    return store, counts, (*notices, *([f"skipped {counts.bad} bad rows; the first: {first_bad}"] if first_bad else []))


def _number_of_workers(asked: int | str | None, rows: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if isinstance(asked, int):
        return min(asked, max(1, rows // _CHUNK))
    return min(8, cores) if rows >= _MANY_ROWS else 1


def _run(tokenizing: Tokenizing, pieces: list[np.ndarray], workers: int) -> Iterator[Chunk]:
    if workers <= 1:
        yield from map(tokenizing, pieces)
        return
    # Never forked: a process that has started JAX must not be.
    with multiprocessing.get_context("spawn").Pool(workers, initializer=_start_worker, initargs=(tokenizing,)) as pool:
        yield from pool.imap(_work, pieces)


_tokenizing: Tokenizing | None = None  # of this worker process


def _start_worker(tokenizing: Tokenizing) -> None:
    global _tokenizing
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _tokenizing = tokenizing


def _work(picks: np.ndarray) -> Chunk:
    assert _tokenizing is not None
    return _tokenizing(picks)
