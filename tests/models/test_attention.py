"""Attention by blocks is attention: leaving out keys beyond the reach changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import attention
from models.attention import Where, attend

B, N, K, H = 2, 4, 2, 8


def packed(lengths: list[list[int]]) -> Where:
    """Rows of documents of these lengths, padded to the longest row."""
    L = max(sum(row) for row in lengths)
    positions, segments = np.zeros((len(lengths), L), np.int32), np.zeros((len(lengths), L), np.int32)
    for row, documents in enumerate(lengths):
        start = 0
        for number, length in enumerate(documents, 1):
            positions[row, start : start + length] = np.arange(length)
            segments[row, start : start + length] = number
            start += length
    return Where(*map(jnp.asarray, (positions, positions, segments, segments)))


def heads(L: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(L)
    q, k, v = (jnp.asarray(rng.normal(size=(B, L, heads, H)), jnp.float32) for heads in (N, K, K))
    return q, k, v


ROWS = {
    "documents of all lengths": [[7, 1, 3, 12, 2, 9], [12, 12, 1, 1, 4]],
    "one document": [[40], [3]],
    "a row that ends in padding": [[5, 5], [11, 11, 9]],
    "documents of a block": [[4] * 9, [8] * 4],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_a_reach_as_long_as_the_longest_document_changes_no_value_and_no_gradient(
    rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = packed(rows)
    real = where.q_segments_BL[..., None, None] > 0

    @functools.partial(jax.jit, static_argnums=1)
    def loss_and_gradient(qkv, reach):
        def loss(qkv):
            out = attend(*qkv, where=where, scale=H**-0.5, reach=reach)
            return jnp.sum(jnp.where(real, out, 0.0) ** 2)

        return jax.value_and_grad(loss)(qkv)

    qkv = heads(where.q_positions_BL.shape[1])
    monkeypatch.setattr(attention, "BLOCK", 4)
    monkeypatch.setattr(attention, "MOST_BLOCKS", 10)
    value, grads = loss_and_gradient(qkv, max(max(row) for row in rows))
    expected, expected_grads = loss_and_gradient(qkv, None)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), grads, expected_grads)


def test_windows_whose_patches_stand_together_are_computed_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    squares = jnp.asarray(np.repeat(np.arange(24), np.resize([9, 6, 6, 4, 9], 24))[None, :160])
    segments = jnp.where(jnp.arange(160) < 140, 1 + jnp.arange(160) // 70, 0)[None, :]
    nowhere = jnp.zeros_like(segments)
    where = Where(nowhere, nowhere, segments, segments, q_squares_BL=squares, k_squares_BS=squares)
    qkv = [x[:1] for x in heads(160)]
    run = jax.jit(lambda *qkv: attend(*qkv, where=where, scale=1.0, window=3))
    whole, flops = run(*qkv), run.lower(*qkv).compile().cost_analysis()["flops"]
    monkeypatch.setattr(attention, "BLOCK", 16)
    run = jax.jit(lambda *qkv: attend(*qkv, where=where, scale=1.0, window=3))
    np.testing.assert_allclose(run(*qkv), whole, atol=2e-6)
    assert run.lower(*qkv).compile().cost_analysis()["flops"] < 0.3 * flops


def test_products_with_keys_out_of_reach_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", 16)
    where, qkv = packed([[8] * 16] * B), heads(128)

    def flops(reach: int | None) -> float:
        run = jax.jit(lambda *qkv: attend(*qkv, where=where, scale=1.0, reach=reach))
        return run.lower(*qkv).compile().cost_analysis()["flops"]

    assert flops(8) < 0.3 * flops(None)
    assert flops(128) < 0.65 * flops(None)  # causal: half of all pairs
