"""What an engine runs on the devices: prompts prefilled, put into slots, and a block of decode steps for all slots.

S slots, U prompts of one prefill, T slots that are filled at once, L tokens of a prompt (padded on the right), V
vocabulary, D width, P places of a slot in the cache, K stop ids.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.decoder import Cache, Compute, DecoderConfig, Params, cached_hidden_states, empty_cache, head, layers_apart
from models.layers import Sight
from models.looking import at_tokens, empty_sight, placed, sight_of
from models.sampling import Drawn, Sampling, draw
from models.sharding import constrain
from models.vision import Images

NONE = -1  # in the place of a token where there is none


class Rows(NamedTuple):
    """Where every slot stands: its cache, the last token and that token's position, how far beyond it the rotation is,
    its request's number, how many tokens may follow (0: the slot is free), the tokens that were there, where that
    matters [S, V], and what the slots look at.
    """

    cache: Any
    token_S: jax.Array
    position_S: jax.Array
    shift_S: jax.Array
    number_S: jax.Array
    left_S: jax.Array
    seen_SV: jax.Array | None
    sight: Sight | None = None


class Prefilled(NamedTuple):
    """Prompts with what follows from them: cache [n, U, K, L, H], logits of the first new token, lengths, how far
    beyond its place that token is rotated, tokens, what that token looks at.
    """

    cache: Cache
    logits_UV: jax.Array
    length_U: jax.Array
    shift_U: jax.Array
    seen_UV: jax.Array | None
    sight: Sight | None = None


class Placement(NamedTuple):
    """Which prompts of a prefill go to which slots, for which requests; a slot beyond the last one is none."""

    prompt_T: jax.Array
    slot_T: jax.Array
    number_T: jax.Array
    left_T: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "slots", "places", "dtype", "apart", "penalises", "looks"))
def empty_rows(
    *, config: DecoderConfig, slots: int, places: int, dtype: Any, apart: bool, penalises: bool, looks: int = 0
) -> Rows:
    """Free slots with so many places in the cache; of a model that looks at pictures, so many features of these."""
    cache: Any = empty_cache(config, rows=slots, slots=places, dtype=dtype)
    none_S = jnp.zeros((slots,), jnp.int32)
    seen_SV = jnp.zeros((slots, config.vocabulary), bool) if penalises else None
    cache = layers_apart(cache, cache.k.shape[0]) if apart else cache
    sight = empty_sight(config, rows=slots, features=looks, dtype=dtype) if looks else None
    return Rows(cache, none_S, none_S, none_S, none_S, none_S, seen_SV, sight)


@functools.partial(jax.jit, static_argnames="places")
def grown(cache: Any, *, places: int) -> Any:
    def one(leaf: jax.Array) -> jax.Array:
        return jnp.pad(leaf, ((0, 0), (0, 0), (0, 0), (0, places - leaf.shape[3]), (0, 0)))

    return jax.tree.map(one, cache)


@functools.partial(jax.jit, static_argnames=("config", "compute", "sampling"))
def prefill(
    params: Params,
    tokens_UL: jax.Array,
    images: Images | None,
    *,
    config: DecoderConfig,
    compute: Compute,
    sampling: Sampling,
) -> Prefilled:
    """Every prompt's cache and the logits that follow it; NONE pads prompts on the right."""
    U, L = tokens_UL.shape
    length_U = (tokens_UL != NONE).sum(axis=1)
    at_U = jnp.maximum(length_U, 1) - 1
    sight = None
    if images is not None and images.looks is not None:
        sight = sight_of(params, config, images, compute, keys=True)
    hidden_ULD, cache = cached_hidden_states(
        params,
        config,
        empty_cache(config, rows=U, slots=L, dtype=compute.dtype),
        tokens_BL=jnp.maximum(tokens_UL, 0),
        positions_BL=jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32)[None, :], (U, L)),
        compute=compute,
        lengths_B=length_U,
        images=images,
        sight=sight,
    )
    last_UD = jnp.take_along_axis(hidden_ULD, at_U[:, None, None], axis=1)[:, 0]
    seen_UV = None
    if sampling.penalises:
        there_UL = jnp.where(tokens_UL == NONE, config.vocabulary, tokens_UL)
        seen_UV = jnp.zeros((U, config.vocabulary), bool).at[jnp.arange(U)[:, None], there_UL].set(True, mode="drop")
    shift_U = jnp.zeros_like(length_U)
    if images is not None and images.axes is not None:
        shift_U = images.axes.max(axis=(1, 2)) + 1 - length_U
    sight = None if sight is None else at_tokens(sight, at_U)
    return Prefilled(cache, head(params, config).logits(last_UD), length_U, shift_U, seen_UV, sight)


@functools.partial(jax.jit, static_argnames="sampling", donate_argnums=0)
def place(
    rows: Rows, prefilled: Prefilled, to: Placement, key: jax.Array, stop_ids_K: jax.Array, *, sampling: Sampling
) -> tuple[Rows, Drawn]:
    """Prompts copied to slots, and the first token of each drawn [T]."""
    length_T = prefilled.length_U[to.prompt_T]
    seen_TV = None if prefilled.seen_UV is None else prefilled.seen_UV[to.prompt_T]
    drawn = draw(
        prefilled.logits_UV[to.prompt_T],
        sampling,
        key=key,
        requests_B=to.number_T,
        positions_B=length_T,
        seen_BV=seen_TV,
    )
    left_T, seen_TV = _after(drawn.token_B, to.left_T, seen_TV, stop_ids_K)

    def put(own: jax.Array, new: jax.Array) -> jax.Array:
        return own.at[to.slot_T].set(new.astype(own.dtype), mode="drop")

    def copied(own: jax.Array, new: jax.Array) -> jax.Array:
        return own.at[:, to.slot_T, :, : new.shape[3]].set(new[:, to.prompt_T], mode="drop")

    cache: Any = prefilled.cache
    cache = layers_apart(cache, cache.k.shape[0]) if isinstance(rows.cache, list) else cache
    rows = Rows(
        jax.tree.map(copied, rows.cache, cache),
        put(rows.token_S, drawn.token_B),
        put(rows.position_S, length_T),
        put(rows.shift_S, prefilled.shift_U[to.prompt_T]),
        put(rows.number_S, to.number_T),
        put(rows.left_S, left_T),
        None if rows.seen_SV is None or seen_TV is None else put(rows.seen_SV, seen_TV),
        None if rows.sight is None else placed(rows.sight, prefilled.sight, to.prompt_T, to.slot_T),
    )
    return rows, _whole(drawn)


@functools.partial(jax.jit, static_argnames=("config", "compute", "sampling", "steps"), donate_argnums=1)
def decode(
    params: Params,
    rows: Rows,
    open_S: jax.Array,
    key: jax.Array,
    stop_ids_K: jax.Array,
    *,
    config: DecoderConfig,
    compute: Compute,
    sampling: Sampling,
    steps: int,
    until_free: bool,
) -> tuple[Rows, Drawn]:
    """Up to so many steps of all slots, fewer where all have ended, or with `until_free` where one has; what was drawn
    [steps, S], NONE where nothing.
    """

    def going(state: tuple[jax.Array, Rows, Drawn]) -> jax.Array:
        live_S = state[1].left_S > 0
        return (state[0] < steps) & live_S.any() & ~(until_free & (open_S & ~live_S).any())

    def one(state: tuple[jax.Array, Rows, Drawn]) -> tuple[jax.Array, Rows, Drawn]:
        step, rows, block = state
        hidden_S1D, cache = cached_hidden_states(
            params,
            config,
            rows.cache,
            tokens_BL=rows.token_S[:, None],
            positions_BL=rows.position_S[:, None],
            turns_BL=(rows.position_S + rows.shift_S)[:, None],
            compute=compute,
            sight=rows.sight,
        )
        active_S, position_S = rows.left_S > 0, rows.position_S + 1
        drawn = draw(
            head(params, config).logits(hidden_S1D[:, 0]),
            sampling,
            key=key,
            requests_B=rows.number_S,
            positions_B=position_S,
            seen_BV=rows.seen_SV,
        )
        left_S, seen_SV = _after(drawn.token_B, rows.left_S, rows.seen_SV, stop_ids_K)
        position_S = jnp.where(active_S, position_S, rows.position_S)
        rows = rows._replace(cache=cache, token_S=drawn.token_B, position_S=position_S, left_S=left_S, seen_SV=seen_SV)
        drawn = _whole(drawn._replace(token_B=jnp.where(active_S, drawn.token_B, NONE)))
        return step + 1, rows, jax.tree.map(lambda all_TS, new_S: all_TS.at[step].set(new_S), block, drawn)

    nothing = jnp.zeros((steps, open_S.shape[0]), jnp.float32)
    block = Drawn(jnp.full(nothing.shape, NONE, jnp.int32), nothing, nothing if sampling.warps else None)
    rows = rows._replace(left_S=jnp.where(open_S, rows.left_S, 0))
    _, rows, block = jax.lax.while_loop(going, one, (jnp.int32(0), rows, block))
    return rows, block


def _after(
    token_S: jax.Array, left_S: jax.Array, seen_SV: jax.Array | None, stop_ids_K: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """How many tokens may follow each of these, and the tokens that are then there."""
    stopped_S = (token_S[:, None] == stop_ids_K[None, :]).any(axis=1)
    left_S = jnp.where(stopped_S, 0, jnp.maximum(left_S - 1, 0))
    return left_S, None if seen_SV is None else seen_SV.at[jnp.arange(token_S.shape[0]), token_S].set(True)


def _whole(drawn: Drawn) -> Drawn:
    """On every device, since every process reads it."""
    return jax.tree.map(lambda x: constrain(x, None), drawn)
