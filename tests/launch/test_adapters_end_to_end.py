"""Adapters as a user trains them: the command, the folder that peft loads, going on, exporting, frozen layers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from trainers.checkpoint import read_meta

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def einkorn(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu", "COLUMNS": "200"}
    command = [sys.executable, "-m", "launch", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_chat_model, conversations) -> Path:
    """A folder with rows and the configuration that trains an adapter on them."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations[:32]))
    config = {
        "model": {"model_name": str(tiny_chat_model), "torch_dtype_str": "float32", "model_max_length": 128},
        "data": {
            "train": {"datasets": [{"dataset_name": "text_sft", "dataset_path": str(folder / "train.jsonl")}]},
        },
        "training": {
            "trainer_type": "TRL_SFT",
            "use_peft": True,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            "save_steps": STEPS // 2,
            "logging_steps": 1,
            "enable_tensorboard": False,
            "compile_cache_dir": str(folder / "compiled"),
        },
        "peft": {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "lora_target_modules": ["all-linear"]},
    }
    (folder / "lora.yaml").write_text(yaml.safe_dump(config))
    return folder


def train(files: Path, output: Path, *words: str) -> subprocess.CompletedProcess[str]:
    done = einkorn("train", "-c", str(files / "lora.yaml"), "--training.output_dir", str(output), *words)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def trained(files) -> Path:
    """The output of a run that trained an adapter."""
    done = train(files, files / "trained")
    assert "trained (" in done.stdout
    assert f"{STEPS}/{STEPS}" in done.stdout
    return files / "trained"


def losses(output: Path) -> list[float]:
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if "loss" in event]


def tensors(file: Path) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in load_file(file).items()}


@pytest.mark.filterwarnings("ignore")  # peft's own
def test_the_folder_is_an_adapter_that_peft_loads(trained, tiny_chat_model):
    from peft import PeftModel

    names = {path.name for path in trained.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "report.html"}
    assert not names & {"config.json", "model.safetensors"}
    described = json.loads((trained / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(tiny_chat_model)
    assert (described["r"], described["lora_alpha"], described["lora_dropout"]) == (4, 8, 0.1)
    assert described["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_chat_model), trained)
    loaded = model.state_dict()
    for name, value in load_file(trained / "adapter_model.safetensors").items():
        np.testing.assert_array_equal(loaded[name.replace(".weight", ".default.weight")].numpy(), value)
    assert losses(trained)[-1] < losses(trained)[0]


def test_a_checkpoint_holds_the_adapter_and_nothing_of_the_model(trained):
    tree = read_meta(trained / f"checkpoint-{STEPS}")["checkpoint"]["tree"]
    kept = {name.split("/")[-1] for name in tree if name.startswith(("params/", "opt_state/"))}
    assert kept == {"lora_a", "lora_b"}


def test_a_resumed_run_ends_where_the_other_did_with_its_dropout(files, trained):
    output = files / "resumed"
    half = str(trained / f"checkpoint-{STEPS // 2}")
    train(files, output, "--training.resume_from_checkpoint", half)
    assert losses(output) == losses(trained)[STEPS // 2 :]
    assert tensors(output / "adapter_model.safetensors") == tensors(trained / "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore")
def test_a_merged_export_is_the_model_of_transformers_with_the_adapter_merged(files, trained, tiny_chat_model):
    from peft import PeftModel

    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_chat_model), trained)
    expected = {name: value.numpy() for name, value in merged.merge_and_unload().state_dict().items()}
    checkpoint = str(trained / f"checkpoint-{STEPS}")
    for name, words in {"of checkpoint": (checkpoint, "--merge"), "of adapter": (str(trained),)}.items():
        done = einkorn("export", words[0], str(files / name), *words[1:])
        assert done.returncode == 0, done.stderr
        for tensor, value in load_file(files / name / "model.safetensors").items():
            np.testing.assert_allclose(value, expected[tensor], atol=1e-6)
    done = einkorn("export", checkpoint, str(files / "adapter again"))
    assert done.returncode == 0, done.stderr
    assert tensors(files / "adapter again/adapter_model.safetensors") == tensors(trained / "adapter_model.safetensors")


@pytest.mark.slow
def test_an_adapter_answers_as_the_model_it_was_merged_into(files, trained):
    words = ("grain water", "--max-new-tokens", "8")
    mode = ("--peft.peft_save_mode", "MERGED", "--training.max_steps", "2", "--training.save_steps", "0")
    train(files, files / "merged", *mode)
    answers = [einkorn("generate", "-m", str(files / "merged" / name), *words) for name in ("", "adapter")]
    assert answers[0].returncode == answers[1].returncode == 0, answers[0].stderr + answers[1].stderr
    assert answers[0].stdout == answers[1].stdout


@pytest.mark.slow
def test_an_adapter_goes_on_training_from_its_folder(files, trained):
    output = files / "further"
    done = train(files, output, "--model.model_name", str(trained), "--training.max_steps", "2", "--peft.lora_r", "8")
    assert "section peft is not read" in done.stderr
    assert losses(output)[0] < losses(trained)[0] - 0.1
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.parametrize(
    ("words", "far"), [(("--peft.bnb_4bit_quant_type=nf4",), 0.3), slow(("--peft.q_lora_bits=8",), 0.03)]
)
def test_beside_a_quantised_model_an_adapter_learns_as_well(files, trained, words, far):
    output = files / words[0].partition("=")[2]
    train(files, output, "--peft.q_lora=true", *words)
    assert losses(output) != losses(trained)
    assert losses(output)[-1] < losses(output)[0]
    assert abs(losses(output)[0] - losses(trained)[0]) < far
    assert set(tensors(output / "adapter_model.safetensors")) == set(tensors(trained / "adapter_model.safetensors"))


@pytest.mark.slow
def test_a_module_trained_whole_beside_a_quantised_model_is_trained_and_saved(files, tiny_chat_model):
    output, words = files / "whole", ("--peft.q_lora=true", "--peft.lora_modules_to_save=[down_proj]")
    train(files, output, *words, "--training.max_steps=2")
    saved, before = load_file(output / "adapter_model.safetensors"), load_file(tiny_chat_model / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert saved[f"base_model.model.{name}"].shape == before[name].shape
    assert 0 < np.abs(saved[f"base_model.model.{name}"] - before[name].astype(np.float32)).max() < 0.1


@pytest.mark.slow
def test_frozen_layers_come_out_as_they_went_in(files, tiny_chat_model):
    output, frozen = files / "frozen", "[model.embed_tokens, '.*[.]self_attn']"
    words = ("--training.max_steps", "2", "--training.save_steps", "2", "--model.freeze_layers", frozen)
    train(files, output, "--training.use_peft", "false", *words)
    before, after = (tensors(folder / "model.safetensors") for folder in (tiny_chat_model, output))
    assert before.keys() == after.keys()
    kept = {name for name in before if before[name] == after[name]}
    assert kept == {name for name in before if "embed_tokens" in name or "self_attn" in name}
    done = einkorn("export", str(output / "checkpoint-2"), str(files / "frozen again"))
    assert done.returncode == 0, done.stderr
    assert tensors(files / "frozen again/model.safetensors") == after


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--peft.lora_target_modules", "[q_prj]"), "'q_prj' is no module of this model; nearest: q_proj"),
        slow(("--model.freeze_layers", "[model.embed]"), "'model.embed' is no part of this model; nearest: model.emb"),
        (("--model.adapter_model", "nowhere"), "nowhere is no folder with adapter_config.json"),
        slow(("--peft.lora_modules_to_save", "[embed_tokens]"), "an embedding that is the output head too"),
        (("--model.load_pretrained_weights", "false"), "set model.load_pretrained_weights: true"),
        (("--peft.lora_init_weights", "PISA"), "not implemented yet: peft.lora_init_weights: PISA"),
    ],
)
def test_what_cannot_be_trained_is_one_line(files, words, message):
    done = einkorn("check", "-c", str(files / "lora.yaml"), *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_check_says_what_is_trained_and_the_memory_of_it(files):
    done = einkorn("check", "-c", str(files / "lora.yaml"))
    assert done.returncode == 0, done.stderr
    assert "of them trained" in done.stdout
