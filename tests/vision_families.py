"""Tiny models of every vision-language family, and rows with pictures as both programs read them.

A family is a line of FAMILIES: its model, and how its pictures become patches.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from input_pipeline.processors.mllama import seen as mllama_seen
from input_pipeline.processors.qwen_vl import axes as qwen_vl_axes
from models.vision import Images

VOCABULARY, IMAGE, LENGTH, NEW = 96, 90, 24, 64
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
TOWER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "initializer_range": 0.1,
}
PICTURES = (2, 1, 0)  # of each row
TILES, FILLED = 4, (0, 1, 2, 3, 4, 2, 4, 3, 4)  # of a picture of mllama's, by the number of its aspect ratio


class Family(NamedTuple):
    """How a tiny model of a family is made, and how many tokens a picture takes."""

    make: Callable[[], Any]
    features: int
    side: int = 28
    groups: str = ""  # which tokens see one another both ways: of each of the "pictures", or of the "prefix"
    apart: bool = False  # pictures of rows stand on an axis of their own
    ratios: tuple[int, ...] = ()  # numbers of the pictures' aspect ratios, where the text looks at tiles of them
    window: int = 0  # features a side of the tower's windows: patches come window by window
    grids: tuple[tuple[int, int], ...] = ()  # rows and columns of patches, where pictures have shapes of their own


def llava(text: Any, tower: Any, **kwargs: Any) -> Any:
    config = transformers.LlavaConfig(vision_config=tower, text_config=text, image_token_index=IMAGE, **kwargs)
    return transformers.LlavaForConditionalGeneration(config)


def gemma3() -> Any:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    text = transformers.Gemma3TextConfig(
        **TEXT | {"num_hidden_layers": 3}, head_dim=8, sliding_window=6, layer_types=kinds
    )
    tower = transformers.SiglipVisionConfig(**TOWER | {"image_size": 56}, vision_use_head=False)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=tower, mm_tokens_per_image=4, image_token_index=IMAGE
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def paligemma() -> Any:
    text = transformers.GemmaConfig(**TEXT, head_dim=8)
    tower = transformers.SiglipVisionConfig(**TOWER, vision_use_head=False, projection_dim=32)
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=tower, image_token_index=IMAGE, projection_dim=32, hidden_size=32
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def idefics3(config: Any, model: Any, **kwargs: Any) -> Any:
    tower = TOWER | {"image_size": 56, **kwargs}
    return model(
        config(vision_config=tower, text_config=transformers.LlamaConfig(**TEXT).to_dict(), image_token_id=IMAGE)
    )


def qwen_vl(config: Any, model: Any, **tower: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
    tower = {"depth": 3, "num_heads": 2, "initializer_range": 0.1, **tower}
    text = TEXT | {"rope_parameters": rope, "num_hidden_layers": 3, "head_dim": 8}
    return model(config(text_config=text, vision_config=tower, image_token_id=IMAGE))


def mllama() -> Any:
    text = TEXT | {"num_hidden_layers": 5, "cross_attention_layers": [1, 3], "bos_token_id": 1, "pad_token_id": 0}
    tower = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_global_layers": 2,
        "attention_heads": 2,
        "vision_output_dim": 72,
        "image_size": 28,
        "patch_size": 14,
        "intermediate_layers_indices": [0, 1],
    }
    config = transformers.MllamaConfig(text_config=text, vision_config=tower, image_token_index=IMAGE)
    return transformers.MllamaForConditionalGeneration(config)


GRIDS = ((4, 6), (6, 2), (2, 6))
FAMILIES = {
    "llava, CLIP": Family(
        lambda: llava(transformers.LlamaConfig(**TEXT), transformers.CLIPVisionConfig(**TOWER, projection_dim=16)), 4
    ),
    "llava, CLIP, all outputs of two layers": Family(
        lambda: llava(
            transformers.Qwen2Config(**TEXT, tie_word_embeddings=True),
            transformers.CLIPVisionConfig(**TOWER, projection_dim=16),
            vision_feature_layer=[1, -1],
            vision_feature_select_strategy="full",
        ),
        5,
    ),
    "llava, SigLIP": Family(
        lambda: llava(
            transformers.MistralConfig(**TEXT, sliding_window=None),
            transformers.SiglipVisionConfig(**TOWER, vision_use_head=False),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        4,
    ),
    "gemma3": Family(gemma3, 4, side=56, groups="pictures"),
    "paligemma": Family(paligemma, 4, groups="prefix"),
    "idefics3": Family(
        lambda: idefics3(transformers.Idefics3Config, transformers.Idefics3ForConditionalGeneration),
        4,
        side=56,
        apart=True,
    ),
    "smolvlm": Family(
        lambda: idefics3(transformers.SmolVLMConfig, transformers.SmolVLMForConditionalGeneration),
        4,
        side=56,
        apart=True,
    ),
    "qwen2_vl": Family(
        lambda: qwen_vl(
            transformers.Qwen2VLConfig,
            transformers.Qwen2VLForConditionalGeneration,
            embed_dim=24,
            hidden_size=32,
            mlp_ratio=2,
        ),
        0,
        grids=GRIDS,
    ),
    "qwen2_5_vl": Family(
        lambda: qwen_vl(
            transformers.Qwen2_5_VLConfig,
            transformers.Qwen2_5_VLForConditionalGeneration,
            hidden_size=24,
            out_hidden_size=32,
            intermediate_size=40,
            window_size=56,
            fullatt_block_indexes=[1],
        ),
        0,
        window=2,
        grids=GRIDS,
    ),
    "qwen3_vl": Family(
        lambda: qwen_vl(
            transformers.Qwen3VLConfig,
            transformers.Qwen3VLForConditionalGeneration,
            hidden_size=24,
            out_hidden_size=32,
            intermediate_size=40,
            patch_size=14,
            num_position_embeddings=9,
            deepstack_visual_indexes=[0, 1],
        ),
        0,
        grids=GRIDS,
    ),
    "mllama": Family(mllama, 1, ratios=(2, 6, 1)),
}


def rows(family: Family, *, pictures: bool) -> dict[str, np.ndarray]:
    """Rows of uneven lengths, with pictures or without, as both programs read them."""
    random = np.random.default_rng(1)
    tokens = random.integers(1, 80, (3, LENGTH)).astype(np.int32)
    lengths = np.array([LENGTH, 17, 9])
    numbers = np.zeros((3, LENGTH), np.int32)
    if pictures:
        sizes = iter(features_of(family))
        for row, count in enumerate(PICTURES):
            first, before = 2, 0
            for _, features in zip(range(count), sizes, strict=False):
                at = slice(first, first + features)
                tokens[row, at] = IMAGE
                numbers[row, at] = 1 + before + np.arange(features)
                first, before = first + features + 3, before + features
    segments = (np.arange(LENGTH)[None, :] < lengths[:, None]).astype(np.int32)
    pixels = random.normal(size=(sum(PICTURES), 3, family.side, family.side)).astype(np.float32)
    if family.grids:
        pixels = random.normal(size=(sum(h * w for h, w in family.grids), 3 * 2 * 14 * 14)).astype(np.float32)
    given = {"tokens": tokens * segments, "segments": segments, "features": numbers, "pixels": pixels}
    if family.groups == "prefix":
        return given | {"groups": (np.arange(LENGTH)[None, :] < np.array([16, 10, 3])[:, None]).astype(np.int32)}
    if family.ratios:
        pixels = random.normal(size=(sum(PICTURES), TILES, 3, family.side, family.side)).astype(np.float32)
        for picture, ratio in zip(pixels, family.ratios, strict=True):
            picture[FILLED[ratio] :] = 0
        looks = np.stack([mllama_seen(row == IMAGE) for row in tokens]) * segments[:, :, None]
        return given | {"pixels": pixels} | ({"looks": looks} if pictures else {})
    if family.grids:
        if pictures and family.window:
            numbers = windowed_numbers(family, numbers)
            given["features"] = numbers
        own = np.split(np.array(family.grids), np.cumsum(PICTURES)[:-1])
        axes = [qwen_vl_axes(row == IMAGE, grids // 2) for row, grids in zip(tokens, own, strict=True)]
        return given | ({"axes": np.array(axes) * segments[:, :, None]} if pictures else {})
    return given | ({"groups": -(-numbers // family.features)} if family.groups else {})


def in_windows(family: Family, rows: int, columns: int) -> list[tuple[int, int]]:
    """Rows and columns of features in the order of their patches."""
    cells = [divmod(n, columns) for n in range(rows * columns)]
    side = family.window
    return sorted(cells, key=lambda cell: (cell[0] // side, cell[1] // side)) if side else cells


def windowed_numbers(family: Family, numbers: np.ndarray) -> np.ndarray:
    """Numbers of features for tokens row by row, where their patches come window by window."""
    found, grids = numbers.copy(), iter(family.grids)
    for row, count in enumerate(PICTURES):
        before = 0
        for _, (h, w) in zip(range(count), grids, strict=False):
            order = in_windows(family, h // 2, w // 2)
            for n, (up, left) in enumerate(order):
                found[row, numbers[row] == 1 + before + up * (w // 2) + left] = 1 + before + n
            before += len(order)
    return found


def features_of(family: Family) -> list[int]:
    """How many tokens each picture of the rows takes."""
    return [h * w // 4 for h, w in family.grids] or [family.features] * sum(PICTURES)


def pixels_of(family: Family, pictures: list[np.ndarray]) -> torch.Tensor:
    """Pictures of rows as a family's model of transformers takes them: all in a row, or [B, n, 3, H, W]."""
    if not family.apart:
        return torch.tensor(np.concatenate(pictures))
    made = np.zeros((len(pictures), max(map(len, pictures)), *pictures[0].shape[1:]), np.float32)
    for row, own in enumerate(pictures):
        made[row, : len(own)] = own
    return torch.tensor(made)


def types_of(family: Family, groups: np.ndarray) -> torch.Tensor:
    """Groups as transformers' `token_type_ids`: 1 for pictures, or for what is no prefix."""
    return torch.tensor(groups == 0 if family.groups == "prefix" else groups > 0).long()


def images_of(family: Family, given: dict[str, np.ndarray]) -> Images:
    """The pictures as patches, those of a row one after the other."""
    if family.grids:
        return merged_images(family, given)
    if family.ratios:
        return tiled_images(family, given)
    side = given["pixels"].shape[-1] // 14
    p = side * side
    cut = given["pixels"].reshape(-1, 3, side, 14, side, 14).transpose(0, 2, 4, 1, 3, 5).reshape(-1, p, 3 * 14 * 14)
    patches, segments = np.zeros((3, 2 * p, cut.shape[-1]), np.float32), np.zeros((3, 2 * p), np.int32)
    places = np.zeros((3, 2 * p, 2), np.int32)
    taken = iter(cut)
    for row, count in enumerate(PICTURES):
        for n in range(count):
            at = slice(p * n, p * n + p)
            patches[row, at], segments[row, at] = next(taken), n + 1
            places[row, at] = [divmod(number, side) for number in range(p)]
    found = Images(*map(jnp.asarray, (patches, segments, places, given["features"])))
    return found._replace(groups=jnp.asarray(given["groups"])) if "groups" in given else found


def merged_images(family: Family, given: dict[str, np.ndarray]) -> Images:
    """As `images_of`, of pictures whose patches come square by square."""
    most = 40
    patches, segments = np.zeros((3, most, given["pixels"].shape[1]), np.float32), np.zeros((3, most), np.int32)
    places = np.zeros((3, most, 2), np.int32)
    taken, grids = iter(given["pixels"]), iter(family.grids)
    for row, count in enumerate(PICTURES):
        at = 0
        for n, (rows, columns) in zip(range(count), grids, strict=False):
            own = [next(taken) for _ in range(rows * columns)]  # cell by cell, those row by row
            for up, left in in_windows(family, rows // 2, columns // 2):
                for k, (down, right) in enumerate(np.ndindex(2, 2)):
                    patches[row, at], segments[row, at] = own[4 * (up * (columns // 2) + left) + k], n + 1
                    places[row, at] = (2 * up + down, 2 * left + right)
                    at += 1
    found = Images(*map(jnp.asarray, (patches, segments, places, given["features"])))
    return found._replace(axes=jnp.asarray(given["axes"]))


def tiled_images(family: Family, given: dict[str, np.ndarray]) -> Images:
    """As `images_of`, of pictures that have tiles."""
    each = TILES * 4
    patches = np.zeros((3, 2 * each, 3 * 14 * 14), np.float32)
    segments, tiles = np.zeros((3, 2 * each), np.int32), np.zeros((3, 2 * each, 2), np.int32)
    places = np.tile(np.array([divmod(n, 2) for n in range(4)], np.int32), (3, 2 * TILES, 1))
    taken = iter(zip(given["pixels"], family.ratios, strict=True))
    for row, count in enumerate(PICTURES):
        for n, (picture, ratio) in zip(range(count), taken, strict=False):
            at = slice(n * each, n * each + each)
            cut = picture.reshape(TILES, 3, 2, 14, 2, 14).transpose(0, 2, 4, 1, 3, 5)
            patches[row, at], segments[row, at] = cut.reshape(each, -1), n + 1
            tiles[row, at] = [(number // 4, ratio) for number in range(each)]
    arrays = (jnp.asarray(x) for x in (patches, segments, places))
    return Images(*arrays, None, tiles=jnp.asarray(tiles), looks=jnp.asarray(given["looks"]))


def tiled_kwargs(family: Family, given: dict[str, np.ndarray], row: int) -> dict[str, torch.Tensor]:
    """The pictures of a row as mllama's model takes them, with the mask that its processor makes."""
    own = slice(sum(PICTURES[:row]), sum(PICTURES[: row + 1]))
    filled = [FILLED[ratio] for ratio in family.ratios[own]]
    ids = given["tokens"][row][given["segments"][row] > 0].tolist()
    spans = [get_cross_attention_token_mask(ids, IMAGE)]
    mask = convert_sparse_cross_attention_mask_to_dense(spans, [filled], TILES, len(ids))
    return {
        "pixel_values": torch.tensor(given["pixels"][own])[None],
        "aspect_ratio_ids": torch.tensor(family.ratios[own])[None],
        "aspect_ratio_mask": torch.tensor([[[n < count for n in range(TILES)] for count in filled]]).long(),
        "cross_attention_mask": torch.tensor(mask),
    }


def seen(family: Family, given: dict[str, np.ndarray], row: int | None = None) -> dict[str, torch.Tensor]:
    """The pictures of all rows, or of one, as a family's model of transformers takes them."""
    if family.ratios:
        assert row is not None
        return tiled_kwargs(family, given, row)
    if not family.grids:
        each = np.split(given["pixels"], np.cumsum(PICTURES)[:-1])
        return {"pixel_values": pixels_of(family, each if row is None else [each[row]])}
    counts = [sum(PICTURES[:at]) for at in range(len(PICTURES) + 1)]
    own = slice(None) if row is None else slice(counts[row], counts[row + 1])
    patches = np.cumsum([0, *(h * w for h, w in family.grids)])
    pixels = given["pixels"][patches[own.start or 0] : patches[-1 if own.stop is None else own.stop]]
    grids = torch.tensor([(1, h, w) for h, w in family.grids[own]])
    return {"pixel_values": torch.tensor(pixels), "image_grid_thw": grids}
