"""Row formats: each module says whether a row is of its kind, `matches(row)`, and what it means, `parse(row)`.

A new format is one new file and one line in `FORMATS`. Detection asks the formats in this order.
"""

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from input_pipeline.examples import RowError, show

FORMATS = {
    "conversation": "input_pipeline.formats.conversation",  # {messages: [{role, content}]}
    "sharegpt": "input_pipeline.formats.sharegpt",  # {conversations: [{from, value}]}
    "prompt_completion": "input_pipeline.formats.prompt_completion",  # {prompt, completion}
    "alpaca": "input_pipeline.formats.alpaca",  # {instruction, input, output}
    "text": "input_pipeline.formats.text",  # {text}
}
ALIASES = {"oumi": "conversation", "conversations": "conversation", "openai": "conversation"}  # other tools' names


def canonical(name: str) -> str:
    """The name of a format in `FORMATS`; a miss lists what exists."""
    name = ALIASES.get(name, name)
    if name not in FORMATS:
        raise ValueError(f"unknown row format {name!r}; known: {', '.join(FORMATS)}")
    return name


def load(name: str) -> ModuleType:
    """The module of a format."""
    return importlib.import_module(FORMATS[canonical(name)])


def detect(row: Any, text_field: str = "text") -> str:
    """The name of the first format that a row is of; RowError where it is of none."""
    if not isinstance(row, Mapping):
        raise RowError(f"a row must be an object with named fields, not {type(row).__name__}: {show(row)}")
    for name in FORMATS:
        if load(name).matches(row):
            return name
    if text_field in row:
        return "text"
    raise RowError(
        f"the row's format is not recognised: its fields are {sorted(map(str, row))}; known are {{messages}},"
        " {conversation: {messages}}, {conversations}, {prompt, completion}, {instruction, output} and {text}."
        " Name one in dataset_kwargs.format"
    )
