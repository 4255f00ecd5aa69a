"""From a file and a command line to a configuration, or to every problem there is with it, each in one line.

    loaded = load("sft.yaml", ["--training.max_steps", "10"])
    loaded.config.training.max_steps        # 10
    loaded.origin["training.max_steps"]     # "command line"

`configs.default` has the keys, `configs.derived` what several of them decide together.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import overrides as options
from configs import rules
from configs.default import SCHEMA, config_dict
from configs.fill import Filled, fill
from configs.given import Given
from configs.key import USED, Items, Key, Same, Table, find, settings
from configs.secrets import without_secrets
from configs.sources import read
from configs.yaml_text import write, written


class ConfigError(ValueError):
    """A configuration that cannot run; `problems` holds a line for each reason."""

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(_printable(line) for line in problems)
        super().__init__("\n".join(self.problems))


class Loaded(NamedTuple):
    """A locked configuration, who set each key that was set (`FILE:LINE`, `command line`), and lines for the log."""

    config: ConfigDict
    origin: dict[str, str]
    notices: tuple[str, ...]


class Row(NamedTuple):
    """A key of the effective configuration: its value as YAML, who set it (or "default"), and its meaning."""

    path: str
    value: str
    origin: str
    meaning: str


def load(source: str, overrides: Sequence[str] = ()) -> Loaded:
    """The configuration of a YAML file, or of `get_config` in `file.py` or `file.py:argument`, with options over it.

    `overrides` are the words of a command line, `--a.b.c value` or `--a.b[0].c=value`, the values in YAML. ConfigError
    lists every problem there is.
    """
    try:
        given = read(source)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    given, problems = _with_options(given, overrides)
    filled = fill(given)
    config = config_dict(filled.values)
    problems += _judge(config, filled)
    if problems:
        raise ConfigError(problems)
    return Loaded(config, filled.origin, tuple(filled.notices + rules.remarks(config, filled.origin)))


def dump(config: ConfigDict) -> str:
    """The configuration as YAML that loads to the same: what acts, and what was set. Credentials become ***."""
    return write(without_secrets(_plain(SCHEMA, config, _tells)))


def plain(config: ConfigDict) -> dict[str, Any]:
    """Every key, as dicts, lists and scalars; credentials become ***. For checkpoints, trackers and comparisons."""
    return without_secrets(_plain(SCHEMA, config, lambda key, value: True))


def explain(loaded: Loaded) -> tuple[Row, ...]:
    """The effective configuration, a row for each key that acts or was set, in the order of the schema."""
    return tuple(
        Row(path, written(value), loaded.origin.get(path, "default"), key.meaning)
        for path, key, value in settings(SCHEMA, loaded.config)
        if path in loaded.origin or _tells(key, value)
    )


def _with_options(given: Given, words: Sequence[str]) -> tuple[Given, list[str]]:
    found, problems = options.read(words)
    for option in found:
        path = re.sub(r"\.(\d+)", r"[\1]", ".".join(option.path))
        key = find(SCHEMA, option.path)
        if option.given is None and isinstance(key, Key) and key.kind is not bool:
            problems.append(f"{path}: no value given ({options.PLACE})")
            continue
        try:
            given = options.lay_over(given, option)
        except ValueError as error:
            problems.append(f"{path}: {error} ({options.PLACE})")
    return given, problems


def _judge(config: ConfigDict, filled: Filled) -> list[str]:
    later = rules.unimplemented(config)
    coming = any(path == "training.trainer_type" for path, _ in later)  # a method's trainer_kwargs come with it
    told = [line for line in filled.problems if not (coming and line[0].startswith("training.trainer_kwargs."))]
    found = rules.problems(config, wrong={path for path, _ in told})
    lines = [text for _, text in told]
    lines += [_placed(f"not implemented yet: {path}: {text}", path, filled) for path, text in later]
    return lines + [_placed(f"{path}: {text}", path, filled) for path, text in found]


def _printable(line: str) -> str:
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)


def _placed(line: str, path: str, filled: Filled) -> str:
    return f"{line} ({filled.origin[path]})" if path in filled.origin else line


def _tells(key: Key, value: Any) -> bool:
    return value != key.default or (key.effect == USED and not key.only)


def _plain(table: Table, values: Any, tells: Callable[[Key, Any], bool]) -> dict[str, Any]:
    """The keys that tell something, in the schema's order; sections with none are left out."""
    told: dict[str, Any] = {}
    for name, entry in table.items():
        if isinstance(entry, Key):
            if tells(entry, values[name]):
                told[name] = values[name]
        elif isinstance(entry, Items):
            told[name] = [_plain(entry.table, item, tells) for item in values[name]]
        elif not isinstance(entry, Same):
            told[name] = _plain(entry, values[name], tells)
    return {name: value for name, value in told.items() if value != {} or isinstance(table[name], Key)}
