"""Keys that belong to single methods: LoRA (peft), preference learning, GRPO, and the two distillations.

Set under another `training.trainer_type`, these keys are listed in the log as without effect.
"""

from configs.key import Key, Table, belongs_to, later, no_effect

GRPO = ("TRL_GRPO", "VERL_GRPO")
PREFERENCE = ("TRL_DPO", "TRL_KTO")

# What `trainer_kwargs.loss_type` may be; the first is the default.
SFT_LOSSES = ("nll", "chunked_nll", "dft")
DPO_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
    *("cpo", "cpo_hinge", "cpo_ipo", "simpo", "orpo"),
)
KTO_LOSSES = ("kto", "apo_zero_unpaired")

# Of `trainer_kwargs`, what DPOConfig and KTOConfig know.
PREFERENCE_KWARGS: Table = {
    "beta": Key(0.1, float, "how strongly the reference holds: a reward is beta log(policy / reference)", above=0),
    "precompute_ref_log_probs": Key(
        False, bool, "compute the reference's log-probabilities once, before training, and keep them in token_cache_dir"
    ),
    "precompute_ref_batch_size": Key(None, int, "rows on each device then; null: as for training", low=1),
    "sync_ref_model": Key(False, bool, "move the reference after the policy every ref_model_sync_steps steps"),
    "ref_model_mixup_alpha": Key(0.6, float, "the policy's share when it moves (arXiv:2404.09656)", above=0, high=1),
    "ref_model_sync_steps": Key(512, int, "steps from one move of the reference to the next", low=1),
    "disable_dropout": Key(True, bool, "no dropout in a LoRA adapter either"),
    "answer_tokens": Key(
        "trl",
        ("trl", "oumi"),
        "ours: where an answer begins, where the prompt with its generation prompt ends (trl), or at the assistant's "
        "header, with an end-of-sequence token after it in any case (oumi)",
    ),
    "shared_prompt": Key(
        None, bool, "ours: compute a prompt once for all its answers; null: where model and attention allow it"
    ),
}

DPO_KWARGS: Table = {
    "loss_weights": Key(None, list, "of each of several loss types; null: 1"),
    "label_smoothing": Key(0.0, float, "share of pairs whose label is taken to be wrong", low=0, high=1),
    "f_divergence_type": Key(
        "reverse_kl",
        ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
        "the divergence from the reference (arXiv:2309.16240)",
    ),
    "f_alpha_divergence_coef": Key(0.5, float, "alpha of alpha_divergence"),
    "discopop_tau": Key(0.05, float, "temperature of discopop", above=0),
    "ld_alpha": Key(
        None, float, "weight of what makes an answer longer than the other (arXiv:2409.06411)", low=0, high=1
    ),
    "use_weighting": Key(False, bool, "weigh pairs by how likely the policy is to say them (arXiv:2406.11827)"),
    "rpo_alpha": Key(None, float, "adds this much of the chosen answers' -log p (arXiv:2404.19733)", low=0),
    "reference_free": Key(False, bool, "a reference that finds everything equally likely"),
    "cpo_alpha": Key(1.0, float, "of cpo and simpo: adds this much of the chosen answers' -log p", low=0),
    "simpo_gamma": Key(0.5, float, "the margin of simpo"),
    "alpha": Key(0.0, float, "shape of AlphaPO's rewards (arXiv:2501.03884); 0: log-probabilities", low=0),
}

KTO_KWARGS: Table = {
    "desirable_weight": Key(1.0, float, "of wanted answers in the loss", low=0),
    "undesirable_weight": Key(1.0, float, "of unwanted answers in the loss", low=0),
}

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

TRAINER_KWARGS: Table = {
    **belongs_to(PREFERENCE, PREFERENCE_KWARGS),
    **belongs_to(("TRL_DPO",), DPO_KWARGS),
    **belongs_to(("TRL_KTO",), KTO_KWARGS),
}

TRAINING: Table = {
    "reward_functions": Key(None, list, "what scores answers", only=GRPO),
    "reward_function_kwargs": Key({}, dict, "their options, by name", only=GRPO),
    "verl_config_overrides": Key({}, dict, "verl's own settings", only=("VERL_GRPO",)),
    "grpo": belongs_to(GRPO, GRPO_PARAMS),
    "gkd": belongs_to(("TRL_GKD",), GKD_PARAMS),
    "gold": belongs_to(("TRL_GOLD",), GOLD_PARAMS),
}
