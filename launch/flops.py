"""What a model's arithmetic comes to: of a token, of a patch of a picture, and of two patches that see one another."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from launch import assemble
from launch.assemble import Model
from models.lora import A, B
from models.sharding import paths
from models.vision import PROJECTORS, Vision, abstract_vision, computed
from trainers.throughput import flops_per_token

PRODUCTS = ("kernel", A, B)  # leaves that a patch or a feature is multiplied with


class Flops(NamedTuple):
    """FLOPs that training needs for a token of text, for a patch of a picture (the features that are made of it
    included), and for a patch that sees a patch, itself included.
    """

    token: float
    patch: float = 0.0
    pair: float = 0.0


def flops_of(model: Model, *, context: float, forwards: int = 0) -> Flops:
    """Of training a model on rows in which a token sees `context` tokens; `forwards` as in `flops_per_token`.

    A tower in which nothing is trained has no backward pass, nor has a projector that is frozen with it. Class tokens,
    and what pads pictures, do not count.
    """
    count, config = assemble.parameter_count(model), model.config
    token = flops_per_token(
        trained=count.trained_products,
        frozen=count.frozen_products,
        layers=config.layers,
        heads=config.heads,
        head_dim=config.head_width,
        context=context,
        forwards=forwards,
    )
    if config.vision is None:
        return Flops(token)
    vision: Vision = config.vision
    tower, projector = _products(model, "vision/"), _products(model, "projector/")
    moves = tower[0] > 0
    patch = _matrices(tower, backward=moves, forwards=forwards)
    patch += _features(vision, config.width) * _matrices(
        projector, backward=moves or projector[0] > 0, forwards=forwards
    )
    pair = 0.0
    stacks = [(vision.layers, computed(vision, "vision/layers/")), (vision.further, None)]
    for stack, used in ((stack, used) for stack, used in stacks if stack is not None):
        for layer in stack.each[:used]:
            scores = 12 * stack.heads * stack.head_width * (1 + forwards / 3 if moves else (1 + forwards) / 3)
            if layer.window is None:
                pair += scores
            else:  # a window of so many patches a side
                patch += scores * layer.window**2
    return Flops(token, patch, pair)


def _matrices(sizes: tuple[int, int], *, backward: bool, forwards: int) -> float:
    trained, frozen = sizes
    once = flops_per_token(trained=trained, frozen=frozen, layers=0, heads=0, head_dim=0, context=0)
    return (once if backward else 0) + 2 * (trained + frozen) * (forwards + (not backward))


def _products(model: Model, part: str) -> tuple[int, int]:
    """How many trained and how many frozen numbers a patch is multiplied with, in a part of the model."""
    found = []
    for tree in assemble.abstract_parts(model):
        leaves = {} if tree is None else paths(tree)
        own = {path: leaf for path, leaf in leaves.items() if path.startswith(part) and path.endswith(PRODUCTS)}
        found.append(sum(_used(leaf, computed(model.config.vision, path)) for path, leaf in own.items()))
    return found[0], found[1]


def _used(leaf: jax.ShapeDtypeStruct, layers: int | None) -> int:
    return leaf.size if layers is None else leaf.size // leaf.shape[0] * layers


def _features(vision: Vision, width: int) -> float:
    """How many features are made of a patch."""
    patches = vision.tile or vision.unit
    projector = abstract_vision(vision, width, dtype=jnp.float32)["projector"]
    read = jax.ShapeDtypeStruct((1, patches, vision.width), jnp.float32)
    project = PROJECTORS[vision.projector].project
    return jax.eval_shape(lambda leaves, x: project(leaves, vision, x, None), projector, read).shape[1] / patches
