"""Several processes of one run, as several hosts have them: the numbers of one, and one end for all of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import jax
import pytest
import yaml

from launch.fellows import Ending, ending
from tests.conftest import ROOT
from tests.parity.preference_runs import pairs
from tests.tiny import sentence
from trainers.exits import RESTARTABLE, Exit
from trainers.loop import Diverged, Interrupted

MESHES = ("fsdp 8", "fsdp 4 tensor 2")
REWARD = """
def grains(completions, wanted, **_):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [text.count(word) / max(1, len(text.split())) + len(text) / 100 for text, word in zip(texts, wanted)]
"""
FAULT = """
import os

def change(row):
    if os.environ["EINKORN_PROCESS"] == "2" and row["number"] > 150:
        raise ZeroDivisionError("nothing to divide by")
    return row
"""


def begin(config: Path, output: Path, *words: str, processes: int = 4, devices: int = 2) -> list[subprocess.Popen[str]]:
    """The run's processes, each with so many devices, what they say in `output`-0.txt and so on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices}"
    plain = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "launch", "train", "-c", str(config), f"--training.output_dir={output}", *words]
    runs = []
    for number in range(processes):
        shared = {"EINKORN_COORDINATOR": f"localhost:{port}", "EINKORN_PROCESSES": str(processes)}
        own = {**shared, "EINKORN_PROCESS": str(number)} if processes > 1 else {}
        with said_by(output, number).open("w") as said:
            each = subprocess.Popen(
                command, cwd=ROOT, env=plain | own, stdout=said, stderr=subprocess.STDOUT, text=True
            )
        runs.append(each)
    return runs


def said_by(output: Path, number: int) -> Path:
    return output.with_name(f"{output.name}-{number}.txt")


def codes(runs: list[subprocess.Popen[str]], *, within: float = 400) -> list[int]:
    """Their exit codes as a shell has them; whoever has not ended by then is killed, and -1."""
    until, found = time.monotonic() + within, []
    for run in runs:
        try:
            code = run.wait(max(0.0, until - time.monotonic()))
            found.append(code if code >= 0 else 128 - code)
        except subprocess.TimeoutExpired:
            run.kill()
            found.append(-1)
    return found


def trained(config: Path, output: Path, *words: str, processes: int = 4, devices: int = 2) -> Path:
    """The output of a run that ends well."""
    runs = begin(config, output, *words, processes=processes, devices=devices)
    assert codes(runs) == [0] * processes, said_by(output, 0).read_text()[-3000:]
    return output


def errors(output: Path, number: int) -> list[str]:
    return [line for line in said_by(output, number).read_text().splitlines() if line.startswith("error: ")]


def measured(output: Path) -> dict[int, list[float]]:
    """Of each step the loss and the gradient's norm, and the reward where there is one."""
    events = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    named = ("loss", "grad_norm", "reward")
    return {event["step"]: [event[name] for name in named if name in event] for event in events if "loss" in event}


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_chat_model, tiny_seeing_model, conversations, coloured_rows) -> Path:
    """Rows, and for each method a configuration that trains on them on eight devices."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "own.py").write_text(REWARD)
    (folder / "faulty.py").write_text(FAULT)

    def data(name: str, rows: list[dict[str, Any]], kind: str, **more: Any) -> dict[str, Any]:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        entry = {"dataset_name": kind, "dataset_path": str(folder / f"{name}.jsonl")}
        return {"train": {"datasets": [entry], **more}}

    texts = [{"text": sentence(i, 20 + i % 30), "number": i} for i in range(400)]
    preferred = [
        {"messages": row["prompt"], **{side: {"messages": row[side]} for side in ("chosen", "rejected")}}
        for row in pairs(32)
    ]
    seen = {"train": {"datasets": [{"dataset_name": "vl_sft_jsonl", "dataset_path": str(coloured_rows)}]}}
    asked = [{"prompt": sentence(i, 4), "wanted": "mill"} for i in range(24)]
    grpo = {
        "reward_functions": [f"{folder}/own.py:grains"],
        "trainer_kwargs": {"steps_per_generation": 4},
        "grpo": {"num_generations": 4, "max_completion_length": 12},
    }
    methods = {
        "sft": ("TRL_SFT", data("chats", conversations, "text_sft", pack=True), {}),
        "vl_sft": ("TRL_SFT", seen, {}),
        "clm": ("OUMI", data("texts", texts[:120], "text", pack=True), {}),
        "dpo": ("TRL_DPO", data("pairs", preferred, "preference_pairs_jsonl"), {}),
        "grpo": ("TRL_GRPO", data("prompts", asked, "text_sft"), grpo),
        "stream": ("OUMI", data("stream", texts, "text", pack=True, stream=True), {}),
        "bad": ("OUMI", data("bad", [*texts[:237], {"words": "?"}, *texts[237:]], "text", pack=True, stream=True), {}),
    }
    for name, (trainer, rows, more) in methods.items():
        model = tiny_seeing_model if name == "vl_sft" else tiny_chat_model
        settings = {
            "model": {"model_name": str(model), "torch_dtype_str": "float32", "model_max_length": 128},
            "data": rows,
            "training": {
                "trainer_type": trainer,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 2,
                "max_steps": 6,
                "save_steps": 3,
                "logging_steps": 1,
                "learning_rate": 3e-3,
                "lr_scheduler_type": "constant",
                "enable_tensorboard": False,
                "compile_cache_dir": str(folder / "compiled"),
                "token_cache_dir": str(folder / "tokens"),
                **more,
            },
            "mesh": {"fsdp": 8},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return folder


def test_a_row_that_one_process_finds_bad_ends_all_of_them_with_its_message(files):
    runs = begin(files / "bad.yaml", files / "bad", "--training.max_steps=40")
    assert codes(runs, within=120) == [Exit.BAD_INPUT] * 4
    expected = f"error: row 238 of {files}/bad.jsonl: has no field 'text'; its fields are ['words']."
    for number in range(4):
        (line,) = errors(files / "bad", number)
        assert line.startswith(expected)


def test_a_fault_is_told_with_the_process_that_had_it_and_a_lost_process_is_worth_a_restart():
    def of(error: BaseException) -> Ending:
        return ending(error, process=2, processes=4)

    assert of(ZeroDivisionError("by 0\nmore")) == (1, "process 2 of 4: ZeroDivisionError: by 0")
    assert of(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")) == (
        1,
        "process 2 of 4: JaxRuntimeError: RESOURCE_EXHAUSTED: out of memory",
    )
    assert of(ValueError("a\nb")) == (Exit.BAD_INPUT, "a\nb")
    assert of(KeyboardInterrupt()).code == Exit.INTERRUPTED
    assert of(Diverged("nan")).code == Exit.DIVERGED
    assert of(Interrupted("stopped", signal.SIGTERM)).code == Exit.PREEMPTED
    assert of(Interrupted("stopped", signal.SIGINT)).code == Exit.INTERRUPTED
    lost = of(jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"))
    assert lost.code == Exit.HUNG
    assert lost.text.startswith("another process of this run is gone, or out of reach; a new start goes on from")


@pytest.mark.slow
def test_an_exception_in_one_process_ends_all_of_them_with_its_message(files):
    stream = yaml.safe_load((files / "stream.yaml").read_text())
    stream["data"]["train"]["datasets"][0]["dataset_kwargs"] = {"transform": f"{files}/faulty.py:change"}
    (files / "faulty.yaml").write_text(yaml.safe_dump(stream))
    runs = begin(files / "faulty.yaml", files / "faulty", "--training.max_steps=40")
    assert codes(runs, within=120) == [Exit.BAD_INPUT] * 4
    said = {line for number in range(4) for line in errors(files / "faulty", number)}
    assert len(said) == 1
    assert said.pop().endswith("faulty.py:change raised ZeroDivisionError: nothing to divide by")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "mesh"), [*product(("sft", "clm", "dpo", "grpo"), MESHES), ("vl_sft", "fsdp 8")])
def test_four_processes_of_two_devices_train_as_one_process_of_eight(method, mesh, files):
    words = [f"--mesh.{axis}={size}" for axis, size in zip(*[iter(mesh.split())] * 2, strict=True)]
    name = f"{method}-{mesh.replace(' ', '-')}"
    one = trained(files / f"{method}.yaml", files / f"{name}-1", *words, processes=1, devices=8)
    four = trained(files / f"{method}.yaml", files / f"{name}-4", *words)
    expected, found = measured(one), measured(four)
    assert found.keys() == expected.keys() == set(range(1, 7))
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-6, abs=0.0), step
    if method == "grpo":
        kept = [(output / "completions.jsonl").read_text() for output in (one, four)]
        assert kept[0].count("\n") == (96 if mesh == "fsdp 8" else 48)
        of_one, of_four = ([json.loads(line) for line in each.splitlines()] for each in kept)
        assert of_four == of_one  # answers, rewards, advantages


TWELVE = ("--training.max_steps=12",)
AGAIN = (*TWELVE, "--training.try_resume_from_last_checkpoint=true")


@pytest.fixture(scope="module")
def straight(files) -> dict[str, Path]:
    """What runs of four processes leave that nothing disturbed."""
    return {
        method: trained(files / f"{method}.yaml", files / f"{method}-straight", *TWELVE) for method in ("sft", "grpo")
    }


def stopped(files: Path, method: str, number: signal.Signals, process: int) -> tuple[Path, list[int]]:
    """A run of which one process is sent a signal after the third step, and how its processes end."""
    output = files / f"{method}-{number.name}-{process}"
    runs = begin(files / f"{method}.yaml", output, *TWELVE)
    while not (output / "checkpoint-3").exists():
        assert all(run.poll() is None for run in runs), said_by(output, 0).read_text()[-3000:]
        time.sleep(0.02)
    runs[process].send_signal(number)
    return output, codes(runs, within=60)


def assert_goes_on(files: Path, method: str, output: Path, straight: Path) -> None:
    trained(files / f"{method}.yaml", output, *AGAIN)
    assert measured(output) == measured(straight)
    assert (output / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_a_sigterm_to_one_saves_on_all_after_the_same_step_and_the_run_goes_on_bit_for_bit(method, files, straight):
    output, ended = stopped(files, method, signal.SIGTERM, 2)
    assert ended == [Exit.PREEMPTED] * 4
    said = {line for number in range(4) for line in errors(output, number)}
    last = max(int(folder.name.removeprefix("checkpoint-")) for folder in output.glob("checkpoint-*"))
    assert said == {f"error: SIGTERM: stopped at step {last}, saved as checkpoint-{last}"}
    assert 3 < last < 12
    assert_goes_on(files, method, output, straight[method])


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 2])
def test_a_killed_process_ends_the_others_within_a_minute_and_the_run_goes_on_bit_for_bit(process, files, straight):
    output, ended = stopped(files, "sft", signal.SIGKILL, process)
    assert ended[process] == 137
    assert set(ended) <= set(RESTARTABLE)
    for number in {0, 1, 2, 3} - {process}:
        if process == 0:  # with it goes what jax's processes meet at: jax aborts the others
            assert ended[number] in (Exit.HUNG, 134)
            assert "another task died" in said_by(output, number).read_text() or errors(output, number)
        else:
            assert ended[number] == Exit.HUNG
            (line,) = errors(output, number)
            assert line.startswith("error: another process of this run is gone, or out of reach; a new start goes on")
    assert_goes_on(files, "sft", output, straight["sft"])


@pytest.mark.slow
def test_two_processes_go_on_from_the_checkpoint_of_four_with_the_same_losses(files, straight):
    words = (*TWELVE, f"--training.resume_from_checkpoint={straight['sft']}/checkpoint-6")
    two = trained(files / "sft.yaml", files / "sft-two", *words, processes=2, devices=4)
    rest = {step: values for step, values in measured(straight["sft"]).items() if step > 6}
    assert measured(two).keys() == rest.keys()
    for step, values in measured(two).items():
        assert values == pytest.approx(rest[step], rel=1e-6), step
