"""Llama 2, 3, 3.1 and 3.2, TinyLlama, SmolLM and SmolLM2, Falcon 3, R1 distills on Llama: the plain pre-norm decoder
with rotary positions, of which most other families are variations.
"""

from collections.abc import Sequence
from typing import Any

from models.activations import ACTIVATIONS
from models.config import DecoderConfig, Layer
from models.families import Fields
from models.rope import Rope, rope_config

WEIGHTS = {
    "embed/embedding": "model.embed_tokens.weight",
    "layers/input_norm/scale": "model.layers.{i}.input_layernorm.weight",
    "layers/attention/q/kernel": "model.layers.{i}.self_attn.q_proj.weight",
    "layers/attention/q/bias": "model.layers.{i}.self_attn.q_proj.bias",
    "layers/attention/k/kernel": "model.layers.{i}.self_attn.k_proj.weight",
    "layers/attention/k/bias": "model.layers.{i}.self_attn.k_proj.bias",
    "layers/attention/v/kernel": "model.layers.{i}.self_attn.v_proj.weight",
    "layers/attention/v/bias": "model.layers.{i}.self_attn.v_proj.bias",
    "layers/attention/o/kernel": "model.layers.{i}.self_attn.o_proj.weight",
    "layers/attention/o/bias": "model.layers.{i}.self_attn.o_proj.bias",
    "layers/post_norm/scale": "model.layers.{i}.post_attention_layernorm.weight",
    "layers/mlp/gate/kernel": "model.layers.{i}.mlp.gate_proj.weight",
    "layers/mlp/gate/bias": "model.layers.{i}.mlp.gate_proj.bias",
    "layers/mlp/up/kernel": "model.layers.{i}.mlp.up_proj.weight",
    "layers/mlp/up/bias": "model.layers.{i}.mlp.up_proj.bias",
    "layers/mlp/down/kernel": "model.layers.{i}.mlp.down_proj.weight",
    "layers/mlp/down/bias": "model.layers.{i}.mlp.down_proj.bias",
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}

IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)


def config(fields: Fields) -> DecoderConfig:
    """The decoder of a `LlamaConfig`."""
    fields.expect("pretraining_tp", 1)
    fields.expect("rope_interleaved", False)
    bias = fields.get("attention_bias", False)
    return plain(fields, qkv_bias=bias, o_bias=bias, mlp_bias=fields.get("mlp_bias", False))


def plain(
    fields: Fields,
    *,
    each: Sequence[Layer] | None = None,
    window: int | None = None,
    eps: str = "rms_norm_eps",
    act: str = "hidden_act",
    tied: bool = False,
    pads: bool = True,
    **switches: Any,
) -> DecoderConfig:
    """What nearly all families' files say in the same words, and the switches that make this one.

    `each`: the layers, where they differ from one another or rotate otherwise than by default; else all have `window`.
    `eps` and `act` name the fields of the norms' epsilon and of the activation; `tied` is transformers' default for
    `tie_word_embeddings`; `pads`: whether its embedding leaves the padding token untrained. Defaults are transformers'
    own for fields that older files leave out.
    """
    fields.dropout("attention_dropout")
    fields.expect(act, *ACTIVATIONS)
    heads, layers = fields["num_attention_heads"], fields["num_hidden_layers"]
    vocabulary, padding = fields["vocab_size"], fields.get("pad_token_id", None) if pads else None
    if each is None:
        each = [Layer(window, rope(fields))] * layers
    return DecoderConfig(
        vocabulary=vocabulary,
        padding_token=None if padding is None else padding % vocabulary,  # -1 is torch's for the last one
        width=fields["hidden_size"],
        heads=heads,
        kv_heads=fields.get("num_key_value_heads", heads),
        head_width=head_width(fields),
        mlp_width=fields["intermediate_size"],
        activation=fields.get(act, "silu"),
        norm_eps=fields[eps],
        tied_head=fields.get("tie_word_embeddings", tied),
        initializer_range=fields.get("initializer_range", 0.02),
        each=tuple(each),
        **switches,
    )


def head_width(fields: Fields) -> int:
    """The width of a head, by default so that all heads together are as wide as the stream."""
    return fields.get("head_dim", fields["hidden_size"] // fields["num_attention_heads"])


def rope(fields: Fields, *, theta: float = 10_000.0, **options: Any) -> Rope:
    """The rotation that config.json asks for; options as for `rope_config`, `theta` for files that name no base."""
    return rope_config(fields, head_width=head_width(fields), theta=theta, **options)


def sliding(fields: Fields, default: Sequence[bool]) -> list[bool]:
    """Which layers slide, by `layer_types` of config.json, or by `default` where the file is older than that field."""
    names = ("full_attention", "sliding_attention")
    types = fields.get("layer_types", [names[slides] for slides in default])
    layers = fields["num_hidden_layers"]
    if len(types) != layers or not set(types) <= set(names):
        raise ValueError(f"layer_types in config.json: {types} for {layers} layers; implemented: {', '.join(names)}")
    return [kind == "sliding_attention" for kind in types]


def all_but_every(fields: Fields, period: int) -> list[bool]:
    """Layers that slide where the last of each `period` does not."""
    return [bool((i + 1) % period) for i in range(fields["num_hidden_layers"])]


def windows(fields: Fields, slides: Sequence[bool], **options: Any) -> list[Layer]:
    """Layers of one rotation, of which some see `sliding_window` tokens only."""
    window, rotation = fields.get("sliding_window", None), rope(fields, **options)
    return [Layer(window if one else None, rotation) for one in slides]
