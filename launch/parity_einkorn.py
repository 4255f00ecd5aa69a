"""One side of `einkorn parity`: what einkorn computes, and what both sides are asked for.

L tokens, D width, V vocabulary, n layers.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.decoder import Compute, DecoderConfig, Params, abstract_params, head, hidden_states
from models.families import decoder_config
from models.generate import generate
from models.sharding import make_mesh, parameter_shardings, paths
from models.weights import load_params
from trainers.sft import sft_loss
from trainers.step import Batch


class Sample(NamedTuple):
    """Token ids to compute on: a text whose last `shown` logits are compared when it is cut to `shown` tokens and when
    it is whole, the part of it that loss and gradients are of, and the prompts that are continued by `new` tokens.
    """

    text: list[int]
    shown: int
    trained: list[int]
    prompts: list[list[int]]
    new: int


class Measured(NamedTuple):
    """What one program computes on a sample in one dtype: logits [shown, V] of the text's beginning and of its end, the
    mean loss in nats, the norm of its gradient for each layer and each other parameter, and the greedy continuations,
    with how far each token lay above the second best.
    """

    short: np.ndarray
    long: np.ndarray
    loss: float
    gradient: dict[str, float]
    greedy: list[list[int]]
    margins: list[list[float]]


def measure_einkorn(folder: Path, sample: Sample, dtypes: Sequence[str]) -> Iterator[Measured]:
    """Einkorn's numbers, in one dtype after the other; parameters are float32 in all of them, as in training."""
    config = decoder_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    shardings = parameter_shardings(abstract_params(config, dtype=jnp.float32), make_mesh({"fsdp": -1}))
    params = load_params(folder, config, shardings=shardings, dtype=jnp.float32)
    beginning, whole = _batch(sample.text[: sample.shown]), _batch(sample.text)
    for dtype in dtypes:
        compute = Compute(dtype=jnp.dtype(dtype))
        # accelerators would multiply float32 matrices in fewer bits
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            loss, norms = _loss_and_norms(params, _batch(sample.trained), config, compute)
            yield Measured(
                short=np.asarray(_last_logits(params, beginning, config, compute, sample.shown)),
                long=np.asarray(_last_logits(params, whole, config, compute, sample.shown)),
                loss=float(loss),
                gradient=_by_name(jax.device_get(norms)),
                greedy=generate(
                    params, config, sample.prompts, max_new_tokens=sample.new, stop_ids=(), compute=compute
                ),
                margins=[],
            )


def _batch(ids: Sequence[int]) -> Batch:
    """One row without padding, each token followed by the next; the last one has no target."""
    tokens_BL = jnp.array([ids], jnp.int32)
    return {
        "tokens": tokens_BL,
        "targets": jnp.roll(tokens_BL, -1, axis=1),
        "weights": jnp.ones(tokens_BL.shape, jnp.float32).at[:, -1].set(0),
        "segments": jnp.ones_like(tokens_BL),
        "positions": jnp.arange(len(ids), dtype=jnp.int32)[None],
    }


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _last_logits(params: Params, batch: Batch, config: DecoderConfig, compute: Compute, last: int) -> jax.Array:
    hidden_BLD = hidden_states(
        params,
        config,
        tokens_BL=batch["tokens"],
        positions_BL=batch["positions"],
        segments_BL=batch["segments"],
        compute=compute,
    )
    return head(params, config).logits(hidden_BLD[0, -last:])


@functools.partial(jax.jit, static_argnums=(2, 3))
def _loss_and_norms(
    params: Params, batch: Batch, config: DecoderConfig, compute: Compute
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of training, and norms of its gradient: [n] of the layers, and one of each other leaf by path. The
    gradient itself never leaves the compiled function.
    """
    loss_of = sft_loss(config, compute=compute)
    loss, gradient = jax.value_and_grad(lambda params: loss_of(params, None, batch)[0].mean())(params)
    leaves = paths(gradient)
    squares: dict[str, jax.Array] = {}
    for path, leaf in leaves.items():
        layered = path.startswith("layers/")
        square = jnp.square(leaf).sum(axis=tuple(range(1, leaf.ndim)) if layered else None)
        group = "layers" if layered else path
        squares[group] = squares[group] + square if group in squares else square
    return loss, jax.tree.map(jnp.sqrt, squares)


def _by_name(norms: dict[str, Any]) -> dict[str, float]:
    layers = {f"layer {number}": float(norm) for number, norm in enumerate(norms["layers"])}
    return layers | {path: float(norm) for path, norm in norms.items() if path != "layers"}
