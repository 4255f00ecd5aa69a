"""Start of the processes of one run, from what the environment says: TPU pod, SLURM, Open MPI, or an
explicit address.

An explicit start sets, for each process: `EINKORN_COORDINATOR=host:port`, `EINKORN_PROCESSES=n`, `EINKORN_PROCESS=i`.

A process alone that has several CPU devices starts as one of one, from the command line. Its devices then add up by
gloo, as those of several processes do, and in the same order: a sum over devices has the same bits, however processes
share them. Otherwise XLA adds from the first device to the last, and rounds otherwise, which Adam's first steps enlarge
where a gradient is about as small as its epsilon: GRPO's norm was off by 2e-6 after four updates. Accelerators are not
concerned.
"""

import logging
import os
import re
import socket
from collections.abc import Mapping

log = logging.getLogger(__name__)

EXPLICIT = ("EINKORN_COORDINATOR", "EINKORN_PROCESSES", "EINKORN_PROCESS")
HEARTBEAT = 40  # seconds without one; jax looks at them now and then, so that a lost host is noticed within a minute


def arguments(environment: Mapping[str, str]) -> dict[str, object] | None:
    """What `jax.distributed.initialize` is to be called with; empty where jax finds all by itself; None for a single
    process.

    Raises ValueError where an explicit start is half said.
    """
    given = [name for name in EXPLICIT if environment.get(name)]
    if given and len(given) < len(EXPLICIT):
        missing = ", ".join(name for name in EXPLICIT if name not in given)
        raise ValueError(f"an explicit start needs {', '.join(EXPLICIT)}; not set: {missing}")
    if given:
        return {
            "coordinator_address": environment["EINKORN_COORDINATOR"],
            "num_processes": _number(environment, "EINKORN_PROCESSES"),
            "process_id": _number(environment, "EINKORN_PROCESS"),
        }
    return {} if _several_tasks(environment) else None


def start(environment: Mapping[str, str] = os.environ) -> None:
    """Join the run's other processes, if there are any. Must come before anything touches a device."""
    if (found := arguments(environment)) is not None:
        _initialize(found)


def start_alone(environment: Mapping[str, str] = os.environ) -> None:
    """Where there are no others and jax is to see several CPU devices, start as one process of one; else nothing."""
    if arguments(environment) is None and has_several_cpus(environment):
        here = f"localhost:{_free_port()}"  # heard by nobody outside
        _initialize(
            {"coordinator_address": here, "coordinator_bind_address": here, "num_processes": 1, "process_id": 0}
        )


def _initialize(given: Mapping[str, object]) -> None:
    import jax

    # Its own way to be told of a SIGTERM, in the place of which a handler of Python's could not be put back.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(**given, heartbeat_timeout_seconds=HEARTBEAT)  # type: ignore[arg-type]
    log.info("process %d of %d", jax.process_index(), jax.process_count())


def has_several_cpus(environment: Mapping[str, str]) -> bool:
    """Whether jax is told to use the CPU alone, and as several devices."""
    count = re.findall(r"--xla_force_host_platform_device_count=(\d+)", environment.get("XLA_FLAGS", ""))
    return environment.get("JAX_PLATFORMS") == "cpu" and bool(count) and int(count[-1]) > 1


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def _several_tasks(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that jax knows has started more than one task."""
    counts = (environment.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    workers = [name for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    step = "SLURM_STEP_NODELIST" in environment or "SLURM_NTASKS" not in environment
    several = any(count.isdigit() and int(count) > 1 for count in counts)
    return (several and step) or len(workers) > 1 or environment.get("MEGASCALE_NUM_SLICES", "1") not in ("", "1")


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise ValueError(f"{name} is {environment[name]!r}, not a number") from None
