"""What answers are worth: TRL's and verl's numbers, worked out by hand, and what holds for all rewards."""

import logging
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.advantages import Valued, advantages, next_coefficient, verl_advantages

NAN = float("nan")


def of_trl(rewards, *, group, weights=None, **how) -> Valued:
    rewards = np.array(rewards, np.float64)
    rewards = rewards[:, None] if rewards.ndim == 1 else rewards
    names = ("right", "short", "kind")[: rewards.shape[1]]
    return advantages(rewards, names=names, weights=weights or (1.0,) * len(names), group=group, **how)


def of_verl(rewards, *, group, lengths=None, **how) -> Valued:
    rewards = np.array(rewards, np.float64)[:, None]
    lengths = np.ones(len(rewards), int) if lengths is None else np.array(lengths)
    return verl_advantages(rewards, lengths, names=("right",), group=group, **how)


def test_a_group_of_one_right_and_three_wrong_answers_by_hand():
    # mean 1/4; squares 9/16 + 3/16 = 3/4 over 3 is 1/4, so the deviation is 1/2
    found = of_trl([1, 0, 0, 0], group=4)
    np.testing.assert_allclose(found.advantages, np.array([0.75, -0.25, -0.25, -0.25]) / 0.5001, rtol=1e-12)
    assert found.informative.tolist() == [True]
    assert found.logged == {
        "rewards/right/mean": 0.25,
        "rewards/right/std": 0.5,
        "reward": 0.25,
        "reward_std": 0.5,
        "frac_reward_zero_std": 0.0,
    }


def test_groups_are_compared_within_and_divided_by_their_own_deviation_all_or_none():
    rewards = [1, 0, 5, 5]  # the groups' means are 0.5 and 5; of all the deviation is sqrt(20.75 / 3)
    own, all_over = math.sqrt(0.5) + 1e-4, math.sqrt(20.75 / 3) + 1e-4
    for scale, divisor in (("group", own), ("batch", all_over), ("none", 1.0)):
        found = of_trl(rewards, group=2, scale=scale)
        np.testing.assert_allclose(found.advantages, [0.5 / divisor, -0.5 / divisor, 0, 0], rtol=1e-12)
        assert found.informative.tolist() == [True, False]
        assert found.logged["frac_reward_zero_std"] == (0.0 if scale == "batch" else 0.5)


def test_rewards_of_several_functions_are_weighed_and_added_up_where_there_are_any():
    rewards = [[1, 10, NAN], [0, NAN, NAN]]  # with these weights 2 + 5 and 0
    found = of_trl(rewards, group=2, weights=(2.0, 0.5, 1.0), scale="none")
    np.testing.assert_allclose(found.advantages, [3.5, -3.5], rtol=1e-12)
    assert found.logged["reward"] == 3.5
    assert found.logged["rewards/short/mean"] == 10
    assert math.isnan(found.logged["rewards/short/std"])
    assert math.isnan(found.logged["rewards/kind/mean"])


def test_functions_compared_each_for_itself_count_alike_whatever_their_range():
    # In each group the first function's values are ±1/2 about their mean, the second's ±50, in the other order in the
    # second group: the sums are 2c, -2c, 0, 0 with c about 1/sqrt(2), whose mean is 0.
    rewards = [[1, 100], [0, 0], [1, 0], [0, 100]]
    c = np.array([0.5 / (math.sqrt(0.5) + 1e-4), 50 / (math.sqrt(5000) + 1e-4)])
    sums = np.array([c.sum(), -c.sum(), c[0] - c[1], c[1] - c[0]])
    expected = sums / (math.sqrt((sums**2).sum() / 3) + 1e-4)
    found = of_trl(rewards, group=2, aggregation="normalize_then_sum")
    np.testing.assert_allclose(found.advantages, expected, rtol=1e-10)
    assert found.informative.tolist() == [True, True]


def test_a_groups_only_opinion_compares_with_nothing_and_counts_as_zero_among_all_answers():
    # One reward has no deviation: with c = 0.5 / (sqrt(0.5) + 1e-4) the sums are c, -c, 0 and none.
    c = 0.5 / (math.sqrt(0.5) + 1e-4)
    found = of_trl([1, 0, 5, NAN], group=2, aggregation="normalize_then_sum")
    np.testing.assert_allclose(found.advantages, np.array([c, -c, 0, 0]) / (c + 1e-4), rtol=1e-12)
    assert found.informative.tolist() == [True, False]


def test_an_answer_without_an_opinion_is_no_part_of_its_group_and_teaches_nothing(caplog):
    with caplog.at_level(logging.WARNING):
        found = of_trl([1, NAN, 0, NAN, NAN, 7], group=3)
    deviation = math.sqrt(0.5) + 1e-4
    np.testing.assert_allclose(found.advantages, [0.5 / deviation, 0, -0.5 / deviation, 0, 0, 0], rtol=1e-12)
    assert found.informative.tolist() == [True, False]
    assert [record.getMessage() for record in caplog.records] == [
        "no reward function has an opinion of 3 of 6 answers: they teach nothing"
    ]


def test_where_nobody_has_an_opinion_all_advantages_are_zero():
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        found = of_trl([NAN, NAN], group=2, aggregation=aggregation)
        assert found.advantages.tolist() == [0, 0]
        assert found.informative.tolist() == [False]
        assert math.isnan(found.logged["reward"])


def test_verl_divides_by_a_deviation_with_a_smaller_epsilon():
    found = of_verl([1, 0, 0, 0], group=4, lengths=[3, 1, 1, 1])
    expected = np.array([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-6)
    np.testing.assert_allclose(found.advantages, expected, rtol=1e-12)
    assert found.logged["critic/score/mean"] == 0.25
    assert found.logged["critic/rewards/max"] == 1
    assert found.logged["critic/advantages/mean"] == pytest.approx((3 * 0.75 - 0.75) / 6 / (0.5 + 1e-6))
    np.testing.assert_allclose(of_verl([1, 0, 0, 0], group=4, by_std=False).advantages, [0.75, -0.25, -0.25, -0.25])


def test_a_variance_below_a_millionth_counts_as_one_in_the_vectorized_estimator_only():
    small = [1.0, 1.0001]  # the deviation is 7.07e-5
    np.testing.assert_allclose(
        of_verl(small, group=2, estimator="grpo_vectorized").advantages, [-5e-5 / 1.001e-3, 5e-5 / 1.001e-3], rtol=1e-9
    )
    assert abs(of_verl(small, group=2).advantages[1]) == pytest.approx(5e-5 / (math.sqrt(5e-9) + 1e-6), rel=1e-9)


def test_leave_one_out_compares_with_the_mean_of_the_others():
    # 3 against (0 + 0) / 2, and each 0 against (3 + 0) / 2
    np.testing.assert_allclose(of_verl([3, 0, 0], group=3, estimator="rloo").advantages, [3, -1.5, -1.5])


def test_a_divergence_from_the_reference_is_taken_off_before_answers_are_compared():
    found = of_verl([1, 1], group=2, by_std=False, penalties=np.array([0.2, 0.0]))
    np.testing.assert_allclose(found.advantages, [-0.1, 0.1])
    assert found.logged["critic/score/mean"] == 1
    assert found.logged["critic/rewards/mean"] == pytest.approx(0.9)
    assert found.informative.tolist() == [True]


def test_a_group_of_one_as_evaluation_may_have_tells_nothing():
    for found in (of_trl([3, 4], group=1), of_verl([3, 4], group=1), of_verl([3, 4], group=1, estimator="rloo")):
        assert found.advantages.tolist() == [0, 0]
        assert found.informative.tolist() == [False, False]
        assert found.logged["reward"] == 3.5


def test_a_weight_that_moves_after_a_target_moves_by_a_fifth_of_its_horizon_at_most():
    assert next_coefficient(0.1, 0.5, target=0.1, horizon=1000, answers=100) == pytest.approx(0.1 * 1.02)
    assert next_coefficient(0.1, 0.11, target=0.1, horizon=1000, answers=100) == pytest.approx(0.1 * 1.01)
    assert next_coefficient(0.1, 0.0, target=0.1, horizon=1000, answers=100) == pytest.approx(0.1 * 0.98)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"scale": "all"}, "scale_rewards: got all; allowed: group, batch, none"),
        ({"aggregation": "sum"}, "multi_objective_aggregation: got sum; allowed: sum_then_normalize, normalize"),
        ({"weights": (1.0, 2.0)}, "reward_weights: got 2; allowed: one for each of the 1 reward functions"),
    ],
)
def test_other_words_and_sizes_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        of_trl([1, 0], group=2, **settings)


def test_another_estimator_is_refused():
    with pytest.raises(ValueError, match="adv_estimator: got gae; allowed: grpo, grpo_vectorized, rloo"):
        of_verl([1, 0], group=2, estimator="gae")


REWARD = st.floats(-100, 100) | st.just(NAN)


@given(rewards=st.lists(st.lists(REWARD, min_size=2, max_size=2), min_size=4, max_size=12), shift=st.floats(-10, 10))
@settings(deadline=None, max_examples=50)
def test_advantages_are_finite_sum_to_nothing_in_a_group_and_do_not_see_what_is_added_to_all(rewards, shift):
    rewards = np.array(rewards[: len(rewards) // 4 * 4])
    for scale in ("group", "batch", "none"):
        found = of_trl(rewards, group=4, scale=scale).advantages
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found.reshape(-1, 4).sum(axis=1), 0, atol=1e-8)
        first_alone = np.column_stack([rewards[:, 0], np.full(len(rewards), NAN)])
        plain, moved = (of_trl(first_alone + by, group=4, scale=scale).advantages for by in (0, shift))
        np.testing.assert_allclose(moved, plain, atol=1e-6)
