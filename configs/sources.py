"""The two kinds of configuration files: YAML, and Python with `get_config(argument)`."""

import inspect
import os
import re
import runpy
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs.default import SCHEMA, get_config
from configs.given import Given
from configs.key import leaves
from configs.nearest import nearest
from configs.yaml_text import parse

PYTHON = re.compile(r"(.+\.py)(?::(.*))?$", re.DOTALL)
MISTAKES = (AttributeError, ImportError, KeyError, NameError, SyntaxError, TypeError, ValueError)


def read(source: str) -> Given:
    """What a file gives; ValueError, in one line, if there is none or it cannot be read."""
    python = PYTHON.match(source)
    file = Path(python[1] if python else source)
    if not file.is_file():
        raise ValueError(f"{file}: no such file; -c takes a YAML file, or a Python file with get_config")
    if python:
        return _python(file, python[2] or "")
    try:
        given = parse(file.read_text(encoding="utf-8"), str(file))
        return given._replace(value={}) if given.value is None else given  # the command line may say everything
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not a text in UTF-8: {error.reason} at byte {error.start}") from None


def _python(file: Path, argument: str) -> Given:
    """What the file's `get_config` returns; of a ConfigDict what differs from the defaults, of a dict all."""
    try:
        make = runpy.run_path(str(file)).get("get_config", lambda argument: None)
        result = make(argument) if argument or inspect.signature(make).parameters else make()
    except MISTAKES as error:
        raise ValueError(f"{_line(error, file)}: {_mistake(error)}") from error
    if isinstance(result, ConfigDict):
        result = _changes(result, get_config())
    if not isinstance(result, Mapping):
        raise ValueError(f"{file}: no get_config that returns a ConfigDict or a dict")
    return _given(result, str(file))


def _changes(config: ConfigDict, default: ConfigDict) -> dict[str, Any]:
    """What a ConfigDict says that the defaults do not."""
    changed: dict[str, Any] = {}
    for name, value in config.items():
        known = default.get(name)
        if isinstance(value, ConfigDict) and isinstance(known, ConfigDict):
            inner = _changes(value, known)
            changed |= {name: inner} if inner else {}
        elif name not in default or value != known:
            changed[name] = value
    return changed


def _given(value: Any, place: str) -> Given:
    if isinstance(value, ConfigDict | Mapping):
        return Given({str(name): _given(item, place) for name, item in value.items()}, place)
    if isinstance(value, list | tuple):
        return Given([_given(item, place) for item in value], place)
    return Given(os.fspath(value) if isinstance(value, os.PathLike) else value, place)


def _line(error: Exception, file: Path) -> str:
    """`file:line` of the deepest call in the file itself."""
    if isinstance(error, SyntaxError):
        return f"{file}:{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f"{file}:{lines[-1]}" if lines else str(file)


def _mistake(error: Exception) -> str:
    """What went wrong, in a line; ConfigDict, asked to take an unknown key, answers with all of itself."""
    text = error.msg if isinstance(error, SyntaxError) else str(error.args[0] if error.args else error)
    if unknown := re.search(r'Key "(\w+)" does not exist', text):
        guess = nearest(unknown[1], (path.rpartition(".")[2] for path, _ in leaves(SCHEMA)))
        return f"{unknown[1]}: unknown key" + (f"; did you mean {guess}?" if guess else "")
    return f"{type(error).__name__}: {text.partition(chr(10))[0]}"
