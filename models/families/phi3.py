"""Phi 3, 3.5 and 4: Llama with one matrix for queries, keys and values and one for gate and up; longrope."""

from models.config import DecoderConfig
from models.families import Fields, llama

WEIGHTS = llama.WEIGHTS | {
    "layers/attention/qkv/kernel": "model.layers.{i}.self_attn.qkv_proj.weight",
    "layers/mlp/gate_up/kernel": "model.layers.{i}.mlp.gate_up_proj.weight",
}
IGNORED = llama.IGNORED


def config(fields: Fields) -> DecoderConfig:
    """The decoder of a `Phi3Config`."""
    fields.dropout("resid_pdrop", "embd_pdrop")
    fields.expect("attention_bias", False)
    window = fields.get("sliding_window", None)
    return llama.plain(fields, window=window, fused_qkv="blocks", fused_gate_up=True)
