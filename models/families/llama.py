"""Llama 2, 3, 3.1 and 3.2, TinyLlama, SmolLM and SmolLM2, R1 distills on Llama: the plain pre-norm decoder with rotary
positions.
"""

from models.decoder import ACTIVATIONS, DecoderConfig
from models.families import Fields
from models.rope import rope_config

WEIGHTS = {
    "embed/embedding": "model.embed_tokens.weight",
    "layers/input_norm/scale": "model.layers.{i}.input_layernorm.weight",
    "layers/attention/q/kernel": "model.layers.{i}.self_attn.q_proj.weight",
    "layers/attention/q/bias": "model.layers.{i}.self_attn.q_proj.bias",
    "layers/attention/k/kernel": "model.layers.{i}.self_attn.k_proj.weight",
    "layers/attention/k/bias": "model.layers.{i}.self_attn.k_proj.bias",
    "layers/attention/v/kernel": "model.layers.{i}.self_attn.v_proj.weight",
    "layers/attention/v/bias": "model.layers.{i}.self_attn.v_proj.bias",
    "layers/attention/o/kernel": "model.layers.{i}.self_attn.o_proj.weight",
    "layers/attention/o/bias": "model.layers.{i}.self_attn.o_proj.bias",
    "layers/post_norm/scale": "model.layers.{i}.post_attention_layernorm.weight",
    "layers/mlp/gate/kernel": "model.layers.{i}.mlp.gate_proj.weight",
    "layers/mlp/gate/bias": "model.layers.{i}.mlp.gate_proj.bias",
    "layers/mlp/up/kernel": "model.layers.{i}.mlp.up_proj.weight",
    "layers/mlp/up/bias": "model.layers.{i}.mlp.up_proj.bias",
    "layers/mlp/down/kernel": "model.layers.{i}.mlp.down_proj.weight",
    "layers/mlp/down/bias": "model.layers.{i}.mlp.down_proj.bias",
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}

IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)


def config(fields: Fields) -> DecoderConfig:
    """The decoder of a `LlamaConfig`; defaults are transformers' own for fields that older files leave out."""
    heads = fields["num_attention_heads"]
    width = fields["hidden_size"]
    head_width = fields.get("head_dim", width // heads)
    fields.expect("pretraining_tp", 1)
    fields.expect("attention_dropout", 0.0)
    fields.expect("rope_interleaved", False)
    bias = fields.get("attention_bias", False)
    activation = fields.get("hidden_act", "silu")
    fields.expect("hidden_act", *ACTIVATIONS)
    return DecoderConfig(
        vocabulary=fields["vocab_size"],
        width=width,
        layers=fields["num_hidden_layers"],
        heads=heads,
        kv_heads=fields.get("num_key_value_heads", heads),
        head_width=head_width,
        mlp_width=fields["intermediate_size"],
        activation=activation,
        norm_eps=fields["rms_norm_eps"],
        rope=rope_config(fields, head_width=head_width),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.get("mlp_bias", False),
        tied_head=fields.get("tie_word_embeddings", False),
        initializer_range=fields.get("initializer_range", 0.02),
    )
