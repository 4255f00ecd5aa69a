"""The training step: the only jit of training, for every method.

A microbatches are accumulated by a scan; the loss is a `Sum` over all of them and over all devices, divided once at the
end. Loss and gradients are therefore the same for every mesh, accumulation and packing. Where several microbatches meet
several copies of the model, each copy adds up the gradients of its own rows, and they meet once a step.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from models.sharding import also_over, batch_sharding, each_apart, parameter_shardings
from trainers.losses import Sum
from trainers.optim import Optimizer, clip_scale, global_norm, state_shardings
from trainers.reference import Sync, copied, moved

Params = dict[str, Any]
Leaves = list[jax.Array]
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


class Memory(NamedTuple):
    """What copies of the model share that each could have for itself: the optimizer's state, and gradients too (the
    first and the second stage of ZeRO, arXiv:1910.02054, section 5). `on_host`: the optimizer's state lies in the
    host's memory, and comes to the device for each update.
    """

    split_state: bool = False
    split_gradients: bool = False
    on_host: bool = False


ALONE = Memory()


class Step(NamedTuple):
    """The jitted functions of a run, and where everything lies.

    train_leaves(leaves, frozen, batch [A, B, L]) -> (leaves, metrics): donates the leaves, which are a state's
    (`jax.tree.leaves`) and become one again by `state`. The loop hands on leaves: a state's dicts, taken apart and put
    together in every step, would take a quarter of the time that the host needs to start one. Metrics are float32
    scalars: `loss`, `grad_norm` (before clipping), `halted`, and those of the method, NaN where nothing was counted.
    evaluate(params, frozen, batch) -> {name: Sum}, with `loss` among them. init(params) -> state, where params may be
    donated.
    """

    train_leaves: Callable[[Leaves, Any, Batch], tuple[Leaves, dict[str, jax.Array]]]
    evaluate: Callable[[Params, Any, Batch], dict[str, Sum]]
    init: Callable[[Params], TrainState]
    shardings: TrainState

    def state(self, leaves: Leaves) -> TrainState:
        """The state with these leaves."""
        return jax.tree.unflatten(jax.tree.structure(self.shardings), leaves)

    def train(self, state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """`train_leaves` of a state."""
        leaves, metrics = self.train_leaves(jax.tree.leaves(state), frozen, batch)
        return self.state(leaves), metrics


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
    by_rows: bool = False,
    memory: Memory = ALONE,
) -> Step:
    """Compile-ready functions for `loss` on `mesh`; `frozen` is the (abstract or real) tree of what is used and not
    trained: no gradient of it is formed, and no optimizer state. A loss that is random gets a key drawn from `seed`,
    the step and the microbatch; without a seed it gets None. `evaluated` is what evaluation computes, if not `loss`.
    With `sync`, `frozen` is a `reference.Frozen`, whose reference begins as a copy of the parameters and moves.
    `by_rows` promises that the loss and all beside it are sums over rows: copies of the model then need not meet in
    every microbatch.
    """
    evaluated = evaluated or loss
    everywhere = NamedSharding(mesh, P())
    param_shardings = parameter_shardings(abstract_params, mesh)
    copies = mesh.shape["data"] if by_rows and seed is None and not memory.split_gradients else 1
    used, kept, of_gradients = places(optimizer, abstract_params, param_shardings, memory)
    shardings = TrainState(
        step=everywhere,
        params=param_shardings,
        opt_state=kept,
        halted=everywhere,
        reference=param_shardings if sync else None,
    )
    lie, structure = jax.tree.flatten(shardings)
    batches = batch_sharding(mesh)
    frozen_shardings = parameter_shardings(frozen, mesh) if frozen is not None else None

    def init(params: Params) -> TrainState:
        reference = copied(params) if sync else None
        opt_state = jax.device_put(optimizer.init(params), kept) if memory.on_host else optimizer.init(params)
        return TrainState(jnp.zeros((), jnp.int32), params, opt_state, jnp.zeros((), bool), reference)

    def train(leaves: Leaves, frozen: Any, batch: Batch) -> tuple[Leaves, dict[str, jax.Array]]:
        state = jax.tree.unflatten(structure, leaves)
        key = None if seed is None else jax.random.fold_in(jax.random.key(seed), state.step)
        lies = of_gradients if memory.split_gradients else param_shardings
        total, others, grads = _accumulate(
            loss, state.params, state.frozen(frozen), batch, key, lies=lies, copies=copies
        )
        grads = _row_major(grads, of_gradients)
        count = jnp.maximum(total.count, 1.0)
        norm = global_norm(grads) / count
        ok = jnp.isfinite(total.total) & jnp.isfinite(norm) & ~state.halted
        opt_state = jax.device_put(state.opt_state, used) if memory.on_host else state.opt_state
        params, opt_state = optimizer.update(
            grads, opt_state, state.params, step=state.step, scale=clip_scale(norm, max_grad_norm) / count, ok=ok
        )
        means = {name: each.mean_if_any() for name, each in others.items()}
        opt_state = jax.device_put(opt_state, kept) if memory.on_host else opt_state
        metrics = {"loss": total.mean(), "grad_norm": norm, **means}
        step = state.step + ok.astype(jnp.int32)
        reference = moved(state.reference, params, sync, step=step, ok=ok) if sync else None
        after = TrainState(step, params, opt_state, ~ok, reference)
        return jax.tree.leaves(after), {**metrics, "halted": ~ok}

    def evaluate(params: Params, frozen: Any, batch: Batch) -> dict[str, Sum]:
        def sums(micro: Batch) -> dict[str, Sum]:
            total, others = evaluated(params, frozen, micro, None)
            return {"loss": total, **others}

        return _summed(sums, batch)

    jit = partial(jax.jit, donate_argnums=0)
    return Step(
        train_leaves=jit(
            _on(mesh, train), in_shardings=(lie, frozen_shardings, batches), out_shardings=(lie, everywhere)
        ),
        evaluate=jax.jit(
            _on(mesh, evaluate), in_shardings=(param_shardings, frozen_shardings, batches), out_shardings=everywhere
        ),
        init=jit(_on(mesh, init), in_shardings=(param_shardings,), out_shardings=shardings),
        shardings=shardings,
    )


def places(optimizer: Optimizer, params: Params, lies: Params, memory: Memory) -> tuple[Any, Any, Params]:
    """Where the optimizer's state lies while it is used and while it is kept, and where its gradients do."""
    used, of_gradients = state_shardings(optimizer, params, lies), lies
    if memory.split_state:
        over = partial(jax.tree.map, lambda place, leaf: also_over("data", place, leaf.shape))
        used, of_gradients = over(used, jax.eval_shape(optimizer.init, params)), over(lies, params)
    kept = jax.tree.map(lambda place: place.with_memory_kind("pinned_host"), used) if memory.on_host else used
    return used, kept, of_gradients


def _accumulate(
    loss: Loss, params: Params, frozen: Any, batch: Batch, key: jax.Array | None, *, lies: Params, copies: int
) -> tuple[Sum, dict[str, Sum], Params]:
    """The sums and the gradient of the undivided total over all microbatches; gradients add up in float32.

    Several `copies` of the model each add up those of their own rows. `lies` says where a gradient lies.
    """

    def value_and_grads(micro: tuple[Batch, jax.Array | None]) -> tuple[Sum, dict[str, Sum], Params]:
        def objective(params: Params) -> tuple[jax.Array, Sums]:
            total, others = loss(params, frozen, *micro)
            return total.total, (total, others)

        grads, (total, others) = jax.grad(objective, has_aux=True)(params)
        return total, others, grads

    A = batch["tokens"].shape[0]
    each = (batch, None if key is None else jax.random.split(key, A))
    if A == 1:
        return value_and_grads(_only(each))

    def of_copies(micro: tuple[Batch, None]) -> tuple[Sum, dict[str, Sum], Params]:
        parts = jax.tree.map(lambda x: x.reshape(copies, x.shape[0] // copies, *x.shape[1:]), micro)
        return each_apart(value_and_grads, axis="data", in_axes=(0,))(parts)

    if copies > 1:
        lies = jax.tree.map(lambda place: NamedSharding(place.mesh, P("data", *place.spec)), lies)

    def lying(sums: tuple[Sum, dict[str, Sum], Params]) -> tuple[Sum, dict[str, Sum], Params]:
        return (*sums[:2], jax.lax.with_sharding_constraint(sums[2], lies))

    if copies == 1:
        return _summed(value_and_grads, each, lying)
    return jax.tree.map(lambda x: x.sum(axis=0), _summed(of_copies, each, lying))


def _row_major(grads: Params, lies: Params) -> Params:
    """Gradients where they are to lie, laid out as parameters and moments are. A head [D, V] has its gradient as
    [V, D], which XLA would not turn: it would turn head and moments, and all three back again after the update. Inside
    of `jax.shard_map`, since XLA gathers what it splits by itself.
    """
    specs = jax.tree.map(lambda place: place.spec, lies)

    def each(grads: Params) -> Params:
        return jax.tree.map(lambda g: with_layout_constraint(g, Layout(tuple(range(g.ndim)))), grads)

    return jax.shard_map(each, in_specs=(specs,), out_specs=specs)(grads)


def _summed(function: Callable[[Any], Any], each: Any, lying: Callable[[Any], Any] = lambda sums: sums) -> Any:
    """The sum of `function` over all microbatches, in float32 and compiled once; `lying` says where it lies."""
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), each)
    shapes = jax.eval_shape(function, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), shapes)

    def one(sums: Any, micro: Any) -> tuple[Any, None]:
        return lying(jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, function(micro))), None

    return jax.lax.scan(one, lying(zeros), each)[0]


def _only(each: Any) -> Any:
    """The one microbatch there is."""
    return jax.tree.map(lambda x: x[0], each)


def _on(mesh: Mesh, function: Callable) -> Callable:
    """The function, traced with the mesh as the current one, which `models.sharding.constrain` reads."""

    @wraps(function)
    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced
