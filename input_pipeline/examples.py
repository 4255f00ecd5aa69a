"""What a row becomes once it is understood: a chat, a prompt with its completion, or plain text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BAD_KINDS = {
    "json": "not JSON",
    "encoding": "not UTF-8",
    "unreadable": "cannot be read",
    "type": "of another type than the format has",
    "empty": "empty",
    "roles": "roles out of order",
    "image": "image missing or broken",
    "template": "cannot be rendered or masked",
}

Message = Mapping[str, Any]  # role, content, and where present tool_calls, tool_call_id, name, reasoning_content


class RowError(ValueError):
    """A row that cannot be used: the message says where it stands, what is wrong and what is allowed.

    `kind`, by which such rows are counted, is one of `BAD_KINDS`.
    """

    def __init__(self, message: str, kind: str = "type"):
        super().__init__(message)
        self.kind = kind

    def at(self, where: str) -> "RowError":
        """The same error with the place of the row before it."""
        return RowError(f"{where}: {self}", self.kind)

    def __reduce__(self):
        return RowError, (str(self), self.kind)  # it comes back from worker processes


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
