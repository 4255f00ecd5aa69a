"""`config.json` as it stands on the hub, written by older versions of transformers, means the same model.

Sizes are cut down; the fields and their spelling are those of the files named.
"""

from typing import Any

import pytest

from models.config import DecoderConfig, Layer
from models.families import decoder_config

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "float16",
    "transformers_version": "4.36.0",
}


def read(kind: str, **fields: Any) -> DecoderConfig:
    return decoder_config(SIZES | {"model_type": kind, "architectures": ["SomeForCausalLM"]} | fields)


def turns(layer: Layer) -> int:
    assert layer.rope is not None
    return 2 * len(layer.rope.frequencies)


def test_qwen2_5_vl_with_the_text_models_fields_beside_the_towers() -> None:
    tower = {
        "depth": 4,
        "hidden_act": "silu",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_heads": 2,
        "in_chans": 3,
        "out_hidden_size": 32,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [1, 3],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    }
    config = read(
        "qwen2_5_vl",
        hidden_act="silu",
        rms_norm_eps=1e-6,
        num_key_value_heads=2,
        max_window_layers=70,
        sliding_window=32768,
        use_sliding_window=False,
        rope_theta=1000000.0,
        rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]},
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
        vision_token_id=59,
        tie_word_embeddings=False,
        vision_config=tower,
    )
    assert config.each[0].rope is not None
    assert (config.each[0].rope.axes, config.each[0].window, config.qkv_bias) == ((0, 1, 2, 2), None, True)
    assert [layer.window for layer in config.vision.layers.each] == [8, None, 8, None]
    assert (config.vision.frames, config.vision.unit, config.vision.layers.gated) == (2, 4, True)


def test_llama_2_without_rope_theta() -> None:
    config = read("llama", hidden_act="silu", rms_norm_eps=1e-5, rope_scaling=None, pretraining_tp=1)
    assert (config.kv_heads, config.tied_head, config.each[0].window) == (4, False, None)
    assert config.each[0].rope is not None
    assert config.each[0].rope.frequencies[1] == pytest.approx(10_000.0 ** -(2 / 8), rel=1e-6)


def test_pythia() -> None:
    config = read(
        "gpt_neox",
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        rotary_emb_base=10000,
        rotary_pct=0.25,
        use_parallel_residual=True,
        tie_word_embeddings=False,
        max_position_embeddings=2048,
    )
    assert (config.parallel, config.fused_qkv, turns(config.each[0])) == ("two norms", "heads", 2)


def test_phi_2() -> None:
    config = read(
        "phi",
        hidden_act="gelu_new",
        attention_dropout=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.1,
        layer_norm_eps=1e-5,
        num_key_value_heads=None,
        partial_rotary_factor=0.5,
        qk_layernorm=False,
        rope_scaling=None,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    )
    assert (config.parallel, config.head_bias, config.kv_heads, turns(config.each[0])) == ("one norm", True, 4, 4)


def test_phi_3_mini_128k() -> None:
    config = read(
        "phi3",
        attention_bias=False,
        attention_dropout=0.0,
        auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        hidden_act="silu",
        max_position_embeddings=131072,
        num_key_value_heads=4,
        original_max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_scaling={"long_factor": [1.0, 2.0, 3.0, 4.0], "short_factor": [1.0, 1.0, 1.0, 1.0], "type": "su"},
        rope_theta=10000.0,
        sliding_window=262144,
        tie_word_embeddings=False,
    )
    rope = config.each[0].rope
    assert rope is not None
    assert rope.beyond is not None
    assert rope.beyond.context == 4096
    assert rope.factor == pytest.approx((1 + 5 / 12) ** 0.5)  # sqrt(1 + ln(131072 / 4096) / ln(4096)), of powers of two
    assert config.each[0].window == 262144


def test_gemma_2() -> None:
    config = read(
        "gemma2",
        attention_bias=False,
        attention_dropout=0.0,
        attn_logit_softcapping=50.0,
        cache_implementation="hybrid",
        final_logit_softcapping=30.0,
        head_dim=16,
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        num_key_value_heads=2,
        query_pre_attn_scalar=256,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        sliding_window=4096,
    )
    assert [layer.window for layer in config.each] == [4096, None, 4096, None]
    assert (config.tied_head, config.attention_scale, config.logit_softcap) == (True, 1 / 16, 30.0)


def test_gemma_3() -> None:
    config = read(
        "gemma3_text",
        attention_bias=False,
        attention_dropout=0.0,
        attn_logit_softcapping=None,
        cache_implementation="hybrid",
        final_logit_softcapping=None,
        head_dim=16,
        hidden_activation="gelu_pytorch_tanh",
        num_hidden_layers=7,
        num_key_value_heads=1,
        query_pre_attn_scalar=256,
        rms_norm_eps=1e-6,
        rope_local_base_freq=10000,
        rope_scaling={"factor": 8.0, "rope_type": "linear"},
        rope_theta=1000000,
        sliding_window=512,
        sliding_window_pattern=6,
    )
    assert [layer.window for layer in config.each] == [512] * 5 + [None, 512]
    near, far = config.each[0].rope, config.each[5].rope
    assert near is not None
    assert far is not None
    assert near.frequencies[1] == pytest.approx(10_000.0 ** -(2 / 16), rel=1e-6)
    assert far.frequencies[1] == pytest.approx(1_000_000.0 ** -(2 / 16) / 8, rel=1e-6)


def test_qwen_2_5_whose_window_is_off() -> None:
    config = read(
        "qwen2",
        attention_dropout=0.0,
        hidden_act="silu",
        max_window_layers=24,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        sliding_window=32768,
        tie_word_embeddings=True,
        use_sliding_window=False,
    )
    assert {layer.window for layer in config.each} == {None}
    assert (config.qkv_bias, config.o_bias) == (True, False)


def test_starcoder_2() -> None:
    config = read(
        "starcoder2",
        activation_function="gelu",
        attention_dropout=0.1,
        attention_softmax_in_fp32=True,
        embedding_dropout=0.1,
        hidden_act="gelu_pytorch_tanh",
        mlp_type="default",
        norm_epsilon=1e-5,
        norm_type="layer_norm",
        num_key_value_heads=2,
        residual_dropout=0.1,
        rope_theta=999999.4420358813,
        scale_attention_softmax_in_fp32=True,
        scale_attn_weights=True,
        sliding_window=4096,
        use_bias=True,
    )
    assert (config.norm, config.gated, config.tied_head, config.each[0].window) == ("layer", False, True, 4096)


def test_qwen_3_moe() -> None:
    config = read(
        "qwen3_moe",
        attention_bias=False,
        attention_dropout=0.0,
        decoder_sparse_step=1,
        head_dim=16,
        hidden_act="silu",
        max_window_layers=48,
        mlp_only_layers=[],
        moe_intermediate_size=24,
        norm_topk_prob=True,
        num_experts=8,
        num_experts_per_tok=2,
        num_key_value_heads=2,
        output_router_logits=False,
        rms_norm_eps=1e-6,
        rope_scaling=None,
        rope_theta=1000000.0,
        router_aux_loss_coef=0.001,
        sliding_window=None,
        tie_word_embeddings=False,
        use_sliding_window=False,
    )
    experts = config.experts
    assert (experts.count, experts.per_token, experts.normalise, experts.aux_coefficient) == (8, 2, True, 0.0)


def test_gpt_2() -> None:
    config = decoder_config(
        {
            "activation_function": "gelu_new",
            "architectures": ["GPT2LMHeadModel"],
            "attn_pdrop": 0.1,
            "bos_token_id": 50256,
            "embd_pdrop": 0.1,
            "eos_token_id": 50256,
            "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05,
            "model_type": "gpt2",
            "n_ctx": 1024,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 1024,
            "resid_pdrop": 0.1,
            "summary_activation": None,
            "summary_first_dropout": 0.1,
            "summary_proj_to_labels": True,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
            "vocab_size": 50257,
        }
    )
    assert (config.learned_positions, config.mlp_width, config.tied_head) == (1024, 3072, True)


def test_quantised_weights_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="not implemented yet: weights quantised by 'mxfp4'"):
        read("gpt_oss", quantization_config={"quant_method": "mxfp4"})
