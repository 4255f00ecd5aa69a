"""Gemma 2: norms before and after attention and MLP, capped scores and logits, a window in every other layer."""

from models.config import DecoderConfig
from models.families import Fields, gemma, llama

WEIGHTS = llama.WEIGHTS | {
    "layers/attention_out_norm/scale": "model.layers.{i}.post_attention_layernorm.weight",
    "layers/post_norm/scale": "model.layers.{i}.pre_feedforward_layernorm.weight",
    "layers/mlp_out_norm/scale": "model.layers.{i}.post_feedforward_layernorm.weight",
}
IGNORED = llama.IGNORED


def config(fields: Fields) -> DecoderConfig:
    """The decoder of a `Gemma2Config`."""
    fields.get("hidden_act", None)  # `hidden_activation` holds
    fields.get("cache_implementation", None)
    fields.get("sliding_window_size", None)  # `sliding_window` under another name
    return gemma.plain(
        fields,
        act="hidden_activation",
        each=llama.windows(fields, llama.sliding(fields, llama.all_but_every(fields, 2))),
        out_norms=True,
        attention_scale=fields.get("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=fields.get("attn_logit_softcapping", None),
        logit_softcap=fields.get("final_logit_softcapping", None),
    )
