"""Twenty steps of SFT, from a configuration file to an exported model, against TRL's SFTTrainer on the same rows.

Ours runs on eight fake devices with one row each where TRL has a batch of eight.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from configs.load import load
from launch.train import run
from tests.parity.oracle_trl import Run, distance, sft

STEPS, BATCH = 20, 8

# What both are told: our `training` keys, and the words TRL has for the same.
PLAIN = {"learning_rate": 1e-3}
DECAYED = {"learning_rate": 2e-3, "weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 4}
CASES = {
    "all tokens of conversations": ("conversations", PLAIN, {}),
    "completions only": ("completions", PLAIN, {}),
    "cosine, warmup and weight decay": ("conversations", DECAYED, {}),
    "linear, warmup and weight decay, completions": (
        "completions",
        DECAYED | {"lr_scheduler_type": "linear", "max_grad_norm": 0.3},
        {},
    ),
    "accumulation over uneven masks": ("completions", PLAIN, {"accumulation": 2}),
    "rows cut at 48 tokens, and an epoch that does not divide": ("45 conversations", PLAIN, {"max_length": 48}),
}


@pytest.fixture(scope="session")
def rows(conversations, completions) -> dict[str, list[dict]]:
    return {"conversations": conversations, "completions": completions, "45 conversations": conversations[:45]}


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_are_those_of_trl(case, rows, tiny_chat_model, tmp_path):
    name, training, options = CASES[case]
    accumulation, max_length = options.get("accumulation", 1), options.get("max_length", 256)
    theirs = sft(
        tiny_chat_model,
        rows[name],
        steps=STEPS,
        batch=BATCH,
        accumulation=accumulation,
        max_length=max_length,
        **training,
    )
    ours = einkorn(
        tiny_chat_model,
        rows[name],
        tmp_path,
        max_length=max_length,
        training=training | {"max_steps": STEPS, "gradient_accumulation_steps": accumulation},
    )
    assert_same(ours, theirs)


def test_packed_rows_learn_what_trl_learns_from_them(rows, tiny_chat_model, tmp_path):
    # All rows fit into one step, since the order in which the two pack differs: bins of 128 tokens, eight at most.
    few, length = rows["conversations"][:12], 128
    theirs = sft(tiny_chat_model, few, steps=STEPS, batch=BATCH, max_length=length, packing=True, **PLAIN)
    ours = einkorn(tiny_chat_model, few, tmp_path, max_length=length, training=PLAIN | {"max_steps": STEPS}, pack=True)
    assert_same(ours, theirs)


def assert_same(ours: Run, theirs: Run) -> None:
    np.testing.assert_allclose(ours.learning_rate, theirs.learning_rate, rtol=1e-12)
    np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-4)
    np.testing.assert_allclose(ours.grad_norm, theirs.grad_norm, rtol=1e-4)
    assert distance(ours.weights, theirs.weights) < 1e-5


def einkorn(
    model: Path, rows: list[dict], folder: Path, *, max_length: int, training: dict[str, Any], pack: bool = False
) -> Run:
    """The same run as `einkorn train`: its log line for line, and the model it exports."""
    data, config, output = folder / "rows.jsonl", folder / "config.yaml", folder / "output"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.write_text(
        yaml.safe_dump(
            {
                "model": {"model_name": str(model), "torch_dtype_str": "float32", "model_max_length": max_length},
                "data": {
                    "train": {"datasets": [{"dataset_name": "text_sft", "dataset_path": str(data)}], "pack": pack}
                },
                "training": {
                    "trainer_type": "TRL_SFT",
                    "output_dir": str(output),
                    "per_device_train_batch_size": BATCH // jax.device_count(),
                    "logging_steps": 1,
                    "save_steps": 0,
                    "enable_tensorboard": False,
                    "compile_cache_dir": None,
                    "trainer_kwargs": {"train_sampling_strategy": "sequential"},
                    **training,
                },
            }
        )
    )
    run(load(str(config)))
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    log = [event for event in events if "loss" in event]
    assert [event["step"] for event in log] == list(range(1, STEPS + 1))
    return Run(
        *(np.array([event[key] for event in log]) for key in ("loss", "grad_norm", "learning_rate")),
        weights=load_file(output / "model.safetensors"),
    )
