"""Causal attention by JAX's splash kernel for TPUs: memory grows with the length of a row, and blocks of keys that no
query of a block sees are left out.

B rows, L positions, N query heads, K key heads, H head width. Segments, a window and a cap of the scores are the
kernel's; rows are made up to whole blocks. On a mesh each device computes its own rows and heads, and with `context`
its own queries, for which it has all keys.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from models.sharding import platform, split_heads

LANES = 128  # what a block's length is a multiple of
BLOCK = 512  # queries, and keys, that are computed together, at most


def splash(
    q_BLNH: jax.Array,
    k_BLKH: jax.Array,
    v_BLKH: jax.Array,
    segments_BL: jax.Array,
    sinks_N: jax.Array | None,
    *,
    scale: float,
    softcap: float | None,
    reach: int,
) -> jax.Array:
    """Attention [B, L, N, H] of each query to those keys of its own segment that stand at most `reach` - 1 before it.

    Elsewhere than on a TPU the kernel is interpreted, slowly.
    """
    mesh = jax.sharding.get_abstract_mesh()
    L, N = q_BLNH.shape[1:3]
    shards = 1 if mesh.empty else mesh.shape["context"]
    more = -L % (LANES * shards)
    pad = functools.partial(jnp.pad, pad_width=[(0, 0), (0, more), (0, 0), (0, 0)])
    segments_BL = jnp.pad(segments_BL, [(0, 0), (0, more)])
    q_BLNH, k_BLKH, v_BLKH = pad(q_BLNH * jnp.asarray(scale, q_BLNH.dtype)), pad(k_BLKH), pad(v_BLKH)
    if mesh.empty or mesh.size == 1:
        run = _kernel(N, L + more, reach, softcap, 1, 1, platform() != "tpu")
        return _rows(run, q_BLNH, k_BLKH, v_BLKH, segments_BL, segments_BL, sinks_N)[:, :L]

    k_BLKH, v_BLKH, q_spec, k_spec = split_heads(q_BLNH, k_BLKH, v_BLKH)
    over = q_spec[2]
    heads = mesh.shape["tensor"] if over else 1
    run = _kernel(N, L + more, reach, softcap, heads, shards, platform() != "tpu")
    out_BLNH = jax.shard_map(
        _rows,
        in_specs=(
            run.manual_sharding_spec(jax.sharding.NamedSharding(mesh, P(over, "context" if shards > 1 else None))),
            q_spec,
            k_spec,
            k_spec,
            P(*q_spec[:2]),
            P(*k_spec[:2]),
            None if sinks_N is None else P(over),
        ),
        out_specs=q_spec,
        check_vma=False,  # the kernel does not say along which axes its results differ
    )(run, q_BLNH, k_BLKH, v_BLKH, segments_BL, segments_BL, sinks_N)
    return out_BLNH[:, :L]


def _rows(
    run: Any,
    q_BLNH: jax.Array,
    k_BLKH: jax.Array,
    v_BLKH: jax.Array,
    q_segments_BL: jax.Array,
    k_segments_BL: jax.Array,
    sinks_N: jax.Array | None,
) -> jax.Array:
    """The kernel, row by row."""
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    def row(q_NLH, k_KLH, v_KLH, q_segments_L, k_segments_L):
        return run(q_NLH, k_KLH, v_KLH, SegmentIds(q_segments_L, k_segments_L), sinks_N)

    q_BNLH, k_BKLH, v_BKLH = (x.transpose(0, 2, 1, 3) for x in (q_BLNH, k_BLKH, v_BLKH))
    return jax.vmap(row)(q_BNLH, k_BKLH, v_BKLH, q_segments_BL, k_segments_BL).transpose(0, 2, 1, 3)


@functools.cache
def _kernel(
    heads: int, length: int, reach: int, softcap: float | None, head_shards: int, shards: int, interpret: bool
) -> Any:
    """The kernel for a row of this length, with its table of which blocks there are to compute."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as tables

    shape = (length, length)
    if reach >= length:
        mask: Any = masks.CausalMask(shape, shard_count=shards)
    else:
        mask = masks.LocalMask(shape, window_size=(reach - 1, 0), offset=0, shard_count=shards)
    block = math.gcd(length // shards, BLOCK)
    asked = (masks.MultiHeadMask([mask] * heads), (block, block))
    queries, inside = tables.process_mask(*asked, head_shards=head_shards, q_seq_shards=shards)
    keys, _ = tables.process_mask_dkv(*asked, head_shards=head_shards, q_seq_shards=shards)
    # What `make_splash_mha` does too; but its tables are made on a device, and there may be none, only a plan's.
    return kernels.SplashAttentionKernel(
        queries,
        queries,
        keys,
        block_sizes=kernels.BlockSizes(*(block,) * 8),
        is_mqa=False,
        save_residuals=False,
        mask_value=kernels.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=None,
        mask_function=inside,
        interpret=interpret,
    )
