"""Gemma 3: a picture is one square of a fixed number of features, which see one another both ways."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from input_pipeline.processors.processor import (
    Prepared,
    Processor,
    Settings,
    Size,
    feature_numbers,
    image_processor,
    of_tiles,
    size_made,
    token_id,
)


@dataclass(frozen=True, kw_only=True)
class Gemma3(Processor):
    """A number of features that is the same for every picture, between two tokens and blank lines."""

    patch: int
    features: int
    text: str

    def expand(self, sizes: Sequence[Size]) -> list[str]:
        return [self.text] * len(sizes)

    def prepare(self, images: Sequence[Any]) -> Prepared:
        pixels = self.image(list(images), return_tensors="np")["pixel_values"]
        return Prepared(*of_tiles(list(pixels), self.patch), (self.features,) * len(images))

    def token_arrays(
        self, ids: np.ndarray, features: int, prepared: Prepared, *, prefix: int | None = None
    ) -> dict[str, np.ndarray]:
        numbers = feature_numbers(ids, self.feature_id, prepared, features)
        return {"image_features": numbers, "groups": -(-numbers // self.features)}


def open(settings: Settings) -> Gemma3:
    """From the tower's size of pictures and patches, and the number of features that are left of these."""
    config, vision, tokenizer = settings.config, settings.config["vision_config"], settings.tokenizer
    size, patch, features = vision.get("image_size", 224), vision.get("patch_size", 16), config["mm_tokens_per_image"]
    image = image_processor(settings.image, "Gemma3ImageProcessor")
    if image.do_pan_and_scan:
        raise NotImplementedError("not implemented yet: Gemma 3's image processor with do_pan_and_scan: true")
    if size_made(image) != (size, size):
        raise ValueError(f"the image processor makes pictures of {size_made(image)}, and the vision tower takes {size}")
    number, text = token_id(config, tokenizer, "<image_soft_token>")
    begin, end = (
        tokenizer.convert_ids_to_tokens(int(config.get(f"{name}_token_index", config.get(f"{name}_token_id", default))))
        for name, default in (("boi", 255_999), ("eoi", 256_000))
    )
    return Gemma3(
        placeholder=begin,
        feature_id=number,
        own={token: tokenizer.convert_tokens_to_ids(token) for token in (text, begin, end)},
        unit=(size // patch) ** 2,
        channels=vision.get("num_channels", 3) * patch * patch,
        image=image,
        facts=repr(("gemma3", patch, features, image.to_dict())),
        patch=patch,
        features=features,
        text=f"\n\n{begin}{text * features}{end}\n\n",
    )
