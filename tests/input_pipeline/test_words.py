"""Texts tokenised word by word: always the tokenizer's own ids and offsets, or not at all."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from input_pipeline.encode import Whole, token_bounds, words_of
from input_pipeline.words import Words

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|im_end|>x", "<think>"]
WORDS = [
    "a",
    "the",
    "It",
    "'s",
    "'LL",
    "x1",
    "2024",
    "42",
    "é",
    "e\u0301",
    "\u0308",
    "日本",
    "😀",
    ".",
    "...",
    "--",
    "\u01c5",
]
SPACES = [
    " ",
    "  ",
    "\n",
    "\n\n",
    " \n",
    "\n ",
    "\r\n",
    "\t",
    " \t ",
    "\u00a0",
    "\u2003",
    "\u3000",
    "\x85",
    "\x1c",
    "\u2028",
    "\u200b",
]
texts_of_pieces = st.lists(st.sampled_from(WORDS + SPACES + SPECIAL + [" "] * 12), max_size=30).map("".join)
any_texts = st.one_of(texts_of_pieces, st.text(max_size=40))

CUTS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    **{
        name: pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        for name, pattern in (("llama3", LLAMA3), ("qwen", QWEN))
    },
}


@pytest.fixture(scope="module", params=[*CUTS, "qwen, NFC"])
def backend(request, tokenizer_maker):
    """A small tokenizer that cuts texts as a real one does."""
    made = Tokenizer.from_str(tokenizer_maker().backend_tokenizer.to_str())
    made.pre_tokenizer = CUTS[request.param.partition(",")[0]]
    if request.param.endswith("NFC"):
        made.normalizer = normalizers.NFC()
        made.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)
    made.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return made


@given(texts=st.lists(any_texts, max_size=4))
@example(texts=["It is 42.\n<|im_end|>x  the\u00a0\n end ", "", " ", "a  b   c\n\n d"])
def test_the_ids_are_the_tokenizers_own(backend, texts):
    words = Words.of(backend)
    expected = [encoding.ids for encoding in backend.encode_batch(texts)]
    for _ in range(2):  # from nothing, and from what came before
        assert [ids.tolist() for ids in words.tokenize(texts, special_tokens=False)] == expected


@given(texts=st.lists(any_texts, min_size=1, max_size=4))
def test_the_offsets_are_the_tokenizers_own(backend, texts):
    words = Words.of(backend)
    for _ in range(2):
        ids, places = words.locate(texts, special_tokens=False)
        for text, ours, offsets in zip(texts, ids, places, strict=True):
            encoding = backend.encode(text)
            assert ours.tolist() == encoding.ids
            np.testing.assert_array_equal(token_bounds(offsets), token_bounds(encoding.offsets))


@given(text=any_texts, most=st.integers(1, 12))
def test_of_a_long_text_at_least_the_tokens_asked_for_are_given(backend, text, most):
    (ids,) = Words.of(backend).tokenize([text], special_tokens=False, most=most)
    expected = backend.encode(text).ids
    assert ids.tolist() == expected[: len(ids)]
    assert len(ids) >= min(most, len(expected))


@given(texts=st.lists(texts_of_pieces, min_size=1, max_size=3))
def test_special_tokens_stand_around_a_text(backend, texts):
    ends = Tokenizer.from_str(backend.to_str())
    ends.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[(t, ends.token_to_id(t)) for t in SPECIAL[:2]]
    )
    expected = [encoding.ids for encoding in ends.encode_batch(texts)]
    assert [ids.tolist() for ids in Words.of(ends).tokenize(texts, special_tokens=True)] == expected


@settings(deadline=None)  # the first example reads the tokenizer's rules
@given(texts=st.lists(any_texts, min_size=1, max_size=4))
def test_a_real_tokenizers_ids_and_offsets(qwen3, texts):
    words = _words(qwen3)
    whole = Whole(qwen3)
    ids, places = whole.locate(texts, special_tokens=False)
    ours, our_places = words.locate(texts, special_tokens=False)
    for a, b, there, here in zip(ids, ours, places, our_places, strict=True):
        assert a.tolist() == b.tolist()
        np.testing.assert_array_equal(token_bounds(there), token_bounds(here))
    assert [a.tolist() for a in words.tokenize(texts, special_tokens=True)] == [
        a.tolist() for a in whole.tokenize(texts, special_tokens=True)
    ]


_OF: dict[int, Words] = {}


def _words(tokenizer) -> Words:
    """Made once: reading a real tokenizer's rules takes a second."""
    if id(tokenizer) not in _OF:
        made = words_of(tokenizer)
        assert made is not None
        _OF[id(tokenizer)] = made
    return _OF[id(tokenizer)]


def test_what_is_remembered_has_an_end(backend, monkeypatch):
    monkeypatch.setattr("input_pipeline.words._REMEMBERED", 50)
    words = Words.of(backend)
    for start in range(0, 1000, 10):
        texts = [" ".join(f"w{i}" for i in range(start, start + 10)), "x" * 100]
        assert [i.tolist() for i in words.tokenize(texts, special_tokens=False)] == [
            e.ids for e in backend.encode_batch(texts)
        ]
        assert len(words._ids) <= 50
        assert "x" * 100 not in words._ids


class TestOthersAreRefused:
    """A tokenizer that may look beyond a space, or that is not known, is asked for whole texts."""

    @pytest.mark.parametrize(
        "change",
        [
            {"pre_tokenizer": None},
            {"pre_tokenizer": pre_tokenizers.Metaspace()},
            {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
            {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)},
            {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("x"), "isolated"), CUTS["gpt2"]])},
            {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN), "removed"), CUTS["gpt2"]])},
            {"normalizer": normalizers.NFKC()},
            {"normalizer": normalizers.Strip()},
            {"post_processor": processors.ByteLevel(add_prefix_space=True)},
            {"model": models.Unigram([("a", 0.0)], unk_id=0)},
        ],
    )
    def test_for_its_rules(self, tokenizer_maker, change):
        backend = Tokenizer.from_str(tokenizer_maker().backend_tokenizer.to_str())
        assert Words.of(backend) is not None
        for name, value in change.items():
            setattr(backend, name, value)
        assert Words.of(backend) is None

    @pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized"])
    def test_for_an_added_token_that_looks_around(self, tokenizer_maker, flag):
        backend = tokenizer_maker().backend_tokenizer
        backend.add_tokens([AddedToken("<x>", **{"normalized": False, flag: True})])
        assert Words.of(backend) is None

    def test_for_an_added_token_with_a_space(self, tokenizer_maker):
        backend = tokenizer_maker().backend_tokenizer
        backend.add_tokens([AddedToken("in Oslo", normalized=False)])
        assert Words.of(backend) is None

    def test_for_dropout(self, tokenizer_maker):
        rules = json.loads(tokenizer_maker().backend_tokenizer.to_str())
        rules["model"]["dropout"] = 0.1
        assert Words.of(Tokenizer.from_str(json.dumps(rules))) is None

    def test_for_special_tokens_that_are_to_be_split(self, tokenizer_maker):
        tokenizer = tokenizer_maker()
        tokenizer.split_special_tokens = True
        assert words_of(tokenizer) is None
