"""The arithmetic of a model that sees, counted by hand."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from configs.load import load
from launch.assemble import open_model
from launch.flops import Flops, flops_of
from trainers.loop import _amounts
from trainers.throughput import Throughput

# Two of the tower's three layers are computed, of 4 · 32 · 32 + 2 · 32 · 64 numbers; a patch has 3 · 14 · 14.
TOWER, PROJECTOR = 32 * 588 + 2 * 8192, 32 * 64 + 64 * 64
# An adapter of rank 4: of four square matrices and the two of the MLP in each layer; of the projector's two.
TOWER_ADAPTER, PROJECTOR_ADAPTER = 2 * 4 * (4 * 64 + 2 * 96), 4 * (96 + 128)
PAIR = 2 * 12 * 32  # two layers of width 32
CASES = {
    "all is trained": ({}, 6 * (TOWER + PROJECTOR), PAIR),
    "the tower is frozen": ({"freeze_layers": ["vision_encoder"]}, 2 * TOWER + 6 * PROJECTOR, PAIR / 3),
    "only text is trained": (
        {"freeze_layers": ["vision_encoder", "multi_modal_projector"]},
        2 * (TOWER + PROJECTOR),
        PAIR / 3,
    ),
    "an adapter": (
        {"use_peft": True},
        4 * (TOWER + PROJECTOR) + 6 * (TOWER_ADAPTER + PROJECTOR_ADAPTER),
        PAIR,
    ),
}


def flops(model: Path, folder: Path, says: dict, **kwargs: int) -> Flops:
    peft = {"use_peft": says.get("use_peft", False)}
    config = {
        "model": {"model_name": str(model), "freeze_layers": says.get("freeze_layers", [])},
        "data": {"train": {"datasets": [{"dataset_name": "vl_sft_jsonl", "dataset_path": "rows.jsonl"}]}},
        "training": {"trainer_type": "TRL_SFT", "output_dir": str(folder / "out"), **peft},
        "peft": {"lora_r": 4, "lora_target_modules": ["all-linear"]} if peft["use_peft"] else {},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return flops_of(open_model(load(str(folder / "config.yaml")).config), context=100, **kwargs)


@pytest.mark.parametrize("case", CASES)
def test_a_patch_costs_what_is_computed_and_trained(case, tiny_seeing_model, tmp_path):
    says, patch, pair = CASES[case]
    found = flops(tiny_seeing_model, tmp_path, says)
    assert (found.patch, found.pair) == (patch, pytest.approx(pair))
    again = flops(tiny_seeing_model, tmp_path, says, forwards=1)  # as through a reference
    numbers = TOWER + PROJECTOR + (TOWER_ADAPTER + PROJECTOR_ADAPTER if "use_peft" in says else 0)
    assert (again.patch, again.pair) == (patch + 2 * numbers, pytest.approx(pair + PAIR / 3))


def test_a_token_costs_the_text_model_alone(tiny_seeing_model, tmp_path):
    vocabulary = 64 * open_model_vocabulary(tiny_seeing_model)
    layers = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 5 * 64  # and the norms
    assert flops(tiny_seeing_model, tmp_path, {}).token == 6 * (layers + vocabulary) + 12 * 2 * 64 * 100


def open_model_vocabulary(folder: Path) -> int:
    from transformers import AutoTokenizer

    return len(AutoTokenizer.from_pretrained(folder))


def test_pictures_count_towards_the_utilisation_of_a_device():
    segments = np.zeros((1, 2, 8), np.int32)
    segments[0, 0] = [1, 1, 1, 1, 2, 2, 0, 0]
    segments[0, 1, :3] = 1
    tokens = np.ones((1, 2, 5), np.int32)
    amounts = _amounts({"segments": tokens, "patch_segments": segments}, None)
    assert amounts == {"tokens": 10, "rows": 2, "patches": 9, "pairs": 16 + 4 + 9}
    now = [0.0]
    meter = Throughput(
        total_steps=2,
        flops_per_token=3.0,
        flops_per_patch=20.0,
        flops_per_pair=10.0,
        device_peak=1000.0,
        clock=lambda: now[0],
    )
    for _ in range(2):
        meter.step(**amounts)
        now[0] += 1
    assert meter.read()["mfu"] == pytest.approx((10 * 3 + 9 * 20 + 29 * 10) / 2 / 1000)
