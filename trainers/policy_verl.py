"""What the policy's own answers cost by verl's rules (0.7): arrays in, `Sum` out.

Letters and formulas are those of `policy_losses.py`. A loss is a function `(answers, how) -> (loss of each token,
metrics)` in `LOSS_MODES`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from trainers.logprobs import row_means, row_sums
from trainers.losses import Sum
from trainers.policy_losses import Answers, Sums, added, over_tokens, sampling_metrics

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
OF_ANSWERS = ("gspo", "sapo")  # whose tokens are averaged in each answer, whatever is asked
EXPONENT = 20.0  # beyond it a log ratio is cut


@dataclass(frozen=True, kw_only=True)
class VerlPolicy:
    """verl's settings of an actor, under its names; ValueError for what has no meaning.

    `loss_scale_factor` divides seq-mean-token-sum-norm; verl's null is the length that answers are padded to.
    """

    loss_mode: str = "vanilla"
    loss_agg_mode: str = "token-mean"
    loss_scale_factor: int | None = None
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    clip_ratio_c: float = 3.0
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    entropy_coeff: float = 0.0
    use_kl_loss: bool = False
    kl_loss_coef: float = 0.001
    kl_loss_type: str = "low_var_kl"

    def __post_init__(self) -> None:
        for name, given, allowed in (
            ("policy_loss.loss_mode", self.loss_mode, tuple(LOSS_MODES)),
            ("loss_agg_mode", self.loss_agg_mode, AGGREGATIONS),
            ("kl_loss_type", self.kl_loss_type, tuple(ESTIMATES)),
        ):
            if given not in allowed:
                raise ValueError(f"{name}: got {given}; allowed: {', '.join(allowed)}")
        if self.clip_ratio_c <= 1:
            raise ValueError(f"clip_ratio_c: got {self.clip_ratio_c}; allowed: above 1")
        if self.loss_agg_mode == "seq-mean-token-sum-norm" and self.loss_scale_factor is None:
            raise ValueError("loss_scale_factor: none is set; loss_agg_mode: seq-mean-token-sum-norm divides by it")

    @property
    def has_reference(self) -> bool:
        return self.use_kl_loss

    @property
    def entropy_gradient(self) -> bool:
        return self.entropy_coeff != 0


def verl_policy_loss(x: Answers, how: VerlPolicy) -> Sums:
    """The loss as a `Sum`, and what verl logs beside it, under its names: the policy's, less `entropy_coeff` times the
    entropy, plus `kl_loss_coef` times the divergence from the reference, each aggregated for itself.
    """
    each, metrics = LOSS_MODES[how.loss_mode](x, how)
    if how.loss_mode == "geo_mean":  # a loss of rows, those without a token among them
        total = Sum((each[:, 0] * x.live).sum(), x.live.sum())
    else:
        total = aggregated(each, x, how, mode="seq-mean-token-mean" if how.loss_mode in OF_ANSWERS else None)
    entropy = aggregated(x.entropy, x, how)
    metrics |= {"actor/pg_loss": total, "actor/entropy": entropy}
    if how.entropy_coeff:
        total = added(total, entropy, factor=-how.entropy_coeff)
    if how.use_kl_loss:
        assert x.reference is not None
        divergence = aggregated(kl_estimate(x.logprob, x.reference, how.kl_loss_type), x, how)
        metrics |= {"actor/kl_loss": divergence}
        metrics |= {"actor/kl_coef": Sum(jnp.float32(how.kl_loss_coef), jnp.float32(1.0))}
        total = added(total, divergence, factor=how.kl_loss_coef)
    return total, metrics | sampling_metrics(x)


def aggregated(each: jax.Array, x: Answers, how: VerlPolicy, *, mode: str | None = None) -> Sum:
    """Losses of tokens [B, L] as one `Sum`, by `loss_agg_mode`, or by `mode`.

    Rows without a token do not count. seq-mean-token-sum-norm is no mean: a sum by `loss_scale_factor`, of which
    several microbatches make a mean, as in verl. Of the others verl's older workers take the mean of microbatches'
    means; ours, as its newer ones, are means over the whole step, whatever the accumulation.
    """
    mode = mode or how.loss_agg_mode
    each = jnp.broadcast_to(each, x.weights.shape)
    rows = (x.weights.sum(axis=1) > 0).sum().astype(jnp.float32)
    if mode == "seq-mean-token-mean":
        return Sum(row_means(each, x.weights).sum(), rows)
    total = row_sums(each, x.weights).sum()
    if mode == "seq-mean-token-sum":
        return Sum(total, rows)
    if mode == "seq-mean-token-sum-norm":
        assert how.loss_scale_factor is not None
        return Sum(total / how.loss_scale_factor, jnp.float32(1.0))
    return Sum(total, x.weights.sum())


def kl_estimate(logprob: jax.Array, reference: jax.Array, kind: str) -> jax.Array:
    """The divergence from the reference estimated token by token, arrays of one shape: with d = log π - log π_ref,
    kl = k1: d, abs: |d|, mse = k2: d^2 / 2, low_var_kl = k3: e^-d + d - 1, where d is cut at ±20 and the whole at 10.
    """
    return ESTIMATES[kind](logprob - reference)


def _k3(d: jax.Array) -> jax.Array:
    d = jnp.clip(d, -EXPONENT, EXPONENT)
    return jnp.clip(jnp.exp(-d) + d - 1, -10.0, 10.0)


ESTIMATES: dict[str, Callable[[jax.Array], jax.Array]] = {
    **dict.fromkeys(("kl", "k1"), lambda d: d),
    "abs": jnp.abs,
    **dict.fromkeys(("mse", "k2"), lambda d: jnp.square(d) / 2),
    **dict.fromkeys(("low_var_kl", "k3"), _k3),
}


def vanilla(x: Answers, how: VerlPolicy) -> tuple[jax.Array, dict[str, Sum]]:
    """max(-ρ A, -clip(ρ, 1 - low, 1 + high) A), and where A < 0 at most -c A (dual clip, arXiv:1912.09729, eq. 4)."""
    log_ratio = jnp.clip(x.logprob - x.old, -EXPONENT, EXPONENT)
    ratio = jnp.exp(log_ratio)
    each, metrics = _clipped(x, ratio, how)
    bound = -how.clip_ratio_c * x.advantages
    metrics["actor/pg_clipfrac_lower"] = over_tokens(((each > bound) & (x.advantages < 0)) * 1.0, x)
    return jnp.where(x.advantages < 0, jnp.minimum(bound, each), each), metrics | _moved(log_ratio, x)


def gspo(x: Answers, how: VerlPolicy) -> tuple[jax.Array, dict[str, Sum]]:
    """The same without dual clip, ρ that of the answer in value, and in gradient the token's own (GSPO-token,
    arXiv:2507.18071, eq. 14).
    """
    log_ratio = x.logprob - x.old
    whole = jax.lax.stop_gradient(row_means(log_ratio, x.weights)[:, None] - x.logprob)
    each, metrics = _clipped(x, jnp.exp(jnp.minimum(x.logprob + whole, 10.0)), how)
    return each, metrics | _moved(log_ratio, x)


def sapo(x: Answers, how: VerlPolicy) -> tuple[jax.Array, dict[str, Sum]]:
    """-(4 / τ) σ(τ (ρ - 1)) A, τ by the sign of A (arXiv:2511.20347)."""
    log_ratio = jnp.clip(x.logprob - x.old, -EXPONENT, EXPONENT)
    tau = jnp.where(x.advantages > 0, how.tau_pos, how.tau_neg)
    return -jax.nn.sigmoid(tau * (jnp.exp(log_ratio) - 1)) * 4 / tau * x.advantages, _moved(log_ratio, x)


def gpg(x: Answers, how: VerlPolicy) -> tuple[jax.Array, dict[str, Sum]]:
    """-A log π (arXiv:2504.02546)."""
    return -x.advantages * x.logprob, {}


def cispo(x: Answers, how: VerlPolicy) -> tuple[jax.Array, dict[str, Sum]]:
    """-sg(clip(ρ, 1 - low, 1 + high)) A log π (arXiv:2506.13585, eq. 4)."""
    log_ratio = jnp.clip(x.logprob - x.old, -EXPONENT, EXPONENT)
    ratio = jnp.exp(log_ratio)
    bounded = jnp.clip(ratio, 1 - how.clip_ratio_low, 1 + how.clip_ratio_high)
    metrics = {"actor/pg_clipfrac": over_tokens((ratio != bounded) * 1.0, x)}
    return -jax.lax.stop_gradient(bounded) * x.advantages * x.logprob, metrics | _moved(log_ratio, x)


def geo_mean(x: Answers, how: VerlPolicy) -> tuple[jax.Array, dict[str, Sum]]:
    """-A e to the mean of u, each u clipped to [-low, high] where that lowers the gain; of rows [B, 1] (GMPO,
    arXiv:2507.20673).
    """
    log_ratio = x.logprob - x.old
    bounded = jnp.clip(log_ratio, -how.clip_ratio_low, how.clip_ratio_high)
    sign = jnp.sign(x.advantages)
    lower = sign * jnp.minimum(sign * log_ratio, sign * bounded)
    cut = log_ratio != bounded
    metrics = {
        "actor/pg_clipfrac": over_tokens((cut & (x.advantages > 0)) * 1.0, x),
        "actor/pg_clipfrac_lower": over_tokens((cut & (x.advantages < 0)) * 1.0, x),
    }
    each_B = -row_means(x.advantages, x.weights) * jnp.exp(row_means(lower, x.weights))
    return each_B[:, None], metrics | _moved(log_ratio, x)


LOSS_MODES: dict[str, Callable[[Answers, VerlPolicy], tuple[jax.Array, dict[str, Sum]]]] = {
    "vanilla": vanilla,
    "gspo": gspo,
    "sapo": sapo,
    "gpg": gpg,
    "cispo": cispo,
    "geo_mean": geo_mean,
}


def _clipped(x: Answers, ratio: jax.Array, how: VerlPolicy) -> tuple[jax.Array, dict[str, Sum]]:
    free = -ratio * x.advantages
    bounded = -jnp.clip(ratio, 1 - how.clip_ratio_low, 1 + how.clip_ratio_high) * x.advantages
    return jnp.maximum(free, bounded), {"actor/pg_clipfrac": over_tokens((bounded > free) * 1.0, x)}


def _moved(log_ratio: jax.Array, x: Answers) -> dict[str, Sum]:
    return {"actor/ppo_kl": over_tokens(-log_ratio, x)}
