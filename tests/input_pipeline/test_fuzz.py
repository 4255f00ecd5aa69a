"""Rows bent out of shape in every way that files, arrow and numpy allow: each is understood, or is a RowError.

A mutant is made from a valid row by a few random changes, all drawn from one number, which a failure shows.
"""

import datetime
import json
import random
import time
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from input_pipeline import formats
from input_pipeline.chat import LossMask, render
from input_pipeline.encode import encode
from input_pipeline.examples import BAD_KINDS, Chat, Completion, RowError, Text
from input_pipeline.jsonl import parse_line
from input_pipeline.meaning import Meaning
from input_pipeline.template import Template

USER, ASSISTANT = {"role": "user", "content": "Hi, how are you?"}, {"role": "assistant", "content": "Fine, and you?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "get", "arguments": '{"city": "Oslo"}'}}
TOOL = {
    "type": "function",
    "function": {"name": "get", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CHAT = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Hm."},
    {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "four degrees"}]},
    ASSISTANT,
]
ROWS = {
    "conversation": {"messages": CHAT, "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}},
    "sharegpt": {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "function_call", "value": '{"name": "get", "arguments": {"city": "Oslo"}}'},
            {"from": "observation", "value": "four degrees"},
            {"from": "gpt", "value": "Hello!"},
        ],
        "tools": json.dumps([TOOL]),
    },
    "prompt_completion": {"prompt": [USER], "completion": [ASSISTANT]},
    "alpaca": {"instruction": "Add", "input": "1 2", "output": "3"},
    "text": {"text": "Once upon a time.", "meta": {"source": ["book", 3]}},
    "preference": {"messages": [USER], "chosen": {"messages": [ASSISTANT]}, "rejected": {"messages": CHAT[1:]}},
    "kto": {"prompt": [USER], "completion": [ASSISTANT], "label": True, "tools": [TOOL]},
    "verl": {
        "data_source": "countdown",
        "prompt": [USER],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": {"numbers": [79, 8], "target": 87}},
        "extra_info": {"split": "train"},
    },
    "prompt": {"prompt": [USER], "letter_count": 1},
}


def nested(depth: int):
    """A list in a list in a list."""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


STRANGE = [
    *(None, True, False, 0, 1, -1, 2**63, 10**5000, float("nan"), float("inf"), 1e308),
    *(
        "",
        " ",
        "\ud800",
        "x\udfff",
        "\x00\x1b\x7f",
        "\ufeff",
        "\u202e",
        "\U0010fa00",
        "user",
        "text",
        "{",
        "[]",
        "[[[[",
    ),
    *("[" * 3000, "9" * 5000, "a" * 5000, b"\xff\xfe", [], {}, [[]], [None], [{}], {"": None}, {"role": "user"}),
    *(nested(90), nested(3000), {"messages": nested(200)}, {1: 2}, {"type": "image", "image": "a.png"}, (1, 2)),
    *(
        np.array([1, 2]),
        np.array([USER, ASSISTANT], dtype=object),
        np.array(3),
        np.float32("nan"),
        np.True_,
        np.str_("x"),
    ),
    *(datetime.datetime(2026, 1, 1), datetime.timedelta(days=1), Decimal("1.5"), {1, 2}, memoryview(b"ab"), range(3)),
]


DEPTH = 12  # levels down to which a row is changed


def mutated(row, rng: random.Random):
    """A copy of the row after one to six changes."""
    row = copied(row)
    for _ in range(rng.randint(1, 6)):
        places = list(places_of(row))
        if not places:
            return row
        holder, key = rng.choice(places)
        change = rng.randrange(7)
        if change <= 1:
            holder[key] = rng.choice(STRANGE)
        elif change == 2:
            del holder[key]
        elif change == 3:  # another part of the row in this place
            other, at = rng.choice(places)
            holder[key] = copied(other[at])
        elif change == 4:
            wrapped = holder[key]
            for _ in range(rng.choice([1, 1, 1, 2, 120, 2000])):
                wrapped = [wrapped] if rng.random() < 0.5 else {"content": wrapped}
            holder[key] = wrapped
        elif change == 5 and isinstance(holder, list):
            holder.insert(key, copied(holder[rng.randrange(len(holder))]))
        elif change == 5:
            holder[rng.choice([*FIELDS, "", "\ud800", 7])] = holder.pop(key)
        elif isinstance(holder[key], str):
            at = rng.randint(0, len(holder[key]))
            holder[key] = (
                holder[key][:at] + rng.choice(["\ud800", "\x00", "<|im_end|>", "{%", "é", ""]) + holder[key][at:]
            )
    return rng.choice(STRANGE) if rng.random() < 0.01 else row


FIELDS = sorted(
    {name for row in ROWS.values() for name in row}
    | {"role", "content", "from", "value", "tool_calls", "function", "arguments", "name", "type", "text"}
)


def copied(value, depth: int = 0):
    """A copy of lists and objects as deep as changes are made."""
    if depth < DEPTH and isinstance(value, dict):
        return {key: copied(item, depth + 1) for key, item in value.items()}
    return [copied(item, depth + 1) for item in value] if depth < DEPTH and isinstance(value, list) else value


def places_of(value, depth: int = 0):
    """Every (container, key) of a row, down to some depth."""
    if depth < DEPTH and isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield value, key
            yield from places_of(item, depth + 1)


def understood(meaning: Meaning, row):
    """The example of a row, or None where it is a RowError of a known kind that names the row."""
    try:
        return meaning.example(row, lambda: "row 7 of x.jsonl")
    except RowError as error:
        refused(error, "row 7 of x.jsonl: ")
        return None


def refused(error: RowError, begins: str = "") -> None:
    """The error is one that can be counted and read."""
    assert error.kind in BAD_KINDS
    assert str(error).startswith(begins)
    assert len(str(error)) < 10_000


def parse_many(name: str, seed: int, count: int) -> None:
    rng, meaning = random.Random(seed), Meaning(format=name)
    for _ in range(count):
        row = mutated(ROWS[name], rng)
        understood(meaning, row)


def detect_many(seed: int, count: int) -> None:
    rng = random.Random(seed)
    for _ in range(count):
        row = mutated(ROWS[rng.choice(list(ROWS))], rng)
        try:
            shaped = Meaning(format="text").reshape(row)
            assert formats.detect(shaped, trainer=rng.choice(list(formats.TRAINED))) in formats.FORMATS
        except RowError as error:
            refused(error)


def render_many(tokenizer, seed: int, count: int) -> None:
    rng, template = random.Random(seed), Template(tokenizer)
    for _ in range(count):
        name = rng.choice(["conversation", "sharegpt", "prompt_completion", "alpaca", "text"])
        example = understood(Meaning(format=name), mutated(ROWS[name], rng))
        if not isinstance(example, Chat | Completion | Text):
            continue
        try:
            rendered = render(example, template, LossMask(turns=rng.choice(["all", "assistant", "final"])))
        except RowError as error:
            refused(error)
            continue
        encode([rendered], tokenizer, max_length=None)


LINE_PARTS = [
    b"\xff",
    b"\xc3\x28",
    b"\xed\xa0\x80",
    b"\x00",
    b"\\ud800",
    b"\\u12",
    b"NaN",
    b"1e999",
    b'"',
    b"{",
    b"[" * 2000,
]
LINE_PARTS += [
    b"9" * 5000,
    b",",
    b":",
    b"\r",
    b"\xef\xbb\xbf",
    b"}",
    b"]",
    b"\\",
    b"/",
    b"null",
    b'{"a":' * 1500,
    b" ",
    b"",
]


def parse_lines(seed: int, count: int) -> None:
    rng = random.Random(seed)
    lines = [json.dumps(row).encode() for row in ROWS.values()]
    for _ in range(count):
        line = rng.choice(lines)
        for _ in range(rng.randint(1, 5)):
            at, end = sorted((rng.randint(0, len(line)), rng.randint(0, len(line))))
            end = rng.choice([at, at + 1, end])
            line = line[:at] + rng.choice([*LINE_PARTS, line[at:end] * 2, rng.randbytes(3)]) + line[end:]
        try:
            parse_line(line, "x.jsonl", 7)
        except RowError as error:
            refused(error, "x.jsonl:7")


seeds = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_a_mutated_row_is_understood_or_a_row_error(name, seed):
    parse_many(name, seed, 25)


@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_a_mutated_row_has_a_format_or_is_a_row_error(seed):
    detect_many(seed, 25)


@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_a_mutated_row_is_rendered_and_tokenised_or_a_row_error(tokenizer, seed):
    render_many(tokenizer, seed, 10)


@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_a_mutated_line_is_a_value_or_a_row_error(seed):
    parse_lines(seed, 25)


def test_every_format_is_mutated_here_and_unmutated_rows_are_understood():
    assert list(ROWS) == list(formats.FORMATS)
    for name, row in ROWS.items():
        assert Meaning(format=name).example(row, lambda: "row") is not None


MANY, AT_ONCE = 100_000, 200


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [*ROWS, "detection", "lines", "rendering"])
def test_a_hundred_thousand_mutants_of_each_kind_are_understood_or_row_errors(name, tokenizer):
    run = {
        "detection": detect_many,
        "lines": parse_lines,
        "rendering": lambda seed, count: render_many(tokenizer, seed, count),
    }.get(name, lambda seed, count: parse_many(name, seed, count))
    longest = 0.0

    @settings(max_examples=MANY // AT_ONCE, deadline=None, database=None)
    @given(seed=seeds)
    def mutants(seed):
        nonlocal longest
        start = time.perf_counter()
        run(seed, AT_ONCE)
        longest = max(longest, time.perf_counter() - start)

    mutants()
    assert longest < 60, f"{AT_ONCE} rows took {longest:.0f} s"
