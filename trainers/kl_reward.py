"""Rewards that are lowered by how far an answer went from the reference: verl's `algorithm.use_kl_in_reward`.

N answers, M microbatches of B answers, L positions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainers.advantages import next_coefficient
from trainers.step import TrainState


@dataclass
class KlPenalty:
    """`measure(state, frozen, batch [M, B, L])` gives for each answer the sum of its tokens' divergences and their
    mean, [M, B]; `coefficient` is the weight of the sum. With a `target`, the weight changes with each generation so
    that the mean comes near it, within about `horizon` answers.
    """

    measure: Callable[[TrainState, Any, Mapping[str, np.ndarray]], tuple[np.ndarray, np.ndarray]]
    coefficient: float
    target: float | None = None
    horizon: int = 10_000

    def __call__(
        self, state: TrainState, frozen: Any, batch: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, dict[str, float]]:
        """What the rewards of these answers lose [N], and verl's metrics of it."""
        sums_N, means_N = (np.asarray(found, np.float64).reshape(-1) for found in self.measure(state, frozen, batch))
        divergence = float(means_N.mean())
        logged = {"actor/reward_kl_penalty": divergence, "actor/reward_kl_penalty_coeff": self.coefficient}
        penalties_N = self.coefficient * sums_N
        if self.target is not None:
            self.coefficient = next_coefficient(
                self.coefficient, divergence, target=self.target, horizon=self.horizon, answers=len(sums_N)
            )
        return penalties_N, logged
