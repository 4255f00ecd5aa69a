"""Where rows come from: a file, a saved dataset, the hub, or a function of the user's.

`open_rows` answers a dataset entry of the configuration with indexable rows that know where each stood, for error
messages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from input_pipeline.examples import RowError, show
from input_pipeline.functions import named_function
from input_pipeline.jsonl import JsonLines, open_json, open_jsonl

ON_DISK = ".jsonl, .json (a list), .parquet, or a folder written by datasets' save_to_disk"


@dataclass(frozen=True)
class Rows:
    """Rows by index, and the name of what they come from."""

    name: str
    rows: Sequence[Any] = field(repr=False)
    first: int = 0  # rows before these in the source, where a slice was taken

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]

    def where(self, index: int) -> str:
        """`row 17 of data/train.jsonl`: counted from 1; in JSON Lines the line, so that an editor finds it."""
        number = self.rows.numbers[index] if isinstance(self.rows, JsonLines) else index + 1 + self.first
        return f"row {number} of {self.name}"


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
        return _from_disk(Path(path).expanduser(), split)
    if not name:
        raise ValueError(
            "a dataset needs dataset_path (a file or folder) or a dataset_name that says where its rows are"
        )
    if ":" in name:
        return _sliced(Rows(name, _call(name, kwargs)), split)
    return _from_hub(name, subset, split, kwargs)


def _from_disk(path: Path, split: str) -> Rows:
    if not path.exists():
        raise ValueError(f"dataset_path {str(path)!r} does not exist (looked in {Path.cwd()})")
    if path.is_dir():
        if not ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
            raise ValueError(
                f"dataset_path {str(path)!r} is a folder, but not one written by save_to_disk; allowed: {ON_DISK}"
            )
        return _saved_dataset(path, split)
    if path.suffix == ".jsonl":
        return _sliced(Rows(str(path), open_jsonl(path)), split)
    if path.suffix == ".json":
        return _sliced(Rows(str(path), open_json(path).rows), split)
    if path.suffix == ".parquet":
        return _sliced(Rows(str(path), _parquet(path)), split)
    raise ValueError(f"Unsupported file format: {path.suffix or 'no suffix'} of {str(path)!r}; allowed: {ON_DISK}")


def _parquet(path: Path) -> Sequence[Any]:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet

    try:
        table = pa.parquet.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from None
    return datasets.Dataset(datasets.table.InMemoryTable(table))


def _saved_dataset(path: Path, split: str) -> Rows:
    import datasets

    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        base = split.partition("[")[0]
        if base not in saved:
            raise ValueError(f"split {base!r} is not in {path}; it has: {', '.join(saved)}")
        saved = saved[base]
    return _sliced(Rows(str(path), saved), split)


def _from_hub(name: str, subset: str | None, split: str, kwargs: dict[str, Any]) -> Rows:
    import datasets

    try:
        loaded = datasets.load_dataset(name, name=subset, split=split or "train", **kwargs)
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"dataset {name!r} (split {split!r}) could not be loaded: {reason}") from error
    return Rows(f"{name}, split {split}", loaded)


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
    import datasets

    base = split.partition("[")[0]
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({base: len(rows)})
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"split {split!r} is not understood: {error}; write it like 'train[:512]' or 'train[10%:]'"
        ) from None
    if len(parts) != 1:
        raise ValueError(f"split {split!r}: a file can be cut into one part only")
    start, stop = parts[0].from_ or 0, len(rows) if parts[0].to is None else parts[0].to
    if isinstance(rows.rows, JsonLines):
        lines = rows.rows
        part: Sequence[Any] = JsonLines(
            lines.path, lines.starts[start:stop], lines.ends[start:stop], lines.numbers[start:stop]
        )
        return Rows(rows.name, part)
    part = rows.rows.select(range(start, stop)) if hasattr(rows.rows, "select") else rows.rows[start:stop]
    return Rows(rows.name, part, start)


def read(rows: Rows, index: int) -> Any:
    """One row as stored; RowError names the file and the row."""
    try:
        return rows[index]
    except RowError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise RowError(f"{rows.where(index)} cannot be read: {error}") from error
