"""Rows with tool calls, however they are stored, are rendered as transformers renders them; results are not trained."""

import json

import numpy as np
import pytest

from input_pipeline.chat import LossMask, render
from input_pipeline.encode import encode
from input_pipeline.meaning import Meaning
from input_pipeline.template import Template

ARGUMENTS = {"city": "Zürich", "days": [1, 2], "unit": {"name": "°C"}}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of the coming days.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
QUESTION, RESULT = {"role": "user", "content": "Weather?"}, {"role": "tool", "tool_call_id": "c1", "content": "4 °C"}
ANSWER = {"role": "assistant", "content": "It is 4 °C."}


def call(arguments):
    return {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def chat(*, arguments=ARGUMENTS, calls=1, **content):
    """A question, calls, their results, an answer."""
    asking = {"role": "assistant", "tool_calls": [call(arguments)] * calls, **content}
    return [QUESTION, asking, *[RESULT] * calls, ANSWER]


def tokens_of(row, tokenizer, turns="all", kind="conversation"):
    example = Meaning(format=kind).example(row, lambda: "row")
    (tokens,) = encode([render(example, Template(tokenizer), LossMask(turns=turns))], tokenizer, max_length=None)
    return tokens


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("arguments", [ARGUMENTS, json.dumps(ARGUMENTS), json.dumps(ARGUMENTS, ensure_ascii=False)])
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": []}])
def test_calls_are_rendered_as_transformers_does_in_whatever_form_they_are_stored(qwen3, arguments, content, calls):
    expected = qwen3.apply_chat_template(chat(calls=calls, content=""), tools=[TOOL], return_dict=False)
    row = {"messages": chat(arguments=arguments, calls=calls, **content), "tools": [TOOL]}
    assert tokens_of(row, qwen3).ids.tolist() == expected
    assert tokens_of(row | {"tools": json.dumps([TOOL])}, qwen3).ids.tolist() == expected


def test_text_beside_a_call_is_rendered_as_transformers_does(qwen3):
    messages = chat(content="One moment.")
    expected = qwen3.apply_chat_template(messages, tools=[TOOL], return_dict=False)
    assert tokens_of({"messages": messages, "tools": [TOOL]}, qwen3).ids.tolist() == expected


def test_calls_are_trained_and_results_are_not(qwen3):
    tokens = tokens_of({"messages": chat(calls=2), "tools": [TOOL]}, qwen3, "assistant")
    said = (
        '<tool_call>\n{"name": "get_weather", "arguments": '
        + json.dumps(ARGUMENTS, ensure_ascii=False)
        + "}\n</tool_call>"
    )
    answer = "<think>\n\n</think>\n\nIt is 4 °C.<|im_end|>\n"
    assert qwen3.decode(tokens.ids[tokens.trained]) == f"{said}\n{said}<|im_end|>\n{answer}"
    last = tokens_of({"messages": chat(), "tools": [TOOL]}, qwen3, "final")
    assert qwen3.decode(last.ids[last.trained]) == answer


def test_the_same_chat_in_sharegpts_form_gives_the_same_tokens(qwen3):
    said = {"name": "get_weather", "arguments": ARGUMENTS}
    row = {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": json.dumps(said)},
            {"from": "observation", "value": "4 °C"},
            {"from": "gpt", "value": "It is 4 °C."},
        ],
        "tools": json.dumps([TOOL]),
    }
    expected = tokens_of({"messages": chat(), "tools": [TOOL]}, qwen3, "assistant")
    found = tokens_of(row, qwen3, "assistant", "sharegpt")
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.trained.tolist() == expected.trained.tolist()


def test_rows_of_parquet_and_of_pandas_give_the_same_tokens(qwen3, tmp_path):
    import datasets

    row = {"messages": chat(arguments=json.dumps(ARGUMENTS)), "tools": json.dumps([TOOL])}
    expected = tokens_of(row, qwen3, "assistant").ids.tolist()
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    stored = datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
    assert "content" in stored[0]["messages"][1]  # arrow fills what a message lacks with null
    assert tokens_of(stored[0], qwen3, "assistant").ids.tolist() == expected
    frame = stored.to_pandas().iloc[0].to_dict()
    assert isinstance(frame["messages"], np.ndarray)
    assert tokens_of(frame, qwen3, "assistant").ids.tolist() == expected


def test_what_arrow_fills_in_is_not_rendered_and_a_null_of_the_users_is(qwen3, tmp_path):
    import datasets

    number = {"type": "object", "properties": {"x": {"type": "number", "default": None}}}
    other = {"type": "function", "function": {"name": "add", "parameters": number}}
    asking = {"role": "assistant", "content": "", "tool_calls": [call({"city": "Oslo"})]}
    rows = [
        {"messages": [QUESTION, asking, RESULT, ANSWER], "tools": [TOOL]},
        {"messages": [QUESTION, {**asking, "tool_calls": [call({"x": 1})]}, RESULT, ANSWER], "tools": [other]},
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    stored = datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
    assert stored[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo", "x": None}
    for row, kept in zip(rows, stored, strict=True):
        expected = qwen3.apply_chat_template(row["messages"], tools=row["tools"], return_dict=False)
        assert tokens_of(kept, qwen3).ids.tolist() == expected
    null = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call({"city": None})]}, RESULT, ANSWER]
    expected = qwen3.apply_chat_template(null, tools=[TOOL], return_dict=False)
    assert tokens_of({"messages": null, "tools": [TOOL]}, qwen3).ids.tolist() == expected
