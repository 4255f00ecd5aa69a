"""Rewards of how long an answer is."""

import math
import re
from collections.abc import Sequence
from typing import Any

from trainers.rewards import text_of


def soft_5tokens_completions(completions: Sequence[Any], **_: Any) -> list[float]:
    """The closer to five words the better: `soft`."""
    return [soft(text_of(completion), 5) for completion in completions]


def soft_10tokens_completions(completions: Sequence[Any], **_: Any) -> list[float]:
    """The closer to ten words the better: `soft`."""
    return [soft(text_of(completion), 10) for completion in completions]


def soft_20tokens_completions(completions: Sequence[Any], **_: Any) -> list[float]:
    """The closer to twenty words the better: `soft`."""
    return [soft(text_of(completion), 20) for completion in completions]


def sharp_5tokens_completions(completions: Sequence[Any], **_: Any) -> list[float]:
    """Less one for each word above or below five."""
    return [sharp(text_of(completion), 5) for completion in completions]


def sharp_10tokens_completions(completions: Sequence[Any], **_: Any) -> list[float]:
    """Less one for each word above or below ten."""
    return [sharp(text_of(completion), 10) for completion in completions]


def sharp_20tokens_completions(completions: Sequence[Any], **_: Any) -> list[float]:
    """Less one for each word above or below twenty."""
    return [sharp(text_of(completion), 20) for completion in completions]


def soft(text: str, wanted: int) -> float:
    """x e^(1 - x) of x = words / wanted: 1 at best, 0 far off, as Oumi has it."""
    x = words(text) / wanted
    return x * math.exp(1 - x)


def sharp(text: str, wanted: int) -> float:
    """-|words - wanted|, as Oumi has it."""
    return -float(abs(words(text) - wanted))


def words(text: str) -> int:
    """Pieces between spaces as Oumi counts them: an empty text has one, and a space at an end adds one."""
    return len(re.split(r"\s+", text))


def overlong(completion_ids: Sequence[Sequence[int]], max_length: int, cache_length: int, **_: Any) -> list[float]:
    """0 for answers of up to `max_length` - `cache_length` tokens, from there down to -1 at `max_length`, and -1 beyond
    (DAPO, arXiv:2503.14476, eq. 13).
    """
    if not 0 < cache_length <= max_length:
        raise ValueError(f"overlong: cache_length is {cache_length}; allowed: 1 to max_length, {max_length}")
    free = max_length - cache_length
    return [-min(1.0, max(0.0, (len(ids) - free) / cache_length)) for ids in completion_ids]
