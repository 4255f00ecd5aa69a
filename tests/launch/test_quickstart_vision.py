"""The vision quickstart: its digits, the model put together for it, and what is asked of it afterwards."""

import gzip
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration, set_seed

from configs.load import load
from launch import digits, quickstart
from launch.digit_tower import patches_of, shifted, trained_tower
from launch.small_llava import SPARE, TOWER, compose, drawn
from launch.talk import open_talker
from models import towers
from models.families import Fields
from models.sharding import paths
from models.vision import Vision, abstract_vision
from trainers.reward_workers import RewardFunctions

HALVES = (slice(0, 16), slice(16, 32))  # rows of a picture
ROOT = Path(__file__).resolve().parents[2]
WHEEL = "scikit_learn-1.5.2-cp311-cp311-manylinux2014_x86_64.whl"
SMALL = TOWER | {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}


def some_digits(count: int) -> list[digits.Digit]:
    random = np.random.default_rng(0)
    return [digits.Digit(random.integers(0, 17, (8, 8)).astype(np.uint8), number % 10) for number in range(count)]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Eight digits as the quickstart has them, three of them held out."""
    folder = tmp_path / "digits"
    folder.mkdir()
    digits.write(some_digits(8), folder, held_out=3)
    return folder


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_every_digit_is_a_picture_and_a_row_the_last_of_them_held_out(written: Path) -> None:
    rows = [row for split in ("train", "heldout") for row in lines(written / f"{split}.jsonl")]
    files = ("train", "heldout", "train_turned", "heldout_turned", "train_turned_prompts")
    assert [len(lines(written / f"{name}.jsonl")) for name in files] == [5, 3, 5, 3, 5]
    for digit, row in zip(some_digits(8), rows, strict=True):
        picture, question = row["messages"][0]["content"]
        assert question == {"type": "text", "content": "Which digit is this?"}
        assert row["messages"][1] == {"role": "assistant", "content": str(digit.label)}
        pixels = np.asarray(Image.open(written / picture["content"]))[::4, ::4].astype(int)
        assert np.array_equal(np.round((255 - pixels) * 16 / 255), digit.pixels)  # nothing of it is lost


def test_what_is_asked_for_rewards_is_what_is_trained_on(written: Path) -> None:
    for split in ("train", "train_turned"):
        rows, prompts = (lines(written / f"{split}{kind}.jsonl") for kind in ("", "_prompts"))
        for row, prompt in zip(rows, prompts, strict=True):
            assert row["messages"] == [*prompt["prompt"], {"role": "assistant", "content": prompt["digit"]}]


def test_turned_pictures_show_the_same_digits_askew_on_white_paper(tmp_path: Path) -> None:
    line = np.zeros((8, 8), np.uint8)
    line[:, 3:5] = 16  # from top to bottom
    digits.write([digits.Digit(line, 1)] * 4, tmp_path, held_out=2)
    pictures, labels = digits.read(tmp_path, "heldout_turned")
    assert labels.tolist() == [1, 1]
    for picture in pictures:
        ink = 255.0 - picture
        top, bottom = (ink[rows].sum(axis=0) @ np.arange(32) / ink[rows].sum() for rows in HALVES)
        assert 13 < np.degrees(np.arctan2(bottom - top, 16)) < 37  # the ends of a line are outside the picture
        assert picture[0, 0] == 255


def test_lines_of_greys_and_a_label_are_read() -> None:
    (digit,) = digits.digits(gzip.compress((",".join(["0"] * 63 + ["16"]) + ",7\n").encode()))
    assert (digit.pixels.shape, digit.pixels[7, 7], digit.pixels.sum(), digit.label) == ((8, 8), 16, 16, 7)


def test_other_data_than_expected_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for name, value in (("NO_INDEX", "1"), ("CONFIG_FILE", "/dev/null"), ("FIND_LINKS", str(shelf))):
        monkeypatch.setenv(f"PIP_{name}", value)
    with zipfile.ZipFile(shelf / WHEEL, "w") as wheel:
        info = "scikit_learn-1.5.2.dist-info"
        wheel.writestr(digits.DATA, b"not the digits")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: scikit-learn\nVersion: 1.5.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nTag: cp311-cp311-manylinux2014_x86_64\n")
        wheel.writestr(f"{info}/RECORD", "")
    with pytest.raises(RuntimeError, match=r"digits\.csv\.gz has sha256 \w+, expected \w+; not used"):
        digits.fetch_digits(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_pictures_are_read_back_as_greys_with_what_they_show(written: Path) -> None:
    pictures, labels = digits.read(written, "heldout")
    assert (pictures.shape, pictures.dtype, labels.tolist()) == ((3, 32, 32), np.uint8, [5, 6, 7])
    greys = [255 - digit.pixels.astype(int) * 255 // 16 for digit in some_digits(8)[5:]]
    assert np.array_equal(pictures[:, ::4, ::4], greys)


def test_a_tower_is_given_what_the_models_processor_makes(composed: tuple[Path, Path], written: Path) -> None:
    talker = open_talker(str(composed[1]))
    assert talker.processor is not None
    assert talker.config.vision is not None
    pictures, _ = digits.read(written, "heldout")
    prepared = talker.processor.prepare([Image.fromarray(picture).convert("RGB") for picture in pictures])
    here = patches_of(pictures, talker.config.vision).reshape(prepared.patches.shape)
    np.testing.assert_allclose(here, prepared.patches, atol=1e-6)


def test_a_tower_learns_to_tell_pictures_apart(capsys: pytest.CaptureFixture[str]) -> None:
    vision = Vision(**towers.tower(Fields(dict(SMALL))), takes=(2,), drops_class=True, projector="mlp")
    random = np.random.default_rng(0)
    shapes = paths({"vision": abstract_vision(vision, 8, dtype=np.float32)["vision"]})
    leaves = {path: drawn(path, leaf.shape, random) for path, leaf in shapes.items()}
    pictures = np.full((4, 32, 32), 255, np.uint8)  # white, black, lines across, lines down
    pictures[1], pictures[2, ::8], pictures[3, :, ::8] = 0, 0, 0
    learned = trained_tower(vision, leaves, pictures, np.arange(4), steps=60)
    assert {path: leaf.shape for path, leaf in learned.items()} == {path: leaf.shape for path, leaf in shapes.items()}
    assert "it tells 4 of 4 pictures right" in capsys.readouterr().err


def test_shifted_pictures_keep_their_ink_within_two_pixels() -> None:
    picture = np.full((1, 32, 32), 255, np.uint8)
    picture[0, 16, 16] = 0
    moved = shifted(picture.repeat(64, axis=0), np.random.default_rng(0))
    places = {(int(y), int(x)) for y, x in np.argwhere(moved == 0)[:, 1:]}
    assert len(np.argwhere(moved == 0)) == 64
    assert places <= {(y, x) for y in range(14, 19) for x in range(14, 19)}
    assert {y for y, _ in places} == {x for _, x in places} == {14, 15, 16, 17, 18}


@pytest.fixture
def composed(tmp_path: Path, tiny_chat_model: Path, written: Path) -> tuple[Path, Path]:
    """The folder of a tiny llama as SmolLM2's is, and that of the model put together from it."""
    text, folder = tmp_path / "text", tmp_path / "seeing"
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_model)
    tokenizer.add_special_tokens({"additional_special_tokens": [SPARE]})
    tokenizer.save_pretrained(text)
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes)).save_pretrained(text)
    compose(text, folder, *digits.read(written, "train"), tower=SMALL, steps=2)
    return text, folder


def test_transformers_loads_the_model_strictly_with_the_text_models_weights_as_they_were(
    composed: tuple[Path, Path], written: Path
) -> None:
    text, folder = composed
    model, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    own, all_of_them = load_file(text / "model.safetensors"), load_file(folder / "model.safetensors")
    for name, tensor in own.items():
        assert np.array_equal(all_of_them[f"language_model.{name}"], tensor), name
    talker = open_talker(str(folder))
    (row, *_) = quickstart.read_rows(written / "heldout.jsonl")
    asked = talker.question(row.prompt)
    assert asked.ids.count(model.config.image_token_id) == 4  # patches of 16 × 16
    assert asked.shown is not None
    assert (row.expected, row.said) == ("5", "heldout/0000.png Which digit is this?")


def test_the_quickstarts_of_pictures_load_and_every_key_in_them_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("vl_sft", "vl_grpo"):
        task, options = quickstart.chosen([name, "--training.max_steps", "5"])
        assert load(task.config, options).notices == ()
    assert quickstart.TASKS["vl_sft"].is_right(" 7\n", "7")
    assert not quickstart.TASKS["vl_sft"].is_right("77", "7")


def test_the_right_digit_alone_is_rewarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    texts = ["7", "1", "7 or 1", ""]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    functions = load("configs/quickstart/vl_grpo.yaml", []).config.training.reward_functions
    with RewardFunctions(functions, kwargs={}, timeout=20, workers=1) as judge:
        scores = judge.score(["a prompt"] * 4, completions, [[0]] * 4, {"digit": ["7"] * 4})
    assert scores[:, 0].tolist() == [1, 0, 0, 0]


def test_rewards_go_on_from_the_model_that_sft_made_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        SystemExit, match=r"vl_grpo goes on from runs/quickstart-vl, which vl_sft makes; run that first"
    ):
        quickstart.TASKS["vl_grpo"].prepare()


@pytest.fixture
def fetched(smollm2_folder: Path) -> None:
    """Model and digits are there; else what needs them is skipped, and fails where CI is set."""
    try:
        digits.fetch_digits()
    except RuntimeError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"digits: {error}")


@pytest.mark.slow
@pytest.mark.usefixtures("fetched")
def test_most_held_out_digits_are_read_after_the_quickstart(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.quickstart", "vl_sft", f"--training.output_dir={tmp_path / 'run'}"]
    flags = {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}  # one device, as CPUs have
    done = subprocess.run(command, cwd=ROOT, env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = re.search(r"the right digit on 297 held-out messages: (\d+)% before, (\d+)% after", done.stdout)
    assert said is not None, done.stdout
    before, after = map(int, said.groups())
    assert before <= 20
    assert after >= 80
    assert LlavaForConditionalGeneration.from_pretrained(tmp_path / "run").config.model_type == "llava"
