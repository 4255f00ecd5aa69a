"""From a data section to batches: whole arrays, every row once an epoch, and resuming bit for bit in every mode."""

import dataclasses
import itertools
import json
import math

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from input_pipeline.counts import Counts
from input_pipeline.order import EpochOrder, permutation
from input_pipeline.pipeline import eval_feed, train_feed
from input_pipeline.reading import Reading, loss_mask

COMPLETIONS = "text_completions_only_with_padding"


def chat(number, words=1):
    answer = " ".join([f"a{number}"] * words)
    return {"messages": [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": answer}]}


def section(path, *, validation=None, **split):
    """A data section with one file."""
    train = {"datasets": [{"dataset_name": "text_sft", "dataset_path": str(path)}], **split}
    other = {"datasets": [{"dataset_name": "text_sft", "dataset_path": str(validation or path)}]}
    return {"train": train, "validation": other}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rows(tmp_path):
    """Eleven chats of different lengths."""
    return write(tmp_path / "train.jsonl", [chat(number, 1 + 7 * number % 11) for number in range(11)])


def feed(data, tokenizer, **options):
    defaults = {"max_length": 256, "rows_per_step": 4, "accumulation": 2, "epochs": 2, "seed": 7, "prefetch": 0}
    asked = defaults | options
    names = {field.name for field in dataclasses.fields(Reading)} & set(asked)
    return train_feed(data, tokenizer, reading=Reading(**{name: asked.pop(name) for name in names}), **asked)


def documents(batch):
    """The token ids of every document of a batch, in order."""
    found = []
    for tokens, segments in zip(
        batch["tokens"].reshape(-1, batch["tokens"].shape[-1]),
        batch["segments"].reshape(-1, batch["tokens"].shape[-1]),
        strict=True,
    ):
        found += [tuple(tokens[segments == s].tolist()) for s in range(1, segments.max() + 1)]
    return found


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_a_batch_is_what_the_rows_say(tokenizer, tmp_path):
    path = write(tmp_path / "two.jsonl", [{"prompt": "ab", "completion": "c"}, {"prompt": "", "completion": "d"}])
    made = feed(section(path), tokenizer, rows_per_step=4, epochs=1, shuffle_rows=False)
    (batch,) = made.batches
    a, b, c, d, end = (tokenizer.convert_tokens_to_ids(t) for t in ("a", "b", "c", "d", "<|im_end|>"))
    assert batch["tokens"].shape == (2, 2, 64)
    assert batch["tokens"][..., :5].tolist() == [[[a, b, c, end, 0], [d, end, 0, 0, 0]], [[0] * 5] * 2]
    assert batch["targets"][..., :5].tolist() == [[[b, c, end, 0, 0], [end, 0, 0, 0, 0]], [[0] * 5] * 2]
    assert batch["weights"][..., :5].tolist() == [[[0, 1, 1, 0, 0], [1, 0, 0, 0, 0]], [[0] * 5] * 2]
    assert batch["segments"][..., :5].tolist() == [[[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], [[0] * 5] * 2]
    assert batch["positions"][..., :5].tolist() == [[[0, 1, 2, 3, 0], [0, 1, 0, 0, 0]], [[0] * 5] * 2]
    assert not any(array[..., 5:].any() for array in batch.values())
    assert made.data.counts == Counts(read=2, used=2, tokens=6, trained_tokens=3, text_bytes=4)
    assert [made.batches.name_of(row) for row in made.batches.rows] == [f"row 1 of {path}", f"row 2 of {path}"]


@pytest.mark.parametrize(("rows_per_step", "accumulation"), [(1, 1), (4, 1), (4, 2), (6, 3), (12, 2), (30, 5)])
def test_steps_are_counted_as_transformers_does(tokenizer, rows, rows_per_step, accumulation):
    made = feed(section(rows), tokenizer, rows_per_step=rows_per_step, accumulation=accumulation)
    microbatches = math.ceil(11 / (rows_per_step // accumulation))
    assert made.steps_per_epoch == math.ceil(microbatches / accumulation)
    assert made.steps == 2 * made.steps_per_epoch == len(list(made.batches))


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_epoch_trains_every_row_once(tokenizer, rows, pack, shuffle):
    made = feed(section(rows, pack=pack), tokenizer, shuffle_rows=shuffle)
    batches = list(made.batches)
    stored = sorted(tuple(ids.tolist()) for ids in self_tokens(tokenizer, rows))
    epochs = [batches[: made.steps_per_epoch], batches[made.steps_per_epoch :]]
    seen = [list(itertools.chain.from_iterable(map(documents, epoch))) for epoch in epochs]
    assert [sorted(epoch) for epoch in seen] == [stored, stored]
    assert (seen[0] == seen[1]) is not shuffle


@pytest.mark.parametrize("packing", ["bfd_split", "wrapped"])
def test_documents_that_are_cut_are_trained_whole(tokenizer, rows, packing):
    made = feed(section(rows, pack=True), tokenizer, packing=packing, max_length=20, epochs=1)
    batches = list(made.batches)
    stored = list(self_tokens(tokenizer, rows))
    assert sum(int((batch["segments"] > 0).sum()) for batch in batches) == sum(map(len, stored))
    # Every token but a document's first is predicted, also where it begins a row: by the last token of the row before.
    assert sum(int(batch["weights"].sum()) for batch in batches) == sum(len(ids) - 1 for ids in stored)
    pairs = {(a, b) for ids in stored for a, b in itertools.pairwise(ids.tolist())}
    found = [zip(b["tokens"][b["weights"] > 0], b["targets"][b["weights"] > 0], strict=True) for b in batches]
    assert {(int(a), int(b)) for batch in found for a, b in batch} == pairs
    assert made.longest_document == 20
    assert packing == "bfd_split" or made.steps_per_epoch == math.ceil(math.ceil(sum(map(len, stored)) / 20) / 4)


def test_a_row_that_is_one_document_is_seen_from_end_to_end(tokenizer, rows):
    made = feed(section(rows, pack=True, isolate_documents=False), tokenizer, max_length=256, epochs=1)
    assert made.longest_document == 256
    assert {int(batch["segments"].max()) for batch in made.batches} == {1}


@pytest.mark.parametrize("packing", [None, "wrapped"])
def test_a_stream_in_the_order_stored_is_the_same_as_the_rows_by_index(tokenizer, rows, packing):
    options = {"shuffle_rows": False, "max_length": 64, "rows_per_step": 2, "accumulation": 1}
    options |= {"packing": packing} if packing else {}
    data = section(rows, pack=bool(packing))
    stored = list(feed(data, tokenizer, epochs=1, **options).batches)
    data["train"]["stream"] = True
    counted = feed(data, tokenizer, epochs=1, **options)
    assert counted.notices[0].startswith("data.train.stream without training.max_steps: all rows are read")
    assert_same(list(counted.batches), stored)
    streamed = feed(data, tokenizer, epochs=None, **options)
    assert (streamed.steps, streamed.data) == (None, None)
    assert_same(list(itertools.islice(streamed.batches, len(stored) - 1)), stored[:-1])  # then it begins again


def test_a_validation_split_that_is_a_stream_is_gone_through_once_each_time(tokenizer, rows):
    data = section(rows)
    data["validation"]["stream"] = True
    made = eval_feed(data, tokenizer, reading=Reading(max_length=64, seed=1), rows_per_step=4)
    beginning = made.batches.get_state()
    once = list(made.batches)
    assert sum(int(batch["segments"].any(-1).sum()) for batch in once) == 11
    assert made.counts.used == 11
    made.batches.set_state(beginning)
    assert_same(list(made.batches), once)
    assert made.counts.used == 11


def test_the_share_of_each_dataset_is_known(tokenizer, tmp_path):
    paths = [write(tmp_path / f"{name}.jsonl", [chat(n) for n in range(count)]) for name, count in (("a", 9), ("b", 3))]
    data = section(paths[0])
    data["train"]["datasets"] = [{"dataset_name": "text_sft", "dataset_path": str(path)} for path in paths]
    assert feed(data, tokenizer).seen() == {str(paths[0]): 0.75, str(paths[1]): 0.25}


def self_tokens(tokenizer, path):
    for line in path.read_text().splitlines():
        yield np.asarray(tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=False))


def test_rows_come_as_stored_without_shuffling(tokenizer, rows):
    made = feed(section(rows), tokenizer, shuffle_rows=False, epochs=1)
    seen = itertools.chain.from_iterable(map(documents, made.batches))
    assert list(seen) == [tuple(ids.tolist()) for ids in self_tokens(tokenizer, rows)]


def test_lengths_are_those_of_the_steps_longest_row(tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", [chat(i, words) for i, words in enumerate([1, 1, 40, 1, 1, 1])])
    made = feed(section(path), tokenizer, rows_per_step=2, accumulation=1, epochs=1, shuffle_rows=False)
    assert [batch["tokens"].shape for batch in made.batches] == [(1, 2, 64), (1, 2, 128), (1, 2, 64)]
    assert made.longest == 128


def test_packed_rows_have_the_full_length_and_hold_several_chats(tokenizer, rows):
    made = feed(section(rows, pack=True), tokenizer, max_length=128, rows_per_step=2, accumulation=1, epochs=1)
    batches = list(made.batches)
    assert {batch["tokens"].shape for batch in batches} == {(1, 2, 128)}
    assert max(batch["segments"].max() for batch in batches) >= 3
    used = sum((batch["segments"] > 0).sum() for batch in batches) / sum(batch["segments"].size for batch in batches)
    assert made.useful == pytest.approx(used)


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_useful_share_of_padded_batches_is_known_beforehand(tokenizer, rows, shuffle):
    made = feed(section(rows), tokenizer, epochs=1, shuffle_rows=shuffle)
    batches = list(made.batches)
    used = sum((batch["segments"] > 0).sum() for batch in batches) / sum(batch["segments"].size for batch in batches)
    assert made.useful == pytest.approx(used)


def test_the_rows_of_a_step_do_not_depend_on_accumulation(tokenizer, rows):
    for pack in (False, True):
        made = [feed(section(rows, pack=pack), tokenizer, accumulation=a).batches for a in (1, 2, 4)]
        for one, two, four in zip(*made, strict=True):
            for name in one:
                flat = one[name].reshape(4, -1)
                np.testing.assert_array_equal(flat, two[name].reshape(4, -1))
                np.testing.assert_array_equal(flat, four[name].reshape(4, -1))


@pytest.mark.parametrize("packing", [None, "bfd", "bfd_split", "wrapped"])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_after_any_step_a_new_run_goes_on_exactly(tokenizer, rows, packing, shuffle, prefetch):
    def fresh(accumulation=2):
        options = {"shuffle_rows": shuffle, "prefetch": prefetch, "accumulation": accumulation, "epochs": 3}
        options |= {"max_length": 48, "packing": packing} if packing else {}
        return feed(section(rows, pack=bool(packing)), tokenizer, **options).batches

    straight, states = [], []
    batches = fresh()
    for step in itertools.count():
        states.append(json.loads(json.dumps(batches.get_state())))
        assert states[-1]["position"] == {"next_index": step}
        try:
            straight.append(next(batches))
        except StopIteration:
            break
    assert len(straight) == len(states) - 1
    for step, state in enumerate(states):
        resumed = fresh()
        resumed.set_state(state)
        assert resumed.get_state() == state
        assert_same(list(resumed), straight[step:])
    batches.set_state(states[1])  # also backwards, in the same run
    assert_same(list(batches), straight[1:])
    batches.close()


@pytest.mark.parametrize("pack", [False, True])
def test_grains_own_check_of_checkpoints_passes(tokenizer, rows, pack):
    made = feed(section(rows, pack=pack), tokenizer, epochs=1)
    grain.experimental.assert_equal_output_after_checkpoint(Restartable(made.batches))


class Restartable:
    """Starts the same batches anew at every `iter`, as Grain's check wants it."""

    def __init__(self, batches):
        self.batches, self.start = batches, batches.get_state()

    def __iter__(self):
        self.batches.set_state(self.start)
        return self.batches


def test_state_of_other_data_is_refused_with_what_differs(tokenizer, rows, tmp_path):
    state = feed(section(rows), tokenizer).batches.get_state()
    with pytest.raises(
        ValueError, match=r"the checkpoint is of other data, .* meaningless: pack None → bfd, rows_per_epoch 11 → 2"
    ):
        feed(section(rows, pack=True), tokenizer).batches.set_state(state)
    with pytest.raises(ValueError, match=r"meaningless: rows_per_step 4 → 8, seed 7 → 8$"):
        feed(section(rows), tokenizer, rows_per_step=8, seed=8).batches.set_state(state)
    other = write(tmp_path / "other.jsonl", [chat(number, 1 + 7 * number % 11) for number in range(10, -1, -1)])
    with pytest.raises(ValueError, match=r"meaningless: tokens [0-9a-f]{32} → [0-9a-f]{32}$"):
        feed(section(other), tokenizer).batches.set_state(state)


def test_epochs_may_be_a_fraction_or_without_end(tokenizer, rows):
    half = feed(section(rows), tokenizer, epochs=1.5)
    assert (half.steps, half.steps_per_epoch) == (5, 3)  # ceil(1.5 * 3)
    assert len(list(half.batches)) == 5
    endless = feed(section(rows), tokenizer, epochs=None)
    assert (endless.steps, endless.steps_per_epoch) == (None, 3)
    assert_same(list(itertools.islice(endless.batches, 5)), list(feed(section(rows), tokenizer, epochs=1.5).batches))


def test_the_last_microbatch_can_be_dropped_if_it_is_not_full(tokenizer, rows):
    made = feed(section(rows), tokenizer, rows_per_step=4, accumulation=1, drop_last=True, epochs=1)
    assert [len(documents(batch)) for batch in made.batches] == [4, 4]
    with pytest.raises(ValueError, match="dataloader_drop_last leaves nothing of 11 rows: a microbatch has 12"):
        feed(section(rows), tokenizer, rows_per_step=12, accumulation=1, drop_last=True)


def test_rows_that_cannot_be_split_evenly_are_refused(tokenizer, rows):
    with pytest.raises(ValueError, match="5 rows a step cannot be split into 2 microbatches of the same size"):
        feed(section(rows), tokenizer, rows_per_step=5)


def test_over_long_rows_are_cut_and_those_left_without_a_trained_token_dropped_and_both_counted(tokenizer, tmp_path):
    long_question = {"messages": [{"role": "user", "content": "q " * 60}, {"role": "assistant", "content": "a"}]}
    path = write(tmp_path / "rows.jsonl", [chat(1), chat(2, 40), long_question])
    split = {"collator_name": COMPLETIONS, "train_target": "ALL_ASSISTANT_TURNS"}
    made = feed(section(path, **split), tokenizer, max_length=40, epochs=1)
    rows = Counts(read=3, used=2, untrained=1, over_long=2)
    assert made.data.counts._replace(tokens=0, trained_tokens=0, text_bytes=0) == rows
    (batch,) = made.batches
    assert batch["tokens"].shape == (2, 2, 40)
    assert made.data.counts.tokens == (batch["segments"] > 0).sum()
    assert made.data.counts.trained_tokens == batch["weights"].sum()


def test_without_a_longest_length_nothing_is_cut(tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", [chat(1), chat(2, 200)])
    made = feed(section(path), tokenizer, max_length=None, epochs=1)
    (batch,) = made.batches
    assert batch["tokens"].shape[-1] == max(len(ids) for ids in self_tokens(tokenizer, path)) == made.longest
    assert made.data.counts.over_long == 0


def test_a_bad_row_is_an_error_or_skipped_and_counted(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{json.dumps(chat(1))}\n{{"messages": 1\n{json.dumps({"messages": [{"role": "x"}]})}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2:15: not valid JSON"):
        feed(section(path), tokenizer)
    made = feed(section(path, on_bad_row="skip"), tokenizer)
    assert (made.data.counts.read, made.data.counts.used, made.data.counts.bad) == (3, 1, 2)
    reason = "not valid JSON (Expecting ',' delimiter): {\"messages\": 1"
    assert sum(made.data.counts.bad_kinds.values()) == 2
    (notice,) = made.data.notices
    assert notice.startswith("skipped 2 bad rows (")
    assert notice.endswith(f"; the first: {path}:2:15: {reason}")


def test_no_usable_row_is_an_error_that_counts_them(tokenizer, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(ValueError, match=r"^train dataset .*empty\.jsonl has 0 usable rows \(read 0, bad 0, "):
        feed(section(empty), tokenizer)
    short = write(tmp_path / "short.jsonl", [chat(1)])
    split = {"collator_name": COMPLETIONS, "train_target": "FINAL_ASSISTANT_TURN"}
    with pytest.raises(
        ValueError, match=r"has 0 usable rows \(read 1, bad 0, without a trained token within max_length 3: 1\)"
    ):
        feed(section(short, **split), tokenizer, max_length=3)
    with pytest.raises(ValueError, match=r"data\.train\.datasets is empty; name at least one dataset"):
        feed({"train": {"datasets": []}}, tokenizer)


def test_several_processes_tokenise_to_the_same_rows(tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", [chat(number, 1 + number % 5) for number in range(1200)])
    data = section(path, collator_name=COMPLETIONS, train_target="ALL_ASSISTANT_TURNS")
    heard = []
    one = feed(data, tokenizer, progress=heard.append)
    data["train"]["datasets"][0]["transform_num_workers"] = 2
    two = feed(data, tokenizer)
    assert one.batches.get_state() == two.batches.get_state()
    assert one.data.counts == two.data.counts
    assert sum(heard) == 1200


def test_samples_of_several_datasets_follow_each_other(tokenizer, tmp_path):
    first = write(tmp_path / "a.jsonl", [chat(number) for number in range(5)])
    second = write(tmp_path / "b.jsonl", [{"text": f"t{number}"} for number in range(2)])
    data = section(first)
    data["train"]["datasets"] = [
        {"dataset_name": "text_sft", "dataset_path": str(first), "sample_count": 2, "split": "train[1:]"},
        {"dataset_name": "text_sft", "dataset_path": str(second), "sample_count": 3},
    ]
    made = feed(data, tokenizer, rows_per_step=8, epochs=1, shuffle_rows=False)
    next(made.batches)
    names = [f"row {n} of {path}" for n, path in [(2, first), (3, first), (1, second), (2, second), (1, second)]]
    assert [made.batches.name_of(row) for row in made.batches.rows] == names


@pytest.mark.parametrize(
    ("split", "options", "turns"),
    [
        ({}, {}, "all"),
        ({"collator_name": "text_with_padding"}, {}, "all"),
        ({}, {"assistant_only_loss": True}, "assistant"),
        ({"collator_name": COMPLETIONS, "train_target": "ALL_ASSISTANT_TURNS"}, {}, "assistant"),
        (
            {"collator_name": COMPLETIONS, "train_target": "FINAL_ASSISTANT_TURN"},
            {"assistant_only_loss": True},
            "final",
        ),
        ({"collator_name": COMPLETIONS, "collator_kwargs": {"response_template": "x"}}, {}, "final"),
        (
            {"collator_name": COMPLETIONS, "collator_kwargs": {"response_template": "x", "instruction_template": "y"}},
            {},
            "assistant",
        ),
    ],
)
def test_the_collator_settings_say_what_is_trained(split, options, turns):
    assert loss_mask(split, **options).turns == turns


def test_collator_settings_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match="needs train_target: ALL_ASSISTANT_TURNS or FINAL_ASSISTANT_TURN"):
        loss_mask({"collator_name": COMPLETIONS})
    with pytest.raises(ValueError, match=r"data\.train\.train_target is 'ALL'; allowed: ALL_ASSISTANT_TURNS, FINAL_"):
        loss_mask({"collator_name": COMPLETIONS, "train_target": "ALL"})
    with pytest.raises(ValueError, match=f"train_target is for collator_name {COMPLETIONS}, not None"):
        loss_mask({"train_target": "ALL_ASSISTANT_TURNS"})
    with pytest.raises(ValueError, match="collator_name is 'text'; allowed: text_with_padding"):
        loss_mask({"collator_name": "text"})


def test_templates_of_the_collator_must_occur_in_the_chat(tokenizer, rows):
    split = {"collator_name": COMPLETIONS, "train_target": "ALL_ASSISTANT_TURNS"}
    fine = feed(section(rows, collator_kwargs={"response_template": "<|im_start|>assistant\n"}, **split), tokenizer)
    assert fine.data.counts.used == 11
    with pytest.raises(
        ValueError, match=r"row 1 of .*: the template string '\[/INST\]' does not occur in the rendered"
    ):
        feed(section(rows, collator_kwargs={"response_template": "[/INST]"}, **split), tokenizer)
    with pytest.raises(
        ValueError, match=r"a key of data\.train\.collator_kwargs is 'respons'; allowed: response_template"
    ):
        feed(section(rows, collator_kwargs={"respons": "x"}, **split), tokenizer)


def test_a_dataset_can_ask_for_assistant_turns_by_itself(tokenizer, rows):
    data = section(rows)
    data["train"]["datasets"].append({**data["train"]["datasets"][0], "dataset_kwargs": {"assistant_only": True}})
    every, assistant = feed(section(rows), tokenizer), feed(data, tokenizer)
    split = {"collator_name": COMPLETIONS, "train_target": "ALL_ASSISTANT_TURNS"}
    only = feed(section(rows, **split), tokenizer)
    assert assistant.data.counts.trained_tokens == every.data.counts.trained_tokens + only.data.counts.trained_tokens


def test_evaluation_goes_once_through_in_order_and_again_from_its_first_state(tokenizer, rows):
    data = section(rows, collator_name=COMPLETIONS, train_target="ALL_ASSISTANT_TURNS")
    made = eval_feed(data, tokenizer, reading=Reading(max_length=256, seed=0), rows_per_step=4)
    assert (made.steps, made.steps_per_epoch) == (3, 3)
    start = made.batches.get_state()
    once = list(made.batches)
    assert [batch["tokens"].shape[:2] for batch in once] == [(1, 4)] * 3
    seen = list(itertools.chain.from_iterable(map(documents, once)))
    assert seen == [tuple(ids.tolist()) for ids in self_tokens(tokenizer, rows)]
    assert (
        sum(batch["weights"].sum() for batch in once) == made.data.counts.trained_tokens < made.data.counts.tokens - 11
    )
    made.batches.set_state(start)
    assert_same(list(made.batches), once)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 50), seed=st.none() | st.integers(-5, 2**64), epoch=st.integers(0, 3), data=st.data())
def test_every_epoch_is_a_permutation_and_a_cut_one_its_beginning(count, seed, epoch, data):
    keep = data.draw(st.integers(1, count))
    dataset = EpochOrder(grain.MapDataset.range(count), seed=seed, keep=keep)
    whole = permutation(count, seed, epoch)
    assert sorted(whole.tolist()) == list(range(count))
    assert [dataset[epoch * keep + i] for i in range(keep)] == whole[:keep].tolist()


def test_the_order_of_an_epoch_is_the_same_for_ever():
    assert permutation(8, 42, 0).tolist() == [7, 1, 6, 4, 3, 5, 0, 2]
    assert permutation(8, 42, 1).tolist() == [6, 0, 7, 2, 5, 1, 4, 3]
