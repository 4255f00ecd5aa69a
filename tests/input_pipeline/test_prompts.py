"""Prompts from rows to a generation's batches: their tokens, what rewards see, their lengths, order and resuming."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from input_pipeline.examples import RowError
from input_pipeline.prompts import Limit, PromptBatches, prompt_feed, read_prompts
from input_pipeline.reading import Reading

GRPO = Reading(max_length=None, seed=7, trainer="TRL_GRPO")
VERL = Reading(max_length=None, seed=7, trainer="VERL_GRPO")
SYSTEM, USER = (
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "How are you?"},
)
LETTERS = {"prompt": [SYSTEM, USER], "letter_count": 1}
COUNTDOWN = {
    "ability": "math",
    "data_source": "countdown",
    "extra_info": {"split": "train"},
    "prompt": [USER],
    "reward_model": {"ground_truth": {"numbers": [79, 8], "target": 87}, "style": "rule"},
}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "It.", "parameters": {}}}


@pytest.fixture
def read(tmp_path, tokenizer):
    """Reads rows from a file of lines, as a split with these settings has them."""

    def of(*rows, reading=GRPO, name="text_sft", limit=None, template_kwargs=None, with_tokenizer=tokenizer, **split):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        entry = {"dataset_name": name, "dataset_path": str(file)}
        options = {} if limit is None else {"limit": limit}
        return read_prompts(
            {"datasets": [entry], **split}, with_tokenizer, reading=reading, template_kwargs=template_kwargs, **options
        )

    return of


class TestTokens:
    def test_a_chat_is_rendered_up_to_where_the_assistant_begins(self, read, tokenizer):
        (row,) = read(LETTERS)
        asked = tokenizer.apply_chat_template([SYSTEM, USER], add_generation_prompt=True)["input_ids"]
        assert list(row.ids) == asked
        assert tokenizer.decode(row.ids).endswith("How are you?<|im_end|>\n<|im_start|>assistant\n")

    def test_a_string_is_tokenised_as_it_stands_with_the_tokenizers_special_tokens(self, read, tokenizer_maker):
        from tokenizers import processors

        own = tokenizer_maker()
        own.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", own.convert_tokens_to_ids("<|endoftext|>"))]
        )
        string, chat = read({"prompt": "How are you?"}, {"prompt": [USER]}, with_tokenizer=own)
        assert list(string.ids) == own(text="How are you?")["input_ids"]
        assert own.decode(string.ids) == "<|endoftext|>How are you?"
        assert own.decode(chat.ids).startswith("<|im_start|>")

    def test_tools_and_variables_of_the_template_are_rendered_and_a_rows_own_win(self, read, tokenizer_maker):
        own = tokenizer_maker()
        own.chat_template = "{{ tools[0].function.name if tools }} {{ a }} {{ b }} {{ messages[0].content }}:"
        row = {"prompt": [USER], "tools": [TOOL], "chat_template_kwargs": {"b": "row's"}}
        (asked,) = read(row, with_tokenizer=own, template_kwargs={"a": "all's", "b": "all's"})
        assert own.decode(asked.ids) == "get_weather all's row's How are you?:"
        assert asked.columns == {}

    def test_a_template_that_does_not_render_tools_is_told_of(self, read):
        assert "does not render tool definitions" in read({"prompt": [USER], "tools": [TOOL]}).notices[0]

    def test_many_rows_are_tokenised_as_few_are(self, read):
        rows = [{"prompt": [{"role": "user", "content": f"What is the weather in {n}?"}]} for n in range(120)]
        many = [row.ids for row in read(*rows)]
        assert many == [read(row)[0].ids for row in rows]


class TestWhatRewardsSee:
    def test_messages_stay_messages_and_other_fields_are_columns(self, read):
        (row,) = read(LETTERS)
        assert row.prompt == (SYSTEM, USER)
        assert row.columns == {"letter_count": 1}
        assert (row.row, row.place.startswith("row 1 of "), row.place.endswith("rows.jsonl")) == (0, True, True)

    def test_strings_stay_strings_with_the_set_of_summaries_stripped(self, read):
        (row,) = read({"prompt": "POST: a\n\nTL;DR:  ", "completion": " b"}, name="trl-lib/tldr")
        assert (row.prompt, row.columns) == ("POST: a\n\nTL;DR:", {"completion": "b"})

    def test_verls_rows_bring_what_its_reward_functions_are_called_with(self, read):
        for reading in (GRPO, VERL):
            (row,) = read(COUNTDOWN, reading=reading)
            assert row.prompt == (USER,)
            assert row.columns == {name: value for name, value in COUNTDOWN.items() if name != "prompt"}

    @pytest.mark.parametrize("name", ["gsm8k", "openai/gsm8k"])
    def test_questions_with_answers_become_verls_rows(self, read, name):
        row = {"question": "How many?", "answer": "Two.\n#### 1,002"}
        (asked,) = read(row, name=name, reading=VERL)
        assert asked.columns["reward_model"] == {"style": "rule", "ground_truth": "1002"}
        assert asked.prompt[0]["content"].startswith("How many? Let's think step by step")


class TestLength:
    ROWS = ({"prompt": "ab"}, {"prompt": "abcd"}, {"prompt": "abcdefg"})

    @pytest.mark.parametrize(
        ("too_long", "texts"),
        [
            ("left", ["ab", "abcd", "defg"]),
            ("right", ["ab", "abcd", "abcd"]),
            ("middle", ["ab", "abcd", "abfg"]),
            ("leave_out", ["ab", "abcd"]),
        ],
    )
    def test_longer_prompts_are_cut_or_left_out_and_counted(self, read, tokenizer_maker, too_long, texts):
        letters = tokenizer_maker(vocabulary=261)  # no merges: a letter is a token
        prompts = read(*self.ROWS, limit=Limit(4, too_long), with_tokenizer=letters)
        assert [letters.decode(row.ids) for row in prompts] == texts
        assert (prompts.counts.over_long, prompts.counts.used, prompts.longest) == (1, len(texts), 4)
        assert prompts.counts.untrained == 3 - len(texts)
        assert prompts.notices[0].startswith("prompts of more than 4 tokens: 1 of 3, ")

    def test_the_middle_is_cut_so_that_the_longer_half_is_the_second(self):
        assert Limit(3, "middle").cut(np.arange(7)).tolist() == [0, 5, 6]
        assert Limit(1, "middle").cut(np.arange(7)).tolist() == [6]

    def test_without_a_limit_all_of_a_prompt_is_kept(self, read):
        (row,) = read({"prompt": "?" * 3000})
        assert len(row.ids) > 1000

    def test_as_an_error_it_names_the_row_and_its_tokens(self, read, tokenizer_maker):
        letters = tokenizer_maker(vocabulary=261)
        with pytest.raises(RowError, match=r"row 3 of .*rows.jsonl: the prompt has 7 tokens; allowed: at most 4"):
            read(*self.ROWS, limit=Limit(4, "error"), with_tokenizer=letters)


class TestBadRows:
    ROWS = ({"prompt": "a"}, "no json", {"prompt": [{"role": "king", "content": "b"}]}, {"prompt": "c"})

    def test_the_first_is_an_error_with_its_place(self, read):
        with pytest.raises(RowError, match=r"rows\.jsonl:2:1: not valid JSON"):
            read(*self.ROWS)

    def test_they_are_skipped_and_counted_on_request(self, read):
        prompts = read(*self.ROWS, on_bad_row="skip", max_bad_row_fraction=0.6)
        assert [(row.row, row.prompt, row.place.split(" of ")[0]) for row in prompts] == [
            (0, "a", "row 1"),
            (1, "c", "row 4"),
        ]
        assert prompts.counts.bad_kinds == {"json": 1, "roles": 1}

    def test_too_many_of_them_are_an_error(self, read):
        with pytest.raises(ValueError, match=r"2 of 4 rows are bad, more than max_bad_row_fraction 0\.25"):
            read(*self.ROWS, on_bad_row="skip", max_bad_row_fraction=0.25)

    def test_no_usable_prompt_is_an_error_with_the_counts(self, read):
        with pytest.raises(ValueError, match=r"0 usable prompts \(read 1, bad 0, longer than 2 tokens: 1\)"):
            read({"prompt": "a b c d e f"}, limit=Limit(2, "leave_out"))

    @pytest.mark.parametrize("key", ["stream", "pack"])
    def test_what_is_to_come_is_named(self, read, key):
        with pytest.raises(NotImplementedError, match=f"not implemented yet: data.train.{key} with TRL_GRPO"):
            read({"prompt": "a"}, **{key: True})

    def test_chats_need_a_template(self, read, tokenizer_maker):
        with pytest.raises(RowError, match=r"row 1 of .*: the tokenizer has no chat template; set model.chat_template"):
            read(LETTERS, with_tokenizer=tokenizer_maker(template=None))


@pytest.fixture(scope="module")
def feed_of(tmp_path_factory, tokenizer):
    """A feed of so many prompts, "0", "1", …"""

    def make(count, **options):
        file = tmp_path_factory.getbasetemp() / f"prompts-{count}.jsonl"
        file.write_text("".join(json.dumps({"prompt": str(n), "n": n}) + "\n" for n in range(count)))
        data = {"train": {"datasets": [{"dataset_name": "text_sft", "dataset_path": str(file)}]}}
        return prompt_feed(data, tokenizer, reading=GRPO, **{"epochs": None, **options})

    return make


def numbers(batch):
    return [row.columns["n"] for row in batch]


class TestBatches:
    def test_an_epoch_asks_every_prompt_once_and_leaves_out_what_fills_no_batch(self, feed_of):
        feed = feed_of(11, prompts_per_generation=4, epochs=1.5)
        assert (feed.generations_per_epoch, feed.generations, len(feed.prompts)) == (2, 3, 11)
        epochs = [[*numbers(next(feed.batches)), *numbers(next(feed.batches))] for _ in range(3)]
        assert all(len(set(epoch)) == 8 and set(epoch) <= set(range(11)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 3

    def test_the_order_is_that_of_the_rows_where_it_is_asked_for(self, feed_of):
        feed = feed_of(5, prompts_per_generation=2, shuffle_rows=False)
        assert [numbers(next(feed.batches)) for _ in range(3)] == [[0, 1], [2, 3], [0, 1]]
        assert feed.generations is None

    @settings(max_examples=15, deadline=None)
    @given(size=st.integers(1, 11), done=st.integers(0, 9))
    def test_a_state_in_json_goes_on_with_the_same_prompts(self, feed_of, size, done):
        one, other = (feed_of(11, prompts_per_generation=size).batches for _ in range(2))
        list(itertools.islice(one, done))
        other.set_state(json.loads(json.dumps(one.get_state())))
        for _ in range(12 // size + 2):
            assert next(one) == next(other)
            assert one.rows == other.rows

    def test_a_state_of_other_data_is_refused(self, feed_of):
        state = feed_of(11, prompts_per_generation=4).batches.get_state()
        with pytest.raises(ValueError, match="prompts_per_generation 4 → 3"):
            feed_of(11, prompts_per_generation=3).batches.set_state(state)

    def test_more_prompts_than_there_are_cannot_be_asked(self, feed_of):
        with pytest.raises(ValueError, match="a generation asks 12 prompts, and the data have 11"):
            feed_of(11, prompts_per_generation=12)

    def test_a_mixture_is_drawn_as_for_other_methods(self, tmp_path, tokenizer):
        entries = []
        for name, share in (("a", 0.75), ("b", 0.25)):
            file = tmp_path / f"{name}.jsonl"
            file.write_text("".join(json.dumps({"prompt": f"{name}{n}", "of": name}) + "\n" for n in range(40)))
            entries.append({"dataset_name": "text_sft", "dataset_path": str(file), "mixture_proportion": share})
        prompts = read_prompts({"datasets": entries}, tokenizer, reading=GRPO)
        of = [row.columns["of"] for row in prompts]
        assert prompts.names == tuple(entry["dataset_path"] for entry in entries)
        assert 0.6 < of.count("a") / len(of) < 0.9
        assert next(PromptBatches(prompts, size=2, seed=None))[0].place.startswith("row 1 of ")

    def test_rows_kept_in_the_cache_are_the_same(self, tmp_path, tokenizer, monkeypatch):
        from input_pipeline import store

        monkeypatch.setattr(store, "_KEPT_FROM", 10)  # tokens from which on they are kept
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps({**LETTERS, "letter_count": n}) + "\n" for n in range(5)))
        split = {"datasets": [{"dataset_name": "text_sft", "dataset_path": str(file)}]}
        reading = Reading(max_length=None, seed=7, trainer="TRL_GRPO", cache=tmp_path / "cache")
        first, again = (read_prompts(split, tokenizer, reading=reading) for _ in range(2))
        assert list(first) == list(again)
        assert isinstance(again.store.ids, np.memmap)
