"""`{"text": "…"}`: plain text, trained as a whole."""

from collections.abc import Mapping
from typing import Any

from input_pipeline import fields
from input_pipeline.examples import RowError, Text


def matches(row: Mapping[str, Any]) -> bool:
    return "text" in row


def parse(row: Mapping[str, Any], *, field: str = "text") -> Text:
    if field not in row:
        known = sorted(map(str, row))
        raise RowError(f"has no field {field!r}; its fields are {known}. Name the text's in dataset_kwargs.text_col")
    text = fields.text(row[field], field)
    if not text:
        raise RowError(f"{field} is empty", "empty")
    return Text(text=text)
