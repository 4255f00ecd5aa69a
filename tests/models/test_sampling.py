"""Sampling: what is cut is what transformers cuts, in its order; frequencies are those of the exact distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from models.sampling import Sampling, _pick, check_sampling, draw

V = 700  # more than two chunks, and no multiple of one
SETTINGS = (
    Sampling(1.0, 0, 1.0),
    Sampling(0.7, 5, 1.0),
    Sampling(1.3, 0, 0.8),
    Sampling(0.9, 0, 1.0, min_p=0.1),
    Sampling(1.0, 20, 0.7, min_p=0.2),
    Sampling(1.0, 12, 0.95, min_p=0.05, repetition_penalty=1.7),
    Sampling(1.0, 0, 1.0, repetition_penalty=0.6),
)
draw_jit = jax.jit(draw, static_argnums=1)


def exact(logits: np.ndarray, seen: list[int], how: Sampling) -> np.ndarray:
    """Log-probabilities [V] after transformers' own processors."""
    steps = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(how.repetition_penalty)])
    steps.append(TemperatureLogitsWarper(how.temperature))
    steps += [TopKLogitsWarper(how.top_k)] if how.top_k else []
    steps += [TopPLogitsWarper(how.top_p)] if how.top_p < 1 else []
    steps += [MinPLogitsWarper(how.min_p)] if how.min_p else []
    return torch.log_softmax(steps(torch.tensor([seen]), torch.tensor(logits[None])), dim=-1)[0].numpy()


def drawn(logits: np.ndarray, seen: list[int], how: Sampling, rows: int, *, seed: int = 0):
    seen_BV = jnp.zeros((rows, V), bool).at[:, jnp.array(seen)].set(True)
    return draw_jit(
        jnp.broadcast_to(jnp.asarray(logits)[None], (rows, V)),
        how,
        key=jax.random.key(seed),
        requests_B=jnp.arange(rows),
        positions_B=jnp.full((rows,), 3),
        seen_BV=seen_BV if how.penalises else None,
    )


@pytest.mark.parametrize("how", SETTINGS, ids=str)
def test_draws_follow_the_distribution_of_transformers(how: Sampling) -> None:
    """20,000 draws: chi-square over the likely tokens and all others as one, at five standard deviations; and the
    log-probabilities that come with them.
    """
    rows, seen = 20_000, [3, 10, 11, 500]
    logits = np.random.default_rng(1).normal(0, 3, V).astype(np.float32)
    logits[[3, 500]] += 9
    expected, found = exact(logits, seen, how), drawn(logits, seen, how, rows)
    tokens = np.asarray(found.token_B)
    plain = torch.log_softmax(torch.tensor(logits) / how.temperature, dim=-1).numpy()
    np.testing.assert_allclose(found.logprob_B, plain[tokens], atol=1e-5)
    if how.warps:
        np.testing.assert_allclose(found.warped_B, expected[tokens], atol=1e-5)
    else:
        assert found.warped_B is None
    wanted = np.exp(expected.astype(np.float64)) * rows
    likely = wanted >= 10
    counts = np.bincount(tokens, minlength=V)
    assert not counts[wanted == 0].any()
    pairs = [(counts[likely], wanted[likely])]
    pairs += [(counts[~likely].sum(keepdims=True), wanted[~likely].sum(keepdims=True))] if wanted[~likely].sum() else []
    chi = sum(((seen_count - mean) ** 2 / mean).sum() for seen_count, mean in pairs)
    freedom = max(1, likely.sum() + len(pairs) - 2)
    assert chi < freedom + 5 * np.sqrt(2 * freedom)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, V + 5), st.floats(0.01, 1.0), st.floats(0.0, 1.0))
def test_what_is_kept_is_what_transformers_keeps(seed: int, top_k: int, top_p: float, min_p: float) -> None:
    from models.sampling import cut

    logits = np.random.default_rng(seed).normal(0, 4, V).astype(np.float32)
    how = Sampling(1.0, top_k, top_p, min_p)
    ours, theirs = np.asarray(cut(jnp.asarray(logits[None]), how))[0], exact(logits, [0], how)
    off = np.flatnonzero(np.isfinite(ours) != np.isfinite(theirs))
    # A token at the very edge of top-p or min-p may be rounded to the other side: it is then the least likely one.
    assert len(off) <= 1
    assert all(logits[i] <= logits[np.isfinite(theirs)].min() + 1e-6 for i in off)


@given(st.lists(st.sampled_from([0.0, 1e-30, 1e-7, 1.0]), min_size=1, max_size=40), st.floats(0, 1, exclude_max=True))
@settings(max_examples=60, deadline=None)
def test_nothing_without_mass_is_ever_picked(mass: list[float], uniform: float) -> None:
    padded = np.zeros((1, 41), np.float32)
    padded[0, : len(mass)] = mass
    padded[0, 40] = 1e-3
    at = int(_pick(jnp.asarray(padded), jnp.float32(uniform)[None])[0])
    assert padded[0, at] > 0


def test_greedy_takes_the_likeliest_after_the_penalty() -> None:
    logits = np.full(V, -5, np.float32)
    logits[[7, 8]] = 4.0, 3.0
    assert set(np.asarray(drawn(logits, [7], Sampling(0.0, 0, 1.0), 2).token_B)) == {7}
    penalised = drawn(logits, [7], Sampling(0.0, 0, 1.0, repetition_penalty=2.0), 2)
    assert set(np.asarray(penalised.token_B)) == {8}
    assert float(penalised.logprob_B[0]) < float(penalised.warped_B[0]) < 0


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", -1.0), ("top_k", -1), ("top_p", 0.0), ("min_p", 1.5), ("repetition_penalty", 0)]
)
def test_a_number_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} {value} must be"):
        check_sampling(Sampling(1.0, 0, 1.0)._replace(**{name: value}))
