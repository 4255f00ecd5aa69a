"""Attention: one signature, an ordered list of backends, each of which says why it cannot run.

B rows, L queries, S keys, N query heads, K key heads, G = N / K query heads for each key head, H head width. A query
sees a key of the same segment at the same or an earlier position. Every packed document is its own segment, so
documents in a row do not see one another; positions restart in each. A document may part into branches, several ways
to go on after the same beginning: a branch sees the beginning (branch 0) and itself.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.blockwise import MASKED, blockwise
from models.gpu_attention import WIDEST, cudnn, gpu_refuses, triton
from models.sharding import platform
from models.splash import splash

log = logging.getLogger(__name__)

BLOCK = 128  # queries that are computed together, at least
MOST_BLOCKS = 32  # of a row: each is compiled by itself
WHOLE = 1 << 22  # scores of a head that are computed at once where every key may be in reach


class Where(NamedTuple):
    """Where queries and keys stand: int32 positions and segment ids of queries [B, L] and of keys [B, S], their
    branches, where documents have any, groups that see one another both ways (0: none), such as a picture's tokens, and
    the squares that patches are in: there a window is one's own square, whose patches stand together.
    """

    q_positions_BL: jax.Array
    k_positions_BS: jax.Array
    q_segments_BL: jax.Array
    k_segments_BS: jax.Array
    q_branches_BL: jax.Array | None = None
    k_branches_BS: jax.Array | None = None
    q_groups_BL: jax.Array | None = None
    k_groups_BS: jax.Array | None = None
    q_squares_BL: jax.Array | None = None
    k_squares_BS: jax.Array | None = None

    @property
    def branched(self) -> bool:
        """Whether documents part into branches: positions are then no distances within the row."""
        return self.q_branches_BL is not None

    def around(self, window: int | None) -> int | None:
        """How far before and behind a query its keys are, where that is known: in its square."""
        return None if self.q_squares_BL is None or window is None else window**2

    def part(self, queries: slice, keys: slice) -> "Where":
        """Where these queries and these keys stand."""
        cuts = (queries, keys) * 5
        return Where._make(None if x is None else x[:, cut] for x, cut in zip(self, cuts, strict=True))

    def visible_BLS(self, window: int | None) -> jax.Array:
        """True where a query may look at a key: itself and those before it, `window` in all."""
        same = self.q_segments_BL[:, :, None] == self.k_segments_BS[:, None, :]
        back_BLS = self.q_positions_BL[:, :, None] - self.k_positions_BS[:, None, :]
        before_BLS = back_BLS >= 0
        if self.q_groups_BL is not None and self.k_groups_BS is not None:
            alike_BLS = self.q_groups_BL[:, :, None] == self.k_groups_BS[:, None, :]
            before_BLS |= alike_BLS & (self.q_groups_BL > 0)[:, :, None]
        visible = same & before_BLS
        if self.q_branches_BL is not None and self.k_branches_BS is not None:
            shared_BLS = self.k_branches_BS[:, None, :] == 0
            visible &= shared_BLS | (self.q_branches_BL[:, :, None] == self.k_branches_BS[:, None, :])
        if window is None:
            return visible
        if self.q_squares_BL is not None and self.k_squares_BS is not None:
            return visible & (self.q_squares_BL[:, :, None] == self.k_squares_BS[:, None, :])
        return visible & (back_BLS < window)


class Seen(NamedTuple):
    """Which features of pictures text sees, in the place of a `Where`: the first and the last picture that a query sees
    (0: none) [B, L], whether it stands before them and sees all there is of them, the picture of each feature (0: none)
    [B, S], and whether that is of a tile with something in it.
    """

    first_BL: jax.Array
    last_BL: jax.Array
    before_BL: jax.Array
    pictures_BS: jax.Array
    filled_BS: jax.Array

    @property
    def q_groups_BL(self) -> None:
        """There are none."""

    @property
    def branched(self) -> bool:
        """Features are no documents."""
        return False

    def around(self, window: int | None) -> None:
        """Nothing is known."""

    def part(self, queries: slice, keys: slice) -> "Seen":
        """What these queries see of these features."""
        return Seen(*(x[:, queries] for x in self[:3]), *(x[:, keys] for x in self[3:]))

    def visible_BLS(self, window: int | None) -> jax.Array:
        """True where a query sees a feature."""
        pictures_BLS = self.pictures_BS[:, None, :]
        seen = (self.first_BL[:, :, None] <= pictures_BLS) & (pictures_BLS <= self.last_BL[:, :, None])
        return seen & (pictures_BLS > 0) & (self.filled_BS[:, None, :] | self.before_BL[:, :, None])


class Scores(NamedTuple):
    """How queries and keys become scores; static."""

    scale: float
    window: int | None
    softcap: float | None


class Asked(NamedTuple):
    """What kind of attention is asked for: as `attend` is given it; the queries' shape (B, L, N, H) and dtype; among
    how many devices a row's tokens are split.
    """

    where: Where | Seen
    scores: Scores
    reach: int | None
    packed: bool
    sinks: bool
    shape: tuple[int, ...]
    dtype: Any
    context: int = 1


class Backend(NamedTuple):
    """One way to compute attention. `refuses(platform)` is the reason it cannot run there, or None; `leaves(asked)`
    what kind of attention it leaves to those behind it, of which "xla", the last, computes every kind, or None.
    """

    refuses: Callable[[str], str | None]
    leaves: Callable[[Asked], str | None]
    attend: Callable[..., jax.Array]


def attend(
    q_BLNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    where: Where | Seen,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_N: jax.Array | None = None,
    reach: int | None = None,
    packed: bool = True,
    backend: str = "auto",
) -> jax.Array:
    """Softmax attention [B, L, N, H] of each query over the keys that `where` lets it see; scores and softmax in
    float32.

    `window`: a query sees so many keys at most, its own included. `softcap` c turns scores s into c tanh(s / c)
    (arXiv:2408.00118, §2). `sinks_N` is for each head the score of attending to nothing. `reach` promises that S = L,
    that query i sees no key after i, and none before i - reach + 1: products with keys out of reach are then left out.
    Not `packed` promises that a row is one document from its first place on, and what is behind it padding: attention
    of padding may then be any finite numbers. `backend` is a name of BACKENDS, or "auto" for the first that runs on
    this platform; what it leaves goes to the next that takes it. A named backend that cannot run is a ValueError.
    """
    scores = Scores(scale, window, softcap)
    if where.q_groups_BL is not None:
        reach = None  # a key may stand after its query
    elif reach is not None and window is not None and not where.branched:
        reach = min(reach, window)
    mesh = jax.sharding.get_abstract_mesh()
    context = 1 if mesh.empty else mesh.shape["context"]
    asked = Asked(where, scores, reach, packed, sinks_N is not None, q_BLNH.shape, q_BLNH.dtype, context)
    chosen = BACKENDS[choose(backend, asked)]
    return chosen.attend(q_BLNH, k_BSKH, v_BSKH, sinks_N, where=where, scores=scores, reach=reach)


def choose(name: str, asked: Asked) -> str:
    """The backend that computes what is asked for: the one picked by `name`, or the next one that takes what it
    leaves.
    """
    here = platform()
    left: dict[str, str] = {}
    names = list(BACKENDS)
    for candidate in names[names.index(pick(name, here)) :]:
        backend = BACKENDS[candidate]
        if backend.refuses(here) is not None:
            continue
        if (kind := backend.leaves(asked)) is None:
            if left:
                _leave(candidate, tuple(left.items()))
            return candidate
        left[candidate] = kind
    raise ValueError(f"no attention backend on {here} takes this: {left}")


@functools.cache
def _leave(name: str, left: tuple[tuple[str, str], ...]) -> None:
    """Say, once, what is computed otherwise."""
    reasons = ", ".join(f"of {other} for {kind}" for other, kind in left)
    log.info("attention: %s instead %s", name, reasons)


@functools.cache
def pick(name: str, platform: str) -> str:
    """The backend to use; the choice of "auto" is logged once, with the reasons against those before it."""
    if name != "auto":
        if name not in BACKENDS:
            raise ValueError(
                f"attention backend {name!r} is not one of auto, {', '.join(BACKENDS)} (model.attn_implementation)"
            )
        if reason := BACKENDS[name].refuses(platform):
            raise ValueError(
                f"attention backend {name!r} cannot run on {platform}: {reason} (model.attn_implementation)"
            )
        return name
    refused: dict[str, str] = {}
    for candidate, backend in BACKENDS.items():
        if (reason := backend.refuses(platform)) is None:
            log.info("attention: %s on %s%s", candidate, platform, f" (not {refused})" if refused else "")
            return candidate
        refused[candidate] = reason
    raise ValueError(f"no attention backend runs on {platform}: {refused}")


def _xla(
    q_BLNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    sinks_N: jax.Array | None,
    *,
    where: Where | Seen,
    scores: Scores,
    reach: int | None,
) -> jax.Array:
    """Plain XLA, a block of queries at a time with the keys in its reach; of long rows by blocks of keys too, so that
    memory grows with L, not with its square.
    """
    L, S = q_BLNH.shape[1], k_BSKH.shape[1]
    block = max(BLOCK, -(-L // MOST_BLOCKS))
    mesh = jax.sharding.get_abstract_mesh()
    around = where.around(scores.window)
    few = 2 * block >= L or (reach is None and around is None and L * S <= WHOLE)
    apart = not mesh.empty and mesh.shape["context"] > 1
    if not few and L == S and around is None and isinstance(where, Where) and (apart or L > BLOCK * MOST_BLOCKS):
        return blockwise(q_BLNH, k_BSKH, v_BSKH, sinks_N, where=where, scores=scores, reach=reach)
    if few or apart:
        return _products(q_BLNH, k_BSKH, v_BSKH, sinks_N, where, scores)
    products = jax.checkpoint(_products, static_argnums=5)
    out = []
    for start in range(0, L, block):
        queries = slice(start, start + block)
        keys = slice(0, S) if reach is None else slice(max(0, start - reach + 1), start + block)
        if around is not None:
            keys = slice(max(0, start - around + 1), start + block + around - 1)
        near = where.part(queries, keys)
        out.append(products(q_BLNH[:, queries], k_BSKH[:, keys], v_BSKH[:, keys], sinks_N, near, scores))
    return jnp.concatenate(out, axis=1)


def _products(
    q_BLNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    sinks_N: jax.Array | None,
    where: Where | Seen,
    scores: Scores,
) -> jax.Array:
    """All queries by all keys. The G query heads of a key head are folded into its queries (Q = G L): few large
    products instead of many small ones.
    """
    B, L, N, H = q_BLNH.shape
    K = k_BSKH.shape[2]
    G = N // K
    q_BKQH = q_BLNH.reshape(B, L, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * L, H)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    scores_BKQS = _scores(q_BKQH, k_BKSH) * scores.scale
    if scores.softcap is not None:
        scores_BKQS = scores.softcap * jnp.tanh(scores_BKQS / scores.softcap)
    visible_BKQS = jnp.tile(where.visible_BLS(scores.window), (1, G, 1))[:, None, :, :]
    scores_BKQS = jnp.where(visible_BKQS, scores_BKQS, MASKED)
    if sinks_N is None:
        weights_BKQS = jax.nn.softmax(scores_BKQS, axis=-1)
    else:
        sinks_KQ = jnp.repeat(sinks_N.astype(jnp.float32).reshape(K, G), L, axis=1)
        weights_BKQS = _softmax_with_sink(scores_BKQS, sinks_KQ[None, :, :, None])
    out_BKQH = jnp.einsum("bkqs,bksh->bkqh", weights_BKQS.astype(v_BSKH.dtype), v_BKSH)
    return out_BKQH.reshape(B, K, G, L, H).transpose(0, 3, 1, 2, 4).reshape(B, L, N, H)


def _scores(q_BKQH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
    """The product of every query with every key, in float32 [B, K, Q, S]. XLA on CPU reads many keys for few queries
    faster where keys come first; barriers keep it from turning that back.
    """
    if platform() != "cpu" or 16 * q_BKQH.shape[2] > k_BKSH.shape[2]:
        return jnp.einsum("bkqh,bksh->bkqs", q_BKQH, k_BKSH, preferred_element_type=jnp.float32)
    q_BKHQ = jax.lax.optimization_barrier(q_BKQH.swapaxes(2, 3))
    scores_BKSQ = jnp.einsum("bksh,bkhq->bksq", k_BKSH, q_BKHQ, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(scores_BKSQ).swapaxes(2, 3)


def _softmax_with_sink(scores_BKQS: jax.Array, sinks_BKQ1: jax.Array) -> jax.Array:
    """Softmax over keys and one more that has a score and no value (arXiv:2309.17453)."""
    most = jax.lax.stop_gradient(jnp.maximum(scores_BKQS.max(axis=-1, keepdims=True), sinks_BKQ1))
    weights_BKQS = jnp.exp(scores_BKQS - most)
    return weights_BKQS / (weights_BKQS.sum(axis=-1, keepdims=True) + jnp.exp(sinks_BKQ1 - most))


def _splash(
    q_BLNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    sinks_N: jax.Array | None,
    *,
    where: Where,
    scores: Scores,
    reach: int,
) -> jax.Array:
    """JAX's kernel for TPUs; a window is within the reach."""
    segments_BL, scale, softcap = where.q_segments_BL, scores.scale, scores.softcap
    return splash(q_BLNH, k_BSKH, v_BSKH, segments_BL, sinks_N, scale=scale, softcap=softcap, reach=reach)


def _cudnn(
    q_BLNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    sinks_N: None,
    *,
    where: Where,
    scores: Scores,
    reach: int,
) -> jax.Array:
    """cuDNN's kernel; a row is one document."""
    return cudnn(q_BLNH, k_BSKH, v_BSKH, scale=scores.scale, window=scores.window)


def _triton(
    q_BLNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    sinks_N: None,
    *,
    where: Where,
    scores: Scores,
    reach: int,
) -> jax.Array:
    """JAX's Triton kernel; segments are within the reach."""
    return triton(q_BLNH, k_BSKH, v_BSKH, where.q_segments_BL, scale=scores.scale)


def _not_causal(asked: Asked) -> str | None:
    """What kind of attention this is where it is more than that of each token to those of its segment before it."""
    if isinstance(asked.where, Seen):
        return "looks at pictures"
    if asked.where.branched:
        return "rows with branches"
    return "queries and keys in different places, or that see both ways" if asked.reach is None else None


def _not_plain(asked: Asked) -> str | None:
    """What kind of causal attention this is where kernels for GPUs have no way to say it."""
    if (kind := _not_causal(asked)) is not None:
        return kind
    if asked.scores.softcap is not None:
        return "capped scores"
    if asked.sinks:
        return "sinks"
    return "rows whose tokens are split over devices" if asked.context > 1 else None


def _not_for_cudnn(asked: Asked) -> str | None:
    width = asked.shape[-1]
    if (kind := _not_plain(asked)) is not None:
        return kind
    if asked.packed:
        return "rows of several documents"
    if asked.dtype not in (jnp.bfloat16, jnp.float16):
        return jnp.dtype(asked.dtype).name
    return f"heads of width {width}" if width > 128 or width % 8 else None


def _not_for_triton(asked: Asked) -> str | None:
    (_, L, _, width), window = asked.shape, asked.scores.window
    if (kind := _not_plain(asked)) is not None:
        return kind
    if window is not None and window < L:
        return "a window"
    size = width * jnp.dtype(asked.dtype).itemsize
    return f"heads of {size} bytes a token" if size > WIDEST else None


BACKENDS: dict[str, Backend] = {
    "splash": Backend(
        refuses=lambda platform: None if platform == "tpu" else "a kernel for TPUs", leaves=_not_causal, attend=_splash
    ),
    "cudnn": Backend(refuses=gpu_refuses, leaves=_not_for_cudnn, attend=_cudnn),
    "triton": Backend(refuses=gpu_refuses, leaves=_not_for_triton, attend=_triton),
    "xla": Backend(refuses=lambda platform: None, leaves=lambda asked: None, attend=_xla),
}
