"""Where rows come from: a file, a saved dataset, the hub, or a function of the user's.

`open_rows` answers a dataset entry of the configuration with indexable rows that know where each stood, for error
messages.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline.examples import RowError, show
from input_pipeline.files import File, files_of, fingerprint, is_saved_dataset
from input_pipeline.functions import named_function
from input_pipeline.jsonl import JsonLines, open_json, open_jsonl
from input_pipeline.lines import SAMPLES, Lines
from input_pipeline.records import Shard
from input_pipeline.tables import Held, Numbered


@dataclass(frozen=True)
class Rows:
    """Rows by index, and the name of what they come from; `fingerprint` changes when they do (None: not known)."""

    name: str
    rows: Sequence[Any] = field(repr=False)
    first: int = 0  # rows before these in the source, where a slice was taken
    fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]

    def where(self, index: int) -> str:
        """`row 17 of data/train.jsonl`: counted from 1; in files of lines the line, so that an editor finds it."""
        if isinstance(self.rows, Joined):
            return self.rows.where(index)
        number = self.rows.numbers[index] if isinstance(self.rows, JsonLines | Read) else index + 1 + self.first
        return f"row {number} of {self.name}"


@dataclass(frozen=True)
class Read(Sequence):
    """Rows held in memory, or the errors of reading them, and the number of each in its file."""

    rows: list[Any] = field(repr=False)
    numbers: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Read(self.rows[index], self.numbers[index])
        if isinstance(self.rows[index], RowError):
            raise self.rows[index]
        return self.rows[index]


@dataclass(frozen=True)
class Joined(Sequence):
    """The rows of several files, one after the other, from row `start` up to `stop`; `offsets` is where each begins."""

    parts: tuple[Rows, ...]
    offsets: np.ndarray = field(repr=False)
    start: int = 0
    stop: int | None = None

    def __len__(self) -> int:
        return (int(self.offsets[-1]) if self.stop is None else self.stop) - self.start

    def __getitem__(self, index):
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            return Joined(self.parts, self.offsets, self.start + start, self.start + stop)
        part, place = self._find(index)
        return part[place]

    def where(self, index: int) -> str:
        """Where a row stands in its own file."""
        part, place = self._find(index)
        return part.where(place)

    def _find(self, index: int) -> tuple[Rows, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self.offsets, self.start + index, side="right")) - 1
        return self.parts[part], self.start + index - int(self.offsets[part])


def open_rows(
    name: str | None,
    path: str | None,
    *,
    subset: str | None = None,
    split: str = "train",
    kwargs: Mapping[str, Any] | None = None,
) -> Rows:
    """Open the rows of one dataset entry.

    A `path` is read from disk. Else `name` is `file.py:function` or `module:function`, called with `kwargs`, which
    returns a list of rows; or the name of a dataset for `datasets.load_dataset`, with `kwargs` passed on. `split` may
    carry slices ("train[:512]", "train[10%:]"); a file is one split, whatever it is called.
    """
    kwargs = dict(kwargs or {})
    if path:
        return _from_disk(os.path.expanduser(path), split, kwargs)
    if not name:
        raise ValueError(
            "a dataset needs dataset_path (a file or folder) or a dataset_name that says where its rows are"
        )
    if ":" in name:
        return _sliced(Rows(name, _call(name, kwargs)), split)
    loaded = load(name, subset, split, kwargs)
    return Rows(f"{name}, split {split}", undecoded(loaded), fingerprint=loaded._fingerprint)


def _from_disk(path: str, split: str, kwargs: Mapping[str, Any]) -> Rows:
    if os.path.isdir(path) and is_saved_dataset(path):
        return _saved_dataset(Path(path), split)
    files = files_of(path)
    parts = tuple(_of_file(file, kwargs) for file in files)
    if len(parts) == 1:
        return _sliced(parts[0], split)
    joined = Joined(parts, np.cumsum([0, *map(len, parts)]))
    return _sliced(Rows(path, joined, fingerprint=fingerprint(files)), split)


def _of_file(file: File, kwargs: Mapping[str, Any]) -> Rows:
    """The rows of a file by index: of plain JSON Lines only where each begins is held, of tables what is mapped; all
    others are read."""
    name, marks = file.path, fingerprint([file])
    if file.kind == "jsonl" and not file.codec and not file.is_remote:
        return Rows(name, open_jsonl(name), fingerprint=marks)
    if file.kind == "json":
        return Rows(name, open_json(file).rows, fingerprint=marks)
    if file.kind == "parquet" and not file.is_remote:
        return Rows(name, _parquet(file.path), fingerprint=marks)
    records = list(shard_of(file, sample_by=kwargs.get("sample_by", "paragraph")).read())
    return Rows(name, Read([r.row for r in records], np.asarray([r.number for r in records])), fingerprint=marks)


def _parquet(path: str) -> Sequence[Any]:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet

    try:
        table = pa.parquet.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} is not a readable parquet file: {reason}") from None
    return undecoded(datasets.Dataset(datasets.table.InMemoryTable(table)))


def _saved_dataset(path: Path, split: str) -> Rows:
    import datasets

    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        base = split.partition("[")[0]
        if base not in saved:
            raise ValueError(f"split {base!r} is not in {path}; it has: {', '.join(saved)}")
        saved = saved[base]
    return _sliced(Rows(str(path), undecoded(saved), fingerprint=saved._fingerprint), split)


def load(name: str, subset: str | None, split: str, kwargs: Mapping[str, Any]) -> Any:
    """`datasets.load_dataset`; ValueError in one line where it cannot."""
    import datasets

    try:
        return datasets.load_dataset(name, name=subset, split=split or "train", **kwargs)
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"dataset {name!r} (split {split!r}) could not be loaded: {reason}") from error


def _call(name: str, kwargs: dict[str, Any]) -> Sequence[Any]:
    """The rows that the function `file.py:function` or `module:function` returns."""
    rows = named_function(name, key="dataset_name")(**kwargs)
    if not isinstance(rows, Sequence) and not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise ValueError(f"dataset_name {name!r} must return a list of rows, not {show(rows)}")
    return rows


def _sliced(rows: Rows, split: str) -> Rows:
    """The part of a file's rows that a split such as "train[:10%]" asks for."""
    if not split or "[" not in split:
        return rows
    start, stop = bounds(split, len(rows))
    if isinstance(rows.rows, JsonLines):
        lines = rows.rows
        part: Sequence[Any] = JsonLines(
            lines.path, lines.starts[start:stop], lines.ends[start:stop], lines.numbers[start:stop]
        )
        return replace(rows, rows=part)
    part = rows.rows.select(range(start, stop)) if hasattr(rows.rows, "select") else rows.rows[start:stop]
    return replace(rows, rows=part, first=start)


def undecoded(dataset: Any) -> Any:
    """A dataset of `datasets` whose columns of pictures give the bytes of their files: we open them ourselves."""
    import datasets

    changed, as_bytes = {}, datasets.Image(decode=False)
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):
            changed[name] = as_bytes
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            changed[name] = type(feature)(as_bytes)
    if not changed:
        return dataset
    # As cast_column does for a column of pictures; for one of lists it would write all rows anew, which stay the same.
    dataset = copy.copy(dataset)
    dataset._info = copy.deepcopy(dataset._info)
    dataset._info.features = datasets.Features({**dataset.features, **changed})
    dataset._data = dataset._data.cast(dataset._info.features.arrow_schema)
    return dataset


def bounds(split: str, length: int) -> tuple[int, int]:
    """The rows [start, stop) of `length` that a split such as "train[:10%]" asks for."""
    import datasets

    base = split.partition("[")[0]
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({base: length})
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"split {split!r} is not understood: {error}; write it like 'train[:512]' or 'train[10%:]'"
        ) from None
    if len(parts) != 1:
        raise ValueError(f"split {split!r}: a file can be cut into one part only")
    return parts[0].from_ or 0, length if parts[0].to is None else parts[0].to


def shard_of(file: File, *, sample_by: str = "paragraph") -> Shard:
    """The shard that a file is."""
    if sample_by not in SAMPLES:
        raise ValueError(f"dataset_kwargs.sample_by is {sample_by!r}; allowed: {', '.join(SAMPLES)}")
    if file.kind in ("jsonl", "text"):
        return Lines(file, "json" if file.kind == "jsonl" else sample_by)
    if file.kind == "json":
        rows = open_json(file).rows
        return Held(file.path, rows, 0, len(rows))
    return Numbered(file)


def stored(rows: Rows, index: int) -> Any:
    """One row as stored, or the RowError of reading it."""
    try:
        return read(rows, index)
    except RowError as error:
        return error


def read(rows: Rows, index: int) -> Any:
    """One row as stored; RowError names the file and the row."""
    try:
        return rows[index]
    except RowError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise RowError(f"{rows.where(index)} cannot be read: {error}", "unreadable") from error
