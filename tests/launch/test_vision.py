"""Learning from pictures as a user does it: the documented configuration, what is frozen, going on."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from transformers import LlavaForConditionalGeneration

from configs.load import load
from launch.adapt import what_trains
from models.families import decoder_config
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


def test_a_picture_is_asked_about_from_the_command_line(trained, coloured_rows):
    _, folder = trained
    picture = coloured_rows.parent / "0-0.png"
    words = ("generate", "-m", str(folder), "Which colours?", "--max-new-tokens", "4")
    done = einkorn(*words, "--image", str(picture))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
    done = einkorn(*words, "--image", "nowhere.png")
    assert (done.returncode, done.stderr.strip().splitlines()[-1]) == (
        2,
        "error: --image: there is no file nowhere.png",
    )


@pytest.fixture(scope="module")
def adapted(trained, tiny_seeing_model, tmp_path_factory) -> tuple[Path, Path]:
    """A model with a processor as transformers writes it, and the folder of an adapter trained beside it."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor

    folder = tmp_path_factory.mktemp("adapted")
    shutil.copytree(tiny_seeing_model, folder / "model")
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil.from_pretrained(tiny_seeing_model),
        tokenizer=AutoTokenizer.from_pretrained(tiny_seeing_model),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder / "model")
    says = yaml.safe_load(trained[0].read_text())
    says["model"] = {"model_name": str(folder / "model")}
    says["peft"] = {"lora_r": 4, "lora_dropout": 0.1, "lora_target_modules": ["all-linear"]}
    says["data"]["train"]["datasets"][0]["dataset_kwargs"] = {}
    (folder / "lora.yaml").write_text(yaml.safe_dump(says))
    run(folder / "out", folder / "lora.yaml", max_steps=4, save_steps=2, use_peft="true")
    return folder / "model", folder / "out"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torchvision is not there
def test_beside_an_adapter_lies_what_prepares_its_pictures(adapted, coloured_rows):
    from PIL import Image
    from transformers import AutoProcessor

    model, folder = adapted
    picture = Image.open(coloured_rows.parent / "0-0.png")
    of_model, of_adapter = (
        AutoProcessor.from_pretrained(place)(images=[picture], text="<image>What?", return_tensors="np")
        for place in (model, folder)
    )
    assert of_adapter.keys() == {"input_ids", "attention_mask", "pixel_values"}
    for name, array in of_adapter.items():
        np.testing.assert_array_equal(array, of_model[name])


@pytest.mark.filterwarnings("ignore")  # peft's own
@pytest.mark.slow
def test_an_adapter_beside_the_tower_learns_and_peft_has_the_same_model(adapted, tmp_path):
    from peft import PeftModel

    model, folder = adapted
    assert losses(folder)[-1] < losses(folder)[0]
    beside = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(model), folder)
    moved = {name: bool(value.abs().max() > 0) for name, value in beside.named_parameters() if "lora_B" in name}
    assert len(moved) == 3 * 6 + 2 + 2 * 7
    assert {name for name in moved if not moved[name]} == {name for name in moved if "tower.encoder.layers.2" in name}
    done = einkorn("export", str(folder / "checkpoint-4"), str(tmp_path / "whole"), "--merge")
    assert done.returncode == 0, done.stderr[-3000:]
    whole = LlavaForConditionalGeneration.from_pretrained(tmp_path / "whole").state_dict()
    for name, tensor in beside.merge_and_unload().state_dict().items():
        np.testing.assert_allclose(whole[name].numpy(), tensor.numpy(), atol=1e-6, err_msg=name)


FROZEN = {
    ("vision_encoder",): {"layers", "projector"},
    ("model.vision_tower", "multi_modal_projector"): {"layers"},
    ("language_model",): {"vision", "projector"},
}


@pytest.mark.parametrize("frozen", FROZEN)
def test_what_is_frozen_gets_no_adapter(adapted, frozen):
    model, folder = adapted
    config = load(str(folder.parent / "lora.yaml"), [f"--model.freeze_layers={list(frozen)}"]).config
    hf_config = json.loads((model / "config.json").read_text())
    decoder = decoder_config(hf_config)
    config.training.use_peft = True
    lora, own = what_trains(config, decoder, hf_config, adapter=None)
    assert {module.split("/")[0] for module in lora.modules} == FROZEN[frozen]
    assert own == set()
    with pytest.raises(ValueError, match=r"model\.freeze_layers of an adapter that goes on and stands on "):
        what_trains(config, decoder, hf_config, adapter=folder)


OWN_ANSWERS = """
model:
  model_name: "{model}"
  freeze_layers: ["vision_encoder"]

data:
  train:
    image_root: "{root}"
    datasets:
      - dataset_name: "text_sft"
        dataset_path: "{data}"

training:
  trainer_type: "{trainer}"
  reward_functions: ["{reward}"]

  grpo:
    num_generations: 4
    max_completion_length: 8

  trainer_kwargs: {kwargs}
"""
KWARGS = {"TRL_GRPO": "{beta: 0.04}", "VERL_GRPO": "{}"}
ROWS = {
    "TRL_GRPO": lambda prompt, colour: {"prompt": prompt, "colour": colour},
    "VERL_GRPO": lambda prompt, colour: {
        "data_source": "colours",
        "prompt": prompt,
        "reward_model": {"ground_truth": colour, "style": "rule"},
    },
}
REWARD = """
def names_the_colour(completions, colour, **columns):
    return [named(completion[0]["content"], name) for completion, name in zip(completions, colour)]


def names_it(data_source, solution_str, ground_truth, extra_info):
    return named(solution_str, ground_truth)


def named(text, colour):
    return float(colour in text) + len(text) / 100
"""


@pytest.mark.parametrize("trainer", [pytest.param("TRL_GRPO", marks=pytest.mark.slow), "VERL_GRPO"])
def test_a_policy_learns_from_its_own_answers_about_pictures(trainer, tiny_seeing_model, coloured_rows, tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [json.loads(line) for line in coloured_rows.read_text().splitlines() if "image_path" in line]
    prompts = tmp_path / "prompts.jsonl"
    made = (ROWS[trainer](row["messages"][:1], row["messages"][1]["content"].split()[0]) for row in rows)
    prompts.write_text("".join(json.dumps(row) + "\n" for row in made))
    config = tmp_path / "grpo.yaml"
    reward = f"{tmp_path / 'reward.py'}:{'names_the_colour' if trainer == 'TRL_GRPO' else 'names_it'}"
    names = {"model": tiny_seeing_model, "data": prompts, "root": coloured_rows.parent, "trainer": trainer}
    config.write_text(OWN_ANSWERS.format(**names, reward=reward, kwargs=KWARGS[trainer]))
    verl = {"verl_config_overrides": "{data: {train_batch_size: 2}}"} if trainer == "VERL_GRPO" else {}
    run(tmp_path / "out", config, max_steps=2, save_steps=0, **verl)
    events = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    apart = [event["sampling/sampling_logp_difference/max"] for event in events if "loss" in event]
    assert len(apart) == 2
    assert max(apart) < 1e-4  # the sampler saw what training sees
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_seeing_model, tmp_path / "out"))
    moved = {name.split(".")[0] for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {"language_model", "multi_modal_projector"}


@pytest.mark.slow
def test_preferences_between_answers_about_pictures_are_learned(tiny_seeing_model, coloured_rows, tmp_path):
    rows = [json.loads(line) for line in coloured_rows.read_text().splitlines() if "image_path" in line]
    wrong = [{"role": "assistant", "content": "mill."}]
    pairs = tmp_path / "pairs.jsonl"
    made = ({"prompt": row["messages"][:1], "chosen": row["messages"][1:], "rejected": wrong} for row in rows)
    pairs.write_text("".join(json.dumps(row) + "\n" for row in made))
    config = tmp_path / "dpo.yaml"
    entry = {"dataset_name": "preference_pairs_jsonl", "dataset_path": str(pairs)}
    train = {"datasets": [entry], "collator_name": "dpo_with_padding", "image_root": str(coloured_rows.parent)}
    says = {
        "model": {"model_name": str(tiny_seeing_model), "freeze_layers": ["vision_encoder"]},
        "data": {"train": train},
        "training": {"trainer_type": "TRL_DPO"},
    }
    config.write_text(yaml.safe_dump(says))
    run(tmp_path / "out", config, max_steps=12, save_steps=0)
    found = losses(tmp_path / "out")
    assert found[0] == pytest.approx(np.log(2), rel=1e-5)
    assert np.mean(found[-3:]) < 0.6 * found[0]
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_seeing_model, tmp_path / "out"))
    moved = {name.split(".")[0] for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {"language_model", "multi_modal_projector"}
