"""Idefics3 and SmolVLM: a large picture is cut into square tiles, row by row, with all of it as the last one."""

import math
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
    token_id,
)

_FAKE, _WHOLE = "<fake_token_around_image>", "<global-img>"
_LONGEST = 4096  # the side that no picture is resized beyond


@dataclass(frozen=True, kw_only=True)
class Idefics3(Processor):
    """A number of features for every tile, each tile announced by its row and column."""

    patch: int
    features: int  # of a tile
    tile: int
    longest: int | None  # side that pictures are resized to before they are cut; None: as they are
    splits: bool

    def expand(self, sizes: Sequence[Size]) -> list[str]:
        return [self._text(*self.tiles(size)) for size in sizes]

    def tiles(self, size: Size) -> tuple[int, int]:
        """Rows and columns of tiles of a picture; 0, 0 for one that stays whole."""
        if not self.splits:
            return 0, 0
        height, width = _in_tiles(*(size[::-1] if self.longest is None else _resized(size, self.longest)), self.tile)
        return (height, width) if height > 1 or width > 1 else (0, 0)

    def prepare(self, images: Sequence[Any]) -> Prepared:
        made = [self.image([image], return_tensors="np")["pixel_values"][0] for image in images]
        features = tuple(len(tiles) * self.features for tiles in made)
        return Prepared(*of_tiles([tile for tiles in made for tile in tiles], self.patch), features)

    def _text(self, rows: int, columns: int) -> str:
        tile = next(iter(self.own)) * self.features
        whole = f"{_FAKE}{_WHOLE}{tile}{_FAKE}"
        if not rows:
            return whole
        lines = ["".join(f"{_FAKE}<row_{r}_col_{c}>{tile}" for c in _from_1(columns)) + "\n" for r in _from_1(rows)]
        return "".join(lines) + "\n" + whole


def _from_1(count: int) -> range:
    return range(1, count + 1)


def _resized(size: Size, longest: int) -> tuple[int, int]:
    """Height and width of a picture whose longer side becomes `longest`; the shorter one is even."""
    width, height = size
    ratio = width / height
    if width >= height:
        width, height = longest, int(longest / ratio)
        height += height % 2
    else:
        width, height = int(longest * ratio), longest
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    ratio = width / height
    if width >= height and width > _LONGEST:
        width, height = _LONGEST, int(_LONGEST / ratio)
    elif height > width and height > _LONGEST:
        width, height = int(_LONGEST * ratio), _LONGEST
    return max(height, 1), max(width, 1)


def _in_tiles(height: int, width: int, tile: int) -> tuple[int, int]:
    """Rows and columns of tiles that hold a picture: the longer side decides, the other follows in proportion."""
    ratio = width / height
    if width >= height:
        columns = math.ceil(width / tile)
        return math.ceil(int(columns * tile / ratio) / tile), columns
    rows = math.ceil(height / tile)
    return rows, math.ceil(int(rows * tile * ratio) / tile)


def open(settings: Settings) -> Idefics3:
    """From the tower's size of tiles and patches, and how many patches are shuffled into one feature."""
    config, vision, tokenizer = settings.config, settings.config["vision_config"], settings.tokenizer
    size, patch = vision.get("image_size", 224), vision.get("patch_size", 32)
    smol = config["model_type"] == "smolvlm"
    image = image_processor(settings.image, "SmolVLMImageProcessor" if smol else "Idefics3ImageProcessor")
    if image.max_image_size["longest_edge"] != size:
        raise ValueError(
            f"the image processor makes tiles of {image.max_image_size['longest_edge']} (max_image_size), and the"
            f" vision tower takes {size}"
        )
    number, text = token_id(config, tokenizer, "<image>")
    names = [_FAKE, _WHOLE, *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7))]
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(names), strict=True))
    if any(ids[name] in (None, tokenizer.unk_token_id) for name in (_FAKE, _WHOLE)):
        raise ValueError(f"the tokenizer has no tokens {_FAKE!r} and {_WHOLE!r}, which a {config['model_type']} needs")
    return Idefics3(
        placeholder=text,
        feature_id=number,
        own={text: number, **{name: i for name, i in ids.items() if i not in (None, tokenizer.unk_token_id)}},
        unit=(size // patch) ** 2,
        channels=vision.get("num_channels", 3) * patch * patch,
        image=image,
        facts=repr(("idefics3", patch, config.get("scale_factor", 2), image.to_dict())),
        patch=patch,
        features=(size // patch) ** 2 // config.get("scale_factor", 2) ** 2,
        tile=size,
        longest=image.size["longest_edge"] if image.do_resize else None,
        splits=bool(image.do_image_splitting),
    )
