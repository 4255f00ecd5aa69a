"""From the patches of pictures to features that take the places of text embeddings.

B rows, P patches of a row, C numbers of a patch, T tiles of all rows, p patches of a tile, E width of the tower, F
features of a row, D width of the text model, L tokens.

A tower is the decoder's own stack of layers without causality: all patches stand at position 0, and see those of their
segment. What differs between families is in `Vision`, and in which of PROJECTORS leads to the text model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.activations import ACTIVATIONS
from models.attention import Where
from models.config import Compute, DecoderConfig, Layer
from models.layers import Road, normed
from models.linear import linear, matrix_product
from models.lora import Lora
from models.sharding import ROWS, constrain
from models.stack import Params, block_of, cast, through

Shapes = dict[str, tuple[int, ...]]


FARTHEST = 1 << 15  # rows and columns of patches are fewer
KEYS = (  # of a batch, as Images has them
    *("patches", "patch_segments", "patch_places", "image_features"),
    *("groups", "axes", "patch_tiles", "cross_images"),
)
OF_PATCHES = ("patches", "segments", "places", "tiles")  # those that are as long as patches are many


class Images(NamedTuple):
    """The pictures of a batch of rows: `patches` [B, P, C], which segment each is of (0: none) [B, P], its row and
    column [B, P, 2], and for each token 1 + the number of the feature that takes its place, or 0 [B, L]. Of families
    whose pictures see themselves both ways, the group of each token, or 0 [B, L]; of those whose tokens have positions
    in time, height and width, these [B, L, 3]. Of families whose text looks at pictures no token is a feature: for each
    patch the tile of its picture and the number of its aspect ratio [B, P, 2], and for each token the first and the
    last picture that it sees, and whether it stands before them [B, L, 3].
    """

    patches: Any
    segments: Any
    places: Any
    features: Any
    groups: Any = None
    axes: Any = None
    tiles: Any = None
    looks: Any = None

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> "Images | None":
        """Those of a batch that has any."""
        return cls(*(batch.get(key) for key in KEYS)) if KEYS[0] in batch else None


class Shown(NamedTuple):
    """The pictures of one prompt, as `Images` has those of rows: patches [p, C], segments [p], places [p, 2], and for
    each of its tokens the feature that takes its place [n], its group [n] and its axes [n, 3]; or tiles [p, 2] and
    looks [n, 3].
    """

    patches: np.ndarray
    segments: np.ndarray
    places: np.ndarray
    features: np.ndarray | None
    groups: np.ndarray | None = None
    axes: np.ndarray | None = None
    tiles: np.ndarray | None = None
    looks: np.ndarray | None = None


def most_looked_at(shown: Sequence[Shown], vision: "Vision | None") -> int:
    """How many features the text of one of these prompts looks at, at most; 0 where features stand among the text."""
    if vision is None or not shown or shown[0].looks is None:
        return 0
    return _room(shown, vision) // vision.tile * (vision.tile + vision.class_token)


def _room(shown: Sequence[Shown], vision: "Vision") -> int:
    """How many patches there is room for; few sizes."""
    units = -(-max(len(one.patches) for one in shown) // vision.unit)
    return vision.unit << (units - 1).bit_length()


def stacked(prompts: Sequence[Shown | None], vision: "Vision", *, length: int) -> Images | None:
    """The pictures of prompts padded to `length` tokens; None where no prompt has any."""
    shown = [one for one in prompts if one is not None]
    if not shown:
        return None
    most = _room(shown, vision)

    def room(name: str) -> np.ndarray | None:
        one = getattr(shown[0], name)
        if one is None:
            return None
        return np.zeros((len(prompts), most if name in OF_PATCHES else length, *one.shape[1:]), one.dtype)

    images = Images(*map(room, Images._fields))
    for row, one in enumerate(prompts):
        for whole, own in zip(images, one or (), strict=False):
            if own is not None:
                whole[row, : len(own)] = own
    return images


@dataclass(frozen=True, kw_only=True)
class Vision:
    """What a checkpoint decides of its tower and what leads from it to the text model.

    `layers` is the tower's stack, as a decoder's config without a vocabulary, whose patches may rotate by row and
    column, and whose window is so many patches a side; `tile` how many patches a tile has, in rows of `columns`: none
    where a picture may have any shape, and has positions by rotation, or those of a square table of `columns` drawn to
    its size. `deep` are outputs whose features join the stream behind the text's first layers, one each. `takes` are
    the outputs that become features, by the number of layers before them, each without the class token's where
    `drops_class`; None: the last one, normed.
    """

    layers: DecoderConfig
    patch: int
    channels: int
    projector: str  # a name of PROJECTORS
    frames: int = 0  # that are in a patch, where patches have a third dimension
    columns: int = 0
    tile: int = 0
    class_token: bool = False
    patch_bias: bool = False
    pre_norm: bool = False
    takes: tuple[int, ...] | None = None
    drops_class: bool = False
    deep: tuple[int, ...] = ()
    tiles: int = 1  # of a picture, which see one another
    ratios: tuple[int, ...] = ()  # how many tiles are filled, by the number of the picture's aspect ratio
    further: DecoderConfig | None = None  # layers behind the tower's
    projector_bias: bool = False
    activation: str = "gelu"
    pooled: int = 0  # features in a row of a tile that are left of its patches, or patches in a row of a feature
    fractions: bool = False  # a patch's position is looked up by how far it is through its tile

    @property
    def width(self) -> int:
        """Of what the projector reads."""
        return self.layers.width * (len(self.takes or (0,)) + (self.further is not None))

    @property
    def unit(self) -> int:
        """How many patches come together, at least."""
        return self.tile * self.tiles or self.pooled**2


def vit(*, width: int, heads: int, mlp_width: int, layers: int, activation: str, eps: float) -> DecoderConfig:
    """The layers of a plain vision transformer (arXiv:2010.11929): pre-norm, biases everywhere, no gate."""
    return DecoderConfig(
        vocabulary=0,
        width=width,
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        mlp_width=mlp_width,
        activation=activation,
        norm_eps=eps,
        tied_head=True,
        initializer_range=0.02,
        each=(Layer(None, None),) * layers,
        norm="layer",
        norm_bias=True,
        qkv_bias=True,
        o_bias=True,
        gated=False,
        mlp_bias=True,
    )


def abstract_vision(vision: Vision, width: int, *, dtype: Any) -> Params:
    """The subtrees `vision` and `projector` of a model whose text has this width, as `jax.ShapeDtypeStruct`s."""
    E, stack = vision.layers.width, vision.layers

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    norm = {"scale": leaf(E), "bias": leaf(E)}
    kernel = leaf(E, vision.channels, *(vision.frames,) * (vision.frames > 0), vision.patch, vision.patch)
    tower: Params = {
        "patch": {"kernel": kernel} | ({"bias": leaf(E)} if vision.patch_bias else {}),
        "layers": jax.tree.map(lambda one: leaf(stack.layers, *one.shape), block_of(stack)[1]),
    }
    if places := vision.tile + vision.class_token or vision.columns**2:
        tower["positions"] = {"embedding": leaf(places, E)}
    if vision.tile:
        tower["norm"] = norm
    if vision.class_token:
        tower["class"] = {"embedding": leaf(E)}
    if vision.pre_norm:
        tower["pre_norm"] = dict(norm)
    projector: Params = {}
    for path, shape in PROJECTORS[vision.projector].shapes(vision, width).items():
        module, name = path.split("/")
        projector.setdefault(module, {})[name] = leaf(*shape)
    if vision.deep:
        whole = E * vision.pooled**2
        layers: Params = {
            "mlp": {},
            "norm": {"scale": leaf(len(vision.deep), whole), "bias": leaf(len(vision.deep), whole)},
        }
        for name, out in (("up", whole), ("down", width)):
            layers["mlp"][name] = {"kernel": leaf(len(vision.deep), whole, out), "bias": leaf(len(vision.deep), out)}
        projector["layers"] = layers
    return {"vision": tower, "projector": projector}


def with_images(
    params: Params, vision: Vision, x_BLD: jax.Array, images: Images, compute: Compute
) -> tuple[jax.Array, list[jax.Array]]:
    """Embeddings [B, L, D] with the features of pictures in the places of those that stand for them, and what joins the
    stream there behind the first layer, the second and so on: zero elsewhere.
    """
    first_BFD, *deep = image_features(params, vision, images, compute)
    at_BL1, here_BL1 = jnp.maximum(images.features - 1, 0)[:, :, None], (images.features > 0)[:, :, None]

    def placed(features_BFD: jax.Array, elsewhere: jax.Array | int) -> jax.Array:
        taken_BLD = jnp.take_along_axis(features_BFD, at_BL1, axis=1)
        return jnp.where(here_BL1, taken_BLD.astype(x_BLD.dtype), elsewhere)

    return placed(first_BFD, x_BLD), [placed(each, 0) for each in deep]


def image_features(params: Params, vision: Vision, images: Images, compute: Compute) -> list[jax.Array]:
    """The features [B, F, D] of a row's pictures, one picture's after the other's, and those of each of the deep
    outputs.
    """
    B, projector = images.patches.shape[0], cast(params["projector"], compute.dtype)
    outputs_TPE, deep = tower_outputs(params, vision, images, compute)
    found = [PROJECTORS[vision.projector].project(projector, vision, outputs_TPE, compute.lora)]
    for number, out_TPE in enumerate(deep):
        one = jax.tree.map(lambda leaf, number=number: leaf[number], projector["layers"])
        found.append(_merged_before(one, vision, out_TPE, compute.lora))
    return [constrain(each.reshape(B, -1, each.shape[-1]), ROWS, None, None) for each in found]


def tower_outputs(
    params: Params, vision: Vision, images: Images, compute: Compute
) -> tuple[jax.Array, list[jax.Array]]:
    """What the projector reads of each tile [T, p, E], several outputs side by side where it reads several; and each of
    the deep outputs.
    """
    tower = cast(params["vision"], compute.dtype)
    x_TPE, segments_TP = _embedded(tower, vision, images, compute.dtype)
    outputs = _outputs(tower, vision, images, x_TPE, segments_TP, compute)
    if vision.class_token and vision.drops_class:
        outputs = [out_TPE[:, 1:] for out_TPE in outputs]
    deep = len(vision.deep)
    return jnp.concatenate(outputs[deep:], axis=-1), outputs[:deep]


def _embedded(tower: Params, vision: Vision, images: Images, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """What the layers read: patches of all tiles [T, p, E], the class token first, and their segments."""
    p, C = vision.tile or images.patches.shape[1], images.patches.shape[-1]
    patches_TPC = images.patches.reshape(-1, p, C).astype(dtype)
    segments_TP = images.segments.reshape(-1, p)
    x_TPE = matrix_product(patches_TPC, tower["patch"]["kernel"].reshape(-1, C).T)
    if "bias" in tower["patch"]:
        x_TPE = x_TPE + tower["patch"]["bias"][None, None, :]
    if not vision.tile:
        if vision.columns:
            x_TPE = x_TPE + _drawn(tower["positions"]["embedding"], vision.columns, images, vision.unit)
        return constrain(x_TPE, ROWS, None, None), segments_TP
    places_TP2 = images.places.reshape(-1, p, 2)
    if vision.fractions:
        places_TP2 = jnp.asarray(_by_fraction(vision.columns))[places_TP2]
    at_TP = places_TP2[..., 0] * vision.columns + places_TP2[..., 1]
    if vision.class_token:
        first = jnp.broadcast_to(tower["class"]["embedding"][None, None, :], (x_TPE.shape[0], 1, x_TPE.shape[2]))
        x_TPE = jnp.concatenate([first, x_TPE], axis=1)
        at_TP = jnp.pad(at_TP + 1, ((0, 0), (1, 0)))
        segments_TP = jnp.concatenate([segments_TP[:, :1], segments_TP], axis=1)
    x_TPE = x_TPE + tower["positions"]["embedding"][at_TP]
    if vision.pre_norm:
        x_TPE = normed(x_TPE, tower["pre_norm"]["scale"], tower["pre_norm"]["bias"], vision.layers)
    return constrain(x_TPE, ROWS, None, None), segments_TP


def _drawn(table: jax.Array, side: int, images: Images, unit: int) -> jax.Array:
    """Positions [B, P, E] of a table of side x side that is drawn to the size of each picture, corners on corners:
    between the four nearest of the table.
    """
    pictures = images.segments.shape[1] // unit + 1

    def of_row(segments_P: jax.Array, places_P2: jax.Array) -> jax.Array:
        return jax.ops.segment_max(places_P2, segments_P, num_segments=pictures)[segments_P]

    last_BP2 = jax.vmap(of_row)(images.segments, images.places)
    at_BP2 = images.places.astype(jnp.float32) * (side - 1) / jnp.maximum(last_BP2, 1)
    lower_BP2 = jnp.floor(at_BP2)
    beyond_BP2 = at_BP2 - lower_BP2
    total: Any = 0.0
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        near_BP2 = jnp.minimum(lower_BP2.astype(jnp.int32) + jnp.array([down, right])[None, None, :], side - 1)
        share_BP2 = jnp.where(jnp.array([down, right])[None, None, :] == 1, beyond_BP2, 1 - beyond_BP2)
        found_BPE = table[near_BP2[..., 0] * side + near_BP2[..., 1]]
        total = total + found_BPE * share_BP2.prod(axis=-1)[..., None].astype(table.dtype)
    return total


def _by_fraction(columns: int) -> np.ndarray:
    """The row or column of the table for each row or column of a tile: its own, but for what float32 makes of
    fractions, as in the model that was trained so.
    """
    bounds = ((1 + np.arange(columns - 1)) / columns).astype(np.float32)
    through = np.minimum(np.arange(columns, dtype=np.float32) * np.float32(1 / columns), np.float32(1 - 1e-6))
    return np.searchsorted(bounds, through, side="right").astype(np.int32)


def _outputs(
    tower: Params, vision: Vision, images: Images, x_TPE: jax.Array, segments_TP: jax.Array, compute: Compute
) -> list[jax.Array]:
    """The outputs that become features; layers behind the last of these are not computed."""
    stack, nowhere = vision.layers, jnp.zeros_like(segments_TP)
    where = Where(nowhere, nowhere, segments_TP, segments_TP)
    for side in {layer.window for layer in stack.each if layer.window}:
        squares_TP = images.places[..., 0] // side * FARTHEST + images.places[..., 1] // side
        where = where._replace(q_squares_BL=squares_TP, k_squares_BS=squares_TP)
    road = Road(
        tables={rope: rope.tables(images.places) for rope in {layer.rope for layer in stack.each} if rope},
        where=where,
        reach=None,
        attention=compute.attention,
        lora=compute.lora,
    )
    takes = (*vision.deep, *((stack.layers,) if vision.takes is None else vision.takes))
    outputs = through(tower["layers"], stack, x_TPE, takes, compute, road)
    if vision.takes is None:
        return [normed(outputs[stack.layers], tower["norm"]["scale"], tower["norm"]["bias"], stack)]
    return [outputs[take] for take in takes]


def computed(vision: Vision, path: str) -> int | None:
    """How many of a leaf's layers lead to a feature, from the first on: 0 of a norm that nothing is read from, None
    where it is all there is. What leads to none has no gradient, and nothing to learn.
    """
    if vision.takes is None or vision.further is not None:
        return None
    if path.startswith("vision/layers/"):
        return max(vision.takes) if max(vision.takes) < vision.layers.layers else None
    return 0 if path.startswith("vision/norm/") else None


class Projector(NamedTuple):
    """What leads from a tower's outputs to the text model: the shapes of its leaves by path, for a text model of some
    width; and the features [T, f, D] of outputs [T, p, E], with how an adapter acts.
    """

    shapes: Callable[[Vision, int], Shapes]
    project: Callable[[Params, Vision, jax.Array, Lora | None], jax.Array]


def _mlp_shapes(vision: Vision, width: int) -> Shapes:
    shapes: Shapes = {"up/kernel": (vision.width, width), "down/kernel": (width, width)}
    return shapes | ({"up/bias": (width,), "down/bias": (width,)} if vision.projector_bias else {})


def _mlp(projector: Params, vision: Vision, x_TPE: jax.Array, lora: Lora | None) -> jax.Array:
    """Each output by itself, `down(act(up(x)))` (arXiv:2310.03744)."""
    return linear(projector["down"], ACTIVATIONS[vision.activation](linear(projector["up"], x_TPE, lora)), lora)


def _pooled_shapes(vision: Vision, width: int) -> Shapes:
    return {"norm/scale": (vision.width,), "up/kernel": (vision.width, width)}


def _pooled(projector: Params, vision: Vision, x_TPE: jax.Array, lora: Lora | None) -> jax.Array:
    """Squares of patches averaged, normed as Gemma norms, and projected."""
    side = vision.columns // vision.pooled
    x = x_TPE.reshape(-1, vision.pooled, side, vision.pooled, side, x_TPE.shape[-1]).mean(axis=(2, 4))
    text = replace(vision.layers, norm="rms_plus_one")
    x_TFE = x.reshape(-1, vision.pooled**2, x_TPE.shape[-1])
    return matrix_product(normed(x_TFE, projector["norm"]["scale"], None, text), projector["up"]["kernel"])


def _linear_shapes(vision: Vision, width: int) -> Shapes:
    bias: Shapes = {"up/bias": (width,)} if vision.projector_bias else {}
    return {"up/kernel": (vision.width, width)} | bias


def _alone(projector: Params, vision: Vision, x_TPE: jax.Array, lora: Lora | None) -> jax.Array:
    """Each output by itself, through one linear layer."""
    return linear(projector["up"], x_TPE, lora)


def _joined_shapes(vision: Vision, width: int) -> Shapes:
    return {"up/kernel": (vision.width * vision.pooled**2, width)}


def _joined(projector: Params, vision: Vision, x_TPE: jax.Array, lora: Lora | None) -> jax.Array:
    """Squares of neighbouring patches side by side, through one linear layer (arXiv:2408.12637, section 2)."""
    side, E = vision.pooled, x_TPE.shape[-1]
    few = vision.columns // side
    x = x_TPE.reshape(-1, few, side, few, side, E).transpose(0, 1, 3, 2, 4, 5)
    return linear(projector["up"], x.reshape(-1, few * few, side * side * E), lora)


def _merged_shapes(vision: Vision, width: int) -> Shapes:
    E, whole = vision.layers.width, vision.width * vision.pooled**2
    shapes: Shapes = {"norm/scale": (E,), "up/kernel": (whole, whole), "up/bias": (whole,)}
    shapes |= {"down/kernel": (whole, width), "down/bias": (width,)}
    return shapes | ({"norm/bias": (E,)} if vision.layers.norm_bias else {})


def _merged(projector: Params, vision: Vision, x_TPE: jax.Array, lora: Lora | None) -> jax.Array:
    """Patches that follow one another normed, side by side, and through an MLP (arXiv:2409.12191, section 2.1)."""
    x_TPE = normed(x_TPE, projector["norm"]["scale"], projector["norm"].get("bias"), vision.layers)
    T, P, E = x_TPE.shape
    side_by_side = x_TPE.reshape(T, P // vision.pooled**2, vision.pooled**2 * E)
    return _mlp(projector, vision, side_by_side, lora)


def _merged_before(projector: Params, vision: Vision, x_TPE: jax.Array, lora: Lora | None) -> jax.Array:
    """As `_merged`, but normed when they are side by side."""
    T, P, E = x_TPE.shape
    side_by_side = x_TPE.reshape(T, P // vision.pooled**2, vision.pooled**2 * E)
    x_TFE = normed(side_by_side, projector["norm"]["scale"], projector["norm"]["bias"], vision.layers)
    return _mlp(projector["mlp"], vision, x_TFE, lora)


PROJECTORS = {
    "mlp": Projector(_mlp_shapes, _mlp),
    "linear": Projector(_linear_shapes, _alone),
    "pooled": Projector(_pooled_shapes, _pooled),
    "joined": Projector(_joined_shapes, _joined),
    "merged": Projector(_merged_shapes, _merged),
}
