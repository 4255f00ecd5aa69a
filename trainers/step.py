"""The training step: the only jit of training, for every method.

A microbatches are accumulated by a scan; the loss is a `Sum` over all of them and over all devices, divided once at the
end. Loss and gradients are therefore the same for every mesh, accumulation and packing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from models.sharding import batch_sharding, parameter_shardings
from trainers.losses import Sum
from trainers.optim import Optimizer, clip_scale, global_norm, state_shardings
from trainers.reference import Sync, copied, moved

Params = dict[str, Any]
Batch = dict[str, jax.Array]
Sums = tuple[Sum, dict[str, Sum]]


class TrainState(NamedTuple):
    """Everything a step changes, as arrays (or as their shardings): what a checkpoint holds to go on bit for bit."""

    step: Any  # int32, updates made so far
    params: Params
    opt_state: Any
    halted: Any  # bool: a loss or gradient was not finite; from then on nothing changes
    reference: Any = None  # the leaves of a reference that moves (`reference.Sync`)

    def frozen(self, frozen: Any) -> Any:
        """What is used beside the parameters: `frozen`, with the reference as it is now if it moves."""
        return frozen if self.reference is None else frozen._replace(reference=self.reference)


class Loss(Protocol):
    """What a method brings: `loss(params, frozen, microbatch, key)` of arrays [B, L] → the loss as a `Sum`, and others
    for the log. `key` is for what is random in training, such as dropout, and None in evaluation.
    """

    def __call__(self, params: Params, frozen: Any, batch: Batch, key: jax.Array | None = None, /) -> Sums: ...


class Step(NamedTuple):
    """The compiled functions of a run, and where everything lies.

    train(state, frozen, batch [A, B, L]) -> (state, metrics): donates `state`. Metrics are float32 scalars: `loss`,
    `grad_norm` (before clipping), `halted`, and
    those of the method, NaN where nothing was counted. evaluate(params, frozen, batch) -> {name: Sum},
    with `loss` among them. init(params) -> state, where params may be donated.
    """

    train: Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[[Params, Any, Batch], dict[str, Sum]]
    init: Callable[[Params], TrainState]
    shardings: TrainState


def build_step(
    loss: Loss,
    optimizer: Optimizer,
    abstract_params: Params,
    *,
    mesh: Mesh,
    max_grad_norm: float | None,
    frozen: Any = None,
    seed: int | None = None,
    evaluated: Loss | None = None,
    sync: Sync | None = None,
) -> Step:
    """Compile-ready functions for `loss` on `mesh`; `frozen` is the (abstract or real) tree of what is used and not
    trained: no gradient of it is formed, and no optimizer state. A loss that is random gets a key drawn from `seed`,
    the step and the microbatch; without a seed it gets None. `evaluated` is what evaluation computes, if not `loss`.
    With `sync`, `frozen` is a `reference.Frozen`, whose reference begins as a copy of the parameters and moves.
    """
    evaluated = evaluated or loss
    everywhere = NamedSharding(mesh, P())
    param_shardings = parameter_shardings(abstract_params, mesh)
    shardings = TrainState(
        step=everywhere,
        params=param_shardings,
        opt_state=state_shardings(optimizer, abstract_params, param_shardings),
        halted=everywhere,
        reference=param_shardings if sync else None,
    )
    batches = batch_sharding(mesh)
    frozen_shardings = parameter_shardings(frozen, mesh) if frozen is not None else None

    def init(params: Params) -> TrainState:
        reference = copied(params) if sync else None
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jnp.zeros((), bool), reference)

    def train(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = None if seed is None else jax.random.fold_in(jax.random.key(seed), state.step)
        total, others, grads = _accumulate(loss, state.params, state.frozen(frozen), batch, key)
        count = jnp.maximum(total.count, 1.0)
        norm = global_norm(grads) / count
        ok = jnp.isfinite(total.total) & jnp.isfinite(norm) & ~state.halted
        params, opt_state = optimizer.update(
            grads, state.opt_state, state.params, step=state.step, scale=clip_scale(norm, max_grad_norm) / count, ok=ok
        )
        means = {name: each.mean_if_any() for name, each in others.items()}
        metrics = {"loss": total.mean(), "grad_norm": norm, **means}
        step = state.step + ok.astype(jnp.int32)
        reference = moved(state.reference, params, sync, step=step, ok=ok) if sync else None
        return TrainState(step, params, opt_state, ~ok, reference), {**metrics, "halted": ~ok}

    def evaluate(params: Params, frozen: Any, batch: Batch) -> dict[str, Sum]:
        def one(sums: dict[str, Sum], micro: Batch) -> tuple[dict[str, Sum], None]:
            total, others = evaluated(params, frozen, micro, None)
            return jax.tree.map(jnp.add, sums, {"loss": total, **others}), None

        first, rest = _split(batch)
        total, others = evaluated(params, frozen, first, None)
        sums, _ = jax.lax.scan(one, {"loss": total, **others}, rest)
        return sums

    return Step(
        train=_on(
            mesh,
            jax.jit(
                train,
                in_shardings=(shardings, frozen_shardings, batches),
                out_shardings=(shardings, everywhere),
                donate_argnums=0,
            ),
        ),
        evaluate=_on(
            mesh,
            jax.jit(evaluate, in_shardings=(param_shardings, frozen_shardings, batches), out_shardings=everywhere),
        ),
        init=_on(mesh, jax.jit(init, in_shardings=(param_shardings,), out_shardings=shardings, donate_argnums=0)),
        shardings=shardings,
    )


def _accumulate(
    loss: Loss, params: Params, frozen: Any, batch: Batch, key: jax.Array | None
) -> tuple[Sum, dict[str, Sum], Params]:
    """The sums and the gradient of the undivided total over all microbatches; gradients add up in float32."""

    def value_and_grads(micro: Batch, key: jax.Array | None) -> tuple[Sum, dict[str, Sum], Params]:
        def objective(params: Params) -> tuple[jax.Array, Sums]:
            total, others = loss(params, frozen, micro, key)
            return total.total, (total, others)

        grads, (total, others) = jax.grad(objective, has_aux=True)(params)
        return total, others, grads

    def one(sums: Any, micro: tuple[Batch, jax.Array | None]) -> tuple[Any, None]:
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, value_and_grads(*micro)), None

    first, rest = _split(batch)
    keys = None if key is None else jax.random.split(key, batch["tokens"].shape[0])
    sums = value_and_grads(first, None if keys is None else keys[0])
    if rest["tokens"].shape[0] == 0:
        return sums
    total, others, grads = sums
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    return jax.lax.scan(one, (total, others, wide), (rest, None if keys is None else keys[1:]))[0]


def _split(batch: Batch) -> tuple[Batch, Batch]:
    """The first microbatch, and the others [A - 1, B, L]."""
    return {k: v[0] for k, v in batch.items()}, {k: v[1:] for k, v in batch.items()}


def _on(mesh: Mesh, function: Callable) -> Callable:
    """The function under `jax.set_mesh`, which `models.sharding.constrain` reads while tracing."""

    def call(*args: Any) -> Any:
        with jax.set_mesh(mesh):
            return function(*args)

    call.jitted = function  # type: ignore[attr-defined]  # for ahead-of-time compilation
    return call
