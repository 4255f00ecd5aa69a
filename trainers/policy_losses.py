"""What the policy's own answers cost, for every `loss_type` of TRL's GRPO: arrays in, `Sum` out.

B rows, each a prompt and one answer, L positions; what is of a whole row is [B, 1]. In formulas: log π of a token is
its log-probability under the policy, log π_old under the one that answered, u = log π - log π_old, ρ = e^u the ratio
(of the whole answer e to the mean of u), A the advantage, m 1 for tokens of answers, sg without gradient.

A loss is a function `(answers, ratio, how) -> (loss of each token, metrics)` in `LOSSES`; how tokens become one number
is `aggregated`. verl's losses stand in `policy_verl.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from trainers.logprobs import row_means, row_sums
from trainers.losses import Sum

Sums = tuple[Sum, dict[str, Sum]]
SAMPLER_CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
LOG_SMALLEST, LOG_LARGEST = math.log(1e-8), 20.0  # bounds of VESPO's log weights


class Answers(NamedTuple):
    """What answers are judged by: float32 [B, L], 0 wherever `weights` is.

    Log-probabilities are those of the policy (with gradient), of the policy that answered as training computes it, of
    the sampler, and of the reference where there is one. Weights are 1 for tokens that are learned from. `live` [B] is
    0 for rows that only fill the batch; a row that is live without a token of weight, such as an answer that was cut
    off, counts as TRL counts it.
    """

    logprob: jax.Array
    old: jax.Array
    sampled: jax.Array
    advantages: jax.Array
    entropy: jax.Array
    weights: jax.Array
    live: jax.Array
    reference: jax.Array | None = None


@dataclass(frozen=True, kw_only=True)
class GroupPolicy:
    """TRL's GRPO, under its names (TRL 1.16); ValueError for what has no meaning.

    `epsilon_high` None is `epsilon`; of cispo it is the bound itself. `max_completion_length` is that of dr_grpo's
    divisor. `sampler_correction` is `vllm_importance_sampling_mode`, None where that is off.
    """

    loss_type: str
    importance_sampling_level: str = "token"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    use_bias_correction_kl: bool = True
    max_completion_length: int | None = None
    top_entropy_quantile: float = 1.0
    entropy_coef: float = 0.0
    off_policy_mask_threshold: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    sampler_correction: str | None = None
    sampler_clip_max: float | None = 3.0
    sampler_clip_min: float | None = None

    def __post_init__(self) -> None:
        _one_of("loss_type", self.loss_type, tuple(LOSSES))
        _one_of("importance_sampling_level", self.importance_sampling_level, ("token", "sequence"))
        if self.sampler_correction is not None:
            _one_of("vllm_importance_sampling_mode", self.sampler_correction, SAMPLER_CORRECTIONS)
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError("max_completion_length: none is set; loss_type: dr_grpo divides by it")

    @property
    def has_reference(self) -> bool:
        return self.beta != 0

    @property
    def entropy_gradient(self) -> bool:
        return self.entropy_coef != 0

    @property
    def whole(self) -> bool:
        """Whether ratios are those of whole answers (GSPO, arXiv:2507.18071)."""
        return self.importance_sampling_level == "sequence"

    @property
    def highest(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


def _one_of(name: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise ValueError(f"{name}: got {given}; allowed: {', '.join(allowed)}")


def group_policy_loss(x: Answers, how: GroupPolicy) -> Sums:
    """The loss as a `Sum`, and what TRL logs beside it, under its names.

    On top of the loss of `LOSSES`, in TRL's order: rows that are too far off policy and tokens of little entropy fall
    out, the sampler's mismatch is weighed, and β times the divergence from the reference,
    e^d - d - 1 with d = log π_ref - log π, is added, weighed by ρ if so asked. A bonus for entropy is a mean over the
    tokens that are left, of this call.
    """
    log_ratio = x.logprob - x.old
    ratio = jnp.exp(row_means(log_ratio, x.weights)[:, None] if how.whole else log_ratio)
    each, metrics = LOSSES[how.loss_type](x, ratio, how)
    learned = x.weights
    if how.off_policy_mask_threshold is not None:
        each = each * _close_enough(x, how.off_policy_mask_threshold)
    if how.top_entropy_quantile < 1:
        learned = learned * _least_certain(x, how.top_entropy_quantile)
        each = each * learned
    if how.sampler_correction is not None:
        sampler = sampler_ratio(x, how)
        metrics |= _ratio_metrics(sampler, x)
        if how.loss_type != "vespo":  # which has it in its own weight
            each = each * sampler
    if how.has_reference:
        divergence = _k3(x) * (ratio if how.use_bias_correction_kl else 1.0)
        metrics["kl"] = over_tokens(divergence, x)
        each = each + how.beta * divergence
    total = aggregated(each, x, how)
    if how.entropy_coef:
        metrics |= {"policy_loss": total, "entropy_coef": Sum(jnp.float32(how.entropy_coef), jnp.float32(1.0))}
        total = added(total, Sum((x.entropy * learned).sum(), learned.sum()), factor=-how.entropy_coef)
    return total, metrics | {"entropy": over_tokens(x.entropy, x)} | sampling_metrics(x)


def aggregated(each: jax.Array, x: Answers, how: GroupPolicy) -> Sum:
    """Losses of tokens [B, L] as one `Sum`, by what TRL divides with one microbatch to a step.

    grpo, sapo: the mean over rows of their mean. dr_grpo: the mean over rows of the sum by `max_completion_length`.
    luspo: of the sum. bnpo, dapo, cispo, vespo: the mean over tokens. With several microbatches these stay means over
    the rows or tokens of the whole step, whatever the accumulation; in TRL so they are for all but bnpo, which has a
    mean of each microbatch's means there. Where one generation is cut into several updates, dapo, cispo and vespo
    divide by the tokens of an update here, by the mean of that over the generation's updates in TRL.
    """
    each = jnp.broadcast_to(each, x.weights.shape)
    if how.loss_type in ("grpo", "sapo"):
        return Sum(row_means(each, x.weights).sum(), x.live.sum())
    total = row_sums(each, x.weights).sum()
    if how.loss_type == "luspo":
        return Sum(total, x.live.sum())
    if how.loss_type == "dr_grpo":
        assert how.max_completion_length is not None
        return Sum(total / how.max_completion_length, x.live.sum())
    return Sum(total, x.weights.sum())


def added(total: Sum, other: Sum, *, factor: float) -> Sum:
    """`total` with `factor` times the mean of `other` added to its mean. Where both count the same things, that is the
    mean over all microbatches; elsewhere each call's mean of `other` counts by what it has of `total`.
    """
    share = jnp.where(other.count > 0, total.count / jnp.where(other.count > 0, other.count, 1.0), 0.0)
    return Sum(total.total + factor * other.total * share, total.count)


def clipped(x: Answers, ratio: jax.Array, how: GroupPolicy) -> tuple[jax.Array, dict[str, Sum]]:
    """-min(min(ρ, δ) A, clip(ρ, 1 - ε, 1 + ε_high) A) (arXiv:2402.03300, eq. 3; δ: arXiv:2505.07291)."""
    bounded = jnp.clip(ratio, 1 - how.epsilon, 1 + how.highest)
    if how.delta is not None:
        ratio = jnp.minimum(ratio, how.delta)
    low = (ratio < 1 - how.epsilon) & (x.advantages < 0)
    high = (ratio > 1 + how.highest) & (x.advantages > 0)
    low_B, high_B = (row_means(flags * 1.0, x.weights) for flags in (low, high))
    some_B = x.live > 0 if how.whole else x.weights.sum(axis=1) > 0
    metrics = {
        "clip_ratio/low_mean": _over(low, x, how),
        "clip_ratio/high_mean": _over(high, x, how),
        "clip_ratio/region_mean": _over(low | high, x, how),
        "clip_ratio/low_min": least(low_B, some_B),
        "clip_ratio/high_max": most(high_B, some_B),
    }
    return -jnp.minimum(ratio * x.advantages, bounded * x.advantages), metrics


def cispo(x: Answers, ratio: jax.Array, how: GroupPolicy) -> tuple[jax.Array, dict[str, Sum]]:
    """-sg(min(ρ, ε_high)) A log π (arXiv:2506.13585, eq. 4, with TRL's reading of the bound)."""
    held = jax.lax.stop_gradient(jnp.minimum(ratio, how.highest))
    cut = (ratio > how.highest) & (x.advantages > 0)
    return -held * x.advantages * x.logprob, {"cispo_clip_ratio": _over(cut, x, how)}


def sapo(x: Answers, ratio: jax.Array, how: GroupPolicy) -> tuple[jax.Array, dict[str, Sum]]:
    """-(4 / τ) σ(τ (ρ - 1)) A, τ by the sign of A (arXiv:2511.20347)."""
    tau = jnp.where(x.advantages > 0, how.sapo_temperature_pos, how.sapo_temperature_neg)
    return -jax.nn.sigmoid(tau * (ratio - 1)) * 4 / tau * x.advantages, {}


def vespo(x: Answers, ratio: jax.Array, how: GroupPolicy) -> tuple[jax.Array, dict[str, Sum]]:
    """-sg(φ) A log π, φ = w^k e^{λ (1 - w)} with w the ratio of the whole answer, by policy and by sampler (VESPO)."""
    log_w = row_sums(jnp.clip(x.logprob - x.old, -LOG_LARGEST, LOG_LARGEST), x.weights)[:, None]
    if how.sampler_correction is not None:
        sampler = jnp.log(sampler_ratio(x, how))
        sampler = jnp.clip(sampler, LOG_SMALLEST, LOG_LARGEST)
        log_w += sampler if sampler.shape[1] == 1 else row_sums(sampler, x.weights)[:, None]
    log_w = jnp.clip(log_w, LOG_SMALLEST, LOG_LARGEST)
    wanted = row_means(x.advantages, x.weights)[:, None] >= 0
    k = jnp.where(wanted, how.vespo_k_pos, how.vespo_k_neg)
    lam = jnp.maximum(jnp.where(wanted, how.vespo_lambda_pos, how.vespo_lambda_neg), 1e-4)
    phi = jax.lax.stop_gradient(jnp.exp(lam + k * log_w - lam * jnp.exp(log_w)))
    return -phi * x.advantages * x.logprob, {"vespo/phi_seq_mean": Sum((phi[:, 0] * x.live).sum(), x.live.sum())}


LOSSES: dict[str, Callable[[Answers, jax.Array, GroupPolicy], tuple[jax.Array, dict[str, Sum]]]] = {
    **dict.fromkeys(("grpo", "bnpo", "dr_grpo", "dapo", "luspo"), clipped),
    "cispo": cispo,
    "sapo": sapo,
    "vespo": vespo,
}


def sampler_ratio(x: Answers, how: GroupPolicy) -> jax.Array:
    """π_old / π_sampler of each token [B, L], or of each answer [B, 1]; what is out of bounds is set on them
    (`truncate`), or to 0 (`mask`).
    """
    assert how.sampler_correction is not None
    difference = jnp.nan_to_num(x.old - x.sampled, nan=0.0)
    whole = how.sampler_correction.startswith("sequence")
    ratio = jnp.exp(row_sums(difference, x.weights)[:, None] if whole else difference)
    lowest = -math.inf if how.sampler_clip_min is None else how.sampler_clip_min
    highest = math.inf if how.sampler_clip_max is None else how.sampler_clip_max
    if how.sampler_correction.endswith("truncate"):
        return jax.lax.stop_gradient(jnp.clip(ratio, lowest, highest))
    return jax.lax.stop_gradient(jnp.where((ratio < lowest) | (ratio > highest), 0.0, ratio))


def sampling_metrics(x: Answers) -> dict[str, Sum]:
    """How far the sampler's log-probabilities are from the trainer's, of the same policy: their mean, and the largest,
    of several microbatches the mean of their largest.
    """
    known = (x.weights > 0) & ~jnp.isnan(x.sampled)
    apart = jnp.where(known, jnp.abs(x.old - x.sampled), 0.0)
    return {
        "sampling/sampling_logp_difference/mean": Sum(apart.sum(), known.sum().astype(jnp.float32)),
        "sampling/sampling_logp_difference/max": most(apart, known),
    }


def over_tokens(values: jax.Array, x: Answers) -> Sum:
    """The mean over the answers' tokens."""
    return Sum(row_sums(jnp.broadcast_to(values, x.weights.shape), x.weights).sum(), x.weights.sum())


def least(values: jax.Array, where: jax.Array) -> Sum:
    """The least of some values, which counts once."""
    some = where.any()
    return Sum(jnp.where(some, jnp.where(where, values, jnp.inf).min(), 0.0), some.astype(jnp.float32))


def most(values: jax.Array, where: jax.Array) -> Sum:
    """The largest of some values, which counts once."""
    smallest = least(-values, where)
    return Sum(-smallest.total, smallest.count)


def _over(flags: jax.Array, x: Answers, how: GroupPolicy) -> Sum:
    """How often something is so: over tokens, or where ratios are of answers over these."""
    if not how.whole:
        return over_tokens(flags * 1.0, x)
    return Sum(row_means(flags * 1.0, x.weights).sum(), x.live.sum())


def _k3(x: Answers) -> jax.Array:
    """Schulman's low-variance estimate of the divergence from the reference [B, L]."""
    assert x.reference is not None
    difference = x.reference - x.logprob
    return jnp.exp(difference) - difference - 1


def _close_enough(x: Answers, threshold: float) -> jax.Array:
    """1 for rows [B, 1] that are learned from: those that score well, and those whose policy has not moved further away
    from the sampler than this, in nats per token (DeepSeek-V3.2).
    """
    apart = jnp.nan_to_num(x.sampled - jax.lax.stop_gradient(x.logprob), nan=0.0)
    scores_well = row_means(x.advantages, x.weights) >= 0
    return jnp.where(scores_well | (row_means(apart, x.weights) <= threshold), 1.0, 0.0)[:, None]


def _least_certain(x: Answers, share: float) -> jax.Array:
    """1 for the tokens [B, L] whose entropy is in the top `share` of those of this call (arXiv:2506.01939)."""
    entropy = jax.lax.stop_gradient(x.entropy)
    bound = jnp.nanquantile(jnp.where(x.weights > 0, entropy, jnp.nan).reshape(-1), 1 - share)
    return jnp.where((entropy >= bound) & (x.weights > 0), 1.0, 0.0)


def _ratio_metrics(ratio: jax.Array, x: Answers) -> dict[str, Sum]:
    where = (x.live > 0)[:, None] if ratio.shape[1] == 1 else x.weights > 0
    name = "sampling/importance_sampling_ratio"
    mean = Sum(jnp.where(where, ratio, 0.0).sum(), where.sum().astype(jnp.float32))
    return {f"{name}/min": least(ratio, where), f"{name}/mean": mean, f"{name}/max": most(ratio, where)}
