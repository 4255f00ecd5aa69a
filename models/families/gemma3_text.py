"""Gemma 3, text only: Gemma 2 with normed queries and keys instead of capped scores, and its own rotation in the layers
with a window, five of every six.
"""

from models.config import DecoderConfig, Layer
from models.families import Fields, gemma, gemma2, llama

WEIGHTS = gemma2.WEIGHTS | {
    "layers/attention/q_norm/scale": "model.layers.{i}.self_attn.q_norm.weight",
    "layers/attention/k_norm/scale": "model.layers.{i}.self_attn.k_norm.weight",
}
IGNORED = llama.IGNORED


def config(fields: Fields) -> DecoderConfig:
    """The decoder of a `Gemma3TextConfig`."""
    fields.get("cache_implementation", None)
    period = fields.get("_sliding_window_pattern", 6)
    slides = llama.sliding(fields, llama.all_but_every(fields, fields.get("sliding_window_pattern", period)))
    near = Layer(fields["sliding_window"], llama.rope(fields, layer_type="sliding_attention"))
    far = Layer(None, llama.rope(fields, theta=1_000_000.0, layer_type="full_attention"))
    return gemma.plain(
        fields,
        act="hidden_activation",
        each=[near if one else far for one in slides],
        out_norms=True,
        qk_norm="head",
        attention_scale=fields.get("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=fields.get("attn_logit_softcapping", None),
        logit_softcap=fields.get("final_logit_softcapping", None),
    )
