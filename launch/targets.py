"""Where a run can be started, and what each place has to be told: the table behind `einkorn launch render`."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
CHIPS = tuple(sorted(file.stem for file in (HERE / "env").glob("*.env")))


class Setting(NamedTuple):
    """One thing to be said with --set NAME=VALUE; without a default it has to be."""

    default: str | None
    meaning: str
    number: bool = False
    allowed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """A place to run: its template in `targets/`, its settings, what runs the rendered file, and where on the hosts the
    configuration then lies, without its suffix (None: where it is here)."""

    about: str
    template: str
    settings: dict[str, Setting]
    command: tuple[str, ...]
    config: str | None = None


def _settings(chip: str, **own: Setting) -> dict[str, Setting]:
    return {
        "name": Setting("einkorn", "of the job and all that belongs to it"),
        **own,
        "chip": Setting(chip, "whose flags, of launch/env", allowed=CHIPS),
        "python": own.get("python", Setting(".venv/bin/python", "the interpreter on the hosts")),
        "retries": Setting("20", "restarts at most", number=True),
    }


YES_NO = ("true", "false")


def _setup(extra: str) -> Setting:
    command = f"bash launch/venv.sh; .venv/bin/python -m pip install --quiet --editable '.[{extra}]'"
    return Setting(command, "installs einkorn on a host, in the clone's root")


_CLUSTER = {
    "image": Setting(None, "with einkorn in it, of launch/docker"),
    "claim": Setting(None, "PersistentVolumeClaim that all pods may write: model, data, output_dir"),
    "mount": Setting("/data", "where the pods see it"),
    "namespace": Setting("default", "of the cluster"),
    "python": Setting("python3", "the interpreter in the image"),
}
_TPU = {
    "accelerator": Setting(None, "such as v5litepod-16, v5p-128, v6e-256"),
    "zone": Setting(None, "such as us-east5-a"),
    "project": Setting(None, "of Google Cloud"),
    "runtime": Setting(
        "v2-alpha-tpuv5-lite", "software of the TPU VM; v2-alpha-tpuv5 for v5p, v2-alpha-tpuv6e for v6e"
    ),
    "spot": Setting("false", "cheaper, and taken away at any time", allowed=YES_NO),
    "pause": Setting("30", "seconds between two looks and before a restart", number=True),
    "setup": _setup("tpu,gcs"),
}

TARGETS = {
    "tpu-vm": Target(
        "a TPU VM of Google Cloud, single or pod",
        "tpu.sh.in",
        _settings("v5e", **_TPU),
        ("bash", "{file}", "babysit"),
        config="../train",
    ),
    "queued-resources": Target(
        "the same, waiting in Google Cloud's queue",
        "tpu.sh.in",
        _settings("v5e", **_TPU),
        ("bash", "{file}", "babysit"),
        config="../train",
    ),
    "gke-jobset": Target(
        "TPU slices on Google's Kubernetes",
        "jobset.yaml.in",
        _settings(
            "v5e",
            **_CLUSTER,
            accelerator=Setting("tpu-v5-lite-podslice", "tpu-v5p-slice, tpu-v6e-slice"),
            topology=Setting(None, "such as 4x4"),
            hosts=Setting(None, "of a slice: its chips over `chips`", number=True),
            chips=Setting("4", "a host", number=True),
            slices=Setting("1", "each with a copy of the model at least; GKE tells them of one another", number=True),
        ),
        ("kubectl", "apply", "-f", "{file}"),
        config="/etc/einkorn/train",
    ),
    "slurm": Target(
        "SLURM, from a clone on a file system that all nodes see",
        "slurm.sh.in",
        _settings(
            "h100",
            nodes=Setting("1", "of the job", number=True),
            gpus=Setting("8", "a node", number=True),
            time=Setting("24:00:00", "at most"),
            partition=Setting(None, "of the cluster"),
            clone=Setting(str(HERE.parent), "einkorn's folder, as the nodes see it"),
        ),
        ("sbatch", "{file}"),
    ),
    "kubernetes": Target(
        "pods with NVIDIA GPUs on any Kubernetes",
        "gpu-job.yaml.in",
        _settings(
            "h100",
            **_CLUSTER,
            nodes=Setting("1", "pods", number=True),
            gpus=Setting("8", "a pod", number=True),
        ),
        ("kubectl", "apply", "-f", "{file}"),
        config="/etc/einkorn/train",
    ),
    "skypilot": Target(
        "whichever cloud SkyPilot finds",
        "sky.yaml.in",
        _settings(
            "h100",
            nodes=Setting("1", "machines", number=True),
            accelerators=Setting("H100:8", "of a machine"),
            spot=Setting("true", "cheaper, and taken away at any time", allowed=YES_NO),
            setup=_setup("cuda,gcs"),
        ),
        ("sky", "jobs", "launch", "--yes", "{file}"),
        config="~/{name}",
    ),
}
