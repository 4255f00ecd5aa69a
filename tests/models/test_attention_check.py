"""The check before a run: kernels that are attention pass, others are one line that says what to set."""

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from models import attention_check
from models.attention import BACKENDS, Backend, pick
from models.attention_check import check_attention
from models.config import Compute
from models.families import decoder_config
from models.sharding import make_mesh

LLAMA = {
    "model_type": "llama",
    "vocab_size": 8,
    "intermediate_size": 16,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIG = decoder_config(LLAMA)
WINDOW = replace(CONFIG, each=(CONFIG.each[0]._replace(window=60),))
WINDOWED = replace(CONFIG, each=(CONFIG.each[0]._replace(window=60), CONFIG.each[1]))
BF16 = jnp.dtype("bfloat16")


@pytest.fixture(autouse=True)
def what_was_picked_is_forgotten() -> Iterator[None]:
    """Tests let kernels run where they are interpreted; others must not find that."""
    pick.cache_clear()
    yield
    pick.cache_clear()


def checked(config: Any = CONFIG, *, mesh: dict[str, int] | None = None, length: int = 300, **compute: Any) -> None:
    check_attention(config, Compute(**{"dtype": BF16} | compute), mesh=make_mesh(mesh or {"data": -1}), length=length)


def add(monkeypatch: pytest.MonkeyPatch, name: str, attend: Any, *, like: str = "splash") -> None:
    """A backend of this name before all others, that runs here and leaves what another one leaves."""
    others = dict(BACKENDS)
    mine = Backend(refuses=lambda platform: None, leaves=others[like].leaves, attend=attend)
    for key in others:
        monkeypatch.delitem(BACKENDS, key)
    for key, backend in {name: mine, **others}.items():
        monkeypatch.setitem(BACKENDS, key, backend)


def exactly(q: Any, k: Any, v: Any, sinks: Any, *, where: Any, scores: Any, reach: int) -> Any:
    return BACKENDS["xla"].attend(q, k, v, sinks, where=where, scores=scores, reach=reach)


def one_too_far(q: Any, k: Any, v: Any, sinks: Any, *, where: Any, scores: Any, reach: int) -> Any:
    """A window that is one longer than it should be."""
    longer = scores if scores.window is None else scores._replace(window=scores.window + 1)
    return exactly(q, k, v, sinks, where=where, scores=longer, reach=reach + 1)


def through_documents(q: Any, k: Any, v: Any, sinks: Any, *, where: Any, scores: Any, reach: int) -> Any:
    places = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
    one = jnp.ones_like(places)
    return exactly(
        q,
        k,
        v,
        sinks,
        where=where._replace(q_positions_BL=places, k_positions_BS=places, q_segments_BL=one, k_segments_BS=one),
        scores=scores,
        reach=q.shape[1],
    )


@jax.custom_vjp
def _halved(x: jax.Array) -> jax.Array:
    return x


_halved.defvjp(lambda x: (x, None), lambda _, d: (d / 2,))


def half_the_gradient(q: Any, k: Any, v: Any, sinks: Any, **more: Any) -> Any:
    return exactly(q, _halved(k), v, sinks, **more)


def no_numbers(q: Any, k: Any, v: Any, sinks: Any, **more: Any) -> Any:
    return exactly(q, k, v, sinks, **more) * jnp.nan


def coarse(q: Any, k: Any, v: Any, sinks: Any, **more: Any) -> Any:
    """Results of three bits."""
    return exactly(q, k, v, sinks, **more).astype(jnp.float8_e4m3fn).astype(q.dtype)


BROKEN = {
    "a window one too long": (one_too_far, WINDOWED, "output"),
    "documents that see one another": (through_documents, CONFIG, "output"),
    "half of a gradient": (half_the_gradient, CONFIG, "gradient of keys"),
    "no numbers": (no_numbers, WINDOW, "output"),
    "three bits": (coarse, WINDOW, "output"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_kernel_is_an_error_of_one_line_that_says_what_to_set(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend, config, what = BROKEN[kind]
    add(monkeypatch, kind, attend)
    with pytest.raises(ValueError, match=f"^attention backend '{kind}' is wrong on cpu: the {what} is off by") as found:
        checked(config, attention=kind)
    assert re.search(
        r"in bfloat16, and 0\.0\d+ is allowed \(plain XLA: .+\); set model\.attn_implementation: xla$", str(found.value)
    )


def test_a_kernel_that_cannot_run_at_all_is_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Shared memory size limit exceeded\nand more")

    add(monkeypatch, "crashes", crash)
    said = "^attention backend 'crashes' cannot run on cpu: Shared memory size limit exceeded; set model.attn_implem"
    with pytest.raises(ValueError, match=said):
        checked(attention="crashes")


@pytest.mark.parametrize(
    ("name", "config", "compute"),
    [
        ("splash", WINDOW, {}),
        (
            "splash",
            replace(CONFIG, sinks=True, attention_softcap=5.0),
            {"packed": False, "dtype": jnp.dtype("float32")},
        ),
        ("triton", CONFIG, {}),
    ],
)
def test_kernels_pass_and_the_log_says_so_in_one_line(
    name: str, config: Any, compute: dict, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(BACKENDS, name, BACKENDS[name]._replace(refuses=lambda platform: None))
    with caplog.at_level(logging.INFO, "einkorn"):
        checked(config, attention=name, **compute)
    (said,) = [record.getMessage() for record in caplog.records if record.name == "einkorn"]
    assert re.fullmatch(
        rf"attention: {name} on cpu agrees with plain XLA, off by \d\d? % of what is allowed; checked in \d+ ms", said
    )


def test_nothing_is_checked_where_rows_go_to_plain_xla(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attention_check, "_share", lambda *_, **__: pytest.fail("nothing to check"))
    with caplog.at_level(logging.INFO, "einkorn"):
        checked()
        add(monkeypatch, "for triton", no_numbers, like="triton")
        checked(WINDOWED, attention="xla")
        checked(attention="for triton", mesh={"data": 4, "context": 2})
        checked(replace(CONFIG, attention_softcap=5.0), attention="for triton")
    assert not [record for record in caplog.records if record.name == "einkorn"]


def test_a_window_is_checked_only_where_rows_are_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = []
    monkeypatch.setattr(attention_check, "_share", lambda block, scores, *_, **__: windows.append(scores.window) or 0.0)
    add(monkeypatch, "takes all", exactly)
    for length in (60, 61, 5000):
        checked(WINDOWED, attention="takes all", length=length)
    assert windows == [None, None, 60, None, 60, None]
    windows.clear()
    checked(replace(WINDOWED, each=(CONFIG.each[0]._replace(window=4096),)), attention="takes all", length=5000)
    assert windows == [96]
