"""Qwen 3 MoE: Qwen 3 with many small experts in the place of each MLP."""

from models.config import DecoderConfig
from models.families import Fields, llama, qwen2_moe, qwen3

WEIGHTS = qwen3.WEIGHTS | {path: name for path, name in qwen2_moe.WEIGHTS.items() if "/moe/" in path}
IGNORED = llama.IGNORED


def config(fields: Fields) -> DecoderConfig:
    """The decoder of a `Qwen3MoeConfig`."""
    window, slides = fields.get("sliding_window", None), fields.get("use_sliding_window", False)
    fields.get("max_window_layers", None)  # stands in the files; transformers lets every layer slide, or none
    bias = fields.get("attention_bias", False)
    return llama.plain(
        fields,
        window=window if slides else None,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        experts=qwen2_moe.experts(fields),
    )
