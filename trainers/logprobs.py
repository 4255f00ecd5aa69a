"""Log-probabilities of targets, token by token: arrays in, arrays out.

B rows, L positions, D width, V vocabulary, T tokens of one chunk, S segments of a row.

The vocabulary never materialises for all tokens: hidden states meet the head in chunks, wanted tokens first, and chunks
with none are skipped. Of a token the backward pass keeps its hidden state and log Z; its logits are formed again there.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

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

ALSO = ("entropy", "mean_logit", "correct", "log_sum_squares")


class Flavour(NamedTuple):
    """What is computed, and how: static, part of what is compiled."""

    chunk: int
    softcap: float | None
    temperature: float
    also: tuple[str, ...]


def token_logprobs(
    hidden_BLD: jax.Array,
    head_VD: jax.Array,
    targets_BL: jax.Array,
    *,
    weights_BL: jax.Array | None = None,
    bias_V: jax.Array | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk: int = 512,
) -> jax.Array:
    """log p of every target [B, L], float32 nats, with gradients to hidden states, head and bias.

    Arguments are those of `token_scores`.
    """
    return token_scores(
        hidden_BLD,
        head_VD,
        targets_BL,
        also=(),
        weights_BL=weights_BL,
        bias_V=bias_V,
        softcap=softcap,
        temperature=temperature,
        chunk=chunk,
    )["logprob"]


def token_scores(
    hidden_BLD: jax.Array,
    head_VD: jax.Array,
    targets_BL: jax.Array,
    *,
    also: Sequence[str],
    weights_BL: jax.Array | None = None,
    bias_V: jax.Array | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
    chunk: int = 512,
) -> dict[str, jax.Array]:
    """`logprob` of every target, and what else is asked for of its prediction: float32 arrays [B, L].

    Args: hidden states [B, L, D], the head [V, D], int32 targets [B, L]; weights [B, L], 0 where nothing is wanted and
    all results are 0 (everything is, without them); the head's bias and the cap c of its logits, c tanh(logits / c);
    the `temperature` that these are divided by; `chunk`, how many tokens of the batch meet the vocabulary at once.
    `also` names any of `entropy` (nats), `mean_logit` (over the vocabulary), `correct` (1 where the target ranks first)
    and `log_sum_squares` (log sum_v p_v^2). Only `logprob` has a gradient, and with `entropy_gradient` the entropy.
    ValueError for another name.
    """
    if unknown := sorted(set(also) - set(ALSO)):
        raise ValueError(f"token_scores: also={unknown}: allowed are {', '.join(ALSO)}")
    wanted_BL = jnp.ones(targets_BL.shape, bool) if weights_BL is None else weights_BL > 0
    targets_BL = jnp.where(wanted_BL, targets_BL, 0)  # some may be tokens that only the embedding has
    flavour = Flavour(chunk, softcap, temperature, tuple(also))
    found = _scores(hidden_BLD, (head_VD, bias_V), targets_BL, wanted_BL, flavour)
    with_gradient = ("logprob", "entropy") if entropy_gradient else ("logprob",)
    return {name: x_BL if name in with_gradient else jax.lax.stop_gradient(x_BL) for name, x_BL in found.items()}


def row_sums(
    values_BL: jax.Array, weights_BL: jax.Array, *, segments_BL: jax.Array | None = None, segments: int = 0
) -> jax.Array:
    """The weighted sum of each row [B]; of packed rows that of each segment 1 … `segments` [B, S], 0 for one that a row
    does not have. Values of weight 0 do not matter, whatever they are.
    """
    weighted_BL = jnp.where(weights_BL == 0, 0.0, values_BL) * weights_BL
    if segments_BL is None:
        return weighted_BL.sum(axis=1)
    own_BSL = segments_BL[:, None, :] == jnp.arange(1, segments + 1, dtype=segments_BL.dtype)[None, :, None]
    return jnp.where(own_BSL, weighted_BL[:, None, :], 0.0).sum(axis=-1)


def row_means(
    values_BL: jax.Array, weights_BL: jax.Array, *, segments_BL: jax.Array | None = None, segments: int = 0
) -> jax.Array:
    """As `row_sums`, divided by the sum of the weights; 0 where that is 0."""
    total = row_sums(values_BL, weights_BL, segments_BL=segments_BL, segments=segments)
    weight = row_sums(jnp.ones_like(weights_BL), weights_BL, segments_BL=segments_BL, segments=segments)
    return total / jnp.where(weight == 0, 1.0, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _scores(hidden_BLD, head, targets_BL, wanted_BL, flavour: Flavour) -> dict[str, jax.Array]:
    return _sweep(hidden_BLD, head, targets_BL, wanted_BL, flavour)[0]


def _forward(hidden_BLD, head, targets_BL, wanted_BL, flavour: Flavour):
    """Arguments come with a mark that says whether a gradient is wanted of them: a frozen head, as under an adapter,
    spares its product in the backward pass. An array or none of it tells that on, since only arrays are kept.
    """
    trained = any(leaf.perturbed for leaf in jax.tree.leaves(head, is_leaf=lambda leaf: hasattr(leaf, "perturbed")))
    hidden_BLD, head, targets_BL, wanted_BL = jax.tree.map(
        lambda leaf: leaf.value, (hidden_BLD, head, targets_BL, wanted_BL), is_leaf=lambda x: hasattr(x, "perturbed")
    )
    found, log_z_pieces = _sweep(hidden_BLD, head, targets_BL, wanted_BL, flavour)
    return found, (hidden_BLD, head, targets_BL, wanted_BL, log_z_pieces, jnp.zeros(()) if trained else None)


def _backward(flavour: Flavour, kept, cotangents: dict[str, Any]):
    hidden_BLD, head, targets_BL, wanted_BL, log_z_pieces, trained = kept
    asked = {name: x_BL for name, x_BL in cotangents.items() if not isinstance(x_BL, SymbolicZero)}
    if not asked:
        return None, None, None, None
    asked = {name: jnp.where(wanted_BL, x_BL, 0.0) for name, x_BL in asked.items()}
    V, chunks = head[0].shape[0], chunks_of(wanted_BL, flavour.chunk)
    pieces = (
        chunks.cut(hidden_BLD),
        chunks.cut(targets_BL),
        log_z_pieces,
        {name: chunks.cut(x_BL) for name, x_BL in asked.items()},
    )
    narrow = narrow_head(head, hidden_BLD.dtype)
    wide = functools.partial(jnp.zeros_like, dtype=jnp.float32)
    d_head: Any = None if trained is None else jax.tree.map(lambda leaf: split_vocabulary(wide(leaf)), narrow)

    def live(d_head, piece):
        hidden_TD, targets_T, log_z_T, asked_T = seen_by_all(piece)
        logits_TV = _logits(hidden_TD, narrow, flavour, vocabulary=V)
        d_logits_TV = _chunk_gradient(logits_TV, targets_T, log_z_T, asked_T)
        if flavour.temperature != 1:
            d_logits_TV /= flavour.temperature
            logits_TV *= flavour.temperature
        if flavour.softcap is not None:
            d_logits_TV *= 1 - jnp.square(logits_TV / flavour.softcap)
        d_logits_TV = of_words(d_logits_TV, V)
        d_narrow_TV = d_logits_TV.astype(hidden_TD.dtype)
        if d_head is not None:
            d_kernel_VD = jnp.einsum("tv,td->vd", d_narrow_TV, hidden_TD, preferred_element_type=jnp.float32)
            d_bias_V = None if d_head[1] is None else d_head[1] + d_logits_TV.sum(axis=0)
            d_head = (split_vocabulary(d_head[0] + d_kernel_VD), d_bias_V)
        d_hidden_TD = jnp.einsum("tv,vd->td", d_narrow_TV, narrow[0], preferred_element_type=jnp.float32)
        return d_head, given_back(d_hidden_TD, piece[0])

    def dead(d_head, piece):
        return d_head, jnp.zeros_like(piece[0])

    def body(d_head, piece):
        some = functools.reduce(jnp.logical_or, [(x != 0).any() for x in piece[3].values()])
        return jax.lax.cond(anywhere(some), live, dead, d_head, piece)

    d_head, d_pieces = jax.lax.scan(body, d_head, pieces)
    if d_head is not None:
        d_head = jax.tree.map(lambda d, leaf: d[:V].astype(leaf.dtype), d_head, head)
    return chunks.joined(d_pieces, targets_BL.shape), d_head, None, None


_scores.defvjp(_forward, _backward, symbolic_zeros=True)


def _sweep(hidden_BLD, head, targets_BL, wanted_BL, flavour: Flavour) -> tuple[dict[str, jax.Array], jax.Array]:
    """Go through the batch in chunks; returns the results [B, L] by name, and log Z as the pieces it came in."""
    V, chunks = head[0].shape[0], chunks_of(wanted_BL, flavour.chunk)
    pieces = tuple(map(chunks.cut, (hidden_BLD, targets_BL, wanted_BL)))
    narrow = narrow_head(head, hidden_BLD.dtype)

    def live(piece):
        hidden_TD, targets_T, _ = seen_by_all(piece)
        logits_TV = _logits(hidden_TD, narrow, flavour, vocabulary=V)
        found, log_z_T = _chunk_scores(logits_TV, targets_T, flavour.also, vocabulary=V)
        wanted = piece[2]
        found = {name: jnp.where(wanted, x_T.reshape(wanted.shape), 0.0) for name, x_T in found.items()}
        return found, log_z_T.reshape(wanted.shape)  # log Z of all: e^logits / Z must be finite in the backward pass

    def dead(piece):
        zeros = jnp.zeros(piece[2].shape, jnp.float32)
        return dict.fromkeys(("logprob", *flavour.also), zeros), zeros

    def body(_, piece):
        return None, jax.lax.cond(anywhere(piece[2].any()), live, dead, piece)

    _, (found, log_z_pieces) = jax.lax.scan(body, None, pieces)
    return {name: chunks.joined(x, targets_BL.shape) for name, x in found.items()}, log_z_pieces


def _chunk_scores(logits_TV: jax.Array, targets_T: jax.Array, also: Sequence[str], *, vocabulary: int):
    """What `token_scores` says of the tokens of a chunk, and their log Z."""
    highest_T = logits_TV.max(axis=-1)
    shifted_TV = logits_TV - highest_T[:, None]
    exp_TV = jnp.exp(shifted_TV)
    total_T = exp_TV.sum(axis=-1)
    lse_T = jnp.log(total_T)
    is_label_TV = jnp.arange(logits_TV.shape[1])[None, :] == targets_T[:, None]
    label_T = jnp.where(is_label_TV, shifted_TV, 0.0).sum(axis=-1)
    found = {"logprob": label_T - lse_T}
    if "entropy" in also:
        found["entropy"] = lse_T - (exp_TV * shifted_TV).sum(axis=-1) / total_T
    if "mean_logit" in also:
        found["mean_logit"] = mean_of_words(logits_TV, vocabulary)
    if "correct" in also:
        found["correct"] = (logits_TV.argmax(axis=-1) == targets_T).astype(jnp.float32)
    if "log_sum_squares" in also:
        found["log_sum_squares"] = jnp.log(jnp.square(exp_TV).sum(axis=-1)) - 2 * lse_T
    return found, lse_T + highest_T


def _chunk_gradient(logits_TV: jax.Array, targets_T: jax.Array, log_z_T: jax.Array, asked_T: dict[str, jax.Array]):
    """The gradient with respect to the logits [T, V] of what is asked for, by name: of a target's log p that is
    (1 for the target) - p, of the entropy H = -sum p log p it is -p (log p + H).
    """
    log_p_TV = logits_TV - log_z_T[:, None]
    p_TV = jnp.exp(log_p_TV)
    found = []
    if "logprob" in asked_T:
        is_label_TV = jnp.arange(logits_TV.shape[1])[None, :] == targets_T[:, None]
        found.append((jnp.where(is_label_TV, 1.0, 0.0) - p_TV) * asked_T["logprob"][:, None])
    if "entropy" in asked_T:
        entropy_T = -(p_TV * log_p_TV).sum(axis=-1)
        found.append(-p_TV * (log_p_TV + entropy_T[:, None]) * asked_T["entropy"][:, None])
    return functools.reduce(jnp.add, found)


def _logits(hidden_TD: jax.Array, head, flavour: Flavour, *, vocabulary: int) -> jax.Array:
    """Logits of a chunk [T, V], float32, capped and by the temperature."""
    kernel_VD, bias_V = head
    softcap = flavour.softcap
    logits_TV = jnp.einsum("td,vd->tv", hidden_TD, kernel_VD, preferred_element_type=jnp.float32)
    if bias_V is not None:
        logits_TV += bias_V.astype(jnp.float32)[None, :]
    if softcap is not None:
        logits_TV = softcap * jnp.tanh(logits_TV / softcap)
    if flavour.temperature != 1:
        logits_TV /= flavour.temperature
    return split_logits(logits_TV, vocabulary)
