"""Twenty steps of SFT, from a configuration file to an exported model, against TRL's SFTTrainer on the same rows.

Ours runs on eight fake devices with one row each where TRL has a batch of eight.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from configs.load import load
from launch.train import run
from tests.parity.oracle_trl import Run, distance, sft

STEPS, BATCH = 20, 8
LENGTH = 128  # one shape for all batches: the step is compiled once for each case


class Case(NamedTuple):
    """Rows, and what both are told: our `training` keys are TRL's too. The longest row is `length` tokens."""

    rows: str
    training: dict[str, Any]
    length: int = LENGTH
    accumulation: int = 1


CASES = {
    "all tokens of conversations": Case("conversations", {"learning_rate": 1e-3}),
    "completions only, linear after warmup, decay, clipping": Case(
        "completions",
        {"learning_rate": 2e-3, "weight_decay": 0.1, "warmup_steps": 4, "max_grad_norm": 0.3},
    ),
    "cosine after warmup, decay, rows that are cut, an epoch that does not divide": Case(
        "45 conversations",
        {"learning_rate": 2e-3, "weight_decay": 0.1, "warmup_steps": 3, "lr_scheduler_type": "cosine"},
        length=48,
    ),
    "accumulation over uneven masks": Case("completions", {"learning_rate": 1e-3}, accumulation=2),
}


@pytest.fixture(scope="session")
def rows(conversations, completions) -> dict[str, list[dict]]:
    return {"conversations": conversations, "completions": completions, "45 conversations": conversations[:45]}


@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_are_those_of_trl(name, rows, tiny_chat_model, tmp_path):
    case = CASES[name]
    data, options = rows[case.rows], {"max_steps": STEPS, "gradient_accumulation_steps": case.accumulation}
    theirs = sft(
        tiny_chat_model,
        data,
        steps=STEPS,
        batch=BATCH,
        accumulation=case.accumulation,
        max_length=case.length,
        **case.training,
    )
    ours = einkorn(tiny_chat_model, data, tmp_path, max_length=case.length, training=case.training | options)
    assert_same(ours, theirs)


def test_packed_rows_learn_what_trl_learns_from_them(rows, tiny_chat_model, tmp_path):
    # All rows fit into one step, since the order in which the two pack differs: bins of 128 tokens, eight at most.
    few, training = rows["conversations"][:12], {"learning_rate": 1e-3}
    theirs = sft(tiny_chat_model, few, steps=STEPS, batch=BATCH, max_length=LENGTH, packing=True, **training)
    ours = einkorn(
        tiny_chat_model, few, tmp_path, max_length=LENGTH, training=training | {"max_steps": STEPS}, pack=True
    )
    assert_same(ours, theirs)


def assert_same(ours: Run, theirs: Run) -> None:
    np.testing.assert_allclose(ours.learning_rate, theirs.learning_rate, rtol=1e-12)
    np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-5)
    np.testing.assert_allclose(ours.grad_norm, theirs.grad_norm, rtol=1e-5)
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
