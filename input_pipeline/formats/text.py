"""`{"text": "…"}`: plain text, trained as a whole."""

from collections.abc import Mapping
from typing import Any

from input_pipeline.examples import RowError, Text, show


def matches(row: Mapping[str, Any]) -> bool:
    return "text" in row


def parse(row: Mapping[str, Any], *, field: str = "text") -> Text:
    if not isinstance(row.get(field), str):
        raise RowError(f"{field} must be a string, not {show(row.get(field))}")
    return Text(text=row[field])
