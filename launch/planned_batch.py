"""The batch of a planned step: its arrays without their numbers, each row as long as the configuration lets it be."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from configs import derived
from configs.methods import GRPO, PREFERENCE
from launch import assemble
from launch.assemble import Model
from launch.data import limit_of
from launch.grpo import answers_in_row, longest_row
from launch.method import Method, method_of
from launch.preferences import knows_reference
from models.config import Compute
from models.sharding import batch_sharding, replicas

LENGTH = 2048  # tokens of a row where the configuration names no length
PATCHES = 1024  # of a row, where pictures have any shape
BOTH_WAYS = ("gemma3", "paligemma")  # whose tokens of a picture, or of a prompt, see one another


class Shapes(NamedTuple):
    """Of a step's batch: microbatches, rows of each over all devices, tokens of a row; answers behind one copy of a
    prompt, where answers are the policy's own, and whether their log-probabilities are computed before the updates.
    """

    accumulation: int
    rows: int
    length: int
    together: int = 1
    scored: bool = False

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.accumulation * self.rows * self.length


class Planned(NamedTuple):
    """A run on a mesh, without a number of its parameters and batches; the mesh may have no devices."""

    config: ConfigDict
    model: Model
    mesh: Any
    shapes: Shapes
    method: Method
    compute: Compute


def planned_on(mesh: Any, config: ConfigDict, model: Model) -> Planned:
    """A configuration's run on a mesh, with rows as long as they can be."""
    shapes = shapes_of(config, model, mesh)
    method = method_of(config, model, longest_document=shapes.length, together=shapes.together)
    compute = assemble.compute_of(config, model, longest_document=shapes.length)
    return Planned(config, model, mesh, shapes, method, compute)


def shapes_of(config: ConfigDict, model: Model, mesh: Any) -> Shapes:
    """The shapes of a step's batches."""
    training, length = config.training, config.model.model_max_length or LENGTH
    if training.trainer_type in GRPO:
        sizes = derived.rollout(config, replicas=replicas(mesh))
        prompt = limit_of(config).length or LENGTH
        together = answers_in_row(config, model, sizes, replicas=replicas(mesh), prompt=prompt)
        length = longest_row(config, prompt, together)
        return Shapes(sizes.accumulation, sizes.microbatch // together, length, together, sizes.updates > 1)
    rows = training.per_device_train_batch_size * replicas(mesh)
    if training.trainer_type in PREFERENCE:
        length *= answers_of(config)  # each with its prompt; where that is shared it may be short
    return Shapes(training.gradient_accumulation_steps, rows, length)


def answers_of(config: ConfigDict) -> int:
    """Answers in a row of preferences: a wanted and an unwanted one; or one, and another row's if KTO needs it."""
    return 2 if config.training.trainer_type == "TRL_DPO" or derived.loss_types(config) == ("kto",) else 1


def abstract_batch(config: ConfigDict, model: Model, mesh: Mesh, shapes: Shapes) -> dict[str, jax.ShapeDtypeStruct]:
    """A step's batch without its numbers; of a model that sees, with one picture a row."""
    place = batch_sharding(mesh)

    def array(dtype: Any, *more: int, length: int = shapes.length) -> jax.ShapeDtypeStruct:
        shape = (shapes.accumulation, shapes.rows, length, *more)
        spec = place.spec if length == shapes.length else place.spec[:2]
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    trainer = config.training.trainer_type
    batch = {name: array(jnp.int32) for name in ("tokens", "targets", "segments", "positions")}
    batch["weights"] = array(jnp.float32)
    if trainer in PREFERENCE or shapes.together > 1:
        batch["branches"] = array(jnp.int32)
    if trainer in PREFERENCE and knows_reference(config):
        batch["reference"] = array(jnp.float32)
    if trainer in GRPO:
        batch |= {name: array(jnp.float32) for name in ("advantages", "sampled_logprobs")}
    if shapes.scored:
        batch["old_logprobs"] = array(jnp.float32)
    vision = model.config.vision
    if vision is not None:
        patches = patches_of(model)
        numbers = vision.channels * max(vision.frames, 1) * vision.patch**2
        batch["patches"] = array(jnp.float32, numbers, length=patches)
        batch["patch_segments"] = array(jnp.int32, length=patches)
        batch["patch_places"] = array(jnp.int32, 2, length=patches)
        if vision.further is not None:
            return batch | {"patch_tiles": array(jnp.int32, 2, length=patches), "cross_images": array(jnp.int32, 3)}
        batch["image_features"] = array(jnp.int32)
        if model.hf_config["model_type"] in BOTH_WAYS:
            batch["groups"] = array(jnp.int32)
        if any(layer.rope is not None and layer.rope.axes for layer in model.config.each):
            batch["axes"] = array(jnp.int32, 3)
    return batch


def patches_of(model: Model) -> int:
    """Patches of a row: of one picture, or of one of any shape."""
    vision = model.config.vision
    return 0 if vision is None else vision.tile * vision.tiles or PATCHES
