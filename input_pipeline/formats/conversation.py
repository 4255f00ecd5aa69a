"""`{"messages": [{"role": "user", "content": "…"}, …], "tools": […]}`, also inside `{"conversation": {…}}`.

What is said of messages here holds for all formats that have them. The order of roles is the chat template's to judge,
as in TRL and Oumi; refused is only what no template can make sense of.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from input_pipeline import fields
from input_pipeline.content import parse_content
from input_pipeline.examples import Chat, Message, RowError, Side, show

ROLES = ("system", "developer", "user", "assistant", "tool")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_KEPT = ("tool_call_id", "name", *_REASONING)  # fields that chat templates read
_MAY_BE_NULL = ("default", "const")  # in a tool's JSON schema; nothing else in one can be null
_NOT_VARIABLES = ("messages", "tools", "prompt", "conversation", "chat_template", "add_generation_prompt", "tokenize")


def matches(row: Mapping[str, Any]) -> bool:
    inner = row.get("conversation")
    messages = inner.get("messages") if isinstance(inner, Mapping) else row.get("messages")
    return isinstance(messages, Sequence) and not _is_prompt_of_a_pair(row, messages)


def parse(row: Mapping[str, Any]) -> Chat:
    inner, path = row, ""
    if row.get("messages") is None and isinstance(row.get("conversation"), Mapping):
        inner, path = row["conversation"], "conversation."
    if inner.get("messages") is None:
        raise RowError(f"no messages: the row's fields are {sorted(map(str, row))}")
    messages = parse_messages(inner["messages"], f"{path}messages")
    check_chat(messages, f"{path}messages")
    return Chat(
        messages=messages,
        tools=parse_tools(inner.get("tools") or row.get("tools"), f"{path}tools"),
        template_kwargs=parse_template_kwargs(row),
    )


def _is_prompt_of_a_pair(row: Mapping[str, Any], messages: Sequence[Any]) -> bool:
    """Whether what the messages lead to stands in `chosen` and `rejected`."""
    roles = [message.get("role") for message in messages if isinstance(message, Mapping)]
    return "chosen" in row and "rejected" in row and "assistant" not in roles[-1:]


def parse_template_kwargs(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The row's own variables for the chat template, such as `enable_thinking`."""
    kwargs = row.get("chat_template_kwargs")
    if not kwargs:
        return None
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        raise RowError(f"chat_template_kwargs must be an object, not {show(kwargs)}")
    if wrong := [name for name in _NOT_VARIABLES if name in kwargs]:
        raise RowError(f"chat_template_kwargs.{wrong[0]} is no variable of a row's own")
    return kwargs


def parse_side(value: Any, path: str) -> Side:
    """A prompt or an answer: a string, a list of messages, `{"messages": […]}`, or one message."""
    if isinstance(value, str):
        return fields.text(value, path)
    if isinstance(value, Mapping):
        return parse_messages(value["messages"], f"{path}.messages") if "messages" in value else _alone(value, path)
    if isinstance(value, Sequence):
        return parse_messages(value, path)
    raise RowError(f"{path} must be a string or a list of messages, not {show(value)}")


def as_messages(side: Side, role: str) -> tuple[Message, ...]:
    """Messages as they are; of a string, the message of a role that says it."""
    return ({"role": role, "content": side},) if isinstance(side, str) else side


def check_side(side: Side, path: str) -> None:
    """RowError where nothing stands in a prompt or an answer."""
    if not side or not (isinstance(side, str) or any(map(says, side))):
        raise RowError(f"{path} is empty", "empty")


def says(message: Message) -> bool:
    """Whether a message holds anything."""
    return any(message.get(name) for name in ("content", "tool_calls", *_REASONING))


def check_chat(messages: Sequence[Message], path: str) -> None:
    """RowError where roles make no sense, or where nobody says anything (of an assistant: where it never does)."""
    check_roles(messages, path)
    asked = [message for message in messages if message["role"] == "assistant"] or messages
    if not any(map(says, asked)):
        raise RowError(f"{path}: {'nobody' if asked is messages else 'the assistant never'} says anything", "empty")


def check_roles(messages: Sequence[Message], path: str) -> None:
    """RowError for calls of anyone but the assistant, and for results of tools before it has said anything."""
    answered = False
    for i, message in enumerate(messages):
        answered |= message["role"] == "assistant"
        if message["role"] == "tool" and not answered:
            raise RowError(f"{path}[{i}] is the result of a tool, and no assistant turn stands before it", "roles")
        if message.get("tool_calls") and message["role"] != "assistant":
            raise RowError(f"{path}[{i}].tool_calls: only the assistant calls tools, not {message['role']}", "roles")


def parse_messages(messages: Any, path: str) -> tuple[Message, ...]:
    """Check and normalise a list of messages; `path` names it in errors."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise RowError(f"{path} must be a list of messages, not {show(messages)}")
    if not messages:
        raise RowError(f"{path} is empty", "empty")
    filled = any(isinstance(message, Mapping) and message.get("tool_calls", ()) is None for message in messages)
    return tuple(parse_message(message, f"{path}[{i}]", filled=filled) for i, message in enumerate(messages))


def parse_message(message: Any, path: str, *, filled: bool = False) -> Message:
    """One message; with `filled`, what is null in the arguments of calls is arrow's way to say that it is not there."""
    if not isinstance(message, Mapping):
        raise RowError(f"{path} must be an object with role and content, not {show(message)}")
    role = message.get("role")
    if role not in ROLES:
        raise RowError(f"{path}.role is {show(role)}; allowed: {', '.join(ROLES)}", "roles")
    parsed = {"role": role}
    calls = parse_tool_calls(message.get("tool_calls"), f"{path}.tool_calls", filled=filled)
    content = message.get("content")
    if content is not None:
        parsed["content"] = parse_content(content, f"{path}.content")
    elif not calls:
        raise RowError(f"{path}.content is missing; a message needs content or tool_calls", "empty")
    if calls:
        parsed["tool_calls"] = calls
    return parsed | {key: fields.text(message[key], f"{path}.{key}") for key in _KEPT if message.get(key) is not None}


def _alone(message: Mapping[str, Any], path: str) -> tuple[Message, ...]:
    return (parse_message(message, path),)


def parse_tools(tools: Any, path: str) -> tuple[Mapping[str, Any], ...] | None:
    """Tool definitions: a list of objects, or the same as a JSON string."""
    if isinstance(tools, str):
        tools = fields.from_json(tools, path) if tools else None
    if not tools:
        return None
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError(f"{path} must be a list of tool definitions, not {show(tools)}")
    return tuple(fields.without_nulls(tools, keep=_MAY_BE_NULL))


def parse_tool_calls(calls: Any, path: str, *, filled: bool = False) -> list[dict[str, Any]]:
    """Tool calls with `function.arguments` as an object where it can be read as one (JSON strings are)."""
    if not calls:
        return []
    if not isinstance(calls, Sequence) or isinstance(calls, str | bytes):
        raise RowError(f"{path} must be a list, not {show(calls)}")
    return [_parse_tool_call(call, f"{path}[{i}]", filled) for i, call in enumerate(calls)]


def _parse_tool_call(call: Any, path: str, filled: bool) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(
            f'{path} must be {{"type": "function", "function": {{"name": …, "arguments": …}}}}, not {show(call)}'
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = fields.from_json(arguments or "{}", f"{path}.function.arguments")
    elif filled:
        arguments = fields.without_nulls(arguments)
    parsed = {
        "type": "function",
        "function": {"name": fields.text(function["name"], f"{path}.function.name"), "arguments": arguments or {}},
    }
    return parsed | ({"id": call["id"]} if call.get("id") is not None else {})
