"""Granite 3: Llama with multipliers on embedding, attention scores, residuals and logits."""

from models.config import DecoderConfig
from models.families import Fields, llama

WEIGHTS, IGNORED = llama.WEIGHTS, llama.IGNORED


def config(fields: Fields) -> DecoderConfig:
    """The decoder of a `GraniteConfig`."""
    bias = fields.get("attention_bias", False)
    return llama.plain(
        fields,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.get("mlp_bias", False),
        attention_scale=fields.get("attention_multiplier", 1.0),
        embed_scale=fields.get("embedding_multiplier", 1.0),
        residual_scale=fields.get("residual_multiplier", 1.0),
        logit_scale=1.0 / fields.get("logits_scaling", 1.0),
    )
