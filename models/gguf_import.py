"""GGUF (llama.cpp's file) → an ordinary Hugging Face folder, with numpy alone: no torch.

    python -m models.gguf_import model.gguf folder/

Covers what is tested: the llama architecture with a byte-level BPE tokenizer of the SmolLM kind. Everything else is
refused by name. Weights are written as bfloat16, as the hub's originals are: the rounding (2^-9 of a value) vanishes
beside the four-bit step it comes from (1/15 of a block's range), the folder is half as large, and both sources of one
model then behave alike under `torch_dtype_str: auto`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from models.safetensors_file import Spec, write_tensors

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
# Fields of the llama architecture that `hf_config` reads or checks; one beyond these would change the model: an error.
FIELDS = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "rope.freq_base",
    "rope.dimension_count", "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "attention.key_length", "attention.value_length",
}  # fmt: skip
CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type


def import_gguf(file: Path, folder: Path) -> Path:
    """Writes config, generation config, weights, tokenizer and chat template of `file` into `folder` (made if missing).

    Raises ValueError for an architecture, tokenizer, field or tensor outside the supported set, ImportError without
    the `gguf` package.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ImportError("reading GGUF needs the gguf package: pip install 'einkorn[gguf]'") from None
    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = hf_config(fields, tied="output.weight" not in tensors)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json", {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    )
    _write_tokenizer(folder, fields)
    _write_weights(folder / "model.safetensors", tensors, config)
    return folder


def hf_config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """Translates GGUF metadata into the `config.json` of a LlamaForCausalLM; unknown llama fields are a ValueError."""
    architecture = fields["general.architecture"]
    if architecture != "llama":
        raise ValueError(f"GGUF architecture {architecture!r} is not supported; supported: 'llama'")
    llama = {name.removeprefix("llama."): value for name, value in fields.items() if name.startswith("llama.")}
    if unknown := sorted(llama.keys() - FIELDS):
        raise ValueError(f"GGUF fields not understood: {', '.join(unknown)}; leaving them out would change the model")
    heads, width = llama["attention.head_count"], llama["embedding_length"]
    head_width = llama.get("attention.key_length", width // heads)
    if {head_width} != {llama.get("attention.value_length", head_width), llama.get("rope.dimension_count", head_width)}:
        raise ValueError("GGUF with differing key, value and rope widths is not supported")
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "head_dim": head_width,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": llama["feed_forward_length"],
        "max_position_embeddings": llama["context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": llama["block_count"],
        "num_key_value_heads": llama.get("attention.head_count_kv", heads),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "rms_norm_eps": _shortest(llama["attention.layer_norm_rms_epsilon"]),
        "rope_scaling": None,
        "rope_theta": _shortest(llama["rope.freq_base"]),
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
    }


def _write_weights(file: Path, tensors: dict[str, Any], config: dict[str, Any]) -> None:
    sources = {_hf_name(name): tensor for name, tensor in tensors.items()}
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    # GGUF counts axes from the fastest; numpy, and safetensors, from the slowest
    specs = {name: Spec(tuple(int(size) for size in sources[name].shape[::-1]), bfloat16) for name in sorted(sources)}

    def values(name: str) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = sources[name]
        weight = dequantize(tensor.data, tensor.tensor_type)
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if f".{part}." in name:
                weight = _rotary_halves(weight, heads=config[heads])
        return weight.astype(bfloat16)

    write_tensors(file, specs, values, metadata={"format": "pt"})


def _rotary_halves(weight: np.ndarray, *, heads: int) -> np.ndarray:
    """Undoes GGUF's order of q and k rows: it keeps a rotary pair side by side, Hugging Face in two halves."""
    out, width = weight.shape
    return weight.reshape(heads, out // heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)


def _hf_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    if not block.isdigit() or rest not in LAYER_NAMES:
        raise ValueError(
            f"GGUF tensor {name!r} has no place in a llama model (known: {', '.join([*NAMES, *LAYER_NAMES])})"
        )
    return f"model.layers.{block}.{LAYER_NAMES[rest]}"


def _write_tokenizer(folder: Path, fields: dict[str, Any]) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(
            f"GGUF tokenizer {kind[0]!r} with pre-tokenizer {kind[1]!r} is not supported; allowed: 'gpt2' with 'smollm'"
        )
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    types: list[int] = fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind_of_token in zip(tokens, types, strict=True):
        if kind_of_token in (CONTROL, USER_DEFINED):
            special = kind_of_token == CONTROL
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=special)])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    ids = {token: fields.get(f"tokenizer.ggml.{name}_token_id") for token, name in named.items()}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            **{token: tokens[i] for token, i in ids.items() if i is not None},
            "chat_template": fields["tokenizer.chat_template"],
            "clean_up_tokenization_spaces": False,
            "model_max_length": fields["llama.context_length"],
            # the class that takes tokenizer.json as it stands: GPT2Tokenizer may rebuild it, without the digits split
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def _shortest(value: float) -> float:
    """The shortest decimal that names this float32, so that 1e-5 stored in four bytes is 1e-5 again in eight."""
    return float(str(np.float32(value)))


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m models.gguf_import MODEL.gguf FOLDER")
    print(import_gguf(Path(sys.argv[1]), Path(sys.argv[2])))
