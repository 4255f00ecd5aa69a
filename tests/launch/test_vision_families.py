"""Families whose pictures have shapes or tiles of their own go the whole way: train, load in transformers, ask."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoTokenizer

from tests.launch.test_end_to_end import einkorn
from tests.launch.test_vision import DOCUMENTED, OWN_ANSWERS, REWARD, ROWS, losses, run
from tests.tiny_vision import SEEING

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}


def qwen2_5_vl(tokens: dict[str, Any], image: int) -> tuple[Any, Any]:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
    tower = {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "num_heads": 2}
    tower |= {"window_size": 56, "fullatt_block_indexes": [1], "initializer_range": 0.1}
    text = TEXT | tokens | {"rope_parameters": rope}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=tower, image_token_id=image)
    processor = transformers.Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 8 * 28 * 28})
    return transformers.Qwen2_5_VLForConditionalGeneration(config), processor


def mllama(tokens: dict[str, Any], image: int) -> tuple[Any, Any]:
    text = TEXT | tokens | {"vocab_size": image, "cross_attention_layers": [1, 3], "bos_token_id": 0}
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1}
    tower |= {"attention_heads": 2, "vision_output_dim": 64, "image_size": 28, "intermediate_layers_indices": [0]}
    config = transformers.MllamaConfig(text_config=text, vision_config=tower, image_token_index=image)
    processor = transformers.MllamaImageProcessorPil(size={"height": 28, "width": 28}, max_image_tiles=4)
    model = transformers.MllamaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name:
                parameter.fill_(1.0)  # they begin shut
    return model, processor


def model_folder(folder: Path, tiny_chat_model: Path, make: Callable[..., tuple[Any, Any]], image: str) -> Path:
    """A tiny model of a family, with a tokenizer whose last token stands for pictures, and its image processor."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_model)
    tokenizer.add_special_tokens({"additional_special_tokens": [image]})
    tokenizer.chat_template = SEEING.replace("<image>", image)
    tokenizer.save_pretrained(folder)
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    tokens["pad_token_id"] = tokenizer.pad_token_id
    transformers.set_seed(0)
    model, processor = make(tokens, tokenizer.convert_tokens_to_ids(image))
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("make", "image"), [(mllama, "<|image|>"), (qwen2_5_vl, "<|image_pad|>")])
def test_what_a_family_says_about_pictures_is_what_training_sees(make, image, tmp_path, tiny_chat_model, coloured_rows):
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [json.loads(line) for line in coloured_rows.read_text().splitlines() if "image_path" in line]
    prompts = tmp_path / "prompts.jsonl"
    made = (ROWS["VERL_GRPO"](row["messages"][:1], row["messages"][1]["content"].split()[0]) for row in rows)
    prompts.write_text("".join(json.dumps(row) + "\n" for row in made))
    names = {"model": model_folder(tmp_path / "model", tiny_chat_model, make, image), "data": prompts}
    names |= {"root": coloured_rows.parent, "trainer": "VERL_GRPO", "reward": f"{tmp_path / 'reward.py'}:names_it"}
    config = tmp_path / "grpo.yaml"
    config.write_text(OWN_ANSWERS.format(**names, kwargs="{}"))
    words = "{data: {train_batch_size: 2}}"
    run(tmp_path / "out", config, max_steps=2, save_steps=0, verl_config_overrides=words)
    events = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    apart = [event["sampling/sampling_logp_difference/max"] for event in events if "loss" in event]
    assert len(apart) == 2
    assert max(apart) < 1e-4


@pytest.mark.parametrize(
    ("make", "image", "kind"),
    [
        (mllama, "<|image|>", transformers.MllamaForConditionalGeneration),
        pytest.param(
            qwen2_5_vl,
            "<|image_pad|>",
            transformers.Qwen2_5_VLForConditionalGeneration,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["mllama", "qwen2_5_vl"],
)
def test_a_family_trains_loads_in_transformers_and_answers(
    make, image, kind, tmp_path, tiny_chat_model, coloured_rows
) -> None:
    model = model_folder(tmp_path / "model", tiny_chat_model, make, image)
    config = tmp_path / "vl_sft.yaml"
    config.write_text(DOCUMENTED.format(model=model, template="auto", data=coloured_rows))
    run(tmp_path / "out", config, max_steps=6, save_steps=0)
    assert losses(tmp_path / "out")[-1] < 0.9 * losses(tmp_path / "out")[0]
    assert np.isfinite(losses(tmp_path / "out")).all()
    _, report = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == kind.config_class.model_type
    words = ("generate", "-m", str(tmp_path / "out"), "Which colours?", "--max-new-tokens", "4")
    done = einkorn(*words, "--image", str(coloured_rows.parent / "0-0.png"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
