"""What a dataset entry of the configuration means: which rows, in which format, with which tokens trained.

`dataset_name` is one of the names below, or anything that `sources.open_rows` can open (a hub name,
`file.py:function`); then the format is found from the first row.
"""

import difflib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from input_pipeline import formats
from input_pipeline.examples import Example, RowError
from input_pipeline.shards import Shard, open_shards
from input_pipeline.sources import Rows, open_rows, read

Record = tuple[Any, Callable[[], str]]  # a row, or the error of reading it; what names its place

FILES = ("text_sft", "text_sft_jsonl", "text")  # rows from dataset_path
ALPACA = ("tatsu-lab/alpaca", "yahma/alpaca-cleaned")  # hub names read with Alpaca's system prompt
LATER = {
    "vl_sft": "vision-language data",
    "vl_sft_jsonl": "vision-language data",
    "vision_language_jsonl": "vision-language data",
    "preference_pairs_jsonl": "preference data",
    "vision_dpo_jsonl": "preference data",
}
NO_EFFECT = ("task", "return_tensors", "return_conversations", "return_conversations_format")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One item of `data.<split>.datasets`, by the names of the configuration."""

    dataset_name: str | None = None
    dataset_path: str | None = None
    subset: str | None = None
    split: str = "train"
    dataset_kwargs: Mapping[str, Any] = field(default_factory=dict)
    sample_count: int | None = None
    mixture_proportion: float | None = None
    shuffle: bool = False
    seed: int | None = None
    transform_num_workers: int | str | None = None
    shuffle_buffer_size: int = 1000

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "Entry":
        """The entry of a configuration; keys that data for SFT does not use are left to the configuration's own
        rules."""
        known = {f.name for f in fields(cls)}
        given = {key: value for key, value in dict(entry).items() if key in known and value is not None}
        given["dataset_kwargs"] = _plain(given.get("dataset_kwargs", {}))
        return cls(**given)

    @property
    def is_local(self) -> bool:
        """Whether all rows can be had from this machine: of files and functions, not of the hub or another store."""
        return "://" not in self.dataset_path if self.dataset_path else ":" in (self.dataset_name or "")


@dataclass(frozen=True)
class Meaning:
    """How the rows of a dataset are understood."""

    format: str
    format_kwargs: Mapping[str, Any] = field(default_factory=dict)
    assistant_only: bool = False
    required: tuple[str, ...] = ()  # strings that must occur in the rendered chat
    notices: tuple[str, ...] = ()

    def example(self, row: Any, where: Callable[[], str]) -> Example:
        """A row understood; RowError begins with what `where` answers."""
        if not isinstance(row, Mapping):
            raise RowError(f"{where()}: a row must be an object, not {type(row).__name__}")
        try:
            return formats.load(self.format).parse(row, **self.format_kwargs)
        except RowError as error:
            raise error.at(where()) from None


@dataclass(frozen=True)
class Dataset:
    """Rows by index with their meaning; `example(i)` is row i understood."""

    rows: Rows
    meaning: Meaning

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int) -> Example:
        """Row `index` understood; RowError names the file and the row."""
        return self.meaning.example(read(self.rows, index), functools.partial(self.rows.where, index))


@dataclass(frozen=True)
class Stream:
    """Rows in shards, each read from its beginning to its end, with their meaning."""

    name: str
    shards: tuple[Shard, ...]
    meaning: Meaning


def open_dataset(entry: Entry, *, skip_bad_rows: bool = False, text_field: str = "text") -> Dataset:
    """Open the rows of an entry and settle their format, from `dataset_kwargs.format` or the first row (the first good
    one with `skip_bad_rows`). `text_field` is the column of plain text rows."""
    ours, source = _source(entry)
    rows = open_rows(**source)

    def records() -> Iterator[Record]:
        for index in range(len(rows)):
            try:
                yield read(rows, index), functools.partial(rows.where, index)
            except RowError as error:
                yield error, functools.partial(rows.where, index)

    first = functools.partial(_detect, records(), skip_bad_rows)
    return Dataset(rows, _meaning(entry, ours, text_field=text_field, detect=first))


def open_stream(entry: Entry, *, skip_bad_rows: bool = False, text_field: str = "text") -> Stream:
    """`open_dataset` for rows that are read one after the other; as much is read of them as is needed to know their
    format."""
    ours, source = _source(entry)
    shards = tuple(open_shards(**source))
    records = (
        (record.row, functools.partial(shard.where, record.number)) for shard in shards for record in shard.read()
    )
    first = functools.partial(_detect, records, skip_bad_rows)
    name = entry.dataset_path or entry.dataset_name or ""
    return Stream(os.fspath(name), shards, _meaning(entry, ours, text_field=text_field, detect=first))


def _meaning(entry: Entry, ours: Mapping[str, Any], *, text_field: str, detect: Callable[[str], str]) -> Meaning:
    """What the entry says about its rows; where it says no format, `detect(text_field)` is asked."""
    format_kwargs: dict[str, Any] = {}
    if entry.dataset_name in ALPACA:
        kind = "alpaca"
        format_kwargs["system_prompt"] = bool(ours.get("include_system_prompt", True))
    else:
        text_field = ours.get("text_col", text_field)
        kind = formats.canonical(ours["format"]) if ours.get("format") else detect(text_field)
        if kind == "text":
            format_kwargs["field"] = text_field
    return Meaning(
        format=kind,
        format_kwargs=format_kwargs,
        assistant_only=bool(ours.get("assistant_only", False)),
        required=tuple(t for key in ("response_template", "instruction_template") if (t := ours.get(key))),
        notices=tuple(f"dataset_kwargs.{key} has no effect here" for key in ours if key in NO_EFFECT),
    )


def _source(entry: Entry) -> tuple[dict[str, Any], dict[str, Any]]:
    """The dataset_kwargs that say what rows mean, and the arguments that open them."""
    name = entry.dataset_name
    if name in LATER:
        raise NotImplementedError(f"not implemented yet: dataset_name {name!r} ({LATER[name]})")
    if name in FILES and not entry.dataset_path:
        raise ValueError(f"dataset_name {name!r} reads rows from a file: set dataset_path")
    ours, kwargs = _split_kwargs(entry)
    return ours, {
        "name": None if name in FILES else ours.get("dataset_name_override") or name,
        "path": os.fspath(entry.dataset_path) if entry.dataset_path else None,
        "subset": entry.subset,
        "split": entry.split,
        "kwargs": kwargs,
    }


_OURS = (
    "format",
    "assistant_only",
    "response_template",
    "instruction_template",
    "include_system_prompt",
    "dataset_name_override",
    "text_col",
    *NO_EFFECT,
)


def _split_kwargs(entry: Entry) -> tuple[dict[str, Any], dict[str, Any]]:
    """dataset_kwargs that mean something here, and the rest, which goes to the loader (for files there is none)."""
    ours = {key: value for key, value in entry.dataset_kwargs.items() if key in _OURS}
    rest = {key: value for key, value in entry.dataset_kwargs.items() if key not in _OURS}
    if rest and (entry.dataset_path or entry.dataset_name in FILES):
        key = next(iter(rest))
        near = difflib.get_close_matches(key, _OURS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"dataset_kwargs.{key} is unknown{hint} Known for files: {', '.join(_OURS)}")
    return ours, rest


def _detect(records: Iterable[Record], skip_bad_rows: bool, text_field: str) -> str:
    first: RowError | None = None
    for row, where in records:
        try:
            if isinstance(row, RowError):
                raise row
            try:
                return formats.detect(row, text_field)
            except RowError as error:
                raise error.at(where()) from None
        except RowError as error:
            if not skip_bad_rows:
                raise
            first = first or error
    if first is not None:
        raise first
    return "conversation"  # no rows at all: that is reported where rows are counted


def _plain(value: Any) -> dict[str, Any]:
    return dict(value.to_dict() if hasattr(value, "to_dict") else value)
