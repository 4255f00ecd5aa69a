"""Low-rank adapters: what they are, how they begin, and how they join the model they belong to.

n layers, D inputs, F outputs, R rank of the adapter. A projector's linear layers stand alone: theirs are without n.

An adapter is a parameter tree of its own, with leaves beside those kernels that it adapts:

    layers/attention/q/lora_a          [n, D, R]
    layers/attention/q/lora_b          [n, R, F]
    layers/attention/q/lora_magnitude  [n, F]       DoRA only
    embed/embedding                    [V, D]       and whatever else is trained whole, in the place of the model's own

That tree is what trains; the model's own parameters are frozen, and are another one. `merged` lays the first over the
second for a forward pass, where `models.linear.Linear` finds both. The names and rules are peft's.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.sharding import nested, paths

Params = dict[str, Any]

A, B, MAGNITUDE, DROPOUT_KEY = "lora_a", "lora_b", "lora_magnitude", "dropout_key"
INITS = ("kaiming", "gaussian", "random")


@dataclass(frozen=True)
class Lora:
    """An adapter's settings; hashable, part of what is compiled.

    `modules` are paths of linear layers, `layers/attention/q`, and `whole` paths of leaves trained whole. `init` says
    how A begins: uniform within 1 / sqrt(D) ("kaiming"), or normal with deviation 1 / R ("gaussian"), while B is zero
    and the adapter changes nothing; or both uniform ("random"), and it does.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False  # arXiv:2312.03732
    dora: bool = False  # arXiv:2402.09353
    init: str = "kaiming"
    modules: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """What the adapter's product is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Parts(NamedTuple):
    """A model in two trees: what is trained, and what is used as it is (None where that is nothing)."""

    trained: Params
    frozen: Params | None


def split(params: Params, trained: Collection[str]) -> Parts:
    """The model's parameters as those of these paths, and the others."""
    leaves = paths(params)
    frozen = {path: leaf for path, leaf in leaves.items() if path not in trained}
    return Parts(nested({path: leaf for path, leaf in leaves.items() if path in trained}), nested(frozen) or None)


def merged(params: Params, frozen: Params | None) -> Params:
    """One tree with the leaves of both; where both have one, that of `params`."""
    if frozen is None:
        return params
    return nested(paths(frozen) | paths(params))


def abstract_adapter(model: Params, lora: Lora) -> Params:
    """The adapter's leaves as `jax.ShapeDtypeStruct`s, beside the kernels in `model`; float32, as peft keeps them."""
    kernels, leaves = paths(model), dict[str, Any]()
    for module in lora.modules:
        *n, D, F = kernels[f"{module}/kernel"].shape
        shapes = {A: (*n, D, lora.rank), B: (*n, lora.rank, F)} | ({MAGNITUDE: (*n, F)} if lora.dora else {})
        leaves |= {f"{module}/{name}": jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return nested(leaves)


def init_adapter(key: jax.Array, model: Params, lora: Lora) -> Params:
    """A new adapter for the parameters `model`, as `lora.init` says; DoRA's magnitudes are the norms it begins with."""
    leaves: dict[str, jax.Array] = {}
    for path, leaf in paths(abstract_adapter(model, lora)).items():
        module, name = path.rsplit("/", 1)
        if name == MAGNITUDE:
            continue
        own = jax.random.fold_in(key, int.from_bytes(path.encode(), "little") % (2**31 - 1))
        fan_in = leaf.shape[-2]
        if name == B and lora.init != "random":
            leaves[path] = jnp.zeros(leaf.shape, leaf.dtype)
        elif lora.init == "gaussian":
            leaves[path] = jax.random.normal(own, leaf.shape, leaf.dtype) / lora.rank
        else:
            leaves[path] = jax.random.uniform(own, leaf.shape, leaf.dtype, -1.0, 1.0) / math.sqrt(fan_in)
    if lora.dora:
        kernels = paths(model)
        for module in lora.modules:
            a, b = leaves[f"{module}/{A}"], leaves[f"{module}/{B}"]
            leaves[f"{module}/{MAGNITUDE}"] = column_norms(kernels[f"{module}/kernel"], a, b, lora.scale)
    return nested(leaves)


def column_norms(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """The norm of each column of `kernel + scale a b` [..., D, F]; in float32, returned as `a` is."""
    wide = kernel.astype(jnp.float32) + scale * (a.astype(jnp.float32) @ b.astype(jnp.float32))
    return jnp.sqrt(jnp.sum(jnp.square(wide), axis=-2)).astype(a.dtype)


def fused(params: Params, lora: Lora) -> Params:
    """The model without its adapter that computes the same: each adapted kernel becomes `W + s A B`, of DoRA
    `m / |W + s A B|` times that, computed in float32 and kept in the kernel's own dtype. `params` may be a part of the
    model.
    """
    leaves = paths(params)
    for module in (module for module in lora.modules if module.split("/")[0] in params):
        kernel, a, b = (leaves[f"{module}/{name}"] for name in ("kernel", A, B))
        wide = kernel.astype(jnp.float32) + lora.scale * (a.astype(jnp.float32) @ b.astype(jnp.float32))
        if lora.dora:
            norms = jnp.sqrt(jnp.sum(jnp.square(wide), axis=-2))
            wide *= (leaves[f"{module}/{MAGNITUDE}"] / norms)[..., None, :]
        leaves[f"{module}/kernel"] = wide.astype(kernel.dtype)
    return nested({path: leaf for path, leaf in leaves.items() if not is_adapter(path)})


def is_adapter(path: str) -> bool:
    """Whether a leaf's path is one that only an adapter has."""
    return path.rsplit("/", 1)[-1] in (A, B, MAGNITUDE)


def with_dropout(params: Params, lora: Lora, key: jax.Array) -> Params:
    """`params` with a key for each layer of each adapted module, from which `Linear` draws what it drops."""
    leaves = paths(params)
    for number, module in enumerate(lora.modules):
        n, own = leaves[f"{module}/{A}"].shape[:-2], jax.random.fold_in(key, number)
        leaves[f"{module}/{DROPOUT_KEY}"] = jax.random.key_data(jax.random.split(own, n) if n else own)
    return nested(leaves)


def dropped(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """`x` with that share of its elements zero, and the others larger by `1 / (1 - rate)`; `key` as raw key data."""
    kept = jax.random.bernoulli(jax.random.wrap_key_data(key), 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros_like(x))
