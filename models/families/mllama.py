"""Llama 3.2 Vision: tiles of pictures through a tower in two parts, which Llama looks at from every fifth layer or so.

Which outputs of the tower's layers are features is counted as transformers 5 counts `intermediate_layers_indices`: 3 is
the output of layer 3, the fourth one. (In transformers 4.49 it was that layer's input.)
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.config import DecoderConfig, Layer
from models.families import Fields, OfLayers, Table, llama
from models.families.llava import LOADED
from models.towers import MLLAMA
from models.vision import Vision, vit

CROSS = {  # of the layers that look at pictures; the rest is called as in the others
    **{
        f"looking/layers/attention/{part}/kernel": f"model.layers.{{i}}.cross_attn.{part}_proj.weight"
        for part in ("q", "k", "v", "o")
    },
    **{
        f"looking/layers/attention/{part}_norm/scale": f"model.layers.{{i}}.cross_attn.{part}_norm.weight"
        for part in ("q", "k")
    },
    "looking/layers/attention_gate": "model.layers.{i}.cross_attn_attn_gate",
    "looking/layers/mlp_gate": "model.layers.{i}.cross_attn_mlp_gate",
    **{
        f"looking/{path}": llama.WEIGHTS[path] for path in llama.WEIGHTS if "norm" in path and path.startswith("layers")
    },
    **{f"looking/{path}": name for path, name in llama.WEIGHTS.items() if path.startswith("layers/mlp/")},
}
PROJECTOR = {
    "projector/up/kernel": "multi_modal_projector.weight",
    "projector/up/bias": "multi_modal_projector.bias",
}
RENAMED = (  # what newer models in memory call a tensor
    (r"^model\.(vision_model|multi_modal_projector)\.", r"\1."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)


def config(fields: Fields) -> DecoderConfig:
    """The decoder of an `MllamaConfig`, with its tower."""
    text_fields, vision = fields.inside("text_config"), fields.inside("vision_config")
    text_fields.dropout("dropout")
    looking = _looking(text_fields)
    rope = llama.rope(text_fields, theta=500_000.0)
    each = [Layer(None, None, looks=True) if n in looking else Layer(None, rope) for n in range(_layers(text_fields))]
    text = llama.plain(text_fields, each=each)
    text_fields.finish()
    tied = fields.get("tie_word_embeddings", False) or text.tied_head
    for name in ("image_token_index", "image_token_id", "vocab_size"):
        fields.get(name, None)  # of what is done with texts and pictures before the model
    tower = _tower(vision)
    vision.finish()
    if tied:
        raise ValueError(
            "not implemented yet: tie_word_embeddings in config.json of an mllama, whose embedding is longer"
        )
    return replace(text, vision=tower, more_tokens=8)


def _layers(fields: Fields) -> int:
    layers: int = fields["num_hidden_layers"]
    return layers


def _looking(fields: Fields) -> list[int]:
    """The numbers of the layers that look at pictures."""
    asked = fields.get("cross_attention_layers", [3, 8, 13, 18, 23, 28, 33, 38])
    return sorted(number for number in asked if number < _layers(fields))


def _tower(fields: Fields) -> Vision:
    width, heads = fields["hidden_size"], fields.get("attention_heads", fields.get("num_attention_heads", 16))
    size, patch, layers = fields["image_size"], fields["patch_size"], fields["num_hidden_layers"]
    ratios = fields.get("supported_aspect_ratios", [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]])
    takes = tuple(number + 1 for number in fields.get("intermediate_layers_indices", [3, 7, 15, 23, 30]))
    tiles, columns = fields.get("max_num_tiles", 4), size // patch
    stack = vit(
        width=width,
        heads=heads,
        mlp_width=fields["intermediate_size"],
        layers=layers,
        activation=fields.get("hidden_act", "gelu"),
        eps=fields.get("norm_eps", 1e-5),
    )
    stack = replace(stack, qkv_bias=False, o_bias=False)
    if (made := width * (len(takes) + 1)) != fields.get("vision_output_dim", made):
        raise ValueError(
            f"config.json: vision_output_dim is {fields['vision_output_dim']}, and the features have {made}"
        )
    return Vision(
        layers=stack,
        patch=patch,
        channels=fields.get("num_channels", 3),
        columns=columns,
        tile=columns * columns,
        class_token=True,
        pre_norm=True,
        takes=takes,
        projector="linear",
        projector_bias=True,
        tiles=tiles,
        ratios=(0, *(wide * high for wide, high in ratios)),
        further=replace(stack, each=(Layer(None, None),) * fields.get("num_global_layers", 8), gates=True),
    )


def table(hf_config: Mapping[str, Any]) -> Table:
    """Llama's own table for the layers that do not look, and those of the others and of the tower."""
    fields = Fields(hf_config).inside("text_config")
    looking = _looking(fields)
    own = [number for number in range(_layers(fields)) if number not in looking]
    text: dict[str, str] = {}
    for path, name in (llama.WEIGHTS | CROSS).items():
        named = f"language_model.{name}"
        layers = looking if path.startswith("looking/") else own
        text[path] = OfLayers(named, layers) if "{i}" in named else named
    names = {path: type(name)(f"vision_model.{name}") for path, name in MLLAMA.items()}
    ignored = [rf"language_model\.{pattern}" for pattern in llama.IGNORED]
    return Table({**text, **names, **PROJECTOR}, ignored, RENAMED, LOADED)
