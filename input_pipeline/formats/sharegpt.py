"""`{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}`."""

from collections.abc import Mapping, Sequence
from typing import Any

from input_pipeline.examples import Chat, RowError, show
from input_pipeline.formats.conversation import parse_messages, parse_tools

_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}  # others keep their name


def matches(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("conversations"), Sequence) and not isinstance(row["conversations"], str)


def parse(row: Mapping[str, Any]) -> Chat:
    turns = row.get("conversations")
    if not isinstance(turns, Sequence) or not all(isinstance(turn, Mapping) for turn in turns):
        raise RowError(f"conversations must be a list of objects, not {show(turns)}")
    messages = [_message(turn) for turn in turns]
    if isinstance(system := row.get("system"), str) and system and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": system})
    return Chat(messages=parse_messages(messages, "conversations"), tools=parse_tools(row.get("tools"), "tools"))


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    role = turn.get("from", turn.get("role"))
    rest = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
    return {"role": _ROLES.get(str(role), role), "content": turn.get("value", turn.get("content")), **rest}
