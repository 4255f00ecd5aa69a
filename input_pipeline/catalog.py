"""What a dataset entry of the configuration means: which rows, in which format, with which tokens trained.

`dataset_name` is one of those in `known.py`, or anything that `sources.open_rows` can open (a hub name,
`file.py:function`); then the format is found from the first row.
"""

import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from input_pipeline.examples import Example
from input_pipeline.known import Known, known
from input_pipeline.meaning import KEYS, Meaning, Record, check_keys, check_spelling, meaning_of
from input_pipeline.records import Shard
from input_pipeline.shards import open_shards
from input_pipeline.sources import Rows, open_rows, read, stored

_NAMES_PLACE = ("hf_dataset_path", "dataset_name_override")  # dataset_kwargs that name the dataset to load


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
        source = _source(self)
        return "://" not in source["path"] if source["path"] else ":" in (source["name"] or "")


@dataclass(frozen=True)
class Dataset:
    """Rows by index with their meaning; `example(i)` is row i understood."""

    rows: Rows
    meaning: Meaning

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int) -> Example | None:
        """Row `index` understood, or None where the transform leaves it out; RowError names the file and the row."""
        return self.meaning.example(read(self.rows, index), functools.partial(self.rows.where, index))


@dataclass(frozen=True)
class Stream:
    """Rows in shards, each read from its beginning to its end, with their meaning."""

    name: str
    shards: tuple[Shard, ...]
    meaning: Meaning


def open_dataset(
    entry: Entry, *, skip_bad_rows: bool = False, text_field: str = "text", trainer: str = "TRL_SFT"
) -> Dataset:
    """Open the rows of an entry and settle their format, from `dataset_kwargs.format` or the first row (the first good
    one with `skip_bad_rows`). `text_field` is the column of plain text rows, `trainer` the `training.trainer_type`,
    whose formats are looked for."""
    rows = open_rows(**_source(entry))
    records = ((stored(rows, index), functools.partial(rows.where, index)) for index in range(len(rows)))
    return Dataset(rows, _meaning(entry, records, skip_bad_rows, text_field, trainer))


def open_stream(
    entry: Entry, *, skip_bad_rows: bool = False, text_field: str = "text", trainer: str = "TRL_SFT"
) -> Stream:
    """`open_dataset` for rows that are read one after the other; as much is read of them as is needed to know their
    format."""
    shards = tuple(open_shards(**_source(entry)))
    records = (
        (record.row, functools.partial(shard.where, record.number)) for shard in shards for record in shard.read()
    )
    name = entry.dataset_path or entry.dataset_name or ""
    return Stream(os.fspath(name), shards, _meaning(entry, records, skip_bad_rows, text_field, trainer))


def _meaning(entry: Entry, records: Iterator[Record], skip_bad_rows: bool, text_field: str, trainer: str) -> Meaning:
    return meaning_of(
        entry.dataset_kwargs,
        records,
        name=entry.dataset_name,
        split=entry.split,
        skip_bad_rows=skip_bad_rows,
        text_field=text_field,
        trainer=trainer,
    )


def _source(entry: Entry) -> dict[str, Any]:
    """The arguments that open the rows of an entry."""
    listed, kwargs = known(entry.dataset_name), entry.dataset_kwargs
    name, path = _place(entry, listed)
    kwargs_of_rows = {key: value for key, value in kwargs.items() if key not in (*KEYS, *_NAMES_PLACE)}
    if path or listed.rows:
        check_keys(kwargs, others=(*_NAMES_PLACE, *(listed.takes if listed.rows and not path else ("sample_by",))))
    elif ":" not in (name or ""):
        check_spelling(kwargs)
    return {
        "name": name,
        "path": path,
        "subset": entry.subset,
        "split": entry.split,
        "kwargs": {**kwargs_of_rows, **_drawn(entry, listed)},
    }


def _drawn(entry: Entry, listed: Known) -> dict[str, Any]:
    """What the entry itself says to a function that draws rows."""
    said = {"seed": entry.seed, "split": entry.split.partition("[")[0]}
    return {key: value for key, value in said.items() if key in listed.takes and value is not None}


def _place(entry: Entry, listed: Known) -> tuple[str | None, str | None]:
    """The name that rows are loaded by, and the path that they are read from instead."""
    name, path = entry.dataset_name, os.fspath(entry.dataset_path) if entry.dataset_path else None
    if listed.from_file:
        if not path:
            raise ValueError(f"dataset_name {name!r} reads rows from a file: set dataset_path")
        return None, path
    if listed.rows:
        return listed.rows, path
    other = next((str(entry.dataset_kwargs[key]) for key in _NAMES_PLACE if entry.dataset_kwargs.get(key)), None)
    if other is not None:
        return other, path or (other if os.path.exists(other) else None)
    if listed.of_any and not path:
        raise ValueError(f"dataset_name {name!r} is for any dataset: name it in dataset_kwargs.hf_dataset_path")
    return name, path


def _plain(value: Any) -> dict[str, Any]:
    return dict(value.to_dict() if hasattr(value, "to_dict") else value)
