"""Prompts to be answered, for methods that learn from their own answers: rows → token ids → what a generation asks.

Prompts are tokenised once, as rows that are trained on are; what reward functions are given beside an answer is read
again from the row, by its number. Chats are rendered up to where the assistant begins, plain strings are tokenised as
they stand, with the tokenizer's special tokens (as TRL 1.16 does both).
"""

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from input_pipeline import fields
from input_pipeline.batches import State, same_data
from input_pipeline.cache import key_of
from input_pipeline.catalog import Dataset, Meaning
from input_pipeline.content import without_pictures
from input_pipeline.counts import Counts, first_of_each, too_many_bad
from input_pipeline.encode import Tokens, Whole, words_of
from input_pipeline.examples import Prompt, RowError, Side
from input_pipeline.order import permutation
from input_pipeline.picture_rows import RowPictures
from input_pipeline.pictures import Pictures, Placeholders
from input_pipeline.processors.processor import Prepared
from input_pipeline.reading import Reading, choose, pictures_of_split, skips_bad_rows
from input_pipeline.store import (
    Encoded,
    Row,
    Tokenizing,
    TokenStore,
    tokenize_rows,
)
from input_pipeline.template import Template

TooLong = Literal["left", "right", "middle", "error", "leave_out"]
_FEW = 100  # prompts up to which texts are tokenised whole


class Limit(NamedTuple):
    """The most tokens of a prompt (None: any number), and what becomes of one that has more: it is cut at its "left",
    at its "right" or in the "middle", is an "error", or is left out.
    """

    length: int | None = None
    too_long: TooLong = "left"

    def cut(self, ids: np.ndarray) -> np.ndarray | None:
        """The tokens that are kept, None where the prompt is left out; RowError where it is an error."""
        if self.length is None or len(ids) <= self.length:
            return ids
        if self.too_long == "error":
            raise RowError(f"the prompt has {len(ids)} tokens; allowed: at most {self.length}", "length")
        if self.too_long == "leave_out":
            return None
        before = {"left": 0, "right": self.length, "middle": self.length // 2}[self.too_long]
        return np.concatenate([ids[:before], ids[len(ids) - (self.length - before) :]])


ANY_LENGTH = Limit()


class PromptRow(NamedTuple):
    """A prompt: its token ids, up to where the answer begins; the string or the messages that reward functions see, and
    the row's other fields, which they are given by name; its number among all prompts; where it comes from, such as
    "row 17 of data/train.jsonl"; and its pictures as the model takes them, None where it has none.
    """

    ids: tuple[int, ...]
    prompt: Side
    columns: Mapping[str, Any]
    row: int
    place: str
    pictures: Prepared | None = None


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of a split by number."""

    store: TokenStore
    datasets: tuple[Dataset, ...] = field(repr=False)
    counts: Counts
    names: tuple[str, ...]  # of the datasets
    notices: tuple[str, ...]  # for the log
    pictures: RowPictures | None = None  # of a model that takes any

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, row: int) -> PromptRow:
        dataset, index = map(int, self.store.sources[row])
        example = self.datasets[dataset].example(index)
        assert isinstance(example, Prompt)
        ids, _ = self.store[row]
        shown = example.prompt if isinstance(example.prompt, str) else tuple(without_pictures(example.prompt))
        pictures = self.pictures(row) if self.pictures is not None and self.pictures.has(row) else None
        return PromptRow(tuple(ids.tolist()), shown, example.columns, row, self.name_of(row), pictures)

    def name_of(self, row: int) -> str:
        """Where a prompt comes from."""
        dataset, index = map(int, self.store.sources[row])
        return self.datasets[dataset].rows.where(index)

    @property
    def longest(self) -> int:
        """The most tokens that a prompt has."""
        return int(self.store.lengths.max())

    max_length = longest  # as of rows that are trained on


def read_prompts(
    split: Mapping[str, Any],
    tokenizer: Any,
    *,
    reading: Reading,
    limit: Limit = ANY_LENGTH,
    template_kwargs: Mapping[str, Any] | None = None,
    what: str = "train",
) -> Prompts:
    """Read and tokenise the prompts of a split, a section `data.<what>` of the configuration.

    `reading` gives the trainer, the seed, the cache and who is told of progress; `template_kwargs` are variables of the
    chat template for all rows, which a row's own (`chat_template_kwargs`) win over. ValueError names file and row; or
    says that no prompt is left.
    """
    for key in ("stream", "pack"):
        if split.get(key):
            raise NotImplementedError(f"not implemented yet: data.{what}.{key} with {reading.trainer}; set it to false")
    chosen = choose(split, reading=reading, what=what)
    pictures = pictures_of_split(split, reading=reading)
    encoder = PromptEncoder(
        meanings=tuple(dataset.meaning for dataset in chosen.datasets),
        template=Template(tokenizer, None if pictures is None else pictures.processor.placeholder),
        limit=limit,
        template_kwargs=dict(template_kwargs or {}),
        skip_bad_rows=skips_bad_rows(split, what),
        pictures=pictures,
    )
    store, counts, notices = tokenize_rows(
        Tokenizing(chosen.datasets, encoder),
        chosen.picks,
        workers=chosen.workers,
        progress=reading.progress,
        cache=reading.cache,
    )
    too_many_bad(counts, split.get("max_bad_row_fraction"))
    if not len(store):
        raise ValueError(
            f"{what} dataset {', '.join(chosen.names)} has 0 usable prompts (read {counts.read}, bad {counts.bad},"
            f" longer than {limit.length} tokens: {counts.untrained})"
        )
    said = [note for meaning in encoder.meanings for note in meaning.notices]
    if counts.over_long:
        done = "left out" if limit.too_long == "leave_out" else f"cut ({limit.too_long})"
        said.append(f"prompts of more than {limit.length} tokens: {counts.over_long:,} of {counts.read:,}, {done}")
    return Prompts(
        store=store,
        datasets=chosen.datasets,
        counts=counts,
        names=chosen.names,
        notices=(*said, *notices),
        pictures=None if pictures is None else RowPictures(pictures, store, chosen.datasets),
    )


@dataclass(frozen=True, kw_only=True)
class PromptEncoder:
    """Turns rows into the token ids of their prompts; picklable, so that a worker process can hold it."""

    meanings: tuple[Meaning, ...]  # of each dataset
    template: Template
    limit: Limit
    template_kwargs: Mapping[str, Any]
    skip_bad_rows: bool
    pictures: Pictures | None = None  # of a model that takes any

    def __call__(self, rows: Sequence[Row], /) -> Encoded:
        bad: dict[int, RowError] = {}
        texts: dict[int, tuple[bool, str]] = {}
        shown: dict[int, Placeholders | None] = {}
        notices: set[str] = set()
        for place, row in enumerate(rows):
            try:
                text, shown[place] = self._render(row, notices)
                if text is not None:
                    texts[place] = text
            except RowError as error:
                bad[place] = error
        tokens: list[Tokens | None] = [None] * len(rows)
        over_long = 0
        for place, ids in self._tokenize(texts).items():
            try:
                kept = self._cut(ids, shown[place])
            except RowError as error:
                bad[place] = error.at(rows[place].where())
                continue
            over_long += kept is None or len(kept) < len(ids)
            if kept is not None:
                tokens[place] = Tokens(kept, np.zeros(len(kept), bool), len(kept) < len(ids), 0)
        if bad and not self.skip_bad_rows:
            raise bad[min(bad)]
        used = [row for row in tokens if row is not None]
        counts = Counts(
            read=len(rows),
            used=len(used),
            bad=len(bad),
            left_out=len(rows) - len(texts) - sum(place not in texts for place in bad),
            untrained=len(texts) - len(used) - sum(place in texts for place in bad),
            over_long=over_long,
            tokens=sum(len(row.ids) for row in used),
            bad_kinds=dict(Counter(error.kind for error in bad.values())),
            first_bad=first_of_each(bad[place] for place in sorted(bad)),
        )
        return Encoded(tokens, counts, frozenset(notices))

    def fingerprint(self) -> str:
        """A hash of all that decides what rows become; two tokenizers that do the same have the same."""
        meanings = [repr(meaning) for meaning in self.meanings]
        pictures = [] if self.pictures is None else self.pictures.fingerprint()
        return key_of(
            *("prompts", *self.template.facts(), meanings, self.limit, self.template_kwargs, self.skip_bad_rows),
            *pictures,
        )

    def _render(self, row: Row, notices: set[str]) -> tuple[tuple[bool, str] | None, Placeholders | None]:
        """Whether the tokenizer adds its special tokens to it, and the text (None where the row is left out); and what
        stands for its pictures."""
        if isinstance(row.stored, RowError):
            raise row.stored
        example = self.meanings[row.dataset].example(row.stored, row.where)
        if example is None:
            return None, None
        assert isinstance(example, Prompt)
        try:
            if isinstance(example.prompt, str):
                return (True, example.prompt), None
            placeholders = None if self.pictures is None else self.pictures.placeholders(example, row.dataset)
            if not self.template.tokenizer.chat_template:
                raise RowError("the tokenizer has no chat template; set model.chat_template", "template")
            if example.tools and not self.template.renders_tools:
                notices.add("the chat template does not render tool definitions; those of the data are not shown")
            kwargs = {**self.template_kwargs, **(example.template_kwargs or {})}
            messages = self.template.prepare(example.prompt)
            text = self.template.text(messages, list(example.tools or ()) or None, prompt=True, **kwargs)
            fields.text(text, "the rendered prompt")
            if placeholders is None:
                return (False, text), None
            placeholders.check(text)
            return (False, placeholders.expand(text)), placeholders
        except RowError as error:
            raise error.at(row.where()) from error

    def _tokenize(self, texts: Mapping[int, tuple[bool, str]]) -> dict[int, np.ndarray]:
        """The ids of each text, by its place."""
        by = (self._words if len(texts) >= _FEW else None) or Whole(self.template.tokenizer)
        ids: dict[int, np.ndarray] = {}
        for special in (False, True):
            places = [place for place, (adds, _) in texts.items() if adds == special]
            found = by.tokenize([texts[place][1] for place in places], special_tokens=special)
            ids |= dict(zip(places, found, strict=True))
        return {place: ids[place] for place in sorted(ids)}

    def _cut(self, ids: np.ndarray, placeholders: Placeholders | None) -> np.ndarray | None:
        if not len(ids):
            raise RowError("the prompt has no token", "empty")
        kept = self.limit.cut(ids)
        if kept is not None and self.pictures is not None:
            settled = self.pictures.settled(Tokens(kept, np.zeros(len(kept), bool), False, 0), placeholders)
            if isinstance(settled, RowError):
                raise settled
        return kept

    @functools.cached_property
    def _words(self) -> Any:
        return words_of(self.template.tokenizer)


class PromptBatches:
    """The prompts of one generation after the other, `size` at a time, without end.

    Every epoch has an order of its own, drawn from (seed, epoch), or that of the rows without a seed; its last prompts,
    fewer than `size`, are left out (as TRL's RepeatSampler does). `get_state()` is plain JSON, the same on every
    process, and says which batch is the *next*; state of other data is refused.
    """

    def __init__(self, prompts: Prompts, *, size: int, seed: int | None):
        if not 0 < size <= len(prompts):
            raise ValueError(f"a generation asks {size} prompts, and the data have {len(prompts)}; ask fewer at a time")
        self._prompts, self._size, self._seed = prompts, size, seed
        self._next = 0
        self._rows: tuple[int, ...] = ()

    def __iter__(self) -> "PromptBatches":
        return self

    def __next__(self) -> tuple[PromptRow, ...]:
        epoch, place = divmod(self._next, self.per_epoch)
        order = permutation(len(self._prompts), self._seed, epoch)
        self._rows = tuple(order[place * self._size : (place + 1) * self._size].tolist())
        self._next += 1
        return tuple(self._prompts[row] for row in self._rows)

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch."""
        return len(self._prompts) // self._size

    @property
    def rows(self) -> tuple[int, ...]:
        """The numbers of the last batch's prompts."""
        return self._rows

    def name_of(self, row: int) -> str:
        """Where a prompt comes from."""
        return self._prompts.name_of(row)

    def get_state(self) -> State:
        """Which batch is next, and what data this is."""
        return {"data": self._data(), "position": {"next": self._next}}

    def set_state(self, state: State) -> None:
        """Go on where `state` was taken; ValueError says what differs if it is of other data."""
        same_data(state["data"], self._data())
        self._next = int(state["position"]["next"])
        self._rows = ()

    def close(self) -> None:
        """Nothing runs ahead."""

    def _data(self) -> dict[str, Any]:
        # The columns are no part of it: they are rewards' matter, and a run may go on with a mended answer.
        return {
            "prompts": self._prompts.store.fingerprint(),
            "prompts_per_generation": self._size,
            "prompts_per_epoch": self.per_epoch * self._size,
            "seed": self._seed,
        }


@dataclass(frozen=True, kw_only=True)
class PromptFeed:
    """Prompts a generation at a time, and what is known beforehand about them."""

    batches: PromptBatches
    prompts: Prompts
    generations_per_epoch: int
    generations: int | None  # until the epochs are used up; None: without end

    @property
    def notices(self) -> tuple[str, ...]:
        """For the log."""
        return self.prompts.notices


def prompt_feed(
    data: Mapping[str, Any],
    tokenizer: Any,
    *,
    reading: Reading,
    prompts_per_generation: int,
    epochs: float | None,
    limit: Limit = ANY_LENGTH,
    template_kwargs: Mapping[str, Any] | None = None,
    shuffle_rows: bool = True,
    what: str = "train",
) -> PromptFeed:
    """The prompts of `data.<what>` in batches for all processes, in an order drawn from (`reading.seed`, epoch), or as
    stored without `shuffle_rows`. See `read_prompts` for the rest.
    """
    prompts = read_prompts(
        data[what], tokenizer, reading=reading, limit=limit, template_kwargs=template_kwargs, what=what
    )
    seed = reading.seed if shuffle_rows else None
    batches = PromptBatches(prompts, size=prompts_per_generation, seed=seed)
    return PromptFeed(
        batches=batches,
        prompts=prompts,
        generations_per_epoch=batches.per_epoch,
        generations=None if epochs is None else math.ceil(epochs * batches.per_epoch),
    )
