"""The command line's `--a.b.c value`, laid over what a file gave."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from configs.given import Given, shown
from configs.yaml_text import parse

PLACE = "command line"
PATH = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+|\[\d+\])*$")
IGNORED = ("local-rank", "local_rank")  # what torch's launchers add


class Override(NamedTuple):
    """One option: the words of its path, list indices among them, and its value; None where it stood alone."""

    path: tuple[str, ...]
    given: Given | None


def read(arguments: Sequence[str]) -> tuple[list[Override], list[str]]:
    """The options of a command line, in order, and a line for each that cannot be read."""
    found, problems = [], []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            problems.append(f"{word}: options start with --, as in --training.max_steps 10 ({PLACE})")
            continue
        name, equals, text = word[2:].partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            equals, text = "=", rest.pop(0)
        if name.partition(".")[0] in IGNORED:
            continue
        if not PATH.match(name):
            problems.append(f"--{name}: no key; options look like --data.train.datasets[0].split test ({PLACE})")
            continue
        path = tuple(re.sub(r"\[(\d+)\]", r".\1", name).split("."))
        found.append(Override(path, _value(text) if equals else None))
    return found, problems


def lay_over(below: Given, override: Override, path: tuple[str, ...] | None = None) -> Given:
    """What was given with an option over it: mappings merge, all else is replaced. ValueError where it has no place."""
    path = override.path if path is None else path
    if not path:
        return _merge(below, Given(True, PLACE) if override.given is None else override.given)
    name, rest = path[0], path[1:]
    nothing = Given(None, PLACE)
    if isinstance(below.value, list) and name.isdigit():
        at, items = int(name), [*below.value]
        if at > len(items):
            raise ValueError(f"{name} is past the end of a list of {len(items)}")
        return below._replace(value=[*items[:at], lay_over(([*items, nothing])[at], override, rest), *items[at + 1 :]])
    if below.value is None and name.isdigit():
        return lay_over(Given([], PLACE), override, path)
    mapping = {} if below.value is None else below.value
    if not isinstance(mapping, dict):
        raise ValueError(f"{name} would stand in {shown(below)} ({below.place}), which has no keys")
    return Given({**mapping, name: lay_over(mapping.get(name, nothing), override, rest)}, below.place)


def _merge(below: Given, above: Given) -> Given:
    if isinstance(below.value, dict) and isinstance(above.value, dict):
        merged = {**below.value}
        for name, item in above.value.items():
            merged[name] = _merge(merged[name], item) if name in merged else item
        return above._replace(value=merged)
    return above


def _value(text: str) -> Given:
    """YAML where it is YAML, and else the text as it stands: a name may hold anything."""
    try:
        given = parse(text, PLACE)
    except ValueError:
        return Given(text, PLACE, text)
    nothing = given.value is None and given.text is None  # nothing, or only a comment
    if nothing or (isinstance(given.value, str) and text[:1] not in ("'", '"')):
        return Given(text, PLACE, text)
    return _placed(given)


def _placed(given: Given) -> Given:
    """The same, standing on the command line: it has no lines."""
    if isinstance(given.value, dict):
        return Given({name: _placed(item) for name, item in given.value.items()}, PLACE)
    if isinstance(given.value, list):
        return Given([_placed(item) for item in given.value], PLACE)
    return given._replace(place=PLACE)
