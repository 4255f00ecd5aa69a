"""A reward of one's own, for the quickstart that learns from rewards: whole sentences in one paragraph."""

from collections.abc import Sequence
from typing import Any


def whole_sentences(completions: Sequence[Any], **_: Any) -> list[float]:
    """1 for an answer in one paragraph that ends where its last sentence does, else 0."""
    texts = [messages[-1]["content"].strip() for messages in completions]
    return [float(text.endswith((".", "!", "?")) and "\n" not in text) for text in texts]
