"""A tokenizer's chat template: what it renders, where each message stands in that, and how it wants tool calls."""

import datetime
import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jinja2

from input_pipeline.content import text_of, without_pictures
from input_pipeline.examples import Message, RowError
from input_pipeline.turns import Turns, find_turns

# What a template raises when it does not take what it is given (jinja's own, or Python's from inside an expression).
REFUSALS = (jinja2.TemplateError, TypeError, LookupError, AttributeError, ValueError)
NO_PICTURES = "has a picture, and the model takes none"
_OF_ROLES = re.compile("role|system message", re.IGNORECASE)  # "Conversation roles must alternate …"

_WORD, _TOOL = "einkornword", "einkorntool"  # looked for in renderings, to see what a template does with its input
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the same field


_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


@functools.lru_cache(maxsize=16)
def _with_fixed_date(source: str) -> str:
    """A template that asks for today's date, given the one that Llama 3's falls back on, 26 July 2024.

    The data must be the same on every host and after midnight: a run that is resumed the next day must find its rows.
    """
    return _TODAY.sub(lambda call: json.dumps(datetime.date(2024, 7, 26).strftime(call[2])), source)


@dataclass(frozen=True)
class Template:
    """The chat template of a tokenizer; `placeholder` is what stands for a picture, of a model that takes any."""

    tokenizer: Any
    placeholder: str | None = None

    def source(self, tools: Any = None) -> str:
        """The template's program (a tokenizer may have one of its own for chats with tools), with its date fixed."""
        return _with_fixed_date(self.tokenizer.get_chat_template(tools=tools))

    def facts(self) -> tuple[Any, ...]:
        """All that decides which tokens a chat or a text becomes; of two tokenizers that do the same they are the
        same.
        """
        tokenizer = self.tokenizer
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()  # not applied here, so a setting of it makes no difference
        backend.no_padding()
        return (
            backend.to_str().encode(),
            [type(tokenizer).__module__, type(tokenizer).__qualname__, tokenizer.split_special_tokens],
            tokenizer.special_tokens_map,
            tokenizer.chat_template,
            [version(package) for package in ("tokenizers", "transformers", "jinja2")],
        )

    def text(self, messages: Sequence[Message], tools: Any = None, *, prompt: bool = False, **kwargs: Any) -> str:
        """The chat as the tokenizer renders it; with `prompt`, ready for the assistant to answer."""
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=self.source(tools),
                add_generation_prompt=prompt,
                tokenize=False,
                **kwargs,
            )
        except REFUSALS as error:
            kind = "roles" if _OF_ROLES.search(str(error)) else "template"
            raise RowError(f"the chat template does not take these messages: {error}", kind) from error

    def turns(self, messages: Sequence[Message], tools: Any = None, **kwargs: Any) -> Turns:
        """The place of every message in that text."""
        variables = {"tools": tools, "documents": None, "add_generation_prompt": False}
        return find_turns(self.source(tools), messages, **(self.tokenizer.special_tokens_map | variables | kwargs))

    def prepare(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages as this template wants them: tool calls in its form, reasoning under the names in use, pictures
        as parts of the content or as their placeholder in the text.

        RowError if there are tool calls and the template does not render any.
        """
        prepared = [self._with_content(message) for message in messages]
        for message in prepared:
            reasoning = next((message[name] for name in _REASONING if message.get(name)), None)
            if reasoning is not None:
                message.update({"thinking": message.get("thinking", reasoning), "reasoning_content": reasoning})
        if not any(message.get("tool_calls") for message in prepared):
            return prepared
        if self.tool_call_form is None:
            raise RowError(
                "has tool_calls, which the chat template does not render; set model.chat_template to one that does",
                "template",
            )
        return [_with_tool_calls(message, *self.tool_call_form) for message in prepared]

    def _with_content(self, message: Message) -> dict[str, Any]:
        """A message with its content in a form that the template renders."""
        said, placeholder = message.get("content"), self.placeholder
        if placeholder is None or said is None:
            if not isinstance(said, str | None):
                raise RowError(NO_PICTURES, "image")
            return dict(message)
        if placeholder in text_of(said):
            raise RowError(f"the text holds {placeholder!r}, with which pictures are marked", "image")
        parts = without_pictures([message])[0]["content"]
        if isinstance(parts, str):
            return {**message, "content": [{"type": "text", "text": said}] if self.content_form[1] else said}
        if self.content_form[0]:
            return {**message, "content": parts}
        return {**message, "content": "".join(part.get("text", placeholder) for part in parts)}

    @functools.cached_property
    def content_form(self) -> tuple[bool, bool]:
        """Whether the template renders content that is a list of parts, and whether it renders only that."""
        of_parts = [{"type": "image"}, {"type": "text", "text": _WORD}]
        rendered = self._rendered_probe(of_parts)
        if rendered.count(self.placeholder or "") != 1 or _WORD not in rendered or "'type'" in rendered:
            return False, False
        return True, _WORD not in self._rendered_probe(_WORD)

    def _rendered_probe(self, content: Any) -> str:
        try:
            return self.text([{"role": "user", "content": content}])
        except RowError:
            return ""

    @functools.cached_property
    def tool_call_form(self) -> tuple[bool, str | None] | None:
        """(arguments as a JSON string?, content beside tool calls): the first form that the template renders as it
        stands; None if it renders none."""
        arguments = {"key": _WORD}
        call = {"id": "call00000", "type": "function", "function": {"name": _TOOL, "arguments": arguments}}
        question = {"role": "user", "content": "?"}
        for form in ((False, ""), (False, None), (True, ""), (True, None)):
            answer = _with_tool_calls({"role": "assistant", "tool_calls": [call]}, *form)
            try:
                text = self.text([question, answer], [_PROBE])
            except RowError:
                continue
            rendered = text[text.rfind("?") + 1 :]  # without the tool's definition, which stands before the question
            as_python, escaped = f"'{_WORD}'" in rendered, f'\\"{_WORD}' in rendered
            if _WORD in rendered and _TOOL in rendered and not as_python and not escaped:
                return form
        return None

    @functools.cached_property
    def renders_tools(self) -> bool:
        """Whether tool definitions come through to the text."""
        return _TOOL in self.text([{"role": "user", "content": "?"}], [_PROBE])


_PROBE = {
    "type": "function",
    "function": {
        "name": _TOOL,
        "description": "A tool.",
        "parameters": {
            "type": "object",
            "properties": {"key": {"type": "string", "description": "A key."}},
            "required": ["key"],
        },
    },
}


def _with_tool_calls(message: dict[str, Any], arguments_as_string: bool, content: str | None) -> dict[str, Any]:
    """A message with its tool calls, if any, in a form; `content` stands beside them where the message has none."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        if arguments_as_string:
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls.append(call | {"function": call["function"] | {"arguments": arguments}})
    return ({} if content is None else {"content": content}) | message | {"tool_calls": calls}
