"""The recipes: each loads without a network, says what it is for, and understands rows as its dataset has them."""

import json
import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs import derived
from configs.load import Loaded, load
from configs.methods import GRPO, PREFERENCE
from input_pipeline.catalog import Entry, open_dataset
from input_pipeline.examples import Feedback, Preference, Prompt
from launch.train import run

RECIPES = Path(__file__).resolve().parents[2] / "configs/recipes"
FILES = sorted(RECIPES.glob("*.yaml"))

QUESTION, GOOD, BAD = (
    {"role": "user", "content": "Name a grain."},
    {"role": "assistant", "content": "Barley."},
    {"role": "assistant", "content": "No."},
)
_SCORES = {"score_chosen": 8.0, "score_rejected": 4.0}
_PAIR = {"prompt": "Name a grain.", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}
# A row of each set as the hub has it, with all its columns.
ROWS: dict[str, dict[str, Any]] = {
    "HuggingFaceH4/ultrafeedback_binarized": {
        **_PAIR,
        **_SCORES,
        "prompt_id": "9b27",
        "messages": [QUESTION, GOOD],
    },
    "trl-lib/ultrafeedback_binarized": {"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD], **_SCORES},
    "mlabonne/orpo-dpo-mix-40k": {**_PAIR, "source": "Airoboros", "question": "Name a grain."},
    "argilla/ultrafeedback-binarized-preferences-cleaned": {
        **_PAIR,
        "source": "evol_instruct",
        "chosen-rating": 5.0,
        "chosen-model": "gpt-4",
        "rejected-rating": 2.0,
        "rejected-model": "alpaca-7b",
    },
    "princeton-nlp/gemma2-ultrafeedback-armorm": {
        **_PAIR,
        "prompt_id": "d7c1",
        "all_generated_responses": ["Barley.", "No.", "Grain?"],
        "all_rm_scores": [0.16, 0.09, 0.11],
    },
    "oumi-ai/oumi-letter-count": {
        "conversation_id": "1",
        "messages": [QUESTION],
        "metadata": {"letter": "n", "letter_count_integer": 1, "letter_count_string": "one"},
    },
    "Jiayi-Pan/Countdown-Tasks-3to4": {"target": 98, "nums": [44, 19, 35]},
    "openai/gsm8k": {"question": "Name a grain.", "answer": "One.\n#### 72"},
    "trl-lib/kto-mix-14k": {"prompt": [QUESTION], "completion": [BAD], "label": False},
}


TRUTHS: dict[str, Any] = {  # what a reward function is given of a row that is asked
    "oumi-ai/oumi-letter-count": {"letter_count": 1},
    "Jiayi-Pan/Countdown-Tasks-3to4": {"numbers": [44, 19, 35], "target": 98},
    "openai/gsm8k": "72",
}


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def recipe(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def loaded(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    def refused(*_: Any) -> None:
        raise AssertionError("a recipe was loaded by way of a network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    return load(str(recipe))


def test_a_recipe_loads_and_every_key_in_it_acts(loaded: Loaded) -> None:
    assert loaded.config.training.trainer_type in (*PREFERENCE, *GRPO)
    assert loaded.notices == ()


def test_its_head_says_how_to_run_it_for_what_machine_with_what_rows_and_whose_numbers(recipe: Path) -> None:
    head = re.match(r"(#.*\n)+", recipe.read_text(encoding="utf-8"))
    assert head is not None
    for words in (
        f"einkorn train -c configs/recipes/{recipe.name}\n",
        "# Hardware: ",
        "# Data, one row",
        "# Numbers: ",
    ):
        assert words in head[0]


def test_the_readme_lists_every_recipe_with_its_dataset() -> None:
    table = (RECIPES / "README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| \[(\S+)\].*\| `(\S+)` \|", table, re.MULTILINE))
    assert listed == {file.name: load(str(file)).config.data.train.datasets[0].dataset_name for file in FILES}


def test_a_step_has_as_many_rows_as_its_head_says(recipe: Path, loaded: Loaded) -> None:
    text = re.sub(r"[\s#]+", " ", recipe.read_text(encoding="utf-8"))
    said = re.search(r"(\d+) (?:pairs|answers) a step", text)
    machines = re.search(r"Hardware: (one|four|eight)", text)
    assert said is not None
    assert machines is not None
    devices, training = {"one": 1, "four": 4, "eight": 8}[machines[1]], loaded.config.training
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * devices
    if training.trainer_type in GRPO:
        rows = derived.rollout(loaded.config, replicas=devices).answers
    assert rows == int(said[1])


def test_rows_as_its_datasets_have_them_are_understood(loaded: Loaded, tmp_path: Path) -> None:
    for split in (loaded.config.data.train, loaded.config.data.validation):
        for entry in split.datasets:
            example = _first_example(entry, loaded.config.training.trainer_type, tmp_path / "rows.jsonl")
            if isinstance(example, Feedback):
                assert (example.prompt, example.completion, example.label) == ((QUESTION,), (BAD,), False)
            elif isinstance(example, Prompt):
                columns = example.columns
                truth = columns["reward_model"]["ground_truth"] if "reward_model" in columns else columns
                assert truth == TRUTHS[entry.dataset_name]
            else:
                assert isinstance(example, Preference)
                assert (example.prompt, example.chosen, example.rejected) == ((QUESTION,), (GOOD,), (BAD,))


def _first_example(entry: Any, trainer: str, file: Path) -> Any:
    """Row 0 of a file with the one row of that dataset, under the dataset's name."""
    file.write_text(json.dumps(ROWS[entry.dataset_name]) + "\n", encoding="utf-8")
    copy = replace(Entry.of(entry), dataset_path=str(file), split="train")
    return open_dataset(copy, trainer=trainer).example(0)


@pytest.mark.slow  # six programs compiled for eight devices
@pytest.mark.parametrize("recipe", [file for file in FILES if "grpo" not in file.name], ids=lambda file: file.stem)
def test_a_tiny_model_trains_by_it(recipe: Path, tmp_path: Path, tiny_chat_model: Path) -> None:
    recorded = load(str(recipe)).config
    name, file = recorded.data.train.datasets[0].dataset_name, tmp_path / "rows.jsonl"
    file.write_text((json.dumps(ROWS[name]) + "\n") * 32, encoding="utf-8")
    options = {
        "model.model_name": tiny_chat_model,
        "model.model_max_length": 64,
        "data.train.datasets": f"[{{dataset_name: {name}, dataset_path: {file}}}]",
        "data.validation.datasets": "[]",
        "training.eval_strategy": "'no'",
        "training.output_dir": tmp_path / "out",
        "training.per_device_train_batch_size": 2,
        "training.gradient_accumulation_steps": 1,
        "training.learning_rate": 1e-2,
        "training.warmup_steps": 0,
        "training.max_steps": 4,
        "training.logging_steps": 1,
        "training.token_cache_dir": "null",
        "training.compile_cache_dir": "null",
    }
    run(load(str(recipe), [f"--{key}={value}" for key, value in options.items()]))
    lines = (tmp_path / "out/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
