"""Learning from the policy's own answers, better ones from worse: group-relative policy optimisation and its family.

B rows, each a prompt with an answer or with several (`branches` tells them apart), L positions. What an answer's tokens
cost is in `policy_losses.py` and `policy_verl.py`; here a batch becomes `Answers`, a row for each.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from models.moe import load_balancing_loss
from trainers.logprobs import row_means, row_sums
from trainers.losses import Sum
from trainers.policy_losses import Answers, GroupPolicy, group_policy_loss
from trainers.policy_verl import VerlPolicy, kl_estimate, verl_policy_loss
from trainers.reference import Frozen, reference_params
from trainers.scoring import Scorer, by_answer
from trainers.step import Batch, Loss, Params, Sums


def grpo_loss(scorer: Scorer, how: GroupPolicy | VerlPolicy, *, together: int = 1) -> Loss:
    """The loss of a microbatch [B, L] as a `Sum`, and the metrics of TRL or of verl, as `how` is; every row has
    `together` answers.

    Beside the usual keys a batch has float32 [B, L] at its answers' predictions: `advantages`, `sampled_logprobs`
    (the sampler's), `old_logprobs` where the policy is not the one that answered any more, and `reference` where that
    is known; otherwise `frozen`, a `reference.Frozen`, has one if `how.has_reference`. The scorer's temperature is that
    of sampling. A mixture of experts adds its load-balancing loss as in SFT.
    """
    coefficient = scorer.config.experts.aux_coefficient if scorer.config.experts else 0.0

    def loss(params: Params, frozen: Frozen, batch: Batch, key: jax.Array | None = None) -> Sums:
        found, routers = scorer.scores(
            scorer.policy(params, frozen, key),
            batch,
            batch["weights"],
            also=("entropy",),
            entropy_gradient=how.entropy_gradient,
        )
        reference = scorer.reference(frozen, batch) if how.has_reference else None
        answers = answers_of(found, batch, reference, together=together)
        if isinstance(how, GroupPolicy):
            total, metrics = group_policy_loss(answers, how)
        else:
            total, metrics = verl_policy_loss(answers, how)
        if coefficient:
            assert routers is not None
            aux = load_balancing_loss(routers) * total.count
            total = total._replace(total=total.total + coefficient * aux)
            metrics |= {"aux_loss": Sum(aux, total.count)}
        return total, metrics

    return loss


def answers_of(found: dict[str, jax.Array], batch: Batch, reference: jax.Array | None, *, together: int = 1) -> Answers:
    """A batch's answers; what has no weight is 0 everywhere, whatever the batch says there."""
    has = batch["weights"] > 0

    def only(values: jax.Array) -> jax.Array:
        return by_answer(jnp.where(has, values, 0.0), batch, together)

    logprob = only(found["logprob"])
    return Answers(
        logprob=logprob,
        old=jax.lax.stop_gradient(only(batch["old_logprobs"]) if "old_logprobs" in batch else logprob),
        sampled=only(batch["sampled_logprobs"]),
        advantages=only(batch["advantages"]),
        entropy=only(found["entropy"]),
        weights=only(jnp.ones_like(batch["weights"])),
        live=(by_answer(batch["segments"], batch, together) > 0).any(axis=1).astype(jnp.float32),
        reference=None if reference is None else only(reference),
    )


def policy_logprobs(scorer: Scorer) -> Callable[[Params, Frozen, Batch], jax.Array]:
    """A function (params, frozen, batch [B, L]) → float32 [B, L]: what the policy, as training computes it without
    dropout, says of every token of the answers; `old_logprobs` of the updates to come.
    """

    def compute(params: Params, frozen: Frozen, batch: Batch) -> jax.Array:
        return scorer.scores(scorer.policy(params, frozen, None), batch, batch["weights"])[0]["logprob"]

    return compute


def reference_logprobs(scorer: Scorer) -> Callable[[Frozen, Batch], jax.Array]:
    """The same of the reference: (frozen, batch [B, L]) → float32 [B, L]."""

    def compute(frozen: Frozen, batch: Batch) -> jax.Array:
        return scorer.scores(reference_params(frozen), batch, batch["weights"])[0]["logprob"]

    return compute


def divergences(old: jax.Array, reference: jax.Array, weights: jax.Array, *, kind: str) -> tuple[jax.Array, jax.Array]:
    """How far each answer went from the reference, for rewards that it lowers: the sum over its tokens and their mean,
    [B], from log-probabilities [B, L] and an estimate that `policy_verl.kl_estimate` knows.
    """
    each = kl_estimate(old, reference, kind)
    return row_sums(each, weights), row_means(each, weights)
