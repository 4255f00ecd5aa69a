"""An example becomes text with trained spans: chats through the tokenizer's template, plain text as it stands.

The trained part of an assistant's turn runs from the end of its generation prompt (what the model is given at
inference) to the end of what the template renders for the turn: the end-of-turn token, and what follows it before the
next turn. It is read off the template itself (see `turns.py`); where that cannot be done exactly, the row is an error
that says so.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from input_pipeline import fields
from input_pipeline.examples import Chat, Completion, Example, RowError, Text
from input_pipeline.template import REFUSALS, Template
from input_pipeline.turns import Span, Turns, has_generation_blocks

CURE = "Set model.chat_template to one with {% generation %} blocks, or train on all tokens"
_TAGS = re.compile(r"<[^<>]*>|\[[^\[\]]*\]|\s+")
_NO_PAIR = "has no prompt and completion; completion_only_loss needs both"


@dataclass(frozen=True)
class LossMask:
    """Which tokens are trained.

    `turns`: "all" tokens of a chat, those of every "assistant" turn, or those of the "final" one. `completion_only`:
    of a prompt with its completion train the completion only; None means yes, and True makes other rows an error.
    """

    turns: Literal["all", "assistant", "final"] = "all"
    completion_only: bool | None = None


class Trained(NamedTuple):
    """Characters `start` up to `end` of a text. With `given`, the text that the model is given at inference, only from
    the first token on in which the two differ."""

    start: int
    end: int
    given: str | None = None


class Rendered(NamedTuple):
    """A text; whether the tokenizer adds its special tokens to it; what is trained (None: everything); and for a
    completion its prompt: nothing is trained before the first token in which prompt and text differ."""

    text: str
    special_tokens: bool
    trained: tuple[Trained, ...] | None
    prompt: str | None = None


class _Rendering(NamedTuple):
    """A chat being rendered: what `Template.text` is called with, and what it gave."""

    template: Template
    messages: list[dict[str, Any]]
    tools: list[Mapping[str, Any]] | None
    kwargs: dict[str, Any]
    text: str

    def again(self, messages: list[dict[str, Any]], *, prompt: bool) -> str:
        """Some of the messages rendered with the same tools and variables."""
        return self.template.text(messages, self.tools, prompt=prompt, **self.kwargs)


def render(example: Example, template: Template, mask: LossMask) -> Rendered:
    """The text of an example and which of it is trained; RowError where that cannot be said exactly."""
    rendered = _render(example, template, mask)
    fields.text(rendered.text, "the rendered row")  # a tool's definition or a template variable may be no text
    return rendered


def _render(example: Example, template: Template, mask: LossMask) -> Rendered:
    if isinstance(example, Chat):
        return _render_chat(example, template, mask)
    if not isinstance(example, Completion | Text):
        raise RowError(f"is an example ({type(example).__name__}) that is not rendered as one text")
    if mask.turns != "all":
        raise RowError("has no assistant turns, and only those are to be trained", "roles")
    if isinstance(example, Completion):
        text = example.prompt + _ended(example.completion, template.tokenizer)
        return Rendered(text, True, None, None if mask.completion_only is False else example.prompt)
    if mask.completion_only:
        raise RowError(_NO_PAIR)
    return Rendered(_ended(example.text, template.tokenizer), True, None)


def _untellable(what: str) -> RowError:
    """The error that the template does something after which nobody can say what is the assistant's."""
    return RowError(f"the chat template {what}. {CURE}", "template")


def _ended(text: str, tokenizer: Any) -> str:
    """`text` with the end-of-sequence token at its end."""
    if tokenizer.eos_token is None:
        raise RowError("the tokenizer has no end-of-sequence token, with which plain text must end", "template")
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token


def _render_chat(chat: Chat, template: Template, mask: LossMask) -> Rendered:
    if not template.tokenizer.chat_template:
        raise RowError("the tokenizer has no chat template; set model.chat_template", "template")
    if mask.completion_only and chat.prompt_messages is None:
        raise RowError(_NO_PAIR)
    messages, tools, kwargs = (
        template.prepare(chat.messages),
        list(chat.tools or ()) or None,
        chat.template_kwargs or {},
    )
    rendering = _Rendering(template, messages, tools, dict(kwargs), template.text(messages, tools, **kwargs))
    trained = None if mask.turns == "all" else _assistant_spans(rendering, final=mask.turns == "final")
    prompt = None
    if chat.prompt_messages is not None and mask.completion_only is not False:
        prompt = rendering.again(messages[: chat.prompt_messages], prompt=True)
    return Rendered(rendering.text, False, trained, prompt)


def _assistant_spans(chat: _Rendering, *, final: bool) -> tuple[Trained, ...]:
    """The trained spans of the assistant's turns, or of the last one."""
    asked = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if not asked:
        raise RowError("has no assistant turn, and only those are to be trained", "roles")
    try:
        marked = chat.template.turns(chat.messages, chat.tools, **chat.kwargs)
    except REFUSALS as error:
        raise _untellable(f"cannot be followed message by message ({error})") from error
    if marked.text != chat.text:
        raise _untellable("renders another text when it is followed message by message")
    if has_generation_blocks(chat.template.source(chat.tools)):
        if final and asked[-1] not in marked.turns:
            raise RowError(
                f"the chat template gives messages[{asked[-1]}] no turn of its own. Train all assistant turns",
                "template",
            )
        first = marked.turns[asked[-1]].start if final else 0
        return tuple(Trained(*span) for span in marked.generated if first <= span.start < span.end)
    _check_turns(marked, chat)
    return tuple(_trained_span(i, marked.turns[i], chat) for i in (asked[-1:] if final else asked))


def _check_turns(marked: Turns, chat: _Rendering) -> None:
    """Every message must be rendered once, after the one before it; only a system message may stand anywhere."""
    end = 0
    for i, message in enumerate(chat.messages):
        span = marked.turns.get(i)
        if span is None and message["role"] not in ("system", "developer"):
            raise _untellable(f"gives messages[{i}] ({message['role']}) no turn of its own")
        if span is not None and span.start < end:
            raise _untellable(f"renders messages[{i}] ({message['role']}) inside another turn")
        end = span.end if span is not None else end


def _trained_span(i: int, turn: Span, chat: _Rendering) -> Trained:
    """From the end of the generation prompt of messages[i] to the end of its turn."""
    text, eos = chat.text, chat.template.tokenizer.eos_token
    closed = i == len(chat.messages) - 1 and text[turn.end :] == eos  # Phi-3 closes the whole chat with it
    end = len(text) if closed else turn.end
    history = chat.messages[:i] or [{"role": "user", "content": "?"}]  # templates do not render an empty chat
    given = chat.again(history, prompt=True)
    if i and text.startswith(given) and turn.start <= len(given) <= end:
        return Trained(len(given), end)
    # The history is rendered otherwise once more messages follow, or there is none: take the generation prompt alone.
    before = chat.again(history, prompt=False)
    if not given.startswith(before):
        raise _untellable(f"renders the messages before messages[{i}] otherwise in a prompt")
    prompt = given[len(before) :]
    # What opens the chat (a first token, a system prompt of the template's own) is rendered with its first message.
    start = text.find(prompt, turn.start, turn.end) if i == 0 else turn.start
    if start >= 0 and text.startswith(prompt, start):
        return Trained(start + len(prompt), end)
    if i and _differs_in_tags_only(prompt, text[turn.start : turn.end]):
        return Trained(turn.start, end, given=text[: turn.start] + prompt)  # trained is what differs, token by token
    raise _untellable(f"opens messages[{i}] otherwise than its generation prompt")


def _differs_in_tags_only(prompt: str, turn: str) -> bool:
    """Whether a turn opens as the generation prompt does, but for tags in which the prompt ends, as R1's "<think>"."""
    shared = next(
        (n for n, (a, b) in enumerate(zip(prompt, turn, strict=False)) if a != b), min(len(prompt), len(turn))
    )
    tag = prompt.rfind("<", 0, shared)
    if tag > prompt.rfind(">", 0, shared):
        shared = tag
    return shared > 0 and not _TAGS.sub("", prompt[shared:])
