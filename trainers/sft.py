"""Supervised fine-tuning, next-token cross-entropy over the trained tokens of each conversation; and pretraining, which
computes the same where every token of a text is trained.
"""

from dataclasses import replace
from typing import Any

import jax

from models.decoder import Compute, DecoderConfig, head, routed_hidden_states
from models.lora import merged, with_dropout
from models.moe import load_balancing_loss
from models.vision import Images
from trainers.losses import Sum, cross_entropy
from trainers.step import Batch, Loss, Params, Sums


def sft_loss(
    config: DecoderConfig, *, compute: Compute, kind: str = "nll", label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Loss:
    """The loss of a microbatch [B, L] of `tokens, targets, weights, segments, positions`, and of pictures if it has
    any, as a `Sum` over trained tokens.

    `kind` is TRL's `loss_type`: "nll", or "dft" (each token's loss weighted by its own probability, arXiv:2508.05629).
    `label_smoothing` mixes in the mean over the vocabulary, as transformers' LabelSmoother; it has no effect on "dft".
    `z_loss` times log^2 Z is added to every token's loss, and shows as `z_loss` in the log (arXiv:2204.02311).
    A mixture of experts whose config.json asks for it adds its load-balancing loss, `aux_loss` in the log; each
    microbatch has its own, and counts by its tokens.
    """
    coefficient = config.experts.aux_coefficient if config.experts else 0.0

    def loss(params: Params, frozen: Any, batch: Batch, key: jax.Array | None = None) -> Sums:
        params = merged(params, frozen)
        if key is not None and compute.lora is not None and compute.lora.dropout:
            params = with_dropout(params, compute.lora, key)
        hidden_BLD, routers = routed_hidden_states(
            params,
            config,
            tokens_BL=batch["tokens"],
            positions_BL=batch["positions"],
            segments_BL=batch["segments"],
            compute=compute,
            images=Images.of(batch),
        )
        out = head(params, config)
        total, others = cross_entropy(
            hidden_BLD,
            out.kernel_VD,
            batch["targets"],
            batch["weights"],
            bias_V=out.bias_V,
            softcap=out.softcap,
            detached_weight=kind == "dft",
            label_smoothing=label_smoothing,
            z_loss=z_loss,
        )
        if not coefficient:
            return total, others
        assert routers is not None
        aux = load_balancing_loss(routers) * total.count
        return total._replace(total=total.total + coefficient * aux), others | {"aux_loss": Sum(aux, total.count)}

    return loss


def cross_entropy_alone(config: DecoderConfig, *, compute: Compute) -> Loss:
    """The loss without anything that shapes training (smoothing, z-loss, a router's balance): e to its mean is the
    perplexity.
    """
    experts = config.experts and replace(config.experts, aux_coefficient=0.0)
    return sft_loss(replace(config, experts=experts), compute=compute)
