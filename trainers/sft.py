"""Supervised fine-tuning: next-token cross-entropy over the trained tokens of each conversation (also what pretraining
computes).
"""

from typing import Any

from models.decoder import Compute, DecoderConfig, head_kernel, hidden_states
from trainers.losses import Sum, cross_entropy
from trainers.step import Batch, Loss, Params


def sft_loss(config: DecoderConfig, *, compute: Compute, kind: str = "nll", label_smoothing: float = 0.0) -> Loss:
    """The loss of a microbatch [B, L] of `tokens, targets, weights, segments, positions`, as a `Sum` over trained
    tokens.

    `kind` is TRL's `loss_type`: "nll", or "dft" (each token's loss weighted by its own probability, arXiv:2508.05629).
    `label_smoothing` mixes in the mean over the vocabulary, as transformers' LabelSmoother; it has no effect on "dft".
    """

    def loss(params: Params, frozen: Any, batch: Batch) -> tuple[Sum, dict[str, Sum]]:
        hidden_BLD = hidden_states(
            params,
            config,
            tokens_BL=batch["tokens"],
            positions_BL=batch["positions"],
            segments_BL=batch["segments"],
            compute=compute,
        )
        return cross_entropy(
            hidden_BLD,
            head_kernel(params, config),
            batch["targets"],
            batch["weights"],
            detached_weight=kind == "dft",
            label_smoothing=label_smoothing,
        )

    return loss
