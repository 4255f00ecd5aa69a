"""Tokens and what is trained of them, against TRL's own preparation of the same rows."""

import datasets
import numpy as np
import pytest
import torch
import transformers
import trl

from input_pipeline.chat import LossMask, Rendered, Trained, render
from input_pipeline.encode import common_prefix, encode, token_bounds
from input_pipeline.examples import Chat, Completion, Text
from input_pipeline.template import Template

PAIRS = [
    ("2 + 2 =", " 4"),
    ("The weather in Os", "lo is fine"),  # the prompt's last token is another one in the whole
    ("Question: how?\nAnswer: ", "well"),  # and so it is here: the space goes to the answer
    ("Empty:", ""),
    ("Ended:", "yes<|im_end|>"),
    ("long " * 40, "cut off"),
]
TEXTS = ["Once upon a time.", "Ended.<|im_end|>", "", "The weather in Oslo today? " * 10]
CHATS = [
    [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "And the weather?"},
        {"role": "assistant", "content": "It rains. " * 20},
    ],
]


def trl_rows(rows, tokenizer, path, max_length, **kwargs):
    """The rows as TRL prepares them: lists of ids and of labels."""
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    arguments = trl.SFTConfig(
        output_dir=str(path), max_length=max_length, bf16=False, use_cpu=True, report_to="none", **kwargs
    )
    trainer = trl.SFTTrainer(
        model=transformers.LlamaForCausalLM(config),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


def our_rows(examples, tokenizer, max_length, mask):
    """The same of ours: labels are -100 where a token is not trained, rows without a label are left out."""
    rendered = [render(example, Template(tokenizer), mask) for example in examples]
    rows = encode(rendered, tokenizer, max_length=max_length)
    labelled = [(row.ids.tolist(), np.where(row.trained, row.ids, -100).tolist()) for row in rows]
    return [(ids, labels) for ids, labels in labelled if any(label != -100 for label in labels)]


@pytest.fixture(scope="module")
def oracle_tokenizer(tokenizer_maker):
    torch.manual_seed(0)
    return tokenizer_maker()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
class TestAsTRL:
    @pytest.mark.parametrize("max_length", [None, 24])
    @pytest.mark.parametrize("completion_only", [None, False])
    def test_prompts_with_completions(self, oracle_tokenizer, tmp_path, max_length, completion_only):
        rows = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
        expected = trl_rows(rows, oracle_tokenizer, tmp_path, max_length, completion_only_loss=completion_only)
        examples = [Completion(prompt=prompt, completion=completion) for prompt, completion in PAIRS]
        assert our_rows(examples, oracle_tokenizer, max_length, LossMask("all", completion_only)) == expected

    @pytest.mark.parametrize("max_length", [None, 16])
    def test_plain_text(self, oracle_tokenizer, tmp_path, max_length):
        expected = trl_rows([{"text": text} for text in TEXTS], oracle_tokenizer, tmp_path, max_length)
        examples = [Text(text=text) for text in TEXTS]
        assert our_rows(examples, oracle_tokenizer, max_length, LossMask()) == expected

    @pytest.mark.parametrize("max_length", [None, 30])
    def test_chats(self, oracle_tokenizer, tmp_path, max_length):
        expected = trl_rows([{"messages": chat} for chat in CHATS], oracle_tokenizer, tmp_path, max_length)
        examples = [Chat(messages=tuple(chat)) for chat in CHATS]
        assert our_rows(examples, oracle_tokenizer, max_length, LossMask()) == expected

    def test_conversational_prompts_with_completions(self, oracle_tokenizer, tmp_path):
        rows = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in CHATS]
        expected = trl_rows(rows, oracle_tokenizer, tmp_path, None)
        examples = [Chat(messages=tuple(chat), prompt_messages=len(chat) - 1) for chat in CHATS]
        assert our_rows(examples, oracle_tokenizer, None, LossMask()) == expected

    def test_assistant_turns_of_a_template_with_generation_blocks(self, tokenizer_maker, tmp_path):
        tokenizer = tokenizer_maker(template="default_gen")
        rows = [{"messages": chat} for chat in CHATS]
        expected = trl_rows(rows, tokenizer, tmp_path, None, assistant_only_loss=True)
        examples = [Chat(messages=tuple(chat)) for chat in CHATS]
        assert our_rows(examples, tokenizer, None, LossMask("assistant")) == expected


def test_a_token_is_trained_if_it_begins_in_a_span_or_reaches_into_one(tokenizer):
    text = "What is the weather"
    pieces = [tokenizer.decode([i]) for i in tokenizer(text)["input_ids"]]
    assert pieces[-2:] == [" the", " weather"]
    for start, expected in (
        (7, [" the", " weather"]),
        (8, [" the", " weather"]),
        (11, [" weather"]),
        (12, [" weather"]),
    ):
        (row,) = encode([Rendered(text, False, (Trained(start, len(text)),))], tokenizer, max_length=None)
        assert [tokenizer.decode([i]) for i in row.ids[row.trained]] == expected
    (row,) = encode([Rendered(text, False, (Trained(7, 11),))], tokenizer, max_length=None)
    assert [tokenizer.decode([i]) for i in row.ids[row.trained]] == [" the"]


def test_characters_that_no_token_claims_belong_to_the_token_after_them():
    starts, ends = token_bounds([(0, 0), (0, 3), (4, 7), (7, 7), (9, 12)])
    assert starts.tolist() == [0, 0, 3, 7, 7]
    assert ends.tolist() == [0, 3, 7, 7, 12]


def test_what_is_cut_off_is_cut_after_the_labels_and_said(tokenizer):
    example = Completion(prompt="2 + 2 =", completion=" 4")
    rendered = render(example, Template(tokenizer), LossMask())
    whole, cut = (encode([rendered], tokenizer, max_length=n)[0] for n in (None, 4))
    assert (whole.over_long, cut.over_long) == (False, True)
    assert cut.ids.tolist() == whole.ids.tolist()[:4]
    assert not cut.trained.any()
    assert not encode([rendered], tokenizer, max_length=len(whole.ids))[0].over_long


def test_the_common_prefix_of_two_sequences():
    assert [common_prefix([1, 2, 3], b) for b in ([1, 2, 3, 4], [1, 2], [1, 5, 3], [7], [])] == [3, 2, 1, 0, 0]
