"""JSON Lines and JSON files as indexable rows, with errors that name the file, the line and the reason.

A JSON Lines file is scanned once for line starts and read row by row, so that it takes little memory whatever its
size. Accepted are a byte-order mark, Windows line ends, blank lines and a last line without a line end.
"""

import codecs
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline.examples import RowError
from input_pipeline.files import File, opened

_SHOWN = 80  # characters of a bad line that an error shows


def open_jsonl(path: str | Path) -> "JsonLines":
    """Find the lines of a JSON Lines file; nothing is parsed yet."""
    starts, ends, numbers, position = array("q"), array("q"), array("q"), 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            begin = len(codecs.BOM_UTF8) if number == 1 and line.startswith(codecs.BOM_UTF8) else 0
            if line[begin:].strip():
                starts.append(position + begin)
                ends.append(position + len(line))
                numbers.append(number)
            position += len(line)
    as_array = (
        np.frombuffer(column, np.int64) if column else np.empty(0, np.int64) for column in (starts, ends, numbers)
    )
    return JsonLines(str(path), *as_array)


def open_json(file: File) -> "JsonList":
    """Read a JSON file that holds a list of rows."""
    path = file.path
    with opened(file) as stream:
        data = stream.read()
    text = _decode(data.removeprefix(codecs.BOM_UTF8), str(path), len(data) - len(data.removeprefix(codecs.BOM_UTF8)))
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}:{error.colno}: {error.msg}; a .json file holds one list of rows"
        ) from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(rows, list):
        raise ValueError(
            f"{path} holds {_kind(rows)}; a .json file must hold a list of rows (or use .jsonl, one row a line)"
        )
    return JsonList(str(path), rows)


def parse_line(line: bytes, path: str, number: int, position: int = 0) -> Any:
    """The value on one line; RowError names `path:number`, the reason and the line's first 80 characters.

    `position` is where the line starts in the file, in bytes, for the place of a byte that is not UTF-8.
    """
    text = _decode(line, f"{path}:{number}", position).rstrip("\r\n")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where, reason = f"{path}:{number}:{error.colno}", error.msg
    except RecursionError:
        where, reason = f"{path}:{number}", "nested too deeply"
    except ValueError:
        where, reason = f"{path}:{number}", "a number of thousands of digits"
    shown = text.strip()
    raise RowError(f"{where}: not valid JSON ({reason}): {shown[:_SHOWN]}{'…' if len(shown) > _SHOWN else ''}", "json")


def _decode(data: bytes, where: str, position: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"byte {position + error.start} of the file (0x{data[error.start]:02x})"
        raise RowError(f"{where}: {place} is not UTF-8; save the file as UTF-8", "encoding") from None


def _kind(value: Any) -> str:
    return {dict: "an object", str: "a string", type(None): "null"}.get(type(value), "a single value")


@dataclass(frozen=True)
class JsonLines(Sequence):
    """The rows of a JSON Lines file, each parsed when it is asked for."""

    path: str
    starts: np.ndarray = field(repr=False)
    ends: np.ndarray = field(repr=False)
    numbers: np.ndarray = field(repr=False)  # line of each row, from 1

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index):
        start = int(self.starts[index])
        with open(self.path, "rb") as file:
            file.seek(start)
            line = file.read(int(self.ends[index]) - start)
        return parse_line(line, self.path, int(self.numbers[index]), start)


@dataclass(frozen=True)
class JsonList(Sequence):
    """The rows of a JSON file that holds a list."""

    path: str
    rows: list = field(repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]
