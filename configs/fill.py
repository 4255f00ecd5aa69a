"""From what was given to every key of the schema: finds unknown names, wrong types and missing values in one pass."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from configs import verl
from configs.convert import convert
from configs.default import ELSEWHERE, SCHEMA
from configs.given import Given, as_given, shown
from configs.key import Items, Key, Same, Table, find, leaves
from configs.nearest import nearest, slips
from configs.yaml_text import written

FEW = 20  # names that still make a line


@dataclass
class Filled:
    """Every key's value, who set which, what other names asked for (path → target, value), notices, and problems."""

    values: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    other_names: dict[str, tuple[str, Any]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def problem(self, path: str, text: str, place: str | None = None) -> None:
        """Keeps one line about the key at `path`."""
        self.problems.append((path, f"{path}: {text}" + (f" ({place})" if place else "")))


def fill(given: Given) -> Filled:
    """The whole schema, filled with what was given and the defaults for the rest."""
    filled = Filled()
    filled.values = _section(SCHEMA, given, "", filled)
    _move_other_names(filled)
    _move_verls(filled)
    return filled


def _section(table: Table, given: Given, path: str, filled: Filled) -> dict[str, Any]:
    given = _mapping(given, path, filled)
    for name, item in given.value.items():
        if name not in table:
            filled.problem(_join(path, name), _unknown(table, path, name), item.place)
    values: dict[str, Any] = {}
    for name, entry in table.items():
        here, item = _join(path, name), given.value.get(name)
        if isinstance(entry, Same):
            if item is not None:
                _other_name(entry, item, here, filled)
        elif isinstance(entry, Items):
            values[name] = _items(entry.table, item, here, filled)
        elif isinstance(entry, Key):
            values[name] = _leaf(entry, item, here, given.place, filled)
        else:
            values[name] = _section(entry, item or Given({}, given.place), here, filled)
    return values


def _mapping(given: Given, path: str, filled: Filled) -> Given:
    if isinstance(given.value, dict):
        return given
    empty = given.value is None
    text = "empty; give it keys, or take the line out" if empty else f"got {shown(given)}; allowed: keys"
    filled.problem(path or "the configuration", text, given.place)
    return given._replace(value={})


def _items(table: Table, given: Given | None, path: str, filled: Filled) -> list[dict[str, Any]]:
    if given is None:
        return []
    if not isinstance(given.value, list):
        filled.problem(path, f"got {shown(given)}; allowed: a list of entries", given.place)
        return []
    filled.origin[path] = given.place
    return [_section(table, item, f"{path}[{number}]", filled) for number, item in enumerate(given.value)]


def _leaf(key: Key, given: Given | None, path: str, place: str, filled: Filled) -> Any:
    if given is not None:
        filled.origin[path] = ", ".join(dict.fromkeys(_places(given)))
        try:
            value = convert(key, given)
            if str(given.value).lower() in key.read_as:
                filled.notices.append(f"{path}: {given.value} is read as {value}")
            return value
        except ValueError as error:
            filled.problem(path, str(error), given.place)
    elif key.required:
        filled.problem(path, f"missing; add it, or give --{path}", place)
    return copy.deepcopy(key.default)


def _other_name(entry: Same, given: Given, path: str, filled: Filled) -> None:
    target = entry.at(path.split("."))
    try:
        key = find(SCHEMA, target.split("."))
        assert isinstance(key, Key)
        filled.other_names[path] = (target, convert(key, given))
        filled.origin[path] = given.place
    except ValueError as error:
        filled.problem(path, str(error), given.place)


def _move_other_names(filled: Filled) -> None:
    """Puts what another name asked for where its key stands; where that was set too, it wins, and a notice says so."""
    for path, (target, value) in filled.other_names.items():
        *sections, name = target.split(".")
        section = filled.values
        for word in sections:
            section = section[word]
        if target not in filled.origin:
            filled.origin[target] = f"{filled.origin.pop(path)} as {path}"
            section[name] = value
        elif section[name] != value:
            filled.notices.append(f"{path}: {written(value)} gives way to {target}: {written(section[name])}")


def _move_verls(filled: Filled) -> None:
    """Puts what verl's own settings say where a key here says it; they win over that key, and a notice says so."""
    training = filled.values["training"]
    if training["trainer_type"] != "VERL_GRPO":
        return
    for name, target, value in verl.moved(training["verl_config_overrides"]):
        path, place = f"{verl.PATH}.{name}", filled.origin[verl.PATH]
        *sections, last = target.split(".")
        section: Any = filled.values
        for word in sections:
            section = section[word]
        key = find(SCHEMA, target.split("."))
        if isinstance(key, Items):
            new = [
                _section(key.table, as_given(entry, place), f"{target}[{n}]", filled) for n, entry in enumerate(value)
            ]
        else:
            new = _leaf(key, as_given(value, place), path, place, filled)  # type: ignore[arg-type]
        if target in filled.origin and section[last] != new:
            filled.notices.append(f"{target} gives way to {path}")
        filled.origin[target] = f"{place} as {path}"
        section[last] = new


def _unknown(table: Table, path: str, name: str) -> str:
    """Did you mean: a slip of a neighbour's name, the same name in another section or program, or what is like it."""
    guess = nearest(name, table)
    elsewhere = next((other for other, _ in leaves(SCHEMA) if other.rpartition(".")[2] == name), ELSEWHERE.get(name))
    if elsewhere and not (guess and slips(name, guess) == 1):
        return f"unknown key; did you mean {elsewhere}?"
    if guess:
        return f"unknown key; did you mean {_join(path, guess)}?"
    return "unknown key" + (f"; known here: {', '.join(table)}" if len(table) <= FEW else ", and like none known here")


def _places(given: Given) -> list[str]:
    """Where the parts of a value stand, first to last."""
    if isinstance(given.value, Mapping) and given.value:
        return [place for item in given.value.values() for place in _places(item)]
    return [given.place]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
