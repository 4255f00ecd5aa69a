"""Mixtral: Mistral with a mixture of experts in the place of each MLP."""

from models.config import DecoderConfig, Layer
from models.families import Fields, llama
from models.moe import Experts

WEIGHTS = llama.WEIGHTS | {
    "layers/moe/router/kernel": "model.layers.{i}.block_sparse_moe.gate.weight",
    "layers/moe/experts/gate/kernel": "model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight",
    "layers/moe/experts/up/kernel": "model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight",
    "layers/moe/experts/down/kernel": "model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight",
}
IGNORED = llama.IGNORED


def config(fields: Fields) -> DecoderConfig:
    """The decoder of a `MixtralConfig`."""
    fields.dropout("router_jitter_noise")
    experts = Experts(
        count=fields["num_local_experts"],
        per_token=fields["num_experts_per_tok"],
        width=fields["intermediate_size"],
        normalise=True,
        aux_coefficient=router_loss(fields, 0.001),
    )
    layer = Layer(fields.get("sliding_window", None), llama.rope(fields, theta=1_000_000.0))
    return llama.plain(fields, each=[layer] * fields["num_hidden_layers"], experts=experts)


def router_loss(fields: Fields, default: float) -> float:
    """The weight of the load-balancing loss: it counts only where config.json asks for router logits."""
    coefficient = fields.get("router_aux_loss_coef", default)
    return coefficient if fields.get("output_router_logits", False) else 0.0
