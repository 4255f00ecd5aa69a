"""Direct preference optimisation and its family: pairs of answers, what is preferred in each, and a reference.

B rows, each a pair, L positions. What a pair costs is in `pair_losses.py`; here a batch becomes `Pairs`.
"""

import jax
import jax.numpy as jnp

from models.moe import load_balancing_loss
from trainers.losses import Sum
from trainers.pair_losses import Pairs, Preference
from trainers.preference import desensitized, preference_loss, token_metrics, wpo_weights
from trainers.reference import Frozen
from trainers.scoring import LOGGED, Scorer, answer_sums, answer_tokens, branch, prompt_and_answer
from trainers.step import Batch, Loss, Params, Sums

CHOSEN, REJECTED = 1, 2  # branches of a row


def dpo_loss(scorer: Scorer, how: Preference, *, ld_alpha: float | None = None) -> Loss:
    """The loss of a microbatch [B, L] as a `Sum` over pairs, and TRL's metrics.

    `frozen` is a `reference.Frozen`. With `ld_alpha`, what makes an answer longer than the other counts so much
    (arXiv:2409.06411). A mixture of experts adds its load-balancing loss as in SFT.
    """
    also = (*LOGGED, *(["log_sum_squares"] if how.use_weighting else []))
    coefficient = scorer.config.experts.aux_coefficient if scorer.config.experts else 0.0

    def loss(params: Params, frozen: Frozen, batch: Batch, key: jax.Array | None = None) -> Sums:
        chosen_BL, rejected_BL = branch(batch, CHOSEN), branch(batch, REJECTED)
        nll_BL = prompt_and_answer(batch, CHOSEN) if "orpo" in how.loss_type else chosen_BL
        policy = scorer.policy(params, frozen, key)
        found, routers = scorer.scores(policy, batch, jnp.maximum(nll_BL, batch["weights"]), also=also)
        weights = (chosen_BL, rejected_BL)
        if ld_alpha is not None:
            weights = desensitized(chosen_BL, rejected_BL, ld_alpha=ld_alpha)
        reference = None
        if not how.without_reference:
            reference = answer_sums(scorer.reference(frozen, batch), *weights)
        chosen_B, rejected_B = answer_sums(found["logprob"], *weights)
        tokens_B = answer_tokens(chosen_BL)
        pairs = Pairs(
            chosen_P=chosen_B,
            rejected_P=rejected_B,
            chosen_tokens_P=tokens_B,
            rejected_tokens_P=answer_tokens(rejected_BL),
            live_P=jnp.minimum(tokens_B, 1.0),
            reference=None if reference is None else (reference[0], reference[1]),
            nll=Sum(-(nll_BL * found["logprob"]).sum(), nll_BL.sum()),
            weights_P=_weights(found, chosen_BL, rejected_BL) if how.use_weighting else None,
        )
        total, metrics = preference_loss(pairs, how)
        metrics |= token_metrics(found, chosen_BL, rejected_BL)
        if coefficient:
            assert routers is not None
            aux = load_balancing_loss(routers) * total.count
            total = total._replace(total=total.total + coefficient * aux)
            metrics |= {"aux_loss": Sum(aux, total.count)}
        return total, metrics

    return loss


def _weights(found: dict[str, jax.Array], chosen_BL: jax.Array, rejected_BL: jax.Array) -> jax.Array:
    """WPO's weight of every pair [B]."""
    each = (wpo_weights(found["logprob"], found["log_sum_squares"], w_BL) for w_BL in (chosen_BL, rejected_BL))
    chosen_B, rejected_B = each
    return chosen_B * rejected_B
