"""Preference learning from pairs of answers: arrays in, `Sum` out.

P pairs, B rows, L positions. What a pair costs stands in `pair_losses.py`; here are the mixture of several types, what
is logged, and the weights that are laid on tokens and pairs.
"""

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

from trainers.logprobs import row_means
from trainers.losses import Sum
from trainers.pair_losses import (
    LOSSES,
    OF_MEANS,
    OF_POLICY,
    Pairs,
    Preference,
    log_odds,
    log_ratios,
    over_pairs,
    policy_logps,
    policy_scores,
    sft,
)


def preference_loss(pairs: Pairs, how: Preference) -> tuple[Sum, dict[str, Sum]]:
    """The loss as a `Sum` over pairs, and what is logged beside it, under TRL's names (`preference_metrics`).

    A reference is needed unless `how.without_reference`, and has no effect then.
    """
    assert how.without_reference or pairs.reference is not None
    if how.without_reference:
        pairs = pairs._replace(reference=None)
    total_P = jnp.zeros_like(pairs.chosen_P)
    for name, weight in zip(how.loss_type, how.loss_weights or (1.0,) * len(how.loss_type), strict=True):
        total_P += weight * LOSSES[name](pairs, how)
    if how.nll_weight:
        total_P += how.nll_weight * sft(pairs, how)
    if how.use_weighting:
        assert pairs.weights_P is not None
        total_P *= jax.lax.stop_gradient(pairs.weights_P)
    return over_pairs(total_P, pairs), preference_metrics(pairs, how)


def preference_metrics(pairs: Pairs, how: Preference) -> dict[str, Sum]:
    """Rewards β l of both answers (β log π without a reference, also where f-divergence or type give scores another
    form), how often the chosen one's is higher, by how much; log-probabilities, means where the loss has means.
    """
    pairs = jax.lax.stop_gradient(pairs)
    means = not OF_MEANS.isdisjoint(how.loss_type)
    alone = not OF_POLICY.isdisjoint(how.loss_type)
    scores = policy_scores(pairs, how, means=means) if alone else log_ratios(pairs)
    chosen_P, rejected_P = (how.beta * x_P for x_P in scores)
    log_p = policy_logps(pairs, means=means)
    each = {
        "rewards/chosen": chosen_P,
        "rewards/rejected": rejected_P,
        "rewards/accuracies": (chosen_P > rejected_P).astype(jnp.float32),
        "rewards/margins": chosen_P - rejected_P,
        "logps/chosen": log_p[0],
        "logps/rejected": log_p[1],
    }
    if "orpo" in how.loss_type:
        each["log_odds_chosen"] = log_odds(pairs)
        each["log_odds_ratio"] = log_sigmoid(each["log_odds_chosen"])
    metrics = {name: over_pairs(x_P, pairs) for name, x_P in each.items()}
    if how.nll_weight or "sft" in how.loss_type:
        assert pairs.nll is not None
        metrics["nll_loss"] = pairs.nll
    return metrics


def token_metrics(found: dict[str, jax.Array], chosen_BL: jax.Array, rejected_BL: jax.Array) -> dict[str, Sum]:
    """Means over the tokens of answers, from `token_scores`' `entropy`, `mean_logit` and `correct` [B, L], those that
    are there; the weights [B, L] say which tokens are of chosen answers and which of rejected ones.
    """

    def over(name: str, weights_BL: jax.Array) -> Sum:
        return Sum(jnp.where(weights_BL > 0, found[name], 0.0).sum(), (weights_BL > 0).sum().astype(jnp.float32))

    metrics = {}
    if "entropy" in found:
        metrics["entropy"] = over("entropy", chosen_BL + rejected_BL)
    if "mean_logit" in found:
        metrics["logits/chosen"] = over("mean_logit", chosen_BL)
        metrics["logits/rejected"] = over("mean_logit", rejected_BL)
    if "correct" in found:
        metrics["mean_token_accuracy"] = over("correct", chosen_BL)
    return metrics


def desensitized(chosen_PL: jax.Array, rejected_PL: jax.Array, *, ld_alpha: float) -> tuple[jax.Array, jax.Array]:
    """Weights of the tokens of two answers, one in a row, where what is longer than the other counts `ld_alpha` times
    (LD-DPO, arXiv:2409.06411): of policy and reference alike. From and to weights [P, L], 0 beside the answer.
    """
    shorter_P1 = jnp.minimum((chosen_PL > 0).sum(axis=1), (rejected_PL > 0).sum(axis=1))[:, None]

    def one(weights_PL: jax.Array) -> jax.Array:
        return weights_PL * jnp.where(jnp.cumsum(weights_PL > 0, axis=1) <= shorter_P1, 1.0, ld_alpha)

    return one(chosen_PL), one(rejected_PL)


def wpo_weights(logprob_BL: jax.Array, log_sum_squares_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
    """exp mean_t (log p_t - log sum_v p_v^2) of every row [B], without gradient: how likely the policy were to say it.
    A pair's weight is its two answers' product (WPO, arXiv:2406.11827, eq. 2).
    """
    return jax.lax.stop_gradient(jnp.exp(row_means(logprob_BL - log_sum_squares_BL, (weights_BL > 0) * 1.0)))


def running_shift(past: Sum, pairs: Pairs, *, beta: float) -> Sum:
    """BCO's δ with this batch: the mean over batches of the mean reward of their answers (arXiv:2404.04656).

    Begin with `Sum(0, 0)`; who calls keeps the `Sum` from step to step, and gives its `mean()` as `Pairs.shift`. Older
    TRL did so; 1.16 leaves δ at 0, and so does `bco_pair` where no shift is given.
    """
    chosen_P, rejected_P = log_ratios(pairs)
    mean = over_pairs(beta * (chosen_P + rejected_P) / 2, pairs).mean()
    return Sum(past.total + jax.lax.stop_gradient(mean), past.count + 1.0)
