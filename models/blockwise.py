"""Attention by blocks of queries and of keys: memory grows with the length of a row, compiled code with neither
(arXiv:2112.05682; the softmax over blocks and its gradient: arXiv:2205.14135, §3.1 and appendix B).

B rows, L queries, S keys, N query heads, K key heads, G = N / K, H head width; q queries and s keys of a block,
Q = G q.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from models.sharding import split_heads

MASKED = -1e30  # finite, so that a row of only masked keys (padding) gives numbers and not NaN
BLOCK = 512
NOBODY = -1  # the segment of what only makes up a whole block


class Plan(NamedTuple):
    """What is static: how scores come about, how far a query sees back (None: everywhere), and keys of a block."""

    scores: Any
    reach: int | None
    block: int


def blockwise(
    q_BLNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    sinks_N: jax.Array | None,
    *,
    where: Any,
    scores: Any,
    reach: int | None,
) -> jax.Array:
    """As `attention.attend`, of rows whose keys stand where their queries do (S = L), each device with its own rows,
    heads and, with `context`, queries.
    """
    mesh = jax.sharding.get_abstract_mesh()
    L = q_BLNH.shape[1]
    shards = 1 if mesh.empty else mesh.shape["context"]
    block = min(BLOCK, -(-L // shards))
    more = -L % (block * shards)

    def pad(x: jax.Array, value: int = 0) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2), constant_values=value)

    q_BLNH, k_BSKH, v_BSKH = pad(q_BLNH), pad(k_BSKH), pad(v_BSKH)
    where = where._make(
        None if x is None else pad(x, NOBODY if "segments" in name else 0) for name, x in where._asdict().items()
    )
    plan = Plan(scores, reach, block)
    if mesh.empty or mesh.size == 1:
        return _attended(plan, q_BLNH, k_BSKH, v_BSKH, sinks_N, where, jnp.int32(0))[:, :L]

    k_BSKH, v_BSKH, q_spec, k_spec = split_heads(q_BLNH, k_BSKH, v_BSKH)
    places = {
        name: None if x is None else P(*(q_spec if name[0] == "q" else k_spec)[:2])
        for name, x in where._asdict().items()
    }

    def own(q_BLNH, k_BSKH, v_BSKH, sinks_N, where):
        begun = jax.lax.axis_index("context") * q_BLNH.shape[1]
        return _attended(plan, q_BLNH, k_BSKH, v_BSKH, sinks_N, where, begun)

    out_BLNH = jax.shard_map(
        own,
        in_specs=(q_spec, k_spec, k_spec, None if sinks_N is None else P(q_spec[2]), where._make(places.values())),
        out_specs=q_spec,
        check_vma=False,  # loops whose carries begin as zeros would have to be told along which axes these differ
    )(q_BLNH, k_BSKH, v_BSKH, sinks_N, where)
    return out_BLNH[:, :L]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attended(plan: Plan, q_BLNH, k_BSKH, v_BSKH, sinks_N, where, begun):
    """Attention [B, L, N, H] of queries the first of which is the row's `begun`-th."""
    return _forward(plan, q_BLNH, k_BSKH, v_BSKH, sinks_N, where, begun)[0]


def _forward(plan: Plan, q_BLNH, k_BSKH, v_BSKH, sinks_N, where, begun):
    (B, L, N, H), (S, K) = q_BLNH.shape, k_BSKH.shape[1:3]
    G, size = N // K, plan.block

    def queries(_, number):
        q_BKQH = _folded(_block(q_BLNH, number, size), K)
        first, last = _keys(plan, begun + number * size, S)

        def keys(other, state):
            most_BKQ, total_BKQ, sum_BKQH = state
            scores_BKQS = _scores(plan, q_BKQH, k_BSKH, where, number, other)[0]
            highest_BKQ = jnp.maximum(most_BKQ, scores_BKQS.max(axis=-1))
            weights_BKQS = jnp.exp(scores_BKQS - highest_BKQ[..., None])
            shrink_BKQ = jnp.exp(most_BKQ - highest_BKQ)
            v_BsKH = _block(v_BSKH, other, size)
            added_BKQH = jnp.einsum(
                "bkqs,bskh->bkqh", weights_BKQS.astype(v_BsKH.dtype), v_BsKH, preferred_element_type=jnp.float32
            )
            return (
                highest_BKQ,
                total_BKQ * shrink_BKQ + weights_BKQS.sum(axis=-1),
                sum_BKQH * shrink_BKQ[..., None] + added_BKQH,
            )

        Q = G * size
        if sinks_N is None:
            most_BKQ, total_BKQ = jnp.full((B, K, Q), MASKED, jnp.float32), jnp.zeros((B, K, Q), jnp.float32)
        else:
            most_BKQ = jnp.broadcast_to(_per_query(sinks_N, K, size), (B, K, Q))
            total_BKQ = jnp.ones((B, K, Q), jnp.float32)
        state = (most_BKQ, total_BKQ, jnp.zeros((B, K, Q, H), jnp.float32))
        most_BKQ, total_BKQ, sum_BKQH = jax.lax.fori_loop(first, last, keys, state)
        out_BKQH = sum_BKQH / total_BKQ[..., None]
        return None, (_unfolded(out_BKQH, G).astype(q_BLNH.dtype), most_BKQ + jnp.log(total_BKQ))

    _, (blocks, log_z) = jax.lax.scan(queries, None, jnp.arange(L // size))
    out_BLNH = jnp.moveaxis(blocks, 0, 1).reshape(B, L, N, H)
    return out_BLNH, (q_BLNH, k_BSKH, v_BSKH, sinks_N, where, begun, out_BLNH, log_z)


def _backward(plan: Plan, kept, d_out_BLNH):
    q_BLNH, k_BSKH, v_BSKH, sinks_N, where, begun, out_BLNH, log_z = kept
    (B, L, N, H), (S, K) = q_BLNH.shape, k_BSKH.shape[1:3]
    G, size, dtype = N // K, plan.block, q_BLNH.dtype
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def queries(state, piece):
        number, log_z_BKQ = piece
        q_BKQH, d_out_BKQH, out_BKQH = (_folded(_block(x, number, size), K) for x in (q_BLNH, d_out_BLNH, out_BLNH))
        drift_BKQ = (d_out_BKQH.astype(jnp.float32) * out_BKQH.astype(jnp.float32)).sum(axis=-1)
        first, last = _keys(plan, begun + number * size, S)

        def keys(other, state):
            d_q_BKQH, d_k_BSKH, d_v_BSKH = state
            scores_BKQS, slope_BKQS = _scores(plan, q_BKQH, k_BSKH, where, number, other)
            weights_BKQS = jnp.exp(scores_BKQS - log_z_BKQ[..., None])
            k_BsKH, v_BsKH = _block(k_BSKH, other, size), _block(v_BSKH, other, size)
            d_weights_BKQS = product("bkqh,bskh->bkqs", d_out_BKQH, v_BsKH)
            d_scores_BKQS = (weights_BKQS * (d_weights_BKQS - drift_BKQ[..., None]) * slope_BKQS).astype(dtype)
            d_q_BKQH += product("bkqs,bskh->bkqh", d_scores_BKQS, k_BsKH)
            d_k_BsKH = product("bkqs,bkqh->bskh", d_scores_BKQS, q_BKQH)
            d_v_BsKH = product("bkqs,bkqh->bskh", weights_BKQS.astype(dtype), d_out_BKQH)
            return d_q_BKQH, _added(d_k_BSKH, d_k_BsKH, other, size), _added(d_v_BSKH, d_v_BsKH, other, size)

        d_q_BKQH = jnp.zeros(q_BKQH.shape, jnp.float32)
        d_q_BKQH, d_k_BSKH, d_v_BSKH = jax.lax.fori_loop(first, last, keys, (d_q_BKQH, *state[:2]))
        d_sinks_N = state[2]
        if sinks_N is not None:
            to_nothing_BKQ = jnp.exp(_per_query(sinks_N, K, size) - log_z_BKQ)
            d_sinks_N -= (to_nothing_BKQ * drift_BKQ).reshape(B, K, G, size).sum(axis=(0, 3)).reshape(N)
        return (d_k_BSKH, d_v_BSKH, d_sinks_N), _unfolded(d_q_BKQH, G).astype(dtype)

    zero = functools.partial(jnp.zeros, dtype=jnp.float32)
    state = (zero(k_BSKH.shape), zero(v_BSKH.shape), None if sinks_N is None else zero(sinks_N.shape))
    (d_k, d_v, d_sinks), blocks = jax.lax.scan(queries, state, (jnp.arange(L // size), log_z))
    d_q_BLNH = jnp.moveaxis(blocks, 0, 1).reshape(B, L, N, H)
    d_sinks = d_sinks if d_sinks is None else d_sinks.astype(sinks_N.dtype)
    return d_q_BLNH, d_k.astype(k_BSKH.dtype), d_v.astype(v_BSKH.dtype), d_sinks, None, None


_attended.defvjp(_forward, _backward)


def _scores(plan: Plan, q_BKQH, k_BSKH, where, number, other) -> tuple[jax.Array, jax.Array]:
    """Scores [B, K, Q, s] of a block of queries and one of keys, float32, and how they change with the product of query
    and key.
    """
    size, (scale, window, softcap) = plan.block, plan.scores
    scores_BKQS = scale * jnp.einsum(
        "bkqh,bskh->bkqs", q_BKQH, _block(k_BSKH, other, size), preferred_element_type=jnp.float32
    )
    slope_BKQS: Any = jnp.float32(scale)
    if softcap is not None:
        scores_BKQS = softcap * jnp.tanh(scores_BKQS / softcap)
        slope_BKQS = scale * (1 - jnp.square(scores_BKQS / softcap))
    near = where._make(
        None if x is None else _block(x, number if name[0] == "q" else other, size)
        for name, x in where._asdict().items()
    )
    visible_BQS = jnp.tile(near.visible_BLS(window), (1, q_BKQH.shape[2] // size, 1))[:, None]
    return jnp.where(visible_BQS, scores_BKQS, MASKED), jnp.where(visible_BQS, slope_BKQS, 0.0)


def _keys(plan: Plan, begun, S: int) -> tuple[Any, Any]:
    """The first block of keys that a block of queries sees anything of, and the one behind the last."""
    if plan.reach is None:
        return 0, S // plan.block
    return jnp.maximum(begun - plan.reach + 1, 0) // plan.block, begun // plan.block + 1


def _block(x: jax.Array, number, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, number * size, size, axis=1)


def _added(x: jax.Array, block: jax.Array, number, size: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, _block(x, number, size) + block, number * size, axis=1)


def _folded(x_BqNH: jax.Array, K: int) -> jax.Array:
    """[B, q, N, H] as [B, K, G q, H]."""
    B, size, N, H = x_BqNH.shape
    return x_BqNH.reshape(B, size, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * size, H)


def _unfolded(x_BKQH: jax.Array, G: int) -> jax.Array:
    """The inverse of `_folded`."""
    B, K, Q, H = x_BKQH.shape
    return x_BKQH.reshape(B, K, G, Q // G, H).transpose(0, 3, 1, 2, 4).reshape(B, Q // G, K * G, H)


def _per_query(sinks_N: jax.Array, K: int, size: int) -> jax.Array:
    """Each query's sink [1, K, G q], float32."""
    return jnp.repeat(sinks_N.astype(jnp.float32).reshape(K, -1), size, axis=1)[None]
