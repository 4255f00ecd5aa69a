"""`{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}`."""

from collections.abc import Mapping, Sequence
from typing import Any

from input_pipeline import fields
from input_pipeline.examples import Chat, RowError, show
from input_pipeline.formats.conversation import check_chat, parse_messages, parse_template_kwargs, parse_tools

_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}  # others keep their name


def matches(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("conversations"), Sequence) and not isinstance(row["conversations"], str)


def parse(row: Mapping[str, Any]) -> Chat:
    turns = row.get("conversations")
    if not isinstance(turns, Sequence) or not all(isinstance(turn, Mapping) for turn in turns):
        raise RowError(f"conversations must be a list of objects, not {show(turns)}")
    messages = parse_messages([_message(turn, f"conversations[{i}]") for i, turn in enumerate(turns)], "conversations")
    check_chat(messages, "conversations")
    if row.get("system") and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": fields.text(row["system"], "system")}, *messages)
    return Chat(
        messages=messages, tools=parse_tools(row.get("tools"), "tools"), template_kwargs=parse_template_kwargs(row)
    )


def _message(turn: Mapping[str, Any], path: str) -> dict[str, Any]:
    role, said = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if role == "function_call":
        return {"role": "assistant", "tool_calls": _calls(said, f"{path}.value")}
    rest = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
    return {"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": said, **rest}


def _calls(said: Any, path: str) -> list[dict[str, Any]]:
    """Calls written as JSON, `{"name": …, "arguments": …}` or a list of these."""
    calls = fields.from_json(fields.text(said, path), path)
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]
