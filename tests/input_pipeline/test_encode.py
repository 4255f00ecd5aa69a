"""Tokens and what is trained of them, against TRL's own preparation of the same rows."""

import datasets
import numpy as np
import pytest
import torch
import transformers
import trl
from hypothesis import given
from hypothesis import strategies as st

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


class TestTokenizersLibraryAskedDirectly:
    """Transformers' wrapper is left out where it adds nothing; the ids must be those that it gives."""

    @given(texts=st.lists(st.text(max_size=60), min_size=1, max_size=4), special_tokens=st.booleans())
    def test_the_ids_are_those_of_transformers(self, tokenizer, texts, special_tokens):
        rows = encode([Rendered(text, special_tokens, None) for text in texts], tokenizer, max_length=None)
        wrapped = tokenizer(texts, add_special_tokens=special_tokens)["input_ids"]
        assert [row.ids.tolist() for row in rows] == wrapped

    @given(text=st.text(max_size=60))
    def test_offsets_do_not_change_the_ids(self, tokenizer, text):
        text = f"<|im_start|>user\n{text}<|im_end|>"
        masked, all_trained = (
            encode([Rendered(text, False, spans)], tokenizer, max_length=None)[0] for spans in ((Trained(0, 5),), None)
        )
        assert masked.ids.tolist() == all_trained.ids.tolist()

    def test_a_truncation_or_padding_left_in_the_tokenizer_is_not_applied(self, tokenizer_maker):
        tokenizer = tokenizer_maker()
        texts = ["The weather in Oslo today", "?"]
        expected = [row.ids.tolist() for row in encode_texts(texts, tokenizer)]
        tokenizer(texts, truncation=True, max_length=3, padding="max_length")
        assert [row.ids.tolist() for row in encode_texts(texts, tokenizer)] == expected

    def test_a_tokenizer_with_steps_of_its_own_is_asked_through_them(self, tokenizer_maker):
        class Lower(transformers.PreTrainedTokenizerFast):
            def _encode_plus(self, text, *args, **kwargs):
                return super()._encode_plus([t.lower() for t in text], *args, **kwargs)

        plain = tokenizer_maker()
        lower = Lower(tokenizer_object=plain.backend_tokenizer, eos_token="<|im_end|>")
        for spans in (None, (Trained(0, 3),)):
            (row,) = encode([Rendered("OSLO", False, spans)], lower, max_length=None)
            assert row.ids.tolist() == plain("oslo")["input_ids"]


def encode_texts(texts, tokenizer, max_length=None):
    template = Template(tokenizer)
    return encode([render(Text(text=text), template, LossMask()) for text in texts], tokenizer, max_length=max_length)


@given(text=st.text(alphabet="abc é€😀 ", max_size=40), length=st.integers(1, 30))
def test_the_bytes_of_a_row_are_those_of_the_text_that_its_tokens_spell(tokenizer, text, length):
    whole, cut = (encode_texts([text], tokenizer, max_length)[0] for max_length in (None, length))
    assert whole.text_bytes == len(text.encode())  # without the end-of-sequence token
    ids = whole.ids[:length].tolist()
    spelled = tokenizer.decode(ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids)
    assert cut.text_bytes == len(spelled.encode())
