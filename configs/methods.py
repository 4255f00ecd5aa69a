"""Keys that belong to single methods: LoRA (peft), preference learning, GRPO, and the two distillations.

Set under another `training.trainer_type`, these keys are listed in the log as without effect.
"""

from configs.key import Key, Same, Table, belongs_to, later, no_effect

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
GRPO_LOSSES = ("dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")

# Of `trainer_kwargs`, what DPOConfig, KTOConfig and GRPOConfig know.
REFERENCE_KWARGS: Table = {
    "beta": Key(
        None,
        float,
        "how strongly the reference holds; null: 0.1, for TRL_GRPO 0, which needs no reference",
        low=0,
    ),
    "sync_ref_model": Key(False, bool, "move the reference after the policy every ref_model_sync_steps steps"),
    "ref_model_mixup_alpha": Key(0.6, float, "the policy's share when it moves (arXiv:2404.09656)", above=0, high=1),
    "ref_model_sync_steps": Key(512, int, "steps from one move of the reference to the next", low=1),
    "disable_dropout": Key(None, bool, "no dropout in a LoRA adapter either; null: so it is, but for TRL_GRPO"),
}

PREFERENCE_KWARGS: Table = {
    "precompute_ref_log_probs": Key(
        False, bool, "compute the reference's log-probabilities once, before training, and keep them in token_cache_dir"
    ),
    "precompute_ref_batch_size": Key(None, int, "rows on each device then; null: as for training", low=1),
    "answer_tokens": Key(
        "trl",
        ("trl", "oumi"),
        "ours: where an answer begins, where the prompt with its generation prompt ends (trl), or at the assistant's "
        "header, with an end-of-sequence token after it in any case (oumi)",
    ),
}

ANSWERS_KWARGS: Table = {
    "shared_prompt": Key(
        None, bool, "ours: compute a prompt once for all its answers; null: where the model allows it and it is faster"
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

_OTHER_ENGINE = "our own engine generates, with the parameters in training"

GRPO_PARAMS: Table = {
    "max_prompt_length": Key(
        None,
        int,
        "longest prompt in tokens, more is cut from its start; null: any. VERL_GRPO: 512, and more is as "
        "verl_config_overrides.data says",
        above=0,
    ),
    "max_completion_length": Key(None, int, "longest answer in tokens; null: 256, for VERL_GRPO 512", above=0),
    "num_generations": Key(None, int, "answers to each prompt, which are compared with one another; null: 8", low=1),
    "temperature": Key(0.9, float, "of sampling", above=0),
    "log_completions": Key(False, bool, "show answers with their rewards in the log"),
    "stop_strings": Key([], list, "ours: an answer ends behind any of these too"),
    "dynamic_sampling": Key(
        False,
        bool,
        "ours: prompts whose answers all score alike give way to others, until a generation is full (arXiv:2503.14476)",
    ),
    "max_generation_batches": Key(
        10, int, "ours: with dynamic_sampling at most so many generations for one; then it is taken as it is", low=1
    ),
    "use_vllm": no_effect(False, bool, _OTHER_ENGINE),
    "vllm_mode": no_effect(None, str, _OTHER_ENGINE),
    "vllm_gpu_memory_utilization": no_effect(0.9, float, _OTHER_ENGINE),
    "model_init_kwargs": no_effect({}, dict, "say model.model_kwargs"),
    "remove_unused_columns": no_effect(False, bool, "rewards see every column"),
    "rollout_function": later(None, str, "what generates answers"),
}

TRL_GRPO_PARAMS: Table = {
    "epsilon": Key(0.2, float, "how far the probability ratio may fall below 1", low=0),
    "repetition_penalty": Key(1.0, float, "of sampling: logits of what was said are divided by it", above=0),
}

GRPO_KWARGS: Table = {
    # What is asked, and how.
    "num_generations_eval": Key(None, int, "num_generations of the validation split; null: the same", low=1),
    "generation_batch_size": Key(None, int, "answers of one generation; null: as steps_per_generation says", low=1),
    "steps_per_generation": Key(
        None, int, "microbatches of one generation's answers; null: gradient_accumulation_steps", low=1
    ),
    "num_iterations": Key(1, int, "how often one generation's answers are learned from", low=1),
    "chat_template_kwargs": Key(None, dict, "variables of the chat template, such as enable_thinking"),
    "top_p": Key(1.0, float, "draw from the fewest tokens that have this probability together", above=0, high=1),
    "top_k": Key(0, int, "draw from so many likeliest tokens; 0: from all", low=0),
    "min_p": Key(None, float, "draw from tokens that have this share of the likeliest's probability", low=0, high=1),
    "generation_kwargs": Key(None, dict, "stop_strings, as grpo.stop_strings; the rest has keys of its own"),
    # Rewards and advantages.
    "reward_weights": Key(None, list, "of each of several reward functions; null: 1"),
    "scale_rewards": Key(
        "group",
        ("group", "batch", "none"),
        "advantages are divided by the deviation of a group's rewards, of all rewards, or not",
        read_as={"true": "group", "false": "none", "no": "none"},
    ),
    "multi_objective_aggregation": Key(
        "sum_then_normalize",
        ("sum_then_normalize", "normalize_then_sum"),
        "rewards are added up, then compared, or the other way round (GDPO, arXiv:2601.05242)",
    ),
    # The loss.
    "epsilon_high": Key(None, float, "how far the ratio may rise above 1; null: epsilon", low=0),
    "delta": Key(None, float, "bound of the unclipped ratio (arXiv:2505.07291)", above=0),
    "importance_sampling_level": Key("token", ("token", "sequence"), "ratios of tokens or answers (arXiv:2507.18071)"),
    "mask_truncated_completions": Key(False, bool, "answers cut at max_completion_length are not learned from"),
    "top_entropy_quantile": Key(1.0, float, "learn from this share of tokens only, the least certain", low=0, high=1),
    "entropy_coef": Key(0.0, float, "weight of a bonus for entropy"),
    "use_bias_correction_kl": Key(True, bool, "the divergence from the reference is weighted by the ratio"),
    "off_policy_mask_threshold": Key(
        None, float, "answers that score badly and of which the policy has moved further away are not learned from"
    ),
    "sapo_temperature_pos": Key(1.0, float, "of sapo, where the advantage is above 0", above=0),
    "sapo_temperature_neg": Key(1.05, float, "of sapo, elsewhere", above=0),
    "vespo_k_pos": Key(2.0, float, "of vespo, where the advantage is at least 0: the power", low=0),
    "vespo_lambda_pos": Key(3.0, float, "of vespo, where the advantage is at least 0: the decay", low=0),
    "vespo_k_neg": Key(3.0, float, "of vespo, elsewhere: the power", low=0),
    "vespo_lambda_neg": Key(2.0, float, "of vespo, elsewhere: the decay", low=0),
    "vllm_importance_sampling_correction": Key(
        None, bool, "weigh by trainer's over sampler's probability; null: no, since both are one model here"
    ),
    "vllm_importance_sampling_mode": Key(
        "sequence_mask",
        ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
        "of tokens or answers; beyond the bounds the weight is the bound, or 0",
    ),
    "vllm_importance_sampling_clip_max": Key(3.0, float, "upper bound of that weight", above=0, null=True),
    "vllm_importance_sampling_clip_min": Key(None, float, "lower bound of that weight", low=0),
    "vllm_importance_sampling_cap": Same("training.trainer_kwargs.vllm_importance_sampling_clip_max", "older name"),
    "use_adaptive_entropy": later(False, bool, "an entropy_coef that follows entropy_target"),
    "entropy_coef_min": later(0.0, float, "of use_adaptive_entropy"),
    "entropy_coef_max": later(1.0, float, "of use_adaptive_entropy"),
    "entropy_coef_delta": later(0.005, float, "of use_adaptive_entropy"),
    "entropy_target": later(0.2, float, "of use_adaptive_entropy"),
    # Logs.
    "num_completions_to_print": Key(None, int, "how many answers log_completions shows; null: all", low=1),
    "log_unique_prompts": Key(False, bool, "log_completions shows one answer to each prompt"),
    "log_completions_hub_repo": later(None, str, "where answers are uploaded"),
    "max_tool_calling_iterations": later(None, int, "turns in which tools are called"),
    # What other engines need.
    **{
        name: no_effect(default, kind, _OTHER_ENGINE)
        for name, default, kind in (
            ("cache_implementation", None, str),
            ("ds3_gather_for_generation", True, bool),
            ("use_transformers_continuous_batching", False, bool),
            ("transformers_continuous_batching_config", None, dict),
            ("use_transformers_paged", False, bool),
            ("vllm_model_impl", "vllm", str),
            ("vllm_enable_sleep_mode", False, bool),
            ("vllm_structured_outputs_regex", None, str),
            ("vllm_server_base_url", None, str),
            ("vllm_server_host", "0.0.0.0", str),
            ("vllm_server_port", 8000, int),
            ("vllm_server_timeout", 240.0, float),
            ("vllm_group_port", 51216, int),
            ("vllm_max_model_length", None, int),
            ("vllm_tensor_parallel_size", 1, int),
        )
    },
    "cast_lm_head_to_fp32": no_effect(False, bool, "log-probabilities are computed in float32"),
    "log_multimodal": no_effect(True, bool, "there are no pictures"),
    # Oumi has them in training.grpo.
    **{
        name: Same(f"training.grpo.{name}", "TRL's place of it")
        for name in (
            "max_prompt_length",
            "max_completion_length",
            "num_generations",
            "temperature",
            "epsilon",
            "repetition_penalty",
            "log_completions",
            "use_vllm",
            "vllm_mode",
            "vllm_gpu_memory_utilization",
        )
    },
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
        "ends of names of modules that get an adapter, as peft has them, in a vision tower too, but none that "
        "model.freeze_layers names; null: queries and values of the text model",
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
    **belongs_to((*PREFERENCE, "TRL_GRPO"), REFERENCE_KWARGS),
    **belongs_to(PREFERENCE, PREFERENCE_KWARGS),
    **belongs_to((*PREFERENCE, "TRL_GRPO"), ANSWERS_KWARGS),
    **belongs_to(("TRL_DPO",), DPO_KWARGS),
    **belongs_to(("TRL_KTO",), KTO_KWARGS),
    **belongs_to(("TRL_GRPO",), GRPO_KWARGS),
}

TRAINING: Table = {
    "reward_functions": Key(None, list, "what scores answers", only=GRPO),
    "reward_function_kwargs": Key({}, dict, "their options, by name", only=GRPO),
    "reward_timeout": Key(60.0, float, "ours: seconds that they have for one generation's answers", above=0, only=GRPO),
    "reward_workers": Key(2, int, "ours: processes in which they run", low=1, only=GRPO),
    "verl_config_overrides": Key({}, dict, "verl's own settings, as configs/verl.py lists them", only=("VERL_GRPO",)),
    "grpo": {**belongs_to(GRPO, GRPO_PARAMS), **belongs_to(("TRL_GRPO",), TRL_GRPO_PARAMS)},
    "gkd": belongs_to(("TRL_GKD",), GKD_PARAMS),
    "gold": belongs_to(("TRL_GOLD",), GOLD_PARAMS),
}
