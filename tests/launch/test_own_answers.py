"""Learning from answers of its own as a user does it: the documented configurations, a reward that rises, going on."""

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

from tests.tiny import sentence

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4
# As documented, but for the names of a model and of data.
TRL = """
data:
  train:
    datasets:
      - dataset_name: "text_sft"
        dataset_path: "{prompts}"

training:
  trainer_type: "TRL_GRPO"
  reward_functions: ["soft_20tokens_completions"]

  grpo:
    use_vllm: True
"""
VERL = """
data:
  train:
    datasets:
      - dataset_name: "countdown"
        split: "train"
        dataset_kwargs: {{size: 48}}
  validation:
    datasets:
      - dataset_name: "countdown"
        split: "test"
        dataset_kwargs: {{size: 4}}

training:
  trainer_type: "VERL_GRPO"
  reward_functions: ["countdown"]

  grpo:
    use_vllm: True

  verl_config_overrides:
    data:
      train_batch_size: 4
"""
REWARD = """
def grains(completions, wanted, **_):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(text.count(word)) / max(1, len(text.split())) for text, word in zip(texts, wanted)]
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
    """Prompts, a reward function, and configurations that train with them."""
    folder = tmp_path_factory.mktemp("own")
    rows = [{"prompt": sentence(i, 4), "wanted": "mill"} for i in range(24)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.py").write_text(REWARD)
    (folder / "trl.yaml").write_text(TRL.format(prompts=folder / "prompts.jsonl"))
    (folder / "verl.yaml").write_text(VERL.format())
    own = yaml.safe_load((folder / "trl.yaml").read_text())
    own["model"] = {"model_name": str(tiny_chat_model), "torch_dtype_str": "float32"}
    own["training"] |= {
        "reward_functions": [f"{folder}/own.py:grains"],
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "learning_rate": 3e-3,
        "save_steps": 1,
        "logging_steps": 1,
        "enable_tensorboard": False,
        "compile_cache_dir": str(folder / "compiled"),
        "trainer_kwargs": {"steps_per_generation": 2},
        "grpo": {"num_generations": 8, "max_completion_length": 12},
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(own))
    return folder


def events(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output: Path) -> dict[str, bytes]:
    (file,) = output.glob("*.safetensors")
    return {name: value.tobytes() for name, value in load_file(file).items()}


def assert_loads(output: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(output)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_the_documented_configuration_of_trl_trains_as_it_stands(files, tiny_chat_model):
    output = files / "trl"
    said = einkorn(
        *("train", "-c", str(files / "trl.yaml"), f"--model.model_name={tiny_chat_model}", "--training.max_steps=2"),
        *(f"--training.output_dir={output}", "--training.logging_steps=1", "--training.grpo.max_completion_length=16"),
    )
    assert "24 prompts" in said
    assert "use_vllm" in said  # once, that our own engine answers
    step = next(event for event in events(output) if "loss" in event)
    assert {"reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "entropy"} <= step.keys()
    assert {"rewards/soft_20tokens_completions/mean", "completions/clipped_ratio"} <= step.keys()
    assert {"sampling/sampling_logp_difference/max", "time/generate", "time/reward"} <= step.keys()
    assert step["sampling/sampling_logp_difference/max"] < 1e-4
    kept = [json.loads(line) for line in (output / "completions.jsonl").read_text().splitlines()]
    assert kept[0]["rewards"].keys() == {"soft_20tokens_completions"}
    assert_loads(output)


def test_the_documented_configuration_of_verl_trains_as_it_stands(files, tiny_chat_model):
    output = files / "verl"
    einkorn(
        *("train", "-c", str(files / "verl.yaml"), f"--model.model_name={tiny_chat_model}", "--training.max_steps=1"),
        *(f"--training.output_dir={output}", "--training.logging_steps=1", "--training.grpo.max_completion_length=16"),
        "--training.grpo.max_prompt_length=768",  # the tiny model's tokens are hardly more than letters
        "--training.eval_strategy=steps",
        "--training.eval_steps=1",
    )
    found = events(output)
    assert any("rewards/countdown/mean" in event or "critic/rewards/mean" in event for event in found)
    assert any(name.startswith("eval_") for event in found for name in event)
    assert_loads(output)


@pytest.mark.slow
def test_rewards_of_verl_are_lowered_by_the_divergence_from_the_first_weights(files, tiny_chat_model):
    output = files / "diverged"
    kl = "{use_kl_in_reward: true, kl_ctrl: {type: adaptive, kl_coef: 0.5, horizon: 100}}"
    einkorn(
        *("train", "-c", str(files / "verl.yaml"), f"--model.model_name={tiny_chat_model}", "--training.max_steps=2"),
        *(f"--training.output_dir={output}", "--training.logging_steps=1", "--training.grpo.max_completion_length=16"),
        *(
            "--training.grpo.max_prompt_length=768",
            "--training.learning_rate=0.01",
            "--training.save_final_model=false",
        ),
        "--training.verl_config_overrides={data: {train_batch_size: 4}, algorithm: " + kl + "}",
    )
    first, second = (event for event in events(output) if "loss" in event)
    assert first["actor/reward_kl_penalty"] == 0
    assert first["critic/rewards/mean"] == first["critic/score/mean"]
    assert second["actor/reward_kl_penalty"] != 0
    assert second["critic/rewards/mean"] != second["critic/score/mean"]
    answers = 4 * 8  # to each prompt eight, where nothing is said
    assert second["actor/reward_kl_penalty_coeff"] == pytest.approx(0.5 * (1 - 0.2 * answers / 100))


@pytest.mark.slow
def test_a_reward_rises(files):
    output = files / "risen"
    einkorn(
        *("train", "-c", str(files / "own.yaml"), f"--training.output_dir={output}", "--training.max_steps=60"),
        *("--training.save_steps=0", "--training.trainer_kwargs={steps_per_generation: 1}"),
        *("--training.per_device_train_batch_size=24", "--training.learning_rate=5e-3"),
    )
    rewards = [event["reward"] for event in events(output) if "reward" in event]
    assert sum(rewards[-5:]) / 5 > 3 * sum(rewards[:5]) / 5


@pytest.mark.parametrize("stopped_at", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_goes_on_bit_for_bit_within_a_generation_and_between_two(files, tmp_path, stopped_at):
    words = ("train", "-c", str(files / "own.yaml"))
    straight, resumed = files / "straight", tmp_path / "resumed"
    if not straight.exists():
        einkorn(*words, f"--training.output_dir={straight}")
    shutil.copytree(straight / f"checkpoint-{stopped_at}", resumed / f"checkpoint-{stopped_at}")
    einkorn(*words, f"--training.output_dir={resumed}", "--training.try_resume_from_last_checkpoint=true")
    assert weights(resumed) == weights(straight)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--training.reward_functions=[soft_20_tokens]",), "soft_20tokens_completions"),
        (("--training.per_device_train_batch_size=6",), "generation_batch_size"),
        (("--training.grpo.num_generations=1",), "num_generations"),
    ],
)
def test_what_cannot_work_is_one_line(files, tmp_path, words, message):
    said = einkorn(
        "check", "-c", str(files / "own.yaml"), f"--training.output_dir={tmp_path}/never", *words, fails=True
    )
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in said
