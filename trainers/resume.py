"""May a run go on from that checkpoint: what differs between the settings it was saved with and those of now.

What decides data, model or batch may not change unawares, since the saved position in the data, the optimizer's moments
and the parameters would then belong to another run. The rest (learning rate, number of steps, …) may, and is told.
Settings of where things go and what is shown are not compared.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

# Dotted prefixes. The first list that holds a key decides.
_NOT_COMPARED = (
    "data.validation",
    "data.test",
    "model.compile",
    "model.device_map",
    "model.enable_liger_kernel",
    "model.shard_for_eval",
    "model.trust_remote_code",
    "training.output_dir",
    "training.run_name",
    "training.resume_from_checkpoint",
    "training.try_resume_from_last_checkpoint",
    "training.save_final_model",
    "training.keep_checkpoints",
    "training.logging_dir",
    "training.logging_strategy",
    "training.logging_steps",
    "training.logging_first_step",
    "training.log_level",
    "training.dep_log_level",
    "training.log_examples",
    "training.log_model_summary",
    "training.compile_cache_dir",
    "training.enable_tensorboard",
    "training.enable_wandb",
    "training.enable_mlflow",
    "training.dataloader_num_workers",
    "training.dataloader_prefetch_factor",
    "training.telemetry",
    "training.reward_timeout",
    "training.reward_workers",
    "training.grpo.log_completions",
    "training.profiler",
)
_ONLY_TOLD = ("model.attn_implementation",)
_BATCH = ("training.per_device_train_batch_size", "training.gradient_accumulation_steps", "mesh", "fsdp", "deepspeed")
_DECISIVE = (
    "model",
    "data",
    "peft",
    "training.trainer_type",
    "training.use_peft",
    "training.optimizer",
    "training.seed",
    "training.data_seed",
    "training.mixed_precision_dtype",
    "training.trainer_kwargs",
    "training.label_ignore_index",
    "training.reward_functions",
    "training.reward_function_kwargs",
    "training.grpo",
    "training.verl_config_overrides",
)


class Differences(NamedTuple):
    """Lines `key: saved -> now`: those that decide data, model or batch, and all others that are compared."""

    decisive: tuple[str, ...]
    harmless: tuple[str, ...]


def compare_configs(saved: Mapping[str, Any], now: Mapping[str, Any], *, same_rows_per_step: bool) -> Differences:
    """What differs between two plain config dicts (nested, names of the schema).

    `same_rows_per_step`: whether the rows of one optimizer step, over all devices and microbatches, are as many as they
    were. If so, another mesh, microbatch or accumulation is harmless; if not, it is decisive.
    """
    decisive: list[str] = []
    harmless: list[str] = []
    for key, before, after in _changes("", saved, now):
        line = f"{key}: {before} -> {after}"
        if _under(key, _NOT_COMPARED):
            continue
        if _under(key, _BATCH):
            (harmless if same_rows_per_step else decisive).append(line)
        elif _under(key, _DECISIVE) and not _under(key, _ONLY_TOLD):
            decisive.append(line)
        else:
            harmless.append(line)
    return Differences(tuple(decisive), tuple(harmless))


def refuse_other_config(
    saved: Mapping[str, Any], now: Mapping[str, Any], *, same_rows_per_step: bool, allowed: bool, how_to_allow: str
) -> tuple[str, ...]:
    """Raises ValueError for decisive differences unless `allowed`; returns the differences to be told.

    `how_to_allow` ends the message, such as "pass --allow-config-change".
    """
    found = compare_configs(saved, now, same_rows_per_step=same_rows_per_step)
    if found.decisive and not allowed:
        raise ValueError(
            "the checkpoint was saved with other settings of data, model or batch:\n  "
            + "\n  ".join(found.decisive)
            + f"\nSet them back, start afresh in another training.output_dir, or {how_to_allow}"
        )
    return found.decisive + found.harmless


def _under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith((f"{prefix}.", f"{prefix}[")) for prefix in prefixes)


def _changes(key: str, saved: Any, now: Any) -> Iterator[tuple[str, str, str]]:
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        for name in [*saved, *(name for name in now if name not in saved)]:
            yield from _changes(f"{key}.{name}".lstrip("."), saved.get(name, _Absent), now.get(name, _Absent))
    elif isinstance(saved, (list, tuple)) and isinstance(now, (list, tuple)) and len(saved) == len(now):
        for index, pair in enumerate(zip(saved, now, strict=True)):
            yield from _changes(f"{key}[{index}]", *pair)
    elif saved != now or (saved is _Absent) != (now is _Absent):
        yield key, _shown(saved), _shown(now)


class _Absent:
    """Stands for a key that one side does not have."""


def _shown(value: Any) -> str:
    text = "(not set)" if value is _Absent else "null" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
