"""Rewards of one's own, for the quickstarts that learn from them: whole sentences in one paragraph; the right digit."""

from collections.abc import Sequence
from typing import Any


def whole_sentences(completions: Sequence[Any], **_: Any) -> list[float]:
    """1 for an answer in one paragraph that ends where its last sentence does, else 0."""
    texts = [messages[-1]["content"].strip() for messages in completions]
    return [float(text.endswith((".", "!", "?")) and "\n" not in text) for text in texts]


def right_digit(completions: Sequence[Any], digit: Sequence[str], **_: Any) -> list[float]:
    """1 for an answer that is the row's digit and nothing else, else 0."""
    return [float(messages[-1]["content"].strip() == right) for messages, right in zip(completions, digit, strict=True)]
