"""A small train state on a mesh, for the tests of checkpoints."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from trainers.checkpoint import Checkpoints


class Moments(NamedTuple):
    count: jax.Array
    mu: dict


def mesh_of(devices: int, *, tensor: int = 1) -> jax.sharding.Mesh:
    axes = (AxisType.Auto, AxisType.Auto)
    shape = (devices // tensor, tensor)
    return jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=axes, devices=jax.devices()[:devices])


def shardings(mesh: jax.sharding.Mesh, state: dict) -> dict:
    """Matrices are split over both axes, all else is on every device."""
    both, nowhere = PartitionSpec("fsdp", "tensor"), PartitionSpec()
    return jax.tree.map(lambda x: NamedSharding(mesh, both if x.ndim == 2 else nowhere), state)


def make_state(mesh: jax.sharding.Mesh, *, seed: int = 0) -> dict:
    """A train state in small: nested dicts and a NamedTuple; float32, bfloat16, int32 and a typed PRNG key."""
    keys = jax.random.split(jax.random.key(seed), 3)
    state = {
        "params": {
            "embed": {"embedding": jax.random.normal(keys[0], (16, 8))},
            "norm": {"scale": jax.random.normal(keys[1], (8,)).astype(jnp.bfloat16)},
        },
        "opt_state": (Moments(jnp.int32(seed), {"embed": jax.random.normal(keys[2], (16, 8))}), ()),
        "step": jnp.int32(seed + 7),
        "rng": jax.random.key(seed + 1),
    }
    return jax.tree.map(jax.device_put, state, shardings(mesh, state))


def abstract(mesh: jax.sharding.Mesh, state: dict) -> dict:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state, shardings(mesh, state)
    )


def assert_same_bits(actual: dict, expected: dict) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_steps(folder: Path, *steps: int, keep: int | None = None) -> dict[int, dict]:
    states = {step: make_state(mesh_of(4, tensor=2), seed=step) for step in steps}
    with Checkpoints(folder, keep=keep) as checkpoints:
        checkpoints.restore(max(checkpoints.steps()), states[steps[0]]) if checkpoints.steps() else None
        for step, state in states.items():
            checkpoints.save(step, state, data_state={"next_index": step}, meta={"tokens_seen": 100 * step})
    return states


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
