"""Cohere's Command R7B and Command A: Command R with a window in three of four layers; the fourth does not rotate."""

from models.config import DecoderConfig, Layer
from models.families import Fields, llama

WEIGHTS, IGNORED = llama.WEIGHTS, llama.IGNORED


def config(fields: Fields) -> DecoderConfig:
    """The decoder of a `Cohere2Config`."""
    fields.get("cache_implementation", None)
    fields.expect("use_gated_activation", True)
    fields.expect("use_parallel_block", True)
    fields.expect("use_parallel_embedding", False)
    fields.expect("use_qk_norm", False)
    fields.expect("position_embedding_type", "rope_gptj")
    fields.expect("rotary_pct", 1.0)
    fields.expect("layer_switch", 4)
    fields.expect("order_of_interleaved_layers", "local_attn_first")
    period = fields.get("_sliding_window_pattern", 4)
    slides = llama.sliding(fields, llama.all_but_every(fields, fields.get("sliding_window_pattern", period)))
    near = Layer(fields["sliding_window"], llama.rope(fields, interleaved=True))
    bias = fields.get("attention_bias", False)
    return llama.plain(
        fields,
        eps="layer_norm_eps",
        each=[near if one else Layer(None, None) for one in slides],
        tied=True,
        norm="layer",
        parallel="one norm",
        qkv_bias=bias,
        o_bias=bias,
        logit_scale=fields.get("logit_scale", 0.0625),
    )
