"""The vision quickstart's model: a language model that has never seen, and eyes that nobody has spoken with yet.

    python -m launch.small_llava        puts it together and prints its folder

SmolLM2-135M-Instruct, a small CLIP tower that has learned to tell digits apart (launch/digit_tower.py), and a projector
between them, drawn at random, as one LLaVA folder that transformers loads.
"""

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from launch.digit_tower import STEPS, trained_tower
from launch.digits import fetch_digits, read
from launch.smollm2 import default_cache, fetch_smollm2

NAME = "SmolLM2-135M-Digits-Llava"
PICTURE, SPARE = "<image>", "<gh_stars>"  # a token of code repositories, which no chat has, becomes the picture's
EMBEDDED = 0.14  # standard deviation of the language model's embeddings, among which features stand
TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "projection_dim": 64,
}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IMAGES = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,
    "do_center_crop": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def make_small_llava(cache: Path | None = None) -> Path:
    """The model's folder in `cache`, made if it is not there (SmolLM2 and the digits are fetched then, if need be)."""
    cache = cache or default_cache()
    folder = cache / NAME
    if (folder / "config.json").is_file():
        return folder
    text, pictures, labels = fetch_smollm2(cache), *read(fetch_digits(cache), "train")
    with tempfile.TemporaryDirectory(dir=cache, prefix=".making-") as temporary:
        made = Path(temporary) / NAME
        compose(text, made, pictures, labels)
        try:
            made.rename(folder)
        except OSError:  # another process was faster: its folder is as good as ours
            if not (folder / "config.json").is_file():
                raise
    return folder


def compose(
    text: Path,
    folder: Path,
    pictures: np.ndarray,
    labels: np.ndarray,
    *,
    tower: Mapping[str, Any] = TOWER,
    steps: int = STEPS,
) -> None:
    """Write a LLaVA of the llama in the folder `text`, its weights as they are, a tower that has learned the labels [n]
    of pictures [n, H, W], and a random projector.
    """
    import jax
    import jax.numpy as jnp

    from models import weights
    from models.decoder import abstract_params
    from models.families import decoder_config
    from models.sharding import nested, paths

    text_config = json.loads((text / "config.json").read_text(encoding="utf-8"))
    dtype = jnp.dtype(text_config.get("torch_dtype") or text_config["dtype"])
    tokenizer = with_picture_token(text)
    hf_config = _config(text_config, tower, tokenizer, dtype.name)
    config = decoder_config(hf_config)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaves = paths(weights.load_params(text, decoder_config(text_config), shardings=device, dtype=dtype))
    random = np.random.default_rng(0)
    new = paths(abstract_params(config, dtype=jnp.float32))
    first = {path: jnp.asarray(drawn(path, leaf.shape, random)) for path, leaf in new.items() if path not in leaves}
    eyes = {path: leaf for path, leaf in first.items() if path.startswith("vision/")}
    assert config.vision is not None
    first |= trained_tower(config.vision, eyes, pictures, labels, steps=steps)
    leaves |= {path: leaf.astype(dtype) for path, leaf in first.items()}
    side = tower["image_size"]
    images = IMAGES | {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    weights.save_folder(
        folder,
        nested(leaves),
        config,
        hf_config=hf_config,
        dtype=dtype,
        tokenizer=tokenizer,
        generation_config=json.loads((text / "generation_config.json").read_text(encoding="utf-8")),
        processor={"preprocessor_config.json": json.dumps(images, indent=2) + "\n"},
    )


def _config(text: Mapping[str, Any], tower: Mapping[str, Any], tokenizer: Any, dtype: str) -> dict[str, Any]:
    """The model's config.json."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": dict(text),
        "vision_config": dict(tower),
        "image_token_index": tokenizer.convert_tokens_to_ids(PICTURE),
        "image_seq_length": (tower["image_size"] // tower["patch_size"]) ** 2,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": text["tie_word_embeddings"],
        "torch_dtype": dtype,
    }


def with_picture_token(text: Path) -> Any:
    """The tokenizer of the folder `text` whose spare token is the picture's, and a template with a place for it."""
    import transformers

    with tempfile.TemporaryDirectory() as temporary:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            said = (text / file).read_text(encoding="utf-8")
            (Path(temporary) / file).write_text(said.replace(f'"{SPARE}"', f'"{PICTURE}"'), encoding="utf-8")
        tokenizer = transformers.AutoTokenizer.from_pretrained(temporary)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def drawn(path: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """A leaf's first values: norms the identity, biases zero, all else normal, so that what goes in keeps its size, and
    what the projector makes is as large as embeddings are.
    """
    if path.endswith("/scale"):
        return np.ones(shape, np.float32)
    if path.endswith("/bias"):
        return np.zeros(shape, np.float32)
    if path.endswith("/embedding"):
        return 0.02 * random.standard_normal(shape, np.float32)
    size = EMBEDDED if path == "projector/down/kernel" else 1.0
    inputs = math.prod(shape[1:]) if path == "vision/patch/kernel" else shape[-2]  # patches are stored [out, in …]
    return size * random.standard_normal(shape, np.float32) / math.sqrt(inputs)


if __name__ == "__main__":
    print(make_small_llava())
