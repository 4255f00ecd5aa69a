"""Qwen 3: Llama whose queries and keys are normed, head by head."""

from models.config import DecoderConfig
from models.families import Fields, llama, qwen2

WEIGHTS = llama.WEIGHTS | {
    "layers/attention/q_norm/scale": "model.layers.{i}.self_attn.q_norm.weight",
    "layers/attention/k_norm/scale": "model.layers.{i}.self_attn.k_norm.weight",
}
IGNORED = llama.IGNORED


def config(fields: Fields) -> DecoderConfig:
    """The decoder of a `Qwen3Config`."""
    bias = fields.get("attention_bias", False)
    return llama.plain(fields, each=qwen2.layers(fields), qkv_bias=bias, o_bias=bias, qk_norm="head")
