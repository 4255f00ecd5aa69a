"""`{"prompt": …, **columns}`: a string or messages to be answered; reward functions are given the other columns."""

from collections.abc import Mapping
from typing import Any

from input_pipeline.examples import Prompt
from input_pipeline.formats.conversation import check_roles, check_side, parse_side, parse_template_kwargs, parse_tools

_READ = ("prompt", "tools", "chat_template_kwargs")  # the rest are columns


def matches(row: Mapping[str, Any]) -> bool:
    return row.get("prompt") is not None


def parse(row: Mapping[str, Any]) -> Prompt:
    prompt = parse_side(row.get("prompt"), "prompt")
    check_side(prompt, "prompt")
    if not isinstance(prompt, str):
        check_roles(prompt, "prompt")
    return Prompt(
        prompt=prompt,
        columns={name: value for name, value in row.items() if name not in _READ},
        tools=parse_tools(row.get("tools"), "tools"),
        template_kwargs=parse_template_kwargs(row),
    )
