"""Kernels of attention for GPUs, without one: Triton's interpreted, cuDNN's by what it is asked for; who takes what."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from models import attention, gpu_attention
from models.attention import BACKENDS, Scores, Where, attend, choose
from models.decoder import Compute, abstract_params, hidden_states
from models.families import decoder_config
from models.gpu_attention import cudnn, gpu_refuses, triton
from models.sharding import compiled_for, make_mesh
from tests.models.test_kernels import BRANCHES, GROUPS, KINDS, PACKED, QKV, SEEN, SEGMENTS, asked, check, found
from tests.models.test_kernels import every_pair as by_every_pair

B, L, N, K = 2, 150, 4, 2
MESHES: dict[str, Any] = {
    "one device": None,
    "more heads' devices than key heads": {"fsdp": 2, "tensor": 4},
    "rows that devices do not divide": {"data": 4, "tensor": 2},
}
# Rows of one document of 110 and of 150 tokens.
ONE = jnp.asarray(np.arange(L) < np.array([[110], [150]]), jnp.int32)
ALONE = PACKED._replace(q_segments_BL=ONE, k_segments_BS=ONE)


@pytest.mark.parametrize("mesh", MESHES)
def test_the_triton_kernel_is_attention_of_packed_rows(mesh: str) -> None:
    mine = found(lambda q, k, v, _: triton(q, k, v, SEGMENTS, scale=0.3), MESHES[mesh], sinks=False)
    check(mine, by_every_pair(KINDS["packed"]))


@pytest.mark.parametrize("shape", [(2, 64, 2, 1, 24), (1, 129, 6, 2, 80)], ids=str)
def test_the_triton_kernel_takes_heads_and_rows_of_any_width_and_length(shape: tuple[int, ...]) -> None:
    rows, length, heads, key_heads, width = shape
    rng = np.random.default_rng(length)
    qkv = [jnp.asarray(rng.normal(size=(rows, length, n, width)), jnp.float32) for n in (heads, key_heads, key_heads)]
    places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    segments = 1 + places // 23
    where = Where(places, places, segments, segments)

    def gradients(attended: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda *qkv: jnp.square(attended(*qkv)).sum(), argnums=(0, 1, 2)))(*qkv)

    mine = gradients(lambda q, k, v: triton(q, k, v, segments, scale=0.1))
    check(mine, gradients(lambda q, k, v: attention._products(q, k, v, None, where, Scores(0.1, None, None))))


@pytest.mark.parametrize(
    ("mesh", "window"), [*((mesh, 50) for mesh in MESHES), ("one device", None), ("one device", 1000)]
)
def test_what_cudnn_is_asked_for_is_attention_of_the_real_tokens_of_rows_of_one_document(
    mesh: str, window: int | None
) -> None:
    mine = _real_tokens(lambda q, k, v: cudnn(q, k, v, scale=0.3, window=window, implementation="xla"), MESHES[mesh])
    theirs = _real_tokens(lambda *qkv: attention._products(*qkv, None, ALONE, Scores(0.3, window, None)), None)
    check(mine, theirs)


def _real_tokens(attended: Any, sizes: Any) -> Any:
    """What real tokens attend to, and the gradients of a loss of these alone; padding's must be finite numbers."""
    real = ONE[:, :, None, None] > 0

    def loss(*qkv: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        out = attended(*qkv)
        kept = jnp.where(real, out, 0)
        return jnp.square(kept).sum(), (kept, jnp.isfinite(out).all())

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    if sizes is None:
        grads, (kept, finite) = run(*QKV)
    else:
        with jax.set_mesh(make_mesh(sizes)):
            grads, (kept, finite) = run(*QKV)
    assert finite
    for grad in grads:
        assert not np.asarray(grad)[0, 110:].any()
    return grads, kept


@pytest.mark.parametrize(("width", "dtype"), [(64, "bfloat16"), (80, "float16"), (256, "bfloat16"), (128, "float32")])
def test_the_triton_kernel_compiles_to_triton_for_gpus(dtype: str, width: int) -> None:
    q = jax.ShapeDtypeStruct((B, L, N, width), dtype)
    k = jax.ShapeDtypeStruct((B, L, K, width), dtype)
    allowed = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q, k, v, where=PACKED, scale=0.3, reach=L).astype(jnp.float32).sum()

    with compiled_for("gpu"):
        forward = export.export(jax.jit(loss), platforms=["cuda"], disabled_checks=allowed)(q, k, k)
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        backward = export.export(gradient, platforms=["cuda"], disabled_checks=allowed)(q, k, k)
    assert forward.mlir_module().count("xla.gpu.triton") == 1
    assert backward.mlir_module().count("xla.gpu.triton") == 3  # forward, and two kernels backward


def test_cudnn_says_that_it_is_not_there() -> None:
    rows = [jnp.zeros((1, 16, 2, 64), jnp.bfloat16)] * 3
    with compiled_for("gpu"), pytest.raises(RuntimeError, match="cuDNN is not detected"):
        attend(*rows, where=_places(1, 16), scale=1.0, reach=16, packed=False)


def _places(rows: int, length: int) -> Where:
    places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    return Where(places, places, jnp.ones_like(places), jnp.ones_like(places))


def test_the_decoder_says_whether_rows_are_packed() -> None:
    fields = {"model_type": "llama", "vocab_size": 8, "hidden_size": 16, "intermediate_size": 16, "rms_norm_eps": 1e-5}
    fields |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_act": "silu"}
    config = decoder_config(fields)
    rows = dict.fromkeys(("tokens_BL", "positions_BL", "segments_BL"), jax.ShapeDtypeStruct((2, 16), jnp.int32))
    params = abstract_params(config, dtype=jnp.float32)

    def traced(packed: bool) -> Any:
        compute = Compute(dtype=jnp.bfloat16, packed=packed)
        return jax.eval_shape(
            lambda params, **rows: hidden_states(params, config, **rows, compute=compute), params, **rows
        )

    with compiled_for("gpu"):
        assert traced(packed=True).shape == (2, 16, 16)
        with pytest.raises(RuntimeError, match="cuDNN is not detected"):
            traced(packed=False)


ALONE_IN_ROWS = {"where": ALONE, "packed": False}
WINDOW = Scores(0.3, 50, None)
CAP = Scores(0.3, None, 5.0)
BRANCHED = PACKED._replace(q_branches_BL=BRANCHES, k_branches_BS=BRANCHES)
BOTH_WAYS = PACKED._replace(q_groups_BL=GROUPS, k_groups_BS=GROUPS)
BRANCHES_LEFT, PICTURES_LEFT = "rows with branches", "looks at pictures"
ELSEWHERE = "queries and keys in different places, or that see both ways"
# What is asked for, and why cudnn and triton leave it, if they do
LEFT: dict[str, tuple[dict[str, Any], str | None, str | None]] = {
    "packed rows": ({}, "rows of several documents", None),
    "rows of one document": (ALONE_IN_ROWS, None, None),
    "with a window": (ALONE_IN_ROWS | {"scores": WINDOW, "reach": 50}, None, "a window"),
    "with a window no shorter than rows": (ALONE_IN_ROWS | {"scores": Scores(0.3, L, None)}, None, None),
    "packed, with a window": ({"scores": WINDOW, "reach": 50}, "rows of several documents", "a window"),
    "short documents in rows": ({"reach": 40}, "rows of several documents", None),
    "capped scores": (ALONE_IN_ROWS | {"scores": CAP}, "capped scores", "capped scores"),
    "sinks": (ALONE_IN_ROWS | {"sinks": True}, "sinks", "sinks"),
    "float32": (ALONE_IN_ROWS | {"dtype": jnp.dtype("float32")}, "float32", None),
    "float16": (ALONE_IN_ROWS | {"dtype": jnp.dtype("float16")}, None, None),
    "wide heads": (ALONE_IN_ROWS | {"shape": (B, L, N, 256)}, "heads of width 256", None),
    "wider heads": (ALONE_IN_ROWS | {"shape": (B, L, N, 320)}, "heads of width 320", "heads of 640 bytes a token"),
    "heads of 100": (ALONE_IN_ROWS | {"shape": (B, L, N, 100)}, "heads of width 100", None),
    "tokens split over devices": (
        ALONE_IN_ROWS | {"context": 2},
        "rows whose tokens are split over devices",
        "rows whose tokens are split over devices",
    ),
    "branches": ({"where": BRANCHED}, BRANCHES_LEFT, BRANCHES_LEFT),
    "both ways": ({"where": BOTH_WAYS, "reach": None}, ELSEWHERE, ELSEWHERE),
    "keys in a cache": (ALONE_IN_ROWS | {"reach": None}, ELSEWHERE, ELSEWHERE),
    "pictures": ({"where": SEEN, "reach": None}, PICTURES_LEFT, PICTURES_LEFT),
}


@pytest.mark.parametrize("kind", LEFT)
def test_each_kernel_for_gpus_says_what_it_leaves_and_the_next_one_takes_it(kind: str) -> None:
    changes, by_cudnn, by_triton = LEFT[kind]
    what = asked(**changes)
    assert (BACKENDS["cudnn"].leaves(what), BACKENDS["triton"].leaves(what)) == (by_cudnn, by_triton)
    taken = "xla" if by_triton and by_cudnn else "triton" if by_cudnn else "cudnn"
    with compiled_for("gpu"):
        assert choose("auto", what) == choose("cudnn", what) == taken
        assert choose("triton", what) == ("xla" if by_triton else "triton")
        assert choose("xla", what) == "xla"


def test_what_is_left_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    attention._leave.cache_clear()
    with compiled_for("gpu"), caplog.at_level(logging.INFO, "models.attention"):
        for _ in range(2):
            choose("auto", asked(scores=WINDOW))
    said = [record.getMessage() for record in caplog.records if "instead" in record.getMessage()]
    assert said == ["attention: xla instead of cudnn for rows of several documents, of triton for a window"]


def test_the_first_backend_that_runs_is_picked_and_a_named_one_that_cannot_is_an_error() -> None:
    assert list(BACKENDS) == ["splash", "cudnn", "triton", "xla"]
    picked = {platform: attention.pick("auto", platform) for platform in ("tpu", "gpu", "cpu")}
    assert picked == {"tpu": "splash", "gpu": "cudnn", "cpu": "xla"}
    for name in ("cudnn", "triton"):
        for platform in ("cpu", "tpu"):
            with pytest.raises(ValueError, match=f"'{name}' cannot run on {platform}: a kernel for NVIDIA's GPUs"):
                attention.pick(name, platform)


@pytest.mark.parametrize(
    ("version", "capability", "reason"),
    [
        ("PJRT C API\ncuda 12080", "9.0", None),
        ("PJRT C API\ncuda 12080", "12.0", None),
        ("PJRT C API\ncuda 12080", "7.5", "compute capability 7.5, and 8.0 is needed"),
        ("PJRT C API\nrocm 60200", "gfx942", "a kernel for NVIDIA's GPUs"),
    ],
)
def test_gpus_that_have_no_such_kernel_go_without(
    version: str, capability: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Device:
        compute_capability = capability
        platform_version = version

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(), Device()])
    monkeypatch.setattr(gpu_attention, "get_backend", Device)
    assert gpu_refuses.__wrapped__("gpu") == reason
