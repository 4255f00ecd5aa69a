"""Every row of the training data tokenised once, in a few flat arrays.

That gives all lengths before the first step, and with them the number of steps; and batches then need no tokenizer. A
large dataset is tokenised by several processes, and kept in the token cache (`cache.py`), from which it is read without
being loaded; the result is the same.
"""

import functools
import itertools
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import xxhash

from input_pipeline.answers import Asked, answers_in, encode_answers, render_answers
from input_pipeline.cache import Entry, Writing, key_of, load, rows_hash
from input_pipeline.catalog import Dataset, Meaning
from input_pipeline.chat import LossMask, Rendered, render
from input_pipeline.content import pictures_of
from input_pipeline.counts import Counts, first_of_each
from input_pipeline.encode import Tokens, encode, words_of
from input_pipeline.examples import Chat, Example, RowError
from input_pipeline.pictures import Pictures, Placeholders
from input_pipeline.sources import stored
from input_pipeline.template import Template
from input_pipeline.words import Words

_CHUNK = 512  # rows that a worker is given at a time
_FEW = 100  # rows up to which texts are tokenised whole: reading a tokenizer's rules takes a quarter of a second
_MANY_ROWS = 50_000  # from here on "auto" uses several processes: starting them takes seconds
_KEPT_FROM = 1_000_000  # tokens from which on they are written to the cache: fewer are made in about two seconds


@dataclass(frozen=True)
class TokenStore:
    """Rows of tokens by index: `ids` [T] and `trained` [T], 0 or 1 (of answers their marks, see `answers.py`), of all R
    rows on end, `offsets` int64 [R + 1] where each begins, and `sources` int64 [R, 2], which row of which dataset it
    came from.

    The arrays may be memory-mapped; `ids` are int32 in memory, uint16 or uint32 on disk. `digest` is the fingerprint,
    where it is known.
    """

    ids: np.ndarray = field(repr=False)
    trained: np.ndarray = field(repr=False)
    offsets: np.ndarray = field(repr=False)
    sources: np.ndarray = field(repr=False)
    digest: str | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids int32 [n] and flags [n] of a row."""
        row = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return np.asarray(self.ids[row], np.int32), np.asarray(self.trained[row])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self.offsets)

    def fingerprint(self) -> str:
        """A hash of all tokens, their flags and the rows' order."""
        if self.digest is not None:
            return self.digest
        digest = _Digest()
        digest.update(self.ids, self.trained, self.lengths)
        return digest.hexdigest()


class _Digest:
    """The fingerprint of a store, from its rows piece by piece."""

    def __init__(self) -> None:
        self._of_each = [xxhash.xxh3_128() for _ in range(3)]

    def update(self, ids: np.ndarray, trained: np.ndarray, lengths: np.ndarray) -> None:
        """Rows on end, after those before them."""
        for digest, array, dtype in zip(self._of_each, (ids, trained, lengths), ("<i4", "u1", "<i8"), strict=True):
            digest.update(np.ascontiguousarray(array, dtype).data)

    def hexdigest(self) -> str:
        """The fingerprint of the rows until here."""
        return xxhash.xxh3_128(b"".join(digest.digest() for digest in self._of_each)).hexdigest()


class Row(NamedTuple):
    """A row to be tokenised: as stored (or the error of reading it), which dataset it is of, what names its place."""

    stored: Any
    dataset: int
    where: Callable[[], str]


class Encoded(NamedTuple):
    """What became of some rows: the tokens of each, None where it is not used; counts; remarks."""

    rows: list[Tokens | None]
    counts: Counts
    notices: frozenset[str]


class Encodes(Protocol):
    """What turns rows into tokens; picklable, so that a worker process can hold it."""

    @property
    def template(self) -> Template:
        """The chat template, with its tokenizer."""

    def __call__(self, rows: Sequence[Row], /) -> Encoded: ...

    def fingerprint(self) -> str:
        """A hash of all that decides what rows become."""


@dataclass(frozen=True)
class Encoder:
    """Turns rows that are trained on into tokens."""

    meanings: tuple[Meaning, ...]  # of each dataset
    masks: tuple[LossMask, ...]
    template: Template
    max_length: int | None
    skip_bad_rows: bool
    required: tuple[str, ...] = ()  # strings that every rendered chat must contain
    answers: str | None = None  # of rows that are answers to a prompt: whose way to cut them, "trl" or "oumi"
    pictures: Pictures | None = None  # of a model that takes any

    def __call__(self, rows: Sequence[Row]) -> Encoded:
        bad: dict[int, RowError] = {}
        notices: set[str] = set()
        good, rendered, shown, left_out = [], [], [], 0
        for place, row in enumerate(rows):
            try:
                text, placeholders = self._render(row, notices)
            except RowError as error:
                bad[place] = self._allowed(error)
                continue
            if text is None:
                left_out += 1
                continue
            rendered.append(text)
            shown.append(placeholders)
            good.append(place)
        tokens: list[Tokens | None] = [None] * len(rows)
        over_long = 0
        words = self._words if len(rows) >= _FEW else None
        encoded = self._encode(rendered, words, notices)
        for place, found, placeholders in zip(good, encoded, shown, strict=True):
            found = self._with_pictures(found, placeholders)
            if isinstance(found, RowError):
                bad[place] = self._allowed(found.at(rows[place].where()))
                continue
            over_long += found.over_long
            if found.trained[1:].any():  # nothing predicts the first token
                tokens[place] = found
        used = [row for row in tokens if row is not None]
        counts = Counts(
            read=len(rows),
            used=len(used),
            bad=len(bad),
            untrained=len(rows) - len(bad) - left_out - len(used),
            over_long=over_long,
            tokens=sum(len(row.ids) for row in used),
            trained_tokens=sum(int(np.count_nonzero(row.trained[1:])) for row in used),
            text_bytes=sum(row.text_bytes for row in used),
            left_out=left_out,
            bad_kinds=dict(Counter(error.kind for error in bad.values())),
            first_bad=first_of_each(bad[place] for place in sorted(bad)),
        )
        return Encoded(tokens, counts, frozenset(notices))

    def fingerprint(self) -> str:
        """A hash of all that decides what rows become; two tokenizers that do the same have the same."""
        return key_of(
            *self.template.facts(),
            [repr(meaning) for meaning in self.meanings],
            [list(mask) for mask in map(astuple, self.masks)],
            [self.max_length, self.skip_bad_rows, self.required, self.answers],
            *([] if self.pictures is None else self.pictures.fingerprint()),
        )

    @functools.cached_property
    def _words(self) -> Words | None:
        return words_of(self.template.tokenizer)

    def _encode(self, rendered: list[Any], words: Words | None, notices: set[str]) -> list[Tokens | RowError]:
        tokenizer = self.template.tokenizer
        if self.answers is None:
            return encode(rendered, tokenizer, max_length=self.max_length, words=words)
        return encode_answers(rendered, tokenizer, max_length=self.max_length, words=words, notices=notices)

    def _with_pictures(self, found: Tokens | RowError, placeholders: Placeholders | None) -> Tokens | RowError:
        if self.pictures is None or isinstance(found, RowError) or not len(found.ids):
            return found
        times = 1 if self.answers is None else answers_in(found)
        return self.pictures.settled(found, placeholders, times=times)

    def _render(self, row: Row, notices: set[str]) -> tuple[Rendered | Asked | None, Placeholders | None]:
        """The text of a row (None where the dataset's transform leaves it out), and what stands for its pictures."""
        if isinstance(row.stored, RowError):
            raise row.stored
        meaning = self.meanings[row.dataset]
        example = meaning.example(row.stored, row.where)
        if example is None:
            return None, None
        try:
            placeholders = self._placeholders(example, row.dataset)
            if getattr(example, "tools", None) and not self.template.renders_tools:
                notices.add("the chat template does not render tool definitions; those of the data are not trained on")
            if self.answers is not None:
                return self._asked(example, placeholders), placeholders
            rendered = render(example, self.template, self.masks[row.dataset])
            if placeholders is not None:
                rendered = placeholders.rendered(rendered)
            self._check(example, rendered, (*self.required, *meaning.required))
        except RowError as error:
            raise error.at(row.where()) from error
        return rendered, placeholders

    def _placeholders(self, example: Example, dataset: int) -> Placeholders | None:
        if self.pictures is not None:
            return self.pictures.placeholders(example, dataset)
        if self.template.placeholder is not None and pictures_of(example):
            raise RowError("not implemented yet: a picture in a stream; set data.<split>.stream: false", "image")
        return None

    def _asked(self, example: Example, placeholders: Placeholders | None) -> Asked:
        assert self.answers is not None
        asked = render_answers(example, self.template, self.answers)
        if placeholders is None:
            return asked
        placeholders.check(asked.prompt)
        return asked._replace(
            prompt=placeholders.expand(asked.prompt), answers=tuple(map(placeholders.expand, asked.answers))
        )

    def _check(self, example: Example, rendered: Rendered, required: tuple[str, ...]) -> None:
        if not isinstance(example, Chat):
            return
        for string in required:
            if string.strip() not in rendered.text:
                raise RowError(
                    f"the template string {string!r} does not occur in the rendered chat; leave it out, since what is"
                    " trained is found from the chat template itself",
                    "template",
                )

    def _allowed(self, error: RowError) -> RowError:
        if not self.skip_bad_rows:
            raise error
        return error


class Chunk(NamedTuple):
    """The used rows of some picks, on end."""

    ids: np.ndarray
    trained: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray
    counts: Counts
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
    encoder: Encodes

    def __call__(self, picks: np.ndarray) -> Chunk:
        rows = [self._row(int(dataset), int(row)) for dataset, row in picks]
        return Chunk.of(self.encoder(rows), picks)

    def _row(self, dataset: int, row: int) -> Row:
        rows = self.datasets[dataset].rows
        return Row(stored(rows, row), dataset, functools.partial(rows.where, row))

    def where(self, dataset: int, row: int) -> str:
        """What names a row of a dataset."""
        return self.datasets[dataset].rows.where(row)

    def key(self, picks: np.ndarray) -> str:
        """The name in the cache of what the picked rows become."""
        data = [rows_hash(d.rows, picks[picks[:, 0] == n, 1]) for n, d in enumerate(self.datasets)]
        return key_of(self.encoder.fingerprint(), data, np.ascontiguousarray(picks, "<i8").tobytes())


def tokenize_rows(
    tokenizing: Tokenizing,
    picks: np.ndarray,
    *,
    workers: int | str | None = None,
    progress: Callable[[int], None] | None = None,
    cache: Path | None = None,
) -> tuple[TokenStore, Counts, tuple[str, ...]]:
    """Tokenise the picked rows [R, 2]; `progress` is told how many rows were read since the last call.

    `workers`: so many processes; None and "auto" take one, and for a large dataset up to 8. `cache`: a folder where a
    large result is kept and found again; without one all of it is in memory. Returns the store, what became of the
    rows, and remarks for the log.
    """
    progress = progress or (lambda rows: None)
    key = "" if cache is None else tokenizing.key(picks)
    kept = None if cache is None else load(cache, key)
    if kept is not None:
        progress(len(picks))
        return _found(kept)
    pieces = [picks[i : i + _CHUNK] for i in range(0, len(picks), _CHUNK)]
    chunks = _told(_run(tokenizing, pieces, _number_of_workers(workers, len(picks))), progress)
    if cache is None:
        return joined(list(chunks))
    first = list(_up_to(chunks, _KEPT_FROM))
    if sum(len(chunk.ids) for chunk in first) < _KEPT_FROM:
        return joined(first)
    ids = max(tokenizing.encoder.template.tokenizer.get_vocab().values())
    return _found(_written(itertools.chain(first, chunks), cache, key, np.uint16 if ids < 2**16 else np.uint32))


def _told(chunks: Iterator[Chunk], progress: Callable[[int], None]) -> Iterator[Chunk]:
    for chunk in chunks:
        progress(chunk.counts.read)
        yield chunk


def _up_to(chunks: Iterator[Chunk], tokens: int) -> Iterator[Chunk]:
    """The first chunks, until they hold so many tokens."""
    held = 0
    for chunk in chunks:
        yield chunk
        held += len(chunk.ids)
        if held >= tokens:
            return


def joined(chunks: list[Chunk]) -> tuple[TokenStore, Counts, tuple[str, ...]]:
    """Chunks on end in memory: the store, what became of the rows, and remarks for the log."""
    empty = Chunk.of(Encoded([], Counts(), frozenset()), np.empty((0, 2), np.int64))
    ids, trained, lengths, sources = (np.concatenate([empty[i], *(c[i] for c in chunks)]) for i in range(4))
    counts = functools.reduce(Counts.plus, (c.counts for c in chunks), Counts())
    notices = frozenset[str]().union(*(c.notices for c in chunks))
    store = TokenStore(ids, trained, np.concatenate([[0], np.cumsum(lengths)]), sources)
    return store, counts, _remarks(counts, notices)


def _written(chunks: Iterable[Chunk], folder: Path, key: str, ids_dtype: type) -> Entry:
    """Chunks on end in the cache; in memory there is one at a time."""
    dtypes = {"ids": ids_dtype, "trained": np.uint8, "offsets": np.int64, "sources": np.int64}
    counts, notices, digest = Counts(), frozenset[str](), _Digest()
    with Writing(folder, key, dtypes, columns={"sources": 2}) as writing:
        writing.append("offsets", np.zeros(1, np.int64))
        for chunk in chunks:
            before = counts.tokens
            counts, notices = counts.plus(chunk.counts), notices | chunk.notices
            digest.update(chunk.ids, chunk.trained, chunk.lengths)
            writing.append("ids", chunk.ids)
            writing.append("trained", chunk.trained)
            writing.append("offsets", before + np.cumsum(chunk.lengths))
            writing.append("sources", chunk.sources)
        facts = {"counts": counts._asdict(), "notices": sorted(notices), "fingerprint": digest.hexdigest()}
        return writing.finish(facts)


def _found(entry: Entry) -> tuple[TokenStore, Counts, tuple[str, ...]]:
    """What the cache holds."""
    counts = Counts(**entry.facts["counts"])
    store = TokenStore(**entry.arrays, digest=entry.facts["fingerprint"])
    return store, counts, _remarks(counts, entry.facts["notices"])


def _remarks(counts: Counts, notices: Iterable[str]) -> tuple[str, ...]:
    """What the log says, the same in every order of the rows."""
    bad = f"skipped {counts.bad} bad rows ({counts.refused()}); the first: {next(iter(counts.first_bad.values()), '')}"
    return (*sorted(notices), *([bad] if counts.bad else []))


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
