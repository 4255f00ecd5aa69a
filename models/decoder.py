"""The decoder: token ids → hidden states → vocabulary, for every family.

B rows, L tokens, D width, N query heads, K key heads, H head width, F width of the MLP, V vocabulary, n layers, S slots
of the cache.

Modules are Flax NNX, built once without arrays and split; from there on parameters are a plain nested dict whose layers
are stacked on a leading axis. `jax.lax.scan` runs them and merges one layer into its module at trace time, so that
compile time does not grow with depth.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention import Where, attend
from models.rope import Rope, rotate
from models.sharding import ROWS, constrain

Params = dict[str, Any]


@dataclass(frozen=True)
class DecoderConfig:
    """What a checkpoint decides. No field has a default: a family that forgets one is a TypeError, not another
    model.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    activation: str
    norm_eps: float
    rope: Rope
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tied_head: bool
    initializer_range: float


@dataclass(frozen=True)
class Compute:
    """How to compute, which no checkpoint decides: dtype of activations, attention backend, what to recompute, layers
    in one scan step, and the longest document of a row (None: the row may be one), beyond which nobody looks back.
    """

    dtype: Any = jnp.float32
    attention: str = "auto"
    remat: str = "none"
    scan_unroll: int = 1
    longest_document: int | None = None


class Cache(NamedTuple):
    """Keys and values of every layer [n, B, S, K, H]; slot s of a row holds its token at position s."""

    k: jax.Array
    v: jax.Array


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}

# What `jax.checkpoint` keeps of each layer for the backward pass; the rest is computed again.
REMAT: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32 (arXiv:1910.07467, eq. 4), scaled in the dtype of its input, as transformers
    does.
    """

    def __init__(self, width: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones((width,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """`x / sqrt(mean(x²) + eps) * scale` over the last axis."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    scale = jnp.expand_dims(scale.astype(x.dtype), tuple(range(x.ndim - 1)))
    return normed.astype(x.dtype) * scale


def _linear(inputs: int, outputs: int, *, bias: bool, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, use_bias=bias, dot_general=_flat_dot, rngs=rngs)


def _flat_dot(x_BLD: jax.Array, kernel_DF: jax.Array, dimensions: Any, **options: Any) -> jax.Array:
    """A product of matrices, [B L, D] by [D, F], in both passes.

    XLA on CPU transposes whole activations for a weight gradient that sums over two dimensions, which took longer than
    the product itself. Merging rows and tokens costs nothing unless both are split over devices; then they stay apart.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if x_BLD.ndim != 3 or (not mesh.empty and mesh.shape["context"] > 1):
        return jax.lax.dot_general(x_BLD, kernel_DF, dimensions, **options)
    B, L, D = x_BLD.shape
    out = jax.lax.dot_general(x_BLD.reshape(B * L, D), kernel_DF, (((1,), (0,)), ((), ())), **options)
    return out.reshape(B, L, kernel_DF.shape[1])


class Attention(nnx.Module):
    """Multi-head attention with shared key heads (arXiv:2305.13245) and rotary positions."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        D, H = config.width, config.head_width
        self.q = _linear(D, config.heads * H, bias=config.qkv_bias, rngs=rngs)
        self.k = _linear(D, config.kv_heads * H, bias=config.qkv_bias, rngs=rngs)
        self.v = _linear(D, config.kv_heads * H, bias=config.qkv_bias, rngs=rngs)
        self.o = _linear(config.heads * H, D, bias=config.o_bias, rngs=rngs)

    def __call__(
        self, x_BLD: jax.Array, road: "Road", cache: "LayerCache | None"
    ) -> tuple[jax.Array, "LayerCache | None"]:
        B, L, _ = x_BLD.shape
        H = self.config.head_width
        q_BLNH = rotate(self.q(x_BLD).reshape(B, L, self.config.heads, H), *road.rope)
        k_BLKH = rotate(self.k(x_BLD).reshape(B, L, self.config.kv_heads, H), *road.rope)
        v_BLKH = self.v(x_BLD).reshape(B, L, self.config.kv_heads, H)
        q_BLNH = constrain(q_BLNH, ROWS, "context", "tensor", None)
        if cache is not None:
            k_BLKH, v_BLKH, cache = cache.write(k_BLKH, v_BLKH, road.where.q_positions_BL)
        out_BLNH = attend(
            q_BLNH, k_BLKH, v_BLKH, where=road.where, scale=H**-0.5, reach=road.reach, backend=road.attention
        )
        return self.o(out_BLNH.reshape(B, L, self.config.heads * H)), cache


class MLP(nnx.Module):
    """Gated MLP, `down(act(gate(x)) * up(x))` (arXiv:2002.05202, eq. 6)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        D, F, bias = config.width, config.mlp_width, config.mlp_bias
        self.gate = _linear(D, F, bias=bias, rngs=rngs)
        self.up = _linear(D, F, bias=bias, rngs=rngs)
        self.down = _linear(F, D, bias=bias, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        hidden_BLF = ACTIVATIONS[self.activation](self.gate(x_BLD)) * self.up(x_BLD)
        return self.down(constrain(hidden_BLF, ROWS, "context", "tensor"))


class Block(nnx.Module):
    """One layer: attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config, rngs=rngs)
        self.post_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self, x_BLD: jax.Array, road: "Road", cache: "LayerCache | None"
    ) -> tuple[jax.Array, "LayerCache | None"]:
        attended_BLD, cache = self.attention(self.input_norm(x_BLD), road, cache)
        x_BLD = x_BLD + attended_BLD
        x_BLD = x_BLD + self.mlp(self.post_norm(x_BLD))
        return constrain(x_BLD, ROWS, "context", None), cache


class Road(NamedTuple):
    """What all layers share in one forward pass: rotary tables, who sees whom, how far back, and the attention
    backend.
    """

    rope: tuple[jax.Array, jax.Array]
    where: Where
    reach: int | None
    attention: str


class LayerCache(NamedTuple):
    """The whole cache and the layer that is being computed: written in place, since a scan would copy what it
    slices.
    """

    cache: Cache
    layer: jax.Array

    def write(
        self, k_BLKH: jax.Array, v_BLKH: jax.Array, slots_BL: jax.Array
    ) -> tuple[jax.Array, jax.Array, "LayerCache"]:
        """Put new keys and values into their slots; returns this layer's keys and values [B, S, K, H], and the new
        cache.
        """
        rows_BL = jnp.arange(slots_BL.shape[0])[:, None] + jnp.zeros_like(slots_BL)
        at = (self.layer, rows_BL, slots_BL)
        cache = Cache(
            self.cache.k.at[at].set(k_BLKH.astype(self.cache.k.dtype), mode="drop"),
            self.cache.v.at[at].set(v_BLKH.astype(self.cache.v.dtype), mode="drop"),
        )
        return cache.k[self.layer], cache.v[self.layer], LayerCache(cache, self.layer)


@functools.cache
def _block(config: DecoderConfig) -> tuple[nnx.GraphDef, Any]:
    """The graph of one layer and its abstract parameters."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


def abstract_params(config: DecoderConfig, *, dtype: Any) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s: every leaf's path and shape, and the given dtype."""
    D, V = config.width, config.vocabulary

    def stacked(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.layers, *leaf.shape), dtype)

    params: Params = {
        "embed": {"embedding": jax.ShapeDtypeStruct((V, D), dtype)},
        "layers": jax.tree.map(stacked, _block(config)[1]),
        "norm": {"scale": jax.ShapeDtypeStruct((D,), dtype)},
    }
    if not config.tied_head:
        params["head"] = {"kernel": jax.ShapeDtypeStruct((D, V), dtype)}
    return params


def init_params(key: jax.Array, config: DecoderConfig, *, dtype: Any) -> Params:
    """Random parameters: matrices normal with the checkpoint's `initializer_range`, scales one, biases zero."""

    def one(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "scale" in name:
            return jnp.ones(leaf.shape, leaf.dtype)
        if "bias" in name:
            return jnp.zeros(leaf.shape, leaf.dtype)
        noise = jax.random.normal(jax.random.fold_in(key, _stable_hash(name)), leaf.shape, jnp.float32)
        return (noise * config.initializer_range).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, abstract_params(config, dtype=dtype))


def hidden_states(
    params: Params,
    config: DecoderConfig,
    *,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    segments_BL: jax.Array,
    compute: Compute,
) -> jax.Array:
    """The normed output of the last layer [B, L, D], in `compute.dtype`; multiply with `head_kernel` for logits."""
    where = Where(positions_BL, positions_BL, segments_BL, segments_BL)
    x_BLD, _ = _run(params, config, tokens_BL, where, compute, cache=None)
    return x_BLD


def cached_hidden_states(
    params: Params,
    config: DecoderConfig,
    cache: Cache,
    *,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    compute: Compute,
) -> tuple[jax.Array, Cache]:
    """As `hidden_states` for new tokens that follow those in the cache; a position beyond the cache's slots is not
    stored.
    """
    B, S = cache.k.shape[1:3]
    slots_BS = jnp.broadcast_to(jnp.arange(S, dtype=positions_BL.dtype)[None, :], (B, S))
    where = Where(positions_BL, slots_BS, jnp.ones_like(positions_BL), jnp.ones_like(slots_BS))
    x_BLD, new_cache = _run(params, config, tokens_BL, where, compute, cache=cache)
    assert new_cache is not None
    return x_BLD, new_cache


def empty_cache(config: DecoderConfig, *, rows: int, slots: int, dtype: Any) -> Cache:
    """A cache of zeros for `rows` sequences of at most `slots` tokens."""
    shape = (config.layers, rows, slots, config.kv_heads, config.head_width)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def head_kernel(params: Params, config: DecoderConfig) -> jax.Array:
    """The matrix [V, D] from hidden state to vocabulary: the embedding itself where the head is tied to it."""
    return params["embed"]["embedding"] if config.tied_head else params["head"]["kernel"].T


def _run(
    params: Params, config: DecoderConfig, tokens_BL: jax.Array, where: Where, compute: Compute, *, cache: Cache | None
) -> tuple[jax.Array, Cache | None]:
    graph, _ = _block(config)
    reach = None if cache is not None else compute.longest_document or tokens_BL.shape[1]
    road = Road(config.rope.tables(where.q_positions_BL), where, reach, compute.attention)
    x_BLD = params["embed"]["embedding"][tokens_BL].astype(compute.dtype)
    x_BLD = constrain(x_BLD, ROWS, "context", None)
    # Cast before the scan: what fsdp gathers, layer by layer, is then in the compute dtype.
    layers = jax.tree.map(lambda leaf: leaf.astype(compute.dtype), params["layers"])

    def body(carry: tuple[jax.Array, Cache | None], layer: tuple[Params, jax.Array]) -> tuple[Any, None]:
        x_BLD, cache = carry
        weights, number = layer
        slot = None if cache is None else LayerCache(cache, number)
        x_BLD, slot = nnx.merge(graph, weights)(x_BLD, road, slot)
        return (x_BLD, None if slot is None else slot.cache), None

    if compute.remat != "none":
        body = jax.checkpoint(body, policy=REMAT[compute.remat], prevent_cse=False)
    numbers = jnp.arange(config.layers)
    (x_BLD, cache), _ = jax.lax.scan(body, (x_BLD, cache), (layers, numbers), unroll=compute.scan_unroll)
    return rms_norm(x_BLD, params["norm"]["scale"], config.norm_eps), cache


def _stable_hash(name: str) -> int:
    """A number for a leaf's path that is the same in every process and version (Python's own hash is salted)."""
    return int.from_bytes(name.encode(), "little") % (2**31 - 1)
