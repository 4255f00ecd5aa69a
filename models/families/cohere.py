"""Cohere's Command R: layer norms without bias, attention and MLP on the same normed stream, rotation of neighbouring
pairs, scaled logits.
"""

from models.config import DecoderConfig, Layer
from models.families import Fields, llama

WEIGHTS = llama.WEIGHTS | {
    "layers/attention/q_norm/scale": "model.layers.{i}.self_attn.q_norm.weight",
    "layers/attention/k_norm/scale": "model.layers.{i}.self_attn.k_norm.weight",
}
IGNORED = llama.IGNORED


def config(fields: Fields) -> DecoderConfig:
    """The decoder of a `CohereConfig`."""
    bias = fields.get("attention_bias", False)
    return llama.plain(
        fields,
        eps="layer_norm_eps",
        each=[Layer(None, llama.rope(fields, theta=500_000.0, interleaved=True))] * fields["num_hidden_layers"],
        tied=True,
        norm="layer",
        parallel="one norm",
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="heads" if fields.get("use_qk_norm", False) else "",
        logit_scale=fields.get("logit_scale", 0.0625),
    )
