"""The decoder: token ids → hidden states → vocabulary, for every family.

B rows, L tokens, D width, K key heads, H head width, V vocabulary, n layers, S places of a row in the cache.

Parameters are a plain nested dict whose layers are stacked on a leading axis; models/stack.py runs them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.attention import Where
from models.config import Compute, DecoderConfig, Layer
from models.layers import NORMS, Cache, Road, Sight, normed
from models.linear import TURNED, turned_product
from models.looking import abstract_tiles, sight_of
from models.moe import RouterStats
from models.rope import document_lengths
from models.sharding import ROWS, constrain, looked_up
from models.stack import Params, block_of, cast, periods, scan
from models.vision import Images, abstract_vision, with_images

__all__ = ["Cache", "Compute", "DecoderConfig", "Layer", "Params"]  # for those who read only this file


class Head(NamedTuple):
    """From hidden state to vocabulary: `softcap * tanh(logits / softcap)` of logits = hidden @ kernel.T + bias;
    `few` where there are few hidden states, in decoding (`models.linear.turned_product`).
    """

    kernel_VD: jax.Array
    bias_V: jax.Array | None
    softcap: float | None
    few: bool = False

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 logits [..., V] of hidden states [..., D]."""
        kernel_VD = self.kernel_VD.astype(hidden.dtype)
        if self.few:
            logits = turned_product(hidden, kernel_VD, preferred_element_type=jnp.float32)
        else:
            logits = jnp.einsum("...d,vd->...v", hidden, kernel_VD, preferred_element_type=jnp.float32)
        if self.bias_V is not None:
            logits = logits + self.bias_V.astype(jnp.float32).reshape(*(1,) * (logits.ndim - 1), -1)
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)


def abstract_params(config: DecoderConfig, *, dtype: Any) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s: every leaf's path and shape, and the given dtype."""
    D, V = config.width, config.vocabulary

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    params: Params = {
        "embed": {"embedding": leaf(V + config.more_tokens, D)},
        "layers": _abstract_layers(config.stack(looks=False), dtype=dtype),
        "norm": {"scale": leaf(D)} | ({"bias": leaf(D)} if config.norm_bias else {}),
    }
    if config.learned_positions:
        params["positions"] = {"embedding": leaf(config.learned_positions, D)}
    if config.vision is not None:
        params |= abstract_vision(config.vision, D, dtype=dtype)
    if (looking := config.stack(looks=True)).each:
        params["looking"] = {"layers": _abstract_layers(looking, dtype=dtype)}
        params["vision"] |= abstract_tiles(config.vision, dtype=dtype)
    head = ({} if config.tied_head else {"kernel": leaf(D, V)}) | ({"bias": leaf(V)} if config.head_bias else {})
    return params | ({"head": head} if head else {})


def _abstract_layers(config: DecoderConfig, *, dtype: Any) -> Params:
    return jax.tree.map(lambda one: jax.ShapeDtypeStruct((config.layers, *one.shape), dtype), block_of(config)[1])


def init_params(key: jax.Array, config: DecoderConfig, *, dtype: Any) -> Params:
    """Random parameters: matrices normal with the checkpoint's `initializer_range`, norms the identity, biases zero."""

    def one(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "scale" in name:
            offset = 0.0 if "vision" in name else NORMS[config.norm].offset
            return jnp.full(leaf.shape, 1.0 - offset, leaf.dtype)
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
    branches_BL: jax.Array | None = None,
    images: Images | None = None,
) -> jax.Array:
    """The normed output of the last layer [B, L, D], in `compute.dtype`; `head` turns it into logits.

    With `branches_BL`, a document's tokens of branch 0 are followed by those of branches 1, 2, …, whose positions all
    begin where branch 0 ends, and which do not see one another; of a model that `can_branch`. `images` are the rows'
    pictures, of a model with a tower.
    """
    return routed_hidden_states(
        params,
        config,
        tokens_BL=tokens_BL,
        positions_BL=positions_BL,
        segments_BL=segments_BL,
        compute=compute,
        branches_BL=branches_BL,
        images=images,
    )[0]


def can_branch(config: DecoderConfig) -> bool:
    """Whether the beginning of a document is computed alike whatever follows: not where positions rotate otherwise in
    longer documents.
    """
    return all(layer.rope is None or layer.rope.beyond is None for layer in config.each)


def routed_hidden_states(
    params: Params,
    config: DecoderConfig,
    *,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    segments_BL: jax.Array,
    compute: Compute,
    branches_BL: jax.Array | None = None,
    images: Images | None = None,
) -> tuple[jax.Array, RouterStats | None]:
    """As `hidden_states`, and what the routers of all layers did, each leaf summed over them (None without experts)."""
    groups_BL = None if images is None else images.groups
    where = Where(positions_BL, positions_BL, segments_BL, segments_BL, branches_BL, branches_BL, groups_BL, groups_BL)
    lengths_BL = document_lengths(positions_BL, segments_BL)
    x_BLD, _, stats = _run(params, config, tokens_BL, where, lengths_BL, compute, cache=None, images=images)
    return x_BLD, stats


def cached_hidden_states(
    params: Params,
    config: DecoderConfig,
    cache: Cache | list[Cache],
    *,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    compute: Compute,
    lengths_B: jax.Array | None = None,
    turns_BL: jax.Array | None = None,
    images: Images | None = None,
    sight: Sight | None = None,
) -> tuple[jax.Array, Any]:
    """As `hidden_states` for new tokens that follow those in the cache, and that cache with them; a position beyond the
    cache's places is not stored. `lengths_B` is how long each row's text now is, where padding makes its last position
    a later one; `turns_BL` by which positions tokens are rotated, where these are others than their places, as after a
    picture whose tokens have rows and columns; `sight` what text looks at, by its keys (`looking.sight_of`). Parameters
    with their layers apart (`layers_apart`) go with a list of caches.
    """
    S = (cache[0] if isinstance(cache, list) else cache).k.shape[3]
    places_BS = jnp.broadcast_to(jnp.arange(S, dtype=positions_BL.dtype)[None, :], (positions_BL.shape[0], S))
    where = Where(positions_BL, places_BS, jnp.ones_like(positions_BL), jnp.ones_like(places_BS))
    if images is not None and images.groups is not None:  # a prompt's first tokens: they stand in the first places
        after = ((0, 0), (0, S - images.groups.shape[1]))
        where = where._replace(q_groups_BL=images.groups, k_groups_BS=jnp.pad(images.groups, after))
    lengths_BL = None if lengths_B is None else lengths_B[:, None]
    x_BLD, new_cache, _ = _run(
        params,
        config,
        tokens_BL,
        where,
        lengths_BL,
        compute,
        cache=cache,
        turns_BL=turns_BL,
        images=images,
        sight=sight,
    )
    assert new_cache is not None
    return x_BLD, new_cache


def empty_cache(config: DecoderConfig, *, rows: int, slots: int, dtype: Any) -> Cache:
    """A cache of zeros for `rows` sequences of at most `slots` tokens, split as activations are: rows, and heads."""
    shape = (config.stack(looks=False).layers, rows, config.kv_heads, slots, config.head_width)
    return Cache(*(constrain(jnp.zeros(shape, dtype), None, ROWS, "tensor", None, None) for _ in Cache._fields))


def layers_apart(tree: Any, layers: int) -> list[Any]:
    """A tree of leaves [n, ...] as one for each layer, of leaves [1, ...]; parameters with such `layers` are run one
    after the other, with a list of caches that is made in the same way.
    """
    leaves, structure = jax.tree.flatten(tree)
    return [jax.tree.unflatten(structure, [leaf[i : i + 1] for leaf in leaves]) for i in range(layers)]


def head(params: Params, config: DecoderConfig) -> Head:
    """What turns hidden states into logits: the embedding itself where the head is tied to it."""
    own = params.get("head", {})
    if TURNED in own:
        return Head(own[TURNED], own.get("bias"), config.logit_softcap, few=True)
    kernel_VD = params["embed"]["embedding"] if config.tied_head else own["kernel"].T
    return Head(kernel_VD, own.get("bias"), config.logit_softcap)


def _run(
    params: Params,
    config: DecoderConfig,
    tokens_BL: jax.Array,
    where: Where,
    lengths_BL: jax.Array | None,
    compute: Compute,
    *,
    cache: Any,
    images: Images | None,
    turns_BL: jax.Array | None = None,
    sight: Sight | None = None,
) -> tuple[jax.Array, Any, RouterStats | None]:
    turns: jax.Array = where.q_positions_BL if turns_BL is None else turns_BL
    if images is not None and images.axes is not None:
        turns = images.axes
    road = Road(
        tables={rope: rope.tables(turns, lengths_BL) for rope in {layer.rope for layer in config.each} if rope},
        where=where,
        reach=_reach(where, None if cache is not None else compute.longest_document),
        attention=compute.attention,
        lora=compute.lora,
        sight=sight,
        packed=compute.packed,
    )
    x_BLD = _embedded(params, config, tokens_BL, where.q_positions_BL, compute.dtype)
    deep: list[jax.Array] = []
    if images is not None:
        assert config.vision is not None, "pictures for a model without a tower"
        if images.looks is None:
            x_BLD, deep = with_images(params, config.vision, x_BLD, images, compute)
        elif sight is None:
            road = road._replace(sight=sight_of(params, config, images, compute, keys=False))
    layers = params["layers"] if cache is None else cast(params["layers"], compute.dtype)
    looking = cast(params["looking"]["layers"], compute.dtype) if "looking" in params else None
    total: RouterStats | None = None
    if isinstance(layers, list):
        assert isinstance(cache, list)
        cache, numbers = list(cache), {False: 0, True: 0}
        for layer in config.each:
            number = numbers[layer.looks]
            numbers[layer.looks] += 1
            if layer.looks:
                assert looking is not None
                x_BLD = _looked(looking[number], x_BLD, cache[0], number, layer, config, compute, road)
                continue
            x_BLD, cache[number], stats = scan(
                layers[number], x_BLD, cache[number], 0, 1, (layer,), config, compute, road
            )
            total = stats if total is None else jax.tree.map(jnp.add, total, stats)
    else:
        for number, joins_BLD in enumerate(deep):
            x_BLD, cache, _ = scan(layers, x_BLD, cache, number, 1, (config.each[number],), config, compute, road)
            x_BLD = x_BLD + joins_BLD
        for begun, repeats, period in periods(config.each[len(deep) :]):
            first = begun + len(deep)
            x_BLD, cache, stats = scan(layers, x_BLD, cache, first, repeats, period, config, compute, road, looking)
            total = stats if total is None else jax.tree.map(jnp.add, total, stats)
    x_BLD = normed(x_BLD, params["norm"]["scale"], params["norm"].get("bias"), config)
    return x_BLD if config.logit_scale == 1.0 else x_BLD * config.logit_scale, cache, total


def _looked(
    layers: Params,
    x_BLD: jax.Array,
    cache: Cache,
    number: int,
    layer: Layer,
    config: DecoderConfig,
    compute: Compute,
    road: Road,
) -> jax.Array:
    """One layer that looks at pictures, where layers stand apart; it leaves every cache as it is."""
    sight = road.sight
    if sight is None or sight.k is None or sight.v is None:
        return x_BLD
    own = road._replace(sight=sight._replace(k=sight.k[number : number + 1], v=sight.v[number : number + 1]))
    return scan({}, x_BLD, cache, 0, 1, (layer,), config, compute, own, layers)[0]


def _reach(where: Where, longest_document: int | None) -> int | None:
    """How far back a query may look, where keys stand at their queries' own places; None where they stand in a cache
    that has more.
    """
    L = where.q_positions_BL.shape[1]
    return None if where.k_positions_BS.shape[1] != L else longest_document or L


def _embedded(
    params: Params, config: DecoderConfig, tokens_BL: jax.Array, positions_BL: jax.Array, dtype: Any
) -> jax.Array:
    x_BLD = looked_up(params["embed"]["embedding"], tokens_BL, dtype)
    if config.padding_token is not None:
        x_BLD = jnp.where((tokens_BL == config.padding_token)[:, :, None], jax.lax.stop_gradient(x_BLD), x_BLD)
    if config.embed_scale != 1.0:
        x_BLD = x_BLD * jnp.asarray(config.embed_scale, dtype)
    if config.learned_positions:
        x_BLD = x_BLD + params["positions"]["embedding"][positions_BL].astype(dtype)
    return constrain(x_BLD, ROWS, "context", None)


def _stable_hash(name: str) -> int:
    """A number for a leaf's path that is the same in every process and version (Python's own hash is salted)."""
    return int.from_bytes(name.encode(), "little") % (2**31 - 1)
