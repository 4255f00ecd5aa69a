"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: a picture keeps its shape, in patches whose neighbours are merged to one feature,
and its tokens have positions on three axes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from input_pipeline.examples import RowError
from input_pipeline.processors.processor import (
    Prepared,
    Processor,
    Settings,
    Size,
    feature_numbers,
    grid,
    image_processor,
    token_id,
)

_MERGED = 16  # merged patches that come together


@dataclass(frozen=True, kw_only=True)
class QwenVl(Processor):
    """As many features as the picture has cells of `merge` x `merge` patches; patches come cell by cell, and where the
    tower looks through windows of `window` x `window` cells, window by window."""

    patch: int
    merge: int
    window: int  # 0: none
    fewest: int  # pixels
    most: int

    def expand(self, sizes: Sequence[Size]) -> list[str]:
        return [self.placeholder * math.prod(self.grid(size)) for size in sizes]

    def grid(self, size: Size) -> tuple[int, int]:
        """Rows and columns of features of a picture."""
        edge = self.patch * self.merge
        height, width = resized(size, edge=edge, fewest=self.fewest, most=self.most)
        return height // edge, width // edge

    def prepare(self, images: Sequence[Any]) -> Prepared:
        for image in images:
            self.grid(image.size)  # refuses what is too narrow
        made = self.image(list(images), return_tensors="np")
        grids = [(int(h), int(w)) for _, h, w in made["image_grid_thw"]]
        merged = tuple((h // self.merge, w // self.merge) for h, w in grids)
        places = np.concatenate([self._places(*each) for each in grids])
        segments = np.repeat(np.arange(1, len(grids) + 1, dtype=np.int32), [h * w for h, w in grids])
        patches, counts = np.asarray(made["pixel_values"], np.float32), tuple(h * w for h, w in merged)
        if self.window:
            before = np.cumsum([0, *counts])
            cells = np.concatenate([n + by_window(*size, self.window) for n, size in zip(before, merged, strict=False)])
            order = (cells[:, None] * self.merge**2 + np.arange(self.merge**2)).reshape(-1)
            patches, places = patches[order], places[order]
        return Prepared(patches, segments, places, counts, merged)

    def _places(self, rows: int, columns: int) -> np.ndarray:
        """Rows and columns of the patches in their order."""
        m = self.merge
        cells = grid(rows, columns).reshape(rows // m, m, columns // m, m, 2)
        return cells.transpose(0, 2, 1, 3, 4).reshape(-1, 2)

    def token_arrays(
        self, ids: np.ndarray, features: int, prepared: Prepared, *, prefix: int | None = None
    ) -> dict[str, np.ndarray]:
        numbers = feature_numbers(ids, self.feature_id, prepared, features)
        if self.window and prepared.grids:
            before = features + np.cumsum([0, *prepared.features])
            each = [
                1 + n + np.argsort(by_window(*size, self.window))
                for n, size in zip(before, prepared.grids, strict=False)
            ]
            here = numbers > 0
            numbers[here] = np.concatenate(each)[numbers[here] - 1 - features]
        return {"image_features": numbers, "axes": axes(ids == self.feature_id, prepared.grids)}


def by_window(rows: int, columns: int, window: int) -> np.ndarray:
    """The numbers of cells, row by row, in the order of windows: those of the first one, row by row, and so on."""
    row, column = grid(rows, columns).T
    return np.lexsort((column, row, column // window, row // window))


def axes(pictured: np.ndarray, grids: Sequence[tuple[int, int]]) -> np.ndarray:
    """Positions in time, height and width int32 [n, 3] of tokens, of which those of pictures are `pictured`.

    Text counts on all three at once; a picture's tokens stand still in time and are numbered by row and column; what
    follows goes on after its longer side.
    """
    found = np.zeros((len(pictured), 3), np.int32)
    at, place = 0, 0
    for rows, columns in grids:
        first = at + int(np.argmax(pictured[at:]))
        text, count = first - at, rows * columns
        found[at:first] = (place + np.arange(text))[:, None]
        place += text
        found[first : first + count, 0] = place
        found[first : first + count, 1:] = place + grid(rows, columns)
        place += max(rows, columns)
        at = first + count
    found[at:] = (place + np.arange(len(pictured) - at))[:, None]
    return found


def resized(size: Size, *, edge: int, fewest: int, most: int) -> tuple[int, int]:
    """Height and width that a picture is resized to: multiples of `edge`, within those limits of pixels, in shape."""
    width, height = size
    if max(width, height) / min(width, height) > 200:
        raise RowError(f"a picture of {width} x {height} is too narrow: one side is over 200 times the other", "image")
    rows, columns = round(height / edge), round(width / edge)
    if rows * columns * edge**2 > most:
        shrink = math.sqrt(height * width / most)
        rows, columns = (max(1, math.floor(side / shrink / edge)) for side in (height, width))
    elif rows * columns * edge**2 < fewest:
        grow = math.sqrt(fewest / (height * width))
        rows, columns = (math.ceil(side * grow / edge) for side in (height, width))
    return rows * edge, columns * edge


def open(settings: Settings) -> QwenVl:
    """From the image processor's patches and limits; the model's tower must have the same patches."""
    vision = settings.config["vision_config"]
    image = image_processor(settings.image, "Qwen2VLImageProcessor")
    tower = (vision.get("patch_size", 14), vision.get("spatial_merge_size", 2), vision.get("temporal_patch_size", 2))
    made = (image.patch_size, image.merge_size, image.temporal_patch_size)
    if made != tower:
        raise ValueError(
            f"the image processor's patch_size, merge_size and temporal_patch_size are {made}, the vision tower's"
            f" {tower}"
        )
    if not image.do_resize:
        raise NotImplementedError("not implemented yet: Qwen's image processor with do_resize: false")
    number, text = token_id(settings.config, settings.tokenizer, "<|image_pad|>")
    fewest, most = image.size["shortest_edge"], image.size["longest_edge"]
    patch, merge, deep = made
    return QwenVl(
        placeholder=text,
        feature_id=number,
        own={text: number},
        unit=_MERGED * merge**2,
        channels=vision.get("in_channels", vision.get("in_chans", 3)) * deep * patch**2,
        image=image,
        facts=repr(("qwen_vl", image.to_dict())),
        patch=patch,
        merge=merge,
        window=vision.get("window_size", 0) // merge // patch,
        fewest=fewest,
        most=most,
    )
