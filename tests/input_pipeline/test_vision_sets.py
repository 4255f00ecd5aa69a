"""Sets of pictures as they come: saved ones, those that go by name, by columns; shown to people; gone meanwhile."""

import io

import numpy as np
import pytest
from rich.console import Console

from input_pipeline.examples import RowError
from input_pipeline.inspect import print_row
from input_pipeline.pipeline import train_feed
from input_pipeline.reading import Reading, read_data
from tests.input_pipeline.seeing import ASK, chat, photo, png, split_of

A_PATH = chat({"type": "image_path", "content": "0.png"}, ASK)


def test_inspecting_a_row_shows_its_pictures_and_where_their_tokens_stand(picture_folder, speaker, processor):
    row = chat({"type": "image_path", "content": "0.png"}, {"type": "text", "text": "?"}, {"type": "image"})
    data = read_data(
        split_of(picture_folder, [row | {"images": ["1.png"]}]),
        speaker,
        reading=Reading(max_length=None, seed=0, processor=processor),
    )
    console = Console(file=io.StringIO(), width=1000)
    print_row(console, data, 0, speaker)
    printed = console.file.getvalue().splitlines()
    here = np.flatnonzero(data.store[0][0] == processor.feature_id).tolist()
    assert printed[1] == f"picture 1: 31 x 45, tokens {here[0]} to {here[3]}: path '0.png'"
    assert printed[2] == f"picture 2: 31 x 45, tokens {here[4]} to {here[7]}: path '1.png'"


def test_pictures_of_a_saved_dataset_are_opened_by_us(picture_folder, speaker, processor, tmp_path):
    import datasets

    said = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A cat."}]
    text = datasets.Value("string")
    features = {
        "messages": datasets.List({"role": text, "content": text}),
        "images": datasets.List(datasets.Image()),
        "image": datasets.Image(),
    }
    rows = {"messages": [said], "images": [[photo(0)]], "image": [photo(1)]}
    saved = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    saved.save_to_disk(str(tmp_path / "saved"))
    saved.to_parquet(str(tmp_path / "rows.parquet"))
    for path in ("saved", "rows.parquet"):
        split = {"datasets": [{"dataset_path": str(tmp_path / path)}]}
        data = read_data(split, speaker, reading=Reading(max_length=None, seed=0, processor=processor))
        assert data.pictures.shown(0)[0].name.endswith(" bytes")
        pixels = processor.image([photo(0)], return_tensors="np")["pixel_values"][0]
        assert np.array_equal(data.pictures(0).patches[0], pixels[:, :14, :14].reshape(-1))


def test_columns_of_a_question_an_answer_and_a_picture_are_a_row(picture_folder, speaker, processor):
    split = split_of(picture_folder, [{"picture": "0.png", "asked": "What is this?", "said": "It is a cat."}])
    named = {"image_column": "picture", "question_column": "asked", "answer_column": "said"}
    split["datasets"][0] |= {"dataset_kwargs": named, "dataset_name": "hf_vision"}
    reading = Reading(max_length=None, seed=0, processor=processor)
    by_columns = read_data(split, speaker, reading=reading)
    ids, patches = by_columns.store[0][0].tolist(), by_columns.pictures(0).patches
    written_out = read_data(split_of(picture_folder, [A_PATH]), speaker, reading=reading)
    assert ids == written_out.store[0][0].tolist()
    assert np.array_equal(patches, written_out.pictures(0).patches)


def test_a_token_of_a_picture_that_a_model_says_itself_stands_for_no_feature(processor):
    prepared = processor.prepare([photo(0)])
    ids = np.array([processor.feature_id] * 4 + [7, processor.feature_id, 8])
    assert processor.token_arrays(ids, 0, prepared)["image_features"].tolist() == [1, 2, 3, 4, 0, 0, 0]
    assert processor.token_arrays(ids, 8, prepared)["image_features"].tolist() == [9, 10, 11, 12, 0, 0, 0]


def test_sets_of_pictures_that_go_by_name_are_read(picture_folder, speaker, processor):
    rows = {
        "HuggingFaceM4/the_cauldron": {
            "images": ["0.png"],
            "texts": [{"user": "What is this?", "assistant": "It is a cat.", "source": "x"}],
        },
        "merve/vqav2-small": {
            "image": {"bytes": None, "path": "0.png"},
            "question": "What is this?",
            "multiple_choice_answer": "It is a cat.",
        },
        "vl_sft": A_PATH,
    }
    found = set()
    for name, row in rows.items():
        split = split_of(picture_folder, [row], dataset_name=name)
        data = read_data(split, speaker, reading=Reading(max_length=None, seed=0, processor=processor))
        found.add((data.store[0][0].tobytes(), data.pictures(0).patches.tobytes()))
    assert len(found) == 1


def test_a_picture_that_is_gone_when_its_batch_is_made_is_named(speaker, processor, tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    feed = train_feed(
        {"train": split_of(tmp_path, [A_PATH])},
        speaker,
        reading=Reading(max_length=64, seed=0, processor=processor),
        rows_per_step=1,
        accumulation=1,
        epochs=None,
        prefetch=0,
    )
    next(feed.batches)
    (tmp_path / "0.png").unlink()
    with pytest.raises(RowError, match=r"row 1 of .*rows\.jsonl: picture '0\.png': there is no such file"):
        next(feed.batches)
