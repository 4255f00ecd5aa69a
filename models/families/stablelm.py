"""StableLM 2, Zephyr, Stable Code: layer norms, a quarter of each head rotated, at times a norm for each head."""

from models.config import DecoderConfig, Layer
from models.families import Fields, llama

WEIGHTS = llama.WEIGHTS | {
    "layers/input_norm/bias": "model.layers.{i}.input_layernorm.bias",
    "layers/post_norm/bias": "model.layers.{i}.post_attention_layernorm.bias",
    "layers/attention/q_norm/scale": "model.layers.{i}.self_attn.q_layernorm.norms.{e}.weight",
    "layers/attention/k_norm/scale": "model.layers.{i}.self_attn.k_layernorm.norms.{e}.weight",
    "norm/bias": "model.norm.bias",
}
IGNORED = llama.IGNORED


def config(fields: Fields) -> DecoderConfig:
    """The decoder of a `StableLmConfig`."""
    fields.dropout("hidden_dropout")
    return llama.plain(
        fields,
        eps="layer_norm_eps",
        each=[Layer(None, llama.rope(fields, partial=0.25))] * fields["num_hidden_layers"],
        norm="layer",
        norm_bias=True,
        parallel="one norm" if fields.get("use_parallel_residual", False) else "",
        qkv_bias=fields.get("use_qkv_bias", False),
        qk_norm="heads" if fields.get("qk_layernorm", False) else "",
    )
