"""Sections that belong to single methods: LoRA (peft), GRPO, and the two distillations.

Set under another `training.trainer_type`, these keys are listed in the log as without effect.
"""

from configs.key import Key, Table, belongs_to, later, no_effect

GRPO = ("TRL_GRPO", "VERL_GRPO")

GRPO_PARAMS: Table = {
    "model_init_kwargs": Key({}, dict, "say model.model_kwargs"),
    "max_prompt_length": Key(None, int, "longest prompt in tokens; more is cut from its start", above=0),
    "max_completion_length": Key(None, int, "longest answer in tokens", above=0),
    "num_generations": Key(None, int, "answers to each prompt", above=0),
    "temperature": Key(0.9, float, "of sampling", low=0, high=1),
    "epsilon": Key(0.2, float, "clipping of the probability ratio"),
    "repetition_penalty": Key(1.0, float, "of sampling"),
    "remove_unused_columns": Key(False, bool, "rewards see every column"),
    "log_completions": Key(False, bool, "log sampled answers"),
    "rollout_function": Key(None, str, "what generates answers"),
    "use_vllm": Key(False, bool, "answers are generated in this process either way"),
    "vllm_mode": Key(None, str, "a setting of vLLM"),
    "vllm_gpu_memory_utilization": Key(0.9, float, "a setting of vLLM"),
}

GKD_PARAMS: Table = {
    "teacher_model_name_or_path": Key(None, str, "the teacher"),
    "teacher_model_init_kwargs": Key({"dtype": "auto"}, dict, "arguments of the teacher"),
    "temperature": Key(0.9, float, "of sampling", above=0, high=1),
    "lmbda": Key(0.5, float, "share of answers the student gives itself", low=0, high=1),
    "beta": Key(0.5, float, "from forward (0) to reverse (1) divergence", low=0, high=1),
    "max_new_tokens": Key(128, int, "longest answer in tokens", low=1),
    "disable_dropout": Key(True, bool, "of the student"),
    "seq_kd": Key(False, bool, "distil whole answers of the teacher"),
}

GOLD_PARAMS: Table = {
    **{name: row for name, row in GKD_PARAMS.items() if name != "max_new_tokens"},
    "max_completion_length": Key(128, int, "longest answer in tokens", low=1),
    "teacher_tokenizer_name_or_path": Key(None, str, "the teacher's tokenizer"),
    "top_p": Key(0.95, float, "of sampling", above=0, high=1),
    "top_k": Key(0, int, "of sampling", low=0),
    "use_uld_loss": Key(False, bool, "compare tokenizations that differ"),
    "use_extended_uld": Key(True, bool, "align and merge tokens"),
    "uld_use_hybrid_loss": Key(False, bool, "divergence where tokens match"),
    "uld_hybrid_matched_weight": Key(None, float, "weight of matched tokens", low=0),
    "uld_hybrid_unmatched_weight": Key(None, float, "weight of the others", low=0),
    "uld_crossentropy_weight": Key(0.0, float, "weight of cross-entropy", low=0),
    "uld_distillation_weight": Key(1.0, float, "weight of distillation", low=0),
    "uld_student_temperature": Key(1.0, float, "softens the student", above=0),
    "uld_teacher_temperature": Key(1.0, float, "softens the teacher", above=0),
    "uld_skip_student_eos": Key(True, bool, "leave its last token out"),
    "uld_skip_teacher_eos": Key(True, bool, "leave its last token out"),
    "use_transformers_paged": Key(False, bool, "deprecated"),
    "use_vllm": Key(False, bool, "a setting of vLLM"),
    "vllm_mode": Key("server", ("server", "colocate"), "a setting of vLLM"),
    "vllm_server_host": Key("0.0.0.0", str, "a setting of vLLM"),
    "vllm_server_port": Key(8001, int, "a setting of vLLM"),
    "vllm_server_timeout": Key(240.0, float, "a setting of vLLM"),
    "vllm_gpu_memory_utilization": Key(0.9, float, "a setting of vLLM"),
    "vllm_tensor_parallel_size": Key(1, int, "a setting of vLLM"),
    "vllm_guided_decoding_regex": Key(None, str, "a setting of vLLM"),
    "vllm_sync_frequency": Key(1, int, "a setting of vLLM"),
    "vllm_enable_sleep_mode": Key(False, bool, "a setting of vLLM"),
}

PEFT: Table = {
    "lora_r": Key(8, int, "rank", low=1),
    "lora_alpha": Key(8, int, "the adapter is scaled by lora_alpha / lora_r", low=1),
    "lora_dropout": Key(0.0, float, "share of the adapter's input that is dropped", low=0, below=1),
    "lora_target_modules": Key(
        None,
        list,
        "ends of names of modules that get an adapter, as peft has them; null: queries and values",
        words=("all-linear",),
    ),
    "lora_target_modules_regex": Key(False, bool, "lora_target_modules are regular expressions of whole names"),
    "lora_exclude_modules": Key(None, list, "regular expressions of whole names that get none"),
    "lora_target_parameters": later(None, list, "parameters that get an adapter"),
    "lora_modules_to_save": Key(None, list, "ends of names of modules trained whole, and saved with the adapter"),
    "lora_bias": Key("none", ("none", "all", "lora_only"), "which biases are trained", later=("all", "lora_only")),
    "lora_init_weights": Key(
        "DEFAULT",
        ("DEFAULT", "RANDOM", "GAUSSIAN", "EVA", "PISA", "PISSA_NITER", "LOFTQ", "OLORA"),
        "how adapters begin: A uniform or normal (GAUSSIAN) and B zero, or both uniform (RANDOM)",
        later=("EVA", "PISA", "PISSA_NITER", "LOFTQ", "OLORA"),
    ),
    "lora_task_type": Key(
        "CAUSAL_LM",
        ("CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"),
        "kind of model",
        later=("SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"),
    ),
    "use_rslora": Key(False, bool, "ours: the adapter is scaled by lora_alpha / sqrt(lora_r), arXiv:2312.03732"),
    "use_dora": Key(False, bool, "ours: magnitudes of the adapted columns are trained apart, arXiv:2402.09353"),
    "peft_save_mode": Key(
        "ADAPTER_ONLY",
        ("ADAPTER_ONLY", "ADAPTER_AND_BASE_MODEL", "MERGED"),
        "what is exported: the adapter, or the model with it merged in and the adapter in the folder adapter",
        later=("ADAPTER_AND_BASE_MODEL",),
    ),
    "q_lora": Key(False, bool, "keep the model's own kernels in few bits, a scale for every 64 inputs"),
    "q_lora_bits": Key(4, int, "how few, 4 or 8; eight are int8", low=4, high=8),
    "bnb_4bit_quant_type": Key("fp4", ("fp4", "nf4"), "what four bits mean; fp4 is e2m1, nf4 arXiv:2305.14314"),
    "llm_int8_skip_modules": later(None, list, "modules kept whole"),
    "use_bnb_nested_quant": no_effect(False, bool, "quantise the scales too: they stay float32"),
    "bnb_4bit_quant_storage": no_effect("uint8", str, "dtype that holds them: arrays of four bits do"),
    "bnb_4bit_compute_dtype": no_effect("float32", str, "dtype they are computed in: training's own"),
}

TRAINING: Table = {
    "reward_functions": Key(None, list, "what scores answers", only=GRPO),
    "reward_function_kwargs": Key({}, dict, "their options, by name", only=GRPO),
    "verl_config_overrides": Key({}, dict, "verl's own settings", only=("VERL_GRPO",)),
    "grpo": belongs_to(GRPO, GRPO_PARAMS),
    "gkd": belongs_to(("TRL_GKD",), GKD_PARAMS),
    "gold": belongs_to(("TRL_GOLD",), GOLD_PARAMS),
}
