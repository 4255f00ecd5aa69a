"""Preference losses against TRL's own code, with its gradients; by hand where TRL has none; finite differences."""

import contextlib
import math
import warnings
from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models.sharding import make_mesh
from trainers.logprobs import row_sums
from trainers.losses import Sum
from trainers.pair_losses import LOSSES, OF_DIFFERENCE, OF_POLICY, Pairs, Preference
from trainers.preference import desensitized, preference_loss, running_shift, token_metrics, wpo_weights

DPO = tuple(name for name in LOSSES if name not in OF_POLICY)
SMOOTHING = {"exo_pair": 0.1, "robust": 0.2, "aot": 0.1, "aot_unpaired": 0.1}
PAIRS, LENGTH = 5, 9


def made(seed: int = 0, pairs: int = PAIRS, spread: float = 1.0):
    """Log-probabilities of tokens [2P, L], chosen answers before rejected ones, those of a reference, and the mask."""
    random = np.random.default_rng(seed)
    begin, end = random.integers(0, 3, 2 * pairs), random.integers(4, LENGTH + 1, 2 * pairs)
    place = np.arange(LENGTH)[None, :]
    mask = ((place >= begin[:, None]) & (place < end[:, None])).astype(np.float32)
    logps = -spread * random.exponential(size=(2 * pairs, LENGTH)).astype(np.float32) * mask
    reference = -spread * random.exponential(size=(2 * pairs, LENGTH)).astype(np.float32) * mask
    return logps, reference, mask


def pairs_of(logps_BL, reference_BL, mask_BL, *, ld_alpha: float | None = None, log_sum_squares_BL=None) -> Pairs:
    """The pairs of rows as `made` gives them."""
    half = len(mask_BL) // 2
    weights_BL = mask_BL
    if ld_alpha is not None:
        weights_BL = jnp.concatenate(desensitized(mask_BL[:half], mask_BL[half:], ld_alpha=ld_alpha))
    sums, reference = (row_sums(x_BL, weights_BL) for x_BL in (logps_BL, reference_BL))
    tokens = mask_BL.sum(1)
    weights_P = None
    if log_sum_squares_BL is not None:
        row_weights = wpo_weights(logps_BL, log_sum_squares_BL, mask_BL)
        weights_P = row_weights[:half] * row_weights[half:]
    return Pairs(
        chosen_P=sums[:half],
        rejected_P=sums[half:],
        chosen_tokens_P=tokens[:half],
        rejected_tokens_P=tokens[half:],
        live_P=jnp.ones(half),
        reference=(reference[:half], reference[half:]),
        nll=Sum(-(logps_BL[:half] * mask_BL[:half]).sum(), tokens[:half].sum()),
        weights_P=weights_P,
    )


def trl_dpo(logps, reference, mask, how: Preference, *, ld_alpha=None, scores=None):
    """Loss, gradient by the tokens' log-probabilities, and metrics: DPOTrainer's own method, a model that says ours."""
    import torch
    from trl.trainer.dpo_trainer import DPOTrainer

    scores = scores or {name: np.zeros_like(mask) for name in ("entropy", "mean_logit", "correct", "log_sum_squares")}
    names = {"entropy": "entropy", "mean_logit": "mean_logits", "log_sum_squares": "log_sum_sq_probs"}
    given = torch.tensor(logps, requires_grad=True)
    outputs = SimpleNamespace(
        log_probs=given,
        is_top1=torch.tensor(scores["correct"]) > 0,
        **{theirs: torch.tensor(scores[ours]) for ours, theirs in names.items()},
    )
    half = len(mask) // 2
    weights = mask if ld_alpha is None else np.concatenate(desensitized(mask[:half], mask[half:], ld_alpha=ld_alpha))
    reference_sums = torch.tensor(np.asarray((reference * weights).sum(1)))
    unshifted = torch.tensor(np.pad(mask, ((0, 0), (1, 0))).astype(np.int64))
    inputs = {
        "input_ids": torch.ones_like(unshifted),
        "attention_mask": torch.ones_like(unshifted),
        "completion_mask": unshifted,
        "ref_chosen_logps": reference_sums[:half],
        "ref_rejected_logps": reference_sums[half:],
    }
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=SimpleNamespace(discopop_tau=how.discopop_tau),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        ld_alpha=ld_alpha,
        loss_types=how.loss_type,
        loss_weights=how.loss_weights or [1.0] * len(how.loss_type),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
        **{
            name: getattr(how, name)
            for name in ("beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "use_weighting")
        },
    )
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    loss.backward()
    return loss.item(), given.grad.numpy(), {name: value[-1] for name, value in trainer._metrics["eval"].items()}


def compare(how: Preference, *, seed: int = 0, spread: float = 1.0, **options) -> None:
    logps, reference, mask = made(seed, spread=spread)
    if how.use_weighting:
        squares = -np.abs(np.random.default_rng(9).standard_normal(mask.shape).astype(np.float32))
        options["scores"] = dict.fromkeys(("entropy", "mean_logit", "correct"), mask) | {"log_sum_squares": squares}
    expected, gradient, metrics = trl_dpo(logps, reference, mask, how, **options)

    def ours(logps):
        pairs = pairs_of(
            logps,
            reference,
            mask,
            ld_alpha=options.get("ld_alpha"),
            log_sum_squares_BL=options["scores"]["log_sum_squares"] if how.use_weighting else None,
        )
        total, others = preference_loss(pairs, how)
        return total.mean(), (total, others)

    (value, (total, others)), found = jax.value_and_grad(ours, has_aux=True)(logps)
    assert float(total.count) == PAIRS
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(found, gradient * mask, rtol=1e-5, atol=1e-7)
    for name in set(others) & set(metrics):
        np.testing.assert_allclose(others[name].mean(), metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert set(metrics) - set(others) == {
        "entropy",
        "num_tokens",
        "logits/chosen",
        "logits/rejected",
        "mean_token_accuracy",
    }


@pytest.mark.parametrize("name", DPO)
@pytest.mark.parametrize(("beta", "spread"), [(0.1, 1.0), (0.7, 0.3)])
def test_each_loss_with_its_gradient_and_metrics_is_that_of_trl(name, beta, spread):
    compare(Preference((name,), beta, label_smoothing=SMOOTHING.get(name, 0.0)), spread=spread)


@pytest.mark.parametrize("name", sorted(OF_DIFFERENCE))
@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_each_f_divergence_is_that_of_trl(name, divergence):
    compare(
        Preference((name,), 0.1, label_smoothing=SMOOTHING.get(name, 0.0), f_divergence_type=divergence), spread=0.3
    )


@pytest.mark.parametrize("coefficient", [1.0, 2.5])
def test_other_coefficients_of_the_alpha_divergence_are_those_of_trl(coefficient):
    how = Preference(("sigmoid",), 0.1, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=coefficient)
    compare(how, seed=3, spread=0.3)


def test_a_weighted_mixture_is_that_of_trl():
    compare(Preference(("sigmoid", "bco_pair", "sft"), 0.1, loss_weights=(0.8, 0.2, 1.0)))
    compare(Preference(("aot", "robust"), 0.2, label_smoothing=0.1))


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
def test_tokens_beyond_the_shorter_answer_weigh_what_they_do_in_trl(ld_alpha):
    compare(Preference(("sigmoid",), 0.1), ld_alpha=ld_alpha)
    compare(Preference(("ipo", "sft"), 0.1), ld_alpha=ld_alpha)


@pytest.mark.parametrize("names", [("sigmoid",), ("sppo_hard", "ipo")])
def test_pairs_weighted_by_how_likely_they_are_weigh_what_they_do_in_trl(names):
    compare(Preference(names, 0.1, use_weighting=True))


def test_means_over_tokens_are_those_of_trl():
    logps, reference, mask = made()
    random = np.random.default_rng(1)
    scores = {
        name: random.random(mask.shape).astype(np.float32) for name in ("entropy", "mean_logit", "log_sum_squares")
    }
    scores["correct"] = (random.random(mask.shape) < 0.5).astype(np.float32)
    _, _, expected = trl_dpo(logps, reference, mask, Preference(("sigmoid",), 0.1), scores=scores)
    is_chosen = (np.arange(2 * PAIRS) < PAIRS).astype(np.float32)[:, None]
    found = token_metrics(scores, mask * is_chosen, mask * (1 - is_chosen))
    assert set(found) == {"entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"}
    for name, total in found.items():
        np.testing.assert_allclose(total.mean(), expected[name], rtol=1e-5)
    assert set(token_metrics({"entropy": scores["entropy"]}, mask, mask)) == {"entropy"}


@contextlib.contextmanager
def _experimental():
    """TRL warns on import that these trainers may change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


CPO = {"cpo": "sigmoid", "cpo_hinge": "hinge", "cpo_ipo": "ipo", "simpo": "simpo"}


@pytest.mark.parametrize("name", CPO)
@pytest.mark.parametrize("alpha", [0.0, 0.1, -0.25])
def test_cpo_simpo_and_alphapo_are_those_of_trl(name, alpha):
    import torch

    with _experimental():
        from trl.experimental.cpo.cpo_trainer import CPOTrainer

    smoothing = 0.0 if name in ("cpo_hinge", "cpo_ipo") else 0.1
    how = Preference((name,), 0.6, label_smoothing=smoothing, simpo_gamma=0.3, alpha=alpha, nll_weight=0.5)
    logps, reference, mask = made(2, spread=0.4)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        loss_type=CPO[name],
        **{key: getattr(how, key) for key in ("beta", "label_smoothing", "simpo_gamma", "alpha")},
    )
    given, torch_mask = torch.tensor(logps, requires_grad=True), torch.tensor(mask)
    rows = (given * torch_mask).sum(1)
    if name in ("cpo_ipo", "simpo"):
        rows = rows / torch_mask.sum(1)
    losses, *rewards = CPOTrainer.cpo_loss(trainer, rows[:PAIRS], rows[PAIRS:])
    expected = losses.mean() + 0.5 * -(given * torch_mask)[:PAIRS].sum() / torch_mask[:PAIRS].sum()
    expected.backward()

    def ours(logps):
        total, others = preference_loss(pairs_of(logps, reference, mask)._replace(reference=None), how)
        return total.mean(), others

    (value, others), found = jax.value_and_grad(ours, has_aux=True)(logps)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(found, given.grad, rtol=1e-5, atol=1e-7)
    for side, reward, logp in zip(("chosen", "rejected"), rewards, rows.split(PAIRS), strict=True):
        np.testing.assert_allclose(others[f"rewards/{side}"].mean(), reward.mean(), rtol=1e-5)
        np.testing.assert_allclose(others[f"logps/{side}"].mean(), logp.mean().item(), rtol=1e-5)


def test_orpo_is_that_of_trl():
    import torch

    with _experimental():
        from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    logps, reference, mask = made(4)
    given, torch_mask = torch.tensor(logps, requires_grad=True), torch.tensor(mask)
    rows = (given * torch_mask).sum(1) / torch_mask.sum(1)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), beta=0.3)
    losses, *rewards, ratio, odds = ORPOTrainer.odds_ratio_loss(trainer, rows[:PAIRS], rows[PAIRS:])
    expected = -(given * torch_mask)[:PAIRS].sum() / torch_mask[:PAIRS].sum() - losses.mean()
    expected.backward()

    def ours(logps):
        pairs = pairs_of(logps, reference, mask)._replace(reference=None)
        total, others = preference_loss(pairs, Preference(("orpo",), 0.3, nll_weight=1.0))
        return total.mean(), others

    (value, others), found = jax.value_and_grad(ours, has_aux=True)(logps)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(found, given.grad, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(others["log_odds_ratio"].mean(), ratio.item(), rtol=1e-5)
    np.testing.assert_allclose(others["log_odds_chosen"].mean(), odds.item(), rtol=1e-4)
    np.testing.assert_allclose(others["rewards/chosen"].mean(), rewards[0].mean(), rtol=1e-5)


def test_equal_models_cost_the_logarithm_of_two():
    logps, _, mask = made()
    total, others = preference_loss(pairs_of(logps, logps, mask), Preference(("sigmoid",), 0.1))
    np.testing.assert_allclose(total.mean(), math.log(2), rtol=1e-6)
    assert float(others["rewards/accuracies"].mean()) == 0  # a tie is no win


def test_the_likelihood_of_chosen_answers_is_added_by_its_weight():
    logps, reference, mask = made()
    pairs = pairs_of(logps, reference, mask)
    alone, _ = preference_loss(pairs, Preference(("sigmoid",), 0.1))
    total, others = preference_loss(pairs, Preference(("sigmoid",), 0.1, nll_weight=0.5))
    nll = -(logps * mask)[:PAIRS].sum() / mask[:PAIRS].sum()
    np.testing.assert_allclose(total.mean(), alone.mean() + 0.5 * nll, rtol=1e-6)
    np.testing.assert_allclose(others["nll_loss"].mean(), nll, rtol=1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "apo_zero", "apo_down"])
def test_without_a_reference_it_counts_as_zero(name):
    logps, reference, mask = made()
    pairs = pairs_of(logps, np.zeros_like(reference), mask)
    expected, wanted = preference_loss(pairs, Preference((name,), 0.1))
    how = Preference((name,), 0.1, reference_free=True)
    total, others = preference_loss(pairs._replace(reference=None), how)
    assert float(preference_loss(pairs_of(logps, reference, mask), how)[0].total) == float(total.total)
    np.testing.assert_array_equal(total.total, expected.total)
    assert {name: float(x.total) for name, x in others.items()} == {name: float(x.total) for name, x in wanted.items()}


def test_the_shift_of_bco_is_the_running_mean_of_batches_rewards():
    first = pairs_of(*made(0))
    l_c, l_r = first.chosen_P - first.reference[0], first.rejected_P - first.reference[1]
    past = running_shift(Sum(jnp.zeros(()), jnp.zeros(())), first, beta=0.1)
    mean = 0.1 * np.concatenate([l_c, l_r]).mean()
    np.testing.assert_allclose(past.mean(), mean, rtol=1e-5)
    second = pairs_of(*made(1))
    other = (
        0.1 * np.concatenate([second.chosen_P - second.reference[0], second.rejected_P - second.reference[1]]).mean()
    )
    np.testing.assert_allclose(running_shift(past, second, beta=0.1).mean(), (mean + other) / 2, rtol=1e-5)

    total, _ = preference_loss(first._replace(shift=past.mean()), Preference(("bco_pair",), 0.1))
    expected = np.log1p(np.exp(-(0.1 * l_c - mean))) + np.log1p(np.exp(0.1 * l_r - mean))
    np.testing.assert_allclose(total.total, expected.sum(), rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_pairs_that_only_fill_the_batch_change_nothing(name):
    how = Preference((name,), 0.3, label_smoothing=SMOOTHING.get(name, 0.0))
    pairs = pairs_of(*made(6))

    def filled(x):
        return jnp.concatenate([x, jnp.zeros(2)])

    def loss(chosen_P, rejected_P, fill):
        given = pairs._replace(chosen_P=chosen_P, rejected_P=rejected_P)
        if fill:
            given = Pairs(
                *(filled(x) for x in given[:5]), reference=tuple(filled(x) for x in given.reference), nll=given.nll
            )
        total, others = preference_loss(given, how)
        return total.total, (total, others)

    value, grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(pairs.chosen_P, pairs.rejected_P, False)
    other, found = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(pairs.chosen_P, pairs.rejected_P, True)
    for got, want in zip(jax.tree.leaves((other, found)), jax.tree.leaves((value, grads)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "sft", "sigmoid"])
def test_what_looks_at_the_whole_batch_sees_it_on_eight_devices(name):
    how = Preference((name,), 0.3)
    logps, reference, mask = made(10, pairs=8)
    mesh = make_mesh({"fsdp": 8})

    def loss(logps, reference, mask):
        return preference_loss(pairs_of(logps, reference, mask), how)[0].total

    value, gradient = jax.value_and_grad(loss)(logps, reference, mask)
    with jax.set_mesh(mesh):
        placed = (jax.device_put(x, NamedSharding(mesh, P("fsdp"))) for x in (logps, reference, mask))
        got, found = jax.jit(jax.value_and_grad(loss))(*placed)
    np.testing.assert_allclose(got, value, rtol=1e-6)
    np.testing.assert_allclose(found, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_differences(name):
    how = Preference((name,), 0.3, label_smoothing=SMOOTHING.get(name, 0.0), use_weighting=False)
    with jax.enable_x64(True):
        logps, reference, mask = (x.astype(np.float64) for x in made(8))

        def loss(logps):
            return preference_loss(pairs_of(logps, reference, mask), how)[0].total

        gradient = np.asarray(jax.grad(loss)(jnp.asarray(logps)))
        random, h = np.random.default_rng(0), 1e-6
        for _ in range(4):
            way = random.standard_normal(logps.shape) * mask
            rise = (loss(logps + h * way) - loss(logps - h * way)) / (2 * h)
            np.testing.assert_allclose((gradient * way).sum(), rise, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": ("sigmod",)}, r"loss_type: \['sigmod'\] is not known; there are sigmoid, hinge"),
        ({"loss_type": ()}, "loss_type is empty"),
        ({"loss_weights": (1.0, 2.0)}, "loss_weights: 2 for 1 of loss_type"),
        ({"beta": 0.0}, "beta: 0.0 is not above 0"),
        ({"loss_type": ("orpo", "ipo")}, r"\['orpo'\] have no reference and do not go with \['ipo'\]"),
        ({"loss_type": ("cpo", "simpo")}, "differ in whether log-probabilities are sums or means"),
        ({"f_divergence_type": "kl"}, "f_divergence_type: 'kl' is none of reverse_kl, forward_kl"),
        ({"loss_type": ("aot",), "f_divergence_type": "forward_kl"}, r"no meaning for loss_type \['aot'\]"),
        ({"loss_type": ("aot",), "use_weighting": True}, "use_weighting: aot and aot_unpaired sort"),
        ({"label_smoothing": 0.1}, r"label_smoothing: 0.1 has no effect on \['sigmoid'\]"),
        ({"loss_type": ("robust",), "label_smoothing": 0.5}, "for robust below 0.5"),
        ({"loss_type": ("exo_pair",)}, "exo_pair, which takes its logarithm"),
        ({"loss_type": ("nca_pair",), "reference_free": True}, r"reference_free: \['nca_pair'\] of loss_type compare"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Preference(**{"loss_type": ("sigmoid",), "beta": 0.1} | settings)
