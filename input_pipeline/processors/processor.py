"""What a family's processor of pictures is, and what they share: HF's image processors by name, patches, counting."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Size = tuple[int, int]  # width, height


class Settings(NamedTuple):
    """What a family's processor is opened from: the model's config.json, its image processor's settings, and the
    tokenizer."""

    config: dict[str, Any]
    image: dict[str, Any]
    tokenizer: Any


class Prepared(NamedTuple):
    """The pictures of a row: `patches` float32 [p, C], `segments` int32 [p] from 1 on (what sees itself in the tower),
    `places` int32 [p, 2], row and column; how many features each picture has, which stand in the text; the
    grid of features that three-axis positions count (rows, columns), of each picture; and arrays of a family's own."""

    patches: np.ndarray
    segments: np.ndarray
    places: np.ndarray
    features: tuple[int, ...]
    grids: tuple[tuple[int, int], ...] = ()
    more: Mapping[str, np.ndarray] = {}  # never written to


@dataclass(frozen=True, kw_only=True)
class Processor:
    """How a model's pictures are prepared; a family fills in `expand` and `prepare`. Picklable."""

    placeholder: str  # what the chat template writes for a picture
    feature_id: int  # the token whose embedding a feature of a picture replaces
    own: Mapping[str, int]  # tokens that only pictures have, and their ids
    unit: int  # patches that come together
    channels: int  # numbers of a patch
    image: Any = field(repr=False, compare=False)  # HF's image processor
    facts: str  # all that decides what becomes of a picture

    def expand(self, sizes: Sequence[Size]) -> list[str]:
        """The text that stands for each picture of a row, from their sizes."""
        raise NotImplementedError

    def prepare(self, images: Sequence[Any]) -> Prepared:
        """The patches of the pictures of a row, PIL images in RGB."""
        raise NotImplementedError

    def token_arrays(
        self, ids: np.ndarray, features: int, prepared: Prepared, *, prefix: int | None = None
    ) -> dict[str, np.ndarray]:
        """What stands beside the tokens of a document with these pictures, int32 [n] or [n, k]; so many features are
        before it in the row, and so many of its tokens are its prompt (None: all)."""
        return {"image_features": feature_numbers(ids, self.feature_id, prepared, features)}

    def nothing(self) -> Prepared:
        """Of a row without pictures."""
        return Prepared(np.zeros((0, self.channels), np.float32), np.zeros(0, np.int32), np.zeros((0, 2), np.int32), ())


def feature_numbers(ids: np.ndarray, feature_id: int, prepared: Prepared, before: int = 0) -> np.ndarray:
    """For each token 1 + the number of the feature that takes its place, from `before` on; 0 for all others, also for
    such tokens that a model says itself, behind those of its pictures."""
    here = ids == feature_id
    numbers = np.cumsum(here)
    return np.where(here & (numbers <= sum(prepared.features)), before + numbers, 0).astype(np.int32)


def image_processor(settings: Mapping[str, Any], default: str) -> Any:
    """HF's image processor of the class that the settings name, in its variant for numpy and Pillow."""
    import transformers

    name = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or default)
    name = name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor") + "Pil"
    kind = getattr(transformers, name, None)
    if kind is None:
        raise NotImplementedError(f"not implemented yet: image processor {name.removesuffix('Pil')}")
    known = {"image_processor_type", "feature_extractor_type", "processor_class", "_processor_class", "auto_map"}
    return kind(**{key: value for key, value in settings.items() if key not in known})


def settings_known(kind: type) -> set[str]:
    """The names of settings that a class of image processors has."""
    valid = getattr(kind, "valid_kwargs", object)
    named = {name for one in valid.__mro__ for name in getattr(one, "__annotations__", {})}
    for one in getattr(valid, "__orig_bases__", ()):  # a TypedDict forgets its parents
        named |= set(getattr(one, "__annotations__", {}))
    return named | {name for name in vars(kind) if not name.startswith("_") and not callable(getattr(kind, name))}


def token_id(config: Mapping[str, Any], tokenizer: Any, default: str) -> tuple[int, str]:
    """The token for a feature: its id by the model's configuration, and its text."""
    given = config.get("image_token_id", config.get("image_token_index"))
    found = tokenizer.convert_tokens_to_ids(getattr(tokenizer, "image_token", None) or default)
    number = found if given is None else int(given)
    vocabulary = len(tokenizer)
    if number is None or number == tokenizer.unk_token_id or not 0 <= number < vocabulary:
        raise ValueError(
            f"the model's image token has id {number} and the tokenizer {vocabulary} tokens: they do not belong"
            f" together; use a tokenizer with a token such as {default!r}"
        )
    return number, tokenizer.convert_ids_to_tokens(number)


def size_made(image: Any) -> tuple[int | None, int | None]:
    """Height and width of what an image processor makes, None where that is not fixed."""
    size = getattr(image, "crop_size", None) if getattr(image, "do_center_crop", False) else image.size
    return (size["height"], size["width"]) if size is not None and size["height"] else (None, None)


def in_patches(pixels: np.ndarray, patch: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture [C, H, W] cut into patches row by row: [h * w, C * patch * patch], and their rows and columns
    [h * w, 2]."""
    channels, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    cut = pixels[:, : rows * patch, : columns * patch].reshape(channels, rows, patch, columns, patch)
    patches = cut.transpose(1, 3, 0, 2, 4).reshape(rows * columns, channels * patch * patch)
    return np.ascontiguousarray(patches, np.float32), grid(rows, columns)


def grid(rows: int, columns: int) -> np.ndarray:
    """Row and column of each place, row by row, int32 [rows * columns, 2]."""
    return np.stack(np.divmod(np.arange(rows * columns, dtype=np.int32), np.int32(columns)), axis=1)


def of_tiles(tiles: Sequence[np.ndarray], patch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tiles [C, H, W] one after the other: their patches, segments (one a tile) and places."""
    cut = [in_patches(tile, patch) for tile in tiles]
    segments = np.repeat(np.arange(1, len(cut) + 1, dtype=np.int32), [len(patches) for patches, _ in cut])
    return np.concatenate([p for p, _ in cut]), segments, np.concatenate([places for _, places in cut])
