"""Thirty steps of pretraining, from a configuration to an exported model, against transformers' Trainer on the same
rows of the same documents, packed end to end without a mask between them.

Ours runs on eight fake devices with one row each where the Trainer has a batch of eight.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from configs.load import load
from launch import assemble
from launch.train import run, train_data
from tests.parity.oracle_hf import clm
from tests.parity.oracle_trl import distance
from tests.tiny import sentence

STEPS, BATCH, LENGTH = 30, 8, 64
SHARED = {  # keys of `training` that transformers has too
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "adam_beta2": 0.95,
}


@pytest.fixture(scope="module")
def config(tiny_chat_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clm")
    for name, first, count in (("train", 0, 300), ("heldout", 1000, 20)):
        texts = (sentence(i, 5 + 7 * i % 60) for i in range(first, first + count))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def split(name: str) -> dict:
        datasets = [{"dataset_name": "text", "dataset_path": str(folder / f"{name}.jsonl")}]
        return {"datasets": datasets, "pack": True, "isolate_documents": False}

    written = {
        "model": {"model_name": str(tiny_chat_model), "torch_dtype_str": "float32", "model_max_length": LENGTH},
        "data": {"train": split("train"), "validation": split("heldout")},
        "training": {
            "trainer_type": "OUMI",
            "output_dir": str(folder / "output"),
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH // jax.device_count(),
            "gradient_accumulation_steps": 2,
            "per_device_eval_batch_size": 1,
            "eval_strategy": "steps",
            "eval_steps": STEPS,
            "logging_steps": 1,
            "save_steps": 0,
            "enable_tensorboard": False,
            "compile_cache_dir": None,
            **SHARED,
        },
    }
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(written))
    return folder / "pretrain.yaml"


@pytest.fixture(scope="module")
def output(config) -> Path:
    run(load(str(config)))
    return config.parent / "output"


def events_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_thirty_steps_are_those_of_transformers(config, output, tiny_chat_model):
    loaded = load(str(config)).config
    feed = train_data(loaded, assemble.open_model(loaded), assemble.prepare_devices(loaded))
    theirs = clm(tiny_chat_model, [next(feed.batches) for _ in range(STEPS)], **SHARED)
    feed.batches.close()
    ours = [event for event in events_of(output) if "loss" in event]
    for name in ("learning_rate", "loss", "grad_norm"):
        np.testing.assert_allclose([event[name] for event in ours], getattr(theirs, name), rtol=1e-5, err_msg=name)
    assert distance(load_file(output / "model.safetensors"), theirs.weights) < 1e-5
    assert ours[-1]["loss"] < 0.6 * ours[0]["loss"]


def test_an_evaluation_tells_perplexity_and_bits_per_byte(output):
    (event,) = [event for event in events_of(output) if "eval_loss" in event]
    assert event["eval_perplexity"] == pytest.approx(np.exp(event["eval_loss"]), rel=1e-5)
    assert 0 < event["eval_bits_per_byte"] < event["eval_loss"] / np.log(2)  # a token has at least one byte
