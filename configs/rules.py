"""What one key says about another: problems a run must not start with, and remarks for the log."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from configs import verl
from configs.default import DATASET, SCHEMA
from configs.derived import AXES, loss_types, max_length, run_name
from configs.key import LATER, NO_EFFECT, Key, settings
from configs.methods import DPO_LOSSES, GRPO, GRPO_LOSSES, KTO_LOSSES, PREFERENCE, SFT_LOSSES
from configs.yaml_text import written

SPLITS = ("train", "validation", "test")
COMPLETIONS = "text_completions_only_with_padding"

Lines = Iterator[tuple[str, str]]  # the path a line is about, and the line behind it


class Rule(NamedTuple):
    """A check and the keys it reads: it is left out where one of them is wrong already."""

    reads: tuple[str, ...]
    check: Callable[[Any], Lines]


def problems(config: Any, *, wrong: set[str]) -> list[tuple[str, str]]:
    """Every rule's lines, but for rules that read a key that is wrong already."""
    return [line for rule in RULES if not wrong.intersection(rule.reads) for line in rule.check(config)]


def unimplemented(config: Any) -> list[tuple[str, str]]:
    """A line for each setting that is to come; of a method that is to come, only the method."""
    method = config.training.trainer_type
    later = SCHEMA["training"]["trainer_type"].later
    if method in later:
        now = ", ".join(word for word in SCHEMA["training"]["trainer_type"].kind if word not in later)
        return [("training.trainer_type", f"{method}; works now: {now}")]
    return [(path, written(value)) for path, key, value in settings(SCHEMA, config) if _is_later(key, value)]


def remarks(config: Any, origin: dict[str, str]) -> list[str]:
    """What is worth a line of the log: settings without effect, and settings that give way to others."""
    method = config.training.trainer_type
    changed = [(path, key) for path, key, value in settings(SCHEMA, config) if value != key.default]
    idle = [path for path, key in changed if key.effect == NO_EFFECT]
    others = [path for path, key in changed if key.only and method not in key.only]
    lines = [f"no effect here: {', '.join(idle)}"] if idle else []
    lines += [f"no effect with training.trainer_type {method}: {', '.join(others)}"] if others else []
    return lines + [f"{path}: {text}" for remark in REMARKS for path, text in remark(config, origin)]


def _is_later(key: Key, value: Any) -> bool:
    return value in key.later if key.later else key.effect == LATER and value != key.default


def _some_data(config: Any) -> Lines:
    if not config.data.train.datasets:
        yield "data.train.datasets", "missing; give at least one dataset"


def _some_steps(config: Any) -> Lines:
    training = config.training
    if training.max_steps <= 0 and training.num_train_epochs <= 0 and training.max_tokens is None:
        yield "training.max_steps", "neither max_steps nor num_train_epochs is above 0; set one"


def _steps_or_tokens(config: Any) -> Lines:
    training, options = config.training, config.training.lr_scheduler_kwargs
    warmup_too = bool(training.warmup_steps or training.warmup_ratio)
    in_tokens = [  # (name, value, what says the same in steps, whether that is set too)
        ("max_tokens", training.max_tokens, "max_steps", training.max_steps > 0),
        ("warmup_tokens", training.warmup_tokens, "warmup_steps or warmup_ratio", warmup_too),
    ]
    for part in ("decay", "stable"):
        name, other = f"num_{part}_tokens", f"num_{part}_steps"
        in_tokens.append((f"lr_scheduler_kwargs.{name}", options.get(name), other, other in options))
    for name, value, other, set_too in in_tokens:
        if value is not None and set_too:
            yield f"training.{name}", f"{other} is set too; choose one"
        elif value is not None and not config.data.train.pack:
            yield f"training.{name}", "needs rows of one length; set data.train.pack: true, or say it in steps"


def _compile_is_training(config: Any) -> Lines:
    if config.model.compile:
        yield "model.compile", "must stay false; say training.compile"


def _one_sharding(config: Any) -> Lines:
    if config.fsdp.enable_fsdp and config.deepspeed.enable_deepspeed:
        yield "deepspeed.enable_deepspeed", "fsdp.enable_fsdp is true too; choose one"


def _deepspeed_batch(config: Any) -> Lines:
    if config.deepspeed.enable_deepspeed and config.deepspeed.train_batch_size != "auto":
        yield "deepspeed.train_batch_size", "must be auto; say training.per_device_train_batch_size"


def _offload(config: Any) -> Lines:
    deepspeed = config.deepspeed
    device = (deepspeed.offload_optimizer or {}).get("device", "none")
    if device == "nvme":
        yield "deepspeed.offload_optimizer.device", "not implemented yet: nvme; allowed: cpu, none"
    elif device not in ("cpu", "none"):
        yield "deepspeed.offload_optimizer.device", f"got {written(device)}; allowed: cpu, none"
    elif device == "cpu" and (not deepspeed.enable_deepspeed or deepspeed.zero_stage == "ZERO_0"):
        yield "deepspeed.offload_optimizer", "needs enable_deepspeed: true and a zero_stage of ZERO_1 or more"


def _mixed_precision(config: Any) -> Lines:
    asked, dtype = config.training.mixed_precision_dtype, config.model.torch_dtype_str
    if asked != "NONE" and dtype != "float32":
        yield "training.mixed_precision_dtype", f"{asked} needs model.torch_dtype_str: float32, not {dtype}"


def _something_to_evaluate(config: Any) -> Lines:
    if config.training.eval_strategy != "no" and not config.data.validation.datasets:
        yield "training.eval_strategy", f"{config.training.eval_strategy} needs data.validation.datasets"


def _one_collator(config: Any) -> Lines:
    names = {split: config.data[split].collator_name for split in SPLITS}
    for split in SPLITS[1:]:
        if names[split] not in (None, names["train"]):
            yield (
                f"data.{split}.collator_name",
                f"{names[split]}, but data.train has {names['train'] or 'none'}; say one",
            )


def _what_to_train(config: Any) -> Lines:
    train = config.data.train
    if train.train_target and train.collator_name != COMPLETIONS:
        yield "data.train.train_target", f"needs data.train.collator_name: {COMPLETIONS}"
    if (
        train.collator_name == COMPLETIONS
        and not train.train_target
        and "response_template" not in train.collator_kwargs
    ):
        yield "data.train.collator_name", f"{COMPLETIONS} needs data.train.train_target, such as ALL_ASSISTANT_TURNS"


def _dataset_kwargs(config: Any) -> Lines:
    for split in SPLITS:
        for number, dataset in enumerate(config.data[split].datasets):
            here = f"data.{split}.datasets[{number}]"
            for name in sorted(DATASET.keys() & dataset.dataset_kwargs.keys()):
                yield f"{here}.dataset_kwargs", f"{name} is a key of its own; say {here}.{name}"


def _length_to_pack(config: Any) -> Lines:
    for split in ("train", "validation"):
        if config.data[split].pack and max_length(config) is None:
            yield f"data.{split}.pack", "needs a length; set model.model_max_length"


def _losses(config: Any) -> Lines:
    method, names = config.training.trainer_type, loss_types(config)
    path = "training.trainer_kwargs.loss_type"
    by_method = {"TRL_DPO": DPO_LOSSES, "TRL_KTO": KTO_LOSSES, "TRL_GRPO": GRPO_LOSSES}
    allowed = by_method.get(method, SFT_LOSSES)
    if method == "VERL_GRPO":
        if config.training.trainer_kwargs.loss_type is not None:
            yield path, f"is for TRL's methods; say {verl.PATH}.{verl.ACTOR}.policy_loss.loss_mode"
    elif unknown := [name for name in names if name not in allowed]:
        yield path, f"got {', '.join(unknown)}; allowed with trainer_type {method}: {', '.join(allowed)}"
    elif len(names) != 1 and method != "TRL_DPO":
        yield path, f"got {len(names)} of them; allowed with trainer_type {method}: one"


def _smoothing(config: Any) -> Lines:
    if config.training.trainer_kwargs.label_smoothing_factor and loss_types(config) == ("dft",):
        yield "training.trainer_kwargs.label_smoothing_factor", "is for loss_type nll, not dft"


def _answers(config: Any) -> Lines:
    """What learning from preferences does not do, and what only it does."""
    method = config.training.trainer_type
    for split in ("train", "validation"):
        part = config.data[split]
        if method not in PREFERENCE:
            if part.collator_name == "dpo_with_padding":
                yield (
                    f"data.{split}.collator_name",
                    f"dpo_with_padding needs training.trainer_type TRL_DPO, not {method}",
                )
            continue
        if part.collator_name == COMPLETIONS:
            yield f"data.{split}.collator_name", f"{method} always trains answers; say dpo_with_padding, or nothing"
        for name in ("pack", "stream"):
            if part[name]:
                yield f"data.{split}.{name}", f"not implemented yet with training.trainer_type {method}"
    kwargs = config.training.trainer_kwargs
    if method in PREFERENCE and kwargs.beta == 0:
        yield "training.trainer_kwargs.beta", f"got 0; allowed with trainer_type {method}: a number above 0"
    if method in PREFERENCE and kwargs.precompute_ref_log_probs and kwargs.sync_ref_model:
        yield "training.trainer_kwargs.precompute_ref_log_probs", "sync_ref_model changes the reference; choose one"


def _rewards(config: Any) -> Lines:
    training, path = config.training, "training.reward_functions"
    functions, method = training.reward_functions or [], training.trainer_type
    if method not in GRPO:
        if functions:
            yield path, f"needs training.trainer_type {' or '.join(GRPO)}"
        return
    if not functions:
        yield path, f"{method} needs what scores answers; name a reward function, or a file.py:function of yours"
    elif method == "VERL_GRPO" and len(functions) > 1:
        yield path, f"got {len(functions)}; allowed with trainer_type {method}: one"
    for name in sorted(training.reward_function_kwargs.keys() - set(functions)):
        yield f"training.reward_function_kwargs.{name}", f"is none of training.reward_functions: {written(functions)}"
    weights = training.trainer_kwargs.reward_weights
    if weights is not None and len(weights) != len(functions):
        yield (
            "training.trainer_kwargs.reward_weights",
            f"got {len(weights)}; allowed: one for each of {written(functions)}",
        )


def _answers_of_its_own(config: Any) -> Lines:
    """What learning from answers of its own needs, and what it does not do."""
    training, method = config.training, config.training.trainer_type
    if method not in GRPO:
        if training.trainer_kwargs.shuffle_dataset:
            yield "training.trainer_kwargs.shuffle_dataset", f"not implemented yet with training.trainer_type {method}"
        return
    for split in ("train", "validation"):
        part = config.data[split]
        if part.collator_name:
            yield f"data.{split}.collator_name", f"{method} asks prompts, and collates its own answers; take it out"
        for name in ("pack", "stream"):
            if part[name]:
                yield f"data.{split}.{name}", f"not implemented yet with training.trainer_type {method}"
    if training.grpo.num_generations == 1:
        yield (
            "training.grpo.num_generations",
            "got 1; allowed: at least 2, since the answers to a prompt are compared with one another",
        )
    kwargs = training.trainer_kwargs
    if method == "TRL_GRPO" and kwargs.generation_batch_size and kwargs.steps_per_generation:
        yield "training.trainer_kwargs.generation_batch_size", "steps_per_generation is set too; choose one"
    for name, value in (kwargs.generation_kwargs or {}).items():
        path = f"training.trainer_kwargs.generation_kwargs.{name}"
        if name != "stop_strings":
            yield path, "say it as a key of training.trainer_kwargs or training.grpo; allowed here: stop_strings"
        elif not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            yield path, f"got {written(value)}; allowed: a list of words"


def _verls(config: Any) -> Lines:
    if config.training.trainer_type == "VERL_GRPO":
        yield from verl.problems(config.training.verl_config_overrides)


def _bits(config: Any) -> Lines:
    if (bits := config.peft.q_lora_bits) not in (4, 8):
        yield "peft.q_lora_bits", f"got {bits}; allowed: 4, 8"


def _pretrained_base(config: Any) -> Lines:
    model = config.model
    for path, given in (
        ("training.use_peft", config.training.use_peft),
        ("model.adapter_model", model.adapter_model),
        ("model.freeze_layers", model.freeze_layers),
    ):
        if given and not model.load_pretrained_weights:
            yield path, "keeps weights as they are in the model's files; set model.load_pretrained_weights: true"


def _mesh(config: Any) -> Lines:
    sizes = {axis: size for axis, size in config.mesh.items() if size is not None}
    for axis, size in sizes.items():
        if size == 0:
            yield f"mesh.{axis}", "got 0; allowed: at least 1, or -1 for all devices that are left"
    if list(sizes.values()).count(-1) > 1:
        yield "mesh", f"got -1 for {' and '.join(axis for axis in sizes if sizes[axis] == -1)}; allowed: one -1"


RULES = (
    Rule(("data.train.datasets",), _some_data),
    Rule(("training.max_steps", "training.num_train_epochs", "training.max_tokens"), _some_steps),
    Rule(
        (*(f"training.{name}" for name in ("max_steps", "max_tokens", "warmup_tokens", "lr_scheduler_kwargs")),),
        _steps_or_tokens,
    ),
    Rule(("model.compile",), _compile_is_training),
    Rule(("fsdp.enable_fsdp", "deepspeed.enable_deepspeed"), _one_sharding),
    Rule(("deepspeed.enable_deepspeed", "deepspeed.train_batch_size"), _deepspeed_batch),
    Rule(("deepspeed.enable_deepspeed", "deepspeed.offload_optimizer"), _offload),
    Rule(("training.mixed_precision_dtype", "model.torch_dtype_str"), _mixed_precision),
    Rule(("training.eval_strategy", "data.validation.datasets"), _something_to_evaluate),
    Rule(tuple(f"data.{split}.collator_name" for split in SPLITS), _one_collator),
    Rule(("data.train.collator_name", "data.train.train_target", "data.train.collator_kwargs"), _what_to_train),
    Rule((), _dataset_kwargs),
    Rule(("model.model_max_length", "training.trainer_kwargs.max_length"), _length_to_pack),
    Rule(("training.trainer_kwargs.loss_type", "training.trainer_type"), _losses),
    Rule(("training.trainer_kwargs.loss_type", "training.trainer_kwargs.label_smoothing_factor"), _smoothing),
    Rule(("training.trainer_type", "data.train.collator_name", "data.validation.collator_name"), _answers),
    Rule(("training.reward_functions", "training.trainer_type", "training.trainer_kwargs.reward_weights"), _rewards),
    Rule(
        (
            *("training.trainer_type", "training.grpo.num_generations"),
            *(f"training.trainer_kwargs.{n}" for n in ("generation_kwargs", "generation_batch_size")),
        ),
        _answers_of_its_own,
    ),
    Rule(("training.trainer_type", "training.verl_config_overrides"), _verls),
    Rule(("training.use_peft", "model.freeze_layers", "model.load_pretrained_weights"), _pretrained_base),
    Rule(("peft.q_lora_bits",), _bits),
    Rule(tuple(f"mesh.{axis}" for axis in AXES), _mesh),
)


def _length_gives_way(config: Any, origin: dict[str, str]) -> Lines:
    length, other = config.model.model_max_length, config.training.trainer_kwargs.max_length
    if length is not None and "training.trainer_kwargs.max_length" in origin and other != length:
        yield "training.trainer_kwargs.max_length", f"{written(other)} gives way to model.model_max_length: {length}"


def _ratio_gives_way(config: Any, origin: dict[str, str]) -> Lines:
    if config.training.warmup_steps is not None and config.training.warmup_ratio is not None:
        yield "training.warmup_ratio", f"gives way to training.warmup_steps: {config.training.warmup_steps}"


def _epoch_gives_way(config: Any, origin: dict[str, str]) -> Lines:
    if config.training.save_epoch and config.training.save_steps > 0:
        yield "training.save_epoch", f"gives way to training.save_steps: {config.training.save_steps}; set that to 0"


def _clean_name(config: Any, origin: dict[str, str]) -> Lines:
    if run_name(config) != config.training.run_name:
        yield "training.run_name", f"is written {run_name(config)}"


def _adapter_asked_for(config: Any, origin: dict[str, str]) -> Lines:
    if not config.training.use_peft and (idle := sorted(path for path in origin if path.startswith("peft."))):
        yield ", ".join(idle), "no effect without training.use_peft"


def _not_verls(config: Any, origin: dict[str, str]) -> Lines:
    """Of verl's settings those that do nothing, and the keys that they stand in the place of."""
    if config.training.trainer_type != "VERL_GRPO":
        return
    if idle := verl.idle(config.training.verl_config_overrides):
        yield verl.PATH, f"no effect here: {', '.join(idle)}"
    for name, theirs in verl.IN_PLACE_OF.items():
        if name in origin:
            yield name, f"no effect with training.trainer_type VERL_GRPO; say {verl.PATH}.{theirs}"


REMARKS = (_not_verls, _adapter_asked_for, _length_gives_way, _ratio_gives_way, _epoch_gives_way, _clean_name)
