"""Llama 3.2 Vision: a picture is a few square tiles that the text's cross-attention looks at; one token stands for it.

Tiles that a picture does not fill are there too, empty, as in transformers: the tower's patches see them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from input_pipeline.processors.processor import (
    Prepared,
    Processor,
    Settings,
    Size,
    image_processor,
    of_tiles,
    token_id,
)


@dataclass(frozen=True, kw_only=True)
class Mllama(Processor):
    """One token a picture; `patch_tiles` says of each patch which tile of its picture it is of, from 0 on, and the id
    of the picture's aspect ratio."""

    patch: int
    tiles: int

    def expand(self, sizes: Sequence[Size]) -> list[str]:
        return [self.placeholder] * len(sizes)

    def prepare(self, images: Sequence[Any]) -> Prepared:
        made = self.image([list(images)], return_tensors="np")
        pixels, ratios = made["pixel_values"][0], made["aspect_ratio_ids"][0]
        patches, _, places = of_tiles([tile for tiles in pixels for tile in tiles], self.patch)
        each = len(patches) // (len(images) * self.tiles)
        picture, tile = np.divmod(np.repeat(np.arange(len(images) * self.tiles), each), self.tiles)
        of_patches = np.stack([tile, np.asarray(ratios)[picture]], axis=1).astype(np.int32)
        return Prepared(
            patches, picture.astype(np.int32) + 1, places, (1,) * len(images), more={"patch_tiles": of_patches}
        )

    def token_arrays(
        self, ids: np.ndarray, features: int, prepared: Prepared, *, prefix: int | None = None
    ) -> dict[str, np.ndarray]:
        here = ids == self.feature_id
        shown = here & (np.cumsum(here) <= len(prepared.features))  # not those that a model says itself
        return {"cross_images": seen(shown, features)}

    def nothing(self) -> Prepared:
        return super().nothing()._replace(more={"patch_tiles": np.zeros((0, 2), np.int32)})


def seen(pictured: np.ndarray, before: int = 0) -> np.ndarray:
    """The first and the last picture, from 1 + `before` on, that each token sees, and whether it stands before all of
    them, int32 [n, 3]; 0, 0, 0 where there are none. It sees the one that came last, and those that stand directly
    before it; in front of the first one all of them, as in transformers."""
    last = np.cumsum(pictured)
    starts = pictured & ~np.concatenate([[False], pictured[:-1]])
    first = np.maximum.accumulate(np.where(starts, last, 0))
    count = int(pictured.sum())
    after = np.stack([before + first, before + last, np.zeros_like(last)], axis=1)
    ahead = np.array([before + 1, before + count, 1]) if count else np.zeros(3, np.int32)
    return np.where(last[:, None] > 0, after, ahead).astype(np.int32)


def open(settings: Settings) -> Mllama:
    """From the tower's size of tiles and their number."""
    vision = settings.config["vision_config"]
    size, patch, tiles = (
        vision.get("image_size", 448),
        vision.get("patch_size", 14),
        vision.get("max_num_tiles", 4),
    )
    image = image_processor(settings.image, "MllamaImageProcessor")
    if (image.size["height"], image.size["width"], image.max_image_tiles) != (size, size, tiles):
        raise ValueError(
            f"the image processor makes {image.max_image_tiles} tiles of {image.size['height']} x"
            f" {image.size['width']}, and the vision tower takes {tiles} of {size} x {size}"
        )
    number, text = token_id(settings.config, settings.tokenizer, "<|image|>")
    return Mllama(
        placeholder=text,
        feature_id=number,
        own={text: number},
        unit=tiles * (size // patch) ** 2,
        channels=vision.get("num_channels", 3) * patch * patch,
        image=image,
        facts=repr(("mllama", patch, image.to_dict())),
        patch=patch,
        tiles=tiles,
    )
