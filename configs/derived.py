"""Where several keys decide one thing: pure functions of a configuration, and the only readers of those keys."""

import hashlib
import re
from typing import Any

AXES = ("data", "fsdp", "expert", "tensor", "context")
REST = -1
LONGEST_NAME = 100


def max_length(config: Any) -> int | None:
    """The longest row in tokens: `model.model_max_length`, else TRL's `trainer_kwargs.max_length`; None is no limit."""
    length = config.model.model_max_length
    return config.training.trainer_kwargs.max_length if length is None else length


def compute_dtype(config: Any) -> str | None:
    """The dtype to compute in, "bfloat16", or None for that of the parameters."""
    asked = [config.training.mixed_precision_dtype == "BF16"]
    if config.model.torch_dtype_str == "float32":  # what FSDP and DeepSpeed cast is float32 parameters
        asked.append(config.fsdp.enable_fsdp and config.fsdp.mixed_precision == "bf16")
        asked.append(config.deepspeed.enable_deepspeed and config.deepspeed.precision == "BF16")
    return "bfloat16" if any(asked) else None


def remat_policy(config: Any) -> str:
    """What the backward pass computes again: none, dots (all but matrix products), or full."""
    training = config.training
    return training.remat_policy or ("full" if training.enable_gradient_checkpointing else "none")


def attention(config: Any) -> str:
    """The attention backend's name, or auto."""
    return config.model.attn_implementation or "auto"


def mesh_axes(config: Any, *, hosts: int = 1) -> dict[str, int]:
    """Devices along each axis, -1 for all that are left: as `mesh` says, and where it is silent `fsdp` and `deepspeed`.

    `hosts` is the number of processes: HYBRID_SHARD keeps a copy of the model on each.
    """
    sizes = _strategy_axes(config, hosts) | {"expert": 1, "tensor": 1, "context": 1}
    asked = {axis: config.mesh[axis] for axis in AXES if config.mesh[axis] is not None}
    if REST in asked.values():
        sizes = {axis: 1 if size == REST else size for axis, size in sizes.items()}
    return {axis: asked.get(axis, sizes[axis]) for axis in AXES}


def _strategy_axes(config: Any, hosts: int) -> dict[str, int]:
    if config.fsdp.enable_fsdp:
        strategy = config.fsdp.sharding_strategy
    else:
        split = config.deepspeed.enable_deepspeed and config.deepspeed.zero_stage != "ZERO_0"
        strategy = "FULL_SHARD" if split else "NO_SHARD"
    if strategy == "NO_SHARD":
        return {"data": REST, "fsdp": 1}
    return {"data": hosts if strategy.startswith("HYBRID") else 1, "fsdp": REST}


def run_name(config: Any) -> str | None:
    """The run's name with nothing in it that a file system or a tracker refuses, as Oumi does."""
    name = config.training.run_name
    if name is None:
        return None
    clean = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
    if len(clean) <= LONGEST_NAME:
        return clean
    mark = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{clean[: LONGEST_NAME - len(mark) - 1]}_{mark}"
