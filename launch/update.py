"""From the configuration to how a run learns: the learning rate, the optimizer, and the compile-ready step."""

import functools
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import derived
from configs.methods import GRPO
from launch import assemble
from launch.assemble import Model
from launch.data import steps_of
from launch.method import Method
from models.sharding import replicas
from models.vision import computed
from trainers import optim, schedules
from trainers.step import Memory, Step, build_step


def learning_rate_of(config: ConfigDict, mesh: Mesh, steps: int) -> Callable[[Any], Any]:
    """The learning rate by optimizer step, counted from 0."""
    says = update_of(config, mesh)
    rate = schedules.schedule(
        learning_rate=config.training.learning_rate, steps=-(-steps // says.rate_stays), **says.schedule
    )
    return rate if says.rate_stays == 1 else lambda step: rate(step // says.rate_stays)


def update_of(config: ConfigDict, mesh: Mesh) -> derived.Update:
    """How gradients become an update, and by which schedule."""
    asks = config.training.trainer_type in GRPO
    updates = derived.rollout(config, replicas=replicas(mesh)).updates if asks else 1
    return derived.update(config, counted=steps_of(config, mesh), updates_of_generation=updates)


def optimizer_of(config: ConfigDict, model: Model, mesh: Mesh, learning_rate: Callable[[Any], Any]) -> optim.Optimizer:
    """The optimizer that the configuration names."""
    training, says = config.training, update_of(config, mesh)
    return optim.build(
        training.optimizer,
        schedule=learning_rate,
        weight_decay=says.weight_decay,
        betas=says.betas,
        eps=training.adam_epsilon,
        momentum=training.sgd_momentum,
        decayed=(lambda path: True) if says.decays_all else None,
        computed=None if model.config.vision is None else functools.partial(computed, model.config.vision),
    )


def step_of(config: ConfigDict, model: Model, mesh: Mesh, learning_rate: Callable[[Any], Any], method: Method) -> Step:
    """The compile-ready step of a method."""
    parts = assemble.abstract_parts(model)
    return build_step(
        method.loss,
        optimizer_of(config, model, mesh, learning_rate),
        parts.trained,
        mesh=mesh,
        max_grad_norm=update_of(config, mesh).max_grad_norm,
        frozen=method.frozen(parts),
        seed=config.training.seed if method.draws else None,
        evaluated=method.evaluated,
        sync=method.sync,
        by_rows=method.by_rows,
        memory=Memory(**derived.memory(config)),
    )
