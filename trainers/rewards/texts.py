"""Rewards of an answer's form."""

import json
import re
from collections.abc import Sequence
from typing import Any

from trainers.rewards import text_of

_FENCED = re.compile(r"\A\s*```(?:json)?\n(.*)\n```\s*\Z", re.DOTALL)


def json_valid(completions: Sequence[Any], **_: Any) -> list[float]:
    """1 for an answer that is JSON, also between ```json and ```; else 0."""
    return [float(_is_json(text_of(completion))) for completion in completions]


def regex(completions: Sequence[Any], pattern: str, full: bool = False, **_: Any) -> list[float]:
    """1 for an answer in which `pattern` is found (`full`: which it matches from end to end); else 0."""
    compiled = re.compile(pattern)
    search = compiled.fullmatch if full else compiled.search
    return [float(search(text_of(completion)) is not None) for completion in completions]


def _is_json(text: str) -> bool:
    fenced = _FENCED.match(text)
    try:
        json.loads(fenced[1] if fenced else text, parse_constant=_refused)
    except (ValueError, RecursionError):
        return False
    return True


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is Python's, not JSON")
