"""OLMo 2: what attention and MLP give is normed, not what they read; queries and keys are normed over all heads."""

from typing import Any

from models.config import DecoderConfig
from models.families import Fields, llama

WEIGHTS = llama.WEIGHTS | {
    "layers/attention/q_norm/scale": "model.layers.{i}.self_attn.q_norm.weight",
    "layers/attention/k_norm/scale": "model.layers.{i}.self_attn.k_norm.weight",
    "layers/attention_out_norm/scale": "model.layers.{i}.post_attention_layernorm.weight",
    "layers/mlp_out_norm/scale": "model.layers.{i}.post_feedforward_layernorm.weight",
}
IGNORED = llama.IGNORED


def config(fields: Fields) -> DecoderConfig:
    """The decoder of an `Olmo2Config`."""
    return plain(fields)


def plain(fields: Fields, **switches: Any) -> DecoderConfig:
    """What OLMo 2 and 3 share."""
    bias = fields.get("attention_bias", False)
    return llama.plain(
        fields,
        norm="rms_wide",
        in_norms=False,
        out_norms=True,
        qk_norm="width",
        qkv_bias=bias,
        o_bias=bias,
        **switches,
    )
