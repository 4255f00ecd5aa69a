"""LLaVA: a picture is one square, by CLIP's or SigLIP's image processor; a feature for each of its patches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from input_pipeline.processors.processor import (
    Prepared,
    Processor,
    Settings,
    Size,
    image_processor,
    of_tiles,
    size_made,
    token_id,
)


@dataclass(frozen=True, kw_only=True)
class Llava(Processor):
    """A number of features that is the same for every picture."""

    patch: int
    features: int

    def expand(self, sizes: Sequence[Size]) -> list[str]:
        return [self.placeholder * self.features] * len(sizes)

    def prepare(self, images: Sequence[Any]) -> Prepared:
        pixels = self.image(list(images), return_tensors="np")["pixel_values"]
        return Prepared(*of_tiles(list(pixels), self.patch), (self.features,) * len(images))


def open(settings: Settings) -> Llava:
    """From the tower's size of pictures and patches, and which of its outputs are features."""
    config, vision = settings.config, settings.config["vision_config"]
    tower = vision.get("model_type", "clip_vision_model")
    if tower not in ("clip_vision_model", "siglip_vision_model"):
        raise NotImplementedError(f"not implemented yet: llava with a vision tower of model_type {tower!r}")
    size, patch = vision.get("image_size", 224), vision.get("patch_size", 32)
    image = image_processor(settings.image, "CLIPImageProcessor")
    made = size_made(image)
    if made != (size, size):
        raise ValueError(f"the image processor makes pictures of {made}, and the vision tower takes {(size, size)}")
    has_class = tower == "clip_vision_model"
    features = (size // patch) ** 2 + has_class - (config.get("vision_feature_select_strategy", "default") == "default")
    number, text = token_id(config, settings.tokenizer, "<image>")
    return Llava(
        placeholder=text,
        feature_id=number,
        own={text: number},
        unit=(size // patch) ** 2,
        channels=vision.get("num_channels", 3) * patch * patch,
        image=image,
        facts=repr(("llava", patch, features, image.to_dict())),
        patch=patch,
        features=features,
    )
