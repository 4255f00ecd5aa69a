"""A prompt with two answers, of which the first is preferred.

`{"messages": […], "chosen": {"messages": […]}, "rejected": {"messages": […]}}`, or `{"prompt": …, "chosen": …,
"rejected": …}` with strings or lists of messages. Without a prompt, chosen and rejected are whole conversations, and
what both begin with is the prompt; so it is too where the prompt is a string and the answers open with a turn of the
user's (as TRL reads them).
"""

from collections.abc import Mapping
from typing import Any

from input_pipeline.examples import Preference, RowError, Side, show
from input_pipeline.formats.conversation import (
    as_messages,
    check_roles,
    check_side,
    parse_side,
    parse_template_kwargs,
    parse_tools,
)


def matches(row: Mapping[str, Any]) -> bool:
    return row.get("chosen") is not None and row.get("rejected") is not None


def parse(row: Mapping[str, Any]) -> Preference:
    chosen, rejected = parse_side(row.get("chosen"), "chosen"), parse_side(row.get("rejected"), "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError(
            "chosen and rejected must be two strings or two lists of messages,"
            f" not {show(row['chosen'], 40)} and {show(row['rejected'], 40)}"
        )
    if chosen == rejected:
        raise RowError(f"chosen and rejected are the same: {show(row['chosen'])}", "empty")
    given = next((name for name in ("prompt", "messages") if row.get(name) is not None), None)
    prompt = parse_side(row[given], given) if given else None
    prompt, chosen, rejected = _divided(prompt, chosen, rejected)
    check_side(prompt, "prompt")
    _check_answer(prompt, chosen, "chosen")
    _check_answer(prompt, rejected, "rejected")
    return Preference(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        tools=parse_tools(_tools(row), "tools"),
        template_kwargs=parse_template_kwargs(row),
    )


def _tools(row: Mapping[str, Any]) -> Any:
    places = (row, row["chosen"])
    return next((place["tools"] for place in places if isinstance(place, Mapping) and place.get("tools")), None)


def _divided(prompt: Side | None, chosen: Side, rejected: Side) -> tuple[Side, Side, Side]:
    """Prompt and answers, all strings or all messages, with nothing of the prompt in the answers."""
    if isinstance(chosen, str) and isinstance(rejected, str) and (prompt is None or isinstance(prompt, str)):
        return (prompt, chosen, rejected) if prompt is not None else _divided_text(chosen, rejected)
    first, second = as_messages(chosen, "assistant"), as_messages(rejected, "assistant")
    if prompt is None or (isinstance(prompt, str) and first[0]["role"] in ("system", "user")):
        cut = _shared(first, second)
        if not cut:
            raise RowError("there is no prompt, and chosen and rejected have no first message in common", "empty")
        return first[:cut], first[cut:], second[cut:]
    before = as_messages(prompt, "user")
    cut = len(before) if first[: len(before)] == second[: len(before)] == before else 0
    return before, first[cut:], second[cut:]


def _divided_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Two texts cut where they part, or at the space before that, which goes with the answers as in TRL."""
    cut = _shared(chosen, rejected)
    if cut and chosen[cut - 1] == " ":
        cut -= 1
    if not cut:
        raise RowError("there is no prompt, and chosen and rejected do not begin alike", "empty")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _shared(a: Side, b: Side) -> int:
    """How many characters or messages two sides begin with alike."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _check_answer(prompt: Side, answer: Side, name: str) -> None:
    check_side(answer, name)
    if isinstance(answer, str):
        return
    if not any(message["role"] == "assistant" for message in answer):
        raise RowError(f"{name} has no assistant turn after the prompt: {show(answer)}", "roles")
    check_roles((*as_messages(prompt, "user"), *answer), f"prompt and {name}")
