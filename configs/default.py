"""Every key of a configuration that does something: its default, what it takes, what it means.

The names and defaults are Oumi's; `mesh` and the keys whose meaning begins with "ours:" are added. A row reads

    "name": Key(default, type or the words allowed, "meaning")    the code reads it; a test fails if nothing does
    "name": later(…)                                              set to anything else, it is "not implemented yet"
    "name": no_effect(…)                                          set to anything else, it is listed once in the log
    "name": Same("other.key", "meaning")                          another name of that key

and takes null if its default is null. The rows without effect stand in `accepted.py`, those of single methods in
`methods.py`. A new key is a row here, read where it acts as `section.key`.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import accepted, methods
from configs.key import Items, Key, Same, Table, defaults, later, without_effect

TRAINERS_LATER = ("TRL_GKD", "TRL_GOLD")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64", "uint8")
DTYPE_NAMES = {
    **dict.fromkeys(("f32", "float"), "float32"),
    **dict.fromkeys(("bf16",), "bfloat16"),
    **dict.fromkeys(("f16", "half"), "float16"),
    **dict.fromkeys(("f64", "double"), "float64"),
}
ATTENTION_NAMES = {
    **dict.fromkeys(("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"), "auto"),
    **dict.fromkeys(("eager",), "xla"),
}
WITH_PICTURES = ("vision_language_with_padding", "vision_language_sft")
OPTIMIZERS = (
    *("adamw_torch", "adamw", "adam", "sgd", "adafactor", "lion"),
    *("adamw_torch_fused", "adamw_torch_xla", "adamw_torch_4bit", "adamw_torch_8bit", "adamw_8bit", "adamw_bnb_8bit"),
    *("paged_adamw", "paged_adamw_32bit", "paged_adamw_8bit"),
    *("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"),
)
SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "constant"),
    *("constant_with_warmup", "polynomial", "inverse_sqrt", "warmup_stable_decay"),
)
LEVELS = ("debug", "info", "warning", "error", "critical")
STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2", "NO_SHARD")
WHEN = ("no", "steps", "epoch")

MODEL: Table = {
    "model_name": Key(None, str, "hub name, or folder, of the model to train", required=True),
    "model_revision": Key(None, str, "branch, tag or commit of the model on the hub"),
    "tokenizer_name": Key(None, str, "hub name, or folder, of the tokenizer; null: the model's own"),
    "tokenizer_pad_token": Key(None, str, "token that pads; null: the tokenizer's own"),
    "tokenizer_kwargs": Key({}, dict, "further arguments of the tokenizer"),
    "model_max_length": Key(None, int, "longest row in tokens; null: training.trainer_kwargs.max_length", low=1),
    "load_pretrained_weights": Key(True, bool, "read the model's weights; false: draw them at random"),
    "torch_dtype_str": Key(
        "auto",
        DTYPES,
        "dtype of parameters and optimizer state; auto: the checkpoint's",
        read_as=DTYPE_NAMES,
        later=("float16", "float64", "uint8"),
    ),
    "attn_implementation": Key(
        None,
        ("auto", "splash", "cudnn", "triton", "xla"),
        "kernel of attention (splash: TPUs; cudnn, triton: GPUs; xla: none), what it leaves the next; null: auto",
        read_as=ATTENTION_NAMES,
    ),
    "chat_template": Key(None, str, "name or file of a chat template; auto or null: the tokenizer's own"),
    "model_kwargs": Key({}, dict, "fields of the model's config.json to change"),
    "adapter_model": Key(None, str, "folder of a LoRA adapter to start from"),
    "freeze_layers": Key([], list, "parts of the model that stay as they are, such as model.embed_tokens"),
    "processor_name": Key(None, str, "hub name, or folder, with the image processor's settings; null: the model's"),
    "processor_kwargs": Key({}, dict, "settings of the image processor to change"),
    **accepted.MODEL,
}

DATASET: Table = {
    "dataset_name": Key(None, str, "a format of rows (text_sft, …), or a dataset on the hub", required=True),
    "dataset_path": Key(None, str, "file or folder that holds the rows"),
    "subset": Key(None, str, "configuration of a dataset on the hub"),
    "split": Key("train", str, "split to read; slices such as train[:512] too"),
    "dataset_kwargs": Key({}, dict, "options of the format"),
    "sample_count": Key(None, int, "rows to take; where there are fewer, they repeat", low=0),
    "shuffle": Key(False, bool, "shuffle before taking sample_count rows"),
    "seed": Key(None, int, "seed of that shuffle; null: training.data_seed"),
    "mixture_proportion": Key(
        None, float, "share of the split's rows; for all of its datasets, or none", low=0, high=1
    ),
    "shuffle_buffer_size": Key(1000, int, "rows of a stream that are shuffled among one another", low=1),
    "transform_num_workers": Key(None, int, "processes that tokenize; null: auto", words=("auto",), low=1),
    "streaming": Same("data.<split>.stream", "the documentation's name of it"),
    **accepted.DATASET,
}

SPLIT: Table = {
    "datasets": Items(DATASET),
    "collator_name": Key(
        None,
        ("text_with_padding", "text_completions_only_with_padding", "dpo_with_padding", *WITH_PICTURES),
        "which tokens are trained: all (also null), or completions only; dpo_with_padding: answers, as TRL_DPO has it",
    ),
    "collator_kwargs": Key({}, dict, "options of the collator, such as response_template"),
    "train_target": Key(
        None,
        ("ALL_ASSISTANT_TURNS", "FINAL_ASSISTANT_TURN"),
        "the turns which collator_name text_completions_only_with_padding trains",
    ),
    "pack": Key(False, bool, "put several rows into one of model_max_length tokens"),
    "isolate_documents": Key(
        True, bool, "ours: rows packed into one do not see one another; false: they do, as in older pretraining"
    ),
    "on_bad_row": Key(
        "raise", ("raise", "skip"), "ours: a row that cannot be used is an error, or skipped and counted"
    ),
    "max_bad_row_fraction": Key(
        0.1, float, "ours: with on_bad_row skip, more bad rows than this share end the run", low=0, high=1
    ),
    "image_root": Key(None, str, "ours: folder below which pictures of rows are; null: that of the rows' file"),
    "allow_remote_images": Key(False, bool, "ours: fetch pictures of rows from public https addresses"),
    "max_image_pixels": Key(50_000_000, int, "ours: the largest picture of a row", low=1),
    "max_image_bytes": Key(20_000_000, int, "ours: the largest file of a picture", low=1),
    "max_images_per_row": Key(16, int, "ours: the most pictures of a row", low=1),
    "stream": Key(False, bool, "read rows as they come; without training.max_steps, those on disk are counted first"),
    "mixture_strategy": Key(
        "first_exhausted", ("first_exhausted", "all_exhausted"), "a mixture ends when one dataset has, or when all have"
    ),
    "seed": Key(None, int, "seed of the mixture; null: training.data_seed"),
    "max_length": Same("model.model_max_length", "the documentation's name of it"),
    **accepted.SPLIT,
}

# What TrainingArguments and SFTConfig know and no other section says: a list of what is taken, not an open door.
TRAINER_KWARGS: Table = {
    "max_length": Key(1024, int, "longest row in tokens, without model.model_max_length", low=1, null=True),
    "completion_only_loss": Key(None, bool, "prompt and completion rows: train the completion only; null: yes"),
    "assistant_only_loss": Key(False, bool, "conversations: train the assistant's turns only"),
    "dataset_text_field": Key("text", str, "column of plain text rows"),
    "train_sampling_strategy": Key(
        None,
        ("random", "sequential", "group_by_length"),
        "order of an epoch's rows; null: random, for TRL_KTO sequential",
        later=("group_by_length",),
    ),
    "dataloader_drop_last": Key(False, bool, "leave out an epoch's last batch if it is not full"),
    "loss_type": Key(
        None,
        list,
        "SFT: nll (-log p) or dft (-p log p with p held fixed). DPO: one or several. null: nll, sigmoid, kto, dapo",
        words=(*methods.SFT_LOSSES, *methods.DPO_LOSSES, *methods.KTO_LOSSES, *methods.GRPO_LOSSES),
    ),
    "label_smoothing_factor": Key(0.0, float, "share of the loss spread over all tokens", low=0, below=1),
    "packing_strategy": Key(
        None,
        ("bfd", "bfd_split", "wrapped"),
        "how pack packs: best fit of whole rows, the same after cutting long ones, or all on end, cut anywhere; null: "
        "wrapped for trainer_type OUMI, else bfd",
    ),
    "packing": Same("data.train.pack", "TRL's name of it"),
    "eval_packing": Same("data.validation.pack", "TRL's name of it"),
    "pad_token": Same("model.tokenizer_pad_token", "TRL's name of it"),
    "save_total_limit": Same("training.keep_checkpoints", "transformers' name of it"),
    "max_seq_length": Same("training.trainer_kwargs.max_length", "older TRL's name of it"),
    "truncation_mode": later("keep_start", ("keep_start", "keep_end"), "what is kept of longer rows"),
    "count_position_zero": later(False, bool, "ours: divide by rows' first tokens too, as transformers up to 5.9 does"),
    "average_tokens_across_devices": later(True, bool, "the loss is a mean over the tokens of all devices"),
    "eos_token": later(None, str, "token that ends a row"),
    "chat_template_path": later(None, str, "say model.chat_template"),
    "shuffle_dataset": Key(None, bool, "TRL_GRPO: ask prompts in another order every epoch; null: yes"),
    "neftune_noise_alpha": later(None, float, "noise on the embeddings"),
    "activation_offloading": Key(False, bool, "what goes into each layer waits in the host's memory"),
    "optim_args": later(None, str, "further arguments of the optimizer"),
    "optim_target_modules": later(None, list, "modules of GaLore"),
    "router_aux_loss_coef": later(None, float, "weight of the router's loss"),
    "auto_find_batch_size": later(False, bool, "halve the batch until it fits"),
    "eval_delay": later(0.0, float, "steps or epochs before the first evaluation"),
    "eval_on_start": later(False, bool, "evaluate before the first step"),
    "load_best_model_at_end": later(False, bool, "export the best checkpoint, not the last"),
    "metric_for_best_model": later(None, str, "what is best"),
    "greater_is_better": later(None, bool, "which way is better"),
    "save_only_model": later(False, bool, "checkpoints that cannot be resumed"),
    "push_to_hub": later(False, bool, "upload the result"),
    "ignore_data_skip": later(False, bool, "resume with the first row again"),
    **methods.TRAINER_KWARGS,
    **accepted.TRAINER_KWARGS,
}

PROFILER: Table = {
    "enable_cpu_profiling": Key(False, bool, "profile some steps, on the host"),
    "enable_cuda_profiling": Key(False, bool, "profile some steps, on the devices, whatever these are"),
    "save_dir": Key(None, str, "folder of the profiles; null: profiler in output_dir"),
    "schedule": {
        "enable_schedule": Key(False, bool, "profile the steps that these say; false: the third to the fifth"),
        "wait": Key(0, int, "steps before each cycle", low=0),
        "warmup": Key(1, int, "further steps before each cycle", low=0),
        "active": Key(3, int, "steps profiled", low=1),
        "repeat": Key(1, int, "cycles; 0: to the end", low=0),
        "skip_first": Key(1, int, "steps before the first cycle", low=0),
    },
    **accepted.PROFILER,
}

TRAINING: Table = {
    "trainer_type": Key(
        "HF",
        ("HF", "TRL_SFT", "OUMI", "TRL_DPO", "TRL_KTO", "TRL_GRPO", "VERL_GRPO", *TRAINERS_LATER),
        "the method; HF and TRL_SFT: supervised fine-tuning, OUMI: pretraining, with perplexity, TRL_DPO and TRL_KTO: "
        "learning from preferences, TRL_GRPO and VERL_GRPO: from rewards of the model's own answers",
        later=TRAINERS_LATER,
    ),
    "output_dir": Key("output", str, "folder of everything a run leaves"),
    "run_name": Key(None, str, "name of the run in logs"),
    "seed": Key(42, int, "of everything random but data"),
    "data_seed": Key(42, int, "of the order of rows"),
    # How long, and how much at once.
    "max_steps": Key(-1, int, "optimizer steps; above 0 it wins over num_train_epochs"),
    "max_tokens": Key(None, int, "ours: max_steps in tokens, padding included; needs packed rows", low=1),
    "num_train_epochs": Key(3.0, float, "passes over the data"),
    "per_device_train_batch_size": Key(8, int, "rows of one microbatch on each device", low=1),
    "per_device_eval_batch_size": Key(8, int, "rows of one evaluation batch on each device", low=1),
    "gradient_accumulation_steps": Key(1, int, "microbatches of one optimizer step", low=1),
    # The optimizer.
    "optimizer": Key(
        "adamw_torch",
        OPTIMIZERS,
        "which one; nothing is quantised or paged here. ours: a function that returns an optax transformation, called "
        "with learning_rate (step -> rate) and what it takes of weight_decay, betas, eps, momentum, decayed (a mask)",
        functions=True,
    ),
    "learning_rate": Key(5e-5, float, "at its highest", low=0),
    "lr_scheduler_type": Key("linear", SCHEDULES, "how the learning rate goes", read_as={"wsd": "warmup_stable_decay"}),
    "lr_scheduler_kwargs": Key(
        {},
        dict,
        "options of the schedule, such as num_cycles or min_lr_rate; ours: num_decay_tokens and num_stable_tokens, for "
        "those in steps",
    ),
    "warmup_ratio": Key(None, float, "share of the steps that warm up", low=0, high=1),
    "warmup_steps": Key(None, int, "steps that warm up; wins over warmup_ratio", low=0),
    "warmup_tokens": Key(None, int, "ours: warmup_steps in tokens; needs packed rows", low=0),
    "weight_decay": Key(0.0, float, "decoupled decay of all but biases and norms", low=0),
    "adam_beta1": Key(0.9, float, "decay of the first moment", low=0, below=1),
    "adam_beta2": Key(0.999, float, "decay of the second moment", low=0, below=1),
    "adam_epsilon": Key(1e-8, float, "added to the root of the second moment", low=0),
    "sgd_momentum": Key(0.0, float, "of sgd", low=0, below=1),
    "max_grad_norm": Key(1.0, float, "gradients are scaled down to this norm; 0 or null: never", low=0, null=True),
    "z_loss": Key(0.0, float, "ours: times log^2 Z, added to each token's loss; 1e-4 in arXiv:2204.02311", low=0),
    # Precision, memory, compilation.
    "mixed_precision_dtype": Key(
        "NONE", ("NONE", "BF16", "FP16"), "compute in it, with parameters in float32", later=("FP16",)
    ),
    "enable_gradient_checkpointing": Key(False, bool, "recompute activations in the backward pass"),
    "remat_policy": Key(
        None,
        ("none", "full", "dots", "offload"),
        "ours: what is recomputed; null: full with enable_gradient_checkpointing, else none",
    ),
    "scan_unroll": Key(
        1, int, "ours: layers in one turn of the loop over them; more runs faster, compiles longer", low=1
    ),
    "dataloader_num_workers": Key(
        0,
        int,
        "processes that read and tokenise a stream; 0: a thread; auto: an eighth of the cores",
        words=("auto",),
        low=0,
    ),
    "token_cache_dir": Key("~/.cache/einkorn/tokens", str, "ours: keeps tokenised rows; null: none", null=True),
    "compile_cache_dir": Key("~/.cache/einkorn/compiled", str, "ours: keeps compiled programs; null: none", null=True),
    # Evaluation, checkpoints, resuming.
    "eval_strategy": Key("no", WHEN, "when the validation split is evaluated"),
    "eval_steps": Key(500, int, "optimizer steps between evaluations", low=1),
    "save_steps": Key(500, int, "optimizer steps between checkpoints; above 0 it wins over save_epoch"),
    "save_epoch": Key(False, bool, "a checkpoint after each epoch"),
    "save_final_model": Key(True, bool, "export the model at the end"),
    "keep_checkpoints": Key(None, int, "ours: how many of the last are kept; null: all", low=1),
    "resume_from_checkpoint": Key(None, str, "checkpoint folder to go on from"),
    "try_resume_from_last_checkpoint": Key(False, bool, "go on from the last checkpoint in output_dir, if any"),
    # Logs.
    "logging_strategy": Key("steps", WHEN, "when metrics are logged"),
    "logging_steps": Key(50, int, "optimizer steps between logs", low=1),
    "logging_first_step": Key(False, bool, "log the first step too"),
    "logging_dir": Key(None, str, "TensorBoard's folder; null: tensorboard in output_dir"),
    "log_level": Key("info", LEVELS, "how much einkorn says"),
    "dep_log_level": Key("warning", LEVELS, "how much the libraries say"),
    "log_examples": Key(False, bool, "print the first rows, token by token"),
    "log_model_summary": Key(False, bool, "print every parameter with its shape and place"),
    "enable_tensorboard": Key(True, bool, "write TensorBoard's event files"),
    "enable_wandb": Key(False, bool, "log to Weights & Biases"),
    "enable_mlflow": later(False, bool, "log to MLflow"),
    "metrics_function": later(None, str, "further metrics of evaluation"),
    "use_peft": Key(False, bool, "train a LoRA adapter, as section peft says"),
    "profiler": PROFILER,
    "trainer_kwargs": TRAINER_KWARGS,
    **methods.TRAINING,
    **accepted.TRAINING,
}

FSDP: Table = {
    "enable_fsdp": Key(False, bool, "split parameters over devices; false: each device holds all of them"),
    "sharding_strategy": Key("FULL_SHARD", STRATEGIES, "over all devices, those of one host (HYBRID_…), or none"),
    "mixed_precision": Key(None, ("bf16", "fp16"), "as training.mixed_precision_dtype", later=("fp16",)),
    "cpu_offload": later(False, bool, "keep parameters in host memory"),
    **accepted.FSDP,
}

DEEPSPEED: Table = {
    "enable_deepspeed": Key(False, bool, "split over devices what zero_stage says"),
    "zero_stage": Key(
        "ZERO_0",
        ("ZERO_0", "ZERO_1", "ZERO_2", "ZERO_3"),
        "what is split: ZERO_1: the optimizer's state, ZERO_2: gradients too, ZERO_3: parameters too",
        read_as={"0": "ZERO_0", "1": "ZERO_1", "2": "ZERO_2", "3": "ZERO_3"},
    ),
    "precision": Key(None, ("BF16", "FP16"), "as training.mixed_precision_dtype", later=("FP16",)),
    "deepspeed_config_path": later(None, str, "DeepSpeed's own file"),
    "offload_optimizer": Key(None, dict, "device: cpu keeps the optimizer's state in the host's memory"),
    "offload_param": later(None, dict, "keep parameters elsewhere"),
    **accepted.DEEPSPEED,
}

MESH: Table = {
    "data": Key(None, int, "ours: copies of the model; -1: all devices left; null: as fsdp.* says", low=-1),
    "fsdp": Key(None, int, "ours: devices that share a copy; -1: all devices left; null: as fsdp.* says", low=-1),
    "expert": Key(None, int, "ours: devices that share the experts of a layer; -1: all devices left; null: 1", low=-1),
    "tensor": Key(None, int, "ours: devices that share each matrix; -1: all devices left; null: 1", low=-1),
    "context": Key(None, int, "ours: devices that share each row; -1: all devices left; null: 1", low=-1),
}

SCHEMA: Table = {
    "model": MODEL,
    "data": {"train": SPLIT, "validation": SPLIT, "test": without_effect(SPLIT)},
    "training": TRAINING,
    "peft": methods.PEFT,
    "fsdp": FSDP,
    "deepspeed": DEEPSPEED,
    "mesh": MESH,
}

# What other programs call a key: for "did you mean".
ELSEWHERE = {
    "optim": "training.optimizer",
    "bf16": "training.mixed_precision_dtype",
    "fp16": "training.mixed_precision_dtype",
    "gradient_checkpointing": "training.enable_gradient_checkpointing",
    "report_to": "training.enable_wandb",
    "save_strategy": "training.save_steps",
    "lr": "training.learning_rate",
    "epochs": "training.num_train_epochs",
    "batch_size": "training.per_device_train_batch_size",
    "torch_dtype": "model.torch_dtype_str",
    "dtype": "model.torch_dtype_str",
    "path": "data.train.datasets[].dataset_path",
}


def get_config() -> ConfigDict:
    """Every key with its default. New keys are refused; what `*_kwargs` hold are plain dicts, and free."""
    return config_dict(defaults(SCHEMA))


def config_dict(values: dict[str, Any], table: Table = SCHEMA) -> ConfigDict:
    """A locked ConfigDict of the schema's shape: sections become ConfigDicts, free-form values stay what they are."""
    config = ConfigDict(sort_keys=False, convert_dict=False)
    for name, value in values.items():
        entry = table[name]
        if isinstance(entry, Items):
            config[name] = [config_dict(item, entry.table) for item in value]
        else:
            config[name] = value if isinstance(entry, Key) else config_dict(value, entry)
    return config.lock()
