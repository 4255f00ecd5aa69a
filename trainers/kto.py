"""KTO, learning from single answers that are marked desirable or not.

B or R rows, each a prompt with one answer. l = log π - log ρ, the log-probability of an answer under the policy less
that under the reference, σ the sigmoid, β `beta`.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import sigmoid

from models.moe import load_balancing_loss
from trainers.losses import Sum
from trainers.preference import token_metrics
from trainers.reference import Frozen
from trainers.scoring import LOGGED, Scorer, answer_sums, branch
from trainers.step import Batch, Loss, Params, Sums

WANTED, UNWANTED, OTHERS = 1, 2, 3  # branches of a row: its answer, of either kind, and another row's


class Answers(NamedTuple):
    """What R answers are judged by; float32 [R].

    Log-probabilities are summed over an answer. `mismatched_R` and `mismatched_reference_R` are those of another row's
    answer to this row's prompt (`partners`), which "kto" estimates the KL from.
    """

    logps_R: jax.Array
    reference_R: jax.Array
    desirable_R: jax.Array  # 1, or 0 for one to avoid
    live_R: jax.Array  # 1, or 0 for what only fills the batch
    mismatched_R: jax.Array | None = None
    mismatched_reference_R: jax.Array | None = None


def kto_loss(
    answers: Answers,
    *,
    beta: float,
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Sum, dict[str, Sum]]:
    """The loss as a `Sum` over rows, and what is logged beside it, under TRL's names.

    "kto": w (1 - σ(β (l - z))) of a desirable answer and w (1 - σ(β (z - l))) of another, with the weight of its kind
    and z = `kl_estimate` (KTO, arXiv:2402.01306, eq. 7). "apo_zero_unpaired": the same with z = 0 (APO,
    arXiv:2408.06266, eq. 7, unpaired). The batch that z is taken over is what this call is given, a microbatch over all
    devices, and nothing is carried on. ValueError for another type.
    """
    if loss_type not in ("kto", "apo_zero_unpaired"):
        raise ValueError(f"loss_type: {loss_type!r} is not known to KTO; there are kto, apo_zero_unpaired")
    kl = kl_estimate(answers) if loss_type == "kto" else jnp.zeros(())
    ratio_R = answers.logps_R - answers.reference_R
    desirable_R = answers.desirable_R > 0
    loss_R = jnp.where(
        desirable_R,
        desirable_weight * sigmoid(-beta * (ratio_R - kl)),
        undesirable_weight * sigmoid(-beta * (kl - ratio_R)),
    )
    return Sum((answers.live_R * loss_R).sum(), answers.live_R.sum()), _metrics(answers, beta * ratio_R, kl)


def unpaired_loss(scorer: Scorer, *, loss_type: Literal["kto", "apo_zero_unpaired"], **settings: float) -> Loss:
    """The loss of a microbatch [B, L] of answers, each beside another row's for "kto", as a `Sum` over rows, and TRL's
    metrics. `settings` are those of `kto_loss`; `frozen` is a `reference.Frozen`.
    """
    coefficient = scorer.config.experts.aux_coefficient if scorer.config.experts else 0.0

    def loss(params: Params, frozen: Frozen, batch: Batch, key: jax.Array | None = None) -> Sums:
        wanted_BL, unwanted_BL, others_BL = (branch(batch, number) for number in (WANTED, UNWANTED, OTHERS))
        own_BL = wanted_BL + unwanted_BL
        policy = scorer.policy(params, frozen, key)
        found, routers = scorer.scores(policy, batch, batch["weights"], also=LOGGED)
        logps_B, others_B = answer_sums(found["logprob"], own_BL, others_BL)
        reference_B, others_reference_B = answer_sums(scorer.reference(frozen, batch), own_BL, others_BL)
        answers = Answers(
            logps_R=logps_B,
            reference_R=reference_B,
            desirable_R=wanted_BL.max(axis=1),
            live_R=own_BL.max(axis=1),
            mismatched_R=jax.lax.stop_gradient(others_B),
            mismatched_reference_R=others_reference_B,
        )
        total, metrics = kto_loss(answers, loss_type=loss_type, **settings)
        metrics |= {n: x for n, x in token_metrics(found, wanted_BL, unwanted_BL).items() if n != "mean_token_accuracy"}
        if coefficient:
            assert routers is not None
            aux = load_balancing_loss(routers) * total.count
            total = total._replace(total=total.total + coefficient * aux)
            metrics |= {"aux_loss": Sum(aux, total.count)}
        return total, metrics

    return loss


def kl_estimate(answers: Answers) -> jax.Array:
    """max(0, mean l of the batch's answers to other rows' prompts), without gradient (arXiv:2402.01306)."""
    assert answers.mismatched_R is not None
    assert answers.mismatched_reference_R is not None
    ratio_R = answers.live_R * (answers.mismatched_R - answers.mismatched_reference_R)
    return jax.lax.stop_gradient(jnp.maximum(Sum(ratio_R.sum(), answers.live_R.sum()).mean(), 0.0))


def partners(rows: int, *, block: int) -> np.ndarray:
    """For each of `rows` rows in order, the one whose answer is set against its prompt for the KL: the row before, and
    of the first of a block the block's last, so that a block has the same answers mismatched as matched. The last block
    may be shorter; a row alone keeps its own answer. ValueError for a block of one, where all would.
    """
    if block < 2:
        raise ValueError(f"KTO takes its KL from other rows' answers: a batch of {block} row has none; use 2 or more")
    row_R = np.arange(rows)
    start_R = row_R - row_R % block
    last_R = np.minimum(start_R + block, rows) - 1
    return np.where(row_R == start_R, last_R, row_R - 1)


def _metrics(answers: Answers, reward_R: jax.Array, kl: jax.Array) -> dict[str, Sum]:
    """Rewards β l and log-probabilities of each kind. `rewards/margins` and `kl` are of the whole batch and count as
    one; of a batch without both kinds there is no margin.
    """
    reward_R, logps_R = jax.lax.stop_gradient((reward_R, answers.logps_R))
    chosen_R, rejected_R = answers.live_R * answers.desirable_R, answers.live_R * (1 - answers.desirable_R)
    metrics = {
        f"{name}/{kind}": Sum((own_R * x_R).sum(), own_R.sum())
        for name, x_R in (("rewards", reward_R), ("logps", logps_R))
        for kind, own_R in (("chosen", chosen_R), ("rejected", rejected_R))
    }
    chosen, rejected = metrics["rewards/chosen"], metrics["rewards/rejected"]
    both = ((chosen.count > 0) & (rejected.count > 0)).astype(jnp.float32)
    metrics["rewards/margins"] = Sum(both * (chosen.mean() - rejected.mean()), both)
    return metrics | {"kl": Sum(kl, jnp.ones(()))}
