"""`{"messages": [{"role": "user", "content": "…"}, …], "tools": […]}`, also inside `{"conversation": {…}}`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from input_pipeline.examples import Chat, Message, RowError, show

ROLES = ("system", "developer", "user", "assistant", "tool")
_KEPT = ("tool_call_id", "name", "reasoning_content", "thinking", "reasoning")  # fields that chat templates read


def matches(row: Mapping[str, Any]) -> bool:
    inner = row.get("conversation")
    return isinstance(row.get("messages"), Sequence) or (isinstance(inner, Mapping) and "messages" in inner)


def parse(row: Mapping[str, Any]) -> Chat:
    path, inner = ("", row) if "messages" in row else ("conversation.", row.get("conversation"))
    if not isinstance(inner, Mapping) or "messages" not in inner:
        raise RowError(f"no messages: the row's fields are {sorted(map(str, row))}")
    return Chat(
        messages=parse_messages(inner["messages"], f"{path}messages"),
        tools=parse_tools(inner.get("tools") or row.get("tools"), f"{path}tools"),
        template_kwargs=parse_template_kwargs(row),
    )


def parse_template_kwargs(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The row's own variables for the chat template, such as `enable_thinking`."""
    kwargs = row.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise RowError(f"chat_template_kwargs must be an object, not {show(kwargs)}")
    return kwargs or None


def parse_messages(messages: Any, path: str) -> tuple[Message, ...]:
    """Check and normalise a list of messages; `path` names it in errors."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise RowError(f"{path} must be a list of messages, not {show(messages)}")
    if not messages:
        raise RowError(f"{path} is empty")
    return tuple(parse_message(message, f"{path}[{i}]") for i, message in enumerate(messages))


def parse_message(message: Any, path: str) -> Message:
    if not isinstance(message, Mapping):
        raise RowError(f"{path} must be an object with role and content, not {show(message)}")
    role = message.get("role")
    if role not in ROLES:
        raise RowError(f"{path}.role is {show(role)}; allowed: {', '.join(ROLES)}")
    parsed = {"role": role}
    calls = parse_tool_calls(message.get("tool_calls"), f"{path}.tool_calls")
    content = message.get("content")
    if content is not None:
        parsed["content"] = parse_content(content, f"{path}.content")
    elif not calls:
        raise RowError(f"{path}.content is missing; a message needs content or tool_calls")
    if calls:
        parsed["tool_calls"] = calls
    return parsed | {key: message[key] for key in _KEPT if message.get(key) is not None}


def parse_content(content: Any, path: str) -> str:
    """A string, or a list of text items, which are joined as they stand."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise RowError(f"{path} must be a string or a list of items, not {show(content)}")
    return "".join(_text_of(item, f"{path}[{i}]") for i, item in enumerate(content))


def _text_of(item: Any, path: str) -> str:
    if isinstance(item, str):
        return item
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind is None:
        raise RowError(f"{path} must be an object with type and content, not {show(item)}")
    if str(kind).startswith(("image", "video", "audio")):
        raise RowError(f"{path}.type is {kind!r}: not implemented yet: training on anything but text")
    text = item.get("content") if item.get("content") is not None else item.get("text")
    if kind != "text" or not isinstance(text, str):
        raise RowError(f'{path} must be {{"type": "text", "content": "…"}}, not {show(item)}')
    return text


def parse_tools(tools: Any, path: str) -> tuple[Mapping[str, Any], ...] | None:
    """Tool definitions: a list of objects, or the same as a JSON string."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise RowError(f"{path} is a string but not JSON ({error}): {show(tools)}") from None
    if not tools:
        return None
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError(f"{path} must be a list of tool definitions, not {show(tools)}")
    return tuple(tools)


def parse_tool_calls(calls: Any, path: str) -> list[dict[str, Any]]:
    """Tool calls with `function.arguments` as an object where it can be read as one (JSON strings are)."""
    if not calls:
        return []
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise RowError(f"{path} must be a list, not {show(calls)}")
    return [_parse_tool_call(call, f"{path}[{i}]") for i, call in enumerate(calls)]


def _parse_tool_call(call: Any, path: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(
            f'{path} must be {{"type": "function", "function": {{"name": …, "arguments": …}}}}, not {show(call)}'
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError as error:
            raise RowError(f"{path}.function.arguments is not JSON ({error}): {show(arguments)}") from None
    parsed = {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
    return parsed | ({"id": call["id"]} if call.get("id") is not None else {})
