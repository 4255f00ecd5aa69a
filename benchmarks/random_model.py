"""A llama with random weights and a tokenizer of bytes, as a folder of Hugging Face's: for machines that reach no hub.

`--shape` of the benchmarks writes one; 1b and 3b have the sizes of Llama 3.2, tiny is for trying out.
"""

import argparse
from pathlib import Path

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# width, MLP, layers, heads, heads of keys and values, vocabulary
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 512),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "3b": (3072, 8192, 28, 24, 8, 128256),
}


def add_options(parser: argparse.ArgumentParser, *, model: Path) -> None:
    """`--model`, or `--shape` in its place."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default=str(model), help="model folder (default: %(default)s)")
    which.add_argument("--shape", choices=SHAPES, help="a llama of random weights of that size in its place")


def model_of(options: argparse.Namespace, scratch: Path) -> str:
    """The model's folder, written to `scratch` where a shape is asked for."""
    return options.model if options.shape is None else str(write(scratch / f"llama-{options.shape}", options.shape))


def write(folder: Path, shape: str) -> Path:
    """Weights in bfloat16, drawn as transformers draws them."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate((*special, *letters))}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.add_special_tokens(list(special))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    tokenizer.save_pretrained(folder)
    width, mlp, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder
