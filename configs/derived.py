"""Where several keys decide one thing: pure functions of a configuration, and the only readers of those keys."""

import hashlib
import re
from typing import Any, NamedTuple

AXES = ("data", "fsdp", "expert", "tensor", "context")
REST = -1
IN_TOKENS = ("num_decay_tokens", "num_stable_tokens")  # of training.lr_scheduler_kwargs
LONGEST_NAME = 100


def max_length(config: Any) -> int | None:
    """The longest row in tokens: `model.model_max_length`, else TRL's `trainer_kwargs.max_length`; None is no limit."""
    length = config.model.model_max_length
    return config.training.trainer_kwargs.max_length if length is None else length


class Steps(NamedTuple):
    """Numbers of optimizer steps: the run's (None: as many as its epochs have), its warmup's (None: as `warmup_ratio`
    says), and the schedule's options with theirs.
    """

    run: int | None
    warmup: int | None
    schedule: dict[str, Any]


def steps(config: Any, *, rows_per_step: int) -> Steps:
    """How long the run and the parts of its schedule are; what is set in tokens is divided by the tokens of a step, all
    places of its packed rows, and rounded up.
    """
    training = config.training

    def of(tokens: Any, name: str) -> int:
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 0:
            raise ValueError(f"training.{name} is {tokens!r}; allowed: a number of tokens")
        row = max_length(config)
        if not config.data.train.pack or row is None:
            raise ValueError(
                f"training.{name} needs rows of one length: set data.train.pack and model.model_max_length"
            )
        return -(-tokens // (rows_per_step * row))

    run, warmup = training.max_steps if training.max_steps > 0 else None, training.warmup_steps
    if training.max_tokens is not None:
        run = of(training.max_tokens, "max_tokens")
    if training.warmup_tokens is not None:
        warmup = of(training.warmup_tokens, "warmup_tokens")
    options = {
        name.replace("_tokens", "_steps"): of(value, f"lr_scheduler_kwargs.{name}") if name in IN_TOKENS else value
        for name, value in dict(training.lr_scheduler_kwargs).items()
    }
    return Steps(run, warmup, options)


def packing(config: Any) -> str:
    """How packed rows are packed: "bfd", "bfd_split" or "wrapped"."""
    default = "wrapped" if config.training.trainer_type == "OUMI" else "bfd"
    return config.training.trainer_kwargs.packing_strategy or default


def loss_types(config: Any) -> tuple[str, ...]:
    """`trainer_kwargs.loss_type` as a tuple, the method's own where it is not set."""
    asked, method = config.training.trainer_kwargs.loss_type, config.training.trainer_type
    if asked is None:
        return {"TRL_DPO": ("sigmoid",), "TRL_KTO": ("kto",)}.get(method, ("nll",))
    names = (asked,) if isinstance(asked, str) else tuple(asked)
    return tuple({"chunked_nll": "nll"}.get(name, name) for name in names)


def loss_weights(config: Any) -> tuple[float, ...] | None:
    """`trainer_kwargs.loss_weights` as numbers; ValueError where one is none."""
    weights = config.training.trainer_kwargs.loss_weights
    try:
        return None if weights is None else tuple(map(float, weights))
    except ValueError:
        raise ValueError(f"training.trainer_kwargs.loss_weights is {list(weights)}; allowed: numbers") from None


def shuffles(config: Any) -> bool:
    """Whether an epoch's rows come in an order of their own; KTO's stay beside those that it compares them with."""
    order = config.training.trainer_kwargs.train_sampling_strategy
    return order != "sequential" if order else config.training.trainer_type != "TRL_KTO"


def workers(config: Any, *, cores: int) -> int:
    """Processes that read and tokenise a stream; 0: a thread."""
    asked = config.training.dataloader_num_workers
    return min(8, cores // 8) if asked == "auto" else asked


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
