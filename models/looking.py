"""Pictures that text looks at from layers of its own, and the tower of tiles that their features come from.

B rows, M pictures of all rows, n tiles of a picture, p patches of a tile, q of them with the class token and padded, E
width of the tower, F features of a row, D width of the text model, m layers that look at pictures, L tokens.

Source: The Llama 3 Herd of Models, arXiv:2407.21783, section 7; what a checkpoint decides is in `models.vision.Vision`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention import Seen, Where
from models.config import Compute, DecoderConfig
from models.layers import Road, Sight, normed
from models.linear import matrix_product
from models.sharding import ROWS, constrain
from models.stack import Params, block_of, cast, graph_of, through
from models.vision import PROJECTORS, Images, Vision

PADDED = 8  # a tile's patches, with its class token, are padded to a multiple of this


def abstract_tiles(vision: Vision, *, dtype: Any) -> Params:
    """What a tower of tiles has beside a plain one's leaves, under `vision`, as `jax.ShapeDtypeStruct`s: where each
    tile is by the aspect ratio of its picture, and the layers behind all tiles.
    """
    E, ratios, each = vision.layers.width, len(vision.ratios), vision.tile + vision.class_token
    assert vision.further is not None

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    further = vision.further
    return {
        "positions": {"embedding": leaf(each, E), "gate": leaf(1)},
        "tile_positions": {"embedding": leaf(ratios, vision.tiles * each * E)},
        "tiles_before": {"embedding": leaf(ratios, vision.tiles * E), "gate": leaf(1)},
        "tiles_after": {"embedding": leaf(ratios, vision.tiles * E), "gate": leaf(1)},
        "further": {"layers": jax.tree.map(lambda one: leaf(further.layers, *one.shape), block_of(further)[1])},
    }


def sight_of(params: Params, config: DecoderConfig, images: Images, compute: Compute, *, keys: bool) -> Sight:
    """What the text of these rows looks at: the features of their pictures, or with `keys` what each layer makes of
    them, once for all that follows.
    """
    vision = config.vision
    each = vision.tiles * (vision.tile + vision.class_token)
    first, last, before = (images.looks[..., n] for n in range(3))
    ratios_BM = _ratios(vision, images)
    B, M = ratios_BM.shape
    tiles_BMn = jnp.arange(vision.tiles)[None, None, :] < jnp.asarray(vision.ratios)[ratios_BM][:, :, None]
    filled_BF = jnp.repeat(tiles_BMn.reshape(B, -1), vision.tile + vision.class_token, axis=1)
    there_BM = images.segments.reshape(B, M, -1)[:, :, 0]
    seen = Seen(first, last, before > 0, jnp.repeat(there_BM, each, axis=1), filled_BF)
    features_BFD = tile_features(params, vision, images, compute)
    if not keys:
        return Sight(features_BFD, None, None, seen)
    k, v = _keys(params, config, features_BFD, compute)
    return Sight(None, k, v, seen)


def at_tokens(sight: Sight, at_B: jax.Array) -> Sight:
    """What is seen from one token of each row, and from those that follow it: its seen [B, 1]."""
    first_B1, last_B1, before_B1 = (jnp.take_along_axis(x, at_B[:, None], axis=1) for x in sight.seen[:3])
    seen = sight.seen._replace(first_BL=first_B1, last_BL=last_B1, before_BL=before_B1)
    return sight._replace(seen=seen)


def empty_sight(config: DecoderConfig, *, rows: int, features: int, dtype: Any) -> Sight:
    """Room for what so many rows look at, of at most so many features; they see nothing."""
    looking = config.stack(looks=True)
    shape = (looking.layers, rows, config.kv_heads, features, config.head_width)
    k, v = (constrain(jnp.zeros(shape, dtype), None, ROWS, "tensor", None, None) for _ in range(2))
    none_B1, none_BF = jnp.zeros((rows, 1), jnp.int32), jnp.zeros((rows, features), jnp.int32)
    return Sight(None, k, v, Seen(none_B1, none_B1, none_B1 > 0, none_BF, none_BF > 0))


def placed(own: Sight, new: Sight | None, rows_T: jax.Array, slots_T: jax.Array) -> Sight:
    """Sights `new` of these rows put into slots of `own`; None: what these look at is nothing."""
    if new is None:
        return own._replace(seen=own.seen._replace(last_BL=own.seen.last_BL.at[slots_T].set(0, mode="drop")))

    def put(own: jax.Array, new: jax.Array) -> jax.Array:
        return own.at[:, slots_T, :, : new.shape[3]].set(new[:, rows_T].astype(own.dtype), mode="drop")

    def told(own: jax.Array, new: jax.Array) -> jax.Array:
        whole = jnp.pad(new[rows_T], ((0, 0), (0, own.shape[1] - new.shape[1])))
        return own.at[slots_T].set(whole.astype(own.dtype), mode="drop")

    seen = Seen(*(told(mine, theirs) for mine, theirs in zip(own.seen, new.seen, strict=True)))
    return Sight(None, put(own.k, new.k), put(own.v, new.v), seen)  # type: ignore[arg-type]  # both have keys


def _keys(
    params: Params, config: DecoderConfig, features_BFD: jax.Array, compute: Compute
) -> tuple[jax.Array, jax.Array]:
    """The keys and values of every layer that looks [m, B, K, F, H]."""
    layers = cast(params["looking"]["layers"], compute.dtype)
    graph = graph_of(config.stack(looks=True), layers)
    nowhere = jnp.zeros((1, 1), jnp.int32)
    road = Road({}, Where(nowhere, nowhere, nowhere, nowhere), None, compute.attention, compute.lora)

    def one(layer: Params) -> tuple[jax.Array, jax.Array]:
        k_BFKH, v_BFKH = nnx.merge(graph, layer).attention.keys(features_BFD, road)
        return k_BFKH.transpose(0, 2, 1, 3), v_BFKH.transpose(0, 2, 1, 3)

    return jax.lax.map(one, layers)


def _ratios(vision: Vision, images: Images) -> jax.Array:
    """The number of each picture's aspect ratio [B, M / B]; 0 where there is none."""
    B = images.patches.shape[0]
    return images.tiles[..., 1].reshape(B, -1, vision.tiles * vision.tile)[:, :, 0]


def tile_features(params: Params, vision: Vision, images: Images, compute: Compute) -> jax.Array:
    """The features [B, F, D] of a row's pictures: of each tile the class token's and the patches', those of empty tiles
    too.

    As in transformers, patches of a picture see all of its tiles, empty ones and padding among them, while these see
    only what is in the picture.
    """
    tower, projector = (cast(params[name], compute.dtype) for name in ("vision", "projector"))
    B, n, E, assumed = images.patches.shape[0], vision.tiles, vision.layers.width, vision.further
    assert assumed is not None
    ratios_M = _ratios(vision, images).reshape(-1)
    x_MnpE = _embedded(tower, vision, images, ratios_M, compute.dtype)
    M, _, p, _ = x_MnpE.shape
    q = -(-p // PADDED) * PADDED
    x_MPE = jnp.pad(x_MnpE, ((0, 0), (0, 0), (0, q - p), (0, 0))).reshape(M, n * q, E)
    tiles_Mn = jnp.arange(n)[None, :] < jnp.asarray(vision.ratios)[ratios_M][:, None]
    there_MP = (tiles_Mn[:, :, None] & (jnp.arange(q) < p)[None, None, :]).reshape(M, n * q).astype(jnp.int32)
    alike = jnp.ones_like(there_MP)
    road = Road({}, Where(there_MP, 1 - there_MP, alike, alike), None, compute.attention, compute.lora)
    layers = vision.layers.layers
    assert vision.takes is not None
    outputs = through(tower["layers"], vision.layers, x_MPE, (*vision.takes, layers), compute, road)
    x_MPE = normed(outputs[layers], tower["norm"]["scale"], tower["norm"]["bias"], vision.layers)
    x_MPE = (x_MPE.reshape(M, n, q, E) + _of_tiles(tower["tiles_after"], ratios_M, n)).reshape(M, n * q, E)
    last = assumed.layers
    x_MPE = through(tower["further"]["layers"], assumed, x_MPE, (last,), compute, road)[last]
    inner_MPE = jnp.stack([outputs[take] for take in vision.takes], axis=-1).reshape(M, n * q, -1)
    whole = jnp.concatenate([x_MPE, inner_MPE], axis=-1).reshape(M, n, q, -1)[:, :, :p]
    features = PROJECTORS[vision.projector].project(projector, vision, whole.reshape(M, n * p, -1), compute.lora)
    return constrain(features.reshape(B, -1, features.shape[-1]), ROWS, None, None)


def _embedded(tower: Params, vision: Vision, images: Images, ratios_M: jax.Array, dtype: Any) -> jax.Array:
    """What the layers read [M, n, p, E]: patches of all tiles with the class token first, where they are in a tile, and
    where that is in its picture.
    """
    C, E, n, M = images.patches.shape[-1], vision.layers.width, vision.tiles, ratios_M.shape[0]
    patches = images.patches.reshape(M * n, vision.tile, C).astype(dtype)
    x = matrix_product(patches, tower["patch"]["kernel"].reshape(-1, C).T).reshape(M, n, vision.tile, E)
    x = x + _of_tiles(tower["tiles_before"], ratios_M, n)
    first = jnp.broadcast_to(tower["class"]["embedding"][None, None, None, :], (M, n, 1, E))
    x_MnpE = jnp.concatenate([first, x], axis=2)
    gate = jnp.tanh(tower["positions"]["gate"])[None, None, None, :]
    of_tiles = tower["tile_positions"]["embedding"][ratios_M].reshape(x_MnpE.shape)
    x_MnpE = x_MnpE + (1 - gate) * tower["positions"]["embedding"][None, None, :, :] + gate * of_tiles
    x_MnpE = normed(x_MnpE, tower["pre_norm"]["scale"], tower["pre_norm"]["bias"], vision.layers)
    return constrain(x_MnpE, ROWS, None, None, None)


def _of_tiles(table: Params, ratios_M: jax.Array, tiles: int) -> jax.Array:
    """What is added to all patches of a tile, by its picture's aspect ratio [M, n, 1, E]."""
    gate = jnp.tanh(table["gate"])[None, None, None, :]
    return table["embedding"][ratios_M].reshape(len(ratios_M), tiles, 1, -1) * gate
