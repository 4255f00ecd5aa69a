"""How the processes of a run find one another, from the environment alone."""

import pytest

from launch.distributed import arguments


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
