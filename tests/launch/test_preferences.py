"""Learning from preferences as a user does it: the documented configuration, going on, a reference computed once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from tests.parity.preference_runs import labelled, pairs

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
DOCUMENTED = """
data:
  train:
    datasets:
      - dataset_name: "preference_pairs_jsonl"
        dataset_path: "{rows}"
    collator_name: "dpo_with_padding"

training:
  trainer_type: "TRL_DPO"  # Use the TRL DPO trainer
"""


def einkorn(*words: str, fails: bool = False) -> str:
    """What the command prints, of one device and no flags of the tests."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu", "COLUMNS": "200"}
    command = [sys.executable, "-m", "launch", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == (2 if fails else 0), done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_chat_model) -> Path:
    """Rows as they are documented, and configurations that train on them."""
    folder = tmp_path_factory.mktemp("preferences")

    def written(name: str, rows: list[dict[str, Any]]) -> str:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder / name)

    rows = [
        {"messages": row["prompt"], **{side: {"messages": row[side]} for side in ("chosen", "rejected")}}
        for row in pairs(32)
    ]
    (folder / "dpo.yaml").write_text(DOCUMENTED.format(rows=written("pairs.jsonl", rows)))
    few = {"datasets": [{"dataset_name": "preference_pairs_jsonl", "dataset_path": written("few.jsonl", rows[:8])}]}
    settings = {
        "model": {"model_name": str(tiny_chat_model), "torch_dtype_str": "float32", "model_max_length": 128},
        "data": {**yaml.safe_load((folder / "dpo.yaml").read_text())["data"], "validation": few},
        "training": {
            "trainer_type": "TRL_DPO",
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": STEPS,
            "learning_rate": 3e-3,
            "save_steps": STEPS // 2,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": STEPS,
            "enable_tensorboard": False,
            "compile_cache_dir": str(folder / "compiled"),
            "token_cache_dir": str(folder / "tokens"),
        },
        "peft": {"lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["all-linear"]},
    }
    (folder / "more.yaml").write_text(yaml.safe_dump(settings))
    answers = {"datasets": [{"dataset_name": "text_sft", "dataset_path": written("kto.jsonl", labelled()[:32])}]}
    settings["data"] = {"train": answers}
    settings["training"] |= {"trainer_type": "TRL_KTO", "eval_strategy": "no"}
    (folder / "kto.yaml").write_text(yaml.safe_dump(settings))
    return folder


def events(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output: Path) -> dict[str, bytes]:
    (file,) = output.glob("*.safetensors")
    return {name: value.tobytes() for name, value in load_file(file).items()}


def test_the_documented_configuration_trains_as_it_stands_and_transformers_loads_the_model(files, tiny_chat_model):
    output = files / "documented"
    said = einkorn(
        *("train", "-c", str(files / "dpo.yaml"), f"--model.model_name={tiny_chat_model}"),
        *(f"--training.output_dir={output}", "--training.max_steps=3", "--training.logging_steps=1"),
    )
    assert "32 rows" in said
    assert f"{output}/report.html" in said.replace("\n", "")
    steps = [event for event in events(output) if "loss" in event]
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"} <= steps[0].keys()
    assert {"logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected", "entropy"} <= steps[0].keys()
    model = AutoModelForCausalLM.from_pretrained(output)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    assert weights(output).keys() == weights(tiny_chat_model).keys()
    assert weights(output) != weights(tiny_chat_model)


WAYS = {
    "an adapter": ("--training.use_peft=true",),
    "all weights": (),
    "a reference that moves": (
        "--training.trainer_kwargs.sync_ref_model=true",
        "--training.trainer_kwargs.ref_model_sync_steps=2",
    ),
    "a reference computed beforehand": ("--training.trainer_kwargs.precompute_ref_log_probs=true",),
}
QUICK_WAYS = ("a reference that moves",)


@pytest.mark.parametrize(
    "way", [way if way in QUICK_WAYS else pytest.param(way, marks=pytest.mark.slow) for way in WAYS]
)
def test_a_run_that_goes_on_ends_as_one_that_was_never_stopped(files, tmp_path, way):
    words = ("train", "-c", str(files / "more.yaml"), *WAYS[way])
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    einkorn(*words, f"--training.output_dir={straight}")
    shutil.copytree(straight / f"checkpoint-{STEPS // 2}", resumed / f"checkpoint-{STEPS // 2}")
    einkorn(*words, f"--training.output_dir={resumed}", "--training.try_resume_from_last_checkpoint=true")
    assert weights(resumed) == weights(straight)
    both = [
        {event["step"]: event["loss"] for event in events(output) if "loss" in event} for output in (straight, resumed)
    ]
    assert [both[1][step] for step in range(STEPS // 2 + 1, STEPS + 1)] == list(both[0].values())[STEPS // 2 :]
    (judged,) = [event for event in events(straight) if "eval_loss" in event]
    assert {"eval_rewards/margins", "eval_rewards/accuracies", "eval_logps/chosen", "eval_entropy"} <= judged.keys()


@pytest.mark.slow
def test_a_reference_is_computed_once_and_gives_the_same_run(files, tmp_path):
    words = ("train", "-c", str(files / "more.yaml"), "--training.use_peft=true", "--training.save_steps=0")
    known = "--training.trainer_kwargs.precompute_ref_log_probs=true"
    said = [einkorn(*words, known, f"--training.output_dir={tmp_path / name}") for name in ("first", "second")]
    einkorn(*words, f"--training.output_dir={tmp_path / 'computed'}")
    assert "log-probabilities of 32 rows, computed" in said[0]
    assert "log-probabilities of 32 rows, from the cache" in said[1]
    assert weights(tmp_path / "first") == weights(tmp_path / "second")
    losses = [[event["loss"] for event in events(tmp_path / name) if "loss" in event] for name in ("first", "computed")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_kto_learns_from_rows_with_a_label(files, tmp_path):
    said = einkorn("train", "-c", str(files / "kto.yaml"), f"--training.output_dir={tmp_path / 'kto'}")
    assert "32 rows" in said
    steps = [event for event in events(tmp_path / "kto") if "loss" in event]
    assert steps[0]["kl"] == 0
    assert steps[0]["loss"] == pytest.approx(0.5)
    assert steps[-1]["rewards/chosen"] != 0 != steps[-1]["rewards/rejected"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "kto")


def test_what_rows_become_is_shown(files):
    shown = einkorn("inspect", "-c", str(files / "more.yaml"), "--rows", "1")
    assert "trained ⟦in these⟧" in shown
    assert "unwanted ⟪in these⟫" in shown
    assert "32 of 32 rows used" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--training.trainer_kwargs.loss_type=sigmoit",), "sigmoid"),
        pytest.param(
            ("--training.trainer_kwargs.sync_ref_model=true", "--training.use_peft=true"),
            "sync_ref_model",
            marks=pytest.mark.slow,
        ),
        (("--training.trainer_type=TRL_SFT",), "TRL_DPO"),
    ],
)
def test_what_cannot_work_is_one_line(files, tmp_path, words, message):
    said = einkorn(
        "train", "-c", str(files / "more.yaml"), f"--training.output_dir={tmp_path}/never", *words, fails=True
    )
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in said
