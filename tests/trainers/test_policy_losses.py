"""Losses of the policy's own answers: by hand on two tokens, verl's numbers, and what holds for all of them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainers.losses import Sum
from trainers.policy_losses import LOSSES, Answers, GroupPolicy, group_policy_loss
from trainers.policy_verl import (
    AGGREGATIONS,
    ESTIMATES,
    LOSS_MODES,
    VerlPolicy,
    aggregated,
    kl_estimate,
    verl_policy_loss,
)


def answers(ratios: Any, advantages: Any, **more: Any) -> Answers:
    """Answers whose every token has e^-1 for the policy that answered, and that times a ratio for the policy; ratios
    of 0 are no tokens.
    """
    ratios = jnp.asarray(ratios, jnp.float32)
    weights = (ratios > 0).astype(jnp.float32)
    old = -weights
    return Answers(
        logprob=jnp.where(weights > 0, jnp.log(jnp.where(weights > 0, ratios, 1.0)) - 1, 0.0),
        old=old,
        sampled=more.pop("sampled", old),
        advantages=weights * jnp.asarray(advantages, jnp.float32)[:, None],
        entropy=more.pop("entropy", weights),
        weights=weights,
        live=jnp.ones(len(ratios)),
        **more,
    )


def loss_of(x: Answers, **settings: Any) -> float:
    return float(group_policy_loss(x, GroupPolicy(**settings))[0].mean())


def metrics_of(x: Answers, **settings: Any) -> dict[str, float]:
    return {name: float(each.mean()) for name, each in group_policy_loss(x, GroupPolicy(**settings))[1].items()}


def test_ratios_of_a_good_answer_gain_up_to_the_bound_and_those_of_a_bad_one_lose_without_one():
    assert loss_of(answers([[1.5, 0.5]], [1]), loss_type="dapo") == pytest.approx(-(1.2 + 0.5) / 2)
    bad = answers([[1.5, 0.5]], [-1])
    assert loss_of(bad, loss_type="dapo") == pytest.approx((1.5 + 0.8) / 2)
    assert loss_of(bad, loss_type="dapo", delta=1.25) == pytest.approx((1.25 + 0.8) / 2)
    assert metrics_of(bad, loss_type="dapo")["clip_ratio/low_mean"] == 0.5


def test_the_ratio_of_a_whole_answer_is_the_geometric_mean_of_its_tokens():
    x = answers([[1.5, 0.6]], [1])
    assert loss_of(x, loss_type="grpo", importance_sampling_level="sequence") == pytest.approx(-math.sqrt(0.9))


def test_what_losses_are_divided_by():
    # Of the first answer every token costs -1, of the second 0.5; they have one and three tokens.
    x = answers([[1, 0, 0], [1, 1, 1]], [1, -0.5])
    assert loss_of(x, loss_type="grpo") == pytest.approx((-1 + 0.5) / 2)
    assert loss_of(x, loss_type="dapo") == pytest.approx((-1 + 1.5) / 4)
    assert loss_of(x, loss_type="bnpo") == pytest.approx((-1 + 1.5) / 4)
    assert loss_of(x, loss_type="luspo") == pytest.approx((-1 + 1.5) / 2)
    assert loss_of(x, loss_type="dr_grpo", max_completion_length=10) == pytest.approx((-1 + 1.5) / 20)


def test_cispo_weighs_log_probabilities_by_a_ratio_without_gradient():
    x = answers([[1.5, 3.0]], [1])
    expected = -(1.5 * (math.log(1.5) - 1) + 2 * (math.log(3) - 1)) / 2

    def loss(logprob: jax.Array) -> jax.Array:
        return group_policy_loss(x._replace(logprob=logprob), GroupPolicy(loss_type="cispo", epsilon_high=2.0))[
            0
        ].mean()

    value, gradient = jax.value_and_grad(loss)(x.logprob)
    assert float(value) == pytest.approx(expected)
    np.testing.assert_allclose(gradient, [[-1.5 / 2, -2.0 / 2]], rtol=1e-6)


def test_a_ratio_of_one_weighs_one_in_sapo_and_vespo():
    x = answers([[1, 1]], [1])
    assert loss_of(x, loss_type="sapo") == pytest.approx(-2)  # (4 / 1) σ(0)
    assert loss_of(x, loss_type="vespo") == pytest.approx(1)  # -φ(1) A log π, log π = -1
    assert metrics_of(x, loss_type="vespo")["vespo/phi_seq_mean"] == 1


def test_a_reference_twice_as_likely_costs_its_k3_weighed_by_the_ratio_or_not():
    x = answers([[1.1]], [0], reference=jnp.log(jnp.array([[2.2]])) - 1)
    k3 = 2 - math.log(2) - 1
    assert loss_of(x, loss_type="grpo", beta=0.5) == pytest.approx(0.5 * 1.1 * k3)
    assert loss_of(x, loss_type="grpo", beta=0.5, use_bias_correction_kl=False) == pytest.approx(0.5 * k3)


def test_a_sampler_that_disagrees_is_weighed_within_bounds_or_left_out_and_always_logged():
    old = answers([[1, 1]], [1])
    x = old._replace(sampled=old.old - jnp.log(jnp.array([[2.0, 5.0]])))
    found = metrics_of(x, loss_type="dapo")
    assert found["sampling/sampling_logp_difference/mean"] == pytest.approx((math.log(2) + math.log(5)) / 2)
    assert found["sampling/sampling_logp_difference/max"] == pytest.approx(math.log(5))
    for mode, weights in (
        ("token_truncate", (2, 3)),
        ("token_mask", (2, 0)),
        ("sequence_truncate", (3, 3)),
        ("sequence_mask", (0, 0)),
    ):
        assert loss_of(x, loss_type="dapo", sampler_correction=mode) == pytest.approx(-sum(weights) / 2, abs=1e-6)


def test_an_answer_that_was_cut_off_counts_as_a_row_and_costs_nothing():
    x = answers([[1, 1], [0, 0]], [1, 1])
    assert loss_of(x, loss_type="grpo") == pytest.approx(-0.5)
    assert (
        float(group_policy_loss(x._replace(live=jnp.array([1.0, 0.0])), GroupPolicy(loss_type="grpo"))[0].mean()) == -1
    )


ALL_TRL = [
    {"loss_type": name, "importance_sampling_level": level, "max_completion_length": 8, "beta": 0.1}
    for name in LOSSES
    for level in ("token", "sequence")
]
ALL_VERL = [
    {"loss_mode": mode, "loss_agg_mode": how, "loss_scale_factor": 8, "use_kl_loss": True}
    for mode in LOSS_MODES
    for how in (AGGREGATIONS[0], AGGREGATIONS[2])
]


def drawn(seed: int = 0, B: int = 4, L: int = 5) -> Answers:
    random = np.random.default_rng(seed)
    weights = (np.arange(L)[None, :] < np.array([5, 1, 0, 3])[:, None]).astype(np.float32)
    values = {
        name: jnp.asarray(weights * random.normal(-1, 0.5, (B, L)), jnp.float32)
        for name in ("logprob", "old", "sampled", "reference", "entropy")
    }
    return Answers(
        **values,
        advantages=jnp.asarray(weights * random.normal(size=(B, 1)), jnp.float32),
        weights=jnp.asarray(weights),
        live=jnp.ones(B),
    )


@pytest.mark.parametrize("settings", ALL_TRL + ALL_VERL, ids=lambda s: " ".join(str(value) for value in s.values()))
def test_microbatches_whose_other_rows_only_fill_add_up_to_the_whole(settings):
    how = GroupPolicy(**settings) if "loss_type" in settings else VerlPolicy(**settings)
    loss: Any = group_policy_loss if isinstance(how, GroupPolicy) else verl_policy_loss
    x = drawn()
    if settings.get("loss_mode") in ("gspo", "sapo", "geo_mean"):  # its divergence is averaged otherwise, call by call
        how = VerlPolicy(**settings | {"use_kl_loss": False})
    first = jnp.array([[1.0], [1.0], [0.0], [0.0]])
    halves = [
        Answers(*(own[:, 0] * x.live if name == "live" else own * values for name, values in x._asdict().items()))
        for own in (first, 1 - first)
    ]
    total = jax.tree.map(jnp.add, *(loss(half, how)[0] for half in halves))
    whole = loss(x, how)[0]
    np.testing.assert_allclose(total.total, whole.total, rtol=2e-6)
    np.testing.assert_array_equal(total.count, whole.count)


# What verl 0.7.0 computes in float64 of these answers: log-probabilities before and how far they moved, the loss, its
# gradient, and its metrics pg_clipfrac, ppo_kl and pg_clipfrac_lower.
OLD = [[-1.0, -2.0, -0.5, -3.0], [-1.5, -0.25, -2.5, 0], [-0.75, -1.25, 0, 0], [0, 0, 0, 0]]
MOVED = [[0.3, -0.4, 0.1, -0.05], [1.5, -0.6, 0.05, 0], [25.0, -0.02, 0, 0], [0, 0, 0, 0]]
WEIGHTS = [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
ADVANTAGES = [1.2, -0.8, -0.5, 0]
ENTROPY = [[1.0, 0.5, 2.0, 1.5], [0.25, 0.75, 1.25, 0], [3.0, 2.0, 0, 0], [0, 0, 0, 0]]
APART = [[0.2, -0.1, 0.0, 0.5], [-1.0, 0.3, 0.7, 0], [30.0, -3.5, 0, 0], [0, 0, 0, 0]]
VERL: dict[str, tuple[float, list[list[float]], tuple[float, ...]]] = {
    "vanilla": (
        0.11811686,
        [[0, -0.08937601, -0.14735612, -0.12683059], [0, 0, 0.09344632, 0], [0, 0.05445548, 0, 0], [0] * 4],
        (0.22222222, -2.32, 0.22222222),
    ),
    "gspo": (3671.04859499, [[-0.09875778] * 4, [0.122004] * 3 + [0], [0] * 4, [0] * 4], (0.0, -2.87555555)),
    "sapo": (
        0.30085125,
        [
            [-0.1309381, -0.06524309, -0.11021205, -0.0950664],
            [0.03912969, 0.04614529, 0.09337865, 0],
            [0, 0.0816744, 0, 0],
            [0] * 4,
        ],
        (),
    ),
    "gpg": (1.85666667, [[-0.13333333] * 4, [0.08888889] * 3 + [0], [0.05555556] * 2 + [0] * 2, [0] * 4], ()),
    "cispo": (
        2.18714047,
        [
            [-0.17066667, -0.10666667, -0.14735612, -0.12683059],
            [0.11377778, 0.07111111, 0.09344632, 0],
            [0.07111111, 0.05445548, 0, 0],
            [0] * 4,
        ],
        (0.55555555, -2.32),
    ),
    "geo_mean": (
        33208.42736545,
        [
            [0, -0.07369892, -0.07369892, -0.07369892],
            [0.10455414, 0, 0.10455414, 0],
            [16604.20416632] * 2 + [0] * 2,
            [0] * 4,
        ],
        (0.22222222, -2.87555555, 0.33333333),
    ),
}


def of_verl() -> Answers:
    old, moved, weights, entropy, apart = (jnp.array(x, jnp.float32) for x in (OLD, MOVED, WEIGHTS, ENTROPY, APART))
    advantages = weights * jnp.array(ADVANTAGES)[:, None]
    return Answers(old + moved, old, old, advantages, entropy, weights, jnp.ones(4), old + moved + apart)


@pytest.mark.parametrize("mode", VERL)
def test_policy_losses_and_their_gradients_are_those_of_verl(mode):
    x, how = of_verl(), VerlPolicy(loss_mode=mode, clip_ratio_high=0.28)
    expected, gradient, logged = VERL[mode]

    def loss(logprob: jax.Array) -> Any:
        total, metrics = verl_policy_loss(x._replace(logprob=logprob), how)
        return total.mean(), metrics

    (value, metrics), found = jax.value_and_grad(loss, has_aux=True)(x.logprob)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(found, gradient, rtol=1e-5, atol=1e-6)
    names = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
    for name, number in zip(names, logged, strict=False):
        assert float(metrics[name].mean()) == pytest.approx(number, rel=1e-5), name


@pytest.mark.parametrize(
    ("how", "expected"), list(zip(AGGREGATIONS, (0.11811686, 0.35435058, 0.36223528, 0.10630517), strict=True))
)
def test_aggregations_are_those_of_verl(how, expected):
    settings = VerlPolicy(loss_agg_mode=how, loss_scale_factor=10, clip_ratio_high=0.28)
    assert float(verl_policy_loss(of_verl(), settings)[0].mean()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "expected", "first"),
    [
        ("kl", -3.01111111, 0.11111111),
        ("abs", 4.03333333, -0.11111111),
        ("mse", 50.785, -0.02222222),
        ("low_var_kl", 1.49296109, -0.02460031),
    ],
)
def test_estimates_of_the_divergence_are_those_of_verl_and_none_has_a_gradient_beyond_its_bounds(kind, expected, first):
    x = of_verl()

    def mean(logprob: jax.Array) -> jax.Array:
        return aggregated(kl_estimate(logprob, x.reference, kind), x, VerlPolicy()).mean()

    value, gradient = jax.value_and_grad(mean)(x.logprob)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert float(gradient[0, 0]) == pytest.approx(first, rel=1e-4)
    assert (float(gradient[2, 0]) == 0) == (kind == "low_var_kl")


def test_entropy_and_divergence_are_added_to_verls_loss_each_with_its_own_mean():
    x = of_verl()
    both = VerlPolicy(clip_ratio_high=0.28, entropy_coeff=0.1, use_kl_loss=True, kl_loss_coef=0.01)
    loss = verl_policy_loss(x, both)[0].mean()
    assert float(loss) == pytest.approx(0.11811686 - 0.1 * 1.36111111 + 0.01 * 1.49296109, abs=1e-6)
    of_answers = VerlPolicy(
        clip_ratio_high=0.28,
        loss_agg_mode="seq-mean-token-mean",
        entropy_coeff=0.1,
        use_kl_loss=True,
        kl_loss_coef=0.01,
    )
    loss = verl_policy_loss(x, of_answers)[0].mean()
    assert float(loss) == pytest.approx(0.36223528 - 0.1 * 1.5 + 0.01 * 2.18422311, rel=1e-5)
    gspo = VerlPolicy(loss_mode="gspo", clip_ratio_high=0.28, entropy_coeff=100.0)  # by answers, its entropy by tokens
    assert float(verl_policy_loss(x, gspo)[0].mean()) == pytest.approx(3671.04859499 - 136.111111, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: GroupPolicy(loss_type="ppo"), "loss_type: got ppo; allowed: grpo, bnpo, dr_grpo"),
        (lambda: GroupPolicy(loss_type="dr_grpo"), "max_completion_length: none is set; loss_type: dr_grpo divides"),
        (lambda: GroupPolicy(loss_type="grpo", importance_sampling_level="word"), "got word; allowed: token, sequence"),
        (lambda: GroupPolicy(loss_type="grpo", sampler_correction="no"), "got no; allowed: token_truncate, token_mask"),
        (lambda: VerlPolicy(loss_mode="clip"), "loss_mode: got clip; allowed: vanilla, gspo"),
        (lambda: VerlPolicy(loss_agg_mode="mean"), "loss_agg_mode: got mean; allowed: token-mean"),
        (lambda: VerlPolicy(kl_loss_type="k4"), "kl_loss_type: got k4; allowed: kl, k1, abs"),
        (lambda: VerlPolicy(clip_ratio_c=1.0), "clip_ratio_c: got 1.0; allowed: above 1"),
        (lambda: VerlPolicy(loss_agg_mode=AGGREGATIONS[3]), "loss_scale_factor: none is set; loss_agg_mode"),
    ],
)
def test_settings_without_a_meaning_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_where_there_is_no_token_at_all_nothing_is_counted_and_nothing_is_nan():
    x = jax.tree.map(jnp.zeros_like, drawn())
    for total, metrics in (
        group_policy_loss(x, GroupPolicy(loss_type="dapo", beta=0.1, top_entropy_quantile=0.5, entropy_coef=0.1)),
        verl_policy_loss(x, VerlPolicy(use_kl_loss=True, entropy_coeff=0.1)),
    ):
        assert (float(total.total), float(total.count)) == (0, 0)
        assert all(isinstance(each, Sum) and np.isfinite(each.total) for each in metrics.values())


def test_every_estimate_goes_by_the_names_that_verl_has_for_it():
    assert set(ESTIMATES) == {"kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"}
