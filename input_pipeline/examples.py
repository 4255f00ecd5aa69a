"""What a row becomes once it is understood: a chat, a prompt with its completion, or plain text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]  # role, content, and where present tool_calls, tool_call_id, name, reasoning_content


class RowError(ValueError):
    """A row that cannot be used: the message says where it stands, what is wrong and what is allowed."""


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation to be rendered by a chat template.

    `prompt_messages` is set for rows that come as prompt + completion: so many leading messages are the prompt.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    prompt_messages: int | None = None
    template_kwargs: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A prompt string and the string that should follow it; no chat template is involved."""

    prompt: str
    completion: str


@dataclass(frozen=True, kw_only=True)
class Text:
    """Plain text, trained as a whole."""

    text: str


Example = Chat | Completion | Text


def show(value: Any, limit: int = 80) -> str:
    """A value as it stands in an error message: its repr, cut after `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"
