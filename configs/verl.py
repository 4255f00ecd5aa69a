"""verl's settings, `training.verl_config_overrides`: every one that means something here, with verl's default.

What has a key of its own here, `INSTEAD`, is moved there when the configuration is loaded, and wins over it. The other
settings that decide numbers stand in `VERL`; those that only place work on devices, in `IDLE`, are taken and listed in
the log; any other name is an error. Defaults are those of verl 0.7 but where a meaning says otherwise.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from configs.convert import FALSE, convert
from configs.given import as_given
from configs.key import Key
from configs.nearest import nearest

PATH = "training.verl_config_overrides"
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
GROUP = 8  # answers to a prompt, where nothing says how many: verl's 1 leaves nothing to compare
PROMPT_LENGTH, RESPONSE_LENGTH = 512, 512

KL_PENALTIES = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
LOSS_AGG_MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")

INSTEAD = {
    "actor_rollout_ref.model.path": "model.model_name",
    "actor_rollout_ref.model.enable_gradient_checkpointing": "training.enable_gradient_checkpointing",
    f"{ACTOR}.optim.lr": "training.learning_rate",
    f"{ROLLOUT}.n": "training.grpo.num_generations",
    f"{ROLLOUT}.temperature": "training.grpo.temperature",
    f"{ROLLOUT}.prompt_length": "training.grpo.max_prompt_length",
    f"{ROLLOUT}.response_length": "training.grpo.max_completion_length",
    "data.max_prompt_length": "training.grpo.max_prompt_length",
    "data.max_response_length": "training.grpo.max_completion_length",
    "algorithm.filter_groups.enable": "training.grpo.dynamic_sampling",
    "algorithm.filter_groups.max_num_gen_batches": "training.grpo.max_generation_batches",
    "trainer.total_epochs": "training.num_train_epochs",
    "trainer.total_training_steps": "training.max_steps",
    "trainer.save_freq": "training.save_steps",
    "trainer.max_actor_ckpt_to_keep": "training.keep_checkpoints",
    "trainer.default_local_dir": "training.output_dir",
    "trainer.experiment_name": "training.run_name",
    "trainer.resume_from_path": "training.resume_from_checkpoint",
}

VERL = {
    "data.train_batch_size": Key(1024, int, "prompts of one step", low=1),
    "data.val_batch_size": Key(None, int, "prompts of one batch of the evaluation; null: as many as of a step", low=1),
    "data.shuffle": Key(True, bool, "another order of prompts every epoch"),
    "data.filter_overlong_prompts": Key(False, bool, "leave longer prompts out"),
    "data.truncation": Key("error", ("error", "left", "right", "middle"), "where longer prompts lose what is too much"),
    "data.apply_chat_template_kwargs": Key({}, dict, "variables of the chat template"),
    f"{ROLLOUT}.top_p": Key(1.0, float, "draw from the fewest tokens that have it together", above=0, high=1),
    f"{ROLLOUT}.top_k": Key(-1, int, "draw from so many likeliest tokens; -1: from all", low=-1),
    f"{ROLLOUT}.do_sample": Key(True, bool, "draw tokens; must stay true, or a group's answers are alike"),
    f"{ROLLOUT}.val_kwargs.n": Key(1, int, "answers to each prompt of the evaluation", low=1),
    f"{ROLLOUT}.val_kwargs.do_sample": Key(False, bool, "the evaluation draws tokens"),
    f"{ROLLOUT}.val_kwargs.temperature": Key(0.0, float, "of the evaluation", low=0),
    f"{ROLLOUT}.val_kwargs.top_p": Key(1.0, float, "of the evaluation", above=0, high=1),
    f"{ROLLOUT}.val_kwargs.top_k": Key(-1, int, "of the evaluation", low=-1),
    "algorithm.adv_estimator": Key(
        "grpo", ("grpo", "grpo_vectorized", "rloo"), "how answers to a prompt are compared with one another"
    ),
    "algorithm.norm_adv_by_std_in_grpo": Key(True, bool, "divide by the group's deviation; false: Dr. GRPO"),
    "algorithm.use_kl_in_reward": Key(False, bool, "the divergence from the reference lowers rewards"),
    "algorithm.kl_penalty": Key("kl", KL_PENALTIES, "how it is estimated then"),
    "algorithm.kl_ctrl.type": Key("fixed", ("fixed", "adaptive"), "its weight stays, or goes after target_kl"),
    "algorithm.kl_ctrl.kl_coef": Key(0.001, float, "its weight", low=0),
    "algorithm.kl_ctrl.horizon": Key(10_000, int, "answers over which an adaptive weight moves", low=1),
    "algorithm.kl_ctrl.target_kl": Key(0.1, float, "where an adaptive weight moves to", above=0),
    f"{ACTOR}.ppo_mini_batch_size": Key(256, int, "prompts of one update, at most those of a step", low=1),
    f"{ACTOR}.ppo_micro_batch_size_per_gpu": Key(
        None, int, "answers of one microbatch on a device; null: per_device_train_batch_size, or less", low=1
    ),
    f"{ACTOR}.ppo_epochs": Key(1, int, "how often one step's answers are learned from", low=1),
    f"{ACTOR}.clip_ratio": Key(0.2, float, "how far the probability ratio may leave 1", low=0),
    f"{ACTOR}.clip_ratio_low": Key(0.2, float, "below 1; where only clip_ratio is set, that", low=0),
    f"{ACTOR}.clip_ratio_high": Key(0.2, float, "above 1; where only clip_ratio is set, that", low=0),
    f"{ACTOR}.clip_ratio_c": Key(3.0, float, "bound where the advantage is below 0 (dual clip)", above=1),
    f"{ACTOR}.loss_agg_mode": Key("token-mean", LOSS_AGG_MODES, "how losses of tokens become one"),
    f"{ACTOR}.loss_scale_factor": Key(None, int, "divides seq-mean-token-sum-norm; null: the row's length", low=1),
    f"{ACTOR}.policy_loss.loss_mode": Key(
        "vanilla",
        ("vanilla", "gspo", "sapo", "gpg", "clip_cov", "kl_cov", "geo_mean", "cispo"),
        "the loss of the policy",
        later=("clip_cov", "kl_cov"),
    ),
    f"{ACTOR}.tau_pos": Key(1.0, float, "of sapo, where the advantage is above 0", above=0),
    f"{ACTOR}.tau_neg": Key(1.05, float, "of sapo, elsewhere", above=0),
    f"{ACTOR}.entropy_coeff": Key(0.0, float, "weight of a bonus for entropy"),
    f"{ACTOR}.use_kl_loss": Key(False, bool, "the divergence from the reference is part of the loss"),
    f"{ACTOR}.kl_loss_coef": Key(0.001, float, "its weight", low=0),
    f"{ACTOR}.kl_loss_type": Key("low_var_kl", KL_PENALTIES, "how it is estimated then"),
    f"{ACTOR}.grad_clip": Key(1.0, float, "gradients are scaled down to this norm", above=0),
    f"{ACTOR}.optim.weight_decay": Key(0.01, float, "decoupled decay of every parameter", low=0),
    f"{ACTOR}.optim.betas": Key([0.9, 0.999], list, "decay of the moments"),
    f"{ACTOR}.optim.lr_warmup_steps": Key(-1, int, "steps that warm up; -1: as lr_warmup_steps_ratio says", low=-1),
    f"{ACTOR}.optim.lr_warmup_steps_ratio": Key(0.0, float, "share of the steps that warm up", low=0, high=1),
    f"{ACTOR}.optim.lr_scheduler_type": Key("constant", ("constant", "cosine"), "how the learning rate goes"),
    f"{ACTOR}.optim.warmup_style": Key(None, ("constant", "cosine"), "older name of lr_scheduler_type"),
    f"{ACTOR}.optim.min_lr_ratio": Key(0.0, float, "of cosine: where it ends", low=0, high=1, null=True),
    f"{ACTOR}.optim.num_cycles": Key(0.5, float, "of cosine: how often it swings", above=0),
    "reward_model.reward_manager": Key("naive", ("naive", "dapo"), "how rewards are put together", later=("dapo",)),
    "trainer.test_freq": Key(None, int, "steps between evaluations, -1: none; null: as training.eval_strategy says"),
    "trainer.val_before_train": Key(True, bool, "evaluate before the first step"),
    "trainer.resume_mode": Key(
        None, ("auto", "disable", "resume_path"), "go on from a checkpoint; null: as training says"
    ),
    "trainer.logger": Key(None, list, "console, tensorboard, wandb; null: as training says"),
}

# What stands elsewhere here, and in another form.
SAY = {
    "custom_reward_function": "training.reward_functions: [file.py:function]",
    "actor_rollout_ref.model.lora_rank": "training.use_peft and peft.lora_r",
    "actor_rollout_ref.model.lora_alpha": "training.use_peft and peft.lora_alpha",
    "actor_rollout_ref.model.target_modules": "training.use_peft and peft.lora_target_modules",
    "data.prompt_key": "dataset_kwargs.prompt_column of the dataset",
    "data.seed": "training.data_seed",
}

# What only says where and how fast work is done in verl; a name means all that stand below it too.
IDLE = (
    *("actor_rollout_ref.hybrid_engine", "actor_rollout_ref.ref", "actor_rollout_ref.nccl_timeout"),
    *("actor_rollout_ref.model.use_remove_padding", "actor_rollout_ref.model.use_liger"),
    *("actor_rollout_ref.model.trust_remote_code", "actor_rollout_ref.model.enable_activation_offload"),
    *("actor_rollout_ref.model.use_shm", "actor_rollout_ref.model.use_fused_kernels"),
    *(f"{ACTOR}.{name}" for name in ("strategy", "fsdp_config", "megatron", "checkpoint", "use_torch_compile")),
    *(f"{ACTOR}.{name}" for name in ("use_dynamic_bsz", "ppo_max_token_len_per_gpu", "ulysses_sequence_parallel_size")),
    *(f"{ACTOR}.{name}" for name in ("entropy_from_logits_with_chunking", "entropy_checkpointing")),
    *(
        f"{ROLLOUT}.{name}"
        for name in ("name", "mode", "dtype", "gpu_memory_utilization", "tensor_model_parallel_size")
    ),
    *(f"{ROLLOUT}.{name}" for name in ("enforce_eager", "free_cache_engine", "load_format", "layered_summon")),
    *(f"{ROLLOUT}.{name}" for name in ("max_num_batched_tokens", "max_num_seqs", "max_model_len", "ignore_eos")),
    *(f"{ROLLOUT}.{name}" for name in ("enable_chunked_prefill", "disable_log_stats", "engine_kwargs", "agent")),
    *(f"{ROLLOUT}.{name}" for name in ("log_prob_micro_batch_size", "log_prob_micro_batch_size_per_gpu")),
    *(f"{ROLLOUT}.{name}" for name in ("log_prob_use_dynamic_bsz", "log_prob_max_token_len_per_gpu")),
    *("critic", "ray_init", "ray_kwargs", "global_profiler", "reward_model.launch_reward_fn_async"),
    *("data.dataloader_num_workers", "data.filter_overlong_prompts_workers", "data.return_raw_chat", "data.use_shm"),
    *("trainer.n_gpus_per_node", "trainer.nnodes", "trainer.critic_warmup", "trainer.balance_batch"),
    *("trainer.project_name", "trainer.device", "trainer.log_val_generations", "trainer.use_legacy_worker_impl"),
    *("algorithm.filter_groups.metric", "data.max_extrapolation_length", f"{ACTOR}.gradients"),
    *("trainer.ray_wait_register_center_timeout", "trainer.del_local_ckpt_after_load"),
)

# Keys here that verl does not ask: what says it there.
IN_PLACE_OF = {
    "training.gradient_accumulation_steps": f"{ACTOR}.ppo_mini_batch_size",
    "training.max_grad_norm": f"{ACTOR}.grad_clip",
    "training.weight_decay": f"{ACTOR}.optim.weight_decay",
    "training.adam_beta1": f"{ACTOR}.optim.betas",
    "training.adam_beta2": f"{ACTOR}.optim.betas",
    "training.lr_scheduler_type": f"{ACTOR}.optim.lr_scheduler_type",
    "training.warmup_steps": f"{ACTOR}.optim.lr_warmup_steps",
    "training.warmup_ratio": f"{ACTOR}.optim.lr_warmup_steps_ratio",
    "training.trainer_kwargs.beta": f"{ACTOR}.kl_loss_coef",
}

FILES = {"data.train_files": "train", "data.val_files": "validation"}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How answers are drawn: so many to each prompt, of tokens with these bounds; `top_k` 0 is none."""

    generations: int
    temperature: float  # 0: the likeliest token
    top_p: float
    top_k: int
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Verl:
    """Every number of a run with verl, by verl's names; `mini_batch` and `prompts` count prompts, `micro_batch` answers
    on a device (None: training.per_device_train_batch_size, or less).
    """

    prompts: int
    evaluated_prompts: int
    shuffle: bool
    max_prompt_length: int
    filter_overlong_prompts: bool
    truncation: str
    template_kwargs: Mapping[str, Any]
    max_response_length: int
    drawing: Drawing
    evaluation: Drawing
    val_before_train: bool
    adv_estimator: str
    norm_adv_by_std_in_grpo: bool
    use_kl_in_reward: bool
    kl_penalty: str
    kl_ctrl_type: str
    kl_coef: float
    kl_horizon: int
    kl_target: float
    mini_batch: int
    micro_batch: int | None
    ppo_epochs: int
    loss_mode: str
    loss_agg_mode: str
    loss_scale_factor: int | None
    clip_ratio_low: float
    clip_ratio_high: float
    clip_ratio_c: float
    tau_pos: float
    tau_neg: float
    entropy_coeff: float
    use_kl_loss: bool
    kl_loss_coef: float
    kl_loss_type: str
    grad_clip: float
    weight_decay: float
    betas: tuple[float, float]
    lr_scheduler_type: str
    lr_warmup_steps: int | None
    lr_warmup_steps_ratio: float
    min_lr_ratio: float
    num_cycles: float


def settings(config: Any) -> Verl:
    """What `verl_config_overrides` and the keys beside it come to; ValueError names the first that is wrong."""
    training, grpo = config.training, config.training.grpo
    given = _flat(training.verl_config_overrides)
    for name, text in problems(training.verl_config_overrides):
        raise ValueError(f"{name}: {text}")

    def of(name: str) -> Any:
        return convert(VERL[name], as_given(given[name])) if name in given else copy.deepcopy(VERL[name].default)

    def actor(name: str) -> Any:
        return of(f"{ACTOR}.{name}")

    def drawing(generations: int, temperature: float, under: str) -> Drawing:
        draws = of(f"{under}.do_sample") and temperature > 0
        top_k = max(0, of(f"{under}.top_k"))
        return Drawing(
            generations=generations,
            temperature=temperature if draws else 0.0,
            top_p=of(f"{under}.top_p"),
            top_k=top_k,
        )

    clip = given.keys() & {f"{ACTOR}.clip_ratio"}
    low, high = (
        actor("clip_ratio" if clip and f"{ACTOR}.clip_ratio_{side}" not in given else f"clip_ratio_{side}")
        for side in ("low", "high")
    )
    prompts, warmup = of("data.train_batch_size"), actor("optim.lr_warmup_steps")
    first, second = map(float, actor("optim.betas"))
    return Verl(
        prompts=prompts,
        evaluated_prompts=of("data.val_batch_size") or prompts,
        shuffle=of("data.shuffle"),
        max_prompt_length=grpo.max_prompt_length or PROMPT_LENGTH,
        filter_overlong_prompts=of("data.filter_overlong_prompts"),
        truncation=of("data.truncation"),
        template_kwargs=of("data.apply_chat_template_kwargs"),
        max_response_length=grpo.max_completion_length or RESPONSE_LENGTH,
        drawing=drawing(grpo.num_generations or GROUP, grpo.temperature, ROLLOUT),
        evaluation=drawing(
            of(f"{ROLLOUT}.val_kwargs.n"), of(f"{ROLLOUT}.val_kwargs.temperature"), f"{ROLLOUT}.val_kwargs"
        ),
        val_before_train=of("trainer.val_before_train"),
        adv_estimator=of("algorithm.adv_estimator"),
        norm_adv_by_std_in_grpo=of("algorithm.norm_adv_by_std_in_grpo"),
        use_kl_in_reward=of("algorithm.use_kl_in_reward"),
        kl_penalty=of("algorithm.kl_penalty"),
        kl_ctrl_type=of("algorithm.kl_ctrl.type"),
        kl_coef=of("algorithm.kl_ctrl.kl_coef"),
        kl_horizon=of("algorithm.kl_ctrl.horizon"),
        kl_target=of("algorithm.kl_ctrl.target_kl"),
        # verl's default, 256, is no reason to refuse a smaller step.
        mini_batch=min(prompts, actor("ppo_mini_batch_size")),
        micro_batch=actor("ppo_micro_batch_size_per_gpu"),
        ppo_epochs=actor("ppo_epochs"),
        loss_mode=actor("policy_loss.loss_mode"),
        loss_agg_mode=actor("loss_agg_mode"),
        loss_scale_factor=actor("loss_scale_factor"),
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=actor("clip_ratio_c"),
        tau_pos=actor("tau_pos"),
        tau_neg=actor("tau_neg"),
        entropy_coeff=actor("entropy_coeff"),
        use_kl_loss=actor("use_kl_loss"),
        kl_loss_coef=actor("kl_loss_coef"),
        kl_loss_type=actor("kl_loss_type"),
        grad_clip=actor("grad_clip"),
        weight_decay=actor("optim.weight_decay"),
        betas=(first, second),
        lr_scheduler_type=actor("optim.warmup_style") or actor("optim.lr_scheduler_type"),
        lr_warmup_steps=None if warmup < 0 else warmup,
        lr_warmup_steps_ratio=actor("optim.lr_warmup_steps_ratio"),
        min_lr_ratio=actor("optim.min_lr_ratio") or 0.0,
        num_cycles=actor("optim.num_cycles"),
    )


def problems(overrides: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong with settings of verl: the path of each, and a line."""
    given = _flat(overrides)
    for name, value in given.items():
        path = f"{PATH}.{name}"
        if name in VERL:
            try:
                if convert(VERL[name], as_given(value)) in VERL[name].later:
                    yield path, f"{value}: not implemented yet"
            except ValueError as error:
                yield path, str(error)
        elif name not in INSTEAD and name not in FILES and not _is_idle(name):
            yield path, _unknown(name)
    steps, mini = given.get("data.train_batch_size", 1024), given.get(f"{ACTOR}.ppo_mini_batch_size")
    if isinstance(steps, int) and isinstance(mini, int) and mini > steps:
        yield f"{PATH}.{ACTOR}.ppo_mini_batch_size", f"got {mini}; allowed: at most data.train_batch_size, {steps}"
    if str(given.get(f"{ROLLOUT}.do_sample", True)).lower() in FALSE:
        yield f"{PATH}.{ROLLOUT}.do_sample", "must stay true: answers to a prompt that are all alike teach nothing"
    betas = given.get(f"{ACTOR}.optim.betas", [0.9, 0.999])
    if not (
        isinstance(betas, list) and len(betas) == 2 and all(isinstance(b, float | int) and 0 <= b < 1 for b in betas)
    ):
        yield f"{PATH}.{ACTOR}.optim.betas", f"got {betas}; allowed: two numbers at least 0 and below 1"


def idle(overrides: Mapping[str, Any]) -> list[str]:
    """The settings that do nothing here."""
    return [name for name in _flat(overrides) if _is_idle(name)]


def moved(overrides: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Each setting that has a key of its own here: its name, that key, and what the key is to be; of files the entries
    of `datasets`.
    """
    given = {name: value for name, value in _flat(overrides).items() if value is not None}
    for name, target in (*INSTEAD.items(), *_BY_MEANING):
        if name in given:
            yield name, target, _meant(name, target, given[name])
    for name, split in FILES.items():
        if name in given:
            files = given[name] if isinstance(given[name], list) else [given[name]]
            entries = [{"dataset_name": "text_sft", "dataset_path": file} for file in files]
            yield name, f"data.{split}.datasets", entries


_BY_MEANING = (
    ("trainer.test_freq", "training.eval_strategy"),
    ("trainer.test_freq", "training.eval_steps"),
    ("trainer.resume_mode", "training.try_resume_from_last_checkpoint"),
    ("trainer.logger", "training.enable_wandb"),
    ("trainer.logger", "training.enable_tensorboard"),
)


def _meant(name: str, target: str, value: Any) -> Any:
    """What a value of verl's is in a key here that says it otherwise."""
    if name == "trainer.test_freq" and isinstance(value, int):
        return max(1, value) if target == "training.eval_steps" else "steps" if value > 0 else "no"
    if name == "trainer.resume_mode":
        return value == "auto"
    if name == "trainer.logger":
        return target.removeprefix("training.enable_") in (value if isinstance(value, list) else [value])
    return value


def _is_idle(name: str) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in IDLE)


def _unknown(name: str) -> str:
    if say := next((SAY[known] for known in SAY if name == known or name.startswith(f"{known}.")), None):
        return f"means nothing here; say {say}"
    names = (*VERL, *INSTEAD, *FILES, *IDLE)
    last = name.rpartition(".")[2]
    elsewhere = [known for known in names if known.rpartition(".")[2] == last]
    ends = {known.rpartition(".")[2]: known for known in names if known.rpartition(".")[0] == name.rpartition(".")[0]}
    near = ends.get(nearest(last, ends) or "") or next(iter(elsewhere), None) or nearest(name, names)
    return "means nothing here" + (f"; did you mean {near}?" if near else "; configs/verl.py lists what does")


def _flat(overrides: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Every setting under its dotted name; what VERL has as a mapping stays one."""
    flat: dict[str, Any] = {}
    for name, value in overrides.items():
        here = f"{path}.{name}" if path else str(name)
        whole = here in VERL and VERL[here].kind is dict
        flat |= _flat(value, here) if isinstance(value, Mapping) and not whole else {here: value}
    return flat
