"""`{"prompt": "…", "completion": "…"}`, both strings or both lists of messages."""

from collections.abc import Mapping
from typing import Any

from input_pipeline import fields
from input_pipeline.examples import Chat, Completion, RowError, show
from input_pipeline.formats.conversation import (
    check_chat,
    check_side,
    parse_messages,
    parse_template_kwargs,
    parse_tools,
)


def matches(row: Mapping[str, Any]) -> bool:
    return "prompt" in row and "completion" in row


def parse(row: Mapping[str, Any]) -> Chat | Completion:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        check_side(completion, "completion")
        return Completion(prompt=fields.text(prompt, "prompt"), completion=fields.text(completion, "completion"))
    if isinstance(prompt, str) or isinstance(completion, str) or prompt is None or completion is None:
        raise RowError(
            "prompt and completion must be two strings or two lists of messages,"
            f" not {show(prompt, 40)} and {show(completion, 40)}"
        )
    messages = parse_messages(prompt, "prompt")
    answer = parse_messages(completion, "completion")
    check_chat((*messages, *answer), "prompt and completion")
    return Chat(
        messages=messages + answer,
        tools=parse_tools(row.get("tools"), "tools"),
        prompt_messages=len(messages),
        template_kwargs=parse_template_kwargs(row),
    )
