"""Prompts and answers in tokens: ids, boundary and cuts against TRL's own preparation of the same rows; Oumi's style by
hand; what is wrong with a row is told with its place.
"""

import functools
import json
import string
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from input_pipeline.answers import LEFT_OUT, encode_answers, render_answers
from input_pipeline.examples import Preference
from input_pipeline.reading import Reading, read_data
from input_pipeline.template import Template

TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
WITH_TOOLS = (  # ChatML that renders definitions and calls of tools, and a sign that the row's own variable sets
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{{ sign or '' }}{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def pair(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


ROWS = {
    "messages": pair([user("How are you?")], [assistant("Fine.")], [assistant("What is it to you today?")]),
    "a system prompt and two turns": pair(
        [{"role": "system", "content": "You are a helpful assistant."}, user("Hi"), assistant("Hello!"), user("Oslo?")],
        [assistant("It rains.")],
        [assistant("It rains and it is four degrees.")],
    ),
    "an answer of several messages": pair(
        [user("And the weather?")],
        [assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "4"}, assistant("Four degrees.")],
        [assistant("It rains.")],
        tools=TOOLS,
    ),
    "tools as JSON": pair([user("Oslo?")], [assistant("4")], [assistant("5")], tools=json.dumps(TOOLS)),
    "a prompt inside both answers": {
        "chosen": [user("Hello"), assistant("Hi"), user("Hm"), assistant("Yes?")],
        "rejected": [user("Hello"), assistant("Hi"), user("Hm"), assistant("What is the weather?")],
    },
    "strings": pair("The weather in Oslo is", " four degrees", " not known to me today"),
    "strings that end with the end": pair("The weather:", " rain<|im_end|>", " snow"),
    "strings whose prompt goes on in the answer's first token": pair("Hello, how are y", "ou?", "es"),
    "strings of which one answer merges": pair("You are welc", "ome. Thanks!", "42"),
    "a prompt with a space at its end": pair("the answer is ", "42", "the weather"),
    "a template's own variable": pair(
        [user("Hi")], [assistant("a")], [assistant("b c")], chat_template_kwargs={"sign": "<think>"}
    ),
}
# The page's rows have the prompt under `messages` and answers that are conversations; TRL has another name for these.
SEEDS = {
    "messages": [user("Write a story about a robot")],
    "chosen": {"messages": [assistant("In the year 2045, a robot named...")]},
    "rejected": {"messages": [assistant("There was this robot who...")]},
}
LABELLED = {
    "wanted": {"prompt": [user("Hi")], "completion": [assistant("Hello!")], "label": True},
    "unwanted": {"prompt": "The weather in Os", "completion": "lo is fine", "label": False},
}


@pytest.fixture(scope="module")
def tokenizer(tokenizer_maker):
    made = tokenizer_maker()
    made.chat_template = WITH_TOOLS
    return made


def section(tmp_path, rows, **split):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"datasets": [{"dataset_name": "text_sft", "dataset_path": str(path)}], **split}


def read(split, tokenizer, *, max_length=None, trainer="TRL_DPO", answers="trl"):
    reading = Reading(max_length=max_length, seed=0, trainer=trainer, answers=answers)
    return read_data(split, tokenizer, reading=reading)


def ours(tmp_path, row, tokenizer, **options):
    """Ids and marks of a row, one list each."""
    return tuple(array.tolist() for array in read(section(tmp_path, [row]), tokenizer, **options).store[0])


def of_trl(row, tokenizer, *, max_length=None, trainer="DPOTrainer"):
    """Ids and marks that TRL's trainer makes of a row, of each answer its prompt and itself; None where it drops it."""
    import trl
    from datasets import Dataset
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    trainer_class = getattr(trl, trainer)
    itself = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False, desirable_weight=1.0, undesirable_weight=1.0)
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start")
    prepared = trainer_class._prepare_dataset(itself, Dataset.from_list([row]), tokenizer, args, "train")
    if not len(prepared):
        return None
    collator = DataCollatorForPreference if trainer == "DPOTrainer" else DataCollatorForUnpairedPreference
    batch = collator(pad_token_id=tokenizer.pad_token_id, max_length=max_length)(list(prepared))
    ids, marks = [], []
    numbers = [1, 2] if trainer == "DPOTrainer" else [1 if row["label"] else 2]
    names = ("input_ids", "attention_mask", "completion_mask")
    for number, *arrays in zip(numbers, *(batch[name] for name in names), strict=True):
        tokens, there, answered = (array.tolist() for array in arrays)
        ids += tokens[: sum(there)]
        marks += [number * one for one in answered[: sum(there)]]
    return ids, marks


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_token_ids_and_the_end_of_the_prompt_are_those_of_trl(row, tokenizer, tmp_path):
    assert ours(tmp_path, row, tokenizer) == of_trl(row, tokenizer)


def test_the_pages_rows_are_prompt_and_answers_of_trl(tokenizer, tmp_path):
    same = pair(SEEDS["messages"], SEEDS["chosen"]["messages"], SEEDS["rejected"]["messages"])
    assert ours(tmp_path, SEEDS, tokenizer) == of_trl(same, tokenizer)


@pytest.mark.parametrize("row", LABELLED.values(), ids=LABELLED)
def test_an_answer_with_a_label_is_marked_by_it_as_trl_marks_it(row, tokenizer, tmp_path):
    found = ours(tmp_path, row, tokenizer, trainer="TRL_KTO")
    assert found == of_trl(row, tokenizer, trainer="KTOTrainer")
    assert max(found[1]) == (1 if row["label"] else 2)


@pytest.mark.parametrize("name", ["a system prompt and two turns", "strings", "strings of which one answer merges"])
def test_rows_are_cut_and_dropped_at_every_length_as_in_trl(name, tokenizer, tmp_path):
    rows = [ROWS[name], pair("4", " snow", " and the weather today")]
    whole = [of_trl(row, tokenizer) for row in rows]
    marks = whole[0][1]
    prompt = marks.index(1)
    longest = prompt + max(marks.count(1), marks.count(2))
    for max_length in (prompt, prompt + 1, prompt + 2, longest - 1, longest):
        data = read(section(tmp_path, rows), tokenizer, max_length=max_length)
        found = [tuple(array.tolist() for array in data.store[index]) for index in range(len(data.store))]
        expected = [of_trl(row, tokenizer, max_length=max_length) for row in rows]
        assert found == [row for row in expected if row is not None]
        assert data.counts.untrained == expected.count(None)
        assert data.counts.over_long == sum(cut != row for cut, row in zip(expected, whole, strict=True))
        assert data.counts.trained_tokens == sum(mark > 0 for _, marks in found for mark in marks)


@functools.cache
def of_trl_whole(prompt, chosen, rejected, tokenizer):
    return of_trl(pair(prompt, chosen, rejected), tokenizer)


text = st.text(string.ascii_lowercase[:6] + " .\n'é<|", min_size=1, max_size=12)
words = st.lists(st.sampled_from(["Hello", "wea", "ther", " is", " ", "wel", "come", "!", "<|im_end|>"]), min_size=1)


@settings(max_examples=60, deadline=None)
@given(prompt=text | words.map("".join), chosen=text | words.map("".join), rejected=text | words.map("".join))
def test_strings_of_any_kind_part_where_trl_parts_them(prompt, chosen, rejected, tokenizer):
    asked = render_answers(Preference(prompt=prompt, chosen=chosen, rejected=rejected), Template(tokenizer), "trl")
    notices = set()
    (found,) = encode_answers([asked], tokenizer, max_length=None, notices=notices)
    expected = of_trl_whole(prompt, chosen, rejected, tokenizer)
    if isinstance(found, ValueError):  # TRL trains on these: an answer whose first token nothing predicts, or no answer
        assert expected[1][0] or 1 not in expected[1] or 2 not in expected[1]
        return
    assert (found.ids.tolist(), found.trained.tolist()) == expected
    whole = tokenizer(prompt)["input_ids"]
    assert (LEFT_OUT in notices) == (expected[1].index(1) < len(whole))


def test_a_prompt_that_loses_tokens_is_told_of_once(tokenizer, tmp_path):
    rows = [ROWS["strings whose prompt goes on in the answer's first token"]] * 3
    assert read(section(tmp_path, rows), tokenizer).notices == (LEFT_OUT,)
    assert read(section(tmp_path, [ROWS["messages"]]), tokenizer).notices == ()


def test_oumi_trains_on_the_header_and_ends_an_answer_twice(tokenizer, tmp_path):
    row = ROWS["a system prompt and two turns"]

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt = ids(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nOslo?<|im_end|>\n"
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    chosen = [*ids("<|im_start|>assistant\nIt rains.<|im_end|>\n"), end]
    rejected = [*ids("<|im_start|>assistant\nIt rains and it is four degrees.<|im_end|>\n"), end]
    found, marks = ours(tmp_path, row, tokenizer, answers="oumi")
    assert found == [*prompt, *chosen, *prompt, *rejected]
    assert marks == [*[0] * len(prompt), *[1] * len(chosen), *[0] * len(prompt), *[2] * len(rejected)]
    cut = len(prompt) + len(chosen)
    found, marks = ours(tmp_path, row, tokenizer, answers="oumi", max_length=cut)
    assert found == [*prompt, *chosen, *prompt, *rejected[: len(chosen)]]


def test_oumi_renders_strings_as_messages(tokenizer, tmp_path):
    strings = pair("Hi", "Hello!", "Thanks!")
    messages = pair([user("Hi")], [assistant("Hello!")], [assistant("Thanks!")])
    found = ours(tmp_path, strings, tokenizer, answers="oumi")
    assert found == ours(tmp_path, messages, tokenizer, answers="oumi")


def test_words_tokenised_once_are_the_words_of_their_rows(tokenizer, tmp_path):
    rows = [pair(f"The weather in Oslo {i % 7} is", f" four degrees {i}", " fine") for i in range(120)]
    data = read(section(tmp_path, rows), tokenizer)
    for index in (0, 63, 119):
        assert tuple(array.tolist() for array in data.store[index]) == of_trl(rows[index], tokenizer)


PLAIN = pair([user("Hi")], [assistant("a")], [assistant("b")])
SILENT = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
OTHERWISE = "{{ 'Q' if messages | length == 1 else 'A' }}{% for m in messages %}{{ m.content }}{% endfor %}"
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message, please') }}{% endif %}"
SYSTEM = pair([{"role": "system", "content": "s"}, user("Hi")], [assistant("a")], [assistant("b")])
BAD_ROWS = [  # after a good one
    (pair("Hi", "", " b"), {}, "trl", "chosen is empty", "empty"),
    (pair("H", "ello", "i"), {}, "trl", "no token of the prompt begins its answers' texts", "empty"),
    (SYSTEM, {"chat_template": STRICT + WITH_TOOLS}, "trl", "no system message, please", "roles"),
]
BAD_TOKENIZERS = [
    (PLAIN, {"chat_template": SILENT}, "trl", "an answer adds no token to the prompt"),
    (PLAIN, {"chat_template": None}, "trl", "the tokenizer has no chat template; set model.chat_template"),
    (PLAIN, {"chat_template": OTHERWISE}, "oumi", "otherwise once an answer follows; set trainer_kwargs.answer_tokens"),
    (PLAIN, {"eos_token": None}, "oumi", "no end-of-sequence token, with which answers must end"),
    (ROWS["strings"], {"eos_token": None}, "trl", "no end-of-sequence token, with which plain answers must end"),
]


@pytest.fixture
def changed(tokenizer_maker):
    """A function that makes the tokenizer with other attributes."""

    def make(**attributes):
        made = tokenizer_maker()
        for name, value in {"chat_template": WITH_TOOLS, **attributes}.items():
            setattr(made, name, value)
        return made

    return make


@pytest.mark.parametrize(("row", "attributes", "answers", "message", "kind"), BAD_ROWS)
def test_a_row_without_answers_to_learn_from_is_named_or_skipped(
    row, attributes, answers, message, kind, changed, tmp_path
):
    good = PLAIN if isinstance(row["prompt"], list) else ROWS["strings"]
    with pytest.raises(ValueError, match=message) as raised:
        read(section(tmp_path, [good, row]), changed(**attributes), answers=answers)
    assert str(raised.value).startswith(f"row 2 of {tmp_path}/rows.jsonl: ")
    data = read(section(tmp_path, [good, row], on_bad_row="skip"), changed(**attributes), answers=answers)
    assert (data.counts.used, data.counts.bad, data.counts.bad_kinds) == (1, 1, {kind: 1})


@pytest.mark.parametrize(("row", "attributes", "answers", "message"), BAD_TOKENIZERS)
def test_a_tokenizer_that_cannot_write_an_answer_is_told_with_the_first_row(
    row, attributes, answers, message, changed, tmp_path
):
    with pytest.raises(ValueError, match=message) as raised:
        read(section(tmp_path, [row]), changed(**attributes), answers=answers)
    assert str(raised.value).startswith(f"row 1 of {tmp_path}/rows.jsonl: ")
    assert "\n" not in str(raised.value)
