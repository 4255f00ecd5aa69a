"""A function of the user's that a configuration names: `file.py:function` or `module:function`."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def named_function(name: str, *, key: str) -> Callable[..., Any]:
    """The function; ValueError names `key` of the configuration where there is no such file, module or function.

    The file's code runs, as that of any program which is imported; what it raises comes through.
    """
    place, _, attribute = name.rpartition(":")
    module = _of_file(Path(place).expanduser(), key) if place.endswith(".py") else _of_name(place, key)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"{key} {name!r}: {place} has no function {attribute!r}")
    return function


def _of_file(path: Path, key: str) -> ModuleType:
    if not path.exists():
        raise ValueError(f"{key} names the file {str(path)!r}, which does not exist (looked in {Path.cwd()})")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickle look a module up by its name
    spec.loader.exec_module(module)
    return module


def _of_name(name: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there; one that it imports is not
        raise ValueError(f"{key} names the module {name!r}, which is not installed; a file ends in .py") from None
