"""The command as a user runs it, in a process of its own: train, load the result, be killed and go on, fail well."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainers.checkpoint import read_meta

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """As a user has it: one device, no flags of the tests."""
    return {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu", "COLUMNS": "200"}


def einkorn(*words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_chat_model, conversations) -> Path:
    """A folder with rows and the configuration that trains on them."""
    folder = tmp_path_factory.mktemp("run")
    for name, rows in (("train", conversations[:40]), ("validation", conversations[40:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def split(name: str) -> dict[str, Any]:
        return {"datasets": [{"dataset_name": "text_sft", "dataset_path": str(folder / f"{name}.jsonl")}]}

    config = {
        "model": {"model_name": str(tiny_chat_model), "torch_dtype_str": "float32", "model_max_length": 128},
        "data": {"train": {**split("train"), "pack": True}, "validation": split("validation")},
        "training": {
            "trainer_type": "TRL_SFT",
            "per_device_train_batch_size": 2,
            "max_steps": 60,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.1,
            "save_steps": 20,
            "logging_steps": 10,
            "eval_strategy": "steps",
            "eval_steps": 30,
            "compile_cache_dir": str(folder / "compiled"),
        },
    }
    (folder / "sft.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def straight(files) -> Path:
    """The output of a run that nothing disturbed, and some of whose steps were profiled."""
    profiled = ["--training.profiler.enable_cpu_profiling"]
    done = einkorn("train", "-c", str(files / "sft.yaml"), "--training.output_dir", str(files / "straight"), *profiled)
    assert done.returncode == 0, done.stderr
    assert f"profile for ui.perfetto.dev: {files / 'straight/profiler/steps-3-5'}" in done.stdout
    assert "no effect here" not in done.stdout + done.stderr
    assert "60/60" in done.stdout
    assert "AutoModelForCausalLM.from_pretrained" in done.stdout
    return files / "straight"


def test_a_profile_holds_its_steps_and_what_ran_in_them(straight):
    (file,) = straight.glob("profiler/steps-3-5/plugins/profile/*/*.trace.json.gz")
    with gzip.open(file) as text:
        events = [event for event in json.load(text)["traceEvents"] if event.get("ph") == "X"]
    steps = [event["args"]["step_num"] for event in events if event["name"] == "train"]
    assert steps == ["3", "4", "5"]
    assert sum(event["name"] == "PjitFunction(train)" for event in events) >= 3


def state_of(checkpoint: Path) -> dict[str, bytes]:
    """Every array of a checkpoint, bit for bit."""
    import jax

    from trainers.checkpoint import restore_part

    tree = read_meta(checkpoint)["checkpoint"]["tree"]
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays: dict[str, bytes] = {}
    for part in ("params", "opt_state"):
        wanted: dict[str, Any] = {}
        for name, text in tree.items():
            if name.startswith(f"{part}/"):
                dtype, shape = text[:-1].split("[")
                sizes = tuple(int(n) for n in shape.split(",") if n.strip())
                wanted[name.removeprefix(f"{part}/")] = jax.ShapeDtypeStruct(sizes, dtype, sharding=one)
        found = restore_part(checkpoint, part, wanted)
        arrays |= {f"{part}/{name}": np.asarray(value).tobytes() for name, value in found.items()}
    return arrays


@pytest.mark.slow
def test_an_optimizer_of_the_users_trains_and_goes_on_bit_for_bit(files, tmp_path):
    (tmp_path / "own.py").write_text(
        "import optax\n\n\ndef lamb(learning_rate, decayed):\n"
        "    return optax.lamb(learning_rate, weight_decay=0.1, mask=decayed)\n"
    )
    own = {"optimizer": f"{tmp_path}/own.py:lamb", "save_steps": 5, "max_steps": 10, "eval_strategy": "no"}
    words = ["train", "-c", str(files / "sft.yaml"), *(f"--training.{key}={value}" for key, value in own.items())]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    done = einkorn(*words, "--training.output_dir", str(straight))
    assert done.returncode == 0, done.stderr
    shutil.copytree(straight / "checkpoint-5", resumed / "checkpoint-5")
    done = einkorn(*words, f"--training.output_dir={resumed}", "--training.try_resume_from_last_checkpoint=true")
    assert done.returncode == 0, done.stderr
    assert "goes on from  checkpoint-5" in done.stdout
    arrays = state_of(straight / "checkpoint-10")
    assert arrays == state_of(resumed / "checkpoint-10")
    assert "opt_state/0/mu/norm/scale" in arrays


@pytest.mark.slow
def test_a_run_whose_state_and_activations_lie_on_the_host_goes_on_bit_for_bit(files, tmp_path):
    zero = "{enable_deepspeed: true, zero_stage: ZERO_1, offload_optimizer: {device: cpu}}"
    own = {"trainer_kwargs.activation_offloading": "true", "save_steps": 5, "max_steps": 10, "eval_strategy": "no"}
    words = ["train", "-c", str(files / "sft.yaml"), *(f"--training.{key}={value}" for key, value in own.items())]
    words.append(f"--deepspeed={zero}")
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    done = einkorn(*words, "--training.output_dir", str(straight))
    assert done.returncode == 0, done.stderr
    shutil.copytree(straight / "checkpoint-5", resumed / "checkpoint-5")
    again = ("--training.output_dir", str(resumed), "--training.try_resume_from_last_checkpoint=true")
    done = einkorn(*words, *again)
    assert done.returncode == 0, done.stderr
    assert state_of(resumed / "checkpoint-10") == state_of(straight / "checkpoint-10")


def test_the_output_folder_holds_what_it_should(straight):
    names = {path.name for path in straight.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "report.html"}
    assert names >= {
        "checkpoint-20",
        "checkpoint-40",
        "checkpoint-60",
        "metrics.jsonl",
        "trainer_state.json",
        "loss.png",
    }
    events = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if "loss" in event]
    assert losses[-1] < 0.8 * losses[0]
    assert [event["step"] for event in events if "eval_loss" in event] == [30, 60]
    state = json.loads((straight / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"]) == (60, 60)
    assert not [
        path for path in straight.parent.iterdir() if path.name.startswith(".")
    ]  # nothing outside of the folder


def test_the_output_folder_loads_in_transformers_without_a_word(straight):
    model, info = AutoModelForCausalLM.from_pretrained(straight, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(straight)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "grain"}], add_generation_prompt=True)["input_ids"]
    with torch.no_grad():
        answer = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    done = einkorn("generate", "-m", str(straight), "grain", "--max-new-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == tokenizer.decode(answer, skip_special_tokens=True).strip()


def test_a_run_that_was_killed_goes_on_bit_for_bit(files, straight):
    """kill -9 after the first checkpoint, then resume: weights, moments, place in the data and the log agree."""
    output = files / "killed"
    command = [sys.executable, "-m", "launch", "train", "-c", str(files / "sft.yaml")]
    command += ["--training.output_dir", str(output)]
    running = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while not (output / "checkpoint-20").is_dir() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (output / "model.safetensors").exists(), "the run ended before it could be killed"
    again = einkorn(*command[3:], "--training.try_resume_from_last_checkpoint", "true")
    assert again.returncode == 0, again.stderr
    assert "goes on from" in again.stdout
    assert "a fresh start" not in again.stdout
    assert state_of(output / "checkpoint-60") == state_of(straight / "checkpoint-60")
    ours, theirs = ((folder / "checkpoint-60/data_state.json").read_text() for folder in (output, straight))
    assert ours == theirs
    for name, value in load_file(straight / "model.safetensors").items():
        assert value.tobytes() == load_file(output / "model.safetensors")[name].tobytes()
    logged = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (output, straight)]
    assert [(e["step"], e.get("loss")) for e in logged[0]] == [(e["step"], e.get("loss")) for e in logged[1]]


def test_sigterm_saves_and_asks_to_be_started_again(files):
    output = files / "preempted"
    command = [sys.executable, "-m", "launch", "train", "-c", str(files / "sft.yaml"), "--training.max_steps", "100000"]
    command += ["--training.output_dir", str(output), "--training.save_steps", "100000"]
    running = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and running.poll() is None:
        if (output / "metrics.jsonl").is_file() and (output / "metrics.jsonl").stat().st_size:
            break
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    _, told = running.communicate(timeout=120)
    assert running.returncode == 42, told
    saved = [path.name for path in output.glob("checkpoint-*")]
    assert len(saved) == 1
    assert saved[0] in told


def test_a_loss_that_is_not_finite_ends_the_run_and_names_rows_and_checkpoint(files):
    done = einkorn(
        *("train", "-c", str(files / "sft.yaml"), "--training.output_dir", str(files / "diverged")),
        *("--training.learning_rate", "1e38", "--training.max_grad_norm", "0", "--training.save_steps", "1"),
        *("--training.warmup_ratio", "0", "--training.eval_strategy", "no", "--training.logging_steps", "1"),
    )
    assert done.returncode == 3, done.stderr
    assert "the last good one" in done.stderr
    assert "train.jsonl" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--training.learning_rat", "1"), "training.learning_rate"),
        (("--training.trainer_type", "TRL_DPO"), "not implemented yet with training.trainer_type TRL_DPO"),
        (("--model.model_name", "no-such-folder"), "no-such-folder is no local folder"),
        (("--data.train.datasets[0].dataset_path", "no.jsonl"), "no.jsonl"),
        (("--mesh.fsdp", "3"), "mesh"),
        (("--model.chat_template", "nonsense"), "nonsense"),
    ],
)
def test_what_cannot_work_is_one_line_and_exit_code_2(files, words, message):
    done = einkorn("train", "-c", str(files / "sft.yaml"), "--training.output_dir", str(files / "never"), *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1


BROKEN = """
import launch.train
from launch.cli import main
from models.attention import BACKENDS

BACKENDS["splash"] = BACKENDS["splash"]._replace(refuses=lambda platform: None, attend=lambda q, *_, **__: q)
launch.train.first_weights = lambda *_: print("weights are read")
main()
"""


@pytest.mark.slow
def test_a_kernel_of_attention_that_is_wrong_here_ends_the_run_before_weights_are_read(files):
    words = ("train", "-c", str(files / "sft.yaml"), "--training.output_dir", str(files / "broken"))
    command = [sys.executable, "-c", BROKEN, *words]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: attention backend 'splash' is wrong on cpu: the output is off by")
    assert error.endswith("set model.attn_implementation: xla")
    assert "weights are read" not in done.stdout
    assert "Traceback" not in done.stderr


def test_a_bad_row_names_file_and_row_or_is_skipped_and_counted(files):
    bad = files / "bad.jsonl"
    lines = (files / "train.jsonl").read_text().splitlines()
    bad.write_text("\n".join([*lines[:2], '{"messages": [{"role": "user"}]}', *lines[2:6]]) + "\n")
    words = ("check", "-c", str(files / "sft.yaml"), "--data.train.datasets[0].dataset_path", str(bad))
    done = einkorn(*words)
    assert done.returncode == 2
    assert "bad.jsonl" in done.stderr
    assert "3" in done.stderr
    done = einkorn(*words, "--data.train.on_bad_row", "skip")
    assert done.returncode == 2
    assert "1 of 7 rows are bad, more than max_bad_row_fraction 0.1" in done.stderr
    done = einkorn(*words, "--data.train.on_bad_row", "skip", "--data.train.max_bad_row_fraction", "0.2")
    assert done.returncode == 0, done.stderr
    assert "6 of 7 rows" in done.stdout


def test_check_shows_who_set_what_and_writes_nothing(files):
    output = files / "unwritten"
    done = einkorn(
        *("check", "-c", str(files / "sft.yaml"), "--training.output_dir", str(output)),
        *("--training.learning_rate=1e-4", "--model.freeze_layers=[model.embed_tokens]"),
    )
    assert done.returncode == 0, done.stderr
    assert "command line" in done.stdout
    assert "[model.embed_tokens]" in done.stdout  # and no markup
    assert "sft.yaml:" in done.stdout
    assert "GiB a device" in done.stdout
    assert not output.exists()


def test_inspect_shows_the_text_of_a_row(files):
    done = einkorn("inspect", "-c", str(files / "sft.yaml"), "--rows", "1")
    assert done.returncode == 0, done.stderr
    assert "<|im_start|>assistant" in done.stdout
    assert "40 of 40 rows used" in done.stdout


def test_a_checkpoint_is_exported_as_the_run_would_have(files, straight):
    folder = files / "exported"
    done = einkorn("export", str(straight / "checkpoint-60"), str(folder))
    assert done.returncode == 0, done.stderr
    final, exported = load_file(straight / "model.safetensors"), load_file(folder / "model.safetensors")
    assert {name: value.tobytes() for name, value in final.items()} == {
        name: value.tobytes() for name, value in exported.items()
    }


def test_chat_goes_on_until_an_empty_line(straight):
    done = subprocess.run(
        [sys.executable, "-m", "launch", "chat", "-m", str(straight), "--max-new-tokens", "4"],
        cwd=ROOT,
        env=environment(),
        input="grain\nwater\n\n",
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("you: ") == 3


def test_help_answers_at_once_and_loads_nothing_heavy():
    code = (
        "import sys, launch.cli; print([m for m in ('jax', 'transformers', 'datasets', 'grain') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert "inspect" in einkorn("--help").stdout
