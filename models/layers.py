"""One layer of the decoder: norms, attention, MLP, and how they stand together.

B rows, L tokens, D width, N query heads, K key heads, H head width, F width of the MLP, n layers, S places of a row in
the cache.

Modules are Flax NNX and are built abstractly, for their paths and shapes: parameters come from files, or from
`models.decoder.init_params`. Every family is this one layer with some of `models.config.DecoderConfig`'s switches on.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models.activations import ACTIVATIONS
from models.attention import Seen, Where, attend
from models.config import DecoderConfig, Layer
from models.linear import Linear
from models.moe import MoE, RouterStats
from models.rope import Rope, rotate
from models.sharding import ROWS, constrain


class Sight(NamedTuple):
    """What text looks at: the features of pictures [B, F, D], or the keys and values that each of m layers makes of
    them [m, B, K, F, H]; and who sees which.
    """

    features_BFD: jax.Array | None
    k: jax.Array | None
    v: jax.Array | None
    seen: Seen


class Road(NamedTuple):
    """What all layers share in one forward pass: rotary tables by kind, who sees whom, how far back (None: keys are in
    a cache), the attention backend, how an adapter acts, what there is to look at, and whether a row may hold several
    documents.
    """

    tables: dict[Rope, tuple[jax.Array, jax.Array]]
    where: Where
    reach: int | None
    attention: str
    lora: Any
    sight: Sight | None = None
    packed: bool = True


class Cache(NamedTuple):
    """Keys and values of every layer [n, B, K, S, H], as attention multiplies them; place s of a row holds its token at
    position s.
    """

    k: jax.Array
    v: jax.Array


class LayerCache(NamedTuple):
    """The whole cache and the layer that is being computed: written in place, since a scan would copy what it
    slices.
    """

    cache: Cache
    layer: jax.Array

    def write(
        self, k_BLKH: jax.Array, v_BLKH: jax.Array, places_BL: jax.Array
    ) -> tuple[jax.Array, jax.Array, "LayerCache"]:
        """Put new keys and values into their places; returns this layer's keys and values [B, S, K, H], and the new
        cache.
        """
        rows_BL1 = jnp.arange(places_BL.shape[0])[:, None, None]
        at = (self.layer, rows_BL1, jnp.arange(k_BLKH.shape[2])[None, None, :], places_BL[:, :, None])
        cache = Cache(
            self.cache.k.at[at].set(k_BLKH.astype(self.cache.k.dtype), mode="drop"),
            self.cache.v.at[at].set(v_BLKH.astype(self.cache.v.dtype), mode="drop"),
        )
        k_BSKH, v_BSKH = (x[self.layer].transpose(0, 2, 1, 3) for x in cache)
        return k_BSKH, v_BSKH, LayerCache(cache, self.layer)


def _rms(x32: jax.Array, eps: float) -> jax.Array:
    """`x / sqrt(mean(x²) + eps)` over the last axis (arXiv:1910.07467, eq. 4)."""
    return x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)


def _centred(x32: jax.Array, eps: float) -> jax.Array:
    """`(x - mean) / sqrt(variance + eps)` over the last axis (arXiv:1607.06450, eq. 3)."""
    return _rms(x32 - jnp.mean(x32, axis=-1, keepdims=True), eps)


class NormKind(NamedTuple):
    """How a norm is computed: always in float32; what is stored is `scale - offset`; the scale is applied in float32 or
    in the dtype of the activations, which bfloat16 can tell.
    """

    normalise: Callable[[jax.Array, float], jax.Array]
    offset: float
    wide: bool


NORMS = {
    "rms": NormKind(_rms, 0.0, wide=False),
    "rms_wide": NormKind(_rms, 0.0, wide=True),  # OLMo 2
    "rms_plus_one": NormKind(_rms, 1.0, wide=True),  # Gemma: stored as scale - 1
    "layer": NormKind(_centred, 0.0, wide=True),
}


def normed(x: jax.Array, scale: jax.Array, bias: jax.Array | None, config: DecoderConfig) -> jax.Array:
    """The norm of a config over the last axis of `x`; scale and bias span the last axis, or the last ones."""
    kind = NORMS[config.norm]
    dtype = jnp.float32 if kind.wide else x.dtype
    ones = (1,) * (x.ndim - scale.ndim)
    y = kind.normalise(x.astype(jnp.float32), config.norm_eps).astype(dtype)
    y = y * (scale.astype(dtype) + kind.offset).reshape(*ones, *scale.shape)
    if bias is not None:
        y = y + bias.astype(dtype).reshape(*ones, *bias.shape)
    return y.astype(x.dtype)


class Norm(nnx.Module):
    """A norm over the last axis, of the kind its config names."""

    def __init__(self, config: DecoderConfig, *shape: int, bias: bool):
        self.scale = nnx.Param(jnp.ones(shape))
        self.bias = nnx.Param(jnp.zeros(shape)) if bias else None
        self.config = config

    def __call__(self, x: jax.Array) -> jax.Array:
        return normed(x, self.scale[...], None if self.bias is None else self.bias[...], self.config)


class Attention(nnx.Module):
    """Multi-head attention with shared key heads (arXiv:2305.13245), of text with rotary positions or to pictures."""

    def __init__(self, config: DecoderConfig):
        self.config = config
        D, N, K, H = config.width, config.heads, config.kv_heads, config.head_width
        if config.fused_qkv:
            self.qkv = Linear(D, (N + 2 * K) * H, bias=config.qkv_bias)
        else:
            self.q = Linear(D, N * H, bias=config.qkv_bias)
            self.k = Linear(D, K * H, bias=config.qkv_bias)
            self.v = Linear(D, K * H, bias=config.qkv_bias)
        self.o = Linear(N * H, D, bias=config.o_bias)
        if config.qk_norm:
            shapes = {
                "head": lambda heads: (H,),
                "heads": lambda heads: (heads, H),
                "width": lambda heads: (heads * H,),
            }
            self.q_norm = Norm(config, *shapes[config.qk_norm](N), bias=config.qk_norm_bias)
            self.k_norm = Norm(config, *shapes[config.qk_norm](K), bias=config.qk_norm_bias)
        if config.sinks:
            self.sinks = nnx.Param(jnp.zeros((N,)))

    def __call__(
        self, x_BLD: jax.Array, road: Road, layer: Layer, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        config, (B, L, _) = self.config, x_BLD.shape
        if config.looks:
            return self._look(x_BLD, road, cache), cache
        q_BLNH, k_BLKH, v_BLKH = self._heads(x_BLD, road)
        if layer.rope is not None:
            cos, sin = road.tables[layer.rope]
            q_BLNH = rotate(q_BLNH, cos, sin, interleaved=layer.rope.interleaved)
            k_BLKH = rotate(k_BLKH, cos, sin, interleaved=layer.rope.interleaved)
        q_BLNH = constrain(q_BLNH, ROWS, "context", "tensor", None)
        if cache is not None:
            k_BLKH, v_BLKH, cache = cache.write(k_BLKH, v_BLKH, road.where.q_positions_BL)
        out_BLNH = attend(
            q_BLNH,
            k_BLKH,
            v_BLKH,
            where=road.where,
            scale=config.attention_scale or config.head_width**-0.5,
            window=layer.window,
            softcap=config.attention_softcap,
            sinks_N=self.sinks[...] if config.sinks else None,
            reach=road.reach,
            packed=road.packed,
            backend=road.attention,
        )
        return self.o(out_BLNH.reshape(B, L, config.heads * config.head_width), road.lora), cache

    def _look(self, x_BLD: jax.Array, road: Road, cache: LayerCache | None) -> jax.Array:
        """What text sees of pictures [B, L, D]; zero where it sees none."""
        config, (B, L, _), sight = self.config, x_BLD.shape, road.sight
        assert sight is not None
        q_BLNH = self.q_norm(self.q(x_BLD, road.lora).reshape(B, L, config.heads, config.head_width))
        if sight.k is None or sight.v is None:
            k_BFKH, v_BFKH = self.keys(sight.features_BFD, road)
        else:
            assert cache is not None
            k_BFKH, v_BFKH = (x[cache.layer].transpose(0, 2, 1, 3) for x in (sight.k, sight.v))
        out_BLNH = attend(
            constrain(q_BLNH, ROWS, "context", "tensor", None),
            k_BFKH,
            v_BFKH,
            where=sight.seen,
            scale=config.attention_scale or config.head_width**-0.5,
            backend=road.attention,
        )
        out_BLNH = jnp.where((sight.seen.last_BL > 0)[:, :, None, None], out_BLNH, 0)
        return self.o(out_BLNH.reshape(B, L, config.heads * config.head_width), road.lora)

    def keys(self, features_BFD: Any, road: Road) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, F, K, H] of pictures' features."""
        config, (B, F, _) = self.config, features_BFD.shape
        k, v = (layer(features_BFD, road.lora).reshape(B, F, config.kv_heads, -1) for layer in (self.k, self.v))
        return self.k_norm(k), v

    def _heads(self, x_BLD: jax.Array, road: Road) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, L, N, H], keys and values [B, L, K, H], normed where the config says so."""
        config, (B, L, _) = self.config, x_BLD.shape
        N, K, H = config.heads, config.kv_heads, config.head_width
        if config.fused_qkv == "heads":
            q, k, v = jnp.unstack(self.qkv(x_BLD, road.lora).reshape(B, L, N, 3, H), axis=3)
        elif config.fused_qkv == "blocks":
            q, k, v = jnp.split(self.qkv(x_BLD, road.lora), [N * H, (N + K) * H], axis=-1)
        else:
            q, k, v = (project(x_BLD, road.lora) for project in (self.q, self.k, self.v))
        if config.qk_norm == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.reshape(B, L, N, H), k.reshape(B, L, K, H), v.reshape(B, L, K, H)
        if config.qk_norm in ("head", "heads"):
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


class MLP(nnx.Module):
    """`down(act(gate(x)) * up(x))` (arXiv:2002.05202, eq. 6), or without a gate `down(act(up(x)))`."""

    def __init__(self, config: DecoderConfig):
        D, F, bias = config.width, config.mlp_width, config.mlp_bias
        self.config = config
        if config.gated and config.fused_gate_up:
            self.gate_up = Linear(D, 2 * F, bias=bias)
        else:
            if config.gated:
                self.gate = Linear(D, F, bias=bias)
            self.up = Linear(D, F, bias=bias)
        self.down = Linear(F, D, bias=bias)

    def __call__(self, x_BLD: jax.Array, road: Road) -> jax.Array:
        config, act = self.config, ACTIVATIONS[self.config.activation]
        if not config.gated:
            hidden_BLF = act(self.up(x_BLD, road.lora))
        elif config.fused_gate_up:
            gate_BLF, up_BLF = jnp.split(self.gate_up(x_BLD, road.lora), 2, axis=-1)
            hidden_BLF = act(gate_BLF) * up_BLF
        else:
            hidden_BLF = act(self.gate(x_BLD, road.lora)) * self.up(x_BLD, road.lora)
        return self.down(constrain(hidden_BLF, ROWS, "context", "tensor"), road.lora)


class Block(nnx.Module):
    """One layer: attention and MLP (or a mixture of experts), normed before or after, added to the stream."""

    def __init__(self, config: DecoderConfig):
        self.config = config
        D, bias = config.width, config.norm_bias
        if config.in_norms:
            self.input_norm = Norm(config, D, bias=bias)
            if config.parallel != "one norm":
                self.post_norm = Norm(config, D, bias=bias)
        if config.out_norms:
            self.attention_out_norm = Norm(config, D, bias=bias)
            self.mlp_out_norm = Norm(config, D, bias=bias)
        self.attention = Attention(config)
        if config.gates:
            self.attention_gate = nnx.Param(jnp.zeros((1,)))
            self.mlp_gate = nnx.Param(jnp.zeros((1,)))
        if config.experts is None:
            self.mlp = MLP(config)
        else:
            self.moe = MoE(config)

    def __call__(
        self, x_BLD: jax.Array, road: Road, layer: Layer, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None, RouterStats | None]:
        config = self.config
        read_BLD = self.input_norm(x_BLD) if config.in_norms else x_BLD
        attended_BLD, cache = self.attention(read_BLD, road, layer, cache)
        if config.out_norms:
            attended_BLD = self.attention_out_norm(attended_BLD)
        if config.gates:
            attended_BLD = attended_BLD * jnp.tanh(self.attention_gate[...])[None, None, :]
        if not config.parallel:
            x_BLD = x_BLD + self._scaled(attended_BLD)
        if config.in_norms and config.parallel != "one norm":
            read_BLD = self.post_norm(x_BLD)
        elif not config.parallel:
            read_BLD = x_BLD
        added_BLD, stats = self._mlp(read_BLD, road)
        if config.out_norms:
            added_BLD = self.mlp_out_norm(added_BLD)
        if config.gates:
            added_BLD = added_BLD * jnp.tanh(self.mlp_gate[...])[None, None, :]
        if config.looks:
            added_BLD = jnp.where(self._shown(road)[:, :, None], added_BLD, 0)
        if config.parallel:
            x_BLD = x_BLD + self._scaled(attended_BLD)
        x_BLD = x_BLD + self._scaled(added_BLD)
        return constrain(x_BLD, ROWS, "context", None), cache, stats

    def _mlp(self, x_BLD: jax.Array, road: Road) -> tuple[jax.Array, RouterStats | None]:
        if self.config.experts is None:
            return self.mlp(x_BLD, road), None
        return self.moe(x_BLD, road.where.q_segments_BL > 0, road.lora)

    def _shown(self, road: Road) -> jax.Array:
        """True for text [B, L] that a picture stands before: the MLP behind a look at pictures is for this alone."""
        assert road.sight is not None
        return (road.sight.seen.last_BL > 0) & ~road.sight.seen.before_BL

    def _scaled(self, x_BLD: jax.Array) -> jax.Array:
        return x_BLD if self.config.residual_scale == 1.0 else x_BLD * self.config.residual_scale
