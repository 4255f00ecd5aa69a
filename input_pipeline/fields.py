"""Values of a row, checked one by one, and numpy's values turned into Python's."""

import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from input_pipeline.examples import RowError, show

DEEPEST = 100  # levels of a row; chat templates and JSON writers recurse, and end in Python's own limit at 1,000

_AS_THEY_ARE = frozenset({str, int, float, bool, type(None)})


def plain(value: Any, _level: int = 0) -> Any:
    """The value with lists, numbers and objects of Python where arrow, pandas or numpy handed over theirs.

    RowError where it is nested too deeply to be rendered.
    """
    kind = type(value)
    if kind in _AS_THEY_ARE:
        return value
    if _level > DEEPEST:
        raise RowError(f"is nested more than {DEEPEST} levels deep")
    if isinstance(value, np.generic | np.ndarray):
        value = value.item() if isinstance(value, np.generic) else value.tolist()
    if kind is dict or isinstance(value, Mapping):
        return {key: plain(item, _level + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, _level + 1) for item in value]
    return value


def text(value: Any, path: str) -> str:
    """A string that can be written as UTF-8; `path` names it in errors."""
    if not isinstance(value, str):
        raise RowError(f"{path} must be a string, not {show(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x} at character {error.start}"
            raise RowError(f"{path} has half a character ({half}), which is no text", "encoding") from None
    return value


def from_json(value: str, path: str) -> Any:
    """What a JSON string says."""
    try:
        return json.loads(value)
    except RecursionError:
        raise RowError(f"{path} is a string of JSON nested too deeply: {show(value)}") from None
    except ValueError as error:  # not JSON, or a number of thousands of digits
        raise RowError(f"{path} is a string but not JSON ({error}): {show(value)}", "json") from None


def without_nulls(value: Any, *, keep: Collection[str] = ()) -> Any:
    """The value without the fields of objects that are null, but for those that are called as in `keep`.

    Arrow stores objects of one column with the fields of all of them: what an object lacks is null there.
    """
    if isinstance(value, Mapping):
        kept = {name: item for name, item in value.items() if item is not None or name in keep}
        return {name: without_nulls(item, keep=keep) for name, item in kept.items()}
    if isinstance(value, list | tuple):
        return [without_nulls(item, keep=keep) for item in value]
    return value
