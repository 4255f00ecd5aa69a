"""What the schema is made of: keys, other names, lists, and the ways through a table of them."""

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, NamedTuple

USED = "used"
NO_EFFECT = "no effect here"
LATER = "not implemented yet"


@dataclass(frozen=True)
class Key:
    """One key: its default, its kind (a type, or a tuple of the words allowed), its meaning, and what setting it does.

    `read_as`: words of other programs, and what they mean here. `words`: allowed beside numbers. `later`: allowed words
    not implemented yet. `functions`: beside the words, a function of the user's, as `file.py:function` or
    `module:function`. `only`: trainer types the key belongs to. Null is a value where it is the default.
    """

    default: Any
    kind: type | tuple[str, ...]
    meaning: str
    _: KW_ONLY
    effect: str = USED
    read_as: Mapping[str, str] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    later: tuple[str, ...] = ()
    functions: bool = False
    only: tuple[str, ...] = ()
    null: bool = False
    required: bool = False
    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None

    @property
    def choices(self) -> tuple[str, ...]:
        """The words allowed, where the kind is words."""
        return self.kind if isinstance(self.kind, tuple) else ()

    @property
    def nullable(self) -> bool:
        """Whether null is a value of this key."""
        return self.null or (self.default is None and not self.required)


class Same(NamedTuple):
    """Another name of the key at `target`; the value moves there, and the target's own setting wins."""

    target: str
    meaning: str

    def at(self, path: Sequence[str]) -> str:
        """The target of the name that stands at `path`."""
        return self.target.replace("<split>", path[1]) if "<split>" in self.target else self.target


class Items(NamedTuple):
    """A list of sections of one table."""

    table: "Table"


Table = Mapping[str, Any]  # name → Key, Same, Items, or the Table of a section

no_effect = functools.partial(Key, effect=NO_EFFECT)
later = functools.partial(Key, effect=LATER)


def belongs_to(trainers: tuple[str, ...], table: Table) -> Table:
    """The same table, whose keys matter to these trainer types only."""
    return _each(table, lambda key: replace(key, only=trainers))


def without_effect(table: Table) -> Table:
    """The same table, whose keys are accepted and do nothing."""
    return _each(table, lambda key: replace(key, effect=NO_EFFECT, later=()))


def _each(table: Table, change) -> Table:
    def changed(entry):
        if isinstance(entry, Key):
            return change(entry)
        if isinstance(entry, Items):
            return Items(_each(entry.table, change))
        return _each(entry, change) if isinstance(entry, Mapping) else entry

    return {name: changed(entry) for name, entry in table.items()}


def leaves(table: Table, path: str = "") -> Iterator[tuple[str, Key | Same]]:
    """Every key of a table with its dotted path, in order; entries of a list stand as `datasets[]`."""
    for name, entry in table.items():
        here = f"{path}.{name}" if path else name
        if isinstance(entry, Items):
            yield from leaves(entry.table, here + "[]")
        elif isinstance(entry, Key | Same):
            yield here, entry
        else:
            yield from leaves(entry, here)


def settings(table: Table, values: Any, path: str = "") -> Iterator[tuple[str, Key, Any]]:
    """Every key with its path and its value in `values`, a mapping of the table's shape; lists are entered."""
    for name, entry in table.items():
        here = f"{path}.{name}" if path else name
        if isinstance(entry, Key):
            yield here, entry, values[name]
        elif isinstance(entry, Items):
            for number, item in enumerate(values[name]):
                yield from settings(entry.table, item, f"{here}[{number}]")
        elif not isinstance(entry, Same):
            yield from settings(entry, values[name], here)


def find(table: Table, path: Sequence[str]) -> "Key | Items | Table | None":
    """What stands at a path (a list's index is one word of it), other names followed; None if nothing does."""
    entry: Any = table
    for name in path:
        if isinstance(entry, Items) and name.isdigit():
            entry = entry.table
        else:
            entry = entry.get(name) if isinstance(entry, Mapping) else None
        if isinstance(entry, Same):
            return find(table, entry.at(path).split("."))
    return entry


def defaults(table: Table) -> dict[str, Any]:
    """The defaults of a table, nested as it is; a list of sections is empty."""
    values: dict[str, Any] = {}
    for name, entry in table.items():
        if isinstance(entry, Key):
            values[name] = copy.deepcopy(entry.default)
        elif not isinstance(entry, Same):
            values[name] = [] if isinstance(entry, Items) else defaults(entry)
    return values
