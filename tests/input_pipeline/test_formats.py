"""Rows of every format become examples; what is wrong with a row is said with its place in it."""

from pathlib import Path

import pytest

from input_pipeline import formats
from input_pipeline.examples import Chat, Completion, RowError, Text
from input_pipeline.fields import plain


def parse(row, **kwargs):
    return formats.load(formats.detect(row)).parse(row, **kwargs)


def test_the_registry_and_the_folder_hold_the_same_formats():
    files = {path.stem for path in Path(formats.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == set(formats.FORMATS)
    assert list(formats.FORMATS.values()) == [f"input_pipeline.formats.{name}" for name in formats.FORMATS]


def test_an_unknown_format_is_answered_with_those_that_exist():
    with pytest.raises(
        ValueError, match="unknown row format 'aplaca'; known: conversation, sharegpt, prompt_completion,"
    ):
        formats.load("aplaca")


USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"messages": [USER, ASSISTANT], "metadata": {"x": 1}}, Chat(messages=(USER, ASSISTANT))),
        ({"conversation": {"messages": [USER, ASSISTANT]}}, Chat(messages=(USER, ASSISTANT))),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
            Chat(messages=(USER, ASSISTANT)),
        ),
        ({"prompt": [USER], "completion": [ASSISTANT]}, Chat(messages=(USER, ASSISTANT), prompt_messages=1)),
        ({"prompt": "2+2=", "completion": "4"}, Completion(prompt="2+2=", completion="4")),
        ({"instruction": "Hi", "input": "", "output": "Hello!"}, Chat(messages=(USER, ASSISTANT))),
        ({"text": "once"}, Text(text="once")),
    ],
)
def test_rows_are_recognised_by_their_fields(row, example):
    assert parse(row) == example


def test_an_alpaca_row_puts_the_input_below_the_instruction():
    chat = parse({"instruction": "Translate to French", "input": "Hello", "output": "Bonjour"})
    assert [m["content"] for m in chat.messages] == ["Translate to French\n\nHello", "Bonjour"]


def test_alpaca_with_its_system_prompt_is_laid_out_as_the_original():
    answer = "Write a response that appropriately completes the request."
    row = {"instruction": "Add", "input": "1 2", "output": "3"}
    with_input = formats.load("alpaca").parse(row, system_prompt=True)
    assert [m["content"] for m in with_input.messages] == [
        "Below is an instruction that describes a task, paired with an input that provides further context. " + answer,
        "Add\n\n### Input:\n1 2",
        "3",
    ]
    without = formats.load("alpaca").parse({**row, "input": ""}, system_prompt=True)
    assert [m["content"] for m in without.messages] == [
        "Below is an instruction that describes a task. " + answer,
        "Add",
        "3",
    ]


def test_content_may_be_a_list_of_text_items_under_either_name():
    items = [{"type": "text", "content": "one "}, {"type": "text", "text": "two"}]
    assert parse({"messages": [{"role": "user", "content": items}]}).messages[0]["content"] == "one two"


def test_tool_calls_keep_their_arguments_as_objects_and_tools_may_be_a_json_string():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "7"},
        ],
        "tools": '[{"type": "function", "function": {"name": "f"}}]',
    }
    assert parse(row) == Chat(
        messages=(
            USER,
            {
                "role": "assistant",
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}, "id": "c1"}],
            },
            {"role": "tool", "content": "7", "tool_call_id": "c1"},
        ),
        tools=({"type": "function", "function": {"name": "f"}},),
    )


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": [USER, "Hello"]}, "messages[1] must be an object with role and content, not 'Hello'"),
        (
            {"messages": [USER, ASSISTANT, {"role": "bot", "content": "x"}]},
            "messages[2].role is 'bot'; allowed: system, developer, user, assistant, tool",
        ),
        (
            {"messages": [USER, {"role": "assistant"}]},
            "messages[1].content is missing; a message needs content or tool_calls",
        ),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "messages[0].content must be a string or a list of items, not 3",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            'messages[0].content[0] must be {"type": "text", "content": "…"}, not {\'type\': \'text\'}',
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "content": "a.mp4"}]}]},
            "messages[0].content[0].type is 'video': not implemented yet: training on anything but text and pictures",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f"}]}]},
            'messages[1].tool_calls[0] must be {"type": "function", "function": {"name": …, "arguments": …}},'
            " not {'name': 'f'}",
        ),
        (
            {"prompt": "a", "completion": [ASSISTANT]},
            "prompt and completion must be two strings or two lists of messages, not 'a' and "
            "[{'role': 'assistant', 'content': 'Hello…",
        ),
        ({"instruction": "a", "output": None}, "output must be a string, not None"),
        ({"text": 5}, "text must be a string, not 5"),
        (["not", "a", "row"], "a row must be an object with named fields, not list: ['not', 'a', 'row']"),
        (
            {"unknown_key": 1},
            "the row's format is not recognised: its fields are ['unknown_key']; known are {messages},"
            " {conversation: {messages}}, {conversations}, {prompt, completion}, {instruction, output} and {text}."
            " Name one in dataset_kwargs.format",
        ),
    ],
)
def test_a_bad_row_is_answered_with_the_place_the_value_and_what_is_allowed(row, error):
    with pytest.raises(RowError) as raised:
        parse(row)
    assert str(raised.value) == error


CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}
RESULT = {"role": "tool", "content": "7"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "messages",
    [
        [USER, ASSISTANT, SYSTEM, USER, ASSISTANT],  # a system message in the middle
        [USER, USER, ASSISTANT, ASSISTANT],
        [ASSISTANT, USER, ASSISTANT],
        [USER],  # trained where all tokens are
        [USER, ASSISTANT, USER],
        [USER, {"role": "assistant", "content": "<tool_call>f</tool_call>"}, RESULT, ASSISTANT],  # a call as text
        [{"role": "system", "content": ""}, USER, ASSISTANT],
        [USER, {"role": "assistant", "content": ""}, USER, ASSISTANT],
        [USER, {"role": "assistant", "content": [], "reasoning_content": "Hm."}],
    ],
)
def test_orders_of_roles_that_templates_render_are_accepted_as_trl_and_oumi_do(messages):
    assert [m["role"] for m in parse({"messages": messages}).messages] == [m["role"] for m in messages]


@pytest.mark.parametrize(
    ("row", "kind", "error"),
    [
        (
            {"messages": [USER, RESULT, ASSISTANT]},
            "roles",
            "messages[1] is the result of a tool, and no assistant turn stands before it",
        ),
        (
            {"messages": [USER | {"tool_calls": CALL["tool_calls"]}, ASSISTANT]},
            "roles",
            "messages[0].tool_calls: only the assistant calls tools, not user",
        ),
        (
            {"prompt": [RESULT], "completion": [ASSISTANT]},
            "roles",
            "prompt and completion[0] is the result of a tool, and no assistant turn stands before it",
        ),
        ({"messages": [USER, {"role": "bot", "content": "x"}]}, "roles", "messages[1].role is 'bot'; allowed: system"),
        ({"messages": []}, "empty", "messages is empty"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "empty", "messages: the assistant never says any"),
        ({"messages": [{"role": "user", "content": ""}]}, "empty", "messages: nobody says anything"),
        ({"conversations": []}, "empty", "conversations is empty"),
        ({"prompt": "x", "completion": ""}, "empty", "completion is empty"),
        ({"instruction": "x", "output": ""}, "empty", "output is empty"),
        ({"text": ""}, "empty", "text is empty"),
        ({"text": "a\ud800b"}, "encoding", "text has half a character (\\ud800 at character 1), which is no text"),
        (
            {"messages": [USER, {"role": "assistant", "content": "\udfff"}]},
            "encoding",
            "messages[1].content has half a character (\\udfff at character 0)",
        ),
        ({"messages": [USER, ASSISTANT], "tools": "[{"}, "json", "tools is a string but not JSON (Expecting"),
        (
            {"messages": [USER, ASSISTANT], "chat_template_kwargs": {"messages": []}},
            "type",
            "chat_template_kwargs.messages is no variable of a row's own",
        ),
    ],
)
def test_bad_rows_are_counted_by_what_is_wrong_with_them(row, kind, error):
    with pytest.raises(RowError) as raised:
        parse(row)
    assert str(raised.value).startswith(error)
    assert raised.value.kind == kind


def test_a_call_in_sharegpts_form_is_a_tool_call_of_the_assistants():
    turns = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "7"},
        {"from": "gpt", "value": "Hello!"},
    ]
    row = {"conversations": turns, "system": "Be brief."}
    assert parse(row) == Chat(messages=(SYSTEM, USER, CALL, RESULT, ASSISTANT))


def test_rows_nested_too_deeply_to_be_rendered_are_refused():
    schema: dict = {"type": "string"}
    for _ in range(200):
        schema = {"type": "array", "items": schema}
    with pytest.raises(RowError, match="is nested more than 100 levels deep"):
        plain({"messages": [USER, ASSISTANT], "tools": [schema]})
