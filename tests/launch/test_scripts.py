"""The shell scripts: clean to shellcheck, strict, and plain when called wrongly."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHELLCHECK = Path(sys.executable).parent / "shellcheck"
SCRIPTS = [*sorted((ROOT / "launch").rglob("*.sh")), ROOT / ".ci/run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    done = subprocess.run(
        [SHELLCHECK, "--enable=all", "--exclude=SC2310,SC2312", script], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_stops_at_the_first_failure(script: Path) -> None:
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert next(line for line in lines if not line.startswith("#")) == "set -euo pipefail"


def test_quickstart_names_the_devices_and_tasks_it_knows() -> None:
    done = subprocess.run(["bash", ROOT / "launch/quickstart.sh", "gpu"], capture_output=True, text=True)
    allowed = "cpu, cuda, tpu, sft, dpo, grpo, vl_sft, vl_grpo"
    said = f"quickstart.sh: 'gpu' is neither a device nor a task; allowed: {allowed}\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_an_interpreter_too_old_or_missing_is_named(tmp_path: Path) -> None:
    script = tmp_path / "launch/venv.sh"
    script.parent.mkdir()
    script.write_text((ROOT / "launch/venv.sh").read_text())
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for python in (str(old), "no-such-python"):
        done = subprocess.run(
            ["bash", script], env={"PYTHON": python, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True
        )
        assert done.returncode == 2
        assert done.stderr.endswith(
            f"einkorn needs Python 3.11 or newer, which '{python}' is not; set PYTHON=python3.12, say\n"
        )
    assert not (tmp_path / ".venv").exists()
