"""Datasets that go by a name, columns that are renamed, and functions that rows go through, all up to the example."""

import json
import pickle

import pytest

from input_pipeline import formats, known
from input_pipeline.catalog import Entry, open_dataset, open_stream
from input_pipeline.examples import BAD_KINDS, Chat, Completion, Feedback, Preference, Prompt, RowError, Text
from input_pipeline.functions import named_function
from input_pipeline.store import Encoder, Row


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def turns(question, answer):
    return Chat(messages=(user(question), assistant(answer)))


@pytest.fixture
def opened(tmp_path):
    """Opens rows as the rows of a named dataset."""

    def open_as(name, *rows, trainer="TRL_SFT", split="train", text_field="text", **kwargs):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        entry = Entry(dataset_name=name, dataset_path=str(path), split=split, dataset_kwargs=kwargs)
        return open_dataset(entry, trainer=trainer, text_field=text_field)

    return open_as


COUNTDOWN = {  # the documentation's row, word for word
    "ability": "math",
    "data_source": "countdown",
    "extra_info": {"split": "train"},
    "prompt": [
        {
            "content": "A conversation between User and Assistant. The user asks a question, and the Assistant solves"
            " it. The assistant first thinks about the reasoning process in the mind and then provides the user with"
            " the answer.\nUser: Using the numbers [79, 8], create an equation that equals 87. You can use basic"
            " arithmetic operations (+, -, *, /) and each number can only be used once. Show your work in <think>"
            " </think> tags. And return the final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3"
            " </answer>.\nAssistant: Let me solve this step by step.\n<think>",
            "role": "user",
        }
    ],
    "reward_model": {"ground_truth": {"numbers": [79, 8], "target": 87}, "style": "rule"},
}


@pytest.mark.parametrize("name", ["d1shs0ap/countdown", "Jiayi-Pan/Countdown-Tasks-3to4"])
def test_countdown_is_the_documentations_row(opened, name):
    columns = {key: value for key, value in COUNTDOWN.items() if key != "prompt"}
    dataset = opened(name, {"target": 87, "nums": [79, 8]}, trainer="VERL_GRPO", split="train[:1]")
    assert dataset.example(0) == Prompt(prompt=tuple(COUNTDOWN["prompt"]), columns=columns)
    assert opened(name, {"target": 87, "nums": [79, 8]}, trainer="TRL_GRPO").example(0).columns == columns


def test_gsm8k_asks_for_steps_and_knows_the_number_after_the_hashes(opened):
    row = {"question": "How many?", "answer": "10 * 123 = 1,230\n#### 1,230"}
    assert opened("openai/gsm8k", row, trainer="VERL_GRPO", split="test").example(0) == Prompt(
        prompt=(user('How many? Let\'s think step by step and output the final answer after "####".'),),
        columns={
            "data_source": "openai/gsm8k",
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "1230"},
            "extra_info": {"split": "test", "answer": row["answer"], "question": "How many?"},
        },
    )


def test_letter_counts_ask_for_a_boxed_number_as_in_the_documentation(opened):
    question = user("Could you determine the count of 'l's in 'substantial'?")
    row = {"messages": [question], "metadata": {"letter": "l", "letter_count_integer": 1}}
    system = {
        "content": 'Your final answer should be an integer written as digits and formatted as "\\boxed{your_answer}".'
        ' For example, if the answer is 42, you should output "\\boxed{42}".',
        "role": "system",
    }
    for name in ("oumi-ai/oumi-letter-count", "oumi-ai/oumi-letter-count-clean"):
        example = opened(name, row, trainer="TRL_GRPO").example(0)
        assert example == Prompt(prompt=(system, question), columns={"letter_count": 1})


def test_tldr_is_read_as_the_trainer_needs_it(opened):
    row = {"prompt": " Long. \n", "completion": "\nShort."}
    assert opened("trl-lib/tldr", row).example(0) == Completion(prompt="Long.", completion="Short.")
    example = opened("trl-lib/tldr", row, trainer="TRL_GRPO").example(0)
    assert example == Prompt(prompt="Long.", columns={"completion": "Short."})


@pytest.mark.parametrize(
    ("name", "row", "example"),
    [
        (
            "databricks/databricks-dolly-15k",
            {"instruction": "a", "context": "b", "response": "c"},
            turns("a\n\nb", "c"),
        ),
        (
            "argilla/databricks-dolly-15k-curated-en",
            {"new-instruction": {"value": ["a"]}, "new-context": {"value": ["b"]}, "new-response": {"value": ["c"]}},
            turns("a\n\nContext: b", "c"),
        ),
        ("CohereForAI/aya_dataset", {"inputs": "a", "targets": "b", "language": "Zulu"}, turns("a", "b")),
        ("argilla/magpie-ultra-v0.1", {"instruction": "a", "response": "b", "input": "no part of it"}, turns("a", "b")),
        (
            "Magpie-Align/Magpie-Pro-300K-Filtered",
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            turns("a", "b"),
        ),
        ("O1-OPEN/OpenO1-SFT", {"instruction": "a", "output": "b"}, turns("a", "b")),
        ("allenai/tulu-3-sft-mixture", {"id": "1", "messages": [user("a"), assistant("b")]}, turns("a", "b")),
        ("allenai/WildChat-1M", {"conversation": [user("a"), assistant("b")], "turn": 1}, turns("a", "b")),
        ("HuggingFaceH4/ultrachat_200k", {"prompt": "a", "messages": [user("a"), assistant("b")]}, turns("a", "b")),
        ("PromptResponseDataset", {"instruction": "a", "output": "b", "input": "x"}, turns("a", "b")),
        ("HuggingFaceDataset", {"messages": [user("a"), assistant("b")]}, turns("a", "b")),
        ("allenai/c4", {"text": "a", "url": "b"}, Text(text="a")),
        ("bigcode/starcoderdata", {"content": "a", "text": "b"}, Text(text="a")),
        ("togethercomputer/RedPajama-Data-V2", {"raw_content": "a"}, Text(text="a")),
        ("HUGGINGFACEFW/FineWeb-Edu", {"text": "a"}, Text(text="a")),
        ("text", {"text": "a", "messages": "b"}, Text(text="a")),
    ],
)
def test_sets_of_the_hub_are_read_by_their_own_columns(opened, name, row, example):
    assert opened(name, row).example(0) == example


def test_an_alpaca_row_without_an_answer_is_trained_on_where_the_set_is_known_to_have_them(opened):
    row = {"instruction": "a", "input": "", "output": ""}
    assert opened("tatsu-lab/alpaca", row).example(0).messages[-1] == assistant("")
    with pytest.raises(RowError, match="output is empty"):
        opened("text_sft", row).example(0)


def test_blank_lines_of_wikitext_are_left_out(opened):
    dataset = opened("Salesforce/wikitext", {"text": ""}, {"text": " \n"}, {"text": " = Einkorn = \n"})
    assert [dataset.example(i) for i in range(3)] == [None, None, Text(text=" = Einkorn = \n")]


@pytest.mark.parametrize(
    ("name", "trainer", "first", "rows"),
    [
        (
            "debug_sft",
            "TRL_SFT",
            turns("Hello, how are you? (Document number 0)", "I'm fine, thank you! (Document number 0)"),
            5,
        ),
        (
            "debug_dpo",
            "TRL_DPO",
            Preference(
                prompt="Hello, how are you? (Document number 0)",
                chosen="I'm fine, thank you! (Document number 0)",
                rejected="fine (Document number 0)",
            ),
            5,
        ),
        (
            "debug_kto",
            "TRL_KTO",
            Feedback(
                prompt="Hello, how are you? (Document number 0)",
                completion="I'm fine, thank you! (Document number 0)",
                label=True,
            ),
            5,
        ),
        ("debug_pretraining", "OUMI", Text(text="This is document number 0."), 1000),
    ],
)
def test_made_up_sets_are_oumis(name, trainer, first, rows):
    dataset = open_dataset(Entry(dataset_name=name), trainer=trainer)
    assert (len(dataset), dataset.example(0)) == (rows, first)
    few = open_dataset(Entry(dataset_name=name, dataset_kwargs={"dataset_size": 3}), trainer=trainer)
    assert len(few) == 3
    assert Entry(dataset_name=name).is_local
    with pytest.raises(ValueError, match=r"dataset_kwargs.dataset_size must be a whole number above 0, not 0"):
        open_dataset(Entry(dataset_name=name, dataset_kwargs={"dataset_size": 0}), trainer=trainer)
    with pytest.raises(ValueError, match=r"dataset_kwargs.dataset_sise is unknown; did you mean 'dataset_size'\?"):
        open_dataset(Entry(dataset_name=name, dataset_kwargs={"dataset_sise": 3}), trainer=trainer)


def test_any_set_is_read_through_the_path_in_dataset_kwargs(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"q": "a", "a": "b", "dialog": [user("a"), assistant("b")]}) + "\n")
    pair = {"hf_dataset_path": str(path), "prompt_column": "q", "response_column": "a"}
    assert open_dataset(Entry(dataset_name="PromptResponseDataset", dataset_kwargs=pair)).example(0) == turns("a", "b")
    chat = {"hf_dataset_path": str(path), "messages_column": "dialog"}
    assert open_dataset(Entry(dataset_name="HuggingFaceDataset", dataset_kwargs=chat)).example(0) == turns("a", "b")
    with pytest.raises(ValueError, match=r"name it in dataset_kwargs.hf_dataset_path$"):
        open_dataset(Entry(dataset_name="HuggingFaceDataset"))


@pytest.mark.parametrize(
    ("trainer", "row", "kwargs", "example"),
    [
        (
            "TRL_SFT",
            {"q": "a", "r": "b", "input": "x"},
            {"prompt_column": "q", "response_column": "r"},
            turns("a", "b"),
        ),
        (
            "TRL_SFT",
            {"q": "a", "r": "b", "c": "x"},
            {"prompt_column": "q", "response_column": "r", "input_column": "c"},
            turns("a\n\nx", "b"),
        ),
        (
            "TRL_SFT",
            {"q": "a", "r": "b"},
            {"prompt_column": "q", "response_column": "r", "format": "prompt_completion"},
            Completion(prompt="a", completion="b"),
        ),
        ("TRL_SFT", {"chat": [user("a"), assistant("b")]}, {"messages_column": "chat"}, turns("a", "b")),
        ("OUMI", {"body": "a", "text": "b"}, {"text_col": "body", "format": "text"}, Text(text="a")),
        ("OUMI", {"body": "a"}, {"dataset_text_field": "body"}, Text(text="a")),
        (
            "TRL_DPO",
            {"q": "a", "good": "b", "bad": "c"},
            {"prompt_column": "q", "chosen_column": "good", "rejected_column": "bad"},
            Preference(prompt="a", chosen="b", rejected="c"),
        ),
        (
            "TRL_KTO",
            {"q": "a", "r": "b", "ok": 1},
            {"prompt_column": "q", "response_column": "r", "label_column": "ok"},
            Feedback(prompt="a", completion="b", label=True),
        ),
        (
            "TRL_GRPO",
            {"q": "a", "truth": 3},
            {"prompt_column": "q"},
            Prompt(prompt="a", columns={"q": "a", "truth": 3}),
        ),
    ],
)
def test_columns_go_by_the_names_that_dataset_kwargs_gives(opened, trainer, row, kwargs, example):
    assert opened("text_sft", row, trainer=trainer, **kwargs).example(0) == example


def test_a_text_column_that_the_trainer_names_is_read_before_the_known_one(opened):
    row = {"content": "a", "text": "b", "body": "c"}
    assert opened("bigcode/the-stack", row, text_field="body").example(0) == Text(text="c")
    assert opened("bigcode/the-stack", row, text_col="text").example(0) == Text(text="b")


def test_a_corpus_whose_text_stands_in_another_column_is_told_how_to_name_it(opened):
    with pytest.raises(
        RowError, match=r"has no field 'text'; its fields are \['body'\]. Name the text's in dataset_kw"
    ):
        opened("text", {"body": "a"}, trainer="OUMI").example(0)


@pytest.mark.parametrize(
    ("name", "trainer", "kwargs", "error"),
    [
        (
            "text_sft",
            "TRL_SFT",
            {"promt_column": "q"},
            "dataset_kwargs.promt_column is unknown; did you mean 'prompt_col",
        ),
        ("text_sft", "TRL_SFT", {"format": "chat"}, "unknown row format 'chat'; known: conversation, sharegpt,"),
        (
            "text_sft",
            "TRL_SFT",
            {"format": "conversation", "label_column": "ok"},
            "dataset_kwargs.label_column says nothing about rows of format conversation; there: messages_column",
        ),
        (
            "text_sft",
            "TRL_SFT",
            {"format": "preference"},
            "rows are preference pairs: they are for training.trainer_type TRL_DPO; TRL_SFT trains {messages},",
        ),
        (
            "preference_pairs_jsonl",
            "TRL_SFT",
            {},
            "rows are preference pairs: they are for training.trainer_type TRL_DPO; TRL_SFT trains {messages},",
        ),
        (
            "text_sft",
            "TRL_DPO",
            {"label_column": "ok"},
            "rows are answers with a label: they are for training.trainer_typ",
        ),
        ("text_sft", "TRL_SFT", {"transform": "none.py:f"}, "dataset_kwargs.transform names the file 'none.py', which"),
    ],
)
def test_dataset_kwargs_that_do_not_go_together_are_answered(opened, name, trainer, kwargs, error):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (its words are compared below)
        opened(name, {"messages": [user("a"), assistant("b")]}, trainer=trainer, **kwargs)
    assert str(raised.value).startswith(error)


def test_a_key_of_a_set_on_the_hub_that_is_nearly_one_of_ours_is_no_argument_of_the_loader():
    with pytest.raises(ValueError, match=r"dataset_kwargs.respons_column is unknown; did you mean 'response_column'\?"):
        open_dataset(Entry(dataset_name="some/set", dataset_kwargs={"respons_column": "r"}))


def test_a_column_that_a_row_lacks_is_named_with_the_row(opened):
    dataset = opened("text_sft", {"q": "a", "r": "b"}, {"q": "a"}, prompt_column="q", response_column="r")
    assert dataset.example(0) == turns("a", "b")
    with pytest.raises(RowError, match=r"^row 2 of .*: has no column 'r'; its columns are \['q'\]$"):
        dataset.example(1)


TRANSFORM = """
def shape(row):
    if row["score"] < 3:
        return None
    if row["score"] > 8:
        return [row]
    return {"messages": [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]}
"""


@pytest.fixture
def transform(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(TRANSFORM)
    return f"{path}:shape"


def test_rows_go_through_the_users_function_which_may_leave_them_out(opened, transform):
    rows = [{"score": score, "q": "a", "a": "b"} for score in (1, 5)]
    dataset = opened("text_sft", *rows, transform=transform)
    assert dataset.meaning.format == "conversation"
    assert [dataset.example(i) for i in range(2)] == [None, turns("a", "b")]
    assert pickle.loads(pickle.dumps(dataset.meaning)).example(rows[1], lambda: "row") == turns("a", "b")  # noqa: S301


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"q": "a"}, "shape raised KeyError: 'score'"),
        ({"score": "x"}, "shape raised TypeError: '<' not supported between instances of 'str' and 'int'"),
        ({"score": 9}, "shape must return a row (an object) or None, not [{'score': 9}]"),
    ],
)
def test_what_the_users_function_raises_or_returns_amiss_names_the_row(opened, transform, row, error):
    dataset = opened("text_sft", {"score": 5, "q": "a", "a": "b"}, row, transform=transform)
    with pytest.raises(RowError) as raised:
        dataset.example(1)
    assert str(raised.value).startswith("row 2 of ")
    assert str(raised.value).endswith(error)
    assert raised.value.kind == "transform"
    assert raised.value.kind in BAD_KINDS


def test_another_version_of_the_function_is_another_meaning(opened, transform, tmp_path):
    before = opened("text_sft", {"score": 5, "q": "a", "a": "b"}, transform=transform).meaning
    other = tmp_path / "other.py"
    other.write_text(TRANSFORM.replace("< 3", "< 4"))
    after = opened("text_sft", {"score": 5, "q": "a", "a": "b"}, transform=f"{other}:shape").meaning
    assert before.reshape.code != after.reshape.code
    assert repr(before) != repr(after)


def test_rows_that_are_left_out_are_counted_apart_from_bad_ones(opened, transform, tokenizer):
    from input_pipeline.chat import LossMask
    from input_pipeline.template import Template

    rows = [{"score": score, "q": "a", "a": "b"} for score in (5, 1, 2, 9)]
    encoder = Encoder(
        meanings=(opened("text_sft", *rows, transform=transform).meaning,),
        masks=(LossMask(),),
        template=Template(tokenizer),
        max_length=None,
        skip_bad_rows=True,
    )
    counts = encoder([Row(row, 0, lambda: "row") for row in rows]).counts
    assert (counts.read, counts.used, counts.left_out, counts.bad, counts.untrained) == (4, 1, 2, 1, 0)


def test_keys_of_oumis_pretraining_sets_are_taken_and_said_to_have_no_effect(opened):
    meaning = opened("allenai/c4", {"text": "a"}, trainer="OUMI", seq_length=2048, skip_last=True).meaning
    assert meaning.notices == (
        "dataset_kwargs.seq_length has no effect here: rows are as long as model.model_max_length says",
        "dataset_kwargs.skip_last has no effect here: the last tokens of a corpus are kept",
    )


@pytest.mark.parametrize("name", known.KNOWN)
def test_what_the_table_of_known_sets_names_is_there(name):
    listed = known.known(name)
    assert listed.format is None or listed.format in formats.FORMATS
    assert listed.transform is None or callable(getattr(known, listed.transform))
    assert listed.rows is None or callable(named_function(listed.rows, key="rows"))
    assert known.known(name.upper()) == listed


def test_a_stream_has_the_meaning_of_the_rows_by_index(opened, transform, tmp_path):
    rows = [{"score": score, "q": "a", "a": "b"} for score in (1, 5, 2)]
    dataset = opened("text_sft", *rows, transform=transform)
    kwargs = {"transform": transform}
    for entry in (
        Entry(dataset_name="text_sft", dataset_path=str(tmp_path / "rows.jsonl"), dataset_kwargs=kwargs),
        Entry(
            dataset_name="HuggingFaceDataset", dataset_kwargs={"hf_dataset_path": str(tmp_path / "rows.jsonl")} | kwargs
        ),
    ):
        stream = open_stream(entry)
        found = [stream.meaning.example(r.row, lambda: "row") for shard in stream.shards for r in shard.read()]
        assert found == [None, turns("a", "b"), None] == [dataset.example(i) for i in range(3)]
    made_up = open_stream(Entry(dataset_name="debug_sft", dataset_kwargs={"dataset_size": 2}))
    assert sum(1 for shard in made_up.shards for _ in shard.read()) == 2
