"""Rows with pictures, as the model is given them: token by token and pixel by pixel what HF's own processor makes."""

import base64
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from input_pipeline.pairs import Laid
from input_pipeline.pipeline import eval_feed, train_feed
from input_pipeline.processors import open_processor
from input_pipeline.prompts import Limit, read_prompts
from input_pipeline.reading import Reading, read_data
from tests.input_pipeline.seeing import ASK, chat, photo, png, split_of

FORMS = {  # the same picture and question
    "a path": chat({"type": "image_path", "content": "0.png"}, ASK),
    "the seed's": chat({"type": "image_url", "content": "0.png"}, ASK),
    "base64": chat({"type": "image_binary", "binary": base64.b64encode(png(0)).decode()}, ASK),
    "a data: URL": chat(
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png(0)).decode()}"}}, ASK
    ),
    "transformers'": chat({"type": "image", "path": "0.png"}, {"type": "text", "text": "What is this?"}),
    "TRL's": chat({"type": "image"}, {"type": "text", "text": "What is this?"}) | {"images": ["0.png"]},
    "TRL's without a place": chat("What is this?") | {"images": [{"path": "0.png", "bytes": None}]},
    "LLaVA's": {
        "image": "0.png",
        "conversations": [{"from": "human", "value": "<image>What is this?"}, {"from": "gpt", "value": "It is a cat."}],
    },
    "Oumi's conversation": {"conversation": chat({"type": "image_path", "content": "0.png"}, ASK)},
}


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_every_way_to_name_a_picture_gives_the_same_row(picture_folder, speaker, processor, row):
    data = read_data(
        split_of(picture_folder, [row]), speaker, reading=Reading(max_length=None, seed=0, processor=processor)
    )
    expected = speaker(
        "<|im_start|>user\n" + "<image>" * 4 + "\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
        "It is a cat.<|im_end|>\n"
    )["input_ids"]
    ids, trained = data.store[0]
    assert ids.tolist() == expected
    assert not trained[ids == processor.feature_id].any()
    assert trained[ids != processor.feature_id].all()
    pixels = processor.image([photo(0)], return_tensors="np")["pixel_values"][0]
    patches = data.pictures(0).patches
    assert np.array_equal(patches[1], pixels[:, :14, 14:].reshape(-1))
    assert np.array_equal(patches[2], pixels[:, 14:, :14].reshape(-1))


def test_a_batch_has_the_patches_of_its_rows_and_says_which_token_takes_which_feature(
    picture_folder, speaker, processor
):
    rows = [
        chat({"type": "image_path", "content": "0.png"}, ASK, {"type": "image_path", "content": "1.png"}),
        chat("No picture."),
        {
            "messages": [
                {"role": "user", "content": "First?"},
                {"role": "assistant", "content": "Show me."},
                {"role": "user", "content": [{"type": "text", "content": "Here."}, {"type": "image", "path": "2.png"}]},
                {"role": "assistant", "content": "A dog."},
            ]
        },
    ]
    split = split_of(
        picture_folder, rows, collator_kwargs={"train_on_completions_only": True, "instruction_template": "user"}
    )
    feed = eval_feed(
        {"validation": split, "train": split},
        speaker,
        reading=Reading(max_length=128, seed=0, processor=processor),
        rows_per_step=3,
    )
    batch = next(feed.batches)
    assert {name: array.shape for name, array in batch.items()} == {
        **dict.fromkeys(("tokens", "targets", "weights", "segments", "positions", "image_features"), (1, 3, 64)),
        "patches": (1, 3, 8, 3 * 14 * 14),
        "patch_segments": (1, 3, 8),
        "patch_places": (1, 3, 8, 2),
    }
    assert batch["patch_segments"][0].tolist() == [[1] * 4 + [2] * 4, [0] * 8, [1] * 4 + [0] * 4]
    assert batch["patch_places"][0, 2, :4].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    for r, pictures in enumerate([[0, 1], [], [2]]):
        here = batch["tokens"][0, r] == processor.feature_id
        assert batch["image_features"][0, r][here].tolist() == list(range(1, 4 * len(pictures) + 1))
        assert not batch["image_features"][0, r][~here].any()
        for n, picture in enumerate(pictures):
            pixels = processor.image([photo(picture)], return_tensors="np")["pixel_values"][0]
            assert np.array_equal(batch["patches"][0, r, 4 * n], pixels[:, :14, :14].reshape(-1))
    said = ["".join(speaker.decode([t]) for t in batch["targets"][0, r][batch["weights"][0, r] > 0]) for r in range(3)]
    assert said == ["It is a cat.<|im_end|>\n"] * 2 + ["Show me.<|im_end|>\nA dog.<|im_end|>\n"]


def _whole(feed):
    return list(feed.batches)


def test_rows_packed_into_one_keep_their_own_pictures(picture_folder, speaker, processor):
    rows = [chat({"type": "image_path", "content": f"{n % 3}.png"}, ASK, answer="cat " * (n + 1)) for n in range(6)]
    split = split_of(picture_folder, rows, pack=True)
    packed = train_feed(
        {"train": split},
        speaker,
        reading=Reading(max_length=128, seed=0, processor=processor),
        rows_per_step=2,
        accumulation=1,
        epochs=1,
        prefetch=0,
    )
    alone = train_feed(
        {"train": {**split, "pack": False}},
        speaker,
        reading=Reading(max_length=128, seed=0, processor=processor),
        rows_per_step=2,
        accumulation=1,
        epochs=1,
        prefetch=0,
    )

    def documents(feed):
        """Tokens of every document with the patches that its tokens take."""
        found = set()
        for batch in feed.batches:
            for r in range(2):
                row = {name: array[0, r] for name, array in batch.items()}
                for segment in range(1, row["segments"].max() + 1):
                    here = row["segments"] == segment
                    features = row["image_features"][here]
                    taken = row["patches"][features[features > 0] - 1]
                    assert len(set(row["patch_segments"][features[features > 0] - 1])) == 1
                    found.add((row["tokens"][here].tobytes(), taken.tobytes()))
        return found

    assert documents(packed) == documents(alone)
    assert len(documents(packed)) == 0  # they are used up
    for strategy in ("bfd_split", "wrapped"):
        with pytest.raises(NotImplementedError, match=f"not implemented yet: packing '{strategy}' with pictures"):
            train_feed(
                {"train": split},
                speaker,
                reading=Reading(max_length=128, seed=0, processor=processor, packing=strategy),
                rows_per_step=2,
                accumulation=1,
                epochs=1,
            )


def test_a_run_goes_on_with_the_same_pictures(picture_folder, speaker, processor):
    rows = [chat({"type": "image_path", "content": f"{n % 3}.png"}, ASK, answer=f"{n}") for n in range(8)]

    def feed(prefetch):
        return train_feed(
            {"train": split_of(picture_folder, rows)},
            speaker,
            reading=Reading(max_length=128, seed=3, processor=processor),
            rows_per_step=4,
            accumulation=2,
            epochs=3,
            prefetch=prefetch,
        ).batches

    first = feed(2)
    next(first)
    state = first.get_state()
    rest, again = list(first), feed(0)
    again.set_state(state)
    for one, other in zip(rest, again, strict=True):
        assert one.keys() == other.keys()
        assert "patches" in one
        assert all(np.array_equal(one[name], other[name]) for name in one)


BAD = {
    "missing": (
        chat({"type": "image_path", "content": "9.png"}, ASK),
        "row 2 of .*: picture '9.png': there",
    ),
    "too few": (chat({"type": "image"}, ASK), "row 2 of .*: 1 pictures are meant, and the row has no column 'images'"),
    "too many": (
        chat({"type": "image"}, ASK) | {"images": ["0.png", "1.png"]},
        'images has 2 pictures, and there are 1 parts {"type": "image"}',
    ),
    "a mark in the text": (chat("Is <image> a token?"), "row 2 of .*: the text holds '<image>'"),
    "video": (chat({"type": "video", "content": "a.mp4"}), "'video': not implemented yet"),
    "too long": (
        chat(*[{"type": "image_path", "content": "0.png"}] * 15),
        "row 2 of .*: its pictures are 60 tokens, and [0-9]+ fit: a picture is never cut",
    ),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD)
def test_a_row_whose_pictures_cannot_be_used_is_named(picture_folder, speaker, processor, row, message):
    good = chat({"type": "image_path", "content": "0.png"}, ASK)
    split, reading = split_of(picture_folder, [good, row]), Reading(max_length=60, seed=0, processor=processor)
    with pytest.raises(ValueError, match=message):
        read_data(split, speaker, reading=reading)
    data = read_data({**split, "on_bad_row": "skip", "max_bad_row_fraction": None}, speaker, reading=reading)
    assert (data.counts.used, data.counts.bad) == (1, 1)


def test_a_long_row_loses_text_after_its_pictures_only(picture_folder, speaker, processor):
    row = chat({"type": "image_path", "content": "0.png"}, ASK, answer="cat " * 60)
    data = read_data(
        split_of(picture_folder, [row]), speaker, reading=Reading(max_length=40, seed=0, processor=processor)
    )
    assert data.store.lengths.tolist() == [40]
    assert data.counts.over_long == 1
    assert len(data.pictures(0).patches) == 4


def test_a_model_without_pictures_refuses_them(picture_folder, tokenizer):
    row = chat({"type": "image_path", "content": "0.png"}, ASK)
    with pytest.raises(ValueError, match=r"row 1 of .*: has a picture, and the model takes none"):
        read_data(split_of(picture_folder, [row]), tokenizer, reading=Reading(max_length=None, seed=0))


def test_paligemma_has_its_pictures_first_and_its_answer_after_the_prompt(picture_folder, tokenizer_maker, tmp_path):
    tokenizer = tokenizer_maker(template="paligemma")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<bos>"]})
    tokenizer.bos_token = "<bos>"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 28, "width": 28}}))
    config = {"model_type": "paligemma", "vision_config": {"image_size": 28, "patch_size": 14}}
    processor = open_processor(config, tmp_path, tokenizer)
    row = {"prompt": "<image>caption en", "completion": "a cat", "image": "0.png"}
    feed = eval_feed(
        {"validation": (split := split_of(picture_folder, [row])), "train": split},
        tokenizer,
        reading=Reading(max_length=64, seed=0, processor=processor),
        rows_per_step=1,
    )
    batch = {name: array[0, 0] for name, array in next(feed.batches).items()}
    prompt = tokenizer("<image>" * 4 + "<bos>caption en\n")["input_ids"]
    answer = tokenizer("a cat<|im_end|>")["input_ids"]
    assert batch["tokens"][: len(prompt + answer)].tolist() == prompt + answer
    assert batch["groups"].tolist() == [1] * len(prompt) + [0] * (64 - len(prompt))
    assert batch["targets"][batch["weights"] > 0].tolist() == answer


def test_preferences_share_the_pictures_of_their_prompt(picture_folder, speaker, processor):
    rows = [
        {"prompt": "What is this?", "images": ["0.png"], "chosen": "A cat.", "rejected": "A dog."},
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And this?"}]}],
            "images": [{"bytes": base64.b64encode(png(1)).decode()}],
            "chosen": [{"role": "assistant", "content": "A bird."}],
            "rejected": [{"role": "assistant", "content": "A fish."}],
        },
    ]
    split = split_of(picture_folder, rows, dataset_name="vision_dpo_jsonl", collator_name="dpo_with_padding")
    reading = Reading(max_length=64, seed=0, processor=processor, trainer="TRL_DPO", answers="trl")
    feeds = [
        eval_feed(
            {"validation": split, "train": split},
            speaker,
            reading=reading,
            rows_per_step=2,
            lay_out=lambda data, rows, shared=shared: Laid(shared=shared),
        )
        for shared in (True, False)
    ]
    for feed, times in zip(feeds, (1, 2), strict=True):
        batch = next(feed.batches)
        assert batch["patches"].shape == (1, 2, 4, 588)
        for row in range(2):
            features = batch["image_features"][0, row]
            assert features[features > 0].tolist() == [1, 2, 3, 4] * times
            assert (batch["tokens"][0, row][features > 0] == processor.feature_id).all()
            assert not batch["weights"][0, row][features > 0].any()


def test_a_prompt_to_be_answered_has_its_pictures_with_it(picture_folder, speaker, processor):
    rows = [
        {"prompt": [{"role": "user", "content": [{"type": "image"}, ASK]}], "images": ["0.png"], "answer": "cat"},
        {"prompt": [{"role": "user", "content": "No picture?"}], "answer": "none"},
    ]
    reading = Reading(max_length=None, seed=0, processor=processor, trainer="TRL_GRPO")
    prompts = read_prompts(split_of(picture_folder, rows, collator_name=None), speaker, reading=reading)
    first, second = prompts[0], prompts[1]
    assert speaker.decode(first.ids) == (
        "<|im_start|>user\n" + "<image>" * 4 + "\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert first.columns == {"answer": "cat"}
    assert first.prompt[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    assert first.pictures.patches.shape == (4, 588)
    assert second.pictures is None
    verls = {
        "data_source": "cats",
        "prompt": [{"role": "user", "content": "<image>What is this?"}],
        "images": [{"bytes": png(0), "path": None}],
        "reward_model": {"style": "rule", "ground_truth": "cat"},
    }
    path = picture_folder / "verl.parquet"
    pq.write_table(pa.Table.from_pylist([verls]), path)
    split = {"datasets": [{"dataset_path": str(path)}]}
    verl = read_prompts(split, speaker, reading=replace(reading, trainer="VERL_GRPO"))
    assert verl[0].ids == first.ids
    assert np.array_equal(verl[0].pictures.patches, first.pictures.patches)
    with pytest.raises(ValueError, match="its pictures are 4 tokens, and 1 fit"):
        read_prompts(split_of(picture_folder, rows), speaker, reading=reading, limit=Limit(len(first.ids) - 6, "left"))
