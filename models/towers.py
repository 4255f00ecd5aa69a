"""Vision towers by the `model_type` of a `vision_config`, which several families of vision-language models share: what
they compute, and how their tensors are called.
"""

from collections.abc import Sequence
from typing import Any

from models.activations import ACTIVATIONS
from models.config import DecoderConfig
from models.families import AsStored, Fields
from models.vision import vit

LAYERS = {
    "vision/layers/input_norm/scale": "encoder.layers.{i}.layer_norm1.weight",
    "vision/layers/input_norm/bias": "encoder.layers.{i}.layer_norm1.bias",
    **{
        f"vision/layers/attention/{ours}/{leaf}": f"encoder.layers.{{i}}.self_attn.{theirs}.{name}"
        for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj"))
        for leaf, name in (("kernel", "weight"), ("bias", "bias"))
    },
    "vision/layers/post_norm/scale": "encoder.layers.{i}.layer_norm2.weight",
    "vision/layers/post_norm/bias": "encoder.layers.{i}.layer_norm2.bias",
    **{
        f"vision/layers/mlp/{ours}/{leaf}": f"encoder.layers.{{i}}.mlp.{theirs}.{name}"
        for ours, theirs in (("up", "fc1"), ("down", "fc2"))
        for leaf, name in (("kernel", "weight"), ("bias", "bias"))
    },
    "vision/norm/scale": "post_layernorm.weight",
    "vision/norm/bias": "post_layernorm.bias",
    "vision/patch/kernel": AsStored("embeddings.patch_embedding.weight"),
    "vision/positions/embedding": "embeddings.position_embedding.weight",
}
CLIP = {
    **LAYERS,
    "vision/class/embedding": "embeddings.class_embedding",
    "vision/pre_norm/scale": "pre_layrnorm.weight",
    "vision/pre_norm/bias": "pre_layrnorm.bias",
}
SIGLIP = {**LAYERS, "vision/patch/bias": "embeddings.patch_embedding.bias"}
_BLOCK = {
    "vision/patch/kernel": AsStored("patch_embed.proj.weight"),
    "vision/layers/input_norm/scale": "blocks.{i}.norm1.weight",
    "vision/layers/post_norm/scale": "blocks.{i}.norm2.weight",
    **{
        f"vision/layers/attention/{ours}/{leaf}": f"blocks.{{i}}.attn.{theirs}.{name}"
        for ours, theirs in (("qkv", "qkv"), ("o", "proj"))
        for leaf, name in (("kernel", "weight"), ("bias", "bias"))
    },
}
QWEN2_VL = {
    **_BLOCK,
    "vision/layers/input_norm/bias": "blocks.{i}.norm1.bias",
    "vision/layers/post_norm/bias": "blocks.{i}.norm2.bias",
    **{
        f"vision/layers/mlp/{ours}/{leaf}": f"blocks.{{i}}.mlp.{theirs}.{name}"
        for ours, theirs in (("up", "fc1"), ("down", "fc2"))
        for leaf, name in (("kernel", "weight"), ("bias", "bias"))
    },
}
QWEN2_5_VL = {
    **_BLOCK,
    **{
        f"vision/layers/mlp/{part}/{leaf}": f"blocks.{{i}}.mlp.{part}_proj.{name}"
        for part in ("gate", "up", "down")
        for leaf, name in (("kernel", "weight"), ("bias", "bias"))
    },
}
QWEN3_VL = {
    **{path: type(name)(name.replace("mlp.fc", "mlp.linear_fc")) for path, name in QWEN2_VL.items()},
    "vision/patch/bias": "patch_embed.proj.bias",
    "vision/positions/embedding": "pos_embed.weight",
}
_MLLAMA_BLOCK = {
    **{
        f"layers/{ours}/{leaf}": f"layers.{{i}}.{theirs}.{name}"
        for ours, theirs in (("input_norm", "input_layernorm"), ("post_norm", "post_attention_layernorm"))
        for leaf, name in (("scale", "weight"), ("bias", "bias"))
    },
    **{
        f"layers/attention/{part}/kernel": f"layers.{{i}}.self_attn.{part}_proj.weight" for part in ("q", "k", "v", "o")
    },
    **{
        f"layers/mlp/{ours}/{leaf}": f"layers.{{i}}.mlp.{theirs}.{name}"
        for ours, theirs in (("up", "fc1"), ("down", "fc2"))
        for leaf, name in (("kernel", "weight"), ("bias", "bias"))
    },
}
MLLAMA = {
    **{f"vision/{path}": f"transformer.{name}" for path, name in _MLLAMA_BLOCK.items()},
    **{f"vision/further/{path}": f"global_transformer.{name}" for path, name in _MLLAMA_BLOCK.items()},
    "vision/further/layers/attention_gate": "global_transformer.layers.{i}.gate_attn",
    "vision/further/layers/mlp_gate": "global_transformer.layers.{i}.gate_ffn",
    "vision/patch/kernel": AsStored("patch_embedding.weight"),
    "vision/class/embedding": "class_embedding",
    "vision/positions/embedding": "gated_positional_embedding.embedding",
    "vision/positions/gate": "gated_positional_embedding.gate",
    "vision/tile_positions/embedding": "gated_positional_embedding.tile_embedding.weight",
    **{
        f"vision/{ours}/{leaf}": f"{theirs}_tile_positional_embedding.{name}"
        for ours, theirs in (("tiles_before", "pre"), ("tiles_after", "post"))
        for leaf, name in (("embedding", "embedding.weight"), ("gate", "gate"))
    },
    **{
        f"vision/{ours}/{leaf}": f"layernorm_{theirs}.{name}"
        for ours, theirs in (("pre_norm", "pre"), ("norm", "post"))
        for leaf, name in (("scale", "weight"), ("bias", "bias"))
    },
}
WEIGHTS = {
    "clip_vision_model": CLIP,
    **dict.fromkeys(("siglip_vision_model", "idefics3_vision", "smolvlm_vision"), SIGLIP),
}


def layers_of(fields: Fields) -> DecoderConfig:
    """The layers of a `CLIPVisionConfig` or a `SiglipVisionConfig`."""
    fields.dropout("attention_dropout")
    fields.expect("hidden_act", *ACTIVATIONS)
    return vit(
        width=fields["hidden_size"],
        heads=fields["num_attention_heads"],
        mlp_width=fields["intermediate_size"],
        layers=fields["num_hidden_layers"],
        activation=fields["hidden_act"],
        eps=fields["layer_norm_eps"],
    )


def tower(fields: Fields, default: str | None = None) -> dict[str, Any]:
    """The arguments of `models.vision.Vision` that say what a tower computes; `default` is the `model_type` of one that
    does not say.
    """
    kind = fields.get("model_type", default)
    if kind not in WEIGHTS:
        raise ValueError(
            f"not implemented yet: a vision_config of model_type {kind!r}; implemented: {', '.join(WEIGHTS)}"
        )
    for name in ("projection_dim", "initializer_factor", "vocab_size"):
        fields.get(name, None)  # of heads and beginnings that a tower inside a model does not have
    columns = fields["image_size"] // fields["patch_size"]
    clip = kind == "clip_vision_model"
    if not clip:
        fields.expect("vision_use_head", False)  # its weights would be lost: no feature is made of them
    return {
        "layers": layers_of(fields),
        "patch": fields["patch_size"],
        "channels": fields.get("num_channels", 3),
        "columns": columns,
        "tile": columns * columns,
        "class_token": clip,
        "patch_bias": not clip,
        "pre_norm": clip,
    }


def outputs(layers: int, asked: int | Sequence[int]) -> tuple[int, ...]:
    """Which outputs `vision_feature_layer` means, by the number of layers before each; -1 is the last one's."""
    several = (asked,) if isinstance(asked, int) else tuple(asked)
    return tuple(number if number >= 0 else layers + 1 + number for number in several)
