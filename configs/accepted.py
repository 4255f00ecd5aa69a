"""Keys of Oumi, transformers, TRL and DeepSpeed that are taken and do nothing here, each with the reason.

A file that runs there runs here unchanged; the log lists once those that are set to something else than the default.
"""

from configs.key import Table, no_effect

MODEL: Table = {
    "compile": no_effect(False, bool, "must stay false, as in Oumi; everything is compiled anyway"),
    "trust_remote_code": no_effect(False, bool, "code from the hub is never run"),
    "device_map": no_effect("auto", str, "the mesh places the model", null=True),
    "enable_liger_kernel": no_effect(False, bool, "losses and norms are fused by the compiler"),
    "chat_template_kwargs": no_effect(None, dict, "inference only"),
    "tool_call_parser": no_effect(None, str, "inference only"),
    "shard_for_eval": no_effect(False, bool, "evaluation only"),
}

DATASET: Table = {
    "trust_remote_code": no_effect(False, bool, "code from the hub is never run"),
}

SPLIT: Table = {
    "target_col": no_effect(None, str, "deprecated in Oumi"),
    "use_torchdata": no_effect(None, bool, "there is one data pipeline"),
}

TRAINER_KWARGS: Table = {
    "padding_free": no_effect(False, bool, "rows are packed or padded"),
    "pad_to_multiple_of": no_effect("auto", int, "row lengths are chosen by the pipeline", words=("auto",)),
    "dataset_num_proc": no_effect(None, int, "processes that prepare rows"),
    "dataset_kwargs": no_effect(None, dict, "skip_prepare_dataset and its like"),
    "remove_unused_columns": no_effect(True, bool, "formats read the columns they need"),
    "label_names": no_effect(None, list, "targets are made by the pipeline"),
    "model_init_kwargs": no_effect(None, dict, "say model.model_kwargs"),
    "use_cache": no_effect(False, bool, "training keeps no cache"),
    "use_liger_kernel": no_effect(False, bool, "losses and norms are fused by the compiler"),
    "liger_kernel_config": no_effect(None, dict, "losses and norms are fused by the compiler"),
    "tf32": no_effect(None, bool, "a setting of CUDA"),
    "use_cpu": no_effect(False, bool, "JAX_PLATFORMS=cpu chooses it"),
    "torch_compile": no_effect(False, bool, "everything is compiled"),
    "torch_compile_backend": no_effect(None, str, "everything is compiled"),
    "torch_compile_mode": no_effect(None, str, "everything is compiled"),
    "bf16_full_eval": no_effect(False, bool, "evaluation computes as training does"),
    "fp16_full_eval": no_effect(False, bool, "evaluation computes as training does"),
    "prediction_loss_only": no_effect(False, bool, "evaluation gives losses"),
    "eval_accumulation_steps": no_effect(None, int, "evaluation gives losses"),
    "eval_do_concat_batches": no_effect(True, bool, "evaluation gives losses"),
    "eval_use_gather_object": no_effect(False, bool, "evaluation gives losses"),
    "include_for_metrics": no_effect([], list, "evaluation gives losses"),
    "batch_eval_metrics": no_effect(False, bool, "evaluation gives losses"),
    "logging_nan_inf_filter": no_effect(True, bool, "a loss that is not finite stops the run"),
    "include_num_input_tokens_seen": no_effect("no", str, "tokens are always counted"),
    "include_tokens_per_second": no_effect(False, bool, "tokens per second are always shown"),
    "log_on_each_node": no_effect(True, bool, "the first process logs"),
    "log_level_replica": no_effect("warning", str, "the first process logs"),
    "save_on_each_node": no_effect(False, bool, "checkpoints are sharded"),
    "save_safetensors": no_effect(True, bool, "always"),
    "disable_tqdm": no_effect(None, bool, "the bar shows where there is a terminal"),
    "skip_memory_metrics": no_effect(True, bool, "memory is always shown"),
    "dataloader_pin_memory": no_effect(True, bool, "a setting of torch"),
    "dataloader_in_order": no_effect(True, bool, "always"),
    "group_by_length": no_effect(False, bool, "the name of train_sampling_strategy in older transformers"),
    "length_column_name": no_effect("length", str, "lengths are measured"),
    "ddp_backend": no_effect(None, str, "a setting of torch"),
    "ddp_bucket_cap_mb": no_effect(None, int, "a setting of torch"),
    "ddp_broadcast_buffers": no_effect(None, bool, "a setting of torch"),
    "ddp_static_graph": no_effect(None, bool, "a setting of torch"),
    "ddp_timeout": no_effect(1800, int, "a setting of torch"),
}

PROFILER: Table = {
    "record_shapes": no_effect(False, bool, "a setting of torch"),
    "profile_memory": no_effect(False, bool, "a setting of torch"),
    "with_stack": no_effect(False, bool, "a setting of torch"),
    "with_flops": no_effect(False, bool, "a setting of torch"),
    "with_modules": no_effect(False, bool, "a setting of torch"),
    "row_limit": no_effect(50, int, "a setting of torch"),
}

TRAINING: Table = {
    "compile": no_effect(False, bool, "everything is compiled"),
    "gradient_checkpointing_kwargs": no_effect({}, dict, "a setting of torch; see remat_policy"),
    "use_deterministic": no_effect(False, bool, "runs repeat bit for bit on one kind of device"),
    "full_determinism": no_effect(False, bool, "runs repeat bit for bit on one kind of device"),
    "include_performance_metrics": no_effect(False, bool, "speed and MFU are always shown"),
    "include_alternative_mfu_metrics": no_effect(False, bool, "there is one MFU"),
    "label_ignore_index": no_effect(None, int, "what is not trained has weight 0; no token stands for it"),
    "dataloader_prefetch_factor": no_effect(None, int, "a thread prepares the next batches", low=1),
    "dataloader_persistent_workers": no_effect(False, bool, "a setting of torch"),
    "dataloader_main_process_only": no_effect(None, bool, "each process reads its own rows"),
    "ddp_find_unused_parameters": no_effect(None, bool, "a setting of torch"),
    "nccl_default_timeout_minutes": no_effect(None, float, "a setting of torch"),
    "empty_device_cache_steps": no_effect(None, int, "a setting of torch"),
    "telemetry": {
        "telemetry_dir": no_effect("telemetry", str, "output_dir holds the settings and metrics", null=True),
        "collect_telemetry_for_all_ranks": no_effect(False, bool, "the first process writes"),
        "track_gpu_temperature": no_effect(False, bool, "not measured"),
    },
}

FSDP: Table = {
    "state_dict_type": no_effect(
        "FULL_STATE_DICT",
        ("FULL_STATE_DICT", "SHARDED_STATE_DICT", "LOCAL_STATE_DICT"),
        "checkpoints are sharded, exports whole",
    ),
    "auto_wrap_policy": no_effect(
        "SIZE_BASED_WRAP", ("SIZE_BASED_WRAP", "TRANSFORMER_BASED_WRAP", "NO_WRAP"), "by layer"
    ),
    "transformer_layer_cls": no_effect(None, str, "by layer"),
    "min_num_params": no_effect(100_000, int, "by layer"),
    "backward_prefetch": no_effect("BACKWARD_PRE", ("BACKWARD_PRE", "BACKWARD_POST", "NO_PREFETCH"), "XLA schedules"),
    "forward_prefetch": no_effect(False, bool, "XLA schedules"),
    "use_orig_params": no_effect(None, bool, "a setting of torch"),
    "sync_module_states": no_effect(True, bool, "a setting of torch"),
}

DEEPSPEED: Table = {
    "train_batch_size": no_effect("auto", int, "must stay auto: training.* says it", words=("auto",)),
    "train_micro_batch_size_per_gpu": no_effect("auto", int, "training.* says it", words=("auto",)),
    "gradient_accumulation_steps": no_effect("auto", int, "training.* says it", words=("auto",)),
    "gradient_clipping": no_effect("auto", float, "training.* says it", words=("auto",)),
    "activation_checkpointing": no_effect({}, dict, "training.enable_gradient_checkpointing says it"),
    "overlap_comm": no_effect(False, bool, "a setting of DeepSpeed"),
    "contiguous_gradients": no_effect(True, bool, "a setting of DeepSpeed"),
    "reduce_bucket_size": no_effect(500_000_000, int, "a setting of DeepSpeed", words=("auto",)),
    "allgather_bucket_size": no_effect(500_000_000, int, "a setting of DeepSpeed"),
    "allgather_partitions": no_effect(True, bool, "a setting of DeepSpeed"),
    "reduce_scatter": no_effect(True, bool, "a setting of DeepSpeed"),
    "round_robin_gradients": no_effect(False, bool, "a setting of DeepSpeed"),
    "stage3_prefetch_bucket_size": no_effect(50_000_000, int, "a setting of DeepSpeed", words=("auto",)),
    "stage3_param_persistence_threshold": no_effect(100_000, int, "a setting of DeepSpeed", words=("auto",)),
    "stage3_max_live_parameters": no_effect(1_000_000_000, int, "a setting of DeepSpeed"),
    "stage3_max_reuse_distance": no_effect(1_000_000_000, int, "a setting of DeepSpeed"),
    "stage3_gather_16bit_weights_on_model_save": no_effect(False, bool, "a setting of DeepSpeed"),
    "sub_group_size": no_effect(1_000_000_000, int, "a setting of DeepSpeed"),
    "zero_allow_untested_optimizer": no_effect(True, bool, "a setting of DeepSpeed"),
    "zero_force_ds_cpu_optimizer": no_effect(True, bool, "a setting of DeepSpeed"),
    "memory_efficient_linear": no_effect(False, bool, "a setting of DeepSpeed"),
    "steps_per_print": no_effect(10, int, "a setting of DeepSpeed"),
    "wall_clock_breakdown": no_effect(False, bool, "a setting of DeepSpeed"),
}
