"""What a pair of answers costs, for every `loss_type` of preference learning: arrays in, one loss for each pair out.

P pairs. In formulas: log π of an answer is the sum over its tokens under the policy, log ρ under the reference, c is
the chosen answer and r the rejected one, l = log π - log ρ, s = f'(e^l), which is l unless another f-divergence is
asked for, d = s_c - s_r, n an answer's number of tokens, σ the sigmoid, β and ε `beta` and `label_smoothing`.

A loss is a function `(pairs, how) -> [P]` in `LOSSES`. "The batch", where one looks beyond its own pair (`aot`,
`aot_unpaired`, `sft`), is what one call is given: a microbatch over all devices. These change with the number of
accumulation steps; no other does. Nothing is carried from one call to the next, but for BCO's shift, by who calls.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid

from trainers.losses import Sum


class Pairs(NamedTuple):
    """What P pairs are judged by; float32 [P].

    Log-probabilities are summed over an answer. `reference` has those of chosen and rejected answers; `nll`, for what
    adds the likelihood of chosen answers, is -log π over all their tokens, and for ORPO over those of their prompts as
    well. `weights_P` is WPO's weight (`wpo_weights`), `shift` BCO's δ (`running_shift`).
    """

    chosen_P: jax.Array
    rejected_P: jax.Array
    chosen_tokens_P: jax.Array
    rejected_tokens_P: jax.Array
    live_P: jax.Array  # 1, or 0 for what only fills the batch
    reference: tuple[jax.Array, jax.Array] | None = None
    nll: Sum | None = None
    weights_P: jax.Array | None = None
    shift: jax.Array | float = 0.0


@dataclass(frozen=True)
class Preference:
    """Which loss, under TRL's names; ValueError for what has no meaning.

    Several loss types are summed with `loss_weights`, each 1 without them (MPO, arXiv:2411.10442). `nll_weight` adds
    that much of the `sft` loss: RPO's `rpo_alpha` (arXiv:2404.19733), `cpo_alpha` of CPO, 1 in ORPO. `alpha` is
    AlphaPO's.
    """

    loss_type: tuple[str, ...]
    beta: float
    loss_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    use_weighting: bool = False
    reference_free: bool = False
    nll_weight: float = 0.0
    simpo_gamma: float = 0.5
    alpha: float = 0.0

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise ValueError(problem)

    @property
    def without_reference(self) -> bool:
        """Whether no log-probabilities of a reference are needed."""
        return self.reference_free or not OF_POLICY.isdisjoint(self.loss_type)


# Losses on the difference of scores, d.


def sigmoid_loss(pairs: Pairs, how: Preference) -> jax.Array:
    """-log σ(βd)   (DPO, arXiv:2305.18290, eq. 7); ε has no effect."""
    return -log_sigmoid(how.beta * _difference(pairs, how))


def sigmoid_norm(pairs: Pairs, how: Preference) -> jax.Array:
    """-log σ(β (s_c/n_c - s_r/n_r))   (length-normalised DPO: Tülu 3, arXiv:2411.15124)."""
    return -log_sigmoid(how.beta * _difference(pairs, how, by_token=True))


def hinge(pairs: Pairs, how: Preference) -> jax.Array:
    """max(0, 1 - βd)   (SLiC-HF, arXiv:2305.10425, on DPO's reward)."""
    return jax.nn.relu(1 - how.beta * _difference(pairs, how))


def ipo(pairs: Pairs, how: Preference) -> jax.Array:
    """(s_c/n_c - s_r/n_r - 1/2β)^2   (IPO, arXiv:2310.12036, eq. 17, whose τ is β; by token, as its authors do)."""
    return jnp.square(_difference(pairs, how, by_token=True) - 1 / (2 * how.beta))


def robust(pairs: Pairs, how: Preference) -> jax.Array:
    """(-(1-ε) log σ(βd) + ε log σ(-βd)) / (1-2ε), where ε of the labels are wrong   (rDPO, arXiv:2403.00409)."""
    x_P, e = how.beta * _difference(pairs, how), how.label_smoothing
    return (-(1 - e) * log_sigmoid(x_P) + e * log_sigmoid(-x_P)) / (1 - 2 * e)


def exo_pair(pairs: Pairs, how: Preference) -> jax.Array:
    """σ(βd) (log σ(βd) - log(1-ε)) + σ(-βd) (log σ(-βd) - log ε), a reverse KL   (EXO, arXiv:2402.00856, eq. 16)."""
    x_P, e = how.beta * _difference(pairs, how), how.label_smoothing
    won_P = sigmoid(x_P) * (log_sigmoid(x_P) - math.log1p(-e))
    return won_P + sigmoid(-x_P) * (log_sigmoid(-x_P) - math.log(e))


def discopop(pairs: Pairs, how: Preference) -> jax.Array:
    """-log σ(x) (1-m) + e^-x m, with x = βd and m = σ(x/τ)   (DiscoPOP, arXiv:2406.08414, eq. 5)."""
    x_P = how.beta * _difference(pairs, how)
    modulation_P = sigmoid(x_P / how.discopop_tau)
    return -log_sigmoid(x_P) * (1 - modulation_P) + jnp.exp(-x_P) * modulation_P


# Losses on the log-ratios of each answer, l_c and l_r.


def nca_pair(pairs: Pairs, how: Preference) -> jax.Array:
    """-log σ(β l_c) - ½ log σ(-β l_c) - ½ log σ(-β l_r)   (NCA with two answers, arXiv:2402.05369)."""
    chosen_P, rejected_P = (how.beta * x_P for x_P in log_ratios(pairs))
    return -log_sigmoid(chosen_P) - 0.5 * log_sigmoid(-chosen_P) - 0.5 * log_sigmoid(-rejected_P)


def bco_pair(pairs: Pairs, how: Preference) -> jax.Array:
    """-log σ(β l_c - δ) - log σ(-(β l_r - δ))   (BCO, arXiv:2404.04656; δ is `pairs.shift`, see `running_shift`)."""
    chosen_P, rejected_P = (how.beta * x_P - pairs.shift for x_P in log_ratios(pairs))
    return -log_sigmoid(chosen_P) - log_sigmoid(-rejected_P)


def sppo_hard(pairs: Pairs, how: Preference) -> jax.Array:
    """(l_c - 1/2β)^2 + (l_r + 1/2β)^2, where the chosen wins for certain   (SPPO, arXiv:2405.00675, eq. 4.7)."""
    chosen_P, rejected_P = log_ratios(pairs)
    return jnp.square(chosen_P - 0.5 / how.beta) + jnp.square(rejected_P + 0.5 / how.beta)


def apo_zero(pairs: Pairs, how: Preference) -> jax.Array:
    """1 - σ(β l_c) + σ(β l_r): chosen up, rejected down   (APO, arXiv:2408.06266, eq. 7)."""
    chosen_P, rejected_P = log_ratios(pairs)
    return sigmoid(-how.beta * chosen_P) + sigmoid(how.beta * rejected_P)


def apo_down(pairs: Pairs, how: Preference) -> jax.Array:
    """σ(β l_c) + 1 - σ(β (l_c - l_r)): both down, the rejected one further   (APO, arXiv:2408.06266, eq. 8)."""
    chosen_P, rejected_P = log_ratios(pairs)
    return sigmoid(how.beta * chosen_P) + sigmoid(-how.beta * (chosen_P - rejected_P))


# Losses over the batch.


def aot(pairs: Pairs, how: Preference) -> jax.Array:
    """-(1-ε) log σ(βx) - ε log σ(-βx), where x of a pair is log π_c - log π_r minus, of the batch's log ρ_c - log ρ_r,
    the one with the same rank: the distributions are compared and not the pairs   (AOT, arXiv:2406.05882, paired).
    """
    assert pairs.reference is not None
    first_P, second_P = pairs.chosen_P - pairs.rejected_P, pairs.reference[0] - pairs.reference[1]
    return _smoothed(how.beta * _by_rank(first_P, second_P, pairs.live_P), how)


def aot_unpaired(pairs: Pairs, how: Preference) -> jax.Array:
    """As `aot`, with x the batch's l_c minus its l_r of the same rank   (AOT, arXiv:2406.05882, unpaired)."""
    chosen_P, rejected_P = log_ratios(pairs)
    return _smoothed(how.beta * _by_rank(chosen_P, rejected_P, pairs.live_P), how)


def sft(pairs: Pairs, how: Preference) -> jax.Array:
    """-log π of a token of a chosen answer, the mean over all of the batch; the same for every pair."""
    assert pairs.nll is not None
    return jnp.broadcast_to(pairs.nll.mean(), pairs.chosen_P.shape)


# Losses of the policy alone. With AlphaPO's a (`alpha`), log π is (1 - e^(-a log π)) / a in all of them but ORPO's.


def cpo(pairs: Pairs, how: Preference) -> jax.Array:
    """-(1-ε) log σ(βx) - ε log σ(-βx), with x = log π_c - log π_r   (CPO, arXiv:2401.08417, eq. 3)."""
    return _smoothed(how.beta * _gap(pairs, how, means=False), how)


def cpo_hinge(pairs: Pairs, how: Preference) -> jax.Array:
    """max(0, 1 - β (log π_c - log π_r))   (SLiC-HF, arXiv:2305.10425)."""
    return jax.nn.relu(1 - how.beta * _gap(pairs, how, means=False))


def cpo_ipo(pairs: Pairs, how: Preference) -> jax.Array:
    """(log π_c / n_c - log π_r / n_r - 1/2β)^2   (IPO's, arXiv:2310.12036, eq. 17)."""
    return jnp.square(_gap(pairs, how, means=True) - 1 / (2 * how.beta))


def simpo(pairs: Pairs, how: Preference) -> jax.Array:
    """As `cpo`, with βx = β (log π_c / n_c - log π_r / n_r) - γ   (SimPO, arXiv:2405.14734, eq. 6; AlphaPO,
    arXiv:2501.03884).
    """
    return _smoothed(how.beta * _gap(pairs, how, means=True) - how.simpo_gamma, how)


def orpo(pairs: Pairs, how: Preference) -> jax.Array:
    """-β log σ(log odds_c - log odds_r), odds = p/(1-p) of p = π^(1/n)   (ORPO, arXiv:2403.07691, eq. 7, whose λ is β).

    Its other term, the likelihood of prompt and chosen answer, comes with `nll_weight` 1.
    """
    return -how.beta * log_sigmoid(log_odds(pairs))


LOSSES: dict[str, Callable[[Pairs, Preference], jax.Array]] = {
    "sigmoid": sigmoid_loss,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sft": sft,
    "sigmoid_norm": sigmoid_norm,
    "cpo": cpo,
    "cpo_hinge": cpo_hinge,
    "cpo_ipo": cpo_ipo,
    "simpo": simpo,
    "orpo": orpo,
}
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# Those that any f-divergence goes with; that ε acts on; that know no reference; that take means and not sums of log π.
OF_DIFFERENCE = frozenset({"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"})
SMOOTHED = frozenset({"robust", "exo_pair", "aot", "aot_unpaired", "cpo", "simpo"})
OF_POLICY = frozenset({"cpo", "cpo_hinge", "cpo_ipo", "simpo", "orpo"})
OF_MEANS = frozenset({"cpo_ipo", "simpo", "orpo"})
MAY_BE_FREE = OF_DIFFERENCE | OF_POLICY | {"apo_zero", "apo_down"}  # the others are about the reference itself


def log_ratios(pairs: Pairs) -> tuple[jax.Array, jax.Array]:
    """l_c and l_r; log π itself without a reference."""
    if pairs.reference is None:
        return pairs.chosen_P, pairs.rejected_P
    return pairs.chosen_P - pairs.reference[0], pairs.rejected_P - pairs.reference[1]


def policy_logps(pairs: Pairs, *, means: bool) -> tuple[jax.Array, jax.Array]:
    """log π of both answers, or its mean over their tokens."""
    if not means:
        return pairs.chosen_P, pairs.rejected_P
    return _by_token(pairs, pairs.chosen_P, pairs.rejected_P)


def policy_scores(pairs: Pairs, how: Preference, *, means: bool) -> tuple[jax.Array, jax.Array]:
    """What takes the place of rewards without a reference: `policy_logps`, in AlphaPO's form if asked for."""
    logps, a = policy_logps(pairs, means=means), how.alpha
    if not a:
        return logps
    chosen_P, rejected_P = ((1 - jnp.exp(-a * x_P)) / a for x_P in logps)
    return chosen_P, rejected_P


def log_odds(pairs: Pairs) -> jax.Array:
    """log odds_c - log odds_r of the mean log-probabilities of a token, as `orpo` has them."""

    def one(mean_P: jax.Array) -> jax.Array:
        mean_P = jnp.minimum(mean_P, -1e-7)  # a pair that only fills the batch has 0, where log(1 - p) has no gradient
        few_P = jnp.log1p(-jnp.exp(jnp.minimum(mean_P, -0.5)))
        return mean_P - jnp.where(mean_P < -0.5, few_P, jnp.log(-jnp.expm1(mean_P)))

    chosen_P, rejected_P = policy_logps(pairs, means=True)
    return one(chosen_P) - one(rejected_P)


def over_pairs(x_P: jax.Array, pairs: Pairs) -> Sum:
    """The sum over pairs that do not only fill the batch."""
    return Sum(jnp.where(pairs.live_P > 0, x_P, 0.0).sum(), pairs.live_P.sum())


def _difference(pairs: Pairs, how: Preference, *, by_token: bool = False) -> jax.Array:
    """d = s_c - s_r; or with each s divided by its answer's number of tokens."""
    chosen_P, rejected_P = (_score(x_P, how) for x_P in log_ratios(pairs))
    if by_token:
        chosen_P, rejected_P = _by_token(pairs, chosen_P, rejected_P)
    return chosen_P - rejected_P


def _score(ratio_P: jax.Array, how: Preference) -> jax.Array:
    """f'(e^l) for the f of a divergence (arXiv:2309.16240): l; 1 - e^-l; log 2 + log σ(l);
    (e^((a-1)l) - 1)/(a-1), whose exponent ends at 80, where float32 does soon after, and which is l for a = 1.
    """
    if how.f_divergence_type == "forward_kl":
        return 1 - jnp.exp(-ratio_P)
    if how.f_divergence_type == "js_divergence":
        return math.log(2) + log_sigmoid(ratio_P)
    less = how.f_alpha_divergence_coef - 1
    if how.f_divergence_type == "reverse_kl" or abs(less) < 1e-6:
        return ratio_P
    return (jnp.exp(jnp.minimum(less * ratio_P, 80.0)) - 1) / less


def _by_token(pairs: Pairs, chosen_P: jax.Array, rejected_P: jax.Array) -> tuple[jax.Array, jax.Array]:
    return chosen_P / jnp.maximum(pairs.chosen_tokens_P, 1), rejected_P / jnp.maximum(pairs.rejected_tokens_P, 1)


def _gap(pairs: Pairs, how: Preference, *, means: bool) -> jax.Array:
    chosen_P, rejected_P = policy_scores(pairs, how, means=means)
    return chosen_P - rejected_P


def _smoothed(x_P: jax.Array, how: Preference) -> jax.Array:
    return -(1 - how.label_smoothing) * log_sigmoid(x_P) - how.label_smoothing * log_sigmoid(-x_P)


def _by_rank(first_P: jax.Array, second_P: jax.Array, live_P: jax.Array) -> jax.Array:
    """Each of `first` minus that of `second` which has the same rank among the live ones."""
    order_P, others_P = (jnp.argsort(jnp.where(live_P > 0, x_P, jnp.inf)) for x_P in (first_P, second_P))
    rank_P = jnp.argsort(order_P)
    return first_P - second_P[others_P][rank_P]


def _problems(how: Preference) -> Iterator[str]:
    """What is wrong with the settings, a line for each."""
    types, smoothing = set(how.loss_type), how.label_smoothing
    if unknown := sorted(types - set(LOSSES)):
        yield f"loss_type: {unknown} is not known; there are {', '.join(LOSSES)}"
    if not types:
        yield "loss_type is empty; name one or more losses"
    if how.loss_weights is not None and len(how.loss_weights) != len(how.loss_type):
        yield f"loss_weights: {len(how.loss_weights)} for {len(how.loss_type)} of loss_type; give one for each"
    if not how.beta > 0:
        yield f"beta: {how.beta} is not above 0"
    if types & OF_POLICY and (others := sorted(types - OF_POLICY - {"sft"})):
        yield f"loss_type: {sorted(types & OF_POLICY)} have no reference and do not go with {others}"
    if len(types & OF_POLICY) > 1 and len({name in OF_MEANS for name in types & OF_POLICY}) > 1:
        yield f"loss_type: {sorted(types & OF_POLICY)} differ in whether log-probabilities are sums or means; name one"
    if how.f_divergence_type not in F_DIVERGENCES:
        yield f"f_divergence_type: {how.f_divergence_type!r} is none of {', '.join(F_DIVERGENCES)}"
    if how.f_divergence_type != "reverse_kl" and (others := sorted(types - OF_DIFFERENCE)):
        yield f"f_divergence_type: {how.f_divergence_type} has no meaning for loss_type {others}; use reverse_kl"
    if how.use_weighting and types & {"aot", "aot_unpaired"}:
        yield "use_weighting: aot and aot_unpaired sort over the batch, so that there is no pair to weight; turn it off"
    if smoothing and not types & SMOOTHED:
        yield f"label_smoothing: {smoothing} has no effect on {sorted(types)}; it has on {', '.join(sorted(SMOOTHED))}"
    if not 0 <= smoothing <= 1 or ("robust" in types and smoothing >= 0.5):
        yield f"label_smoothing: {smoothing} is no share of labels; 0 to 1, and for robust below 0.5"
    if "exo_pair" in types and not 0 < smoothing < 1:
        yield f"label_smoothing: {smoothing} with exo_pair, which takes its logarithm; 0.001 is the paper's"
    if how.reference_free and (others := sorted(types - MAY_BE_FREE)):
        yield f"reference_free: {others} of loss_type compare with the reference itself; turn it off"
