"""What a row becomes once it is understood: a chat, a prompt with its completion, plain text, a pair of answers, an
answer with a label, or a prompt to be answered."""

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
    "length": "too long",
    "template": "cannot be rendered or masked",
    "transform": "not taken by dataset_kwargs.transform",
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


Side = str | tuple[Message, ...]  # a prompt or an answer; in an example all are strings, or all are messages


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Two answers to a prompt, of which `chosen` is preferred to `rejected`."""

    prompt: Side
    chosen: Side
    rejected: Side
    tools: tuple[Mapping[str, Any], ...] | None = None
    template_kwargs: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """An answer to a prompt, and whether it is a wanted one."""

    prompt: Side
    completion: Side
    label: bool
    tools: tuple[Mapping[str, Any], ...] | None = None
    template_kwargs: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt to be answered; `columns` are the row's other fields, which reward functions are given by name."""

    prompt: Side
    columns: Mapping[str, Any]
    tools: tuple[Mapping[str, Any], ...] | None = None
    template_kwargs: Mapping[str, Any] | None = None


Example = Chat | Completion | Text | Preference | Feedback | Prompt


def show(value: Any, limit: int = 80) -> str:
    """A value as it stands in an error message: its repr, cut after `limit` characters."""
    try:
        text = repr(value[: limit + 1] if isinstance(value, str | bytes) else value)
    except (ValueError, RecursionError):  # a number of more digits than Python writes out; nested too deeply
        text = f"<{type(value).__name__}>"
    return text if len(text) <= limit else f"{text[:limit]}…"
