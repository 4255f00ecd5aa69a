"""OLMoE: Llama with normed queries and keys, and many small experts in the place of each MLP."""

from models.config import DecoderConfig
from models.families import Fields, llama, qwen2_moe, qwen3

WEIGHTS = qwen3.WEIGHTS | {path: name for path, name in qwen2_moe.WEIGHTS.items() if "/moe/" in path}
IGNORED = llama.IGNORED


def config(fields: Fields) -> DecoderConfig:
    """The decoder of an `OlmoeConfig`."""
    fields.expect("clip_qkv", None)
    bias = fields.get("attention_bias", False)
    return llama.plain(
        fields,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="width",
        experts=qwen2_moe.mixture(fields, "intermediate_size", default_loss=0.01),
    )
