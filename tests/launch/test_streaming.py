"""Training from streams through the command line: the page on pretraining as it stands, stops, and two processes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import load_file

from tests.conftest import ROOT
from tests.tiny import sentence

PAGE = """
model:
  model_name: {model}

data:
  train:
    datasets:
      - dataset_name: "text"
        dataset_path: "{corpus}"
        streaming: true  # Stream data from disk and/or network
    pack: true  # Pack multiple documents into a single sequence
    max_length: 2048  # Maximum sequence length

training:
  trainer_type: "OUMI"
"""

CHATS = """
model:
  model_name: {model}

data:
  train:
    datasets:
      - dataset_name: "text_sft"
        dataset_path: "{rows}"
        split: "train"
    collator_name: "text_with_padding"

training:
  trainer_type: "TRL_SFT"
"""


def environment(devices: int, **more: str) -> dict[str, str]:
    """One device count for a run; nothing is fetched."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "HF_HUB_OFFLINE": "1", **more}


def begin(*words: str, devices: int = 1, **more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch", "train", *words]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(devices, **more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(run: subprocess.Popen[str], code: int = 0) -> str:
    said, _ = run.communicate(timeout=300)
    assert run.returncode == code, said
    return said


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_chat_model) -> Path:
    """A folder with a corpus of two kinds, and the configuration that streams it as a mixture."""
    folder = tmp_path_factory.mktemp("stream")
    (folder / "corpus").mkdir()
    for number in range(3):
        documents = "\n\n".join(sentence(100 * number + i, 10 + i % 60) for i in range(40))
        (folder / f"corpus/{number}.txt").write_text(documents)
    rows = "".join(json.dumps({"text": sentence(500 + i, 5 + i % 30)}) + "\n" for i in range(90))
    (folder / "more.jsonl").write_text(rows)
    datasets = [
        {"dataset_name": "text", "dataset_path": str(folder / "corpus"), "mixture_proportion": 0.6},
        {"dataset_name": "text", "dataset_path": str(folder / "more.jsonl"), "mixture_proportion": 0.4},
    ]
    config = {
        "model": {"model_name": str(tiny_chat_model), "torch_dtype_str": "float32", "model_max_length": 64},
        "data": {"train": {"datasets": datasets, "stream": True, "pack": True}},
        "training": {
            "trainer_type": "OUMI",
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 24,
            "save_steps": 8,
            "logging_steps": 1,
            "learning_rate": 3e-3,
            "enable_tensorboard": False,
            "compile_cache_dir": str(folder / "compiled"),
        },
    }
    (folder / "stream.yaml").write_text(yaml.safe_dump(config))
    return folder


def losses(output: Path) -> dict[int, float]:
    events = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return {event["step"]: event["loss"] for event in events if "loss" in event}


@pytest.fixture(scope="module")
def straight(files) -> Path:
    """What a run that nothing disturbed leaves, on two devices."""
    said = finish(begin("-c", str(files / "stream.yaml"), f"--training.output_dir={files}/straight", devices=2))
    assert "a stream, read as it comes" in said
    assert re.search(
        rf"read [\d,]+ rows, .* tokens; (5\d|6\d)\.\d % {files}/corpus, (3|4)\d\.\d % {files}/more.jsonl", said
    ), said
    return files / "straight"


def test_the_page_on_pretraining_trains_as_it_stands(files, tiny_chat_model, tmp_path):
    (tmp_path / "page.yaml").write_text(PAGE.format(model=tiny_chat_model, corpus=files / "corpus"))
    said = finish(begin("-c", str(tmp_path / "page.yaml"), f"--training.output_dir={tmp_path}/out"))
    assert "all rows are read and tokenised first, to count the steps" in said
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.slow
def test_the_page_on_fine_tuning_trains_as_it_stands(conversations, tiny_chat_model, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations))
    (tmp_path / "page.yaml").write_text(CHATS.format(model=tiny_chat_model, rows=tmp_path / "rows.jsonl"))
    said = finish(begin("-c", str(tmp_path / "page.yaml"), f"--training.output_dir={tmp_path}/out"))
    assert "18/18" in said
    assert (tmp_path / "out/model.safetensors").is_file()


def test_a_stopped_stream_goes_on_bit_for_bit(files, straight):
    output = files / "stopped"
    run = begin("-c", str(files / "stream.yaml"), f"--training.output_dir={output}", devices=2)
    while not (output / "checkpoint-8").exists():
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    words = [f"--training.output_dir={output}", "--training.try_resume_from_last_checkpoint=true"]
    finish(begin("-c", str(files / "stream.yaml"), *words, devices=2))
    for name in load_file(straight / "model.safetensors"):
        assert (output / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes(), name
    assert losses(output) == losses(straight)


def test_two_processes_read_a_part_each_and_train_the_same_model(files, straight):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    output = files / "two"
    shared = {"EINKORN_COORDINATOR": f"localhost:{port}", "EINKORN_PROCESSES": "2"}
    words = ["-c", str(files / "stream.yaml"), f"--training.output_dir={output}"]
    runs = [begin(*words, **shared, EINKORN_PROCESS=str(number)) for number in range(2)]
    for run in runs:
        finish(run)
    assert losses(output) == pytest.approx(losses(straight), rel=1e-5)
    # One process goes on from the state of two.
    again = files / "again"
    words = [f"--training.output_dir={again}", f"--training.resume_from_checkpoint={output}/checkpoint-16"]
    finish(begin("-c", str(files / "stream.yaml"), *words, devices=2))
    rest = {step: loss for step, loss in losses(straight).items() if step > 16}
    assert losses(again) == pytest.approx(rest, rel=1e-5)


@pytest.mark.slow
def test_workers_that_read_and_tokenise_change_nothing(files, straight):
    output = files / "workers"
    words = [f"--training.output_dir={output}", "--training.dataloader_num_workers=2"]
    finish(begin("-c", str(files / "stream.yaml"), *words, devices=2))
    assert losses(output) == losses(straight)


def test_what_is_due_by_epoch_is_refused_for_a_stream(files):
    words = ["--training.save_steps=0", "--training.save_epoch=true", f"--training.output_dir={files}/epochs"]
    said = finish(begin("-c", str(files / "stream.yaml"), *words), code=2)
    assert "training.save_epoch: true: where an epoch of a stream ends is not known; count in steps" in said


def test_a_stream_that_cannot_be_counted_needs_max_steps(files, tmp_path):
    words = ["--training.max_steps=-1", "--data.train.datasets", "[{dataset_name: allenai/c4}]"]
    said = finish(begin("-c", str(files / "stream.yaml"), *words), code=2)
    assert "how many rows allenai/c4 has is not known before they are read" in said
    assert "set training.max_steps" in said
