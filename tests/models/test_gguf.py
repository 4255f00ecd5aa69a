"""GGUF to a Hugging Face folder: against transformers' own GGUF reader on a tiny file, and the real SmolLM2."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.gguf_import import import_gguf

HEADS, KV_HEADS, WIDTH, MLP, LAYERS = 4, 2, 64, 96, 2
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "c", "Ġ", "1", "2", "ab", "Ġa"]


def write_gguf(file: Path, *, fields: dict[str, Any] | None = None, extra: str | None = None) -> Path:
    """A random two-layer llama, quantised to eight bits as llama.cpp lays it out; `fields` replace metadata."""
    writer = gguf.GGUFWriter(file, "llama")
    metadata: dict[str, Any] = {
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": MLP,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.chat_template": "{{ messages[0].content }}",
        **(fields or {}),
    }
    for name, value in metadata.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_string)(name, value)
    writer.add_float32("llama.rope.freq_base", 5e5)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for name, token in (("bos", 1), ("eos", 2), ("padding", 2), ("unknown", 0)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    writer.add_array("tokenizer.ggml.tokens", TOKENS)
    writer.add_array("tokenizer.ggml.token_type", [3, 3, 3] + [1] * 8)
    writer.add_array("tokenizer.ggml.merges", ["a b", "Ġ a"])
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(TOKENS), WIDTH), "output_norm": (WIDTH,)}
    for i in range(LAYERS):
        kv = WIDTH // HEADS * KV_HEADS
        shapes |= {f"blk.{i}.{name}": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{i}.{name}": (WIDTH, WIDTH) for name in ("attn_q", "attn_output")}
        shapes |= {f"blk.{i}.{name}": (kv, WIDTH) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{i}.{name}": (MLP, WIDTH) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{i}.ffn_down": (WIDTH, MLP)}
    for name, shape in ({**shapes, extra: (4,)} if extra else shapes).items():
        values = random.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_weights_are_those_that_transformers_reads_from_the_same_file(tmp_path: Path) -> None:
    folder = import_gguf(write_gguf(tmp_path / "tiny.gguf"), tmp_path / "out")
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    ours = load_file(folder / "model.safetensors")
    theirs = {name: tensor for name, tensor in oracle.state_dict().items() if name != "lm_head.weight"}
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name].to(torch.bfloat16)), name


def test_transformers_loads_the_folder_with_the_config_of_the_file(tmp_path: Path) -> None:
    folder = import_gguf(write_gguf(tmp_path / "tiny.gguf"), tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert (model.dtype, model.config.tie_word_embeddings) == (torch.bfloat16, True)
    assert (model.config.rope_parameters["rope_theta"], model.config.rms_norm_eps) == (500_000.0, 1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"general.architecture": "qwen2"}, "architecture 'qwen2' is not supported; supported: 'llama'"),
        ({"llama.rope.scaling.type": "yarn"}, "fields not understood: rope.scaling.type;"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, "'gpt2' with pre-tokenizer 'llama-bpe' is not supported"),
        ({"llama.attention.value_length": 32}, "differing key, value and rope widths"),
    ],
)
def test_what_would_give_another_model_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        import_gguf(write_gguf(tmp_path / "tiny.gguf", fields=fields), tmp_path / "out")


def test_a_tensor_without_a_place_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"GGUF tensor 'rope_freqs\.weight' has no place in a llama model"):
        import_gguf(write_gguf(tmp_path / "tiny.gguf", extra="rope_freqs"), tmp_path / "out")


def test_smollm2_says_that_the_capital_of_france_is_paris(smollm2_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_smollm2_is_described_as_the_hub_describes_it(smollm2_folder: Path) -> None:
    config = json.loads((smollm2_folder / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    }
    assert {name: config.get(name) for name in expected} == expected


# Ids by hand from the vocabulary: digits stand alone, a space belongs to the word behind it.
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello 1234 world!", [19556, 216, 33, 34, 35, 36, 905, 17]),  # Hello·␣·1·2·3·4·␣world·!
        ("2024", [34, 32, 34, 36]),
        ("<|im_start|>user\nhi<|im_end|>", [1, 4093, 198, 6004, 2]),
        ("naïve café — 日本", [3546, 46494, 37366, 1841, 17097, 241, 115, 40993]),
    ],
)
def test_smollm2_tokenizes_digits_one_by_one_and_special_tokens_whole(
    smollm2_folder: Path, text: str, ids: list[int]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text


def test_smollm2s_special_tokens_are_the_hubs(smollm2_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.unk_token, tokenizer.unk_token_id) == ("<|endoftext|>", 0)
    assert len(tokenizer) == 49152
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == system + "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
