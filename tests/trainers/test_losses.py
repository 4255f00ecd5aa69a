"""The loss by hand, against the plain formula, and against transformers' and TRL's variants."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.sharding import make_mesh
from trainers.logprobs import token_logprobs
from trainers.losses import Sum, cross_entropy


def plain(hidden, head, targets, weights, *, label_smoothing=0.0, detached_weight=False, z_loss=0.0, softcap=None):
    """The formula as written, with all logits at once."""
    logits = jnp.einsum("bld,vd->blv", hidden, head)
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    log_p = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    if detached_weight:
        nll = jax.lax.stop_gradient(jnp.exp(-nll)) * nll
    elif label_smoothing:
        nll = (1 - label_smoothing) * nll - label_smoothing * log_p.mean(axis=-1)
    nll += z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
    return (nll * weights).sum()


def made(seed: int, B: int, L: int, D: int = 8, V: int = 11, trained: float = 0.5):
    random = np.random.default_rng(seed)
    return (
        random.standard_normal((B, L, D)).astype(np.float32),
        random.standard_normal((V, D)).astype(np.float32),
        random.integers(0, V, (B, L)).astype(np.int32),
        (random.random((B, L)) < trained).astype(np.float32) * random.choice([1.0, 0.5], (B, L)).astype(np.float32),
    )


def test_two_equal_logits_cost_the_logarithm_of_two():
    # hidden 0 makes all logits 0: p = 1/2 for each of two words, nll = log 2, entropy = log 2, and the first word wins.
    hidden, head = jnp.zeros((1, 3, 4)), jnp.ones((2, 4))
    loss, metrics = cross_entropy(hidden, head, jnp.array([[0, 1, 0]]), jnp.array([[1.0, 1.0, 0.0]]))
    np.testing.assert_allclose(loss.total, 2 * np.log(2), rtol=1e-6)
    assert float(loss.count) == 2
    np.testing.assert_allclose(metrics["entropy"].mean(), np.log(2), rtol=1e-6)


def test_logits_of_one_and_zero_by_hand():
    # logits (1, 0): -log p(first) = log(1 + 1/e), -log p(second) = 1 + log(1 + 1/e).
    hidden, head = jnp.array([[[1.0], [1.0]]]), jnp.array([[1.0], [0.0]])
    loss, metrics = cross_entropy(hidden, head, jnp.array([[0, 1]]), jnp.ones((1, 2)))
    np.testing.assert_allclose(loss.total, 1 + 2 * np.log1p(np.exp(-1)), rtol=1e-6)
    assert float(metrics["mean_token_accuracy"].mean()) == 0.5


@given(
    seed=st.integers(0, 1000),
    B=st.integers(1, 3),
    L=st.integers(1, 9),
    chunk=st.sampled_from([1, 3, 4, 1024]),
    variant=st.sampled_from([{}, {"label_smoothing": 0.1}, {"detached_weight": True}]),
    z_loss=st.sampled_from([0.0, 1e-4, 0.5]),
    softcap=st.sampled_from([None, 3.0]),
    trained=st.sampled_from([0.0, 0.2, 1.0]),
)
@settings(max_examples=10, deadline=None)
def test_chunks_give_the_plain_formula_and_its_gradients(seed, B, L, chunk, variant, z_loss, softcap, trained):
    hidden, head, targets, weights = made(seed, B, L, trained=trained)
    variant = variant | {"z_loss": z_loss, "softcap": softcap}

    def ours(hidden, head):
        return cross_entropy(hidden, head, targets, weights, chunk=chunk, **variant)[0].total

    theirs = functools.partial(plain, targets=targets, weights=weights, **variant)
    both = [jax.value_and_grad(function, argnums=(0, 1)) for function in (ours, theirs)]
    run = jax.jit(lambda *args: (ours(*args), *(each(*args) for each in both)))  # compiled at once
    without_gradients, (value, grads), (expected, wanted) = run(hidden, head)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(without_gradients, expected, rtol=1e-5, atol=1e-6)
    for got, want in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_label_smoothing_is_that_of_transformers():
    import torch
    from transformers.trainer_pt_utils import LabelSmoother

    hidden, head, targets, weights = made(5, 2, 6)
    live = weights > 0
    labels = torch.tensor(np.where(live, targets, -100), dtype=torch.long)
    logits = torch.tensor(np.einsum("bld,vd->blv", hidden, head))
    expected = LabelSmoother(epsilon=0.2)({"logits": logits}, labels).item()
    loss, _ = cross_entropy(hidden, head, targets, live.astype(np.float32), label_smoothing=0.2)
    np.testing.assert_allclose(loss.mean(), expected, rtol=1e-5)


def test_z_loss_by_hand_is_its_share_times_the_square_of_log_z():
    # two logits of 0: Z = 2, so z log^2 Z of a token is z (log 2)^2, beside -log p = log 2
    hidden, head = jnp.zeros((1, 3, 4)), jnp.ones((2, 4))
    loss, metrics = cross_entropy(hidden, head, jnp.array([[0, 1, 0]]), jnp.array([[1.0, 1.0, 0.0]]), z_loss=0.25)
    np.testing.assert_allclose(metrics["z_loss"].mean(), 0.25 * np.log(2) ** 2, rtol=1e-6)
    np.testing.assert_allclose(loss.mean(), np.log(2) + 0.25 * np.log(2) ** 2, rtol=1e-6)
    assert "z_loss" not in cross_entropy(hidden, head, jnp.zeros((1, 3), int), jnp.ones((1, 3)))[1]


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_z_loss_and_its_gradients_are_those_of_torch(softcap):
    import torch

    hidden, head, targets, weights = made(7, 2, 6)
    hidden_t, head_t = (torch.tensor(x, requires_grad=True) for x in (hidden, head))
    logits = torch.einsum("bld,vd->blv", hidden_t, head_t)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    nll = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(targets, dtype=torch.long).flatten(), reduction="none"
    )
    log_z = torch.logsumexp(logits, dim=-1).flatten()
    expected = ((nll + 1e-2 * log_z**2) * torch.tensor(weights).flatten()).sum()
    expected.backward()

    def ours(hidden, head):
        return cross_entropy(hidden, head, targets, weights, softcap=softcap, z_loss=1e-2, chunk=4)[0].total

    value, grads = jax.value_and_grad(ours, argnums=(0, 1))(hidden, head)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(grads[0], hidden_t.grad, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grads[1], head_t.grad, rtol=1e-5, atol=1e-6)


def test_a_target_that_is_not_trained_may_be_a_token_that_the_head_lacks():
    hidden, head, targets, weights = made(0, 2, 6)
    beyond = np.where(weights == 0, 11, targets)
    assert (beyond == 11).any()

    def both(targets):
        loss = cross_entropy(hidden, head, targets, weights)[0].total
        return loss, token_logprobs(hidden, head, targets, weights_BL=weights).sum()

    assert both(beyond) == both(targets)
    assert np.isfinite(both(beyond)).all()


def test_logits_of_ten_thousand_stay_finite():
    hidden, head = jnp.full((1, 2, 1), 100.0), jnp.array([[100.0], [-100.0]])
    (loss, _), grads = jax.value_and_grad(
        lambda hidden: (lambda s, m: (s.total, m))(*cross_entropy(hidden, head, jnp.array([[0, 1]]), jnp.ones((1, 2)))),
        has_aux=True,
    )(hidden)
    assert float(loss) == 20000.0
    assert np.isfinite(grads).all()


@pytest.mark.parametrize(("total", "count", "mean"), [(6.0, 3.0, 2.0), (0.0, 0.0, 0.0)])
def test_a_sum_over_nothing_is_zero(total, count, mean):
    assert float(Sum(jnp.float32(total), jnp.float32(count)).mean()) == mean


@pytest.mark.parametrize("softcap", [None, 5.0, 30.0])
def test_the_likeliest_target_counts_as_right_with_a_cap_too(softcap):
    hidden = jax.random.normal(jax.random.key(0), (2, 64, 32))
    head = 0.5 * jax.random.normal(jax.random.key(1), (500, 32))
    targets = jnp.einsum("bld,vd->blv", hidden, head).argmax(axis=-1)
    for offset, share in ((0, 1.0), (1, 0.0)):
        _, metrics = cross_entropy(hidden, head, (targets + offset) % 500, jnp.ones((2, 64)), softcap=softcap)
        assert metrics["mean_token_accuracy"].mean() == share


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "context": 4}], ids=str
)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "softcap": 3.0}, {"z_loss": 0.1}], ids=str)
def test_each_device_has_a_part_of_a_vocabulary_that_devices_do_not_divide(sizes, options):
    hidden, head, targets, weights = made(3, 8, 12)  # eleven words, eight devices
    bias = np.linspace(-1, 1, 11, dtype=np.float32)
    mesh = make_mesh(sizes)

    def loss(hidden, head, bias):
        total, metrics = cross_entropy(hidden, head, targets, weights, bias_V=bias, chunk=32, **options)
        return total.total, (metrics["entropy"].total, metrics["mean_token_accuracy"].total)

    found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    alone = found(hidden, head, bias)
    with jax.set_mesh(mesh):
        together = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(hidden, head, bias)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), together, alone)
