"""GLM-4-0414: norms before and after attention and MLP, one matrix for gate and up, rotation of neighbouring pairs in
half of each head.
"""

from models.config import DecoderConfig, Layer
from models.families import Fields, llama

WEIGHTS = llama.WEIGHTS | {
    "layers/attention_out_norm/scale": "model.layers.{i}.post_self_attn_layernorm.weight",
    "layers/mlp_out_norm/scale": "model.layers.{i}.post_mlp_layernorm.weight",
    "layers/mlp/gate_up/kernel": "model.layers.{i}.mlp.gate_up_proj.weight",
}
IGNORED = llama.IGNORED


def config(fields: Fields) -> DecoderConfig:
    """The decoder of a `Glm4Config`."""
    return llama.plain(
        fields,
        each=[Layer(None, llama.rope(fields, partial=0.5, interleaved=True))] * fields["num_hidden_layers"],
        out_norms=True,
        qkv_bias=fields.get("attention_bias", True),
        fused_gate_up=True,
    )
