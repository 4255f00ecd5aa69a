"""Qwen 1.5 and 2 MoE: Qwen 2 with many small experts and a gated one that sees every token."""

from typing import Any

from models.config import DecoderConfig
from models.families import Fields, llama, mixtral
from models.moe import Experts

WEIGHTS = llama.WEIGHTS | {
    "layers/moe/router/kernel": "model.layers.{i}.mlp.gate.weight",
    "layers/moe/experts/gate/kernel": "model.layers.{i}.mlp.experts.{e}.gate_proj.weight",
    "layers/moe/experts/up/kernel": "model.layers.{i}.mlp.experts.{e}.up_proj.weight",
    "layers/moe/experts/down/kernel": "model.layers.{i}.mlp.experts.{e}.down_proj.weight",
    "layers/moe/shared/gate/kernel": "model.layers.{i}.mlp.shared_expert.gate_proj.weight",
    "layers/moe/shared/up/kernel": "model.layers.{i}.mlp.shared_expert.up_proj.weight",
    "layers/moe/shared/down/kernel": "model.layers.{i}.mlp.shared_expert.down_proj.weight",
    "layers/moe/shared_gate/kernel": "model.layers.{i}.mlp.shared_expert_gate.weight",
}
IGNORED = llama.IGNORED


def config(fields: Fields) -> DecoderConfig:
    """The decoder of a `Qwen2MoeConfig`."""
    slides, until = fields.get("use_sliding_window", False), fields.get("max_window_layers", 28)
    default = [slides and i % 2 == 0 and i < until for i in range(fields["num_hidden_layers"])]
    near = [slides and one for one in llama.sliding(fields, default)]
    shared = fields["shared_expert_intermediate_size"]
    return llama.plain(
        fields,
        each=llama.windows(fields, near),
        qkv_bias=fields.get("qkv_bias", True),
        experts=experts(fields, shared_width=shared),
    )


def experts(fields: Fields, *, shared_width: int = 0) -> Experts:
    """The experts of a Qwen MoE; layers with an ordinary MLP between them are not implemented."""
    fields.expect("decoder_sparse_step", 1)
    fields.expect("mlp_only_layers", [])
    return mixture(fields, "moe_intermediate_size", default_loss=0.001, shared_width=shared_width)


def mixture(fields: Fields, width: str, *, default_loss: float, **options: Any) -> Experts:
    """Experts by the field names that Qwen and OLMoE share."""
    count = fields.get("num_experts", None) or fields["num_local_experts"]
    return Experts(
        count=count,
        per_token=fields["num_experts_per_tok"],
        width=fields[width],
        normalise=fields.get("norm_topk_prob", False),
        aux_coefficient=mixtral.router_loss(fields, default_loss),
        **options,
    )
