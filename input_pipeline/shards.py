"""A dataset entry as shards, for rows that are read one after the other."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from input_pipeline.files import files_of, is_saved_dataset
from input_pipeline.functions import named_function
from input_pipeline.records import Shard
from input_pipeline.sources import bounds, load, open_rows, shard_of
from input_pipeline.tables import Called, Held, Numbered, Streamed


def open_shards(
    name: str | None,
    path: str | None,
    *,
    subset: str | None = None,
    split: str = "train",
    kwargs: Mapping[str, Any] | None = None,
) -> list[Shard]:
    """The shards of a dataset entry, by the arguments of `sources.open_rows`: each file of a path is one.

    `kwargs["sample_by"]` says what is a row of a text file: a "line", a "paragraph" (the default) or the "document".
    A slice in `split` ("train[:90%]") is of the rows of all files, whose kind has to tell how many there are.
    """
    kwargs = dict(kwargs or {})
    if path and not (os.path.isdir(path) and is_saved_dataset(path)):
        files = files_of(path)
        return _sliced([shard_of(file, sample_by=kwargs.get("sample_by", "paragraph")) for file in files], split, path)
    if path or (name and ":" not in name):
        return _of_datasets(name, path, subset, split, kwargs)
    if not name:
        raise ValueError("a dataset needs dataset_path (a file or folder) or a dataset_name that says where it is")
    named_function(name, key="dataset_name")  # a misspelt name is answered now
    return _sliced([Called(name, kwargs)], split, name)


def _of_datasets(name: str | None, path: str | None, subset: str | None, split: str, kwargs: Any) -> list[Shard]:
    if path:
        rows = open_rows(name, path, split=split)
        return [Held(rows.name, rows.rows, 0, len(rows))]
    assert name is not None
    dataset = load(name, subset, split, {**kwargs, "streaming": True})
    count = max(dataset.num_shards, 1)
    title = f"{name}, split {split}"
    if count == 1:
        return [Streamed(title, dataset)]
    return [Streamed(f"{title}, shard {i}", dataset.shard(count, i)) for i in range(count)]


def _sliced(shards: Sequence[Shard], split: str, name: str) -> list[Shard]:
    """The shards, or parts of them, that hold the rows which a split such as "train[:10%]" asks for."""
    if not split or "[" not in split:
        return list(shards)
    counted = [shard for shard in shards if isinstance(shard, Numbered | Held)]
    if len(counted) < len(shards):
        raise ValueError(
            f"split {split!r} of a stream of {name}: how many rows it has is not known; leave stream out, use"
            " sample_count, or name the files"
        )
    lengths = [len(shard) for shard in counted]
    start, stop = bounds(split, sum(lengths))
    kept: list[Shard] = []
    first = 0
    for shard, length in zip(counted, lengths, strict=True):
        low, high = max(start - first, 0), min(stop - first, length)
        if low < high:
            kept.append(replace(shard, start=low, stop=high))
        first += length
    if not kept:
        raise ValueError(f"split {split!r} of {name} has 0 rows, of {sum(lengths)}")
    return kept
