"""What tests of rows with pictures share: a small tokenizer and processor of LLaVA's, and three pictures."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from input_pipeline.processors import open_processor

LLAVA = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {
    "model_type": "llava",
    "image_token_index": 480,
    "vision_feature_select_strategy": "default",
    "vision_config": {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14},
}
SETTINGS = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28},
}


@pytest.fixture(scope="module")
def speaker(tokenizer_maker):
    """A tokenizer with the token of a picture, and a template that takes parts."""
    tokenizer = tokenizer_maker()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = LLAVA
    return tokenizer


@pytest.fixture(scope="module")
def processor(speaker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    config = CONFIG | {"image_token_index": speaker.convert_tokens_to_ids("<image>")}
    return open_processor(config, folder, speaker)


def photo(number, size=(31, 45)):
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8))


def png(number):
    stream = io.BytesIO()
    photo(number).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def picture_folder(tmp_path_factory):
    """Three pictures."""
    folder = tmp_path_factory.mktemp("rows")
    for n in range(3):
        (folder / f"{n}.png").write_bytes(png(n))
    return folder


def split_of(folder, rows, **more):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"dataset_name": more.pop("dataset_name", "vl_sft_jsonl"), "dataset_path": str(path)}
    return {"datasets": [entry], "collator_name": "vision_language_with_padding"} | more


def chat(*parts, answer="It is a cat."):
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer}]}


ASK = {"type": "text", "content": "What is this?"}
