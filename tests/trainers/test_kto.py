"""KTO against TRL's own code, with its gradients; finite differences; whose answer is set against whose prompt."""

from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers.kto import Answers, kl_estimate, kto_loss, partners

LOGGED_BY_TOKEN = {"entropy", "num_tokens", "logits/chosen", "logits/rejected"}


def made(seed: int, rows: int = 6, *, shift: float = 0.0, dtype=np.float32) -> Answers:
    """Answers of both kinds; with a `shift`, mismatched ones that the policy has come to like more by so much."""
    random = np.random.default_rng(seed)
    logps, reference, mismatched = (-5 * random.random(rows).astype(dtype) for _ in range(3))
    desirable = (np.arange(rows) % 3 != 0).astype(dtype)
    away = (shift + 0.1 * random.standard_normal(rows)).astype(dtype)
    return Answers(logps, reference, desirable, np.ones(rows, dtype), mismatched, mismatched - away)


def trl_kto(answers: Answers, *, beta: float, loss_type: str, weights: tuple[float, float]):
    """Loss, gradient by log-probabilities, and metrics: KTOTrainer's own method, a model that says ours."""
    import torch
    from trl.trainer.kto_trainer import KTOTrainer

    rows = len(answers.logps_R)
    policy = torch.tensor(answers.logps_R, requires_grad=True)
    ones, zeros = torch.ones(rows, 2, dtype=torch.int64), torch.zeros(rows, 1)
    outputs = SimpleNamespace(log_probs=policy[:, None], entropy=zeros, mean_logits=zeros)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=loss_type == "kto",
        _compute_kl_logps=lambda model, batch: torch.tensor(answers.mismatched_R) if loss_type == "kto" else None,
        beta=beta,
        loss_type=loss_type,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    batch = {
        "label": torch.tensor(answers.desirable_R > 0),
        "input_ids": ones,
        "attention_mask": ones,
        "completion_mask": ones,
        "ref_logps": torch.tensor(answers.reference_R),
        "ref_KL_logps": torch.tensor(answers.mismatched_reference_R),
    }
    loss = KTOTrainer._compute_loss(trainer, lambda **_: outputs, batch, False)
    loss.backward()
    return loss.item(), policy.grad.numpy(), {name: value[-1] for name, value in trainer._metrics["eval"].items()}


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.33, 0.5)])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 2.0])
def test_loss_gradient_and_metrics_are_those_of_trl(loss_type, weights, shift):
    answers = made(int(shift) + 5, shift=shift)
    expected, gradient, metrics = trl_kto(answers, beta=0.3, loss_type=loss_type, weights=weights)

    def ours(logps_R):
        total, others = kto_loss(
            answers._replace(logps_R=logps_R),
            beta=0.3,
            loss_type=loss_type,
            desirable_weight=weights[0],
            undesirable_weight=weights[1],
        )
        return total.mean(), others

    (value, others), found = jax.value_and_grad(ours, has_aux=True)(answers.logps_R)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(found, gradient, rtol=1e-5, atol=1e-8)
    assert set(metrics) - LOGGED_BY_TOKEN == set(others)
    for name, total in others.items():
        np.testing.assert_allclose(total.mean(), metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_equal_models_cost_half_of_each_weight():
    answers = Answers(*(jnp.array(x) for x in ([-3.0, -4.0], [-3.0, -4.0], [1.0, 0.0], [1.0, 1.0], [-9.0, -8.0])))
    answers = answers._replace(mismatched_reference_R=answers.mismatched_R)
    total, metrics = kto_loss(answers, beta=0.1, desirable_weight=3.0)
    assert (float(total.total), float(total.count)) == (0.5 * 3 + 0.5, 2)
    assert float(metrics["kl"].mean()) == 0


def test_the_kl_is_the_mean_over_live_rows_and_never_negative():
    answers = Answers(*(jnp.zeros(3),) * 3, jnp.array([1.0, 1.0, 0.0]), jnp.array([4.0, 0.0, 90.0]), jnp.ones(3))
    assert float(kl_estimate(answers)) == 1.0
    assert float(kl_estimate(answers._replace(mismatched_R=jnp.zeros(3)))) == 0.0


def test_rows_that_only_fill_the_batch_change_nothing():
    answers = made(2, shift=1.0)
    total, metrics = kto_loss(answers, beta=0.3)
    filled = Answers(*(np.concatenate([x, np.zeros(2, np.float32)]) for x in answers))
    other, others = kto_loss(filled, beta=0.3)
    for got, want in zip(jax.tree.leaves((other, others)), jax.tree.leaves((total, metrics)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_batch_of_one_kind_has_no_margin():
    answers = made(3)._replace(desirable_R=np.ones(6, np.float32))
    _, metrics = kto_loss(answers, beta=0.3)
    assert float(metrics["rewards/margins"].count) == float(metrics["rewards/rejected"].count) == 0


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_gradients_are_finite_differences(loss_type):
    with jax.enable_x64(True):
        answers = made(7, shift=0.5, dtype=np.float64)

        def loss(logps_R):
            return kto_loss(answers._replace(logps_R=logps_R), beta=0.3, loss_type=loss_type)[0].total

        gradient, h = np.asarray(jax.grad(loss)(jnp.asarray(answers.logps_R))), 1e-6
        for one in np.eye(len(gradient)):
            rise = (loss(answers.logps_R + h * one) - loss(answers.logps_R - h * one)) / (2 * h)
            np.testing.assert_allclose((gradient * one).sum(), rise, rtol=1e-5)


def test_the_kl_takes_no_gradient_to_either_model():
    answers = made(9, shift=1.0)

    def loss(mismatched_R):
        return kto_loss(answers._replace(mismatched_R=mismatched_R), beta=0.3)[0].total

    assert not np.any(jax.grad(loss)(answers.mismatched_R))


def test_another_type_is_refused():
    with pytest.raises(ValueError, match="loss_type: 'bco' is not known to KTO; there are kto, apo_zero_unpaired"):
        kto_loss(made(0), beta=0.1, loss_type="bco")


def test_answers_are_set_against_the_prompt_of_the_row_after():
    np.testing.assert_array_equal(partners(8, block=3), [2, 0, 1, 5, 3, 4, 7, 6])
    np.testing.assert_array_equal(partners(4, block=3), [2, 0, 1, 3])  # a row alone keeps its own
    with pytest.raises(ValueError, match="a batch of 1 row has none; use 2 or more"):
        partners(4, block=1)


@given(rows=st.integers(0, 40), block=st.integers(2, 9))
def test_partners_are_each_blocks_answers_rotated_by_one_as_trl_does(rows, block):
    expected = []
    for start in range(0, rows, block):
        completions = list(range(start, min(start + block, rows)))
        expected += [completions[-1], *completions[:-1]]
    np.testing.assert_array_equal(partners(rows, block=block), np.array(expected, int))
