"""StarCoder 2: layer norms and biases, an MLP without a gate, a window."""

from models.config import DecoderConfig
from models.families import Fields, llama

WEIGHTS = llama.WEIGHTS | {
    "layers/input_norm/bias": "model.layers.{i}.input_layernorm.bias",
    "layers/post_norm/bias": "model.layers.{i}.post_attention_layernorm.bias",
    "layers/mlp/up/kernel": "model.layers.{i}.mlp.c_fc.weight",
    "layers/mlp/up/bias": "model.layers.{i}.mlp.c_fc.bias",
    "layers/mlp/down/kernel": "model.layers.{i}.mlp.c_proj.weight",
    "layers/mlp/down/bias": "model.layers.{i}.mlp.c_proj.bias",
    "norm/bias": "model.norm.bias",
}
IGNORED = llama.IGNORED


def config(fields: Fields) -> DecoderConfig:
    """The decoder of a `Starcoder2Config`."""
    fields.dropout("residual_dropout", "embedding_dropout")
    fields.expect("norm_type", "layer_norm")
    fields.expect("mlp_type", "default")
    for name in ("activation_function", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"):
        fields.get(name, None)  # of its forerunner; `hidden_act` holds, and softmax is float32 in any case
    fields.expect("scale_attn_weights", True)
    bias = fields.get("use_bias", True)
    return llama.plain(
        fields,
        eps="norm_epsilon",
        window=fields.get("sliding_window", None),
        tied=True,
        norm="layer",
        norm_bias=True,
        qkv_bias=bias,
        o_bias=bias,
        gated=False,
        mlp_bias=bias,
    )
