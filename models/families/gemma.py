"""Gemma: norms stored as scale - 1, an embedding scaled by the root of its width."""

from typing import Any

from models.config import DecoderConfig
from models.families import Fields, llama

WEIGHTS, IGNORED = llama.WEIGHTS, llama.IGNORED


def config(fields: Fields) -> DecoderConfig:
    """The decoder of a `GemmaConfig`."""
    # Where a file names both, `hidden_activation` is the later correction of the first release's "gelu".
    act = "hidden_activation" if fields.get("hidden_activation", None) else "hidden_act"
    fields.get("hidden_act", None)
    return plain(fields, act=act)


def plain(fields: Fields, **switches: Any) -> DecoderConfig:
    """What all Gemmas share, and the switches that make this one."""
    fields.expect("use_bidirectional_attention", False)
    bias = fields.get("attention_bias", False)
    scale = fields["hidden_size"] ** 0.5
    return llama.plain(
        fields, tied=True, norm="rms_plus_one", embed_scale=scale, qkv_bias=bias, o_bias=bias, **switches
    )
