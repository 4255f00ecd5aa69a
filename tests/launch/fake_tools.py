"""Stand-ins for gcloud, kubectl, sbatch, srun, scontrol and sky: they keep what they were told in the folder FAKE, and
run what a host would run, here and for real. A host is killed where FAKE/kill names a file: once that file is there.
"""

import glob
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

FAKE = Path(os.environ["FAKE"])
HOME = FAKE / "home"


def host(command: list[str], **environment: str) -> int:
    """Run a command as a host would, in a home of its own; 137 where it was killed, as `kill` asks."""
    HOME.mkdir(exist_ok=True)
    process = subprocess.Popen(command, env=os.environ | {"HOME": str(HOME)} | environment, start_new_session=True)
    wish = FAKE / "kill"
    while process.poll() is None:
        if wish.exists() and "worker.sh" in " ".join(command) and glob.glob(wish.read_text()):
            wish.unlink()
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return 137
        time.sleep(0.01)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def gcloud(words: list[str]) -> int:
    state, verb = FAKE / "state", words[3]
    there = "ACTIVE" if words[2] == "queued-resources" else "READY"
    if verb == "describe":
        print(state.read_text() if state.exists() else "", end="")
        return 0 if state.exists() else 1
    if verb == "create":
        state.write_text(there)
    elif verb == "delete":
        state.unlink()
    elif verb == "scp":
        *files, target = [word for word in words[4:] if not word.startswith("--")]
        for file in files:
            shutil.copy(file, HOME / target.partition(":")[2])
    else:
        command = next(word for word in words if word.startswith("--command=")).partition("=")[2]
        code = host(["bash", "-c", command])
        if code == 137:  # the machine is gone
            state.write_text("PREEMPTED" if there == "READY" else "SUSPENDED")
            return 255
        return code
    return 0


def sbatch(words: list[str]) -> int:
    count, code = 0, 0
    while True:
        (FAKE / "requeue").unlink(missing_ok=True)
        code = subprocess.run(
            ["bash", words[-1]],
            env=os.environ | {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(count)},
            check=False,
        ).returncode
        if not (FAKE / "requeue").exists():
            return code
        count += 1


def srun(words: list[str]) -> int:
    while words[0].startswith("--"):
        words = words[1:]
    return host(words)


def scontrol(words: list[str]) -> int:
    assert words == ["requeue", "7"]
    (FAKE / "requeue").touch()
    return 0


def kubectl(words: list[str]) -> int:
    """Applies a Job's, and a JobSet's, rules for exit codes, to a job of one pod."""
    assert words[:2] == ["apply", "-f"]
    found = {each["kind"]: each for each in yaml.safe_load_all(Path(words[2]).read_text())}
    config = FAKE / "config"
    config.mkdir(exist_ok=True)
    for name, text in found["ConfigMap"]["data"].items():
        (config / name).write_text(text)
    if "JobSet" in found:
        spec = found["JobSet"]["spec"]
        job = spec["replicatedJobs"][0]["template"]["spec"]
        restarts = spec["failurePolicy"]["maxRestarts"]
        assert (job["backoffLimit"], spec["failurePolicy"]["rules"][0]["action"]) == (0, "FailJobSet")
    else:
        job = found["Job"]["spec"]
        restarts = job["backoffLimit"]
    rule = next(each for each in job["podFailurePolicy"]["rules"] if each["action"] == "FailJob")["onExitCodes"]
    container = job["template"]["spec"]["containers"][0]
    command = [*container["command"], *(word.replace("/etc/einkorn", str(config)) for word in container["args"])]
    named = {each["name"]: each["value"] for each in container["env"]}
    tokens = dict(line.split("=") for line in (FAKE / "tokens").read_text().split())
    for _ in range(restarts + 1):
        code = host(command, JOB_COMPLETION_INDEX="0", **named, **tokens)
        if code == 0 or code not in rule["values"]:
            return code
    return code


def sky(words: list[str]) -> int:
    job = yaml.safe_load(Path(words[-1]).read_text())
    HOME.mkdir(exist_ok=True)
    for there, here in job["file_mounts"].items():
        shutil.copy(here, there.replace("~", str(HOME)))
    hidden = {name: "" for name in ("HF_TOKEN", "WANDB_API_KEY") if name not in words}
    node = {"SKYPILOT_NODE_IPS": "127.0.0.1\n", "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0", **hidden}
    node["SKYPILOT_TASK_ID"] = "sky-managed-7"
    recovered = job["resources"]["job_recovery"]["recover_on_exit_codes"]
    while True:
        code = host(["bash", "-c", job["setup"]], **node) or host(["bash", "-c", job["run"]], **node)
        if code == 137:  # a node that is gone is replaced
            continue
        if code not in recovered:
            return code


if __name__ == "__main__":
    with (FAKE / "calls").open("a") as calls:
        print(*sys.argv[1:], sep="\t", file=calls)
    tools = {"gcloud": gcloud, "sbatch": sbatch, "srun": srun, "scontrol": scontrol, "kubectl": kubectl, "sky": sky}
    sys.exit(tools[sys.argv[1]](sys.argv[2:]))
