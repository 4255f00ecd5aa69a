"""A vision-language model small enough to train in seconds, and pictures of one colour each to ask it about."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    set_seed,
)

SEEING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 40, 230)}


@pytest.fixture(scope="session")
def tiny_seeing_model(tmp_path_factory: pytest.TempPathFactory, tiny_chat_model: Path) -> Path:
    """A LLaVA as transformers writes it: a CLIP tower of 3 layers for pictures of 28 × 28, and a llama of 2."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llava"
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = SEEING
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    set_seed(0)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tower = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=16,
        initializer_range=0.1,
    )
    number = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=number, image_seq_length=4)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def coloured_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 36 questions about pictures beside it, of odd sizes; some have two, some none."""
    folder = tmp_path_factory.mktemp("coloured")
    random = np.random.default_rng(0)
    lines = []
    for number in range(36):
        count = (1, 2, 1, 0)[number % 4]
        names = [list(COLOURS)[(number + n) % 3] for n in range(count)]
        parts = []
        for n, name in enumerate(names):
            height, width = random.integers(17, 60, 2)
            noise = random.integers(-25, 25, (height, width, 3))
            pixels = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}-{n}.png")
            parts.append({"type": "image_path", "content": str(folder / f"{number}-{n}.png")})
        asked = {"type": "text", "content": "Which colours?" if count else "Say mill."}
        answer = " and ".join(names) + "." if count else "mill."
        content = [*parts, asked]
        lines.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]})
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file
