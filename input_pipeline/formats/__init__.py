"""Row formats: each module says whether a row is of its kind, `matches(row)`, and what it means, `parse(row)`.

A new format is one new file, one line in `FORMATS`, and its name beside the trainers that train it. Detection asks the
formats of the trainer that runs, in the order they stand there.
"""

import functools
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
    "preference": "input_pipeline.formats.preference",  # {prompt, chosen, rejected}
    "kto": "input_pipeline.formats.kto",  # {prompt, completion, label}
    "verl": "input_pipeline.formats.verl",  # {data_source, prompt, reward_model}
    "prompt": "input_pipeline.formats.prompt",  # {prompt} and columns for reward functions
}
ALIASES = {"oumi": "conversation", "conversations": "conversation", "openai": "conversation"}  # other tools' names

_SFT = ("conversation", "sharegpt", "prompt_completion", "alpaca", "text")
TRAINED = {  # the formats that each training.trainer_type trains
    "TRL_SFT": _SFT,
    "HF": _SFT,
    "OUMI": _SFT,
    "TRL_DPO": ("preference",),
    "TRL_KTO": ("kto",),
    "TRL_GRPO": ("prompt",),
    "VERL_GRPO": ("verl",),
}
_ARE = {  # what rows of other formats are, and for whom
    "preference": ("preference pairs", "TRL_DPO"),
    "kto": ("answers with a label", "TRL_KTO"),
    "verl": ("prompts in verl's form", "VERL_GRPO"),
    "prompt": ("prompts without an answer", "TRL_GRPO"),
}
FIELDS = {
    "conversation": "{messages}, {conversation: {messages}}",
    "sharegpt": "{conversations}",
    "prompt_completion": "{prompt, completion}",
    "alpaca": "{instruction, output}",
    "text": "{text}",
    "preference": "{messages, chosen, rejected}, {prompt, chosen, rejected}",
    "kto": "{prompt, completion, label}",
    "verl": "{data_source, prompt, reward_model}",
    "prompt": "{prompt}",
}


def canonical(name: str) -> str:
    """The name of a format in `FORMATS`; a miss lists what exists."""
    name = ALIASES.get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"unknown row format {name!r}; known: {', '.join(FORMATS)}")
    return name


@functools.cache
def load(name: str) -> ModuleType:
    """The module of a format."""
    return importlib.import_module(FORMATS[canonical(name)])


def check_trained(name: str, trainer: str) -> None:
    """ValueError where a trainer does not train rows of a format."""
    if name not in TRAINED[trainer]:
        raise ValueError(_for_others(name, trainer))


def detect(row: Any, text_field: str = "text", *, trainer: str = "TRL_SFT") -> str:
    """The first format of the trainer's that a row is of; RowError where it is of none of them."""
    if not isinstance(row, Mapping):
        raise RowError(f"a row must be an object with named fields, not {type(row).__name__}: {show(row)}")
    trained = TRAINED[trainer]
    for name in trained:
        if load(name).matches(row):
            return name
    if text_field in row and "text" in trained:
        return "text"
    for name in FORMATS:
        if load(name).matches(row):
            raise RowError(_for_others(name, trainer))
    *known, last = [FIELDS[name] for name in trained]
    raise RowError(
        f"the row's format is not recognised: its fields are {sorted(map(str, row))}; known are"
        f" {', '.join(known)}{' and ' if known else ''}{last}. Name one in dataset_kwargs.format"
    )


def _for_others(name: str, trainer: str) -> str:
    what, other = _ARE.get(name, (f"of format {name}", "TRL_SFT"))
    return (
        f"rows are {what}: they are for training.trainer_type {other}; {trainer} trains"
        f" {', '.join(FIELDS[name] for name in TRAINED[trainer])}"
    )
