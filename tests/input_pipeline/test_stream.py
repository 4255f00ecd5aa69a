"""Streams: the same batches for every number of processes, workers and accumulation steps, and from any stop on."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from input_pipeline.batches import Part, merged
from input_pipeline.catalog import Stream
from input_pipeline.chat import LossMask
from input_pipeline.examples import RowError
from input_pipeline.lanes import Recipe
from input_pipeline.meaning import Meaning
from input_pipeline.records import Record
from input_pipeline.store import Encoder
from input_pipeline.stream import StreamBatches, lanes_for
from input_pipeline.template import Template


@dataclass(frozen=True)
class Listed:
    """A shard whose rows are in memory: row n is `rows[n - 1]`."""

    name: str
    rows: tuple
    first: int = 0

    def read(self, position=None):
        for index in range(position["next"] if position else 0, len(self.rows)):
            yield Record(self.rows[index], self.first + index + 1, {"next": index + 1})

    def where(self, number):
        return f"row {number} of {self.name}"

    def part(self, index, count):
        start, stop = (len(self.rows) * i // count for i in (index, index + 1))
        return Listed(self.name, self.rows[start:stop], self.first + start)


def stream(name, *shards):
    parts = tuple(Listed(f"{name}{number}", tuple(rows)) for number, rows in enumerate(shards))
    return Stream(name, parts, Meaning("text", {"field": "text"}))


def texts(count, *, start=0, step=7):
    """Texts of different lengths, each with its number in it."""
    return [{"text": f"<{n}>" + "x" * (n * step % 23)} for n in range(start, start + count)]


def recipe(tokenizer, *streams, skip=False, **options):
    encoder = Encoder(
        meanings=tuple(each.meaning for each in streams),
        masks=(LossMask(),) * len(streams),
        template=Template(tokenizer),
        max_length=None if options.get("packing", "wrapped") in ("wrapped", "bfd_split") else 32,
        skip_bad_rows=skip,
    )
    defaults = {
        "proportions": None,
        "limits": (None,) * len(streams),
        "seed": 5,
        "mix_seed": 3,
        "lanes": 4,
        "block": 6,
        "length": 32,
        "packing": "wrapped",
        "isolate": True,
        "repeat": True,
    }
    return Recipe(streams=streams, encoder=encoder, **defaults | options)


def batches(made, *, rows=4, accumulation=2, first=0, count=None, **options):
    part = Part(first, rows if count is None else count, rows)
    asked = {"prefetch": 0, "fingerprint": {"rows": rows * accumulation}} | options
    return StreamBatches(made, accumulation=accumulation, part=part, **asked)


def take(iterator, steps):
    return list(itertools.islice(iterator, steps))


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def documents(found):
    """The tokens of every segment of every row, in order."""
    seen = []
    for batch in found:
        length = batch["tokens"].shape[-1]
        for tokens, segments in zip(
            batch["tokens"].reshape(-1, length), batch["segments"].reshape(-1, length), strict=True
        ):
            seen += [tuple(tokens[segments == s].tolist()) for s in range(1, segments.max() + 1)]
    return seen


def joined(parts):
    """The batches that the parts of all processes make."""
    steps = zip(*parts, strict=True)
    return [{name: np.concatenate([part[name] for part in step], axis=1) for name in step[0]} for step in steps]


PACKINGS = ["wrapped", "bfd", "bfd_split", None]


@st.composite
def sources(draw):
    """One to three streams of one to five shards of up to nine rows, mixed or one after the other."""
    numbers = itertools.count(0, 100)
    made = [
        stream(name, *(texts(draw(st.integers(0, 9)), start=next(numbers)) for _ in range(draw(st.integers(1, 5)))))
        for name in "abc"[: draw(st.integers(1, 3))]
    ]
    made = [each if any(shard.rows for shard in each.shards) else stream(each.name, texts(3)) for each in made]
    shares = [draw(st.floats(0.1, 1.0)) for _ in made]
    proportions = tuple(share / sum(shares) for share in shares) if draw(st.booleans()) else None
    limits = tuple(draw(st.none() | st.integers(4, 12)) for _ in made)
    return made, {"proportions": proportions, "limits": limits}


@settings(max_examples=60, deadline=None)
@given(made=sources(), packing=st.sampled_from(PACKINGS), seed=st.none() | st.integers(0, 9), stop=st.integers(0, 9))
def test_after_any_stop_the_remaining_batches_are_identical(tokenizer, made, packing, seed, stop):
    streams, options = made

    def fresh():
        return batches(recipe(tokenizer, *streams, packing=packing, seed=seed, **options))

    straight = fresh()
    before = take(straight, stop)
    state = straight.get_state()
    after = take(straight, 5)
    again = fresh()
    take(again, 2)
    again.set_state(state)
    assert_same(take(again, 5), after)
    assert len(before) == stop


@settings(max_examples=40, deadline=None)
@given(
    made=sources(), packing=st.sampled_from(PACKINGS[:3]), stop=st.integers(0, 5), lanes=st.sampled_from([1, 2, 4, 8])
)
def test_the_parts_of_1_2_and_4_processes_make_the_same_batches_also_after_a_stop(
    tokenizer, made, packing, stop, lanes
):
    streams, options = made

    def process(number, of):
        fresh = recipe(tokenizer, *streams, packing=packing, lanes=lanes, **options)
        return batches(fresh, rows=4, first=4 * number // of, count=4 // of)

    whole = process(0, 1)
    expected = take(whole, stop + 3)
    for count in (2, 4):
        parts = [process(number, count) for number in range(count)]
        begun = [take(part, stop) for part in parts]
        state = merged([part.get_state() for part in parts])
        for of in (1, 2, 4):  # another number of processes goes on
            others = [process(number, of) for number in range(of)]
            for other in others:
                other.set_state(state)
            rest = [take(other, 3) for other in others]
            joined = [
                {k: np.concatenate([p[k] for p in step], axis=1) for k in step[0]} for step in zip(*rest, strict=True)
            ]
            assert_same(joined, expected[stop:])
        joined = [
            {k: np.concatenate([p[k] for p in step], axis=1) for k in step[0]} for step in zip(*begun, strict=True)
        ]
        assert_same(joined, expected[:stop])


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_step_has_the_same_rows_for_every_accumulation(tokenizer, packing):
    steps = []
    for accumulation in (1, 2, 4, 8):
        made = recipe(tokenizer, stream("a", texts(40), texts(30, start=100)), packing=packing)
        found = take(batches(made, rows=8 // accumulation, accumulation=accumulation), 6)
        steps.append([sorted(map(bytes, batch["tokens"].reshape(8, -1))) for batch in found])
    assert steps[0] == steps[1] == steps[2] == steps[3]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 5, 33])
def test_once_through_holds_every_document_once(tokenizer, packing, lanes, count):
    made = recipe(
        tokenizer, stream("a", texts(count), texts(count, start=50)), packing=packing, repeat=False, lanes=lanes
    )
    found = list(batches(made))
    whole = tokenizer.encode
    expected = sorted(whole(row["text"] + tokenizer.eos_token) for row in texts(count) + texts(count, start=50))
    if packing in ("wrapped", "bfd_split"):
        assert sum(map(len, documents(found))) == sum(map(len, expected))
    else:
        assert sorted(map(list, documents(found))) == expected


def test_in_the_order_stored_rows_come_as_they_stand_in_the_files(tokenizer):
    made = recipe(tokenizer, stream("a", texts(9), texts(8, start=50)), seed=None, lanes=1, repeat=False, packing=None)
    expected = [tokenizer.encode(row["text"] + tokenizer.eos_token) for row in texts(9) + texts(8, start=50)]
    assert list(map(list, documents(batches(made, rows=3, accumulation=1)))) == expected


@settings(max_examples=40, deadline=None)
@given(made=sources(), packing=st.sampled_from(PACKINGS), seed=st.none() | st.integers(0, 9))
def test_targets_are_the_next_token_of_the_same_document_and_end_with_it(tokenizer, made, packing, seed):
    streams, options = made
    source = recipe(tokenizer, *streams, packing=packing, seed=seed, **options)
    eos = tokenizer.eos_token_id
    for batch in take(batches(source), 4):
        tokens, targets, weights, segments, positions = (
            batch[name].reshape(-1, batch["tokens"].shape[-1])
            for name in ("tokens", "targets", "weights", "segments", "positions")
        )
        inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        np.testing.assert_array_equal(targets[:, :-1][inside], tokens[:, 1:][inside])
        np.testing.assert_array_equal(weights[:, :-1][inside], 1)
        np.testing.assert_array_equal(positions[:, 1:][inside], positions[:, :-1][inside] + 1)
        ends = (tokens == eos) & (segments > 0)  # of documents: nothing follows
        assert not weights[ends].any()
        assert not targets[ends].any()
        begins = (segments[:, 1:] != segments[:, :-1]) & (segments[:, 1:] > 0)
        assert not positions[:, 1:][begins].any()


def test_without_isolation_a_packed_row_is_one_document_but_labels_still_end_where_documents_do(tokenizer):
    rows = stream("a", texts(20))
    apart, together = (take(batches(recipe(tokenizer, rows, isolate=isolate)), 3) for isolate in (True, False))
    for one, other in zip(apart, together, strict=True):
        for name in ("tokens", "targets", "weights"):
            np.testing.assert_array_equal(one[name], other[name])
        assert set(np.unique(other["segments"])) <= {0, 1}
        np.testing.assert_array_equal(other["positions"][0, 0], np.arange(32))


def test_packed_streams_waste_next_to_nothing(tokenizer):
    rows = stream("a", texts(2000, step=5))
    for packing, share in (("wrapped", 1.0), ("bfd", 0.95)):
        found = take(batches(recipe(tokenizer, rows, packing=packing, length=128, block=256)), 8)
        used = sum((batch["segments"] > 0).sum() for batch in found) / sum(batch["segments"].size for batch in found)
        assert used >= share, packing


def test_a_mixture_has_the_shares_asked_for_and_says_what_was_seen(tokenizer):
    streams = [stream("a", texts(50, step=0)), stream("b", texts(500, start=100, step=0))]
    made = batches(recipe(tokenizer, *streams, proportions=(0.3, 0.7), packing=None, block=64))
    take(made, 200)
    assert made.seen[0] / sum(made.seen.values()) == pytest.approx(0.3, abs=0.04)


def test_a_mixture_once_through_ends_with_the_first_stream_or_with_the_last(tokenizer):
    streams = [stream("a", texts(10, step=0)), stream("b", texts(100, start=200, step=0))]
    counts = []
    for everything in (False, True):
        made = recipe(
            tokenizer, *streams, proportions=(0.5, 0.5), packing=None, repeat=False, lanes=1, all_exhausted=everything
        )
        found = documents(batches(made))
        counts.append(len(found))
        assert len(set(found)) == (110 if everything else len(found))
    assert 15 <= counts[0] <= 30
    assert 170 <= counts[1] <= 240


def test_no_more_rows_of_a_stream_are_used_than_asked_for(tokenizer):
    made = recipe(tokenizer, stream("a", texts(40, step=0)), limits=(10,), packing=None)
    assert len(set(documents(take(batches(made), 20)))) == 10


def test_an_epoch_has_an_order_of_its_own_and_every_row_comes_once_in_it(tokenizer):
    rows = [texts(16, start=100 * number, step=0) for number in range(8)]
    made = recipe(tokenizer, stream("a", *rows), packing=None, block=16)
    found = documents(take(batches(made), 32))  # 256 rows: two epochs
    assert sorted(found[:128]) == sorted(found[128:])
    assert len(set(found[:128])) == 128
    assert found[:128] != found[128:]


def bad(number):
    return {"text": number}


def test_a_bad_row_stops_the_run_and_is_named(tokenizer):
    made = batches(recipe(tokenizer, stream("a", [*texts(3), bad(1), *texts(9)])))
    with pytest.raises(RowError, match=r"^row 4 of a0: text must be a string, not 1$"):
        take(made, 9)


def test_bad_rows_are_skipped_counted_and_too_many_stop_the_run(tokenizer, caplog):
    caplog.set_level("INFO")
    rows = [bad(n) if n % 20 == 0 else row for n, row in enumerate(texts(2000, step=0))]
    made = recipe(tokenizer, stream("a", rows), skip=True)
    some = batches(made, max_bad_fraction=0.1)
    take(some, 100)
    assert some.found.counts.bad == pytest.approx(some.found.counts.read / 20, rel=0.2)
    assert some.found.counts.first_bad["type"].endswith("of a0: text must be a string, not 0")
    assert caplog.text.count("skipped a bad row, the first of its kind: row") == 1
    with pytest.raises(ValueError, match=r"rows are bad, more than max_bad_row_fraction 0\.01"):
        take(batches(made, max_bad_fraction=0.01), 1000)


def test_the_rows_of_a_batch_can_be_named(tokenizer):
    made = batches(recipe(tokenizer, stream("a", texts(50)), packing=None), rows=2, accumulation=2)
    (batch,) = take(made, 1)
    named = [made.name_of(row) for row in made.rows]
    for tokens, name in zip(batch["tokens"].swapaxes(0, 1).reshape(4, -1), named, strict=True):
        number = int(name.removeprefix("row ").removesuffix(" of a0")) - 1
        assert tokenizer.decode(tokens).startswith(f"<{number}>".replace(" ", ""))


def test_empty_streams_end_in_an_error_that_names_them(tokenizer):
    with pytest.raises(ValueError, match=r"^dataset nothing has 0 rows$"):
        next(batches(recipe(tokenizer, stream("nothing", [], []))))
    with pytest.raises(ValueError, match=r"^no usable row in .* rows on end of useless$"):
        next(batches(recipe(tokenizer, stream("useless", [bad(1)]), skip=True)))


def test_state_of_other_data_is_refused(tokenizer):
    one = batches(recipe(tokenizer, stream("a", texts(9))))
    other = batches(recipe(tokenizer, stream("a", texts(9))), rows=2)
    with pytest.raises(ValueError, match=r"the checkpoint is of other data, .*: rows 8 → 4$"):
        other.set_state(one.get_state())


def test_prefetching_changes_nothing(tokenizer):
    made = recipe(tokenizer, stream("a", texts(60), texts(40, start=100)))
    plain = batches(made)
    expected = take(plain, 9)
    ahead = batches(made, prefetch=2)
    found = take(ahead, 4)
    state = ahead.get_state()
    found += take(ahead, 5)
    assert_same(found, expected)
    ahead.close()
    again = batches(made, prefetch=2)
    again.set_state(state)
    assert_same(take(again, 5), expected[4:])
    again.close()


def test_the_number_of_lanes_divides_the_rows_of_a_step():
    assert [lanes_for(rows, shuffled=True) for rows in (1, 6, 8, 17, 48, 1024)] == [1, 6, 8, 1, 16, 16]
    assert lanes_for(8, shuffled=False) == 1
