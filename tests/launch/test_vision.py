"""Learning from pictures as a user does it: the documented configuration, what is frozen, going on."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import LlavaForConditionalGeneration

from tests.launch.test_end_to_end import einkorn

# As documented, but for the paths.
DOCUMENTED = """
model:
  model_name: "{model}"
  chat_template: "{template}"
  freeze_layers: ["vision_encoder"]  # Freeze specific layers to only train the language model

data:
  train:
    collator_name: "vision_language_with_padding" # Visual features collator
    collator_kwargs: {{}}  # Optional: Additional collator parameters
    datasets:
      - dataset_name: "vl_sft_jsonl"
        dataset_path: "{data}"
        trust_remote_code: False # Set to true if needed for model-specific processors
        dataset_kwargs:
          processor_name: "{model}" # Feature generator

training:
  trainer_type: "TRL_SFT"
"""
MORE = {
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-3,
    "logging_steps": 1,
    "save_steps": 4,
    "enable_tensorboard": False,
}


def run(folder: Path, config: Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    words = [f"--training.{key}={value}" for key, value in {"output_dir": folder, **MORE, **settings}.items()]
    done = einkorn("train", "-c", str(config), *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_seeing_model, coloured_rows) -> tuple[Path, Path]:
    """The configuration, and the folder of eight steps of it."""
    folder = tmp_path_factory.mktemp("seeing")
    config = folder / "vl_sft.yaml"
    config.write_text(DOCUMENTED.format(model=tiny_seeing_model, template="llama3-instruct", data=coloured_rows))
    run(folder / "straight", config, max_steps=8)
    return config, folder / "straight"


def losses(folder: Path) -> list[float]:
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if "loss" in event]


def test_the_documented_configuration_trains_as_it_stands_and_transformers_loads_the_result(trained):
    _, folder = trained
    assert losses(folder)[-1] < 0.8 * losses(folder)[0]
    model, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert torch.isfinite(next(model.parameters())).all()
    assert (folder / "preprocessor_config.json").is_file()


def test_a_frozen_tower_keeps_every_byte_and_the_rest_learns(trained, tiny_seeing_model):
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_seeing_model, trained[1]))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        same = np.array_equal(tensor, after[name])
        assert same == name.startswith("vision_tower."), name


def test_a_run_with_pictures_goes_on_bit_for_bit(trained, tmp_path):
    config, straight = trained
    resumed = tmp_path / "resumed"
    shutil.copytree(straight / "checkpoint-4", resumed / "checkpoint-4")
    run(resumed, config, max_steps=8, try_resume_from_last_checkpoint="true")
    assert (resumed / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    assert losses(resumed)[-4:] == losses(straight)[-4:]
