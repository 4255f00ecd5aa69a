"""Losses: arrays in, `Sum` out.

B rows, L positions, D width, V vocabulary, T tokens of one chunk.

A mean over tokens is carried as (total, count) and divided once, by the step: the loss is then the same for every mesh,
accumulation and packing. The vocabulary never materialises for all tokens: hidden states meet the head in chunks,
supervised tokens first, and chunks with none are skipped.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.sharding import anywhere
from trainers.chunks import (
    chunks_of,
    given_back,
    mean_of_words,
    narrow_head,
    of_words,
    seen_by_all,
    split_logits,
    split_vocabulary,
)


class Sum(NamedTuple):
    """A mean not yet divided: float32 scalars `total` and `count`."""

    total: jax.Array
    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, which nobody calls

    def mean(self) -> jax.Array:
        """`total / count`, and 0 where nothing was counted."""
        return self.total / jnp.maximum(self.count, 1.0)

    def mean_if_any(self) -> jax.Array:
        """`total / count`, and NaN where nothing was counted."""
        return jnp.where(self.count > 0, self.mean(), jnp.nan)


class TokenSums(NamedTuple):
    """Sums over supervised tokens, in nats: the loss, the entropy of the prediction, how often the target ranked first,
    and what of the loss is z-loss.
    """

    loss: jax.Array
    entropy: jax.Array
    correct: jax.Array
    z_loss: jax.Array


class Flavour(NamedTuple):
    """Which cross-entropy: static, part of what is compiled."""

    chunk: int
    label_smoothing: float
    detached_weight: bool
    softcap: float | None
    z_loss: float


def cross_entropy(
    hidden_BLD: jax.Array,
    head_VD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    *,
    bias_V: jax.Array | None = None,
    softcap: float | None = None,
    chunk: int = 1024,
    label_smoothing: float = 0.0,
    detached_weight: bool = False,
    z_loss: float = 0.0,
) -> tuple[Sum, dict[str, Sum]]:
    """Weighted cross-entropy of every target, and what a training log shows beside it.

    Args: hidden states [B, L, D], the head [V, D], int32 targets [B, L], float32 weights [B, L] (0 = not trained: the
    target may then be any number, such as a token that only the embedding has); the head's bias and the cap c of its
    logits, c tanh(logits / c), if it has them; `chunk`, how many tokens of the batch meet the vocabulary at once. With
    `label_smoothing` e the loss of a token is
    (1 - e) (-log p) + e mean_v(-log p_v); with `detached_weight` it is -p log p with the first p held fixed (DFT,
    arXiv:2508.05629, eq. 9), and e has no effect. With `z_loss` z, z log^2 Z is added to each, where Z is the sum over
    the exponentials of its (capped) logits: it keeps log Z near 0 (PaLM, arXiv:2204.02311, section 5). Returns the loss
    in nats as a `Sum` over tokens, and `entropy` (nats), `mean_token_accuracy` and, with a z, `z_loss` (what it adds)
    likewise; only the loss has a gradient.
    """
    count = weights_BL.sum()
    targets_BL = jnp.where(weights_BL == 0, 0, targets_BL)
    flavour = Flavour(chunk, 0.0 if detached_weight else label_smoothing, detached_weight, softcap, z_loss)
    sums = _token_sums(hidden_BLD, (head_VD, bias_V), targets_BL, weights_BL, flavour)
    metrics = {"entropy": Sum(sums.entropy, count), "mean_token_accuracy": Sum(sums.correct, count)}
    if z_loss:
        metrics["z_loss"] = Sum(sums.z_loss, count)
    return Sum(sums.loss, count), metrics


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _token_sums(hidden_BLD, head, targets_BL, weights_BL, flavour) -> TokenSums:
    sums, _, _ = _sweep(hidden_BLD, head, targets_BL, weights_BL, flavour, gradients=False)
    return sums


def _forward(hidden_BLD, head, targets_BL, weights_BL, flavour):
    """Both gradients are formed while a chunk's logits are at hand: no second product with the vocabulary in the
    backward pass.
    """
    sums, d_hidden_BLD, d_head = _sweep(hidden_BLD, head, targets_BL, weights_BL, flavour, gradients=True)
    return sums, (d_hidden_BLD, d_head)


def _backward(flavour, kept, cotangent: TokenSums):
    scale = cotangent.loss  # the others are for the log: no gradient flows through them
    d_hidden_BLD, d_head = jax.tree.map(lambda gradient: gradient * scale.astype(gradient.dtype), kept)
    return d_hidden_BLD, d_head, None, None


_token_sums.defvjp(_forward, _backward)


def _sweep(hidden_BLD, head, targets_BL, weights_BL, flavour: Flavour, *, gradients: bool):
    """Go through the batch in chunks; returns the sums and, if asked, the gradients of their `loss`."""
    V, shape, chunks = head[0].shape[0], targets_BL.shape, chunks_of(weights_BL != 0, flavour.chunk)
    pieces = tuple(map(chunks.cut, (hidden_BLD, targets_BL, weights_BL)))
    narrow = narrow_head(head, hidden_BLD.dtype)
    wide = functools.partial(jnp.zeros_like, dtype=jnp.float32)
    d_head: Any = jax.tree.map(lambda leaf: split_vocabulary(wide(leaf)), narrow) if gradients else None

    def body(carry, piece):
        return jax.lax.cond(anywhere((piece[2] > 0).any()), live, dead, carry, piece)

    def live(carry, piece):
        hidden_TD, targets_T, weights_T = seen_by_all(piece)
        sums, d_head = carry
        found, d_logits_TV = _chunk_sums(hidden_TD, narrow, targets_T, weights_T, flavour, vocabulary=V)
        sums = TokenSums(*(a + b for a, b in zip(sums, found, strict=True)))
        if not gradients:
            return (sums, None), None
        d_bias_V = None if d_head[1] is None else d_head[1] + d_logits_TV.sum(axis=0)
        d_logits_TV = d_logits_TV.astype(hidden_TD.dtype)
        d_hidden_TD = jnp.einsum("tv,vd->td", d_logits_TV, narrow[0], preferred_element_type=jnp.float32)
        d_kernel_VD = jnp.einsum("tv,td->vd", d_logits_TV, hidden_TD, preferred_element_type=jnp.float32)
        return (sums, (split_vocabulary(d_head[0] + d_kernel_VD), d_bias_V)), given_back(d_hidden_TD, piece[0])

    def dead(carry, piece):
        return carry, jnp.zeros_like(piece[0]) if gradients else None

    zero = jnp.zeros((), jnp.float32)
    (sums, d_head), d_pieces = jax.lax.scan(body, (TokenSums(zero, zero, zero, zero), d_head), pieces)
    if not gradients:
        return sums, None, None
    return sums, chunks.joined(d_pieces, shape), jax.tree.map(lambda d, leaf: d[:V].astype(leaf.dtype), d_head, head)


def _chunk_sums(
    hidden_TD, head, targets_T, weights_T, flavour: Flavour, *, vocabulary: int
) -> tuple[TokenSums, jax.Array]:
    """The sums of one chunk, and the gradient of its `loss` with respect to the logits [T, V], float32."""
    (head_VD, bias_V), cap = head, flavour.softcap
    logits_TV = jnp.einsum("td,vd->tv", hidden_TD, head_VD, preferred_element_type=jnp.float32)
    if bias_V is not None:
        logits_TV += bias_V.astype(jnp.float32)[None, :]
    if cap is not None:
        logits_TV = cap * jnp.tanh(logits_TV / cap)
    logits_TV = split_logits(logits_TV, vocabulary)
    highest_T = logits_TV.max(axis=-1)
    shifted_TV = logits_TV - highest_T[:, None]
    exp_TV = jnp.exp(shifted_TV)
    total_T = exp_TV.sum(axis=-1)
    lse_T = jnp.log(total_T)
    is_label_TV = jnp.arange(head_VD.shape[0])[None, :] == targets_T[:, None]
    label_T = jnp.where(is_label_TV, shifted_TV, 0.0).sum(axis=-1)
    nll_T = lse_T - label_T
    loss_T, smooth = nll_T, flavour.label_smoothing
    if smooth:
        loss_T = (1 - smooth) * nll_T + smooth * (lse_T - mean_of_words(shifted_TV, vocabulary))
    entropy_T = lse_T - (exp_TV * shifted_TV).sum(axis=-1) / total_T
    counted_T = weights_T
    if flavour.detached_weight:
        weights_T = weights_T * jnp.exp(-nll_T)
    # A cap is computed once for the maximum and once more for the label, and rounded differently.
    is_best_T = label_T >= 0 if cap is None else logits_TV.argmax(axis=-1) == targets_T
    log_z_T = lse_T + highest_T
    z_loss = (counted_T * flavour.z_loss * jnp.square(log_z_T)).sum()
    sums = TokenSums(
        loss=(weights_T * loss_T).sum() + z_loss,
        entropy=(counted_T * entropy_T).sum(),
        correct=(counted_T * is_best_T).sum(),
        z_loss=z_loss,
    )
    of_lse_T = weights_T + counted_T * (2 * flavour.z_loss) * log_z_T  # d loss / d log Z, and d log Z / d logits = p
    d_logits_TV = exp_TV * (of_lse_T / total_T)[:, None] - jnp.where(
        is_label_TV, ((1 - smooth) * weights_T)[:, None], 0.0
    )
    if smooth:
        d_logits_TV -= (weights_T * (smooth / vocabulary))[:, None]
    if cap is not None:
        d_logits_TV *= 1 - jnp.square(logits_TV / cap)
    return sums, of_words(d_logits_TV, vocabulary)
