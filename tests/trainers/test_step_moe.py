"""A step of a mixture of experts is the same step on every mesh, packed or not, its routers' loss included."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import Compute
from models.decoder import abstract_params, head, init_params, routed_hidden_states
from models.moe import Experts, load_balancing_loss
from models.sharding import make_mesh
from tests.trainers.test_step import CONFIG as DENSE
from tests.trainers.test_step import batch
from trainers import optim
from trainers.loop import device_batch
from trainers.losses import Sum, cross_entropy
from trainers.step import build_step

CONFIG = dataclasses.replace(
    DENSE,
    experts=Experts(count=4, per_token=2, width=24, normalise=True, shared_width=16, aux_coefficient=0.1),
)
STEPS = 2
CASES = [
    pytest.param({"fsdp": 2, "tensor": 2, "expert": 2}, False, "none", id="fsdp 2 × tensor 2 × expert 2, not packed"),
    pytest.param({"data": 2, "expert": 4}, True, "full", id="data 2 × expert 4, activations recomputed"),
    pytest.param({"fsdp": 2, "expert": 2, "context": 2}, True, "none", marks=pytest.mark.slow),
    pytest.param({"fsdp": 4, "tensor": 2}, True, "none", marks=pytest.mark.slow),
]


def loss_of(compute: Compute) -> Any:
    """Cross-entropy, and what the routers are charged for it: the loss of a microbatch's balance, for each token."""

    def loss(params: Any, frozen: Any, micro: dict[str, jax.Array], key: Any = None) -> Any:
        hidden_BLD, stats = routed_hidden_states(
            params,
            CONFIG,
            tokens_BL=micro["tokens"],
            positions_BL=micro["positions"],
            segments_BL=micro["segments"],
            compute=compute,
        )
        kernel_VD = head(params, CONFIG).kernel_VD
        found, others = cross_entropy(hidden_BLD, kernel_VD, micro["targets"], micro["weights"])
        balance = load_balancing_loss(stats)
        charged = found.total + CONFIG.experts.aux_coefficient * balance * found.count
        return Sum(charged, found.count), others | {"aux_loss": Sum(balance * stats.tokens, stats.tokens)}

    return loss


def trajectory(sizes: dict[str, int], *, packed: bool, remat: str = "none") -> tuple[Any, Any]:
    """Losses, gradient norms and router losses of STEPS steps, and the last parameters."""
    mesh = make_mesh(sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])
    optimizer = optim.build(
        "adamw", schedule=lambda step: 1e-2, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8, momentum=0.0
    )
    abstract = abstract_params(CONFIG, dtype=jnp.float32)
    step = build_step(loss_of(Compute(remat=remat)), optimizer, abstract, mesh=mesh, max_grad_norm=1.0)
    params = init_params(jax.random.key(0), CONFIG, dtype=jnp.float32)
    state, found = step.init(jax.device_put(params, step.shardings.params)), []
    for number in range(STEPS):
        state, metrics = step.train(state, None, device_batch(batch(number, accumulation=2, packed=packed), mesh))
        found.append([float(metrics[name]) for name in ("loss", "grad_norm", "aux_loss")])
    return np.array(found), jax.device_get(state.params)


@pytest.fixture(scope="module")
def plain() -> tuple[Any, Any]:
    return trajectory({"data": 1}, packed=True)


@pytest.mark.parametrize(("sizes", "packed", "remat"), CASES)
def test_the_trajectory_depends_neither_on_the_mesh_nor_on_packing(sizes, packed, remat, plain):
    found, params = trajectory(sizes, packed=packed, remat=remat)
    np.testing.assert_allclose(found, plain[0], rtol=1e-5)
    # A hundredth of one update: AdamW's first ones divide small gradients by themselves.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params, plain[1])
