"""A split of the data section read and tokenised: which rows, which of their tokens are trained, what became of
them."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import xxhash

from input_pipeline.catalog import Dataset, Entry, Meaning, Stream, open_dataset, open_stream
from input_pipeline.chat import LossMask
from input_pipeline.counts import Counts, too_many_bad
from input_pipeline.images import Opener, root_of
from input_pipeline.mixing import choose_rows, mix, shares
from input_pipeline.picture_rows import RowPictures
from input_pipeline.pictures import Pictures
from input_pipeline.processors.processor import Processor
from input_pipeline.store import (
    Chunk,
    Encoder,
    Row,
    Tokenizing,
    TokenStore,
    joined,
    tokenize_rows,
)
from input_pipeline.template import Template

Turns = Literal["all", "assistant", "final"]
Opened = TypeVar("Opened", Dataset, Stream)

COMPLETIONS, ANSWERS = "text_completions_only_with_padding", "dpo_with_padding"
_TURNS: dict[str, Turns] = {"ALL_ASSISTANT_TURNS": "assistant", "FINAL_ASSISTANT_TURN": "final"}
_WITH_PICTURES = ("vision_language_with_padding", "vision_language_sft")
_PICTURE_KWARGS = (  # of the collators of pictures: which turns are trained; what batches are is settled elsewhere
    "train_on_completions_only",
    "process_individually",
    "allow_multi_image_inputs",
    "main_image_feature",
    "processor_kwargs",
    "processor_name",
)
_COLLATOR_KWARGS = (  # of the collators whose masks are found from the template instead
    "response_template",
    "instruction_template",
    "end_of_turn_template",
    "tool_response_template",
    "end_of_tool_response_template",
    "max_variable_sized_dims",
    "ignore_index",
    "pad_to_multiple_of",
)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How rows become tokens, for every split.

    Rows longer than `max_length` lose their end, unless `packing` cuts them in pieces ("bfd_split", "wrapped"; "bfd"
    does not); `seed` is for the entries that ask for a shuffled sample; `trainer`, the `training.trainer_type`, says
    which formats rows are of; then which tokens are trained; the field of rows that are plain text; `answers`, of rows
    that are answers to a prompt, whose way to cut them (see `answers.py`); `cache`, a folder that keeps tokenised rows;
    `processor`, of a model that takes pictures; and `progress`, told how many rows were tokenised since its last call.
    """

    max_length: int | None
    seed: int
    trainer: str = "TRL_SFT"
    packing: str = "bfd"
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    text_field: str = "text"
    answers: str | None = None
    cache: Path | None = None
    processor: Processor | None = None
    progress: Callable[[int], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Data:
    """The tokenised rows of a split, and where each came from."""

    store: TokenStore
    counts: Counts
    where: Callable[[int, int], str]  # what names a row of a dataset
    names: tuple[str, ...]  # of the datasets
    max_length: int  # the longest row allowed, or the longest there is
    limit: int | None = None  # the longest row allowed
    notices: tuple[str, ...] = ()
    pictures: RowPictures | None = None  # of a model that takes any

    def name_of(self, row: int) -> str:
        """Where row `row` of the store comes from."""
        return self.where(*map(int, self.store.sources[row]))


@dataclass(frozen=True, kw_only=True)
class Streams:
    """The streams of a split, and how their rows become tokens."""

    streams: tuple[Stream, ...]
    encoder: Encoder
    proportions: tuple[float, ...] | None
    limits: tuple[int | None, ...]  # rows of each stream that are used
    shuffle_buffer: int  # rows that are shuffled among one another
    all_exhausted: bool
    mix_seed: int
    notices: tuple[str, ...]

    def fingerprint(self) -> str:
        """A hash of which shards these are and what is made of their rows."""
        digest = xxhash.xxh3_128()
        for stream in self.streams:
            digest.update(repr([shard.name for shard in stream.shards]).encode())
        digest.update(repr((self.encoder.fingerprint(), self.proportions, self.limits)).encode())
        return digest.hexdigest()


class Chosen(NamedTuple):
    """The datasets of a split, the rows that an epoch has of them, int64 [R, 2] of (dataset, row), and by how many
    processes these are tokenised.
    """

    datasets: tuple[Dataset, ...]
    picks: np.ndarray
    workers: int | str | None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the datasets."""
        return tuple(dataset.rows.name for dataset in self.datasets)


def choose(split: Mapping[str, Any], *, reading: Reading, what: str) -> Chosen:
    """Open the datasets of a split and choose the rows of an epoch, in order."""
    entries = _entries(split, what)
    datasets = _opened(open_dataset, entries, split, reading=reading, what=what)
    picks = _pick(
        entries,
        datasets,
        strategy=split.get("mixture_strategy") or "first_exhausted",
        split_seed=split.get("seed"),
        seed=reading.seed,
    )
    workers = next((entry.transform_num_workers for entry in entries if entry.transform_num_workers), None)
    return Chosen(datasets, picks, workers)


def read_data(split: Mapping[str, Any], tokenizer: Any, *, reading: Reading, what: str = "train") -> Data:
    """Read and tokenise the rows of a split. ValueError names file and row; or says that no usable row is left."""
    chosen = choose(split, reading=reading, what=what)
    meanings = [dataset.meaning for dataset in chosen.datasets]
    pictures = pictures_of_split(split, reading=reading)
    encoder = _encoder(meanings, split, tokenizer, pictures, reading=reading, what=what)
    tokenizing = Tokenizing(chosen.datasets, encoder)
    store, counts, notices = tokenize_rows(
        tokenizing, chosen.picks, workers=chosen.workers, progress=reading.progress, cache=reading.cache
    )
    too_many_bad(counts, split.get("max_bad_row_fraction"))
    if not len(store):
        raise ValueError(
            f"{what} dataset {', '.join(chosen.names)} has 0 usable rows (read {counts.read}, bad {counts.bad},"
            f" without a trained token within max_length {reading.max_length}: {counts.untrained})"
        )
    remarks = (*(note for meaning in meanings for note in meaning.notices), *notices)
    longest = int(store.lengths.max())
    allowed = reading.max_length or longest
    return Data(
        store=store,
        counts=counts,
        where=tokenizing.where,
        names=chosen.names,
        max_length=allowed,
        limit=reading.max_length,
        notices=remarks,
        pictures=None if pictures is None else RowPictures(pictures, store, chosen.datasets),
    )


def preview(
    split: Mapping[str, Any], tokenizer: Any, *, reading: Reading, what: str = "train", rows: int = 200
) -> Data:
    """The first `rows` rows of each stream of a split, as `read_data` would have them."""
    opened = read_streams(split, tokenizer, reading=reading, what=what)
    records = [
        (d, shard, record)
        for d, stream in enumerate(opened.streams)
        for shard, record in itertools.islice(((s, r) for s in stream.shards for r in s.read()), rows)
    ]
    encoded = opened.encoder([Row(r.row, d, functools.partial(s.where, r.number)) for d, s, r in records])
    chunk = Chunk.of(encoded, np.asarray([(d, i) for i, (d, _, _) in enumerate(records)], np.int64))
    store, counts, notices = joined([chunk])
    if not len(store):
        raise ValueError(f"{what} dataset: none of the first {len(records)} rows is usable")
    allowed = reading.max_length or int(store.lengths.max())

    def where(dataset: int, record: int) -> str:
        return records[record][1].where(records[record][2].number)

    names = tuple(stream.name for stream in opened.streams)
    remarks = (*opened.notices, *notices)
    return Data(store=store, counts=counts, where=where, names=names, max_length=allowed, notices=remarks)


def read_streams(split: Mapping[str, Any], tokenizer: Any, *, reading: Reading, what: str = "train") -> Streams:
    """Open the streams of a split; their first rows are read, to know their format."""
    entries = _entries(split, what)
    streams = _opened(open_stream, entries, split, reading=reading, what=what)
    proportions = shares([entry.mixture_proportion for entry in entries])
    return Streams(
        streams=streams,
        encoder=_encoder([stream.meaning for stream in streams], split, tokenizer, None, reading=reading, what=what),
        proportions=proportions,
        limits=tuple(entry.sample_count for entry in entries),
        shuffle_buffer=max(entry.shuffle_buffer_size for entry in entries),
        all_exhausted=split.get("mixture_strategy") == "all_exhausted",
        mix_seed=reading.seed if split.get("seed") is None else split["seed"],
        notices=tuple(note for stream in streams for note in stream.meaning.notices),
    )


def packing_of(split: Mapping[str, Any], reading: Reading) -> str | None:
    """How the rows of a split are packed; None: not at all."""
    return reading.packing if split.get("pack") else None


def _entries(split: Mapping[str, Any], what: str) -> list[Entry]:
    entries = [Entry.of(entry) for entry in split["datasets"]]
    if not entries:
        raise ValueError(f"data.{what}.datasets is empty; name at least one dataset")
    return entries


def _opened(
    opener: Callable[..., Opened], entries: Sequence[Entry], split: Mapping[str, Any], *, reading: Reading, what: str
) -> tuple[Opened, ...]:
    """What `opener`, of rows by index or of streams, makes of each entry."""
    skip = skips_bad_rows(split, what)
    return tuple(
        opener(entry, skip_bad_rows=skip, text_field=reading.text_field, trainer=reading.trainer) for entry in entries
    )


def skips_bad_rows(split: Mapping[str, Any], what: str) -> bool:
    """Whether rows that cannot be used are skipped and counted."""
    return _one_of(split.get("on_bad_row") or "raise", ("raise", "skip"), f"data.{what}.on_bad_row") == "skip"


def pictures_of_split(split: Mapping[str, Any], *, reading: Reading) -> Pictures | None:
    """How the pictures of a split are opened and prepared; None for a model that takes none."""
    if reading.processor is None:
        return None
    said = {
        "remote": split.get("allow_remote_images"),
        "max_pixels": split.get("max_image_pixels"),
        "max_bytes": split.get("max_image_bytes"),
        "max_images": split.get("max_images_per_row"),
    }
    limits: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
    if reading.cache is not None:
        limits["kept"] = str(reading.cache / "pictures")
    entries = [Entry.of(entry) for entry in split["datasets"]]
    roots = [entry.dataset_kwargs.get("image_root") or split.get("image_root") for entry in entries]
    return Pictures(
        reading.processor,
        tuple(
            Opener(root=root_of(entry.dataset_path, given), **limits)
            for entry, given in zip(entries, roots, strict=True)
        ),
    )


def _encoder(
    meanings: Sequence[Meaning],
    split: Mapping[str, Any],
    tokenizer: Any,
    pictures: Pictures | None,
    *,
    reading: Reading,
    what: str,
) -> Encoder:
    mask = loss_mask(
        split,
        completion_only_loss=reading.completion_only_loss,
        assistant_only_loss=reading.assistant_only_loss,
        what=what,
    )
    return Encoder(
        meanings=tuple(meanings),
        masks=tuple(_mask_of(meaning, mask) for meaning in meanings),
        template=Template(tokenizer, None if reading.processor is None else reading.processor.placeholder),
        max_length=None if packing_of(split, reading) in ("bfd_split", "wrapped") else reading.max_length,
        skip_bad_rows=skips_bad_rows(split, what),
        required=_required(split.get("collator_kwargs") or {}, what),
        answers=reading.answers,
        pictures=pictures,
    )


def loss_mask(
    split: Mapping[str, Any],
    *,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    what: str = "train",
) -> LossMask:
    """Which tokens the collator settings of a split train."""
    name, target = split.get("collator_name"), split.get("train_target")
    kwargs = split.get("collator_kwargs") or {}
    turns: Turns = "assistant" if assistant_only_loss else "all"
    if name == COMPLETIONS:
        if target is None and not kwargs.get("response_template"):
            raise ValueError(f"data.{what}.collator_name {name} needs train_target: {' or '.join(_TURNS)}")
        # Without a target: a response template alone means the last turn, an instruction template beside it all turns.
        old: Turns = "assistant" if kwargs.get("instruction_template") else "final"
        turns = _TURNS[_one_of(target, tuple(_TURNS), f"data.{what}.train_target")] if target else old
    elif name in _WITH_PICTURES:
        turns = _turns_of_pictures(kwargs, target, turns, what)
    elif name not in (None, "text_with_padding", ANSWERS):
        known = ("text_with_padding", COMPLETIONS, *_WITH_PICTURES, ANSWERS)
        raise ValueError(f"data.{what}.collator_name is {name!r}; allowed: {', '.join(known)}")
    elif target is not None:
        raise ValueError(f"data.{what}.train_target is for collator_name {COMPLETIONS}, not {name}")
    return LossMask(turns=turns, completion_only=completion_only_loss)


def _turns_of_pictures(kwargs: Mapping[str, Any], target: str | None, turns: Turns, what: str) -> Turns:
    """The turns that a collator of pictures trains: all of a chat, unless it is told to train answers."""
    if target is not None:
        return _TURNS[_one_of(target, tuple(_TURNS), f"data.{what}.train_target")]
    if kwargs.get("train_on_completions_only"):
        return "assistant" if kwargs.get("instruction_template") else "final"
    return turns


def _mask_of(meaning: Meaning, mask: LossMask) -> LossMask:
    return replace(mask, turns="assistant") if meaning.assistant_only and mask.turns == "all" else mask


def _required(collator_kwargs: Mapping[str, Any], what: str) -> tuple[str, ...]:
    for key in collator_kwargs:
        _one_of(key, (*_COLLATOR_KWARGS, *_PICTURE_KWARGS), f"a key of data.{what}.collator_kwargs")
    return tuple(t for k in ("response_template", "instruction_template") if (t := collator_kwargs.get(k)))


def _one_of(value: Any, allowed: tuple[str, ...], name: str) -> Any:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
    return value


def _pick(
    entries: list[Entry], datasets: tuple[Dataset, ...], *, strategy: str, split_seed: int | None, seed: int
) -> np.ndarray:
    """The rows of an epoch, [R, 2] of (dataset, row); `seed` is for entries and splits that have none of their own."""
    chosen = [
        choose_rows(
            len(dataset),
            sample_count=entry.sample_count,
            shuffle=entry.shuffle,
            seed=seed if entry.seed is None else entry.seed,
        )
        for entry, dataset in zip(entries, datasets, strict=True)
    ]
    proportions = [entry.mixture_proportion for entry in entries]
    mix_seed = seed if split_seed is None else split_seed
    which, place = mix([len(rows) for rows in chosen], proportions=proportions, strategy=strategy, seed=mix_seed)
    rows = np.zeros(len(which), np.int64)
    for number, indices in enumerate(chosen):
        rows[which == number] = indices[place[which == number]]
    return np.stack([which, rows], axis=1)
