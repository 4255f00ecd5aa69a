"""Advantages, and what is logged of rewards, against TRL's GRPOTrainer: rewards at random, some without an opinion."""

import itertools
import tempfile
import warnings
from typing import Any

import numpy as np
import pytest

from trainers.advantages import AGGREGATIONS, SCALES, advantages

ANSWERS, GROUP = 12, 4
NAMES = ("right", "short", "kind")
WEIGHTS = ((1.0, 1.0, 1.0), (0.5, 2.0, 0.0))


@pytest.fixture(scope="module")
def trainer(tiny_chat_model) -> Any:
    """TRL's, which answers the same to every prompt and is told its rewards in `said`, [N, F] with None."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    class Answering(GRPOTrainer):
        said: list[list[float | None]]

        def _tokenize_prompts(self, prompts: list[Any]) -> Any:
            return [[5, 6]] * len(prompts), None, {}

        def _generate_single_turn(self, prompt_ids: list[Any], *_: Any) -> Any:
            return [[7, 2]] * len(prompt_ids), None

    def reward(place: int) -> Any:
        def said(**_: Any) -> list[float | None]:
            return [row[place] for row in found.said]

        said.__name__ = NAMES[place]
        return said

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle's own deprecations are not ours to answer for
        found = Answering(
            model=AutoModelForCausalLM.from_pretrained(tiny_chat_model),
            reward_funcs=[reward(place) for place in range(len(NAMES))],
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=ANSWERS,
                num_generations=GROUP,
                max_completion_length=4,
                use_cpu=True,
                bf16=False,
                report_to="none",
            ),
            train_dataset=Dataset.from_list([{"prompt": "how?"}] * ANSWERS),
            processing_class=AutoTokenizer.from_pretrained(tiny_chat_model),
        )
    assert found.model is not None
    found.model.train()
    return found


def tables() -> dict[str, np.ndarray]:
    """Rewards [N, F], of very different ranges, as TRL keeps them: float32."""
    random = np.random.default_rng(0)
    plain = random.normal(size=(ANSWERS, len(NAMES))) * (0.1, 1.0, 30.0)
    gaps = np.where(random.random(plain.shape) < 0.3, np.nan, plain)
    few = plain.copy()
    few[:4], few[5:8], few[:, 1] = np.nan, np.nan, np.nan  # nobody of a group, one of a group; a silent function
    alike = plain.copy()
    alike[:4] = 1.0
    found = {
        "plain": plain,
        "gaps": gaps,
        "few": few,
        "alike": alike,
        "few words": np.sign(gaps),
        "none": np.full(plain.shape, np.nan),
    }
    return {name: table.astype(np.float32).astype(np.float64) for name, table in found.items()}


@pytest.mark.parametrize("name", tables())
def test_advantages_and_what_is_logged_of_rewards_are_those_of_trl(name, trainer):
    import torch

    rewards = tables()[name]
    for scale, aggregation, weights in itertools.product(SCALES, AGGREGATIONS, WEIGHTS):
        trainer.scale_rewards, trainer.multi_objective_aggregation = scale, aggregation
        trainer.reward_weights = torch.tensor(weights)
        trainer.said = [[None if np.isnan(reward) else float(reward) for reward in row] for row in rewards]
        trainer._metrics["train"].clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = trainer._generate_and_score_completions([{"prompt": "how?"}] * ANSWERS)["advantages"].numpy()
        found = advantages(rewards, names=NAMES, weights=weights, group=GROUP, scale=scale, aggregation=aggregation)
        np.testing.assert_allclose(found.advantages, expected, rtol=1e-5, atol=1e-5)
        logged = {key: trainer._metrics["train"][key][-1] for key in found.logged}
        assert found.logged == pytest.approx(logged, rel=1e-5, abs=1e-6, nan_ok=True)
