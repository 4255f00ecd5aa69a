"""The parameters as every step of decoding reads them, made once for all steps of a generation.

n layers, D inputs, F outputs of a linear layer.

A step of decoding multiplies every weight with a few rows only, so what counts is how fast weights are read. On CPU a
product of few rows reads a kernel twice as fast where it is stored as [F, D]; queries, keys and values, and a gate with
what it gates, are one product each; and layers stand apart, since a loop over stacked ones copies each layer out of the
stack, and its cache too. Accelerators read slices where they lie, and keep the stack: compile time does not grow with
depth there.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from models.config import Compute, DecoderConfig
from models.decoder import Params, cast, layers_apart
from models.linear import TURNED
from models.lora import fused, is_adapter
from models.quantized import KERNEL, VALUES, is_quantisable
from models.sharding import nested, paths

# Linear layers that read the same: as they are, and as one.
_JOINED = {"layers/attention/qkv": ("q", "k", "v"), "layers/mlp/gate_up": ("gate", "up")}


def for_decoding(
    params: Params, *, config: DecoderConfig, compute: Compute, apart: bool
) -> tuple[Params, DecoderConfig]:
    """Parameters that compute the same, in the compute dtype, and their config; `apart` for layers one by one, with
    their kernels turned: `models.decoder.cached_hidden_states` then goes with a list of caches.
    """
    made = _made(params, config=config, compute=compute, apart=apart)
    if not apart:
        return made, config
    names = {path.rsplit("/", 1)[0] for path in paths({"layers": made["layers"][0]})}
    joined = dataclasses.replace(
        config,
        fused_qkv="blocks" if "layers/attention/qkv" in names and not config.fused_qkv else config.fused_qkv,
        fused_gate_up="layers/mlp/gate_up" in names or config.fused_gate_up,
    )
    # Here, so that a head which is the embedding itself stays one array.
    head = made.get("head", {}) | ({TURNED: made["embed"]["embedding"]} if config.tied_head else {})
    return made | {"head": head}, joined


@functools.partial(jax.jit, static_argnames=("config", "compute", "apart"))
def _made(params: Params, *, config: DecoderConfig, compute: Compute, apart: bool) -> Params:
    params = {name: part for name, part in params.items() if name not in ("vision", "projector")}  # seen already
    looking = params.pop("looking", None)
    if looking is not None:
        looking = cast(looking["layers"], compute.dtype)
        made = layers_apart(looking, config.stack(looks=True).layers) if apart else looking
        return _made(params, config=config, compute=compute, apart=apart) | {"looking": {"layers": made}}
    params["embed"] = cast(params["embed"], compute.dtype)
    if KERNEL in params.get("head", {}):
        params["head"] = params["head"] | {KERNEL: params["head"][KERNEL].astype(compute.dtype)}
    if not apart:
        return params
    params["layers"] = cast(params["layers"], compute.dtype)
    leaves = paths(params)
    # A reference has no adapter, though its config may name one.
    plain = compute.dtype == jnp.float32 and not any(path.endswith(VALUES) for path in leaves)
    if plain and any(is_adapter(path) for path in leaves):
        leaves = paths(fused(params, compute.lora))  # in a narrower dtype the sum would lose what the adapter adds
    for whole, parts in _JOINED.items():
        _join(leaves, whole, [f"{whole.rsplit('/', 1)[0]}/{part}" for part in parts])
    turned = {}
    for path, leaf in leaves.items():
        if path == f"head/{KERNEL}" or is_quantisable(path):
            turned[path.removesuffix(KERNEL) + TURNED] = jnp.swapaxes(leaf, -1, -2)
        else:
            turned[path] = leaf
    made = nested(turned)
    return made | {"layers": layers_apart(made["layers"], config.stack(looks=False).layers)}


def _join(leaves: dict[str, Any], whole: str, parts: list[str]) -> None:
    """Linear layers become one that gives their outputs side by side; not where one has an adapter, say."""
    own = [{path.rsplit("/", 1)[1] for path in leaves if path.startswith(f"{part}/")} for part in parts]
    if not own[0] or any(names != own[0] or not names <= {KERNEL, "bias"} for names in own):
        return
    for name in own[0]:
        leaves[f"{whole}/{name}"] = jnp.concatenate([leaves.pop(f"{part}/{name}") for part in parts], axis=-1)
