"""A model small enough to train in seconds and complete enough to train by both programs: llama, BPE, ChatML."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ("grain", "water", "mill", "stone", "bread", "oven", "field", "winter", "seed", "harvest", "flour", "market")


def sentence(seed: int, length: int) -> str:
    """`length` words, the same for the same seed."""
    return " ".join(WORDS[(seed * 7 + i * (3 + seed % 5)) % len(WORDS)] for i in range(length)) + "."


@pytest.fixture(scope="session")
def tiny_chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as transformers writes it: 2 layers of width 64, 4 heads on 2 key heads, tied, float32, ChatML."""
    folder = tmp_path_factory.mktemp("models") / "tiny-chat-llama"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((sentence(i, 20) for i in range(50)), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    tokenizer.save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def conversations() -> list[dict]:
    """48 rows of one to three turns, from 12 to some 120 tokens: no two batches have the same number of tokens."""
    rows = []
    for i in range(48):
        messages = [{"role": "system", "content": sentence(i, 2)}] if i % 4 == 0 else []
        for turn in range(1 + i % 3):
            messages.append({"role": "user", "content": sentence(5 * i + turn, 2 + i % 7)})
            messages.append({"role": "assistant", "content": sentence(11 * i + turn, 1 + (3 * i + turn) % 17)})
        rows.append({"messages": messages})
    return rows


@pytest.fixture(scope="session")
def completions(conversations) -> list[dict]:
    """The same rows as a prompt and its last answer."""
    return [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in conversations]
