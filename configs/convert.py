"""How a written value becomes the value of a key: the one place that knows about types."""

import math
import re
from collections.abc import Callable
from typing import Any

from configs.given import Given, plain, shown
from configs.key import Key
from configs.nearest import nearest

TRUE = ("true", "yes", "on", "1")
FALSE = ("false", "no", "off", "0")
FUNCTION = re.compile(r".*\S:[A-Za-z_]\w*", re.DOTALL)


def convert(key: Key, given: Given) -> Any:
    """The value a key takes from what was written; ValueError "got …; allowed: …" if it takes none."""
    try:
        return _value(key, given)
    except (ValueError, OverflowError):
        near = nearest(str(given.value), (*key.choices, *key.read_as))
        guess = key.read_as.get(near or "", near)
        text = f"got {shown(given)}; allowed: {allowed(key)}" + (f"; did you mean {guess}?" if guess else "")
        raise ValueError(text) from None


def allowed(key: Key) -> str:
    """What a key takes, in words."""
    bounds = {"at least": key.low, "above": key.above, "at most": key.high, "below": key.below}
    limits = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
    parts = key.choices or (NAMES[key.kind] + (f" {limits}" if limits else ""), *key.words)
    parts = (*parts, *(["file.py:function"] if key.functions else []), *(["null"] if key.nullable else []))
    return ", ".join(parts)


def _value(key: Key, given: Given) -> Any:
    if given.value is None:
        return _require(key.nullable, None)
    if key.choices:
        return _word(key, given)
    if isinstance(given.value, str) and given.value.lower() in key.words:
        return given.value.lower()
    value = CONVERT[key.kind](given)
    return value if isinstance(value, bool | str | dict | list) else _require(_in_range(key, value), value)


def _require(fits: bool, value: Any) -> Any:
    if not fits:
        raise ValueError
    return value


def _word(key: Key, given: Given) -> str:
    """A word in the schema's spelling, whatever the case; an unquoted `no` is false to YAML."""
    text = "no" if given.value is False else str(given.value if given.text is None else given.text)
    if key.functions and FUNCTION.fullmatch(text):
        return text
    words = {word.lower(): word for word in key.choices} | {word.lower(): ours for word, ours in key.read_as.items()}
    return _require(text.lower() in words, words.get(text.lower()))


def _in_range(key: Key, value: float) -> bool:
    above = (key.low is None or value >= key.low) and (key.above is None or value > key.above)
    return above and (key.high is None or value <= key.high) and (key.below is None or value < key.below)


def _text(given: Given) -> str:
    """As it was spelled, so that a name like 007 or 1e3 stays one."""
    fits = isinstance(given.value, str | int | float) and not isinstance(given.value, bool)
    return _require(fits, str(given.value) if given.text is None else given.text)


def _whole(given: Given) -> int:
    return int(_require(isinstance(given.value, int | str) and not isinstance(given.value, bool), given.value))


def _number(given: Given) -> float:
    value = float(
        _require(isinstance(given.value, str | int | float) and not isinstance(given.value, bool), given.value)
    )
    return _require(math.isfinite(value), value)


def _switch(given: Given) -> bool:
    word = str(given.value).lower()
    return _require(isinstance(given.value, bool | int | str) and word in (*TRUE, *FALSE), word in TRUE)


def _mapping(given: Given) -> dict[str, Any]:
    return _require(isinstance(given.value, dict) and _is_plain(given), plain(given))


def _is_plain(given: Given) -> bool:
    """Whether YAML can say it: a Python file may hold anything."""
    if isinstance(given.value, dict):
        return all(map(_is_plain, given.value.values()))
    if isinstance(given.value, list):
        return all(map(_is_plain, given.value))
    return given.value is None or isinstance(given.value, str | bool | int | float)


def _words(given: Given) -> list[str]:
    return [_text(item) for item in _require(isinstance(given.value, list), given.value)]


CONVERT: dict[Any, Callable[[Given], Any]] = {
    str: _text,
    int: _whole,
    float: _number,
    bool: _switch,
    dict: _mapping,
    list: _words,
}
NAMES: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true, false",
    dict: "a mapping",
    list: "a list of words",
}
