"""What answers are worth, from their rewards and those of other answers to the same prompt: numpy, on the host.

N answers, G to each prompt, next to one another; F reward functions. A reward is NaN where a function has no opinion.
An answer of which no function has one is no part of any mean or deviation, and its advantage is 0. Deviations are of
samples (divided by one less than the number), so of fewer than two rewards there is none, and advantages are 0.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

log = logging.getLogger(__name__)

TRL_EPS, VERL_EPS = 1e-4, 1e-6  # added to deviations that are divided by
NO_DIFFERENCE = 1e-8  # a deviation that is none
SCALES = ("group", "batch", "none")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
ESTIMATORS = ("grpo", "grpo_vectorized", "rloo")


class Valued(NamedTuple):
    """What answers are worth: the advantage of each [N], which of their groups tell anything [N / G], and the log's."""

    advantages: np.ndarray
    informative: np.ndarray
    logged: dict[str, float]


def advantages(
    rewards: np.ndarray,
    *,
    names: Sequence[str],
    weights: Sequence[float],
    group: int,
    scale: str = "group",
    aggregation: str = "sum_then_normalize",
) -> Valued:
    """Advantages by TRL's rules (1.16), and what it logs, from rewards [N, F]; ValueError for other words or sizes.

    sum_then_normalize: rewards are added up with their weights and compared with the group's mean, by the group's
    deviation, by that of all answers ("batch"), or by nothing. normalize_then_sum: each function's are compared in each
    group, by its deviation, added up with their weights, and compared once more with all answers (GDPO,
    arXiv:2601.05242, where `scale` has no effect).
    """
    _one_of("scale_rewards", scale, SCALES)
    _one_of("multi_objective_aggregation", aggregation, AGGREGATIONS)
    rewards = _checked(rewards, names, weights, group)
    weighted_N = _weighted(rewards, weights)
    grouped = weighted_N.reshape(-1, group)
    if aggregation == "normalize_then_sum":
        each = rewards.reshape(-1, group, len(names))
        deviations = _deviation(each, axis=1)
        compared = ((each - _mean(each, axis=1)) / (deviations + TRL_EPS)).reshape(rewards.shape)
        # What cannot be compared, a group's only opinion, counts as 0 here; an answer without any is left out.
        summed_N = np.where(np.isnan(weighted_N), np.nan, np.nansum(compared * np.asarray(weights), axis=1))
        used = np.broadcast_to(_deviation(summed_N, axis=0), summed_N.shape)
        found = (summed_N - _mean(summed_N, axis=0)) / (used + TRL_EPS)
        informative = (deviations > NO_DIFFERENCE).any(axis=(1, 2))
    else:
        deviations = _deviation(grouped, axis=1)
        over = _deviation(weighted_N, axis=0) if scale == "batch" else deviations
        used = np.broadcast_to(over, grouped.shape).reshape(-1)
        divisor = 1.0 if scale == "none" else over + TRL_EPS
        found = ((grouped - _mean(grouped, axis=1)) / divisor).reshape(-1)
        informative = deviations[:, 0] > NO_DIFFERENCE
    logged = _logged(rewards, weighted_N, used, names)
    return Valued(np.nan_to_num(found, nan=0.0), np.asarray(informative), logged)


def verl_advantages(
    rewards: np.ndarray,
    lengths: np.ndarray,
    *,
    names: Sequence[str],
    group: int,
    estimator: str = "grpo",
    by_std: bool = True,
    penalties: np.ndarray | None = None,
) -> Valued:
    """Advantages by verl's rules (0.7), from rewards [N, F] that are added up, less `penalties` [N] for how far answers
    went from the reference (`grpo.divergences` times a coefficient); ValueError for other words or sizes.

    grpo: compared with the group's mean, and with `by_std` by its deviation (without: Dr. GRPO, arXiv:2503.20783).
    grpo_vectorized: the same with a variance of at least 1e-6. rloo: compared with the mean of the group's others
    (arXiv:2402.14740). A group of one, as evaluation may have, tells nothing. Logs what `advantages` does, and verl's
    `critic/…`, of which advantages are means over tokens, `lengths` [N] to an answer.
    """
    _one_of("algorithm.adv_estimator", estimator, ESTIMATORS)
    rewards = _checked(rewards, names, (1.0,) * len(names), group)
    scores_N = _weighted(rewards, (1.0,) * len(names))
    kept_N = scores_N if penalties is None else scores_N - penalties
    grouped = kept_N.reshape(-1, group)
    apart = grouped - _mean(grouped, axis=1)
    deviations = _deviation(grouped, axis=1)
    if estimator == "rloo":
        count = (~np.isnan(grouped)).sum(axis=1, keepdims=True)
        apart = apart * count / np.maximum(count - 1, 1)
    elif by_std:
        floor = VERL_EPS**0.5 if estimator == "grpo_vectorized" else 0.0
        apart = apart / (np.maximum(deviations, floor) + VERL_EPS)
    found = np.nan_to_num(apart.reshape(-1), nan=0.0)
    used = np.broadcast_to(deviations, grouped.shape).reshape(-1)
    logged = _logged(rewards, scores_N, used, names)
    logged |= _spread("critic/score", scores_N) | _spread("critic/rewards", kept_N)
    logged |= _spread("critic/advantages", np.repeat(found, lengths))
    return Valued(found, deviations[:, 0] > NO_DIFFERENCE, logged)


def next_coefficient(coefficient: float, divergence: float, *, target: float, horizon: int, answers: int) -> float:
    """The weight of a divergence that is to be held at `target`, after so many more answers, whose mean was
    `divergence` (arXiv:1909.08593, section 2.2, with verl's bounds).
    """
    error = float(np.clip(divergence / target - 1, -0.2, 0.2))
    return coefficient * (1 + error * answers / horizon)


def _checked(rewards: np.ndarray, names: Sequence[str], weights: Sequence[float], group: int) -> np.ndarray:
    rewards = np.asarray(rewards, np.float64)
    assert rewards.shape == (len(rewards), len(names)), rewards.shape
    assert len(rewards) % group == 0, (len(rewards), group)
    if len(weights) != len(names):
        raise ValueError(
            f"reward_weights: got {len(weights)}; allowed: one for each of the {len(names)} reward functions"
        )
    without = np.flatnonzero(np.isnan(rewards).all(axis=1))
    if len(without):
        log.warning(
            "no reward function has an opinion of %d of %d answers: they teach nothing", len(without), len(rewards)
        )
    return rewards


def _one_of(name: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise ValueError(f"{name}: got {given}; allowed: {', '.join(allowed)}")


def _weighted(rewards: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """The weighted sum of each answer's rewards [N], NaN where there are none."""
    total_N = np.nansum(rewards * np.asarray(weights, np.float64), axis=1)
    return np.where(np.isnan(rewards).all(axis=1), np.nan, total_N)


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean of what is there, NaN of nothing; the axis stays, with length 1."""
    count = (~np.isnan(values)).sum(axis=axis, keepdims=True)
    total = np.nansum(values, axis=axis, keepdims=True)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _deviation(values: np.ndarray, axis: int) -> np.ndarray:
    """The standard deviation of what is there, NaN of fewer than two, but 0 where there is no more than one to be had;
    the axis stays, with length 1.
    """
    if values.shape[axis] == 1:
        return np.zeros_like(values)
    count = (~np.isnan(values)).sum(axis=axis, keepdims=True)
    squares = np.nansum(np.square(values - _mean(values, axis)), axis=axis, keepdims=True)
    return np.sqrt(np.where(count > 1, squares / np.maximum(count - 1, 1), np.nan))


def _logged(
    rewards: np.ndarray, weighted_N: np.ndarray, deviations_N: np.ndarray, names: Sequence[str]
) -> dict[str, float]:
    """What TRL logs of rewards, under its names; NaN of what nothing is known of."""
    found = {}
    for i, name in enumerate(names):
        found[f"rewards/{name}/mean"], found[f"rewards/{name}/std"] = _moments(rewards[:, i])
    found["reward"], found["reward_std"] = _moments(weighted_N)
    found["frac_reward_zero_std"] = float((deviations_N <= NO_DIFFERENCE).mean())
    return found


def _moments(values: np.ndarray) -> tuple[float, float]:
    there = values[~np.isnan(values)]
    mean = float(there.mean()) if len(there) else float("nan")
    return mean, float(there.std(ddof=1)) if len(there) > 1 else float("nan")


def _spread(name: str, values: np.ndarray) -> dict[str, float]:
    there = values[~np.isnan(values)]
    kinds = (("mean", np.mean), ("max", np.max), ("min", np.min))
    return {f"{name}/{kind}": float(of(there)) if len(there) else float("nan") for kind, of in kinds}
