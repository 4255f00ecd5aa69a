"""All rows tokenised once: the same from the cache as anew, by one process or two, and never all in memory."""

import json
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest

from input_pipeline.cache import load
from input_pipeline.catalog import Dataset
from input_pipeline.chat import LossMask
from input_pipeline.counts import Counts, too_many_bad
from input_pipeline.jsonl import JsonLines, open_jsonl
from input_pipeline.meaning import Meaning
from input_pipeline.sources import Rows
from input_pipeline.store import Encoder, Tokenizing, tokenize_rows
from input_pipeline.template import Template

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


def chat(i):
    question = {"role": "user", "content": f"What is {i} + {i}?"}
    return {"messages": [question, {"role": "assistant", "content": str(2 * i)}], "tools": TOOLS}


def encoder(tokenizer, kind="conversation", **changes):
    settings = {"masks": (LossMask("assistant"),), "max_length": 64, "skip_bad_rows": True, "required": ()}
    meanings = (Meaning(kind, {"field": "text"} if kind == "text" else {}),)
    return Encoder(**{"meanings": meanings, "template": Template(tokenizer), **settings, **changes})


def all_of(rows):
    return np.stack([np.zeros(len(rows), np.int64), np.arange(len(rows))], axis=1)


@pytest.fixture
def rows(tmp_path):
    """Chats, with bad rows of two kinds among them, in a file."""
    lines = [json.dumps(chat(i)) for i in range(1500)]
    lines[7], lines[900], lines[1300] = '{"messages": ', '{"messages": [{"role": "x"}]}', '{"messages": 3}'
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return Rows(str(path), open_jsonl(path))


@pytest.fixture
def tokenizing(rows, tokenizer):
    encode = encoder(tokenizer)
    return Tokenizing((Dataset(rows, encode.meanings[0]),), encode)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache in which however few tokens are kept."""
    monkeypatch.setattr("input_pipeline.store._KEPT_FROM", 1)
    return tmp_path / "cache"


def assert_same(ours, other):
    (store, *said), (other_store, *other_said) = ours, other
    assert said == other_said
    assert store.fingerprint() == other_store.fingerprint()
    for name in ("ids", "trained", "offsets", "sources"):
        np.testing.assert_array_equal(getattr(store, name), getattr(other_store, name))


def test_what_the_cache_holds_is_what_was_made_with_its_counts_and_remarks(tokenizing, rows, cache):
    made = tokenize_rows(tokenizing, all_of(rows))
    read = []
    written = tokenize_rows(tokenizing, all_of(rows), cache=cache)
    found = tokenize_rows(tokenizing, all_of(rows), cache=cache, progress=read.append)
    assert_same(made, written)
    assert_same(made, found)
    assert read == [len(rows)]  # at once
    store, counts, remarks = found
    assert isinstance(store.ids, np.memmap)
    assert store.ids.dtype == np.uint16
    assert (counts.read, counts.used, counts.bad) == (1500, 1497, 3)
    assert sum(counts.bad_kinds.values()) == 3
    assert next(iter(counts.first_bad.values())).split(":")[1] == "8"
    assert remarks[0].startswith("the chat template does not render tool definitions")
    assert remarks[1].startswith("skipped 3 bad rows (")
    ids, trained = store[3]
    assert ids.dtype == np.int32
    assert trained.dtype == np.uint8  # from the cache; see answers.py for the marks beside 0 and 1
    np.testing.assert_array_equal(ids, made[0][3][0])


def test_few_tokens_stay_in_memory(tokenizing, rows, tmp_path):
    store, _, _ = tokenize_rows(tokenizing, all_of(rows), cache=tmp_path / "cache")
    assert not isinstance(store.ids, np.memmap)
    assert not (tmp_path / "cache").exists()


def test_two_processes_write_the_same_bytes_as_one(tokenizing, rows, cache):
    key = tokenizing.key(all_of(rows))
    for workers in (1, 2):
        tokenize_rows(tokenizing, all_of(rows), cache=cache / str(workers), workers=workers)
    for file in (cache / "1" / key).iterdir():
        assert file.read_bytes() == (cache / "2" / key / file.name).read_bytes()


def test_a_damaged_entry_is_made_anew(tokenizing, rows, cache):
    made = tokenize_rows(tokenizing, all_of(rows))
    tokenize_rows(tokenizing, all_of(rows), cache=cache)
    file = cache / tokenizing.key(all_of(rows)) / "ids.bin"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    assert_same(made, tokenize_rows(tokenizing, all_of(rows), cache=cache))
    assert file.read_bytes() != content
    assert load(cache, tokenizing.key(all_of(rows))) is not None


def test_an_error_leaves_nothing_in_the_cache(rows, tokenizer, cache):
    strict = encoder(tokenizer, skip_bad_rows=False)
    with pytest.raises(ValueError, match=r"rows\.jsonl:8:14: not valid JSON"):
        tokenize_rows(Tokenizing((Dataset(rows, strict.meanings[0]),), strict), all_of(rows), cache=cache)
    assert not cache.exists() or list(cache.iterdir()) == []


def test_every_part_of_the_key_changes_it(rows, tokenizer, tokenizer_maker, tmp_path):
    other_template = tokenizer_maker(template="default_gen")
    more_tokens = tokenizer_maker()
    more_tokens.add_tokens(["weather in Oslo"])
    other_end = tokenizer_maker()
    other_end.eos_token = "<|endoftext|>"
    picks = all_of(rows)

    def key(encode, picks=picks, rows=rows):
        return Tokenizing((Dataset(rows, encode.meanings[0]),), encode).key(picks)

    base = encoder(tokenizer)
    lines = open_jsonl(rows.name)
    changed = tmp_path / "changed.jsonl"
    changed.write_text((tmp_path / "rows.jsonl").read_text().replace("What is 17 +", "What is 18 +"))
    keys = [
        key(base),
        key(base, picks[:-1]),
        key(base, picks[::-1]),
        key(base, rows=Rows(str(changed), open_jsonl(changed))),
        *(key(encoder(other)) for other in (other_template, more_tokens, other_end, tokenizer_maker(vocabulary=300))),
        key(encoder(tokenizer, masks=(LossMask("final"),))),
        key(encoder(tokenizer, masks=(LossMask("assistant", completion_only=False),))),
        key(encoder(tokenizer, max_length=65)),
        key(encoder(tokenizer, max_length=None)),
        key(encoder(tokenizer, skip_bad_rows=False)),
        key(encoder(tokenizer, required=("user",))),
        key(encoder(tokenizer, meanings=(Meaning("sharegpt"),))),
        key(encoder(tokenizer, meanings=(Meaning("conversation", {"field": "chat"}),))),
    ]
    assert len(set(keys)) == len(keys)
    assert key(base, rows=Rows(rows.name, lines)) == keys[0]
    truncating = tokenizer_maker()
    truncating("a b c", truncation=True, max_length=2)  # left in the tokenizer by whoever used it before
    assert key(encoder(truncating)) == key(encoder(tokenizer_maker()))


@pytest.mark.parametrize("fingerprint", [None, "of the file"])
def test_slices_of_a_file_do_not_share_an_entry(rows, tokenizer, fingerprint):
    encode = encoder(tokenizer)
    whole = open_jsonl(rows.name)
    keys = set()
    for start in (0, 5):
        part = JsonLines(whole.path, *(a[start : start + 5] for a in (whole.starts, whole.ends, whole.numbers)))
        some = Rows(rows.name, part, fingerprint=fingerprint)
        keys.add(Tokenizing((Dataset(some, encode.meanings[0]),), encode).key(all_of(some)))
    assert len(keys) == 2


class Generated(Sequence):
    """Rows that take no memory."""

    def __len__(self):
        return 20_000

    def __getitem__(self, index):
        return {"text": f"The weather in Oslo today is {index % 100} degrees. " * 12}


def test_building_takes_the_same_memory_however_much_there_is_and_reading_hardly_any(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("input_pipeline.store._KEPT_FROM", 100_000)
    encode = encoder(tokenizer, "text", masks=(LossMask(),), max_length=None)
    rows = Rows("generated", Generated())
    tokenizing = Tokenizing((Dataset(rows, encode.meanings[0]),), encode)
    picks = all_of(rows)

    def peak(picks):
        tracemalloc.start()
        store, counts, _ = tokenize_rows(tokenizing, picks, cache=tmp_path)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(store) == len(picks)
        assert counts.tokens > 150 * len(picks)
        return most

    few, many, again = (peak(some) for some in (picks[:2_000], picks, picks))
    assert many - few < 1e6  # of 16 MB more, as int32 with their flags
    assert again < 2e6


class TestBadRows:
    def test_they_are_counted_by_kind_and_the_first_of_each_is_kept(self, tokenizing, rows):
        store, counts, _ = tokenize_rows(tokenizing, all_of(rows)[900:])
        assert counts.bad_kinds["roles"] == 1
        assert "row 901 of" in counts.first_bad["roles"]
        assert len(store) == counts.used == 598

    def test_counts_add_up_and_the_earlier_first_stays(self):
        one = Counts(read=3, bad=1, bad_kinds={"json": 1}, first_bad={"json": "a:1"})
        two = Counts(
            read=4, bad=3, text_bytes=5, bad_kinds={"empty": 1, "json": 2}, first_bad={"empty": "b", "json": "c"}
        )
        assert one.plus(two) == Counts(
            read=7, bad=4, text_bytes=5, bad_kinds={"json": 3, "empty": 1}, first_bad={"json": "a:1", "empty": "b"}
        )
        assert list(two.plus(one).first_bad.values()) == ["b", "c"]
        assert one.plus(two).refused() == "3 not JSON, 1 empty"

    def test_too_many_of_them_are_an_error_with_the_counts_and_the_first_of_each(self):
        counts = Counts(
            read=100, bad=6, bad_kinds={"empty": 2, "json": 4}, first_bad={"json": "a:1: x", "empty": "b: y"}
        )
        too_many_bad(counts, None)
        too_many_bad(counts, 0.06)
        with pytest.raises(ValueError, match="more than max_bad_row_fraction") as error:
            too_many_bad(counts, 0.05)
        assert str(error.value) == (
            "6 of 100 rows are bad, more than max_bad_row_fraction 0.05 (4 not JSON, 2 empty); mend them, or raise"
            " data.<split>.max_bad_row_fraction. The first of each kind: a:1: x; b: y"
        )


def test_the_bytes_of_the_text_are_those_of_the_rows_used(tokenizer):
    rows = Rows("rows", [{"text": "Åse"}, {"text": ""}, {"text": "a b c"}])
    encode = encoder(tokenizer, "text", masks=(LossMask(),), max_length=None)
    _, counts, _ = tokenize_rows(Tokenizing((Dataset(rows, encode.meanings[0]),), encode), all_of(rows))
    assert (counts.used, counts.text_bytes) == (2, 4 + 5)
