"""A step on rows with pictures is the same step however it is cut, and what is frozen costs nothing."""

import functools
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from input_pipeline.processors.mllama import seen
from input_pipeline.processors.qwen_vl import axes
from models.config import Compute, DecoderConfig, Layer
from models.decoder import abstract_params, init_params
from models.lora import split
from models.rope import axial_rope
from models.sharding import make_mesh, paths
from models.vision import Vision, vit
from tests.trainers.test_step import CONFIG as TEXT
from tests.trainers.test_step import MESHES
from trainers import optim
from trainers.loop import device_batch
from trainers.sft import sft_loss
from trainers.step import Step, build_step

TOWER = Vision(
    layers=vit(width=16, heads=2, mlp_width=32, layers=3, activation="quick_gelu", eps=1e-5),
    patch=4,
    channels=3,
    columns=2,
    tile=4,
    class_token=True,
    patch_bias=False,
    pre_norm=True,
    takes=(2,),
    drops_class=True,
    projector="mlp",
    projector_bias=True,
    activation="gelu",
)
CONFIG = replace(TEXT, vision=TOWER)
# As Qwen2.5-VL: patches of a row together, that rotate and are merged; tokens on three axes.
_AXIAL = axial_rope(head_width=8, theta=10_000.0)
_ROTATED = replace(TOWER.layers, each=(Layer(2, _AXIAL), Layer(None, _AXIAL)), fused_qkv="blocks")
_TURNED = replace(TEXT.each[0].rope, axes=(0, 1, 2, 2))
MERGED = Vision(layers=_ROTATED, patch=4, channels=3, takes=(2,), projector="merged", pooled=2)
# As Llama 3.2 Vision: two tiles a picture, which every other layer looks at.
_PLAIN = replace(TOWER.layers, each=(Layer(None, None),) * 2)
TILED = replace(
    TOWER,
    layers=_PLAIN,
    takes=(1,),
    drops_class=False,
    projector="linear",
    tiles=2,
    ratios=(0, 1, 2),
    further=replace(_PLAIN, gates=True),
)
CONFIGS = {
    "features among the text": CONFIG,
    "pictures of any shape": replace(CONFIG, vision=MERGED, each=(Layer(None, _TURNED),) * TEXT.layers),
    "text that looks": replace(CONFIG, vision=TILED, each=(TEXT.each[0], Layer(None, None, looks=True)) * 2),
}
ROWS, LENGTH, STEPS = 16, 24, 3
Host = dict[str, np.ndarray]


def batch(step: int, *, accumulation: int, kind: str = "features among the text") -> Host:
    """Rows with two pictures, one, or none."""
    random = np.random.default_rng(step)
    tokens = random.integers(1, CONFIG.vocabulary, (ROWS, LENGTH)).astype(np.int32)
    arrays = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "weights": (random.random((ROWS, LENGTH)) < 0.5).astype(np.float32),
        "segments": np.ones((ROWS, LENGTH), np.int32),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH)).copy(),
        "patches": np.zeros((ROWS, 8, 48), np.float32),
        "patch_segments": np.zeros((ROWS, 8), np.int32),
        "patch_places": np.zeros((ROWS, 8, 2), np.int32),
        "image_features": np.zeros((ROWS, LENGTH), np.int32),
    }
    for row in range(ROWS):
        for picture in range(row % 3):
            at = slice(4 * picture, 4 * picture + 4)
            arrays["patches"][row, at] = random.normal(size=(4, 48))
            arrays["patch_segments"][row, at] = picture + 1
            arrays["patch_places"][row, at] = [[0, 0], [0, 1], [1, 0], [1, 1]]
            arrays["image_features"][row, 6 * picture : 6 * picture + 4] = 1 + 4 * picture + np.arange(4)
    if kind == "pictures of any shape":
        pictured = arrays["image_features"] % 4 == 1
        arrays["image_features"] = np.where(pictured, -(-arrays["image_features"] // 4), 0)
        grids = [[(1, 1)] * (row % 3) for row in range(ROWS)]
        arrays["axes"] = np.stack([axes(at, grid) for at, grid in zip(pictured, grids, strict=True)])
    if kind == "text that looks":
        twice = {name: np.repeat(arrays[name], 2, axis=1) for name in arrays if name.startswith("patch")}
        arrays |= twice  # a tile alike for each that is there
        pictures = np.array([[row % 3 > 0, row % 3 > 1] for row in range(ROWS)])
        arrays["patch_segments"] = np.repeat(pictures * np.array([1, 2]), 8, axis=1).astype(np.int32)
        tile, ratio = np.tile(np.repeat([0, 1], 4), 2), np.repeat(pictures * np.array([1, 2]), 8, axis=1)
        arrays["patch_tiles"] = np.stack([np.broadcast_to(tile, ratio.shape), ratio], axis=-1).astype(np.int32)
        starts = arrays.pop("image_features") % 4 == 1
        arrays["cross_images"] = np.stack([seen(row) for row in starts])
    return {name: array.reshape(accumulation, -1, *array.shape[1:]) for name, array in arrays.items()}


def built(
    mesh: jax.sharding.Mesh, *, trained: set[str] | None = None, config: DecoderConfig = CONFIG
) -> tuple[Step, Any, Any]:
    """A step, and parameters of which only the trained ones are in the state."""
    params = init_params(jax.random.key(0), config, dtype=jnp.float32)
    params = jax.tree_util.tree_map_with_path(lambda path, x: x + 0.5 * ("gate" in path[-1].key), params)  # open
    own, frozen = split(params, trained or set(paths(params)))
    # An epsilon that a gradient of rounding errors alone cannot pass: AdamW would make a whole update of it.
    optimizer = optim.build(
        "adamw", schedule=lambda step: 3e-3, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-5, momentum=0.0
    )
    loss = sft_loss(config, compute=Compute())
    return build_step(loss, optimizer, own, mesh=mesh, max_grad_norm=1.0, frozen=frozen, by_rows=True), own, frozen


def made(name: str) -> jax.sharding.Mesh:
    return make_mesh(MESHES[name], devices=jax.devices()[: math.prod(MESHES[name].values())])


def trajectory(name: str, accumulation: int, kind: str) -> tuple[np.ndarray, Any]:
    mesh = made(name)
    step, params, _ = built(mesh, config=CONFIGS[kind])
    state, found = step.init(jax.device_put(params, step.shardings.params)), []
    for number in range(STEPS):
        state, metrics = step.train(
            state, None, device_batch(batch(number, accumulation=accumulation, kind=kind), mesh)
        )
        found.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.array(found), jax.device_get(state.params)


def packed(alone: Host) -> Host:
    """The rows of a batch [1, B, ...] two by two, as documents of rows twice as long."""
    arrays = {name: array[0].reshape(ROWS // 2, 2, *array.shape[2:]).copy() for name, array in alone.items()}
    arrays["segments"][:, 1] += 1
    for name, before in (("image_features", 8), ("patch_segments", 2)):
        second = arrays[name][:, 1]
        arrays[name][:, 1] = np.where(second > 0, second + before, 0)
    return {name: array.reshape(1, ROWS // 2, -1, *array.shape[3:]) for name, array in arrays.items()}


def test_rows_with_pictures_packed_into_one_have_the_loss_and_the_gradients_that_they_have_alone():
    params, loss = init_params(jax.random.key(0), CONFIG, dtype=jnp.float32), sft_loss(CONFIG, compute=Compute())
    alone = batch(0, accumulation=1)
    alone["weights"][..., -1] = 0  # a document's last token predicts nothing

    @jax.jit
    def total(params: Any, host: Host) -> jax.Array:
        return loss(params, None, {name: array[0] for name, array in host.items()})[0].mean()

    expected, gradients = jax.value_and_grad(total)(params, alone)
    found, same = jax.value_and_grad(total)(params, packed(alone))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), same, gradients)
    mixed = packed(alone)
    numbers = mixed["image_features"]
    mixed["image_features"] = np.where(numbers > 8, numbers - 8, numbers)
    assert abs(float(total(params, mixed)) - float(expected)) > 1e-3  # it does tell whose picture a row is given


CUTS = [
    ("fsdp 4 × tensor 2", 2),
    *(pytest.param(mesh, n, marks=pytest.mark.slow) for mesh in list(MESHES)[1:] for n in (1, 2)),
]


@functools.cache
def plain(kind: str) -> tuple[np.ndarray, Any]:
    return trajectory("one device", 1, kind)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind == "text that looks" else pytest.mark.slow) for kind in CONFIGS],
)
@pytest.mark.parametrize(("mesh", "accumulation"), CUTS)
def test_steps_on_pictures_are_the_same_on_every_mesh_and_accumulation(mesh, accumulation, kind):
    expected, whole = plain(kind)
    assert np.isfinite(expected).all()
    found, params = trajectory(mesh, accumulation, kind)
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), params, whole)


def test_a_frozen_tower_has_no_optimizer_state_and_its_backward_pass_is_not_computed():
    mesh, costs = made("one device"), []
    every = set(paths(abstract_params(CONFIG, dtype=jnp.float32)))
    for trained in (every, {path for path in every if not path.startswith("vision/")}):
        step, own, frozen = built(mesh, trained=trained)
        state = jax.eval_shape(step.init, own)
        host = {name: jnp.asarray(array) for name, array in batch(0, accumulation=1).items()}
        compiled = step.train_leaves.lower(jax.tree.leaves(state), frozen, host).compile()
        kept = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
        costs.append((compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes, kept))
    (flops, bytes_, moments), (fewer_flops, fewer_bytes, fewer_moments) = costs
    tower = sum(leaf.size for path, leaf in paths(own | frozen).items() if path.startswith("vision/"))
    assert fewer_moments == moments - 2 * tower
    assert fewer_bytes < bytes_
    # The tower's backward pass is two thirds of its work; loops are counted once, so its own layers tell.
    assert fewer_flops < 0.95 * flops
