"""Where several keys decide one thing: pure functions of a configuration, and the only readers of those keys."""

import hashlib
import math
import re
from typing import Any, NamedTuple

from configs import verl

AXES = ("data", "fsdp", "expert", "tensor", "context")
REST = -1
IN_TOKENS = ("num_decay_tokens", "num_stable_tokens")  # of training.lr_scheduler_kwargs
LONGEST_NAME = 100
COMPLETION_LENGTH = 256  # of TRL_GRPO, as in Oumi


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


class Update(NamedTuple):
    """How gradients become an update: `decays_all` says that norms and biases decay too. `schedule` are the words of
    `trainers.schedules.schedule`; the rate stays the same for `rate_stays` updates.
    """

    weight_decay: float
    decays_all: bool
    betas: tuple[float, float]
    max_grad_norm: float | None
    schedule: dict[str, Any]
    rate_stays: int


def update(config: Any, *, counted: Steps, updates_of_generation: int = 1) -> Update:
    """What the optimizer and the schedule are given: of VERL_GRPO verl's own settings, whose schedule goes by
    generations and not by updates.
    """
    training = config.training
    if training.trainer_type != "VERL_GRPO":
        return Update(
            training.weight_decay,
            False,
            (training.adam_beta1, training.adam_beta2),
            training.max_grad_norm,
            {
                "name": training.lr_scheduler_type,
                "warmup_steps": counted.warmup,
                "warmup_ratio": training.warmup_ratio,
                **counted.schedule,
            },
            1,
        )
    says = verl.settings(config)
    cosine = {"name": "cosine_with_min_lr", "min_lr_rate": says.min_lr_ratio, "num_cycles": says.num_cycles}
    shape = cosine if says.lr_scheduler_type == "cosine" else {"name": "constant_with_warmup"}
    warmup = {"warmup_steps": says.lr_warmup_steps, "warmup_ratio": says.lr_warmup_steps_ratio}
    return Update(says.weight_decay, True, says.betas, says.grad_clip, shape | warmup, updates_of_generation)


def packing(config: Any) -> str:
    """How packed rows are packed: "bfd", "bfd_split" or "wrapped"."""
    default = "wrapped" if config.training.trainer_type == "OUMI" else "bfd"
    return config.training.trainer_kwargs.packing_strategy or default


def loss_types(config: Any) -> tuple[str, ...]:
    """`trainer_kwargs.loss_type` as a tuple, the method's own where it is not set."""
    asked, method = config.training.trainer_kwargs.loss_type, config.training.trainer_type
    if asked is None:
        return {"TRL_DPO": ("sigmoid",), "TRL_KTO": ("kto",), "TRL_GRPO": ("dapo",)}.get(method, ("nll",))
    names = (asked,) if isinstance(asked, str) else tuple(asked)
    return tuple({"chunked_nll": "nll"}.get(name, name) for name in names)


def loss_weights(config: Any) -> tuple[float, ...] | None:
    """`trainer_kwargs.loss_weights` as numbers; ValueError where one is none."""
    weights = config.training.trainer_kwargs.loss_weights
    try:
        return None if weights is None else tuple(map(float, weights))
    except ValueError:
        raise ValueError(f"training.trainer_kwargs.loss_weights is {list(weights)}; allowed: numbers") from None


def beta(config: Any) -> float:
    """How strongly the reference holds."""
    asked = config.training.trainer_kwargs.beta
    return (0.0 if config.training.trainer_type == "TRL_GRPO" else 0.1) if asked is None else asked


def disables_dropout(config: Any) -> bool:
    """Whether a method that compares with a reference or a sampler trains a LoRA adapter without dropout."""
    asked = config.training.trainer_kwargs.disable_dropout
    return config.training.trainer_type != "TRL_GRPO" if asked is None else asked


def shuffles(config: Any) -> bool:
    """Whether an epoch's rows come in an order of their own; KTO's stay beside those that it compares them with."""
    order = config.training.trainer_kwargs.train_sampling_strategy
    if config.training.trainer_type == "VERL_GRPO":
        return verl.settings(config).shuffle
    if config.training.trainer_type == "TRL_GRPO" and config.training.trainer_kwargs.shuffle_dataset is False:
        return False
    return order != "sequential" if order else config.training.trainer_type != "TRL_KTO"


def prompt_length(config: Any) -> tuple[int | None, str]:
    """The most tokens of a prompt that is asked, and what becomes of longer ones, as `input_pipeline.prompts.Limit`."""
    if config.training.trainer_type == "VERL_GRPO":
        says = verl.settings(config)
        return says.max_prompt_length, "leave_out" if says.filter_overlong_prompts else says.truncation
    return config.training.grpo.max_prompt_length, "left"


def completion_length(config: Any) -> int:
    """The most tokens of an answer."""
    if config.training.trainer_type == "VERL_GRPO":
        return verl.settings(config).max_response_length
    return config.training.grpo.max_completion_length or COMPLETION_LENGTH


def drawing(config: Any) -> verl.Drawing:
    """How answers that are learned from are drawn."""
    if config.training.trainer_type == "VERL_GRPO":
        return verl.settings(config).drawing
    grpo, kwargs = config.training.grpo, config.training.trainer_kwargs
    return verl.Drawing(
        generations=grpo.num_generations or verl.GROUP,
        temperature=grpo.temperature,
        top_p=kwargs.top_p,
        top_k=kwargs.top_k,
        min_p=kwargs.min_p or 0.0,
        repetition_penalty=grpo.repetition_penalty,
    )


def stop_strings(config: Any) -> tuple[str, ...]:
    """Strings behind which an answer ends."""
    kwargs = config.training.trainer_kwargs.generation_kwargs or {}
    return (*config.training.grpo.stop_strings, *kwargs.get("stop_strings", ()))


def reward_weights(config: Any) -> tuple[float, ...]:
    """Of each reward function; ValueError where one is no number."""
    weights = config.training.trainer_kwargs.reward_weights
    if weights is None:
        return (1.0,) * len(config.training.reward_functions or ())
    try:
        return tuple(map(float, weights))
    except ValueError:
        raise ValueError(f"training.trainer_kwargs.reward_weights is {list(weights)}; allowed: numbers") from None


class Rollout(NamedTuple):
    """What one generation asks, and how its answers are learned from: `updates` optimizer steps, of `accumulation`
    microbatches of `microbatch` answers over all devices; each answer takes part in `passes` of them.
    """

    prompts: int
    generations: int
    microbatch: int
    accumulation: int
    updates: int
    passes: int

    @property
    def answers(self) -> int:
        """Answers of a generation."""
        return self.prompts * self.generations


def rollout(config: Any, *, replicas: int) -> Rollout:
    """The sizes of a generation and its updates where so many devices hold answers of their own; ValueError names the
    nearest sizes that are allowed.
    """
    return (_verls_rollout if config.training.trainer_type == "VERL_GRPO" else _trls_rollout)(config, replicas)


def _trls_rollout(config: Any, replicas: int) -> Rollout:
    """TRL counts answers: a generation has whole groups of them and whole microbatches."""
    training, kwargs = config.training, config.training.trainer_kwargs
    microbatch, group = training.per_device_train_batch_size * replicas, drawing(config).generations
    accumulation = training.gradient_accumulation_steps
    answers = kwargs.generation_batch_size or microbatch * (kwargs.steps_per_generation or accumulation)
    if answers % microbatch or answers % group:
        raise ValueError(
            f"a generation has {answers} answers, which is no multiple of both num_generations {group} and the"
            f" {microbatch} answers of a microbatch (per_device_train_batch_size times devices); the nearest are"
            f" training.trainer_kwargs.generation_batch_size: {_multiples(answers, math.lcm(microbatch, group))}"
        )
    microbatches = answers // microbatch * kwargs.num_iterations
    if microbatches % accumulation:
        raise ValueError(
            f"training.gradient_accumulation_steps is {accumulation}, and a generation has {microbatches} microbatches"
            f" (steps_per_generation times num_iterations); the nearest are {_divisors(microbatches, accumulation)}"
        )
    return Rollout(
        prompts=answers // group,
        generations=group,
        microbatch=microbatch,
        accumulation=accumulation,
        updates=microbatches // accumulation,
        passes=kwargs.num_iterations,
    )


def _verls_rollout(config: Any, replicas: int) -> Rollout:
    """verl counts prompts, and on a device answers."""
    says = verl.settings(config)
    group, actor = says.drawing.generations, f"{verl.PATH}.{verl.ACTOR}"
    if says.prompts % says.mini_batch:
        raise ValueError(
            f"{actor}.ppo_mini_batch_size is {says.mini_batch}, which does not divide data.train_batch_size"
            f" {says.prompts}; the nearest are {_divisors(says.prompts, says.mini_batch)}"
        )
    answers = says.mini_batch * group
    if answers % replicas:
        raise ValueError(
            f"{actor}.ppo_mini_batch_size {says.mini_batch} times rollout.n {group} is {answers} answers, which"
            f" {replicas} devices cannot share evenly; the nearest are {_multiples(answers, replicas)} answers"
        )
    of_device = answers // replicas
    micro = says.micro_batch or _below(of_device, config.training.per_device_train_batch_size)
    if of_device % micro:
        raise ValueError(
            f"{actor}.ppo_micro_batch_size_per_gpu is {micro}, which does not divide the {of_device} answers of an"
            f" update on a device; the nearest are {_divisors(of_device, micro)}"
        )
    return Rollout(
        prompts=says.prompts,
        generations=group,
        microbatch=micro * replicas,
        accumulation=of_device // micro,
        updates=says.prompts // says.mini_batch * says.ppo_epochs,
        passes=says.ppo_epochs,
    )


def _multiples(number: int, of: int) -> str:
    """The multiples next to a number, in words."""
    below = number // of * of
    return f"{below} and {below + of}" if below else str(of)


def _divisors(number: int, near: int) -> str:
    """The divisors of a number next to another one, in words."""
    above = next((d for d in range(near + 1, number + 1) if number % d == 0), None)
    below = _below(number, near)
    return f"{below} and {above}" if above else str(below)


def _below(number: int, most: int) -> int:
    """The greatest divisor of a number that is at most another one."""
    return next(d for d in range(min(most, number), 0, -1) if number % d == 0)


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
    """What the backward pass computes again: none, dots (all but matrix products), full; or offload: all but what goes
    into each layer, which waits in the host's memory.
    """
    training = config.training
    asked = "offload" if training.trainer_kwargs.activation_offloading else None
    return training.remat_policy or asked or ("full" if training.enable_gradient_checkpointing else "none")


def memory(config: Any) -> dict[str, bool]:
    """What copies of the model share, and whether the optimizer's state lies on the host (`trainers.step.Memory`)."""
    deepspeed = config.deepspeed
    stage = deepspeed.zero_stage if deepspeed.enable_deepspeed else "ZERO_0"
    host = deepspeed.enable_deepspeed and (deepspeed.offload_optimizer or {}).get("device", "none") == "cpu"
    return {
        "split_state": stage in ("ZERO_1", "ZERO_2"),
        "split_gradients": stage == "ZERO_2",
        "on_host": host,
    }


def attention(config: Any) -> str:
    """The attention backend's name, or auto."""
    return config.model.attn_implementation or "auto"


def mesh_axes(config: Any, *, hosts: int = 1, slices: int = 1) -> dict[str, int]:
    """Devices along each axis, -1 for all that are left: as `mesh` says, and where it is silent `fsdp` and `deepspeed`.

    `hosts` is the number of processes: HYBRID_SHARD keeps a copy of the model on each. On several `slices`
    each has one, where nothing is said of `data`.
    """
    sizes = _strategy_axes(config, hosts) | {"expert": 1, "tensor": 1, "context": 1}
    asked = {axis: config.mesh[axis] for axis in AXES if config.mesh[axis] is not None}
    if REST in asked.values():
        sizes = {axis: 1 if size == REST else size for axis, size in sizes.items()}
    if sizes["data"] != REST:
        sizes["data"] = max(sizes["data"], slices)
    return {axis: asked.get(axis, sizes[axis]) for axis in AXES}


def _strategy_axes(config: Any, hosts: int) -> dict[str, int]:
    if config.fsdp.enable_fsdp:
        strategy = config.fsdp.sharding_strategy
    else:
        split = config.deepspeed.enable_deepspeed and config.deepspeed.zero_stage == "ZERO_3"
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
