"""Every chip's flags are known to the program that reads them: XLA's to jaxlib, a TPU's to libtpu."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.targets import CHIPS

ROOT = Path(__file__).resolve().parents[2]
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
OPENS_A_CLIENT = "import jax; print(jax.devices()[0].platform)"
COMPILES = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
rows = NamedSharding(Mesh(np.array(devices), ("fsdp",)), PartitionSpec("fsdp"))
matrix = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=rows)
print("all-gather" in jax.jit(lambda x: x @ x).lower(matrix).compile().as_text())
"""


def under(chip: str, code: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Python code in a process with a chip's flags, as worker.sh sets them; `more` stands in the environment before."""
    flags = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
    plain = {name: value for name, value in os.environ.items() if name not in flags} | {"JAX_PLATFORMS": "cpu"}
    script = f'set -o allexport; source launch/env/{chip}.env; set +o allexport; exec "$@"'
    command = ["bash", "-euc", script, "bash", sys.executable, "-c", code, *words]
    return subprocess.run(command, cwd=ROOT, env=plain | more, capture_output=True, text=True, timeout=300)


def set_by(chip: str) -> dict[str, list[str]]:
    done = under(chip, "import os; print(*map(os.environ.get, ('XLA_FLAGS', 'LIBTPU_INIT_ARGS')), sep='|')")
    xla, libtpu = done.stdout.strip().split("|")
    return {"XLA_FLAGS": xla.split(), "LIBTPU_INIT_ARGS": libtpu.split()}


@pytest.mark.parametrize("chip", [chip for chip in CHIPS if chip not in TOPOLOGIES])
def test_jaxlib_knows_every_flag_of_a_chip_that_is_no_tpu(chip):
    done = under(chip, OPENS_A_CLIENT)
    assert (done.returncode, done.stdout) == (0, "cpu\n"), done.stderr


def test_a_flag_that_jaxlib_does_not_know_ends_the_process():
    done = under("h100", OPENS_A_CLIENT, XLA_FLAGS="--xla_gpu_no_such_flag=true")
    assert done.returncode != 0
    assert re.search(r"Unknown flags? in XLA_FLAGS: --xla_gpu_no_such_flag=true", done.stderr)


def test_each_chip_has_the_flags_of_its_own_program():
    for chip in CHIPS:
        told = {name: [flag for flag in flags if flag != "None"] for name, flags in set_by(chip).items()}
        expected = "LIBTPU_INIT_ARGS" if chip in TOPOLOGIES else None if chip == "cpu" else "XLA_FLAGS"
        assert {name for name, flags in told.items() if flags} == {expected} - {None}, chip
        assert all(re.fullmatch(r"--xla_\w+=\w+", flag) for flags in told.values() for flag in flags)


def compiled(chip: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A product of a matrix that four chips share, compiled for these, which are not here."""
    away = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return under(chip, COMPILES, TOPOLOGIES[chip], **away, **more)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu (684 MB) is not installed: extra `tpu`")
def test_libtpu_knows_every_flag_of_a_tpu_and_compiles_under_them():
    for chip in TOPOLOGIES:
        done = compiled(chip)
        assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    done = compiled("v5e", LIBTPU_INIT_ARGS="--xla_tpu_no_such_flag=true")
    assert done.returncode != 0
    assert "Unknown command line flag 'xla_tpu_no_such_flag'" in done.stderr
