"""Runs started elsewhere: each target's file is sound, and does what it says against tools that run its hosts' commands
here, for real.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.render import render
from launch.targets import TARGETS
from trainers.exits import RESTARTABLE, Exit

ROOT = Path(__file__).resolve().parents[2]
SHELLCHECK = Path(sys.executable).parent / "shellcheck"
NEEDED = {
    "tpu-vm": ["zone=us-east5-a", "project=p", "accelerator=v5litepod-16", "pause=0", "spot=true"],
    "queued-resources": ["zone=us-east5-a", "project=p", "accelerator=v5litepod-16", "pause=0"],
    "gke-jobset": ["image=einkorn:1", "claim=disk", "topology=2x2", "hosts=1"],
    "slurm": ["partition=gpus"],
    "kubernetes": ["image=einkorn:1", "claim=disk"],
    "skypilot": [],
}
SECRET = "planted-4f1b2c-token"
TOKENS = {"HF_TOKEN": SECRET, "WANDB_API_KEY": SECRET + "2"}


def given(target: str, python: Path | str, *more: str) -> list[str]:
    """Settings with which the target runs on this machine."""
    here = [
        f"python={python}",
        "chip=cpu",
        "retries=3",
        *(["setup=true"] if "setup" in TARGETS[target].settings else []),
    ]
    return [word for each in (*NEEDED[target], *here, *more) for word in ("--set", each)]


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """An environment in which the tools are fakes, with a folder for what they were told."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("gcloud", "kubectl", "sbatch", "srun", "scontrol", "sky"):
        (tools / tool).write_text(
            f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/launch/fake_tools.py" {tool} "$@"\n'
        )
        (tools / tool).chmod(0o755)
    (tmp_path / "tokens").write_text("".join(f"{name}={value}\n" for name, value in TOKENS.items()))
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return plain | TOKENS | {"FAKE": str(tmp_path), "PATH": f"{tools}:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu"}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration that loads; its output folder is in `tmp_path`."""
    data = {"train": {"datasets": [{"dataset_name": "text_sft", "dataset_path": "it's here.jsonl"}]}}
    training = {"trainer_type": "TRL_SFT", "output_dir": str(tmp_path / "output")}
    file = tmp_path / "the run.yaml"
    file.write_text(yaml.safe_dump({"model": {"model_name": "tiny"}, "data": data, "training": training}))
    return file


def launch(target: str, config: Path | str, machine: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """`einkorn launch render --run`."""
    output = str(Path(machine["FAKE"]) / "rendered")
    command = [sys.executable, "-m", "launch", "launch", "render", "--target", target, "-c", str(config)]
    return subprocess.run(
        [*command, "--run", "-o", output, *words], cwd=ROOT, env=machine, capture_output=True, text=True, timeout=300
    )


def stub(folder: Path, *codes: int) -> Path:
    """A trainer that keeps its words and tokens, and ends with one of these codes after the other."""
    (folder / "codes").write_text("".join(f"{code}\n" for code in codes))
    file = folder / "stub"
    file.write_text(
        f'#!/usr/bin/env bash\ncd "{folder}"\n'
        'printf "%s\\t" "$@" >> words; echo >> words\necho "${HF_TOKEN:-} ${WANDB_API_KEY:-}" >> seen\n'
        'code=$(head -n 1 codes); sed -i 1d codes; [[ "${code}" != 255 ]] || kill -KILL $$\nexit "${code}"\n'
    )
    file.chmod(0o755)
    return file


def text(target: str, config: Path, *more: str, words: tuple[str, ...] = ()) -> str:
    return render(target, str(config), [word for word in given(target, "python3", *more) if word != "--set"], words)


@pytest.mark.parametrize("target", ["tpu-vm", "queued-resources", "slurm"])
def test_rendered_scripts_pass_shellcheck(target, config, tmp_path):
    script = tmp_path / "script.sh"
    script.write_text(text(target, config, words=("--training.run_name", "it's a 'name'")))
    done = subprocess.run(
        [SHELLCHECK, "--enable=all", "--exclude=SC2310,SC2312", script], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("target", ["gke-jobset", "kubernetes"])
def test_manifests_have_what_a_cluster_asks_for_and_their_names_fit(target, config):
    found = {each["kind"]: each for each in yaml.safe_load_all(text(target, config, "name=run-1"))}
    for each in found.values():
        assert each["apiVersion"]
        assert each["metadata"]["name"] == "run-1"
        assert each["metadata"]["labels"]["app.kubernetes.io/instance"] == "run-1"
    assert found["ConfigMap"]["data"]["train.yaml"] == config.read_text()
    if target == "gke-jobset":
        job = found["JobSet"]["spec"]["replicatedJobs"][0]["template"]["spec"]
        device = "google.com/tpu"
        assert job["parallelism"] == job["completions"] == 1
        assert found["JobSet"]["spec"]["replicatedJobs"][0]["replicas"] == 1
        (_, two) = yaml.safe_load_all(text(target, config, "name=run-1", "slices=2"))
        assert two["spec"]["replicatedJobs"][0]["replicas"] == 2
        assert set(job["template"]["spec"]["nodeSelector"]) == {
            "cloud.google.com/gke-tpu-accelerator",
            "cloud.google.com/gke-tpu-topology",
        }
    else:
        job, device = found["Job"]["spec"], "nvidia.com/gpu"
        selected = found["Service"]["spec"]["selector"].items()
        assert selected <= job["template"]["metadata"]["labels"].items()
        assert job["template"]["spec"]["subdomain"] == found["Service"]["metadata"]["name"]
        environment = {each["name"]: each["value"] for each in job["template"]["spec"]["containers"][0]["env"]}
        assert environment["EINKORN_COORDINATOR"] == "run-1-0.run-1:8476"
        assert environment["EINKORN_PROCESSES"] == str(job["completions"])
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    assert job["completionMode"] == "Indexed"
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert set(container["resources"]["limits"]) == {device}
    rules = {rule["action"]: rule for rule in job["podFailurePolicy"]["rules"]}
    assert rules["FailJob"]["onExitCodes"]["containerName"] == container["name"]
    assert rules["FailJob"]["onExitCodes"]["values"] == list(RESTARTABLE)
    assert container["args"][:3] == ["launch/env/cpu.env", "-c", "/etc/einkorn/train.yaml"]
    assert (ROOT / container["args"][0]).is_file()


def test_a_skypilot_task_has_its_fields(config):
    task = yaml.safe_load(text("skypilot", config, "nodes=2"))
    assert (task["num_nodes"], task["resources"]["accelerators"], task["workdir"]) == (2, "H100:8", ".")
    assert task["resources"]["use_spot"] is True
    assert task["file_mounts"] == {"~/einkorn.yaml": str(config)}
    # A node that SkyPilot kills, because another one failed, ends with 137, whatever the other's code was.
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [42, 43, 134, 139]


@pytest.mark.parametrize("target", TARGETS)
def test_restartable_codes_start_it_again_words_arrive_as_they_are_and_tokens_stand_nowhere(
    target, config, machine, tmp_path
):
    python = stub(tmp_path, Exit.PREEMPTED, Exit.HUNG, 0)
    done = launch(target, config, machine, *given(target, python), "--training.run_name", "it's a 'name'")
    assert done.returncode == 0, done.stderr
    words = [line.split("\t")[:-1] for line in (tmp_path / "words").read_text().splitlines()]
    assert len(words) == 3
    for each in words:
        assert each[:4] == ["-m", "launch", "train", "-c"]
        assert each[5:] == [
            "--training.run_name",
            "it's a 'name'",
            "--training.try_resume_from_last_checkpoint",
            "true",
        ]
    assert (tmp_path / "seen").read_text() == f"{SECRET} {SECRET}2\n" * 3
    told = (tmp_path / "calls").read_text() + (tmp_path / "rendered").read_text() + done.stdout + done.stderr
    assert SECRET not in told
    for kept in tmp_path.rglob("secrets"):
        assert kept.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("target", TARGETS)
def test_a_python_file_goes_along_with_its_argument_and_loads_there(target, machine, tmp_path):
    file, python = tmp_path / "the run.py", tmp_path / "stub"
    file.write_text(
        "def get_config(steps):\n    rows = {'datasets': [{'dataset_name': 'text_sft', 'dataset_path': 'it.jsonl'}]}\n"
        "    training = {'max_steps': int(steps)}\n"
        "    return {'model': {'model_name': 'tiny'}, 'data': {'train': rows}, 'training': training}\n"
    )
    loads = "import sys; from configs.load import load; print(load(sys.argv[1]).config.training.max_steps)"
    python.write_text(f"#!/bin/sh\nexec '{sys.executable}' -c '{loads}' \"$5\" > '{tmp_path}/loaded'\n")
    python.chmod(0o755)
    done = launch(target, f"{file}:7", machine, *given(target, python))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "loaded").read_text() == "7\n"


@pytest.mark.parametrize("target", TARGETS)
def test_other_codes_stop_it(target, config, machine, tmp_path):
    done = launch(target, config, machine, *given(target, stub(tmp_path, Exit.BAD_INPUT, 0)))
    assert done.returncode == Exit.BAD_INPUT, done.stderr
    assert len((tmp_path / "words").read_text().splitlines()) == 1


@pytest.mark.parametrize("target", ["tpu-vm", "slurm", "gke-jobset", "kubernetes", "skypilot"])
def test_restarts_end(target, config, machine, tmp_path):
    done = launch(target, config, machine, *given(target, stub(tmp_path, *[int(Exit.HUNG)] * 9)))
    # SkyPilot starts a job again whenever it ends with one of these codes, so the last time it ends with another.
    assert done.returncode == (1 if target == "skypilot" else Exit.HUNG), done.stderr
    assert len((tmp_path / "words").read_text().splitlines()) == 1 + 3


def test_preemptions_by_skypilot_are_not_counted_among_the_restarts(config, machine, tmp_path):
    codes = [255, int(Exit.HUNG)] * 3 + [255, 0]  # 255: the machine is gone
    done = launch("skypilot", config, machine, *given("skypilot", stub(tmp_path, *codes)))
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "words").read_text().splitlines()) == len(codes)


def test_a_token_in_the_configuration_or_a_setting_is_refused(config, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    with pytest.raises(ValueError, match="looks like a credential"):
        text("slurm", config, f"partition={SECRET}")
    with pytest.raises(ValueError, match="which hosts get by the environment"):
        text("kubernetes", config, words=("--training.run_name", SECRET))
    config.write_text(config.read_text() + f"# {SECRET}\n")
    with pytest.raises(ValueError, match="which hosts get by the environment") as caught:
        text("kubernetes", config)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "settings", "message"),
    [
        (
            "moon",
            [],
            "--target moon: unknown; allowed: tpu-vm, queued-resources, gke-jobset, slurm, kubernetes, skypilot",
        ),
        ("slurm", ["partitoin=p"], "--set partitoin: not a setting of slurm, NAME=VALUE; allowed: name, nodes, gpus, "),
        ("slurm", ["partition"], "--set partition: not a setting of slurm, NAME=VALUE; allowed: "),
        ("slurm", [], r"--target slurm needs --set NAME=VALUE of: partition \(of the cluster\)"),
        ("slurm", ["nodes=two"], "--set nodes=two: not a number"),
        ("slurm", ["chip=v9"], "--set chip=v9: allowed: a100, cpu, h100, v5e, v5p, v6e"),
        ("slurm", ["name=A b"], "--set name=A b: lower-case letters, digits and -"),
        ("slurm", ["time=1\n#SBATCH x"], "--set time: one line, not empty"),
    ],
)
def test_what_is_unknown_or_missing_is_named_with_what_is_allowed(target, settings, message, config):
    with pytest.raises(ValueError, match=message):
        render(target, str(config), settings)


def test_a_wrong_configuration_shows_before_anything_is_started(config, machine):
    done = launch("slurm", config, machine, *given("slurm", "python3"), "--training.learnin_rate", "1")
    assert (done.returncode, "did you mean training.learning_rate?" in done.stderr) == (2, True)
    assert not (Path(machine["FAKE"]) / "calls").exists()


def test_the_tools_that_are_not_there_are_named(config, machine):
    done = launch("slurm", config, machine | {"PATH": "/nonexistent"}, *given("slurm", "python3"))
    assert (done.returncode, done.stderr) == (2, "error: sbatch is not installed; slurm needs it for --run\n")


@pytest.mark.parametrize("device", ["tpu", "gpu"])
def test_dockerfiles_copy_what_is_there_and_start_the_worker(device):
    lines = (ROOT / f"launch/docker/{device}.Dockerfile").read_text().splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert steps[0][0] == "FROM"
    let_in = (ROOT / ".dockerignore").read_text().split()
    for name in [name for step, words in steps if step == "COPY" for name in words.split()[:-1]]:
        assert (ROOT / name).exists()
        assert f"!{name}" in let_in
    assert json.loads(steps[-1][1]) == ["bash", "launch/worker.sh"]
    assert "TOKEN" not in "".join(words for _, words in steps)


def test_the_readme_names_every_target_setting_and_exit_code():
    page = (ROOT / "launch/README.md").read_text()
    for name, target in TARGETS.items():
        assert f"| `{name}` |" in page
        for setting in target.settings:
            assert re.search(rf"`{setting}`", page), setting
    table = {int(code): again for code, again in re.findall(r"^\| (\d+) \|.*\| (yes|no) \|$", page, re.MULTILINE)}
    assert {code for code, again in table.items() if again == "yes"} == set(RESTARTABLE)
    assert set(map(int, Exit)) <= table.keys()


def real(folder: Path, model: Path, rows: list[dict[str, Any]]) -> Path:
    """A configuration of 40 steps, each saved, that trains on this machine."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"datasets": [{"dataset_name": "text_sft", "dataset_path": str(folder / "rows.jsonl")}]}
    training = {
        "trainer_type": "TRL_SFT",
        "output_dir": str(folder / "output"),
        "max_steps": 40,
        "save_steps": 5,
        "logging_steps": 5,
        "compile_cache_dir": str(folder / "compiled"),
        "token_cache_dir": str(folder / "cache"),
    }
    model_says = {"model_name": str(model), "torch_dtype_str": "float32", "model_max_length": 64}
    config = {"model": model_says, "data": {"train": {**data, "pack": True}}, "training": training}
    (folder / "real.yaml").write_text(yaml.safe_dump(config))
    return folder / "real.yaml"


@pytest.mark.parametrize(
    "target", [name if name == "tpu-vm" else pytest.param(name, marks=pytest.mark.slow) for name in TARGETS]
)
def test_a_run_whose_host_is_killed_goes_on_to_its_end(target, machine, tmp_path, tiny_chat_model, conversations):
    config = real(tmp_path, tiny_chat_model, conversations)
    (tmp_path / "kill").write_text(str(tmp_path / "output/checkpoint-[1-3]*"))
    done = launch(target, config, machine, *given(target, sys.executable))
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert not (tmp_path / "kill").exists()
    starts = re.findall(r"goes on from +(\S+)", said)
    assert len(starts) == 2, said
    assert starts[0] == "nothing,"
    assert starts[1].startswith("checkpoint-")
    logged = [json.loads(line) for line in (tmp_path / "output/metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in logged if "loss" in line]
    assert steps == [5, 10, 15, 20, 25, 30, 35, 40]
    if target == "tpu-vm":
        calls = (tmp_path / "calls").read_text()
        assert re.findall(r"\t(create|delete)\t", calls) == ["create", "delete", "create"]
