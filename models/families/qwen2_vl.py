"""Qwen2-VL and Qwen2.5-VL: pictures of any shape, whose patches rotate by row and column and are merged by fours, in
front of Qwen 2, whose tokens rotate by time, height and width.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.activations import ACTIVATIONS
from models.config import DecoderConfig, Layer
from models.families import Fields, Table, qwen2
from models.rope import axial_rope
from models.towers import QWEN2_5_VL, QWEN2_VL
from models.vision import Vision, vit

PROJECTOR = {
    "projector/norm/scale": "visual.merger.ln_q.weight",
    "projector/norm/bias": "visual.merger.ln_q.bias",
    **{
        f"projector/{ours}/{leaf}": f"visual.merger.mlp.{theirs}.{name}"
        for ours, theirs in (("up", 0), ("down", 2))
        for leaf, name in (("kernel", "weight"), ("bias", "bias"))
    },
}
RENAMED = (  # what newer models in memory call a tensor
    (r"^model\.visual\.", "visual."),
    (r"^model\.language_model\.", "model."),
)
LOADED = ((r"^model\.", "model.language_model."), (r"^visual\.", "model.visual."))


def config(fields: Fields) -> DecoderConfig:
    """The decoder of a `Qwen2VLConfig` or a `Qwen2_5_VLConfig`, with its tower."""
    vision = fields.inside("vision_config")
    nested = fields.get("text_config", None)
    text_fields = fields if nested is None else Fields(fields.nested("text_config"))  # older files have one level
    text = qwen2.config(text_fields)
    tied = fields.get("tie_word_embeddings", False) or text.tied_head
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id"):
        fields.get(name, None)  # of what is done with texts and pictures before the model
        text_fields.get(name, None)
    fields.get("vocab_size", None)
    if text_fields is not fields:
        text_fields.finish()
    windows = fields["model_type"] == "qwen2_5_vl"
    tower, made = _tower(vision, windows=windows), vision["out_hidden_size" if windows else "hidden_size"]
    vision.finish()
    if made != text.width:
        raise ValueError(f"config.json: the vision tower's features are {made} wide, and the text model {text.width}")
    return replace(text, vision=tower, tied_head=tied)


def _tower(fields: Fields, *, windows: bool) -> Vision:
    width, heads, depth = fields["hidden_size" if windows else "embed_dim"], fields["num_heads"], fields["depth"]
    patch, merge = fields["patch_size"], fields.get("spatial_merge_size", 2)
    fields.expect("spatial_patch_size", patch)
    fields.get("tokens_per_second", None)  # of films
    fields.get("in_chans", None)
    activation = fields.get("hidden_act", "silu" if windows else "quick_gelu")
    fields.expect("hidden_act", activation, *ACTIVATIONS)
    theta = fields.get("rope_parameters", {}).get("rope_theta", 10_000.0)
    stack = vit(
        width=width,
        heads=heads,
        mlp_width=fields["intermediate_size"] if windows else int(width * fields.get("mlp_ratio", 4)),
        layers=depth,
        activation=activation,
        eps=1e-6,
    )
    rope = axial_rope(head_width=width // heads, theta=theta)
    side = fields.get("window_size", 112) // merge // patch * merge if windows else None
    whole = fields.get("fullatt_block_indexes", (7, 15, 23, 31)) if windows else range(depth)
    each = tuple(Layer(None if number in whole else side, rope) for number in range(depth))
    stack = replace(stack, each=each, fused_qkv="blocks")
    return Vision(
        layers=replace(stack, norm="rms", norm_bias=False, gated=True) if windows else stack,
        patch=patch,
        channels=fields.get("in_channels", 3),
        frames=fields.get("temporal_patch_size", 2),
        takes=(depth,),
        projector="merged",
        pooled=merge,
    )


def table(hf_config: Mapping[str, Any]) -> Table:
    """Qwen 2's own table, and the tower's."""
    tower = QWEN2_5_VL if hf_config["model_type"] == "qwen2_5_vl" else QWEN2_VL
    names = {path: type(name)(f"visual.{name}") for path, name in tower.items()}
    return Table({**qwen2.WEIGHTS, **names, **PROJECTOR}, qwen2.IGNORED, RENAMED, LOADED)
