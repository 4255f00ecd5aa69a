"""Losses: arrays in, `Sum` out.

B rows, L positions, D width, V vocabulary, T tokens of one chunk.

A mean over tokens is carried as (total, count) and divided once, by the step: the loss is then the same for every mesh, accumulation and
packing. The vocabulary never materialises for all tokens: hidden states meet the head in chunks, supervised tokens first, and chunks with
none are skipped.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.sharding import ROWS, constrain


class Sum(NamedTuple):
    """A mean not yet divided: float32 scalars `total` and `count`."""

    total: jax.Array
    count: jax.Array

    def mean(self) -> jax.Array:
        """`total / count`, and 0 where nothing was counted."""
        return self.total / jnp.maximum(self.count, 1.0)


class TokenSums(NamedTuple):
    """Sums over supervised tokens, in nats: cross-entropy, entropy of the prediction, and how often the target ranked first."""

    nll: jax.Array
    entropy: jax.Array
    correct: jax.Array


def cross_entropy(
    hidden_BLD: jax.Array, head_VD: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array, *, chunk: int = 1024
) -> tuple[Sum, dict[str, Sum]]:
    """Weighted cross-entropy of every target, and what a training log shows beside it.

    Args: hidden states [B, L, D], the head [V, D], int32 targets [B, L], float32 weights [B, L] (0 = not trained), and how many tokens of
    the whole batch meet the vocabulary at once. Returns the loss as a `Sum` over tokens, and `entropy` and `mean_token_accuracy` likewise.
    """
    count = weights_BL.sum()
    sums = _token_sums(hidden_BLD, head_VD, targets_BL, weights_BL, chunk)
    metrics = {"entropy": Sum(sums.entropy, count), "mean_token_accuracy": Sum(sums.correct, count)}
    return Sum(sums.nll, count), metrics


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _token_sums(hidden_BLD, head_VD, targets_BL, weights_BL, chunk) -> TokenSums:
    sums, _, _ = _sweep(hidden_BLD, head_VD, targets_BL, weights_BL, chunk, gradients=False)
    return sums


def _forward(hidden_BLD, head_VD, targets_BL, weights_BL, chunk):
    """Both gradients are formed while a chunk's logits are at hand: no second product with the vocabulary in the backward pass."""
    sums, d_hidden_BLD, d_head_VD = _sweep(hidden_BLD, head_VD, targets_BL, weights_BL, chunk, gradients=True)
    return sums, (d_hidden_BLD, d_head_VD)


def _backward(chunk, kept, cotangent: TokenSums):
    d_hidden_BLD, d_head_VD = kept
    scale = cotangent.nll  # entropy and accuracy are for the log: no gradient flows through them
    return (d_hidden_BLD * scale.astype(d_hidden_BLD.dtype), d_head_VD * scale.astype(d_head_VD.dtype), None, None)


_token_sums.defvjp(_forward, _backward)


def _sweep(hidden_BLD, head_VD, targets_BL, weights_BL, chunk, *, gradients: bool):
    """Go through the batch in chunks; returns the sums and, if asked, the gradients of their `nll`."""
    B, L, D = hidden_BLD.shape
    order_BL = jnp.argsort(weights_BL == 0, axis=1, stable=True)  # supervised tokens to the front of each row
    hidden_BLD = jnp.take_along_axis(hidden_BLD, order_BL[:, :, None], axis=1)
    columns = max(1, min(L, chunk // B))
    steps = -(-L // columns)

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, steps * columns - L)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(B, steps, columns, *x.shape[2:]), 1, 0)

    pieces = (
        cut(hidden_BLD),
        cut(jnp.take_along_axis(targets_BL, order_BL, axis=1)),
        cut(jnp.take_along_axis(weights_BL, order_BL, axis=1)),
    )
    head_cast_VD = head_VD.astype(hidden_BLD.dtype)
    d_head_VD = jnp.zeros_like(head_VD, dtype=jnp.float32) if gradients else None

    def body(carry, piece):
        return jax.lax.cond((piece[2] > 0).any(), live, dead, carry, piece)

    def live(carry, piece):
        hidden_BCD, targets_BC, weights_BC = piece
        sums, d_head_VD = carry
        found, d_logits_BCV = _chunk_sums(hidden_BCD, head_cast_VD, targets_BC, weights_BC)
        sums = TokenSums(*(a + b for a, b in zip(sums, found, strict=True)))
        if not gradients:
            return (sums, None), None
        d_logits_BCV = d_logits_BCV.astype(hidden_BCD.dtype)
        d_hidden_BCD = jnp.einsum("bcv,vd->bcd", d_logits_BCV, head_cast_VD)
        d_head_VD += jnp.einsum("bcv,bcd->vd", d_logits_BCV, hidden_BCD, preferred_element_type=jnp.float32)
        return (sums, d_head_VD), d_hidden_BCD

    def dead(carry, piece):
        return carry, jnp.zeros_like(piece[0]) if gradients else None

    zero = jnp.zeros((), jnp.float32)
    (sums, d_head_VD), d_pieces = jax.lax.scan(body, (TokenSums(zero, zero, zero), d_head_VD), pieces)
    if not gradients:
        return sums, None, None
    d_sorted_BLD = jnp.moveaxis(d_pieces, 0, 1).reshape(B, steps * columns, D)[:, :L]
    back_BL = jnp.argsort(order_BL, axis=1)
    d_hidden_BLD = jnp.take_along_axis(d_sorted_BLD, back_BL[:, :, None], axis=1)
    return sums, d_hidden_BLD, d_head_VD.astype(head_VD.dtype)


def _chunk_sums(hidden_BCD, head_VD, targets_BC, weights_BC) -> tuple[TokenSums, jax.Array]:
    """The sums of one chunk, and the gradient of its `nll` with respect to the logits, float32."""
    logits_BCV = jnp.einsum("bcd,vd->bcv", hidden_BCD, head_VD, preferred_element_type=jnp.float32)
    logits_BCV = constrain(logits_BCV, ROWS, None, "tensor")
    top_BC = logits_BCV.max(axis=-1)
    shifted_BCV = logits_BCV - top_BC[..., None]
    exp_BCV = jnp.exp(shifted_BCV)
    total_BC = exp_BCV.sum(axis=-1)
    lse_BC = jnp.log(total_BC)
    label_BC = jnp.take_along_axis(shifted_BCV, targets_BC[..., None], axis=-1)[..., 0]
    mean_BC = (exp_BCV * shifted_BCV).sum(axis=-1) / total_BC
    sums = TokenSums(
        nll=(weights_BC * (lse_BC - label_BC)).sum(),
        entropy=(weights_BC * (lse_BC - mean_BC)).sum(),
        correct=(weights_BC * (label_BC >= 0)).sum(),
    )
    is_label_BCV = jnp.arange(head_VD.shape[0])[None, None, :] == targets_BC[..., None]
    d_logits_BCV = exp_BCV * (weights_BC / total_BC)[..., None] - jnp.where(is_label_BCV, weights_BC[..., None], 0.0)
    return sums, d_logits_BCV
