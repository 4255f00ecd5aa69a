"""Phi 1, 1.5 and 2: attention and MLP read the same normed stream; biases everywhere, part of each head rotated."""

from models.config import DecoderConfig, Layer
from models.families import Fields, llama

WEIGHTS = llama.WEIGHTS | {
    "layers/input_norm/bias": "model.layers.{i}.input_layernorm.bias",
    "layers/attention/q_norm/scale": "model.layers.{i}.self_attn.q_layernorm.weight",
    "layers/attention/q_norm/bias": "model.layers.{i}.self_attn.q_layernorm.bias",
    "layers/attention/k_norm/scale": "model.layers.{i}.self_attn.k_layernorm.weight",
    "layers/attention/k_norm/bias": "model.layers.{i}.self_attn.k_layernorm.bias",
    "layers/attention/o/kernel": "model.layers.{i}.self_attn.dense.weight",
    "layers/attention/o/bias": "model.layers.{i}.self_attn.dense.bias",
    "layers/mlp/up/kernel": "model.layers.{i}.mlp.fc1.weight",
    "layers/mlp/up/bias": "model.layers.{i}.mlp.fc1.bias",
    "layers/mlp/down/kernel": "model.layers.{i}.mlp.fc2.weight",
    "layers/mlp/down/bias": "model.layers.{i}.mlp.fc2.bias",
    "norm/scale": "model.final_layernorm.weight",
    "norm/bias": "model.final_layernorm.bias",
    "head/bias": "lm_head.bias",
}
IGNORED = llama.IGNORED


def config(fields: Fields) -> DecoderConfig:
    """The decoder of a `PhiConfig`."""
    fields.dropout("resid_pdrop", "embd_pdrop")
    normed = fields.get("qk_layernorm", False)
    return llama.plain(
        fields,
        eps="layer_norm_eps",
        each=[Layer(None, llama.rope(fields, partial=0.5))] * fields["num_hidden_layers"],
        norm="layer",
        norm_bias=True,
        parallel="one norm",
        qkv_bias=True,
        o_bias=True,
        qk_norm="head" if normed else "",
        qk_norm_bias=normed,
        gated=False,
        mlp_bias=True,
        head_bias=True,
    )
