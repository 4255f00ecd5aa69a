"""The table of keys: whole, consistent, and true to Oumi, transformers and TRL."""

import ast
import importlib.util
from pathlib import Path

import pytest

from configs import accepted
from configs.convert import NAMES, convert
from configs.default import SCHEMA, SPLIT, TRAINER_KWARGS, TRAINING, get_config
from configs.given import Given
from configs.key import LATER, NO_EFFECT, USED, Key, Same, find, leaves

ROWS = dict(leaves(SCHEMA))
KEYS = {path: key for path, key in ROWS.items() if isinstance(key, Key)}

# Oumi's names and defaults, section by section (its TrainingConfig of 2026).
OUMI = {
    "model.adapter_model": None,
    "model.attn_implementation": None,
    "model.chat_template": None,
    "model.compile": False,
    "model.device_map": "auto",
    "model.freeze_layers": [],
    "model.load_pretrained_weights": True,
    "model.model_max_length": None,
    "model.torch_dtype_str": "auto",
    "model.trust_remote_code": False,
    "data.train.collator_kwargs": {},
    "data.train.collator_name": None,
    "data.train.datasets[].dataset_kwargs": {},
    "data.train.datasets[].sample_count": None,
    "data.train.datasets[].shuffle_buffer_size": 1000,
    "data.train.datasets[].split": "train",
    "data.train.mixture_strategy": "first_exhausted",
    "data.train.pack": False,
    "data.train.stream": False,
    "training.adam_beta1": 0.9,
    "training.adam_beta2": 0.999,
    "training.adam_epsilon": 1e-8,
    "training.data_seed": 42,
    "training.dataloader_num_workers": 0,
    "training.dep_log_level": "warning",
    "training.enable_gradient_checkpointing": False,
    "training.enable_tensorboard": True,
    "training.enable_wandb": False,
    "training.eval_steps": 500,
    "training.eval_strategy": "no",
    "training.gradient_accumulation_steps": 1,
    "training.label_ignore_index": None,
    "training.learning_rate": 5e-5,
    "training.log_level": "info",
    "training.logging_steps": 50,
    "training.logging_strategy": "steps",
    "training.lr_scheduler_kwargs": {},
    "training.lr_scheduler_type": "linear",
    "training.max_grad_norm": 1.0,
    "training.max_steps": -1,
    "training.mixed_precision_dtype": "NONE",
    "training.num_train_epochs": 3.0,
    "training.optimizer": "adamw_torch",
    "training.output_dir": "output",
    "training.per_device_eval_batch_size": 8,
    "training.per_device_train_batch_size": 8,
    "training.reward_functions": None,
    "training.save_epoch": False,
    "training.save_final_model": True,
    "training.save_steps": 500,
    "training.seed": 42,
    "training.sgd_momentum": 0.0,
    "training.trainer_type": "HF",
    "training.warmup_ratio": None,
    "training.warmup_steps": None,
    "training.weight_decay": 0.0,
    "training.grpo.epsilon": 0.2,
    "training.grpo.max_completion_length": None,
    "training.grpo.temperature": 0.9,
    "training.gkd.max_new_tokens": 128,
    "training.gold.top_p": 0.95,
    "training.profiler.row_limit": 50,
    "training.profiler.schedule.active": 3,
    "training.telemetry.telemetry_dir": "telemetry",
    "peft.bnb_4bit_quant_type": "fp4",
    "peft.lora_alpha": 8,
    "peft.lora_init_weights": "DEFAULT",
    "peft.lora_r": 8,
    "peft.peft_save_mode": "ADAPTER_ONLY",
    "fsdp.auto_wrap_policy": "SIZE_BASED_WRAP",
    "fsdp.enable_fsdp": False,
    "fsdp.min_num_params": 100_000,
    "fsdp.sharding_strategy": "FULL_SHARD",
    "fsdp.state_dict_type": "FULL_STATE_DICT",
    "deepspeed.reduce_bucket_size": 500_000_000,
    "deepspeed.train_batch_size": "auto",
    "deepspeed.zero_stage": "ZERO_0",
}


def test_keys_have_the_defaults_they_have_in_oumi():
    assert {path: KEYS[path].default for path in OUMI} == OUMI


def test_every_row_is_whole():
    for path, key in KEYS.items():
        assert key.meaning, path
        assert not key.meaning.endswith("."), path
        assert key.choices or key.kind in NAMES, path
        assert key.effect in (USED, NO_EFFECT, LATER), path
        assert set(key.later) <= set(key.choices), path
        assert set(key.read_as.values()) <= set(key.choices), path
        assert not set(key.read_as) & set(key.choices), path


def test_every_default_is_a_value_of_its_key():
    for path, key in KEYS.items():
        if not key.required:
            assert convert(key, _given(key.default)) == key.default, path


def test_every_other_name_leads_to_a_key():
    for path, row in ROWS.items():
        if isinstance(row, Same):
            assert isinstance(find(SCHEMA, row.at(path.split(".")).split(".")), Key), path


def test_no_row_without_effect_hides_a_row_with_one():
    sections = {"model": accepted.MODEL, "training": accepted.TRAINING, "fsdp": accepted.FSDP}
    for name, rows in sections.items():
        for key in rows:
            assert find(SCHEMA, [name, key]) is rows[key]


def test_the_configuration_holds_every_key_with_its_default_and_refuses_others():
    config = get_config()
    assert config.training.learning_rate == 5e-5
    assert config.data.train.datasets == []
    assert config.mesh.to_dict() == dict.fromkeys(("data", "fsdp", "expert", "tensor", "context"))
    assert "max_length" not in config.data.train  # another name is no key
    with pytest.raises(AttributeError, match="learning_rte"):
        config.training.learning_rte = 1.0


def test_free_form_values_are_plain_dicts_and_not_shared():
    one, other = get_config(), get_config()
    one.model.model_kwargs["rope_theta"] = 1e6
    assert type(one.model.model_kwargs) is dict
    assert other.model.model_kwargs == {}


def test_the_test_split_takes_what_the_others_take_and_does_nothing_with_it():
    here, there = dict(leaves(SCHEMA["data"]["test"])), dict(leaves(SPLIT))
    assert here.keys() == there.keys()
    assert {key.effect for key in here.values() if isinstance(key, Key)} == {NO_EFFECT}


# The oracle for trainer_kwargs: the dataclasses themselves, read as text, for importing them takes ten seconds.
BY_METHOD = (
    *("packing_strategy", "loss_type", "train_sampling_strategy", "beta", "disable_dropout", "shuffle_dataset"),
    *("chat_template_kwargs", "vllm_importance_sampling_correction"),
)
OURS = {"count_position_zero", "answer_tokens", "shared_prompt"}
OLDER = {
    "rpo_alpha",
    "reference_free",
    "max_seq_length",
    "max_prompt_length",
    "include_tokens_per_second",
    "save_safetensors",
    "group_by_length",
}


def test_trainer_kwargs_are_named_as_in_trl_and_transformers():
    assert TRAINER_KWARGS.keys() - FIELDS.keys() == OURS | OLDER


def test_trainer_kwargs_have_the_defaults_of_trl_and_transformers():
    ours = {name: row.default for name, row in TRAINER_KWARGS.items() if isinstance(row, Key) and name in FIELDS}
    by_method = dict.fromkeys(BY_METHOD)  # see configs.derived
    assert ours == {name: FIELDS[name] for name in ours} | by_method


def test_words_that_name_code_are_the_names_the_code_has():
    from models.attention import BACKENDS
    from models.stack import REMAT

    assert set(KEYS["model.attn_implementation"].choices) == {"auto", *BACKENDS}
    assert set(KEYS["training.remat_policy"].choices) == {"none", *REMAT}


def test_what_oumi_fills_in_itself_is_no_trainer_kwarg():
    assert not {"learning_rate", "optim", "bf16", "seed", "logging_steps", "report_to"} & TRAINER_KWARGS.keys()
    assert {"learning_rate", "seed", "logging_steps"} <= TRAINING.keys()


def _fields(module: str, name: str) -> dict[str, object]:
    """Fields of a dataclass with their literal defaults, from its source."""
    package, *rest = module.split(".")
    file = Path(importlib.util.find_spec(package).origin).parent.joinpath(*rest).with_suffix(".py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    return {node.target.id: _default(node.value) for node in found.body if isinstance(node, ast.AnnAssign)}


def _default(node):
    if isinstance(node, ast.Call):
        words = {word.arg: word.value for word in node.keywords}
        if getattr(words.get("default_factory"), "id", None) == "list":
            return []
        node = words.get("default")
    return ast.literal_eval(node) if isinstance(node, ast.Constant | ast.UnaryOp) else None


def _given(value):
    if isinstance(value, dict):
        return Given({name: _given(item) for name, item in value.items()}, "")
    return Given([_given(item) for item in value] if isinstance(value, list) else value, "")


FIELDS = (
    _fields("trl.trainer.grpo_config", "GRPOConfig")
    | _fields("trl.experimental.cpo.cpo_config", "CPOConfig")
    | _fields("trl.trainer.kto_config", "KTOConfig")
    | _fields("trl.trainer.dpo_config", "DPOConfig")
    | _fields("transformers.training_args", "TrainingArguments")
    | _fields("trl.trainer.sft_config", "SFTConfig")
)
