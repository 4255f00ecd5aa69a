"""Tokens through the experts of one device: sorted by expert, multiplied group by group, put back, added up.

T tokens, K experts of a token, S copies of tokens sorted by expert, E experts, D width, F width of an expert.
"""

import jax
import jax.numpy as jnp

from models.activations import ACTIVATIONS
from models.grouped import grouped_product
from models.sharding import varying_alike

Weights = dict[str, dict[str, jax.Array]]  # gate, up, down or gate_up, down → kernel [E, in, out] and bias [E, out]


def through_experts(
    x_TD: jax.Array,
    weights_TK: jax.Array,
    experts_TK: jax.Array,
    weights: Weights,
    *,
    fused: str,
    activation: str,
    once: bool = False,
) -> jax.Array:
    """`sum_k weight_k expert_k(x)` [T, D] over those of a token's experts that are here, by their number among these.

    None is dropped: there is room for all copies of tokens that may come here, T times K or the number of experts. With
    `once`, devices along `tensor` add up what they return, so that one alone adds the last bias. `fused` and
    `activation` are as in models.moe.Experts.
    """
    (T, K), E = experts_TK.shape, weights["down"]["kernel"].shape[0]
    experts_S = jnp.where((experts_TK >= 0) & (experts_TK < E), experts_TK, E).reshape(-1)
    order_S = _order(experts_S)
    places_TK = _order(order_S).reshape(T, K)
    order_S, sizes_E = order_S[: T * min(K, E)], counts(experts_S, E)

    def linear(x_SD: jax.Array, name: str) -> jax.Array:
        y_SF = grouped_product(x_SD, weights[name]["kernel"], sizes_E)
        if (bias_EF := weights[name].get("bias")) is None:
            return y_SF
        if once and name == "down":
            bias_EF = bias_EF * (jax.lax.axis_index("tensor") == 0)
        # A bias is the matrix of an input that is 1: its gradient is then no scatter over experts.
        ones_S1 = jnp.ones((x_SD.shape[0], 1), x_SD.dtype)
        return y_SF + grouped_product(ones_S1, bias_EF[:, None, :], sizes_E)

    x_SD = _taken(x_TD, order_S // K, places_TK)
    if fused == "none":
        gate_SF, up_SF = linear(x_SD, "gate"), linear(x_SD, "up")
    elif fused == "halves":
        gate_SF, up_SF = jnp.split(linear(x_SD, "gate_up"), 2, axis=-1)
    else:
        both_SF = linear(x_SD, "gate_up")
        gate_SF, up_SF = both_SF[:, ::2], both_SF[:, 1::2]
    y_SD = linear(_gated(gate_SF, up_SF, activation), "down")
    y_TKD = _taken(y_SD, places_TK, order_S).astype(jnp.float32)
    return (weights_TK[:, :, None] * y_TKD).sum(axis=1).astype(x_TD.dtype)


def counts(experts_TK: jax.Array, E: int) -> jax.Array:
    """How often each of E experts is named."""
    return (experts_TK.reshape(-1, 1) == jnp.arange(E, dtype=experts_TK.dtype)[None, :]).sum(axis=0)


def _order(keys_S: jax.Array) -> jax.Array:
    """What sorts the keys, equal ones as they stand. Of `jnp.argsort` jax 0.10.2 forgets inside of `jax.shard_map` that
    it differs from device to device, and gradients are then wrong without a word.
    """
    keys_S, numbers_S = varying_alike(keys_S, jnp.arange(keys_S.size, dtype=keys_S.dtype))
    return jax.lax.sort_key_val(keys_S, numbers_S)[1]


def _gated(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
    if activation == "gpt_oss_clamped":
        gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
        return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)
    return ACTIVATIONS[activation](gate) * up


def _taken(x_SD: jax.Array, at: jax.Array, back: jax.Array) -> jax.Array:
    """Rows of `x` by number, 0 for a number beyond them. `back` says where each row of `x` went, [S] or with copies
    [S, K]: the gradient too is then taken, and not scattered.
    """
    return _take(*varying_alike(x_SD, at, back))


@jax.custom_vjp
def _take(x_SD: jax.Array, at: jax.Array, back: jax.Array) -> jax.Array:
    return x_SD.at[at].get(mode="fill", fill_value=0)


def _take_forward(x_SD, at, back):
    return _take(x_SD, at, back), back


def _take_backward(back, dy):
    dx = _take(dy.reshape(-1, dy.shape[-1]), back, back)
    return dx if back.ndim == 1 else dx.sum(axis=1), None, None


_take.defvjp(_take_forward, _take_backward)
