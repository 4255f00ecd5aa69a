"""The reward of counting letters."""

import re
from collections.abc import Sequence
from typing import Any

from trainers.rewards import text_of

_BOXED = re.compile(r"\\boxed\{([-+]?[0-9]+)\}")
_MOST_DIGITS = 18
WRONG_FORM = -3.0


def count_letters(completions: Sequence[Any], letter_count: Sequence[int], **_: Any) -> list[float]:
    """1 / (|n - letter_count| + 0.5) - 2 of the number n in an answer's one `\\boxed{n}`: 0 at best, -2 far off; -3
    without one, or with several (Oumi's).
    """
    return [
        _score(text_of(completion), int(count)) for completion, count in zip(completions, letter_count, strict=True)
    ]


def _score(text: str, count: int) -> float:
    found = _BOXED.findall(text)
    if len(found) != 1:
        return WRONG_FORM
    if len(found[0]) > _MOST_DIGITS:  # beyond any count, and slow to read
        return -2.0
    return 1 / (abs(int(found[0]) - count) + 0.5) - 2
