"""Values as they were written, each with its place."""

from typing import Any, NamedTuple

from configs.secrets import redacted


class Given(NamedTuple):
    """A value as written: a scalar, or a dict or list of further `Given`; where it stands; and a scalar's spelling."""

    value: Any
    place: str
    text: str | None = None


def plain(given: Given) -> Any:
    """The value without its places."""
    if isinstance(given.value, dict):
        return {name: plain(item) for name, item in given.value.items()}
    if isinstance(given.value, list):
        return [plain(item) for item in given.value]
    return given.value


def as_given(value: Any, place: str = "") -> Given:
    """A plain value as if all of it had been written at one place."""
    if isinstance(value, dict):
        return Given({name: as_given(item, place) for name, item in value.items()}, place)
    return Given([as_given(item, place) for item in value] if isinstance(value, list) else value, place)


def shown(given: Given) -> str:
    """A value as an error shows it: short, and no secret in it."""
    if isinstance(given.value, dict):
        return "a mapping"
    if isinstance(given.value, list):
        return "a list"
    if given.value is None or isinstance(given.value, bool):
        return {None: "null", True: "true", False: "false"}[given.value]
    text = redacted(repr(given.value) if isinstance(given.value, str) or given.text is None else given.text)
    return text if len(text) <= 60 else text[:57] + "…"
