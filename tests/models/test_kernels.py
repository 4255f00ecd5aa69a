"""Attention by TPU's kernel and by blocks of keys is attention: values and gradients, on meshes too."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import attention, blockwise
from models.attention import Asked, Scores, Seen, Where, attend
from models.sharding import make_mesh
from models.splash import splash

B, L, N, K, H = 2, 150, 4, 2, 16
MESHES: dict[str, Any] = {
    "one device": None,
    "more heads' devices than key heads": {"fsdp": 2, "tensor": 4},
    "queries on other devices": {"data": 2, "tensor": 2, "context": 2},
    "rows that devices do not divide": {"fsdp": 4, "context": 2},
}
RNG = np.random.default_rng(0)
QKV = tuple(jnp.asarray(RNG.normal(size=(B, L, heads, H)), jnp.float32) for heads in (N, K, K))
SINKS = jnp.linspace(-1.0, 1.0, N)
SEGMENTS = jnp.asarray(np.sort(RNG.integers(0, 4, (B, L)), axis=1), jnp.int32)
PLACES = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L))
PACKED = Where(PLACES, PLACES, SEGMENTS, SEGMENTS)
BRANCHES = jnp.asarray(RNG.integers(0, 3, (B, L)), jnp.int32)
GROUPS = jnp.asarray(RNG.integers(0, 3, (B, L)) * (RNG.random((B, L)) > 0.8), jnp.int32)
NOTHING = jnp.zeros((B, L), jnp.int32)
SEEN = Seen(NOTHING, NOTHING, NOTHING > 0, NOTHING, NOTHING > 0)

# What `where` is, window, cap, sinks, reach
KINDS: dict[str, tuple[Where, int | None, float | None, bool, int | None]] = {
    "packed": (PACKED, None, None, False, L),
    "a window": (PACKED, 50, None, False, 50),
    "a cap": (PACKED, None, 5.0, False, L),
    "sinks": (PACKED, None, None, True, L),
}
MORE = {
    "branches and a window": (PACKED._replace(q_branches_BL=BRANCHES, k_branches_BS=BRANCHES), 20, None, False, L),
    "groups that see both ways": (PACKED._replace(q_groups_BL=GROUPS, k_groups_BS=GROUPS), None, None, True, None),
}
ON_MESHES = [("sinks", mesh) for mesh in MESHES if mesh != "one device"]


def found(attended: Any, sizes: Any, *, sinks: bool) -> Any:
    """A loss of what is attended to, and all gradients."""

    def loss(q, k, v, sinks_N):
        return jnp.square(attended(q, k, v, sinks_N if sinks else None)).sum()

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3) if sinks else (0, 1, 2)))
    if sizes is None:
        return run(*QKV, SINKS)
    with jax.set_mesh(make_mesh(sizes)):
        return run(*QKV, SINKS)


def check(mine: Any, theirs: Any) -> None:
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6 * float(jnp.abs(b).max()))


def every_pair(kind: tuple) -> Any:
    where, window, cap, sinks, _ = kind
    return found(lambda q, k, v, s: attention._products(q, k, v, s, where, Scores(0.3, window, cap)), None, sinks=sinks)


@pytest.mark.parametrize(("kind", "mesh"), [*((kind, "one device") for kind in KINDS), *ON_MESHES])
def test_the_kernel_for_tpus_is_attention(kind: str, mesh: str) -> None:
    _, _, cap, sinks, reach = KINDS[kind]
    mine = found(
        lambda q, k, v, s: splash(q, k, v, SEGMENTS, s, scale=0.3, softcap=cap, reach=reach or L),
        MESHES[mesh],
        sinks=sinks,
    )
    check(mine, every_pair(KINDS[kind]))


@pytest.mark.parametrize(("kind", "mesh"), [*((kind, "one device") for kind in KINDS | MORE), *ON_MESHES])
def test_attention_by_blocks_of_keys_is_attention(kind: str, mesh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "BLOCK", 16)
    where, window, cap, sinks, reach = asked = (KINDS | MORE)[kind]
    mine = found(
        lambda q, k, v, s: blockwise.blockwise(q, k, v, s, where=where, scores=Scores(0.3, window, cap), reach=reach),
        MESHES[mesh],
        sinks=sinks,
    )
    check(mine, every_pair(asked))


def temporaries(length: int) -> int:
    x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    places = jnp.arange(length, dtype=jnp.int32)[None]
    where = Where(places, places, jnp.ones_like(places), jnp.ones_like(places))

    def loss(q, k, v):
        return attend(q, k, v, where=where, scale=1.0, reach=length).sum()

    memory = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile().memory_analysis()
    return memory.temp_size_in_bytes


def test_memory_grows_with_the_length_of_a_row_and_not_with_its_square() -> None:
    assert temporaries(65_536) < 2.2 * temporaries(32_768)


def test_long_rows_go_by_blocks_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(attention, "blockwise", lambda q, *_, **more: calls.append(more["reach"]) or q)
    attend(*QKV, where=PACKED, scale=1.0, reach=64)
    assert calls == []
    monkeypatch.setattr(attention, "MOST_BLOCKS", 4)
    monkeypatch.setattr(attention, "BLOCK", 32)
    attend(*QKV, where=PACKED, scale=1.0, reach=64)
    assert calls == [64]


def asked(**changes: Any) -> Asked:
    """Plain attention of rows of several documents, but for the changes."""
    plain = Asked(
        PACKED, Scores(0.3, None, None), L, packed=True, sinks=False, shape=(B, L, N, 64), dtype=jnp.dtype("bfloat16")
    )
    return plain._replace(**changes)


def test_a_tpu_takes_the_kernel_for_text_and_leaves_the_rest() -> None:
    kernel = attention.BACKENDS["splash"]
    assert attention.pick("auto", "tpu") == "splash"
    assert kernel.leaves(asked()) is None
    assert kernel.leaves(asked(where=MORE["branches and a window"][0])) == "rows with branches"
    assert "both ways" in str(kernel.leaves(asked(where=MORE["groups that see both ways"][0], reach=None)))
    assert kernel.leaves(asked(where=SEEN, reach=None)) == "looks at pictures"
    with pytest.raises(
        ValueError, match=r"'splash' cannot run on cpu: a kernel for TPUs \(model.attn_implementation\)"
    ):
        attention.pick("splash", "cpu")
