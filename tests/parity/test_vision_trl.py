"""Ten steps of SFT on pictures against TRL's SFTTrainer with its vision collator, on the same rows.

Ours runs on eight fake devices with one row each where TRL has a batch of eight; rows have two pictures, one or none.
"""

import io
import json
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import yaml
from safetensors.numpy import load_file

from configs.load import load
from launch.train import run

STEPS, BATCH = 10, 8
TRAINING = {"learning_rate": 1e-3, "max_steps": STEPS, "logging_steps": 1, "weight_decay": 0.1, "max_grad_norm": 0.5}


def rows_of(file: Path) -> list[dict[str, Any]]:
    """Prompts and completions with a column of pictures, as TRL has them."""
    rows = []
    for line in file.read_text().splitlines()[:32]:
        asked, answered = json.loads(line)["messages"]
        pictures = [part["content"] for part in asked["content"] if part["type"] == "image_path"]
        text = next(part["content"] for part in asked["content"] if part["type"] == "text")
        rows.append(
            {"images": pictures, "prompt": [{"role": "user", "content": text}], "completion": [answered]},
        )
    return rows


class Found(NamedTuple):
    """Loss and gradient norm of each step, and the last weights by their names in a file."""

    losses: np.ndarray
    norms: np.ndarray
    weights: dict[str, np.ndarray]


def theirs(model: Path, rows: list[dict[str, Any]]) -> Found:
    """The steps of TRL."""
    import torch
    from datasets import Dataset
    from PIL import Image
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessorPil,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        set_seed,
    )
    from trl import SFTConfig, SFTTrainer

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil.from_pretrained(model),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=tokenizer.chat_template,
    )
    shown = [
        row | {"images": [Image.open(io.BytesIO(Path(file).read_bytes())) for file in row["images"]]} for row in rows
    ]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = SFTTrainer(
            model=LlavaForConditionalGeneration.from_pretrained(
                model, dtype=torch.float32, attn_implementation="eager"
            ),
            args=SFTConfig(
                output_dir=folder,
                per_device_train_batch_size=BATCH,
                train_sampling_strategy="sequential",
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                optim="adamw_torch",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                max_length=None,
                **TRAINING,
            ),
            train_dataset=Dataset.from_list(shown),
            processing_class=processor,
        )
        trainer.train()
        trainer.model.save_pretrained(folder)
        weights = load_file(Path(folder) / "model.safetensors")
    log = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return Found(np.array([e["loss"] for e in log]), np.array([e["grad_norm"] for e in log]), weights)


def ours(model: Path, rows: list[dict[str, Any]], root: Path, folder: Path) -> Found:
    """The same by the command."""
    data, config = folder / "rows.jsonl", folder / "config.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = {"datasets": [{"dataset_name": "vl_sft_jsonl", "dataset_path": str(data)}], "image_root": str(root)}
    training = {
        "trainer_type": "TRL_SFT",
        "output_dir": str(folder / "output"),
        "per_device_train_batch_size": BATCH // jax.device_count(),
        "save_steps": 0,
        "enable_tensorboard": False,
        "compile_cache_dir": None,
        "trainer_kwargs": {"train_sampling_strategy": "sequential"},
        **TRAINING,
    }
    model_says = {"model_name": str(model), "torch_dtype_str": "float32"}
    config.write_text(yaml.safe_dump({"model": model_says, "data": {"train": split}, "training": training}))
    run(load(str(config)))
    events = [json.loads(line) for line in (folder / "output/metrics.jsonl").read_text().splitlines()]
    log = [event for event in events if "loss" in event]
    weights = load_file(folder / "output/model.safetensors")
    return Found(np.array([e["loss"] for e in log]), np.array([e["grad_norm"] for e in log]), weights)


def test_ten_steps_on_pictures_are_those_of_trl(tiny_seeing_model, coloured_rows, tmp_path):
    rows = rows_of(coloured_rows)
    found, expected = ours(tiny_seeing_model, rows, coloured_rows.parent, tmp_path), theirs(tiny_seeing_model, rows)
    assert len(found.losses) == STEPS
    for own, other in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-4)
    before = load_file(tiny_seeing_model / "model.safetensors")
    assert found.weights.keys() == expected.weights.keys() == before.keys()
    still = {name for name in before if np.array_equal(before[name], expected.weights[name])}
    # The features are the output of the last layer but one: nothing decays behind it.
    assert still == {name for name in before if re.match(r"vision_tower\.(encoder\.layers\.2|post_layernorm)\.", name)}
    for name, tensor in expected.weights.items():
        if name in still:
            np.testing.assert_array_equal(found.weights[name], tensor, err_msg=name)
        elif not name.endswith("k_proj.bias"):  # whose gradient is nothing but rounding
            np.testing.assert_allclose(found.weights[name], tensor, atol=2e-4, err_msg=name)
