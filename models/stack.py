"""A stack of layers: the scan that runs them, for the decoder and for a vision tower.

B rows, L tokens, D width, n layers.

The layer is a Flax NNX module (models/layers.py), built once without arrays and split; from there on parameters are a
plain nested dict whose layers are stacked on a leading axis. `jax.lax.scan` runs them, a period of unlike layers at a
time, and merges each layer into its module at trace time, so that compile time does not grow with depth.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from models.config import Compute, DecoderConfig, Layer
from models.layers import Block, Cache, LayerCache, Road
from models.linear import TURNED
from models.moe import RouterStats
from models.quantized import SCALE, VALUES
from models.sharding import paths

Params = dict[str, Any]

ENTERS = "enters"  # the name of what goes into a layer
# What `jax.checkpoint` keeps of each layer for the backward pass; the rest is computed again.
REMAT: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[ENTERS],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
LONGEST_PERIOD = 8  # layers in one scan step, where layers are unlike


@functools.cache
def block_of(config: DecoderConfig, added: tuple[tuple[str, tuple[int, ...]], ...] = ()) -> tuple[nnx.GraphDef, Any]:
    """The graph of one layer and its abstract parameters; `added` are leaves by path that only an adapter has, or what
    stands in a kernel's place.
    """

    def build() -> Block:
        block = Block(config)
        for path, shape in added:
            *modules, leaf = path.split("/")
            module: Any = functools.reduce(getattr, modules, block)
            setattr(module, leaf, nnx.Param(jnp.zeros(shape)))
            if leaf in (VALUES, TURNED):
                del module.kernel
        return block

    graph, state = nnx.split(nnx.eval_shape(build))
    return graph, nnx.to_pure_dict(state)


def graph_of(config: DecoderConfig, layers: Params) -> nnx.GraphDef:
    """The graph of one layer with the leaves that these have."""
    known = paths(block_of(config)[1])
    added = [(path, leaf.shape[1:]) for path, leaf in sorted(paths(layers).items()) if path not in known]
    return block_of(config, tuple(added))[0]


def cast(params: Any, dtype: Any) -> Any:
    """Leaves in the dtype of the activations; a quantised kernel stays, and so do the keys of an adapter's dropout."""

    def one(path: tuple, leaf: jax.Array) -> jax.Array:
        stays = path[-1].key in (VALUES, SCALE) or not jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf if stays else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, params)


@jax.custom_vjp
def _narrow_gradient(leaf: jax.Array) -> jax.Array:
    """Zeros in bfloat16 whose gradient is that of the leaf: where `_narrow` is used with both, the gradients of all
    layers lie there in bfloat16, and not in float32.
    """
    return jnp.zeros(leaf.shape, jnp.bfloat16)


_narrow_gradient.defvjp(lambda leaf: (_narrow_gradient(leaf), None), lambda _, d: (d.astype(jnp.float32),))


@jax.custom_vjp
def _narrow(weight: jax.Array, gradient: jax.Array) -> jax.Array:
    """A layer's float32 weight in bfloat16; its gradient goes to `gradient`.

    Rounded before it is cast, which XLA leaves in the loop over layers: of a cast alone it makes one of all layers,
    before the loop, and so a second copy of the model.
    """
    return jax.lax.reduce_precision(weight, 8, 7).astype(jnp.bfloat16)


_narrow.defvjp(lambda weight, gradient: (_narrow(weight, gradient), None), lambda _, d: (None, d))


def narrow_gradients(layers: Params, dtype: Any) -> Any:
    """For each leaf that `narrow` casts from float32 to bfloat16 where its gradient goes, and None for others."""

    def one(path: tuple, leaf: jax.Array) -> jax.Array | None:
        narrowed = path[-1].key not in (VALUES, SCALE) and (leaf.dtype, dtype) == (jnp.float32, jnp.bfloat16)
        return _narrow_gradient(leaf) if narrowed else None

    return jax.tree_util.tree_map_with_path(one, layers)


def narrow(weights: Params, gradients: Any, dtype: Any) -> Params:
    """`cast` of one layer's weights, inside the loop over layers: what fsdp gathers is then in the compute dtype, and
    no other layer is there twice.
    """
    cast_late = jax.tree.map(
        lambda gradient, weight: weight if gradient is None else _narrow(jax.lax.stop_gradient(weight), gradient),
        gradients,
        weights,
        is_leaf=lambda gradient: gradient is None,
    )
    return cast(cast_late, dtype)


def periods(each: Sequence[Layer]) -> Iterator[tuple[int, int, tuple[Layer, ...]]]:
    """Layers as few scans: (first layer, how often, which layers in a row); for five local layers and a global one, ten
    times over, one scan of 10 steps.

    Where no short period fits, like neighbours are scanned together.
    """
    n = len(each)
    for p in range(1, min(LONGEST_PERIOD, n) + 1):
        if all(each[i] == each[i % p] for i in range(n)) and n >= 2 * p - 1:
            yield 0, n // p, tuple(each[:p])
            if n % p:
                yield n - n % p, 1, tuple(each[: n % p])
            return
    first = 0
    while first < n:
        last = first
        while last < n and each[last] == each[first]:
            last += 1
        yield first, last - first, (each[first],)
        first = last


def scan(
    layers: Params,
    x_BLD: jax.Array,
    cache: Cache | None,
    first: int,
    repeats: int,
    period: tuple[Layer, ...],
    config: DecoderConfig,
    compute: Compute,
    road: Road,
    looking: Params | None = None,
) -> tuple[jax.Array, Cache | None, RouterStats | None]:
    """`repeats` times the layers of a period, from layer `first` on; `looking` is the stack of those among them that
    look at pictures, which are left out where there are none.
    """
    if road.sight is None:
        period = tuple(layer for layer in period if not layer.looks)
    stacks = {False: layers, True: looking}
    kinds = {kind: [layer for layer in period if layer.looks == kind] for kind in (False, True)}
    kinds = {kind: own for kind, own in kinds.items() if own}
    begin = {kind: sum(layer.looks == kind for layer in config.each[:first]) for kind in kinds}
    graphs = {kind: graph_of(config.stack(looks=kind), stacks[kind]) for kind in kinds}  # type: ignore[arg-type]
    if not kinds:
        return x_BLD, cache, None

    def grouped(kind: bool, leaf: jax.Array) -> jax.Array:
        own = len(kinds[kind])
        start, count = begin[kind], repeats * own
        some = leaf if count == leaf.shape[0] else leaf[start : start + count]
        # Between a loop over tokens and this one, XLA copies what is reshaped, in every turn.
        return some if own == 1 else some.reshape(repeats, own, *leaf.shape[1:])

    def single(kind: bool, leaf: jax.Array) -> Sequence[jax.Array]:
        return [leaf] if len(kinds[kind]) == 1 else jnp.unstack(leaf)

    def run(layer: Layer, weights: tuple[Params, Any], x_BLD: jax.Array, slot: LayerCache | None):
        if compute.remat == "offload":
            x_BLD = checkpoint_name(x_BLD, ENTERS)
        return nnx.merge(graphs[layer.looks], narrow(*weights, compute.dtype))(x_BLD, road, layer, slot)

    if compute.remat != "none":
        run = jax.checkpoint(  # inside a scan of single layers XLA cannot undo it; between neighbours it could
            run, policy=REMAT[compute.remat], prevent_cse=len(period) > 1 or repeats == 1, static_argnums=0
        )

    def body(carry: tuple[jax.Array, Cache | None], groups: dict[bool, Any]) -> tuple[Any, Any]:
        x_BLD, cache = carry
        total, each = None, {}
        for kind, group in groups.items():
            leaves, structure = jax.tree.flatten(group)
            rows = zip(*(single(kind, leaf) for leaf in leaves), strict=True)
            each[kind] = iter([jax.tree.unflatten(structure, row) for row in rows])
        for layer in period:
            *one, number = next(each[layer.looks])
            slot = None if cache is None else LayerCache(cache, number)
            x_BLD, slot, stats = run(layer, one, x_BLD, slot)
            cache = None if slot is None else slot.cache
            total = stats if total is None else jax.tree.map(jnp.add, total, stats)
        return (x_BLD, cache), total

    unroll = max(1, min(compute.scan_unroll // len(period), repeats))
    numbered = {}
    for kind, own in kinds.items():
        stack: Any = stacks[kind]
        count = jax.tree.leaves(stack)[0].shape[0]
        if repeats * len(own) != count:  # a part is copied, and is that sooner when cast
            stack = cast(stack, compute.dtype)
        numbered[kind] = (stack, narrow_gradients(stack, compute.dtype), jnp.arange(count))
    groups = {kind: jax.tree.map(functools.partial(grouped, kind), own) for kind, own in numbered.items()}
    (x_BLD, cache), stats = jax.lax.scan(body, (x_BLD, cache), groups, unroll=unroll)
    return x_BLD, cache, jax.tree.map(lambda leaf: leaf.sum(axis=0), stats)


def through(
    layers: Params, stack: DecoderConfig, x_BLD: jax.Array, stops: Sequence[int], compute: Compute, road: Road
) -> dict[int, jax.Array]:
    """What comes out of a tower's stack after so many layers, for each of `stops`; those behind the last one are not
    computed.
    """
    outputs, done = {0: x_BLD}, 0
    for stop in sorted(set(stops)):
        for first, repeats, period in periods(stack.each[done:stop]):
            x_BLD = scan(layers, x_BLD, None, done + first, repeats, period, stack, compute, road)[0]
        outputs[stop] = x_BLD
        done = max(done, stop)
    return outputs
