"""Which text of a rendered chat belongs to which message, found by marking the template's own loops.

A chat template is a Jinja program, and searching its output for strings such as "<|im_start|>assistant" is guessing.
Here the program itself is asked: in its syntax tree an invisible mark is put at the start of every loop body and
after every loop, and each message carries its number. What is rendered between a message's mark and the next is that
message's turn. A template with `{% generation %}` blocks says itself what is trained; those blocks are marked in the
same way.

Marks must not disturb: the caller compares the text without the marks to what the tokenizer renders.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

_OPEN, _CLOSE = "\U0010fa00", "\U0010fa01"  # private-use characters of plane 16: no text has them by accident
_MARK = re.compile(f"{_OPEN}([^{_CLOSE}]*){_CLOSE}")
_NUMBER = "einkorn number"  # the key under which a message carries its number into the template


class Span(NamedTuple):
    """Characters `start` up to `end` of a rendered chat."""

    start: int
    end: int


class Turns(NamedTuple):
    """A rendered chat with the place of each message: `turns[i]` is where messages[i] stands, `generated` are the
    `{% generation %}` blocks (none where the template has none)."""

    text: str
    turns: dict[int, Span]
    generated: tuple[Span, ...]


@functools.lru_cache(maxsize=16)
def has_generation_blocks(template: str) -> bool:
    """Whether a chat template says itself, with `{% generation %}`, what the assistant wrote."""
    tokens = [token for token in _environment().lex(template) if token[1] != "whitespace"]
    return any(a[1] == "block_begin" and b[2] == "generation" for a, b in itertools.pairwise(tokens))


def find_turns(template: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> Turns:
    """Render `messages` and say which part of the text each message produced.

    A message that no loop renders, or that two loops do, is missing from `turns`. Raises what the template raises.
    """
    numbered = [{**message, _NUMBER: str(number)} for number, message in enumerate(messages)]
    marked = _compile(template).render(messages=numbered, **variables)
    text, length = [], 0
    found: dict[int, list[Span]] = {}
    generated: list[Span] = []
    loops: dict[str, tuple[int, int]] = {}  # loop → the message it is at, and where that began
    blocks: list[int] = []
    for part, mark in _parts(marked):
        text.append(part)
        length += len(part)
        kind, _, number = mark.partition(" ")
        if kind == "generation":
            blocks.append(length)
        elif kind == "endgeneration":
            generated.append(Span(blocks.pop(), length))
        elif kind:
            message, start = loops.pop(kind, (-1, length))
            if start < length:
                found.setdefault(message, []).append(Span(start, length))
            if number:
                loops[kind] = (int(number), length)
    return Turns("".join(text), {m: spans[0] for m, spans in found.items() if len(spans) == 1}, tuple(generated))


def _parts(marked: str) -> Iterator[tuple[str, str]]:
    """Yield (text, the mark that follows it); the last mark is empty."""
    pieces = _MARK.split(marked)  # text, mark, text, mark, …, text
    yield from zip(pieces[::2], [*pieces[1::2], ""], strict=True)


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = _environment()
    tree = environment.parse(template)
    _mark_loops(tree, iter(range(1_000_000)))
    return environment.from_string(tree)


def _mark_loops(node: nodes.Node, numbers: Iterator[int]) -> None:
    """Mark every `for` under `node` that has one loop variable."""
    for _, field in list(node.iter_fields()):
        if isinstance(field, nodes.Node):
            _mark_loops(field, numbers)
        elif isinstance(field, list):
            for child in [item for item in field if isinstance(item, nodes.Node)]:
                _mark_loops(child, numbers)
                if isinstance(child, nodes.For) and isinstance(child.target, nodes.Name):
                    loop = next(numbers)
                    number = nodes.Getitem(nodes.Name(child.target.name, "load"), nodes.Const(_NUMBER), "load")
                    child.body.insert(0, _output(f"{_OPEN}{loop} ", number, _CLOSE))
                    field.insert([item is child for item in field].index(True) + 1, _output(f"{_OPEN}{loop}{_CLOSE}"))


def _output(*parts: "str | nodes.Expr") -> nodes.Output:
    return nodes.Output([nodes.TemplateData(part) if isinstance(part, str) else part for part in parts])


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment in which transformers renders chat templates, with `{% generation %}` leaving marks."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class _GenerationBlocks(Extension):
    tags = {"generation"}  # noqa: RUF012 (jinja's own declaration)

    def parse(self, parser):
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = _output(f"{_OPEN}generation{_CLOSE}"), _output(f"{_OPEN}endgeneration{_CLOSE}")
        return nodes.Scope([begin, *body, end]).set_lineno(lineno)
