"""GPT-NeoX and Pythia: attention and MLP read the stream at once, each through its norm; queries, keys and values of a
head lie together in one matrix.
"""

from models.config import DecoderConfig, Layer
from models.families import Fields, llama

WEIGHTS = {
    "embed/embedding": "gpt_neox.embed_in.weight",
    "layers/input_norm/scale": "gpt_neox.layers.{i}.input_layernorm.weight",
    "layers/input_norm/bias": "gpt_neox.layers.{i}.input_layernorm.bias",
    "layers/attention/qkv/kernel": "gpt_neox.layers.{i}.attention.query_key_value.weight",
    "layers/attention/qkv/bias": "gpt_neox.layers.{i}.attention.query_key_value.bias",
    "layers/attention/o/kernel": "gpt_neox.layers.{i}.attention.dense.weight",
    "layers/attention/o/bias": "gpt_neox.layers.{i}.attention.dense.bias",
    "layers/post_norm/scale": "gpt_neox.layers.{i}.post_attention_layernorm.weight",
    "layers/post_norm/bias": "gpt_neox.layers.{i}.post_attention_layernorm.bias",
    "layers/mlp/up/kernel": "gpt_neox.layers.{i}.mlp.dense_h_to_4h.weight",
    "layers/mlp/up/bias": "gpt_neox.layers.{i}.mlp.dense_h_to_4h.bias",
    "layers/mlp/down/kernel": "gpt_neox.layers.{i}.mlp.dense_4h_to_h.weight",
    "layers/mlp/down/bias": "gpt_neox.layers.{i}.mlp.dense_4h_to_h.bias",
    "norm/scale": "gpt_neox.final_layer_norm.weight",
    "norm/bias": "gpt_neox.final_layer_norm.bias",
    "head/kernel": "embed_out.weight",
}
IGNORED = (r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",)


def config(fields: Fields) -> DecoderConfig:
    """The decoder of a `GPTNeoXConfig`."""
    fields.dropout("hidden_dropout")
    fields.get("classifier_dropout", None)
    bias = fields.get("attention_bias", True)
    return llama.plain(
        fields,
        eps="layer_norm_eps",
        pads=False,
        each=[Layer(None, llama.rope(fields, partial=0.25))] * fields["num_hidden_layers"],
        norm="layer",
        norm_bias=True,
        parallel="two norms" if fields.get("use_parallel_residual", True) else "",
        qkv_bias=bias,
        o_bias=bias,
        fused_qkv="heads",
        gated=False,
        mlp_bias=True,
    )
