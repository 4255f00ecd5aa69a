"""Generation with the training parameters: prefill, then blocks of decode steps in one jitted loop.

B rows, L prompt tokens (padded on the right), S slots of the cache, T new tokens, V vocabulary.

Each row stands at its own length, so prompts need no padding on the left. What is drawn for a row depends on (seed,
row, position) alone: not on the other rows, the block length or the devices.
"""

import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.decoder import Cache, Compute, DecoderConfig, Params, cached_hidden_states, empty_cache, head

BLOCK = 16  # decode steps in one dispatch: the host looks at the tokens, and stops, this often
BUCKET = 64  # prompts and caches are padded to multiples of this, so that few shapes are compiled


class Sampling(NamedTuple):
    """How the next token is drawn: greedily at temperature 0, else from softmax(logits / temperature) cut to `top_k`
    and `top_p` (0, 1: off).
    """

    temperature: float
    top_k: int
    top_p: float


GREEDY = Sampling(0.0, 0, 1.0)


class _Rows(NamedTuple):
    """Where every row stands: its cache, the last token, that token's position, and what it draws from."""

    cache: Cache
    token_B: jax.Array
    position_B: jax.Array
    key: jax.Array


def generate(
    params: Params,
    config: DecoderConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling = GREEDY,
    seed: int = 0,
    compute: Compute | None = None,
) -> list[list[int]]:
    """The new token ids of every prompt, up to and without the first stop id, at most `max_new_tokens` of them."""
    answers: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    for block_BT in _blocks(params, config, prompts, max_new_tokens, sampling, seed, compute, BLOCK):
        for row in sorted(open_rows):
            new, stopped = _until_stop(block_BT[row].tolist(), stop_ids)
            answers[row] += new
            if stopped or len(answers[row]) >= max_new_tokens:
                open_rows.discard(row)
        if not open_rows:
            break
    return [answer[:max_new_tokens] for answer in answers]


def stream(
    params: Params,
    config: DecoderConfig,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling = GREEDY,
    seed: int = 0,
    compute: Compute | None = None,
) -> Iterator[int]:
    """The new token ids of one prompt, one by one as they are drawn."""
    for block_BT in _blocks(params, config, [prompt], max_new_tokens, sampling, seed, compute, 1):
        new, stopped = _until_stop(block_BT[0].tolist(), stop_ids)
        yield from new
        if stopped:
            return


def _until_stop(tokens: list[int], stop_ids: Collection[int]) -> tuple[list[int], bool]:
    at = next((i for i, token in enumerate(tokens) if token in stop_ids), None)
    return (tokens, False) if at is None else (tokens[:at], True)


def _blocks(
    params: Params,
    config: DecoderConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    compute: Compute | None,
    block: int,
) -> Iterator[np.ndarray]:
    """New tokens [B, block] again and again, until `max_new_tokens` are there."""
    if not prompts or not all(prompts):
        raise ValueError("generate needs at least one prompt, and at least one token in each")
    compute = compute or Compute(dtype=params["embed"]["embedding"].dtype)
    longest = max(len(prompt) for prompt in prompts)
    tokens_BL = np.zeros((len(prompts), _round_up(longest)), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BL[row, : len(prompt)] = prompt
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    slots = _round_up(longest + max_new_tokens + block)
    rows, first_B = _prefill(params, tokens_BL, lengths_B, jax.random.key(seed), config, compute, sampling, slots)
    given = 1
    yield np.asarray(first_B)[:, None]
    while given < max_new_tokens:
        rows, block_TB = _decode(params, rows, config, compute, sampling, block)
        given += block
        yield np.asarray(block_TB).T


def _round_up(length: int) -> int:
    return -(-length // BUCKET) * BUCKET


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _prefill(
    params, tokens_BL, lengths_B, key, config: DecoderConfig, compute: Compute, sampling: Sampling, slots: int
):
    B, L = tokens_BL.shape
    positions_BL = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32)[None, :], (B, L))
    cache = empty_cache(config, rows=B, slots=slots, dtype=compute.dtype)
    hidden_BLD, cache = cached_hidden_states(
        params,
        config,
        cache,
        tokens_BL=tokens_BL,
        positions_BL=positions_BL,
        compute=compute,
        lengths_B=lengths_B,
    )
    last_BD = jnp.take_along_axis(hidden_BLD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    token_B = _draw(head(params, config).logits(last_BD), key, lengths_B, sampling)
    return _Rows(cache, token_B, lengths_B, key), token_B


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5), donate_argnums=1)
def _decode(params, rows: _Rows, config: DecoderConfig, compute: Compute, sampling: Sampling, steps: int):
    def one(rows: _Rows, _: None) -> tuple[_Rows, jax.Array]:
        hidden_BLD, cache = cached_hidden_states(
            params,
            config,
            rows.cache,
            tokens_BL=rows.token_B[:, None],
            positions_BL=rows.position_B[:, None],
            compute=compute,
        )
        position_B = rows.position_B + 1
        token_B = _draw(head(params, config).logits(hidden_BLD[:, 0]), rows.key, position_B, sampling)
        return _Rows(cache, token_B, position_B, rows.key), token_B

    return jax.lax.scan(one, rows, length=steps)


def _draw(logits_BV: jax.Array, key: jax.Array, position_B: jax.Array, sampling: Sampling) -> jax.Array:
    """The next token of every row, int32 [B]."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = _cut(logits_BV / sampling.temperature, sampling)

    def one(row: jax.Array, position: jax.Array, logits_V: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, row), position), logits_V)

    return jax.vmap(one)(jnp.arange(logits_BV.shape[0]), position_B, logits_BV).astype(jnp.int32)


def _cut(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Minus infinity for tokens outside of the `top_k` likeliest, and of the fewest whose probability reaches `top_p`
    (the likeliest stays).
    """
    if sampling.top_k > 0:
        kth_B = jax.lax.top_k(logits_BV, min(sampling.top_k, logits_BV.shape[1]))[0][:, -1]
        logits_BV = jnp.where(logits_BV < kth_B[:, None], -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        least_B = jnp.where(before_BV < sampling.top_p, sorted_BV, jnp.inf).min(axis=-1)
        logits_BV = jnp.where(logits_BV < least_B[:, None], -jnp.inf, logits_BV)
    return logits_BV


def stop_ids_of(generation_config: dict[str, Any], tokenizer: Any) -> set[int]:
    """The ids that end an answer: those of `generation_config.json`, and the tokenizer's end of sequence."""
    declared = generation_config.get("eos_token_id")
    declared = declared if isinstance(declared, list) else [declared]
    return {int(token) for token in (*declared, tokenizer.eos_token_id) if token is not None}
