"""`{"text": "…"}`: plain text, trained as a whole."""

from collections.abc import Mapping
from typing import Any

from input_pipeline import fields
from input_pipeline.examples import RowError, Text


def matches(row: Mapping[str, Any]) -> bool:
    return "text" in row


def parse(row: Mapping[str, Any], *, field: str = "text") -> Text:
    text = fields.text(row.get(field), field)
    if not text:
        raise RowError(f"{field} is empty", "empty")
    return Text(text=text)
