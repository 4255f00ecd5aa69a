"""What one process does for all: with one process a plain call, with many a broadcast of the result or the error."""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def on_process_0(work: Callable[[], Any]) -> Any:
    """Runs `work` on process 0 and gives its JSON-able result to every process; called by all of them.

    An OSError or ValueError there is raised on every process (elsewhere as ValueError), so that none waits for the
    others.
    """
    if jax.process_count() == 1:
        return work()
    outcome: dict[str, Any] = {}
    failure: Exception | None = None
    if jax.process_index() == 0:
        try:
            outcome = {"value": work()}
        except (OSError, ValueError) as error:
            outcome, failure = {"error": str(error)}, error
    sent = np.frombuffer(json.dumps(outcome).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(sent.size)))
    received = multihost_utils.broadcast_one_to_all(sent if jax.process_index() == 0 else np.zeros(length, np.uint8))
    if failure is not None:
        raise failure
    outcome = json.loads(np.asarray(received, np.uint8).tobytes())
    if "error" in outcome:
        raise ValueError(outcome["error"])
    return outcome["value"]


def of_all_processes(value: Any) -> list[Any]:
    """The JSON-able `value`s of all processes, in their order; called by all of them."""
    if jax.process_count() == 1:
        return [value]
    sent = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(sent.size))
    padded = np.zeros(int(np.max(sizes)), np.uint8)
    padded[: sent.size] = sent
    received = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(np.asarray(received, np.uint8), sizes, strict=True)]


def on_any_process(yes: bool) -> bool:
    """Whether `yes` holds on at least one process; called by all of them."""
    return yes if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.bool_(yes))))


class Highest:
    """The highest of the numbers that the processes say, heard by all of them at the same call; nobody waits for it."""

    def __init__(self, mesh: Mesh):
        self._said = NamedSharding(mesh, P(mesh.axis_names))
        self._highest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
        self._before: jax.Array | None = None

    def __call__(self, number: int) -> int:
        """Says `number`, from 0 on; the highest that was said at the call before, or of one process this number."""
        if jax.process_count() == 1:
            return number
        count = self._said.mesh.size
        own = jax.make_array_from_callback((count,), self._said, lambda _: np.full(1, number, np.int32))
        heard, self._before = self._before, self._highest(own)
        return 0 if heard is None else int(heard)
