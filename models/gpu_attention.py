"""Causal attention by kernels for NVIDIA's GPUs: cuDNN's, for rows of one document, and JAX's in Pallas for Triton,
which knows segments. Memory grows with the length of a row.

B rows, L positions, N query heads, K key heads, H head width. On a mesh each device computes its own rows and heads.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend.backend import get_backend
from jax.sharding import PartitionSpec as P

from models.sharding import platform, split_heads

OLDEST = 8.0  # compute capability (Ampere's), below which neither kernel is there
WIDEST = 512  # bytes of a head's width that Triton's kernel is given
SMALL, LARGE = (
    32,
    64,
)  # positions that a program of Triton's kernel computes together: few, so that shared memory holds them


@functools.cache
def gpu_refuses(platform: str) -> str | None:
    """Why these kernels cannot run there, or None. A GPU that programs are only compiled for is taken to be a new
    one.
    """
    if platform != "gpu":
        return "a kernel for NVIDIA's GPUs"
    if jax.default_backend() != "gpu":
        return None
    if "cuda" not in get_backend().platform_version:
        return "a kernel for NVIDIA's GPUs"
    oldest = min(float(device.compute_capability) for device in jax.local_devices())
    return None if oldest >= OLDEST else f"compute capability {oldest}, and {OLDEST} is needed"


def cudnn(
    q_BLNH: jax.Array,
    k_BLKH: jax.Array,
    v_BLKH: jax.Array,
    *,
    scale: float,
    window: int | None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Attention [B, L, N, H] of each query to itself and all keys before it in the row, or the last `window` of these.

    A row is one document; padding behind it is seen by nothing but padding. `implementation` "xla" computes the same
    without cuDNN.
    """
    rows = functools.partial(
        jax.nn.dot_product_attention,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None or window >= q_BLNH.shape[1] else (window - 1, 0),
        implementation=implementation,
    )
    return _on_each_device(rows, q_BLNH, k_BLKH, v_BLKH)


def triton(
    q_BLNH: jax.Array, k_BLKH: jax.Array, v_BLKH: jax.Array, segments_BL: jax.Array, *, scale: float
) -> jax.Array:
    """Attention [B, L, N, H] of each query to itself and the keys of its own segment before it.

    Elsewhere than on a GPU the kernel is interpreted, slowly.
    """
    from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

    L, H = q_BLNH.shape[1], q_BLNH.shape[3]
    block = LARGE if H * q_BLNH.dtype.itemsize <= WIDEST // 2 else SMALL
    more = -L % LARGE
    pad = functools.partial(jnp.pad, pad_width=[(0, 0), (0, more), (0, 0), (0, 0)])
    sizes = BlockSizes(block, block, SMALL, SMALL, SMALL, SMALL)

    def rows(q_BLNH: jax.Array, k_BLKH: jax.Array, v_BLKH: jax.Array, segments_BL: jax.Array) -> jax.Array:
        each = q_BLNH.shape[2] // k_BLKH.shape[2]
        k_BLNH, v_BLNH = (jnp.repeat(x, each, axis=2) for x in (k_BLKH, v_BLKH))
        return mha(q_BLNH, k_BLNH, v_BLNH, segments_BL, scale, True, sizes, interpret=platform() != "gpu")

    segments_BL = jnp.pad(segments_BL, [(0, 0), (0, more)])
    return _on_each_device(rows, pad(q_BLNH), pad(k_BLKH), pad(v_BLKH), segments_BL)[:, :L]


def _on_each_device(
    rows: Callable[..., jax.Array], q_BLNH: jax.Array, k_BLKH: jax.Array, v_BLKH: jax.Array, *more_BL: jax.Array
) -> jax.Array:
    """`rows` of each device's own rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return rows(q_BLNH, k_BLKH, v_BLKH, *more_BL)
    k_BLKH, v_BLKH, q_spec, k_spec = split_heads(q_BLNH, k_BLKH, v_BLKH)
    in_specs: tuple[Any, ...] = (q_spec, k_spec, k_spec, *(P(*q_spec[:2]) for _ in more_BL))
    return jax.shard_map(
        rows,
        in_specs=in_specs,
        out_specs=q_spec,
        check_vma=False,  # the kernels do not say along which axes their results differ
    )(q_BLNH, k_BLKH, v_BLKH, *more_BL)
