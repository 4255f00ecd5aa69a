"""A model's own kernels in four or eight bits, for training an adapter beside them (QLoRA, arXiv:2305.14314).

n layers, D inputs, F outputs, S inputs that share a scale.

A quantised kernel is two leaves in the place of one; `models.linear.Linear` multiplies with what they stand for:

    layers/attention/q/kernel_values   [n, D, F]      NF4 indices, or numbers of four or eight bits
    layers/attention/q/kernel_scale    [n, D / S, F]  float32

The formats and their arithmetic are those of the qwix library (the `qlora` extra). Blocks of 64 inputs share a scale,
as in bitsandbytes; its second quantisation, of the scales, is not done.
"""

import functools
import math
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from models.sharding import nested, paths

KERNEL, VALUES, SCALE = "kernel", "kernel_values", "kernel_scale"
BLOCK = 64
FORMATS: dict[str, Any] = {"nf4": "nf4", "fp4": jnp.float4_e2m1fn, "int8": jnp.int8}


def quantised(params: dict[str, Any], form: str, *, but: Collection[str] = ()) -> dict[str, Any]:
    """The tree with every linear layer's kernel in a format of FORMATS; embedding, head, norms, routers and experts
    stay as they are, and so do the paths `but`, which are trained.
    """
    leaves: dict[str, jax.Array] = {}
    for path, leaf in paths(params).items():
        leaves |= quantised_leaf(path, leaf, form, but=but)
    return nested(leaves)


def quantised_leaf(path: str, leaf: jax.Array, form: str, *, but: Collection[str] = ()) -> dict[str, jax.Array]:
    """The leaves by path that stand for one: two for a linear layer's kernel, itself for any other or one of `but`."""
    if form not in FORMATS:
        raise ValueError(f"quantisation {form!r} is not one of {', '.join(FORMATS)}")
    if not is_quantisable(path) or path in but:
        return {path: leaf}
    module = path.rsplit("/", 1)[0]
    values, scale = _quantise(form)(leaf)
    return {f"{module}/{VALUES}": values, f"{module}/{SCALE}": scale}


def unquantised(params: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """The tree with plain kernels of `dtype`: what the quantised ones stand for."""
    leaves, there = {}, paths(params)
    for path, leaf in there.items():
        module, name = path.rsplit("/", 1)
        if name == VALUES:
            leaves[f"{module}/{KERNEL}"] = dequantise(leaf, there[f"{module}/{SCALE}"]).astype(dtype)
        elif name != SCALE:
            leaves[path] = leaf
    return nested(leaves)


def is_quantisable(path: str) -> bool:
    """Whether a leaf is the kernel of a linear layer of attention or MLP."""
    return path.startswith(("layers/attention/", "layers/mlp/")) and path.endswith(f"/{KERNEL}")


def dequantise(values: jax.Array, scale: jax.Array) -> jax.Array:
    """The kernel [..., D, F] in the dtype of its scale [..., D / S, F]."""
    qwix = _qwix()
    form = "nf4" if values.dtype == jnp.uint4 else values.dtype
    return qwix.dequantize(qwix.QArray(values, scale, qtype=form))


@functools.cache
def _quantise(form: str) -> Any:
    """Jitted `kernel [n, D, F] → (values, scale)`."""
    qwix = _qwix()

    def one(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        array = qwix.quantize(
            kernel.astype(jnp.float32),
            FORMATS[form],
            channelwise_axes=(0, 2),
            tiled_axes={1: math.gcd(BLOCK, kernel.shape[1])},
        )
        return array.qvalue, array.scale

    return jax.jit(one)


def _qwix() -> Any:
    try:
        import qwix
    except ImportError:
        raise ValueError("a quantised model needs the package qwix: pip install 'einkorn[qlora]'") from None
    return qwix
