"""Before a run: the kernel of attention that it will use, held to plain XLA on the device at hand, on a small block of
made-up rows.

B rows, L tokens, N query heads, K key heads, H head width.
"""

import functools
import logging
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from models.attention import Asked, Scores, Where, attend, choose
from models.config import Compute, DecoderConfig

log = logging.getLogger("einkorn")

LENGTH = 256  # plain XLA computes as many queries at once, with all their keys
WINDOW = 96  # no whole number of any kernel's blocks
PACKED = ((100, 1, 91), (129, 127))  # lengths of each row's documents
ALONE = ((200,), (256,))
QUERIES, KEYS = 4, 2  # query heads of a key head, and key heads, at most
ROUNDINGS = 3  # a kernel may round scaled queries, weights before they are divided by their sum, and results
MEND = "set model.attn_implementation: xla"
NAMES = ("output", "gradient of queries", "gradient of keys", "gradient of values")


class Block(NamedTuple):
    """Queries, keys, values and what gradients come from, all of the compute dtype; where they stand; sinks."""

    q_BLNH: Any
    k_BLKH: Any
    v_BLKH: Any
    d_out_BLNH: Any
    where: Where
    sinks_N: Any


def check_attention(config: DecoderConfig, compute: Compute, *, mesh: Mesh, length: int) -> None:
    """ValueError where a kernel that rows of so many tokens take on this mesh is further from attention in float32
    than its roundings explain; nothing where that is plain XLA. Each process asks its own first device.
    """
    began, device = time.monotonic(), jax.local_devices()[0]
    worst: dict[str, float] = {}
    for window in dict.fromkeys(layer.window for layer in config.each if not layer.looks):
        scores = Scores(config.attention_scale or config.head_width**-0.5, window, config.attention_softcap)
        block = _block(config, compute, scale=scores.scale)
        reach = min(compute.longest_document or length, window or length)
        shape = (1, length, config.heads, config.head_width)
        dtype, context = jnp.dtype(compute.dtype), mesh.shape["context"]
        asked = Asked(block.where, scores, reach, compute.packed, config.sinks, shape, dtype, context)
        name = choose(compute.attention, asked)
        if name == "xla":
            continue
        short = scores._replace(window=None if window is None or window >= length else min(window, WINDOW))
        share = _share(jax.device_put(block, device), short, name, packed=compute.packed, kind=device.device_kind)
        worst[name] = max(worst.get(name, 0.0), share)
    for name, share in worst.items():
        log.info(
            "attention: %s on %s agrees with plain XLA, off by %.0f %% of what is allowed; checked in %.0f ms",
            *(name, device.device_kind, 100 * share, 1000 * (time.monotonic() - began)),
        )


def _block(config: DecoderConfig, compute: Compute, *, scale: float) -> Block:
    """Rows of the run's kind, of random numbers, whose scores have a variance of one; padding has no gradient."""
    K, H = min(config.kv_heads, KEYS), config.head_width
    N = K * min(config.heads // config.kv_heads, QUERIES)
    places: list[Any] = [np.zeros((len(PACKED), LENGTH), np.int32) for _ in range(2)]
    positions, segments = places
    for row, documents in enumerate(PACKED if compute.packed else ALONE):
        start = 0
        for number, length in enumerate(documents, 1):
            positions[row, start : start + length] = np.arange(length)
            segments[row, start : start + length] = number
            start += length
    rng = np.random.default_rng(0)
    normal = [rng.normal(size=(*segments.shape, heads, H)) for heads in (N, K, K, N)]
    normal[0] /= scale * H**0.5
    normal[3][segments == 0] = 0
    q, k, v, d_out = (x.astype(compute.dtype) for x in normal)
    sinks = np.linspace(-1, 1, N, dtype=np.float32) if config.sinks else None
    return Block(q, k, v, d_out, Where(positions, positions, segments, segments), sinks)


def _share(block: Block, scores: Scores, name: str, *, packed: bool, kind: str) -> float:
    """How much of the allowed error a backend makes; ValueError for more than all of it.

    Both the backend and plain XLA in the compute dtype are held to plain XLA in float32. XLA's error is that of one
    rounding or more; a kernel may make ROUNDINGS times as much, one rounding of the largest number, and the error of
    sums of LENGTH and of H float32 numbers in any order (N. Higham, Accuracy and Stability of Numerical Algorithms,
    §4.2).
    """
    run = functools.partial(_results, scores=scores, packed=packed)
    wide = block._replace(**{field: getattr(block, field).astype(jnp.float32) for field in Block._fields[:4]})
    with jax.default_matmul_precision("highest"):
        exact = run(wide, name="xla")
    plain = run(block, name="xla")
    try:
        mine = run(block, name=name)
    except (RuntimeError, TypeError, ValueError) as failed:
        said = str(failed).strip().splitlines() or [type(failed).__name__]
        raise ValueError(f"attention backend {name!r} cannot run on {kind}: {said[0]}; {MEND}") from failed
    dtype, width = block.q_BLNH.dtype, block.q_BLNH.shape[-1]
    rounding = float(jnp.finfo(dtype).eps) / 2 + (LENGTH + width) * float(jnp.finfo(jnp.float32).eps)
    share = 0.0
    for what, x, own, found in zip(NAMES, exact, plain, mine, strict=True):
        error, least = _error(found, x), _error(own, x)
        allowed = ROUNDINGS * least + rounding
        if not error <= allowed:
            raise ValueError(
                f"attention backend {name!r} is wrong on {kind}: the {what} is off by {error:.2g} of its largest value"
                f" in {dtype}, and {allowed:.2g} is allowed (plain XLA: {least:.2g}); {MEND}"
            )
        share = max(share, error / allowed)
    return share


def _error(found: np.ndarray, exact: np.ndarray) -> float:
    """The largest difference, as a part of the largest value."""
    return float(np.abs(found - exact).max() / np.abs(exact).max())


def _results(block: Block, *, scores: Scores, packed: bool, name: str) -> list[np.ndarray]:
    """What real tokens attend to, and the gradients of queries, keys and values, float32."""

    def loss(q_BLNH: jax.Array, k_BLKH: jax.Array, v_BLKH: jax.Array) -> tuple[jax.Array, jax.Array]:
        out_BLNH = attend(
            q_BLNH,
            k_BLKH,
            v_BLKH,
            where=block.where,
            sinks_N=block.sinks_N,
            reach=max(max(row) for row in (PACKED if packed else ALONE)),
            packed=packed,
            backend=name,
            **scores._asdict(),
        ).astype(jnp.float32)
        real_BL11 = block.where.q_segments_BL[:, :, None, None] > 0
        out_BLNH = jnp.where(real_BL11, out_BLNH, 0)
        return (out_BLNH * block.d_out_BLNH.astype(jnp.float32)).sum(), out_BLNH

    grads, out_BLNH = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*block[:3])
    return [np.asarray(x, np.float32) for x in (out_BLNH, *grads)]
