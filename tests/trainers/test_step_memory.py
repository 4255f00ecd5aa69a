"""What copies of the model share, what waits on the host, and how often they meet: the same steps, elsewhere."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from launch.hlo import Collective, collectives
from models.decoder import abstract_params
from models.sharding import make_mesh, parameter_shardings, paths
from tests.trainers.test_step import CONFIG, batch, beginning, built, trajectory
from trainers.step import Memory

COPIES = {"data": 4, "tensor": 2}


@pytest.fixture(scope="module")
def plain() -> tuple[Any, Any]:
    return trajectory({"data": 1}, accumulation=1, packed=True)


@pytest.mark.parametrize(
    ("sizes", "memory", "remat"),
    [
        pytest.param(COPIES, Memory(split_state=True), "none", id="ZeRO 1", marks=pytest.mark.slow),
        pytest.param(COPIES, Memory(True, True), "none", id="ZeRO 2", marks=pytest.mark.slow),
        pytest.param({"fsdp": 8}, Memory(on_host=True), "offload", id="on the host", marks=pytest.mark.slow),
        pytest.param({"data": 4, "fsdp": 2}, Memory(True, on_host=True), "offload", id="both"),
    ],
)
def test_steps_are_the_same_wherever_state_and_activations_lie(sizes, memory, remat, plain):
    found, params = trajectory(sizes, accumulation=2, packed=True, remat=remat, memory=memory)
    np.testing.assert_allclose(found, plain[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), params, plain[1])


def test_copies_keep_a_part_each_of_the_state_and_the_host_keeps_it_where_asked():
    mesh = make_mesh(COPIES)
    plain, split = (built(mesh, memory=memory) for memory in (Memory(), Memory(True, on_host=True)))
    state = beginning(split, mesh)
    places = paths(state.opt_state["m"])
    assert places["layers/mlp/up/kernel"].sharding.spec == P(None, "fsdp", ("tensor", "data"))
    assert {leaf.sharding.memory_kind for leaf in places.values()} == {"pinned_host"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.params)} == {"device"}
    shares = [leaf.sharding.shard_shape(leaf.shape) for leaf in places.values()]
    whole = [leaf.sharding.shard_shape(leaf.shape) for leaf in paths(beginning(plain, mesh).opt_state["m"]).values()]
    assert sum(map(np.prod, shares)) * 4 == sum(map(np.prod, whole))


def said(sizes: dict[str, int], *, accumulation: int) -> dict[str, Collective]:
    mesh = make_mesh(sizes)
    step, own = built(mesh), abstract_params(CONFIG, dtype=jnp.float32)
    state = jax.eval_shape(step.init, own)
    host = batch(0, accumulation=accumulation, packed=False)
    return collectives(step.train_leaves.lower(jax.tree.leaves(state), None, host).compile().as_text())


def test_copies_of_the_model_meet_once_a_step_however_many_microbatches_there_are():
    two, four = (said({"data": 8}, accumulation=accumulation) for accumulation in (2, 4))
    assert two.keys() == four.keys() == {"all-reduce"}
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(abstract_params(CONFIG, dtype=jnp.float32)))
    sums = 4 * 10  # totals and counts of what is logged, of the whole step
    assert size <= four["all-reduce"].bytes <= size + sums + 4 * 4 * 4  # and whether a microbatch has any
    assert two["all-reduce"].bytes <= four["all-reduce"].bytes


def test_weights_are_split_over_context_as_over_fsdp():
    params = abstract_params(CONFIG, dtype=jnp.float32)
    lies = paths(parameter_shardings(params, make_mesh({"fsdp": 2, "tensor": 2, "context": 2})))
    assert lies["layers/mlp/up/kernel"].spec == P(None, ("fsdp", "context"), "tensor")
    assert lies["layers/mlp/down/kernel"].spec == P(None, "tensor", ("fsdp", "context"))
    assert lies["embed/embedding"].spec == P("tensor", ("fsdp", "context"))
    narrow = jax.ShapeDtypeStruct((2, 6, 8), jnp.float32)  # 6 columns: two devices divide them, and four do not
    params = {"layers": {"mlp": {"up": {"kernel": narrow}}}}
    lies = paths(parameter_shardings(params, make_mesh({"fsdp": 2, "context": 4})))
    assert lies["layers/mlp/up/kernel"].spec == P(None, "fsdp", "tensor")


class Sliced:
    """A device of a slice."""

    def __init__(self, device: jax.Device, number: int):
        self.device, self.slice_index = device, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self.device, name)


def test_each_slice_holds_whole_copies_of_the_model(monkeypatch):
    devices = [Sliced(device, number % 2) for number, device in enumerate(jax.devices())]  # every other one
    monkeypatch.setattr(jax, "make_mesh", lambda shape, *_, devices, **__: Laid(np.reshape(devices, shape)))
    monkeypatch.setattr("models.sharding.Mesh", lambda devices, *_, **__: Laid(devices))
    mesh = make_mesh({"data": 2, "fsdp": -1}, devices=devices)
    assert mesh.devices.shape == (2, 4, 1, 1, 1)
    assert [{device.slice_index for device in copy.flat} for copy in mesh.devices] == [{0}, {1}]
    with pytest.raises(ValueError, match=r"mesh\.data: 1 copies cannot lie on 2 slices alike"):
        make_mesh({"fsdp": 8}, devices=devices)


class Laid:
    """A mesh of devices that are none of jax's."""

    def __init__(self, devices: np.ndarray):
        self.devices = devices
