"""A prompt with its answers as a line: every array by hand, lengths known beforehand, partners, batches, going on."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from input_pipeline.pairs import OTHERS, Answer, Answered, Laid, answers_line, sides
from input_pipeline.pipeline import eval_feed, once_through, train_feed
from input_pipeline.reading import Reading, read_data
from input_pipeline.store import TokenStore
from trainers.kto import partners

PROMPT, WANTED, UNWANTED = np.array([10, 11, 12]), np.array([20, 21]), np.array([30])


def stored(*rows):
    """A store of rows: each a prompt's ids and its answers, lists of (ids, mark)."""
    ids, marks, lengths = [], [], []
    for prompt, answers in rows:
        row = [part for answer, mark in answers for part in (*((p, 0) for p in prompt), *((a, mark) for a in answer))]
        ids += [token for token, _ in row]
        marks += [mark for _, mark in row]
        lengths.append(len(row))
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    sources = np.stack([np.zeros(len(rows), np.int64), np.arange(len(rows))], axis=1)
    return TokenStore(np.array(ids, np.int32), np.array(marks, np.uint8), offsets, sources)


def columns(line):
    """The arrays of a line by name, as lists."""
    names = ("tokens", "targets", "weights")
    found = {name: line.columns[:, at].tolist() for at, name in enumerate(names)}
    return found | {"positions": line.positions.tolist()} | {name: x.tolist() for name, x in line.more.items()}


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_a_prompt_stands_once_but_for_its_last_token(dtype):
    store = stored((PROMPT, [(WANTED, 1), (UNWANTED, 2)]))
    store = TokenStore(store.ids.astype(dtype), store.trained, store.offsets, store.sources)  # as on disk, or not
    assert columns(Answered(store, Laid(shared=True), None)[0]) == {
        "tokens": [10, 11, 12, 20, 21, 12, 30],
        "branches": [0, 0, 1, 1, 1, 2, 2],
        "positions": [0, 1, 2, 3, 4, 2, 3],
        "targets": [11, 12, 20, 21, 0, 30, 0],
        "weights": [0, 0, 1, 1, 0, 1, 0],
    }


def test_apart_a_prompt_stands_before_each_answer():
    store = stored((PROMPT, [(WANTED, 1), (UNWANTED, 2)]))
    assert columns(Answered(store, Laid(shared=False), None)[0]) == {
        "tokens": [10, 11, 12, 20, 21, 10, 11, 12, 30],
        "branches": [1, 1, 1, 1, 1, 2, 2, 2, 2],
        "positions": [0, 1, 2, 3, 4, 0, 1, 2, 3],
        "targets": [11, 12, 20, 21, 0, 11, 12, 30, 0],
        "weights": [0, 0, 1, 1, 0, 0, 0, 1, 0],
    }


def test_a_prompt_of_one_token_begins_every_branch():
    line = answers_line(PROMPT[:1], [Answer(WANTED, 1), Answer(UNWANTED, 2)], row=4, shared=True)
    assert columns(line) == {
        "tokens": [10, 20, 21, 10, 30],
        "branches": [1, 1, 1, 2, 2],
        "positions": [0, 1, 2, 0, 1],
        "targets": [20, 21, 0, 30, 0],
        "weights": [1, 1, 0, 1, 0],
    }
    assert line.rows == (4,)
    assert line.segments.tolist() == [1] * 5


def test_the_references_numbers_stand_at_the_first_prediction_of_each_answer():
    laid = Laid(shared=True, reference=np.array([[-9, -9], [-1.5, -2.5]], np.float32))
    store = stored((PROMPT, [(WANTED, 1), (UNWANTED, 2)]), (PROMPT, [(WANTED, 1), (UNWANTED, 2)]))
    line = Answered(store, laid, None)[1]
    assert line.more["reference"].tolist() == [0, 0, -1.5, 0, 0, -2.5, 0]
    assert line.more["reference"].dtype == np.float32
    apart = Answered(store, laid._replace(shared=False), None)[1]
    assert apart.more["reference"].tolist() == [0, 0, -1.5, 0, 0, 0, 0, -2.5, 0]


def test_another_rows_answer_stands_beside_a_rows_own_cut_to_the_room_that_is_left():
    store = stored((PROMPT, [(UNWANTED, 2)]), (PROMPT[:2], [([40, 41, 42], 1)]))
    laid = Laid(shared=True, partners=np.array([1, 0]), reference=np.array([[-1, -2], [-3, -4]], np.float32))
    lines = Answered(store, laid, 5)
    assert columns(lines[0]) == {
        "tokens": [10, 11, 12, 30, 12, 40, 41],  # 42 would be the sixth
        "branches": [0, 0, 2, 2, OTHERS, OTHERS, OTHERS],
        "positions": [0, 1, 2, 3, 2, 3, 4],
        "targets": [11, 12, 30, 0, 40, 41, 0],
        "weights": [0, 0, 1, 0, 1, 1, 0],
        "reference": [0, 0, -1, 0, -2, 0, 0],
    }
    assert columns(lines[1])["tokens"] == [10, 11, 40, 41, 42, 11, 30]
    assert columns(lines[1])["branches"] == [0, 1, 1, 1, 1, OTHERS, OTHERS]


ids = st.lists(st.integers(1, 99), min_size=1, max_size=7)
pairs_of_rows = st.lists(st.tuples(ids, st.tuples(ids, ids)), min_size=1, max_size=6)


def longest_sight(line):
    """The most places between two tokens of which one sees the other, and one more, counted one by one."""
    branches, positions = line.more["branches"], line.positions
    starts = [i for i in range(len(positions)) if i == 0 or branches[i] != branches[i - 1]]
    most = 1
    for query in range(len(positions)):
        start = max(s for s in starts if s <= query)
        own = set(range(start, query + 1))
        beginning = {k for k in range(query) if branches[k] == 0}
        most = max([most, *(query - key + 1 for key in own | beginning)])
    return most


kinds = st.sampled_from(["pairs", "single", "with others"])


@given(rows=pairs_of_rows, shared=st.booleans(), kind=kinds, room=st.integers(0, 9) | st.none())
def test_lengths_are_those_of_the_lines(rows, shared, kind, room):
    made = [(p, [(a, 1), (b, 2)] if kind == "pairs" else [(a, 1 + len(b) % 2)]) for p, (a, b) in rows]
    limit = None if room is None else room + max(len(p) + max(len(a) for a, _ in each) for p, each in made)
    others = np.roll(np.arange(len(rows)), 1) if kind == "with others" else None
    lines = Answered(stored(*made), Laid(shared, others), limit)
    each = [lines[index] for index in range(len(lines))]
    assert lines.lengths().tolist() == [len(line.columns) for line in each]
    assert lines.longest_document() >= max(map(longest_sight, each))
    if not shared:
        assert lines.longest_document() == max(map(longest_sight, each))


def sentence(number, words):
    return " ".join(["the weather", "in Oslo", "is fine"][i % 3] + str(number) for i in range(words))


def written(path, count=11):
    """A file of pairs, each of other lengths."""
    rows = [
        {
            "prompt": [{"role": "user", "content": sentence(i, 1 + i % 3)}],
            "chosen": [{"role": "assistant", "content": sentence(i, 1 + 5 * i % 7)}],
            "rejected": [{"role": "assistant", "content": "no, " + sentence(i, 1 + 3 * i % 5)}],
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = {"datasets": [{"dataset_name": "preference_pairs_jsonl", "dataset_path": str(path)}]}
    return {"train": split, "validation": split}


def reading(**changes):
    return Reading(**{"max_length": 256, "seed": 7, "trainer": "TRL_DPO", "answers": "trl", **changes})


def numbered(data, microbatch):
    """Laid out with reference log-probabilities that tell rows and answers apart."""
    rows = np.arange(len(data.store), dtype=np.float32)
    return Laid(shared=True, reference=np.stack([-1 - rows, -101 - rows], axis=1))


def fed(data, tokenizer, **options):
    asked = {"rows_per_step": 4, "accumulation": 2, "epochs": 2, "prefetch": 0, "lay_out": numbered, **options}
    return train_feed(data, tokenizer, reading=reading(), **asked)


def lines_of(batch, rows):
    """Each row's arrays without padding, by the row's number; the rest must be empty."""
    flat = {name: array.reshape(-1, array.shape[-1]) for name, array in batch.items()}
    assert not any(array[len(rows) :].any() for array in flat.values())
    found = {}
    for at, row in enumerate(rows):
        there = flat["segments"][at] > 0
        assert not any(array[at][~there].any() for array in flat.values())
        found[row] = {name: array[at][there].tolist() for name, array in flat.items() if name != "segments"}
    return found


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_epoch_has_every_pair_once_with_all_that_belongs_to_it(shuffle, tokenizer, tmp_path):
    data = written(tmp_path / "pairs.jsonl")
    made = fed(data, tokenizer, shuffle_rows=shuffle)
    answered = Answered(made.data.store, numbered(made.data, 2), 256)
    expected = {row: columns(answered[row]) for row in range(11)}
    batches = [(batch, made.batches.rows) for batch in made.batches]
    assert made.steps == len(batches) == 6
    for epoch in (batches[:3], batches[3:]):
        assert sorted(row for _, rows in epoch for row in rows) == list(range(11))
        assert {row: line for batch, rows in epoch for row, line in lines_of(batch, rows).items()} == expected
    assert {batch["tokens"].shape[:2] for batch, _ in batches} == {(2, 2)}
    assert max(batch["tokens"].shape[2] for batch, _ in batches) <= made.longest
    assert made.longest_document == max(len(line["tokens"]) for line in expected.values())
    assert made.packed
    assert (batches[0][1] == (0, 1, 2, 3)) is not shuffle
    assert batches[0][0]["weights"].dtype == batches[0][0]["reference"].dtype == np.float32


def test_each_row_keeps_its_partner_and_its_numbers_when_rows_are_shuffled(tokenizer, tmp_path):
    path = tmp_path / "answers.jsonl"
    rows = [{"prompt": f"{sentence(i, 2)} ", "completion": f"so {i * 7}", "label": i % 3 > 0} for i in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = {"datasets": [{"dataset_name": "text_sft", "dataset_path": str(path)}]}
    asked = []

    def lay_out(data, microbatch):
        asked.append(microbatch)
        return Laid(True, partners(len(data.store), block=microbatch), np.tile(np.float32([-1, -2]), (9, 1)))

    made = train_feed(
        {"train": split},
        tokenizer,
        reading=reading(trainer="TRL_KTO"),
        rows_per_step=6,
        accumulation=2,
        epochs=1,
        lay_out=lay_out,
    )
    assert asked == [3]
    seen = {}
    for batch in made.batches:
        seen |= lines_of(batch, made.batches.rows)
    made.batches.close()
    assert sorted(seen) == list(range(9))
    for row, other in enumerate([2, 0, 1, 5, 3, 4, 8, 6, 7]):
        line = {name: np.array(values) for name, values in seen[row].items()}
        (_, (own,)), (_, (others,)) = (sides(*made.data.store[number]) for number in (row, other))
        assert own.branch == (1 if row % 3 else 2)
        for number, answer, logprob in ((own.branch, own, -1), (OTHERS, others, -2)):
            at = (line["branches"] == number) & (line["weights"] > 0)
            assert line["targets"][at].tolist() == answer.ids.tolist()
            assert line["reference"][line["branches"] == number].tolist() == [logprob] + [0] * len(answer.ids)


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("done", [1, 3, 4])
def test_after_any_batch_the_same_batches_follow(prefetch, done, tokenizer, tmp_path):
    data = written(tmp_path / "pairs.jsonl")
    straight = fed(data, tokenizer, prefetch=prefetch)
    for _ in range(done):
        next(straight.batches)
    state = json.loads(json.dumps(straight.batches.get_state()))
    again = fed(data, tokenizer)
    again.batches.set_state(state)
    rest, others = list(straight.batches), list(again.batches)
    assert len(rest) == len(others) == 6 - done
    for one, other in zip(rest, others, strict=True):
        assert set(one) == {"tokens", "targets", "weights", "segments", "positions", "branches", "reference"}
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    straight.batches.close()


def test_evaluation_and_the_reference_see_each_pair_once_as_stored(tokenizer, tmp_path):
    data = written(tmp_path / "pairs.jsonl")
    evaluated = eval_feed(data, tokenizer, reading=reading(), rows_per_step=4, lay_out=numbered)
    once = once_through(read_data(data["train"], tokenizer, reading=reading()), numbered, rows_per_step=4)
    for made in (evaluated, once):
        batches = [(batch, made.batches.rows) for batch in made.batches]
        assert [rows for _, rows in batches] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10)]
        assert all(batch["branches"].shape[:2] == (1, 4) for batch, _ in batches)


def test_a_checkpoint_of_other_answers_is_refused(tokenizer, tmp_path):
    made = fed(written(tmp_path / "pairs.jsonl"), tokenizer)
    other = fed(written(tmp_path / "other.jsonl", 10), tokenizer)
    with pytest.raises(ValueError, match="the checkpoint is of other data"):
        other.batches.set_state(made.batches.get_state())
