"""Rows of preference pairs, of answers with a label and of prompts become examples; what is wrong with one is said."""

import numpy as np
import pytest

from input_pipeline import formats
from input_pipeline.examples import Chat, Completion, Feedback, Preference, Prompt, RowError
from input_pipeline.fields import plain

USER, SKY = {"role": "user", "content": "Hi"}, {"role": "user", "content": "What color is the sky?"}
GOOD, BAD = {"role": "assistant", "content": "Hello!"}, {"role": "assistant", "content": "What?"}
TOOL = {"type": "function", "function": {"name": "f"}}


def parse(row, trainer="TRL_DPO"):
    row = plain(row)
    return formats.load(formats.detect(row, trainer=trainer)).parse(row)


@pytest.mark.parametrize(
    ("row", "example"),
    [
        (  # as Oumi's documentation has it
            {"messages": [USER], "chosen": {"messages": [GOOD]}, "rejected": {"messages": [BAD]}},
            Preference(prompt=(USER,), chosen=(GOOD,), rejected=(BAD,)),
        ),
        ({"prompt": "Hi", "chosen": " a", "rejected": " b"}, Preference(prompt="Hi", chosen=" a", rejected=" b")),
        (
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "tools": [TOOL]},
            Preference(prompt=(USER,), chosen=(GOOD,), rejected=(BAD,), tools=(TOOL,)),
        ),
        (  # one message, as an object
            {"prompt": USER, "chosen": GOOD, "rejected": BAD},
            Preference(prompt=(USER,), chosen=(GOOD,), rejected=(BAD,)),
        ),
        (  # messages and strings: the strings are what the assistant, or the user, says
            {"prompt": [USER], "chosen": "Hello!", "rejected": "What?"},
            Preference(prompt=(USER,), chosen=(GOOD,), rejected=(BAD,)),
        ),
        (
            {"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]},
            Preference(prompt=(USER,), chosen=(GOOD,), rejected=(BAD,)),
        ),
        (  # whole conversations, without a prompt, with it as a string, and with it as messages
            {"chosen": [USER, GOOD, SKY, GOOD], "rejected": [USER, GOOD, SKY, BAD]},
            Preference(prompt=(USER, GOOD, SKY), chosen=(GOOD,), rejected=(BAD,)),
        ),
        (
            {
                "prompt": "What color is the sky?",
                "chosen": [SKY, GOOD],
                "rejected": [SKY, BAD],
                "messages": [SKY, GOOD],
            },
            Preference(prompt=(SKY,), chosen=(GOOD,), rejected=(BAD,)),
        ),
        (
            {"prompt": [SKY], "chosen": [SKY, GOOD], "rejected": [SKY, BAD]},
            Preference(prompt=(SKY,), chosen=(GOOD,), rejected=(BAD,)),
        ),
        (  # the space goes with the answers
            {"chosen": "The sky is blue.", "rejected": "The sky is green."},
            Preference(prompt="The sky is", chosen=" blue.", rejected=" green."),
        ),
    ],
)
def test_a_preference_pair_is_read_in_both_shapes_and_with_its_prompt_inside(row, example):
    assert parse(row) == example


def test_a_prompt_that_both_answers_hold_is_found_as_trl_finds_it():
    from trl import extract_prompt

    for row in (
        {"chosen": [USER, GOOD, SKY, GOOD], "rejected": [USER, GOOD, SKY, BAD]},
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "a b c d", "rejected": "a b x"},
    ):
        found, expected = parse(row), extract_prompt(row)
        for side in ("prompt", "chosen", "rejected"):
            ours = getattr(found, side)
            assert (ours if isinstance(ours, str) else list(ours)) == expected[side]


@pytest.mark.parametrize(
    ("row", "kind", "error"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "empty", "chosen and rejected are the same: 'b'"),
        (
            {"messages": [USER], "chosen": {"messages": [GOOD]}, "rejected": {"messages": [GOOD]}},
            "empty",
            "chosen and rejected are the same: {'messages': [{'role': 'assistant', 'content': 'Hello!'}]}",
        ),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "empty", "chosen is empty"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": []}, "empty", "rejected is empty"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "empty", "prompt is empty"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "empty", "rejected is empty"),
        (
            {"chosen": [USER, GOOD], "rejected": [SKY, BAD]},
            "empty",
            "there is no prompt, and chosen and rejected have no first message in common",
        ),
        ({"chosen": "a", "rejected": "b"}, "empty", "there is no prompt, and chosen and rejected do not begin alike"),
        (
            {"prompt": "a", "chosen": "b", "rejected": [BAD]},
            "type",
            "chosen and rejected must be two strings or two lists of messages,"
            " not 'b' and [{'role': 'assistant', 'content': 'What?…",
        ),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "type", "prompt must be a string or a list of messages, not 3"),
        (
            {"prompt": [USER], "chosen": [SKY], "rejected": [BAD]},
            "roles",
            "chosen has no assistant turn after the prompt: ({'role': 'user', 'content': 'What color is the sky?'},)",
        ),
        (
            {"messages": [USER], "chosen": {"messages": "x"}, "rejected": {"messages": [BAD]}},
            "type",
            "chosen.messages must be a list of messages, not 'x'",
        ),
        ({"prompt": "a", "chosen": "\ud800", "rejected": "b"}, "encoding", "chosen has half a character (\\ud800 at"),
    ],
)
def test_a_pair_from_which_nothing_can_be_learnt_is_a_bad_row(row, kind, error):
    with pytest.raises(RowError) as raised:
        parse(row)
    assert str(raised.value).startswith(error)
    assert raised.value.kind == kind


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"prompt": "a", "completion": "b", "label": True}, Feedback(prompt="a", completion="b", label=True)),
        ({"prompt": "a", "completion": "b", "label": 0}, Feedback(prompt="a", completion="b", label=False)),
        ({"prompt": "a", "completion": "b", "label": np.int64(1)}, Feedback(prompt="a", completion="b", label=True)),
        (
            {"prompt": [USER], "completion": [GOOD], "label": np.False_},
            Feedback(prompt=(USER,), completion=(GOOD,), label=False),
        ),
        (
            {"prompt": "Hi", "completion": [GOOD], "label": True},
            Feedback(prompt=(USER,), completion=(GOOD,), label=True),
        ),
    ],
)
def test_an_answer_with_a_label_is_read_whichever_way_its_label_is_stored(row, example):
    found = parse(row, "TRL_KTO")
    assert found == example
    assert type(found.label) is bool


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"prompt": "a", "completion": "b", "label": "yes"}, "label must be true or false (or 1 or 0), not 'yes'"),
        ({"prompt": "a", "completion": "b", "label": 2}, "label must be true or false (or 1 or 0), not 2"),
        ({"prompt": "a", "completion": "", "label": 1}, "completion is empty"),
        ({"prompt": None, "completion": "b", "label": 1}, "prompt must be a string or a list of messages, not None"),
    ],
)
def test_what_is_wrong_with_an_answer_with_a_label_is_said(row, error):
    with pytest.raises(RowError) as raised:
        formats.load("kto").parse(row)
    assert str(raised.value) == error


def test_a_prompt_keeps_the_other_columns_for_reward_functions():
    row = {"prompt": [USER], "letter_count": 1, "tools": [TOOL]}
    assert parse(row, "TRL_GRPO") == Prompt(prompt=(USER,), columns={"letter_count": 1}, tools=(TOOL,))
    assert parse({"prompt": "Why?", "completion": "So."}, "TRL_GRPO") == Prompt(
        prompt="Why?", columns={"completion": "So."}
    )


VERL = {
    "data_source": "countdown",
    "prompt": [USER],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": {"numbers": [79, 8], "target": 87}},
    "extra_info": {"split": "train"},
}


def test_a_row_of_verls_is_a_prompt_with_what_rewards_are_called_with():
    columns = {name: value for name, value in VERL.items() if name != "prompt"}
    assert parse(VERL, "VERL_GRPO") == Prompt(prompt=(USER,), columns=columns)
    assert parse(VERL, "TRL_GRPO") == Prompt(prompt=(USER,), columns=columns)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"prompt": "Why?"}, "prompt must be a list of messages, not 'Why?'"),
        ({"prompt": [{"role": "user", "content": ""}]}, "prompt is empty"),
        ({"data_source": 7}, "data_source must be a string, not 7"),
        ({"reward_model": {"style": "rule"}}, 'reward_model must be {"style": …, "ground_truth": …}, not'),
        ({"extra_info": "train"}, "extra_info must be an object, not 'train'"),
    ],
)
def test_what_is_wrong_with_a_row_of_verls_is_said(change, error):
    with pytest.raises(RowError) as raised:
        formats.load("verl").parse(VERL | change)
    assert str(raised.value).startswith(error)


def test_numpys_arrays_and_numbers_stand_for_lists_and_numbers():
    messages = np.array([USER, {**GOOD, "tool_calls": None}], dtype=object)
    assert parse({"messages": messages}, "TRL_SFT") == Chat(messages=(USER, GOOD))
    pair = {
        "prompt": np.array([USER], dtype=object),
        "chosen": np.array([GOOD], dtype=object),
        "rejected": np.array([BAD], dtype=object),
    }
    assert parse(pair) == Preference(prompt=(USER,), chosen=(GOOD,), rejected=(BAD,))
    row = VERL | {"reward_model": {"ground_truth": {"numbers": np.array([79, 8]), "target": np.int64(87)}}}
    truth = parse(row, "VERL_GRPO").columns["reward_model"]["ground_truth"]
    assert truth == {"numbers": [79, 8], "target": 87}
    assert [type(number) for number in truth["numbers"]] == [int, int]


def test_rows_are_read_as_the_trainer_that_runs_needs_them():
    labelled = {"prompt": "a", "completion": "b", "label": True}
    assert parse(labelled, "TRL_SFT") == Completion(prompt="a", completion="b")
    assert parse(labelled, "TRL_GRPO") == Prompt(prompt="a", columns={"completion": "b", "label": True})
    both = {"prompt": "Hi", "messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    assert parse(both, "TRL_SFT") == Chat(messages=(USER, GOOD))
    assert parse(both) == Preference(prompt=(USER,), chosen=(GOOD,), rejected=(BAD,))


SFT = "{messages}, {conversation: {messages}}, {conversations}, {prompt, completion}, {instruction, output}, {text}"


@pytest.mark.parametrize(
    ("row", "trainer", "error"),
    [
        (
            {"messages": [USER], "chosen": {"messages": [GOOD]}, "rejected": {"messages": [BAD]}},
            "TRL_SFT",
            f"rows are preference pairs: they are for training.trainer_type TRL_DPO; TRL_SFT trains {SFT}",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "TRL_KTO",
            "rows are preference pairs: they are for training.trainer_type TRL_DPO; TRL_KTO trains"
            " {prompt, completion, label}",
        ),
        (
            {"prompt": "a", "letter_count": 1},
            "TRL_SFT",
            f"rows are prompts without an answer: they are for training.trainer_type TRL_GRPO; TRL_SFT trains {SFT}",
        ),
        (
            VERL,
            "TRL_SFT",
            "rows are prompts in verl's form: they are for training.trainer_type VERL_GRPO; TRL_SFT trai",
        ),
        (
            {"messages": [USER, GOOD]},
            "TRL_DPO",
            "rows are of format conversation: they are for training.trainer_type TRL_SFT; TRL_DPO trains"
            " {messages, chosen, rejected}, {prompt, chosen, rejected}",
        ),
        (
            {"question": "a"},
            "TRL_DPO",
            "the row's format is not recognised: its fields are ['question']; known are"
            " {messages, chosen, rejected}, {prompt, chosen, rejected}. Name one in dataset_kwargs.format",
        ),
    ],
)
def test_rows_that_the_trainer_cannot_train_are_answered_with_the_one_that_does(row, trainer, error):
    with pytest.raises(RowError) as raised:
        parse(row, trainer)
    assert str(raised.value).startswith(error)


def test_every_format_is_trained_by_some_trainer():
    assert {name for names in formats.TRAINED.values() for name in names} == set(formats.FORMATS)
    assert set(formats.FIELDS) == set(formats.FORMATS) == set(formats.TRAINED["TRL_SFT"]) | set(formats._ARE)
