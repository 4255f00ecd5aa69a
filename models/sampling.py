"""How the next token is drawn from logits, and how likely it was.

B rows, V vocabulary, N chunks of the vocabulary, C tokens of a chunk.

Definitions and their order are those of transformers: the repetition penalty on the logits as they are, then the
temperature, top-k, top-p of what is left, and min-p. Tokens that are as likely as the last one kept are kept too.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 256  # tokens whose probabilities are added up first, when one is drawn


class Sampling(NamedTuple):
    """How the next token is drawn: greedily at temperature 0, else from softmax(logits / temperature) cut to `top_k`,
    `top_p` and `min_p` (0, 1, 0: off). Logits of tokens that are in the prompt or the answer are divided by
    `repetition_penalty` where positive, multiplied with it where negative (1: off; arXiv:1909.05858, section 4.1).
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def cuts(self) -> bool:
        """Whether some tokens are left out."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def penalises(self) -> bool:
        """Whether it matters which tokens were there before."""
        return self.repetition_penalty != 1

    @property
    def warps(self) -> bool:
        """Whether what is drawn from is another distribution than softmax(logits / temperature)."""
        return self.cuts or self.penalises


GREEDY = Sampling(0.0, 0, 1.0)


class Drawn(NamedTuple):
    """Tokens, int32 [B], with the log-probability of each under softmax(logits / temperature) (1 where greedy), and
    under the distribution that it was drawn from (None where that is the same one).
    """

    token_B: jax.Array
    logprob_B: jax.Array
    warped_B: jax.Array | None


def check_sampling(sampling: Sampling) -> None:
    """ValueError for a number out of its range."""
    for name, fits, allowed in (
        ("temperature", sampling.temperature >= 0, "0 (greedy) or more"),
        ("top_k", sampling.top_k >= 0, "0 (off) or more"),
        ("top_p", 0 < sampling.top_p <= 1, "more than 0 and at most 1 (off)"),
        ("min_p", 0 <= sampling.min_p <= 1, "from 0 (off) to 1"),
        ("repetition_penalty", sampling.repetition_penalty > 0, "more than 0 (1: off)"),
    ):
        if not fits:
            raise ValueError(f"{name} {getattr(sampling, name)} must be {allowed}")


def draw(
    logits_BV: jax.Array,
    sampling: Sampling,
    *,
    key: jax.Array,
    requests_B: jax.Array,
    positions_B: jax.Array,
    seen_BV: jax.Array | None,
) -> Drawn:
    """The next token of every row, which has the number `requests_B` and puts it at `positions_B`: what is drawn
    depends on these, the key and the row's logits alone. `seen_BV` is true for tokens to penalise (None: no penalty).
    """
    scaled_BV = logits_BV / (sampling.temperature or 1.0)
    warped_BV = scaled_BV
    if sampling.penalises:
        assert seen_BV is not None
        penalty = sampling.repetition_penalty
        penalised_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
        warped_BV = jnp.where(seen_BV, penalised_BV, logits_BV) / (sampling.temperature or 1.0)
    if sampling.cuts:
        warped_BV = cut(warped_BV, sampling)
    if sampling.temperature == 0:
        token_B = jnp.argmax(warped_BV, axis=-1).astype(jnp.int32)
    else:
        token_B = _categorical(warped_BV, _uniform(key, requests_B, positions_B))
    warped_B = _logprob(warped_BV, token_B) if sampling.warps else None
    return Drawn(token_B, _logprob(scaled_BV, token_B), warped_B)


def cut(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Minus infinity for tokens outside of the `top_k` likeliest, then of the fewest whose probability reaches `top_p`,
    then for those less likely than `min_p` times the likeliest, which always stays.
    """
    if sampling.top_k > 0:
        logits_BV = _likeliest(logits_BV, jnp.ones_like(logits_BV), sampling.top_k)
    if sampling.top_p < 1:
        logits_BV = _likeliest(logits_BV, jax.nn.softmax(logits_BV, axis=-1), sampling.top_p)
    if sampling.min_p > 0:
        least_B1 = logits_BV.max(axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return logits_BV


def _likeliest(logits_BV: jax.Array, weights_BV: jax.Array, limit: float) -> jax.Array:
    """Minus infinity for tokens where the weights of all likelier ones add up to `limit` or more.

    The least logit that stays is found by halving the range of all floats, as integers in the same order, 32 times:
    sorting a vocabulary takes many times as long.
    """
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.int32)
    order_BV = jnp.where(bits_BV < 0, bits_BV ^ jnp.int32(0x7FFFFFFF), bits_BV)

    def halve(_: int, between: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = between
        middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)  # their mean, which does not overflow
        above_B = jnp.where(order_BV > middle_B[:, None], weights_BV, 0).sum(axis=-1)
        stays_B = above_B < limit
        return jnp.where(stays_B, low_B, middle_B), jnp.where(stays_B, middle_B, high_B)

    ends = jnp.iinfo(jnp.int32)
    low_B = jnp.full(logits_BV.shape[:1], ends.min, jnp.int32)
    _, least_B = jax.lax.fori_loop(0, 32, halve, (low_B, jnp.full_like(low_B, ends.max)))
    return jnp.where(order_BV < least_B[:, None], -jnp.inf, logits_BV)


def _uniform(key: jax.Array, requests_B: jax.Array, positions_B: jax.Array) -> jax.Array:
    """Two numbers in [0, 1) for each row, [B, 2]."""

    def one(request: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, request), position), (2,))

    return jax.vmap(one)(requests_B, positions_B)


def _categorical(logits_BV: jax.Array, uniform_B2: jax.Array) -> jax.Array:
    """A token of softmax(logits) for each row, int32 [B]: the first number picks a chunk of the vocabulary, the second
    a token in it. So a row takes two random numbers, where one for each token would take longer than a small model.
    """
    B, V = logits_BV.shape
    mass_BV = jnp.exp(logits_BV - logits_BV.max(axis=-1, keepdims=True))
    mass_BNC = jnp.pad(mass_BV, ((0, 0), (0, -V % CHUNK))).reshape(B, -1, CHUNK)
    chunk_B = _pick(mass_BNC.sum(axis=-1), uniform_B2[:, 0])
    mass_BC = jnp.take_along_axis(mass_BNC, chunk_B[:, None, None], axis=1)[:, 0]
    return chunk_B * CHUNK + _pick(mass_BC, uniform_B2[:, 1])


def _pick(mass_BN: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """An index for each row, as likely as its share of the mass; never one without mass, whatever is rounded."""
    reached_BN = jnp.cumsum(mass_BN, axis=-1)
    hit_BN = (reached_BN > uniform_B[:, None] * reached_BN[:, -1:]) & (mass_BN > 0)
    found_B = jnp.where(hit_BN.any(axis=-1), jnp.argmax(hit_BN, axis=-1), jnp.argmax(mass_BN, axis=-1))
    return found_B.astype(jnp.int32)


def _logprob(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
