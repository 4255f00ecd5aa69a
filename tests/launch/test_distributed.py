"""How the processes of a run find one another, from the environment alone."""

import os
import socket
import subprocess
import sys

import pytest

from launch.distributed import arguments, has_several_cpus
from tests.conftest import ROOT

SUM = """
import numpy as np
from launch import distributed
distributed.start_alone()
distributed.start()
import jax
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((8,), ("x",))
parts = np.random.default_rng(0).normal(size=(8, 1000)).astype(np.float32)
array = jax.make_array_from_callback(parts.shape, NamedSharding(mesh, P("x")), lambda index: parts[index])
total = jax.jit(lambda x: x.sum(axis=0), out_shardings=NamedSharding(mesh, P()))(array)
print("sum", np.asarray(total.addressable_shards[0].data).tobytes().hex())
"""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "a[1-2]"}, {}),
        ({"SLURM_NTASKS": "4"}, None),  # inside of an allocation, but not started by srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, {}),
        ({"MEGASCALE_NUM_SLICES": "2", "TPU_WORKER_HOSTNAMES": "10.0.0.1"}, {}),
        (
            {"EINKORN_COORDINATOR": "host:1234", "EINKORN_PROCESSES": "2", "EINKORN_PROCESS": "1"},
            {"coordinator_address": "host:1234", "num_processes": 2, "process_id": 1},
        ),
    ],
)
def test_the_environment_says_whether_there_are_others(environment, expected):
    assert arguments(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"EINKORN_COORDINATOR": "host:1234"}, "not set: EINKORN_PROCESSES, EINKORN_PROCESS"),
        (
            {"EINKORN_COORDINATOR": "h:1", "EINKORN_PROCESSES": "two", "EINKORN_PROCESS": "0"},
            "EINKORN_PROCESSES is 'two', not a number",
        ),
    ],
)
def test_a_start_half_said_is_an_error(environment, message):
    with pytest.raises(ValueError, match=message):
        arguments(environment)


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"JAX_PLATFORMS": "cpu"}, False),
        ({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}, False),
        ({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--a --xla_force_host_platform_device_count=8 --b=2"}, True),
        ({"JAX_PLATFORMS": "cuda", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, False),
    ],
)
def test_only_a_cpu_that_is_to_be_several_devices_is_several(environment, several):
    assert has_several_cpus(environment) == several


def summed(processes: int) -> set[str]:
    """The bytes of a sum over eight devices that so many processes share, as each of them has it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={8 // processes}"
    plain = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    shared = {"EINKORN_COORDINATOR": f"localhost:{port}", "EINKORN_PROCESSES": str(processes)}
    runs = []
    for number in range(processes):
        own = {**shared, "EINKORN_PROCESS": str(number)} if processes > 1 else {}
        command = [sys.executable, "-c", SUM]
        runs.append(subprocess.Popen(command, cwd=ROOT, env=plain | own, stdout=subprocess.PIPE, text=True))
    said = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0] * processes
    return {line for text in said for line in text.splitlines() if line.startswith("sum ")}


def test_devices_add_up_to_the_same_bits_however_processes_share_them():
    alone, shared = summed(1), summed(2)
    assert len(alone) == 1
    assert shared == alone
