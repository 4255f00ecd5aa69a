"""Files written for Oumi: those of its page on training methods, as they stand there, and a recipe of the usual kind.

What belongs to a method that is to come fails with that method's name and nothing else.
"""

import pytest

from configs.load import load

MODEL = "--model.model_name=some/model"  # the page's snippets leave the model out

SFT = """
data:
  train:
    datasets:
      - dataset_name: "text_sft"
        dataset_path: "/path/to/data"
        split: "train"
    collator_name: "text_with_padding"

training:
  trainer_type: "TRL_SFT"
"""

VISION = """
model:
  model_name: "meta-llama/Llama-3.2-11B-Vision-Instruct"
  chat_template: "llama3-instruct"
  freeze_layers: ["vision_encoder"]

data:
  train:
    collator_name: "vision_language_with_padding"
    collator_kwargs: {}
    datasets:
      - dataset_name: "vl_sft_jsonl"
        dataset_path: "/path/to/data"
        trust_remote_code: False
        dataset_kwargs:
          processor_name: "meta-llama/Llama-3.2-11B-Vision-Instruct"

training:
  trainer_type: "TRL_SFT"
"""

PRETRAINING = """
data:
  train:
    datasets:
      - dataset_name: "text"
        dataset_path: "/path/to/corpus"
        streaming: true
    pack: true
    max_length: 2048

training:
  trainer_type: "OUMI"
"""

DPO = """
data:
  train:
    datasets:
      - dataset_name: "preference_pairs_jsonl"
        dataset_path: "/path/to/data"
    collator_name: "dpo_with_padding"

training:
  trainer_type: "TRL_DPO"
"""

GRPO = """
model:
  model_name: "Qwen/Qwen2-0.5B-Instruct"

data:
  train:
    datasets:
      - dataset_name: "trl-lib/tldr"
        split: "train"

training:
  trainer_type: "TRL_GRPO"
  reward_functions: ["soft_20tokens_completions"]

  grpo:
    use_vllm: True
"""

VERL = """
model:
  model_name: "Qwen/Qwen2-0.5B-Instruct"

data:
  train:
    datasets:
      - dataset_name: "Jiayi-Pan/Countdown-Tasks-3to4"
        split: "train"
  validation:
    datasets:
      - dataset_name: "Jiayi-Pan/Countdown-Tasks-3to4"
        split: "test"

training:
  trainer_type: "VERL_GRPO"
  reward_functions: ["countdown"]

  grpo:
    use_vllm: True

  verl_config_overrides:
    data:
      train_batch_size: 128
"""

RECIPE = """
model:
  model_name: HuggingFaceTB/SmolLM2-135M-Instruct
  model_max_length: 2048
  torch_dtype_str: bfloat16
  attn_implementation: sdpa
  load_pretrained_weights: True
  trust_remote_code: True
  enable_liger_kernel: True

data:
  train:
    datasets:
      - dataset_name: yahma/alpaca-cleaned
        split: train[:512]
    target_col: prompt

training:
  trainer_type: TRL_SFT
  save_steps: 0
  num_train_epochs: 3
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 4
  enable_gradient_checkpointing: True
  gradient_checkpointing_kwargs:
    use_reentrant: False
  ddp_find_unused_parameters: False
  optimizer: adamw_torch_fused
  learning_rate: 2.0e-05
  lr_scheduler_type: cosine_with_min_lr
  lr_scheduler_kwargs:
    min_lr_rate: 0.1
  warmup_ratio: 0.02
  max_grad_norm: 0
  compile: False
  dataloader_num_workers: auto
  dataloader_prefetch_factor: 32
  empty_device_cache_steps: 50
  output_dir: output/smollm135m.fft
  include_performance_metrics: True
  enable_wandb: True

fsdp:
  enable_fsdp: True
  sharding_strategy: HYBRID_SHARD
  forward_prefetch: True
  auto_wrap_policy: TRANSFORMER_BASED_WRAP
  transformer_layer_cls: LlamaDecoderLayer
"""


@pytest.fixture
def source(tmp_path):
    """Writes a configuration and gives its path."""

    def write(text: str) -> str:
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return str(tmp_path / "run.yaml")

    return write


def test_the_page_on_sft_loads_as_written(source):
    loaded = load(source(SFT), [MODEL])
    assert loaded.config.data.train.datasets[0].dataset_path == "/path/to/data"
    assert loaded.config.data.train.collator_name == "text_with_padding"
    assert loaded.config.training.trainer_type == "TRL_SFT"
    assert loaded.notices == ()


def test_the_page_on_pictures_loads_as_written(source):
    loaded = load(source(VISION))
    assert loaded.config.data.train.collator_name == "vision_language_with_padding"
    assert loaded.config.data.train.datasets[0].dataset_name == "vl_sft_jsonl"
    assert loaded.notices == ()


@pytest.mark.parametrize(("text", "method"), [(GRPO, "TRL_GRPO"), (VERL, "VERL_GRPO")], ids=["trl", "verl"])
def test_the_page_on_rewards_loads_as_it_stands(source, text, method):
    config = load(source(text)).config
    assert config.training.trainer_type == method
    assert len(config.training.reward_functions) == 1


def test_the_page_on_preferences_loads_as_it_stands(source):
    config = load(source(DPO), [MODEL]).config
    assert (config.training.trainer_type, config.data.train.collator_name) == ("TRL_DPO", "dpo_with_padding")


def test_wsd_is_read_as_the_schedule_transformers_calls_by_its_long_name(source):
    loaded = load(source(SFT), [MODEL, "--training.lr_scheduler_type=wsd"])
    assert loaded.config.training.lr_scheduler_type == "warmup_stable_decay"


def test_the_page_on_pretraining_sets_the_length_and_packs(source):
    loaded = load(source(PRETRAINING), [MODEL])
    assert loaded.config.training.trainer_type == "OUMI"
    assert loaded.config.model.model_max_length == 2048
    assert loaded.config.data.train.pack is True
    assert loaded.config.data.train.stream is True


def test_a_recipe_of_the_usual_kind_loads_as_written(source):
    loaded = load(source(RECIPE))
    assert loaded.config.training.max_grad_norm == 0.0
    assert loaded.config.training.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert loaded.notices == (
        "model.attn_implementation: sdpa is read as auto",
        "no effect here: model.trust_remote_code, model.enable_liger_kernel, data.train.target_col,"
        " training.gradient_checkpointing_kwargs, training.include_performance_metrics,"
        " training.dataloader_prefetch_factor, training.ddp_find_unused_parameters, training.empty_device_cache_steps,"
        " fsdp.auto_wrap_policy, fsdp.transformer_layer_cls, fsdp.forward_prefetch",
    )
