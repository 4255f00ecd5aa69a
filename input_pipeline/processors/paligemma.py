"""PaliGemma: a picture is one square of a fixed number of features; all of the prompt sees all of the prompt."""

from dataclasses import dataclass

import numpy as np

from input_pipeline.processors.llava import Llava
from input_pipeline.processors.processor import (
    Prepared,
    Settings,
    feature_numbers,
    image_processor,
    size_made,
    token_id,
)


@dataclass(frozen=True, kw_only=True)
class PaliGemma(Llava):
    """A number of features that is the same for every picture."""

    def token_arrays(
        self, ids: np.ndarray, features: int, prepared: Prepared, *, prefix: int | None = None
    ) -> dict[str, np.ndarray]:
        before = len(ids) if prefix is None else prefix
        return {
            "image_features": feature_numbers(ids, self.feature_id, prepared, features),
            "groups": (np.arange(len(ids)) < before).astype(np.int32),
        }


def open(settings: Settings) -> PaliGemma:
    """From the tower's size of pictures and patches."""
    vision = settings.config["vision_config"]
    size, patch = vision.get("image_size", 224), vision.get("patch_size", 14)
    image = image_processor({**settings.image, "image_seq_length": None}, "SiglipImageProcessor")
    if size_made(image) != (size, size):
        raise ValueError(f"the image processor makes pictures of {size_made(image)}, and the vision tower takes {size}")
    number, text = token_id(settings.config, settings.tokenizer, "<image>")
    return PaliGemma(
        placeholder=text,
        feature_id=number,
        own={text: number},
        unit=(size // patch) ** 2,
        channels=vision.get("num_channels", 3) * patch * patch,
        image=image,
        facts=repr(("paligemma", patch, image.to_dict())),
        patch=patch,
        features=(size // patch) ** 2,
    )
