"""The policy that preference learning compares with: the model as training found it.

What of it is not in memory anyway is kept beside the frozen parameters: of a model trained whole a copy of all leaves,
of an adapter only what takes the place of leaves of the model's own; under a new adapter, the model without it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.lora import is_adapter, merged
from models.sharding import nested, paths

Params = dict[str, Any]


class Frozen(NamedTuple):
    """What a step uses and does not train: the model's frozen leaves, and those of the reference that are no others."""

    model: Params | None
    reference: Params | None


class Sync(NamedTuple):
    """The reference moves after the policy: every so many steps it becomes (1 - share) reference + share policy
    (TR-DPO, arXiv:2404.09656, eq. 3).
    """

    every: int
    share: float


def reference_leaves(trained: Params, *, adapter_is_new: bool) -> Params | None:
    """The leaves that the reference has instead of those being trained, from what these are at first; not copied.

    A new adapter is no part of the reference; one that training goes on with is, as it begins.
    """
    leaves = paths(trained)
    if adapter_is_new:
        leaves = {path: leaf for path, leaf in leaves.items() if not is_adapter(path)}
    return nested(leaves) or None


def moved(reference: Params, policy: Params, sync: Sync, *, step: jax.Array, ok: jax.Array) -> Params:
    """The reference after optimizer step `step` (from 1); not `ok`, that step changed nothing."""

    def one(old: jax.Array, new: jax.Array) -> jax.Array:
        return ((1 - sync.share) * old + sync.share * new).astype(old.dtype)

    now = ok & (step % sync.every == 0)
    return jax.lax.cond(now, lambda: jax.tree.map(one, reference, policy), lambda: reference)


def reference_params(frozen: Frozen) -> Params:
    """The whole model of the reference, without a gradient."""
    return jax.lax.stop_gradient(merged(frozen.reference or {}, frozen.model))


def copied(params: Params | None) -> Params | None:
    """The same values in arrays of their own, so that those trained can be given away."""
    return jax.tree.map(jnp.copy, params)
