"""A row before its format reads it: what a function makes of it, and columns under the names that the format has."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from input_pipeline.examples import RowError, show
from input_pipeline.fields import plain
from input_pipeline.functions import named_function

KEY = "dataset_kwargs.transform"


@dataclass(frozen=True, kw_only=True)
class Reshape:
    """Turns a row as stored into a row of a format; picklable, since a function goes by its name.

    `transform` is `file.py:function` or `module:function`: row → row, or None to leave it out; `arguments` are given to
    it by name. `columns` says in which column a field of the format stands; None where the row's own is not to be used.
    `code` is a hash of the function's file: rows that were read with another one are not the same.
    """

    transform: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, str | None] = field(default_factory=dict)
    code: str = ""

    def __call__(self, row: Any) -> dict[str, Any] | None:
        """The row, of Python's own types; None where it is left out. RowError where it cannot be had."""
        row = plain(row)
        if not isinstance(row, Mapping):
            raise RowError(f"a row must be an object, not {type(row).__name__}")
        if self.transform:
            row = self._transformed(row)
        return self._renamed(row) if row is not None and self.columns else row

    def _transformed(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        assert self.transform is not None
        function = _function(self.transform)
        try:
            made = function(row, **self.arguments)
        except RowError:
            raise
        except Exception as error:  # the user's code: it may raise anything, and the row must be named
            raise RowError(f"{self.transform} raised {type(error).__name__}: {error}", "transform") from error
        if made is not None and not isinstance(made, Mapping):
            raise RowError(f"{self.transform} must return a row (an object) or None, not {show(made)}", "transform")
        return plain(made)

    def _renamed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        for column in self.columns.values():
            if column is not None and column not in row:
                raise RowError(f"has no column {column!r}; its columns are {sorted(map(str, row))}")
        own = {name: value for name, value in row.items() if name not in self.columns}
        return own | {name: row[column] for name, column in self.columns.items() if column is not None}


def reshape(
    transform: str | None,
    *,
    arguments: Mapping[str, Any] | None = None,
    columns: Mapping[str, str | None] | None = None,
) -> Reshape:
    """`Reshape` with the hash of the function's file; ValueError where there is no such function."""
    code = _code_hash(_function(transform)) if transform else ""
    return Reshape(transform=transform, arguments=dict(arguments or {}), columns=dict(columns or {}), code=code)


def _code_hash(function: Callable[..., Any]) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)  # a class, or something built in, has none
    return xxhash.xxh3_64_hexdigest(Path(code.co_filename).read_bytes()) if code else ""


@functools.lru_cache(maxsize=32)
def _function(name: str) -> Callable[..., Any]:
    return named_function(name, key=KEY)
