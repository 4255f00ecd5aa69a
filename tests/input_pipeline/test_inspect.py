"""Rows token by token, and how long they are."""

import io
import json

import pytest
from rich.console import Console

from input_pipeline.inspect import length_histogram, print_histogram, print_row, view_row
from input_pipeline.reading import Reading, read_data

ROWS = [
    {"messages": [{"role": "user", "content": "Hi é"}, {"role": "assistant", "content": "you " * words}]}
    for words in (1, 2, 3, 70, 150)
]


@pytest.fixture(scope="module")
def data(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    split = {"datasets": [{"dataset_name": "text_sft", "dataset_path": str(path)}]}
    return read_data(split, tokenizer, reading=Reading(max_length=160, seed=0, assistant_only_loss=True))


def test_a_row_is_shown_token_by_token_with_what_is_in_the_loss(data, tokenizer):
    views = view_row(data, 0, tokenizer)
    assert "".join(view.text for view in views if view.mark) == "you<|im_end|>\n"
    assert [view.id for view in views] == data.store[0][0].tolist()
    assert [view.text for view in views if view.text in ("Ã", "©")] == ["Ã", "©"]  # é, in two tokens
    with pytest.raises(ValueError, match="there is no row 5: the data has rows 0 to 4"):
        view_row(data, 5, tokenizer)


def test_the_histogram_counts_every_row_once(data):
    bars = length_histogram(data)
    assert [(bar.low, bar.high) for bar in bars] == [(1, 64), (65, 128), (129, 160)]
    assert [bar.rows for bar in bars] == [3, 1, 1]


def test_printing_colours_the_trained_tokens_and_names_the_row(data, tokenizer):
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard")
    print_row(console, data, 0, tokenizer)
    print_row(console, data, 0, tokenizer, ids=True)
    print_histogram(console, data)
    text = console.file.getvalue()
    assert data.name_of(0) in text.replace("\n", "")
    assert "\x1b[1;32myou" in text
    assert "5 of 5 rows used" in text


def test_where_there_is_no_colour_trained_tokens_stand_in_brackets(data, tokenizer):
    console = Console(file=io.StringIO(), width=1000)
    print_row(console, data, 0, tokenizer)
    title, *lines = console.file.getvalue().splitlines()
    assert title.endswith("3 trained ⟦in these⟧")
    assert "\n".join(lines).partition("⟦")[2] == "you<|im_end|>\n⟧"


def test_of_a_pair_the_unwanted_answer_has_a_colour_and_brackets_of_its_own(tokenizer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "Hi", "chosen": "you", "rejected": "you you"}) + "\n")
    split = {"datasets": [{"dataset_name": "preference_pairs_jsonl", "dataset_path": str(path)}]}
    data = read_data(split, tokenizer, reading=Reading(max_length=160, seed=0, trainer="TRL_DPO", answers="trl"))
    bare = Console(file=io.StringIO(), width=1000)
    print_row(bare, data, 0, tokenizer)
    title, *lines = bare.file.getvalue().splitlines()
    assert title.endswith("2 trained ⟦in these⟧, 3 unwanted ⟪in these⟫")
    assert "\n".join(lines) == "Hi⟦you<|im_end|>⟧Hi⟪you you<|im_end|>⟫"
    coloured = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard")
    print_row(coloured, data, 0, tokenizer)
    assert "\x1b[1;31myou you" in coloured.file.getvalue()
