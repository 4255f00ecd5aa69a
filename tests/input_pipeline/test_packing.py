"""Best-fit packing: by hand, against TRL's, and as properties."""

import itertools

import datasets
import grain
import numpy as np
import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st

from input_pipeline.collate import line_of
from input_pipeline.packing import Packed, Wrapped, cut, join, plan
from tests.input_pipeline.test_pipeline import chat, feed, section, write


def ids(*numbers):
    return np.asarray([(n, 0, 0) for n in numbers], np.int32)


def documents(lengths):
    """Document d is the numbers 1000 * d + 1, 1000 * d + 2, …"""
    return grain.MapDataset.source(
        [line_of(ids(*range(1000 * d + 1, 1000 * d + 1 + length)), d) for d, length in enumerate(lengths)]
    )


def test_two_documents_share_a_row_with_segments_and_positions_of_their_own():
    line = join([line_of(ids(11, 12, 13), 4), line_of(ids(21, 22), 7)])
    assert line.columns[:, 0].tolist() == [11, 12, 13, 21, 22]
    assert line.segments.tolist() == [1, 1, 1, 2, 2]
    assert line.positions.tolist() == [0, 1, 2, 0, 1]
    assert line.rows == (4, 7)


def test_the_longest_come_first_and_each_goes_where_it_fits_best():
    # By length: 6, 5, 4, 3, 2 into rows of 8. 6 | 5 | 4, then 3 beside 5 (room 3, none tighter), 2 beside 6 (room 2).
    packed = plan(np.asarray([2, 5, 6, 3, 4]), 8)
    assert [packed[row].tolist() for row in range(len(packed))] == [[0, 4], [1, 3], [2]]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), length=st.integers(40, 70))
def test_rows_are_those_of_trl(lengths, length):
    table = datasets.Dataset.from_dict(
        {"input_ids": [[1000 * d + 1 + i for i in range(n)] for d, n in enumerate(lengths)]}
    )
    packed = trl.pack_dataset(table, length, "bfd", map_kwargs={"keep_in_memory": True})
    counts = np.asarray(lengths)
    ours = Packed(documents(lengths), lengths=counts, plan=plan(counts, length), seed=None)
    assert [ours[row].columns[:, 0].tolist() for row in range(len(ours))] == packed["input_ids"][:]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=40), seed=st.none() | st.integers(0, 2**64))
def test_every_epoch_holds_every_document_once_and_whole(lengths, seed):
    lengths = np.asarray(lengths)
    lines = Packed(documents(lengths), lengths=lengths, plan=plan(lengths, 20), seed=seed)
    for epoch in range(2):
        seen = []
        for row in range(len(lines)):
            line = lines[epoch * len(lines) + row]
            assert len(line.columns) <= 20
            for segment, document in enumerate(line.rows, 1):
                tokens = line.columns[line.segments == segment, 0]
                assert tokens.tolist() == list(range(1000 * document + 1, 1000 * document + 1 + lengths[document]))
                assert line.positions[line.segments == segment].tolist() == list(range(lengths[document]))
            seen += line.rows
        assert sorted(seen) == list(range(len(lengths)))


def test_documents_of_one_length_change_their_neighbours_from_epoch_to_epoch():
    lengths = np.full(12, 5)
    lines = Packed(documents(lengths), lengths=lengths, plan=plan(lengths, 10), seed=3)
    epochs = [[lines[epoch * 6 + row].rows for row in range(6)] for epoch in range(2)]
    assert epochs[0] != epochs[1]
    unshuffled = Packed(documents(lengths), lengths=lengths, plan=plan(lengths, 10), seed=None)
    assert [unshuffled[6 + row].rows for row in range(6)] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11)]


@pytest.mark.parametrize(
    ("mean", "spread", "count", "length"),
    [(150, 40, 400, 512), (150, 40, 400, 1024), (120, 60, 5000, 512), (120, 60, 5000, 2048), (400, 250, 5000, 1024)],
)
def test_of_short_chats_at_least_97_in_100_tokens_are_useful(mean, spread, count, length):
    drawn = np.random.default_rng(0).gamma((mean / spread) ** 2, spread**2 / mean, count)
    lengths = np.clip(drawn.astype(int), 16, length)
    assert lengths.sum() / (len(plan(lengths, length)) * length) >= 0.97


def wrapped(lengths, length, seed, **options):
    """Documents as above on end; a piece is a line of its own numbers."""

    def piece(document, start, stop):
        return line_of(ids(*range(1000 * document + 1 + start, 1000 * document + 1 + stop)), document)

    return Wrapped(piece, lengths=np.asarray(lengths), length=length, seed=seed, **options)


def test_documents_on_end_are_cut_every_so_many_tokens_and_the_rest_is_kept():
    rows = wrapped([5, 2, 4], 4, None)
    assert [rows[row].columns[:, 0].tolist() for row in range(len(rows))] == [
        [1, 2, 3, 4],
        [5, 1001, 1002, 2001],
        [2002, 2003, 2004],
    ]
    assert rows[1].segments.tolist() == [1, 2, 2, 3]
    assert rows[1].positions.tolist() == [0, 0, 1, 0]
    assert rows[1].rows == (0, 1, 2)
    together = wrapped([5, 2, 4], 4, None, isolate=False)[1]
    assert (together.segments.tolist(), together.positions.tolist()) == ([1, 1, 1, 1], [0, 1, 2, 3])


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), length=st.integers(2, 70))
def test_without_isolation_rows_on_end_are_those_of_trl(lengths, length):
    table = datasets.Dataset.from_dict(
        {"input_ids": [[1000 * d + 1 + i for i in range(n)] for d, n in enumerate(lengths)]}
    )
    packed = trl.pack_dataset(table, length, "wrapped", map_kwargs={"keep_in_memory": True})
    ours = wrapped(lengths, length, None, isolate=False)
    assert [ours[row].columns[:, 0].tolist() for row in range(len(ours))] == packed["input_ids"][:]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40), length=st.integers(2, 30), seed=st.integers(0, 2**64)
)
def test_every_epoch_on_end_holds_every_token_once_in_another_order(lengths, length, seed):
    rows = wrapped(lengths, length, seed)
    for epoch in range(3):
        found = np.concatenate([rows[epoch * len(rows) + row].columns[:, 0] for row in range(len(rows))])
        expected = [1000 * d + 1 + i for d, n in enumerate(lengths) for i in range(n)]
        assert sorted(found.tolist()) == expected
        assert all(len(rows[epoch * len(rows) + row].columns) == length for row in range(len(rows) - 1))


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=40), length=st.integers(2, 30))
def test_cut_documents_are_packed_as_by_trl(lengths, length):
    table = datasets.Dataset.from_dict(
        {"input_ids": [[1000 * d + 1 + i for i in range(n)] for d, n in enumerate(lengths)]}
    )
    packed = trl.pack_dataset(table, length, "bfd_split", map_kwargs={"keep_in_memory": True})
    where, starts = cut(np.asarray(lengths), length)
    pieces = [
        ids(*range(1000 * d + 1 + start, 1000 * d + 1 + min(start + length, lengths[d])))
        for d, start in zip(where.tolist(), starts.tolist(), strict=True)
    ]
    counts = np.asarray([len(piece) for piece in pieces])
    lines = grain.MapDataset.source([line_of(piece, number) for number, piece in enumerate(pieces)])
    ours = Packed(lines, lengths=counts, plan=plan(counts, length), seed=None)
    assert [ours[row].columns[:, 0].tolist() for row in range(len(ours))] == packed["input_ids"][:]


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("packing", [None, "bfd", "wrapped"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_feed_knows_whether_its_rows_are_one_document_from_the_first_place_on(
    tokenizer, tmp_path, packing, isolate, stream
):
    rows = write(tmp_path / "train.jsonl", [chat(number, 1 + 7 * number % 11) for number in range(11)])
    data = section(rows, pack=packing is not None, isolate_documents=isolate, stream=stream)
    options = {"packing": packing} if packing else {}
    made = feed(data, tokenizer, max_length=128, epochs=None, **options)
    batches = list(itertools.islice(made.batches, 3))
    assert made.packed is (packing is not None and isolate)
    for batch in batches:
        there = batch["segments"] > 0
        one = (batch["segments"] <= 1).all() and (batch["positions"] == np.arange(there.shape[-1]) * there).all()
        assert one != made.packed
        assert not (there[..., 1:] & ~there[..., :-1]).any()
