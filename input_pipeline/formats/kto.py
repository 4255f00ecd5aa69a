"""`{"prompt": …, "completion": …, "label": true}`: an answer that is wanted (true, or 1) or not, as KTO learns from."""

from collections.abc import Mapping
from typing import Any

from input_pipeline.examples import Feedback, RowError, show
from input_pipeline.formats.conversation import (
    as_messages,
    check_roles,
    check_side,
    parse_side,
    parse_template_kwargs,
    parse_tools,
)


def matches(row: Mapping[str, Any]) -> bool:
    return "prompt" in row and "completion" in row and _is_label(row.get("label"))


def parse(row: Mapping[str, Any]) -> Feedback:
    label = row.get("label")
    if not _is_label(label):
        raise RowError(f"label must be true or false (or 1 or 0), not {show(label)}")
    prompt, completion = parse_side(row.get("prompt"), "prompt"), parse_side(row.get("completion"), "completion")
    if not isinstance(prompt, str) or not isinstance(completion, str):
        prompt, completion = as_messages(prompt, "user"), as_messages(completion, "assistant")
        check_roles((*prompt, *completion), "prompt and completion")
    check_side(prompt, "prompt")
    check_side(completion, "completion")
    return Feedback(
        prompt=prompt,
        completion=completion,
        label=bool(label),
        tools=parse_tools(row.get("tools"), "tools"),
        template_kwargs=parse_template_kwargs(row),
    )


def _is_label(label: Any) -> bool:
    return isinstance(label, bool | int | float) and label in (0, 1)
