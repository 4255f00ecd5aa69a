"""Qwen3-VL: pictures of any shape, whose features join the stream of Qwen 3 behind its first layers too, and tokens
whose pairs take turns in time, height and width.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import isqrt
from typing import Any

from models.activations import ACTIVATIONS
from models.config import DecoderConfig, Layer
from models.families import Fields, Table, qwen3
from models.rope import alternating, axial_rope
from models.towers import QWEN3_VL
from models.vision import Vision, vit

PROJECTOR = {
    **{
        f"projector/{ours}/{leaf}": f"merger.{theirs}.{name}"
        for ours, theirs in (("up", "linear_fc1"), ("down", "linear_fc2"))
        for leaf, name in (("kernel", "weight"), ("bias", "bias"))
    },
    **{
        f"projector/layers/mlp/{ours}/{leaf}": f"deepstack_merger_list.{{i}}.{theirs}.{name}"
        for ours, theirs in (("up", "linear_fc1"), ("down", "linear_fc2"))
        for leaf, name in (("kernel", "weight"), ("bias", "bias"))
    },
    **{
        f"projector/{ours}/{leaf}": f"{theirs}.norm.{name}"
        for ours, theirs in (("norm", "merger"), ("layers/norm", "deepstack_merger_list.{i}"))
        for leaf, name in (("scale", "weight"), ("bias", "bias"))
    },
}


def config(fields: Fields) -> DecoderConfig:
    """The decoder of a `Qwen3VLConfig`, with its tower."""
    text_fields, vision = fields.inside("text_config"), fields.inside("vision_config")
    text = qwen3.config(text_fields)
    text_fields.finish()
    tied = fields.get("tie_word_embeddings", False) or text.tied_head
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vocab_size"):
        fields.get(name, None)  # of what is done with texts and pictures before the model
    tower, made = _tower(vision), vision["out_hidden_size"]
    vision.finish()
    if made != text.width:
        raise ValueError(f"config.json: the vision tower's features are {made} wide, and the text model {text.width}")
    if any(layer.rope is None or not layer.rope.axes for layer in text.each):
        raise ValueError("config.json lacks mrope_section, how many pairs turn by time, by height and by width")
    each = tuple(Layer(layer.window, alternating(layer.rope)) for layer in text.each if layer.rope is not None)
    return replace(text, each=each, vision=tower, tied_head=tied)


def _tower(fields: Fields) -> Vision:
    width, heads, depth, patch = fields["hidden_size"], fields["num_heads"], fields["depth"], fields["patch_size"]
    fields.expect("hidden_act", "gelu_pytorch_tanh", *ACTIVATIONS)
    stack = vit(
        width=width,
        heads=heads,
        mlp_width=fields["intermediate_size"],
        layers=depth,
        activation=fields.get("hidden_act", "gelu_pytorch_tanh"),
        eps=1e-6,
    )
    rope = axial_rope(head_width=width // heads, theta=fields.get("rope_parameters", {}).get("rope_theta", 10_000.0))
    return Vision(
        layers=replace(stack, each=(Layer(None, rope),) * depth, fused_qkv="blocks"),
        patch=patch,
        patch_bias=True,
        channels=fields.get("in_channels", 3),
        frames=fields.get("temporal_patch_size", 2),
        columns=isqrt(fields.get("num_position_embeddings", 2304)),
        takes=(depth,),
        deep=tuple(number + 1 for number in fields.get("deepstack_visual_indexes", (8, 16, 24))),
        projector="merged",
        pooled=fields.get("spatial_merge_size", 2),
    )


def table(hf_config: Mapping[str, Any]) -> Table:
    """Qwen 3's own table, and the tower's."""
    text = {path: type(name)(_inner(name)) for path, name in qwen3.WEIGHTS.items()}
    names = {path: type(name)(f"model.visual.{name}") for path, name in (QWEN3_VL | PROJECTOR).items()}
    return Table(
        {**text, **names}, [pattern.replace(r"model\.", r"model\.language_model\.", 1) for pattern in qwen3.IGNORED]
    )


def _inner(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
