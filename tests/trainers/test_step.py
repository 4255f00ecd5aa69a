"""However a step is cut, it is the same step: losses, norms and weights for every mesh, accumulation and packing."""

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.hlo import collectives
from models.config import Compute, DecoderConfig, Layer
from models.decoder import abstract_params, init_params
from models.rope import Rope
from models.sharding import make_mesh
from trainers import optim
from trainers.loop import device_batch
from trainers.sft import cross_entropy_alone, sft_loss
from trainers.step import ALONE, Memory, Step, TrainState, build_step

CONFIG = DecoderConfig(
    vocabulary=96,
    width=32,
    heads=4,
    kv_heads=2,
    head_width=8,
    mlp_width=48,
    activation="silu",
    norm_eps=1e-5,
    each=(Layer(None, Rope(tuple(float(10000.0 ** -(i / 8)) for i in range(0, 8, 2)))),) * 2,
    qkv_bias=True,
    o_bias=False,
    mlp_bias=False,
    tied_head=True,
    initializer_range=0.1,
)
STEPS, ROWS, LENGTH = 10, 32, 24
MESHES = {
    "one device": {"data": 1},
    "fsdp 8": {"fsdp": 8},
    "fsdp 4 × tensor 2": {"fsdp": 4, "tensor": 2},
    "data 2 × fsdp 2 × tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp 2 × tensor 2 × context 2": {"fsdp": 2, "tensor": 2, "context": 2},
    "data 2 × fsdp 2 × context 2": {"data": 2, "fsdp": 2, "context": 2},
}


def documents(step: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """ROWS documents of uneven lengths with uneven masks, in pairs that fill a row of LENGTH."""
    random = np.random.default_rng(step)
    made = []
    for _ in range(ROWS // 2):
        first = int(random.integers(3, LENGTH - 3))
        for length in (first, LENGTH - first):
            tokens = random.integers(1, CONFIG.vocabulary, length).astype(np.int32)
            weights = (random.random(length) < random.choice([0.1, 0.9])).astype(np.float32)
            weights[-1] = 0
            made.append((tokens, weights))
    return made


def batch(step: int, *, accumulation: int, packed: bool) -> dict[str, np.ndarray]:
    """The step's documents as a batch [A, B, L]: one in a row, or two."""
    each = 2 if packed else 1
    found = documents(step)
    rows = [found[i : i + each] for i in range(0, ROWS, each)]
    names = ("tokens", "targets", "weights", "segments", "positions")
    arrays = {name: np.zeros((len(rows), LENGTH), np.float32 if name == "weights" else np.int32) for name in names}
    for r, row in enumerate(rows):
        start = 0
        for number, (tokens, weights) in enumerate(row, start=1):
            place = slice(start, start + len(tokens))
            arrays["tokens"][r, place] = tokens
            arrays["targets"][r, place] = np.append(tokens[1:], 0)
            arrays["weights"][r, place] = weights
            arrays["segments"][r, place] = number
            arrays["positions"][r, place] = np.arange(len(tokens))
            start += len(tokens)
    return {name: value.reshape(accumulation, -1, LENGTH) for name, value in arrays.items()}


def built(
    mesh: jax.sharding.Mesh,
    *,
    config: DecoderConfig = CONFIG,
    remat: str = "none",
    rate: float = 1e-2,
    memory: Memory = ALONE,
    **changes: Any,
) -> Step:
    optimizer = optim.build(
        "adamw", schedule=lambda step: rate, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8, momentum=0.0
    )
    loss = sft_loss(config, compute=Compute(remat=remat), **changes)
    return build_step(
        loss,
        optimizer,
        abstract_params(config, dtype=jnp.float32),
        mesh=mesh,
        max_grad_norm=1.0,
        evaluated=cross_entropy_alone(config, compute=Compute()) if changes else None,
        by_rows=True,
        memory=memory,
    )


def beginning(step: Step, mesh: jax.sharding.Mesh) -> TrainState:
    params = init_params(jax.random.key(0), CONFIG, dtype=jnp.float32)
    return step.init(jax.device_put(params, step.shardings.params))


def trajectory(
    sizes: dict[str, int], *, accumulation: int, packed: bool, remat: str = "none", memory: Memory = ALONE
) -> tuple[Any, Any]:
    """Losses and gradient norms of STEPS steps, and the last parameters."""
    mesh = make_mesh(sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])
    step = built(mesh, remat=remat, memory=memory)
    state = beginning(step, mesh)
    found = []
    for number in range(STEPS):
        host = batch(number, accumulation=accumulation, packed=packed)
        state, metrics = step.train(state, None, device_batch(host, mesh))
        found.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.array(found), jax.device_get(state.params)


@pytest.fixture(scope="module")
def plain() -> tuple[Any, Any]:
    return trajectory(MESHES["one device"], accumulation=1, packed=False)


@pytest.mark.parametrize(
    ("mesh", "accumulation", "packed"),
    [
        pytest.param("one device", 2, False, marks=pytest.mark.slow),
        ("one device", 4, False),
        ("one device", 1, True),
        pytest.param("fsdp 8", 1, False, marks=pytest.mark.slow),
        ("fsdp 8", 4, False),
        ("fsdp 8", 2, True),
        ("fsdp 4 × tensor 2", 1, True),
        ("fsdp 4 × tensor 2", 4, False),
        pytest.param("data 2 × fsdp 2 × tensor 2", 1, False, marks=pytest.mark.slow),
        ("data 2 × fsdp 2 × tensor 2", 2, True),
        ("data 2 × fsdp 2 × tensor 2", 4, True),
        ("fsdp 2 × tensor 2 × context 2", 2, True),
        pytest.param("data 2 × fsdp 2 × context 2", 2, True, marks=pytest.mark.slow),
    ],
)
def test_the_trajectory_does_not_depend_on_mesh_accumulation_or_packing(mesh, accumulation, packed, plain):
    found, params = trajectory(MESHES[mesh], accumulation=accumulation, packed=packed)
    np.testing.assert_allclose(found, plain[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), params, plain[1])


def test_devices_say_to_one_another_what_they_must_and_no_more():
    mesh = make_mesh(MESHES["fsdp 8"])
    step, own = built(mesh), abstract_params(CONFIG, dtype=jnp.float32)
    state, host = jax.eval_shape(step.init, own), batch(0, accumulation=1, packed=True)
    found = collectives(step.train_leaves.lower(jax.tree.leaves(state), None, host).compile().as_text())
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(own))
    kernels = 2 * 7 * CONFIG.layers  # of every layer, once forward and once backward
    assert kernels <= found["all-gather"].runs <= kernels + 4  # what is looked up, and hidden states for the vocabulary
    assert found["all-gather"].bytes < 2.5 * size
    assert found["all-reduce"].runs <= 8  # of a layer's gradients, and of sums
    assert found["all-reduce"].bytes < 1.6 * size
    # The head, from parts of its width to parts of the vocabulary; what is looked up, to its tokens; both back again.
    crossing = 4 * CONFIG.width * (CONFIG.vocabulary + host["tokens"].size)
    assert found["all-to-all"].bytes == 2 * crossing / mesh.size
    assert found.keys() == {"all-gather", "all-reduce", "all-to-all"}


def test_of_a_head_of_its_own_the_gradient_is_turned_and_not_the_head_and_its_moments():
    mesh = make_mesh({}, devices=jax.devices()[:1])
    config = replace(CONFIG, tied_head=False, vocabulary=640)
    step, own = built(mesh, config=config), abstract_params(config, dtype=jnp.float32)
    state, host = jax.eval_shape(step.init, own), batch(0, accumulation=1, packed=True)
    text = step.train_leaves.lower(jax.tree.leaves(state), None, host).compile().as_text()
    assert len(re.findall(r"= f32\[32,640\]\S* transpose\(", text)) == 1


def test_recomputing_activations_does_not_change_the_trajectory(plain):
    found, _ = trajectory(MESHES["one device"], accumulation=2, packed=False, remat="full")
    np.testing.assert_allclose(found, plain[0], rtol=1e-5)


def test_a_step_that_is_not_finite_changes_nothing_and_stops_all_later_ones():
    mesh = make_mesh({}, devices=jax.devices()[:1])
    step = built(mesh)
    state = beginning(step, mesh)
    good = device_batch(batch(0, accumulation=1, packed=False), mesh)
    state, _ = step.train(state, None, good)
    before = jax.device_get(state)
    poisoned = batch(1, accumulation=1, packed=False)
    poisoned["weights"][0, 0, 0] = np.inf
    state, metrics = step.train(state, None, device_batch(poisoned, mesh))
    assert bool(metrics["halted"])
    state, metrics = step.train(state, None, good)
    assert bool(metrics["halted"])
    assert int(state.step) == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before.params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.opt_state), before.opt_state)


def test_a_batch_without_a_trained_token_has_loss_zero_and_changes_nothing():
    mesh = make_mesh({}, devices=jax.devices()[:1])
    step = built(mesh, rate=0.0)
    state = beginning(step, mesh)
    empty = batch(0, accumulation=1, packed=False)
    empty["weights"][:] = 0
    before = jax.device_get(state.params)
    state, metrics = step.train(state, None, device_batch(empty, mesh))
    assert (float(metrics["loss"]), float(metrics["grad_norm"])) == (0.0, 0.0)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before)


def test_evaluation_sums_over_microbatches():
    mesh = make_mesh({}, devices=jax.devices()[:1])
    step = built(mesh)
    state = beginning(step, mesh)
    one = step.evaluate(state.params, None, device_batch(batch(3, accumulation=1, packed=False), mesh))
    four = step.evaluate(state.params, None, device_batch(batch(3, accumulation=4, packed=False), mesh))
    for name in one:
        np.testing.assert_allclose(one[name].mean(), four[name].mean(), rtol=1e-6)
    assert float(one["loss"].count) == float(batch(3, accumulation=1, packed=False)["weights"].sum())


def test_what_shapes_training_is_in_the_loss_and_not_in_the_evaluation():
    mesh = make_mesh({}, devices=jax.devices()[:1])
    host = batch(3, accumulation=2, packed=True)
    plain, shaped = built(mesh, rate=0.0), built(mesh, rate=0.0, z_loss=0.1)
    expected = plain.evaluate(beginning(plain, mesh).params, None, device_batch(host, mesh))["loss"]
    found = shaped.evaluate(beginning(shaped, mesh).params, None, device_batch(host, mesh))
    np.testing.assert_allclose(found["loss"].mean(), expected.mean(), rtol=1e-6)
    assert "z_loss" not in found
    metrics = shaped.train(beginning(shaped, mesh), None, device_batch(host, mesh))[1]
    np.testing.assert_allclose(metrics["loss"], expected.mean() + metrics["z_loss"], rtol=1e-6)
    assert float(metrics["z_loss"]) > 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 3}, "takes a multiple of 3 devices, and there are 8"),
        ({"data": -1, "fsdp": -1}, "one of them at most is -1"),
        ({"data": 0}, "sizes are positive"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(sizes)
