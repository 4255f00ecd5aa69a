"""Files of numbered rows read in parts: parquet, Arrow and array_record; rows in memory; and datasets of the hub."""

import contextlib
import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from input_pipeline.examples import RowError, show
from input_pipeline.files import File, opened, size
from input_pipeline.functions import named_function
from input_pipeline.records import Position, Record, falls_to

_ROWS = 256  # read at once


@dataclass(frozen=True)
class Numbered:
    """Rows `start` up to `stop` (None: all) of a file, or part `index` of `count` of these."""

    file: File
    start: int = 0
    stop: int | None = None
    index: int = 0
    count: int = 1

    @property
    def name(self) -> str:
        return self.file.path

    def part(self, index: int, count: int) -> "Numbered":
        """Part `index` of `count`."""
        assert self.count == 1
        return replace(self, index=index, count=count)

    def where(self, number: int) -> str:
        """`row 17 of data/train.parquet`, counted from 1."""
        return f"row {number} of {self.file.path}"

    def __len__(self) -> int:
        with _table(self.file) as table:
            return self._range(len(table))[1] - self._range(len(table))[0]

    def read(self, position: Position | None = None) -> Iterator[Record]:
        """The rows from `position` on; `number` counts them from 1 in the file."""
        with _table(self.file) as table:
            start, stop = self._range(len(table))
            start = position["row"] if position else start
            for number, row in enumerate(table.rows(start, stop), start):
                yield Record(row, number + 1, {"row": number + 1})

    def _range(self, length: int) -> tuple[int, int]:
        """The rows [start, stop) of the file."""
        first = min(self.start, length)
        among = (length if self.stop is None else min(self.stop, length)) - first
        return first + among * self.index // self.count, first + among * (self.index + 1) // self.count


@dataclass(frozen=True)
class Held:
    """Rows that can be had by index, here those from `start` up to `stop`."""

    name: str
    rows: Sequence[Any]
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, index: int, count: int) -> "Held":
        """Part `index` of `count`."""
        first, last = (self.start + len(self) * i // count for i in (index, index + 1))
        return replace(self, start=first, stop=last)

    def where(self, number: int) -> str:
        """`row 17 of data/train.json`, counted from 1."""
        return f"row {number} of {self.name}"

    def read(self, position: Position | None = None) -> Iterator[Record]:
        """The rows from `position` on; `number` counts them from 1 in the whole."""
        for index in range(position["row"] if position else self.start, self.stop):
            yield Record(self.rows[index], index + 1, {"row": index + 1})


@dataclass(frozen=True)
class Streamed:
    """An iterable dataset of `datasets`, whose own state is the position; part i of n has every n-th row."""

    name: str
    rows: Any
    index: int = 0
    count: int = 1

    def part(self, index: int, count: int) -> "Streamed":
        """Part `index` of `count`: every row is read, and every `count`-th kept."""
        return replace(self, index=index, count=count)

    def where(self, number: int) -> str:
        """`row 17 of name`, counted from 1."""
        return f"row {number} of {self.name}"

    def read(self, position: Position | None = None) -> Iterator[Record]:
        """The rows from `position` on."""
        number = position["row"] if position else 0
        rows = copy.deepcopy(self.rows)  # the state is in the dataset: other readings have their own
        if position:
            rows.load_state_dict(position["state"])
        for row in rows:
            number += 1
            if falls_to(number, index=self.index, count=self.count):
                yield Record(row, number, {"row": number, "state": rows.state_dict()})


@dataclass(frozen=True)
class Called:
    """What the function `name` gives, which is called afresh for every reading; part i of n has every n-th row."""

    name: str  # file.py:function, and not the function: one of a file cannot be pickled
    kwargs: Mapping[str, Any]
    index: int = 0
    count: int = 1

    def part(self, index: int, count: int) -> "Called":
        """Part `index` of `count`: every row is made, and every `count`-th kept."""
        return replace(self, index=index, count=count)

    def where(self, number: int) -> str:
        """`row 17 of file.py:function`, counted from 1."""
        return f"row {number} of {self.name}"

    def read(self, position: Position | None = None) -> Iterator[Record]:
        """The rows from `position` on: those before it are made again and left out."""
        done = position["row"] if position else 0
        rows = named_function(self.name, key="dataset_name")(**self.kwargs)
        if not isinstance(rows, Iterable):
            raise ValueError(f"dataset_name {self.name!r} must return rows, not {show(rows)}")
        for number, row in enumerate(rows, 1):
            if number > done and falls_to(number, index=self.index, count=self.count):
                yield Record(row, number, {"row": number})


@contextlib.contextmanager
def _table(file: File) -> Iterator[Any]:
    """An open table: its length, and `rows(start, stop)`; ValueError names a file that is none, or is damaged."""
    import pyarrow as pa

    kinds = {"parquet": _Parquet, "arrow": _Arrow, "array_record": _ArrayRecord}
    try:
        with contextlib.ExitStack() as stack:
            yield kinds[file.kind](file, stack)
    except (OSError, RuntimeError, IndexError, pa.ArrowException) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RowError(f"{file.path} cannot be read: {reason}", "unreadable") from error


class _Parquet:
    def __init__(self, file: File, stack: contextlib.ExitStack):
        import pyarrow as pa
        import pyarrow.parquet as parquet

        self._path = file.path
        source = stack.enter_context(opened(file)) if file.is_remote else file.path
        try:
            self._file = stack.enter_context(parquet.ParquetFile(source))
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file.path} is not a readable parquet file: {error}") from None

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def rows(self, start: int, stop: int) -> Iterator[Any]:
        first = 0
        for group in range(self._file.metadata.num_row_groups):
            length = self._file.metadata.row_group(group).num_rows
            if first < stop and first + length > start:
                place = first
                for batch in self._file.iter_batches(batch_size=_ROWS, row_groups=[group]):
                    low, high = max(start - place, 0), min(stop - place, len(batch))
                    if low < high:
                        yield from _listed(batch.slice(low, high - low), place + low, self._path)
                    place += len(batch)
            first += length


class _Arrow:
    def __init__(self, file: File, stack: contextlib.ExitStack):
        import pyarrow as pa

        self._path = file.path
        if file.is_remote:
            source: Any = pa.PythonFile(stack.enter_context(opened(file)))
        else:
            source = stack.enter_context(pa.memory_map(file.path)) if size(file) else pa.BufferReader(b"")
        try:
            self._batches = _batches(source)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file.path} is not a readable Arrow file: {error}") from None

    def __len__(self) -> int:
        return sum(len(batch) for batch in self._batches)

    def rows(self, start: int, stop: int) -> Iterator[Any]:
        first = 0
        for batch in self._batches:
            low, high = max(start - first, 0), min(stop - first, len(batch))
            for place in range(low, high, _ROWS):
                yield from _listed(batch.slice(place, min(_ROWS, high - place)), first + place, self._path)
            first += len(batch)


def _listed(batch: Any, first: int, path: str) -> Iterator[Any]:
    """The rows of a batch, which begins at row `first` of the file, from 0; one with bytes that are not UTF-8 is an
    error of its own."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) > 1:
            for place in range(len(batch)):
                yield from _listed(batch.slice(place, 1), first + place, path)
            return
        rows = [RowError(f"row {first + 1} of {path}: a string is not UTF-8", "encoding")]
    yield from rows


def _batches(source: Any) -> list[Any]:
    """The record batches of an Arrow file or stream; mapped, not read."""
    import pyarrow as pa

    try:
        reader = pa.ipc.open_file(source)
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except pa.ArrowInvalid:
        source.seek(0)
        return list(pa.ipc.open_stream(source))


class _ArrayRecord:
    def __init__(self, file: File, stack: contextlib.ExitStack):
        from array_record.python.array_record_module import ArrayRecordReader

        if file.is_remote:
            raise ValueError(f"{file.path}: array_record files are read from this machine's disk only")
        self._path, self._reader = file.path, ArrayRecordReader(file.path)
        try:
            if not self._reader.ok():
                self._reader.close()  # says what is wrong
        except RuntimeError as error:
            raise ValueError(f"{file.path} is not a readable array_record file: {error}") from None
        stack.callback(self._reader.close)
        self._length = self._reader.num_records()

    def __len__(self) -> int:
        return self._length

    def rows(self, start: int, stop: int) -> Iterator[Any]:
        for first in range(start, stop, _ROWS):
            numbers = list(range(first, min(first + _ROWS, stop)))
            for number, record in zip(numbers, self._reader.read(numbers), strict=True):
                yield self._row(record, number)

    def _row(self, record: bytes, number: int) -> Any:
        try:
            return json.loads(record)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            return RowError(f"row {number + 1} of {self._path}: not valid JSON ({error})", "json")
