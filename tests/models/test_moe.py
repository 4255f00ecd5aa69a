"""The mixture of experts against transformers' own blocks, over devices, and its router's loss."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import PartitionSpec as P
from transformers import AutoConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from models.config import DecoderConfig
from models.grouped import grouped_product
from models.moe import Experts, MoE, RouterStats, load_balancing_loss
from models.sharding import make_mesh, nested, parameter_shardings, paths

D, F, E, K, SHARED = 16, 12, 8, 3, 20


def decoder_config(experts: Experts) -> DecoderConfig:
    """A config of which the mixture reads the width and the activation."""
    return DecoderConfig(
        vocabulary=32,
        width=D,
        heads=2,
        kv_heads=2,
        head_width=8,
        mlp_width=F,
        activation="silu",
        norm_eps=1e-5,
        tied_head=True,
        initializer_range=0.02,
        each=(),
        experts=experts,
    )


class Mixture(NamedTuple):
    """A module's graph and its parameters."""

    graph: Any
    params: Any

    def __call__(self, x_BLD: Any, valid_BL: Any = None, *, params: Any = None) -> tuple[jax.Array, RouterStats]:
        return nnx.merge(self.graph, self.params if params is None else params)(x_BLD, valid_BL)


def mixture(experts: Experts, *, seed: int = 0, scale: float = 0.5) -> Mixture:
    graph, state = nnx.split(nnx.eval_shape(lambda: MoE(decoder_config(experts))))
    random = np.random.default_rng(seed)
    make = lambda leaf: jnp.asarray(random.normal(size=leaf.shape) * scale, jnp.float32)  # noqa: E731
    return Mixture(graph, jax.tree.map(make, nnx.to_pure_dict(state)))


def tokens(*shape: int, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(*shape, D)), jnp.float32)


class Family(NamedTuple):
    """A family's block in transformers, the fields of its config, and what ours is told."""

    block: Any
    model_type: str
    fields: dict[str, Any]
    experts: Experts


SIZES = {"hidden_size": D, "num_experts_per_tok": K}
QWEN = {"num_experts": E, "moe_intermediate_size": F}
PLAIN = Experts(count=E, per_token=K, width=F)
FAMILIES = {
    "mixtral": Family(
        MixtralSparseMoeBlock,
        "mixtral",
        {"num_local_experts": E, "intermediate_size": F},
        Experts(count=E, per_token=K, width=F, normalise=True),
    ),
    "mixtral, gate and up fused": Family(
        MixtralSparseMoeBlock,
        "mixtral",
        {"num_local_experts": E, "intermediate_size": F},
        Experts(count=E, per_token=K, width=F, normalise=True, fused="halves"),
    ),
    "qwen2_moe": Family(
        Qwen2MoeSparseMoeBlock,
        "qwen2_moe",
        QWEN | {"shared_expert_intermediate_size": SHARED},
        Experts(count=E, per_token=K, width=F, shared_width=SHARED),
    ),
    "qwen3_moe": Family(
        Qwen3MoeSparseMoeBlock,
        "qwen3_moe",
        QWEN | {"norm_topk_prob": True},
        Experts(count=E, per_token=K, width=F, normalise=True),
    ),
    "qwen3_moe, not renormalised": Family(Qwen3MoeSparseMoeBlock, "qwen3_moe", QWEN, PLAIN),
    "olmoe": Family(OlmoeSparseMoeBlock, "olmoe", {"num_experts": E, "intermediate_size": F}, PLAIN),
    "gpt_oss": Family(
        GptOssMLP,
        "gpt_oss",
        {"num_local_experts": E, "intermediate_size": F},
        Experts(
            count=E,
            per_token=K,
            width=F,
            score="softmax_of_chosen",
            router_bias=True,
            expert_bias=True,
            fused="interleaved",
            activation="gpt_oss_clamped",
        ),
    ),
}


def torch_block(family: Family) -> torch.nn.Module:
    """The block with random weights; so large that gpt_oss's clamp is reached."""
    config = AutoConfig.for_model(family.model_type, **SIZES, **family.fields)
    config._experts_implementation = "eager"
    block = family.block(config).float().eval()
    torch.manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5 if parameter.ndim > 1 else 1.0)
    return block


def ours(named: dict[str, torch.Tensor], family: Family) -> dict[str, Any]:
    """Parameters or gradients of a block, by our paths and in our shapes."""
    found = {name.replace("gate_up", "both"): value.detach().float().numpy() for name, value in named.items()}
    router = "router" if "router.weight" in found else "gate"
    leaves = {"router/kernel": found[f"{router}.weight"].T}
    if family.experts.expert_bias:  # gpt_oss: kernels are stored as ours
        return nested(
            leaves
            | {
                "router/bias": found["router.bias"],
                "experts/gate_up/kernel": found["experts.both_proj"],
                "experts/gate_up/bias": found["experts.both_proj_bias"],
                "experts/down/kernel": found["experts.down_proj"],
                "experts/down/bias": found["experts.down_proj_bias"],
            }
        )
    both, down = (found[f"experts.{name}_proj"].swapaxes(1, 2) for name in ("both", "down"))
    if family.experts.fused == "halves":
        leaves |= {"experts/gate_up/kernel": both, "experts/down/kernel": down}
    else:
        leaves |= {f"experts/{n}/kernel": k for n, k in zip(("gate", "up"), np.split(both, 2, axis=-1), strict=True)}
        leaves |= {"experts/down/kernel": down}
    if family.experts.shared_width:
        leaves |= {f"shared/{n}/kernel": found[f"shared_expert.{n}_proj.weight"].T for n in ("gate", "up", "down")}
        leaves |= {"shared_gate/kernel": found["shared_expert_gate.weight"].T}
    return nested(leaves)


def output(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = block(x)
    return out[0] if isinstance(out, tuple) else out


def relative(found: Any, expected: Any) -> float:
    """The largest difference, as a part of the largest value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_output_and_all_gradients_are_those_of_transformers(family):
    block, mine = torch_block(family), mixture(family.experts)
    x_BLD, probe_BLD = np.array(tokens(3, 7)), np.array(tokens(3, 7, seed=2))
    x = torch.tensor(x_BLD, requires_grad=True)
    expected = output(block, x)
    (expected * torch.tensor(probe_BLD)).sum().backward()
    params = jax.tree.map(jnp.asarray, ours(dict(block.named_parameters()), family))
    assert {k: v.shape for k, v in paths(params).items()} == {k: v.shape for k, v in paths(mine.params).items()}

    def loss(params: Any, x_BLD: Any) -> tuple[jax.Array, jax.Array]:
        out, _ = mine(x_BLD, params=params)
        return (out * probe_BLD).sum(), out

    (grads, d_x), out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, jnp.asarray(x_BLD))
    assert relative(out, expected.detach()) < 2e-5
    assert relative(d_x, x.grad) < 1e-4
    theirs = ours({name: p.grad for name, p in block.named_parameters()}, family)
    for path, gradient in paths(grads).items():
        assert relative(gradient, paths(theirs)[path]) < 1e-4, path


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_bfloat16_is_as_near_to_float32_as_transformers_bfloat16_is(name):
    family = FAMILIES[name]
    block, mine = torch_block(family), mixture(family.experts)
    x_BLD = np.array(tokens(8, 16).astype(jnp.bfloat16).astype(jnp.float32))
    block.load_state_dict({name: value.bfloat16().float() for name, value in block.state_dict().items()})
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), ours(dict(block.named_parameters()), family))
    with torch.no_grad():
        exact = output(block, torch.tensor(x_BLD)).numpy()
        theirs = output(block.bfloat16(), torch.tensor(x_BLD).bfloat16()).float().numpy()
    out, _ = jax.jit(lambda x, params: mine(x, params=params))(jnp.asarray(x_BLD, jnp.bfloat16), params)
    assert out.dtype == jnp.bfloat16
    router = params["router"]
    logits_BLE = np.array(x_BLD @ router["kernel"]) + np.array(router.get("bias", np.zeros(E, np.float32)))
    ranked_BLE = np.sort(logits_BLE, axis=-1)
    clear_BL = ranked_BLE[..., -K] - ranked_BLE[..., -K - 1] > 0.05  # in others the rounding decides who is chosen
    assert clear_BL.mean() > 0.8
    error, bar = (np.sqrt(np.square(np.asarray(one, np.float32) - exact)[clear_BL].mean()) for one in (out, theirs))
    assert error <= 1.25 * bar


def dense(params: Any, expert: int, x: Any) -> np.ndarray:
    gate, up, down = (np.asarray(params["experts"][name]["kernel"][expert]) for name in ("gate", "up", "down"))
    x = np.asarray(x)
    return (np.asarray(jax.nn.silu(x @ gate)) * (x @ up)) @ down


def test_of_equal_scores_the_first_experts_are_chosen_and_none_twice():
    moe, x_BLD = mixture(PLAIN), tokens(2, 5)
    moe.params["router"]["kernel"] = jnp.zeros((D, E))
    out, stats = jax.jit(moe.__call__)(x_BLD)
    assert relative(out, sum(dense(moe.params, e, x_BLD) for e in range(K)) / E) < 1e-5
    np.testing.assert_array_equal(stats.chosen_E, [10.0] * K + [0.0] * (E - K))
    grads = jax.jit(jax.grad(lambda params: moe(x_BLD, params=params)[0].sum()))(moe.params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("sizes", [None, {"expert": 8}, {"fsdp": 2, "expert": 4}])
def test_no_token_is_dropped_when_all_go_to_one_expert(sizes):
    moe = mixture(Experts(count=E, per_token=1, width=F, router_bias=True))
    moe.params["router"]["bias"] = jnp.zeros(E).at[5].set(1000.0)
    x_BLD = tokens(8, 40)
    with jax.set_mesh(make_mesh(sizes or {}, devices=jax.devices()[: 8 if sizes else 1])):
        out, stats = jax.jit(moe.__call__)(x_BLD)
    assert relative(out, dense(moe.params, 5, x_BLD)) < 1e-5
    np.testing.assert_array_equal(stats.chosen_E, [0, 0, 0, 0, 0, 320, 0, 0])


def test_padding_counts_for_nothing_and_changes_nothing():
    moe, x_BLD = mixture(PLAIN), tokens(2, 6)
    valid_BL = jnp.ones((2, 6), bool).at[1, 4:].set(False)

    @jax.jit
    def run(x_BLD: Any) -> Any:
        (_, given), d_x = jax.value_and_grad(both, has_aux=True)(x_BLD)
        return *given, d_x

    def both(x_BLD: Any) -> Any:
        out, stats = moe(x_BLD, valid_BL)
        return out.sum() + load_balancing_loss(stats), (out, stats)

    out, stats, d_x = run(x_BLD)
    first, second = jax.jit(moe.__call__)(x_BLD[:1])[0], jax.jit(moe.__call__)(x_BLD[1:, :4])[0]
    np.testing.assert_allclose(out[:1], first, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out[1:, :4], second, rtol=1e-5, atol=1e-5)
    assert float(stats.tokens) == 10
    noise = jnp.where(valid_BL[:, :, None], 0.0, tokens(2, 6, seed=9) * 100)
    jax.tree.map(np.testing.assert_array_equal, run(x_BLD + noise)[1:], (stats, d_x))
    np.testing.assert_array_equal(d_x[1, 4:], 0.0)
    assert np.abs(d_x[1, :4]).min() > 0


@pytest.mark.parametrize("experts", [PLAIN, FAMILIES["gpt_oss"].experts], ids=["softmax", "softmax of chosen"])
def test_the_load_balancing_loss_of_all_layers_is_that_of_transformers(experts):
    layers, valid_BL = [mixture(experts, seed=seed) for seed in range(3)], np.ones((4, 9), bool)
    valid_BL[0, 5:] = valid_BL[2, :3] = False
    hidden = [tokens(4, 9, seed=10 + number) for number in range(3)]
    run = jax.jit(lambda params, x_BLD: layers[0](x_BLD, jnp.asarray(valid_BL), params=params)[1])
    each = [run(layer.params, x_BLD) for layer, x_BLD in zip(layers, hidden, strict=True)]
    found = load_balancing_loss(jax.tree.map(lambda *leaves: sum(leaves), *each))
    logits = []
    for layer, x_BLD in zip(layers, hidden, strict=True):
        router = layer.params["router"]
        logits.append(
            torch.tensor(
                np.asarray(x_BLD @ router["kernel"] + jnp.reshape(router.get("bias", jnp.zeros(E)), (1, 1, E))).reshape(
                    -1, E
                )
            )
        )
    expected = load_balancing_loss_func(tuple(logits), E, K, torch.tensor(valid_BL))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_load_balancing_loss_is_k_when_all_experts_are_used_alike():
    stats = RouterStats(jnp.full(E, 6.0 * K), jnp.full(E, 6.0), jnp.asarray(6.0 * E))
    assert float(load_balancing_loss(stats)) == K
    assert float(load_balancing_loss(RouterStats(jnp.zeros(E), jnp.zeros(E), jnp.zeros(())))) == 0


SPLIT = {
    "qwen2_moe": FAMILIES["qwen2_moe"].experts,
    "gate and up fused": FAMILIES["mixtral, gate and up fused"].experts,
    "gpt_oss": FAMILIES["gpt_oss"].experts,
    "units that tensor does not divide": Experts(count=E, per_token=K, width=13),
}
MESHES = [
    ("gpt_oss", 8, {"fsdp": 2, "tensor": 2, "expert": 2}),
    ("gpt_oss", 3, {"fsdp": 2, "tensor": 2, "expert": 2}),
    ("gpt_oss", 8, {"expert": 8}),
    ("gpt_oss", 8, {"fsdp": 2, "expert": 2, "context": 2}),
    ("qwen2_moe", 8, {"data": 2, "expert": 2, "context": 2}),
    ("qwen2_moe", 3, {"expert": 2, "context": 4}),
    ("gate and up fused", 8, {"expert": 2, "tensor": 4}),
    ("units that tensor does not divide", 8, {"fsdp": 2, "expert": 2, "tensor": 2}),
]


def shardings_of(moe: Mixture, mesh: jax.sharding.Mesh) -> dict[str, P]:
    """How the mixture's parameters are split as a layer among others, by path."""
    stacked = nested({f"layers/moe/{path}": leaf[None] for path, leaf in paths(moe.params).items()})
    return {path: P(*one.spec[1:]) for path, one in paths(parameter_shardings(stacked, mesh)["layers"]["moe"]).items()}


@pytest.mark.parametrize(("kind", "rows", "sizes"), MESHES, ids=[f"{a}, {b} rows, {c}" for a, b, c in MESHES])
def test_over_devices_loss_and_gradients_are_the_same(kind, rows, sizes):
    moe, x_BLD, mesh = mixture(SPLIT[kind]), tokens(rows, 4), make_mesh(sizes)
    valid_BL = jnp.ones((rows, 4), bool).at[1, 2:].set(False)

    def loss(params: Any, x_BLD: Any) -> tuple[jax.Array, RouterStats]:
        out, stats = moe(x_BLD, valid_BL, params=params)
        return jnp.square(out).mean() + load_balancing_loss(stats), stats

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    expected = jax.device_get(step(moe.params, x_BLD))
    lain = nested({path: jax.NamedSharding(mesh, spec) for path, spec in shardings_of(moe, mesh).items()})
    with jax.set_mesh(mesh):
        found = jax.device_get(step(jax.device_put(moe.params, lain), x_BLD))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_experts_lie_where_the_mesh_says():
    mesh = make_mesh({"fsdp": 2, "tensor": 2, "expert": 2})
    assert shardings_of(mixture(SPLIT["gpt_oss"]), mesh) == {
        "router/kernel": P(),
        "router/bias": P(),
        "experts/gate_up/kernel": P("expert", "fsdp", "tensor"),
        "experts/gate_up/bias": P("expert", "tensor"),
        "experts/down/kernel": P("expert", "tensor", "fsdp"),
        "experts/down/bias": P("expert"),
    }


def test_devices_that_share_rows_of_tokens_share_the_experts_kernels_too():
    mesh = make_mesh({"fsdp": 2, "context": 2, "expert": 2})
    lain = shardings_of(mixture(SPLIT["gpt_oss"]), mesh)
    assert lain["experts/gate_up/kernel"] == P("expert", ("fsdp", "context"), "tensor")
    assert lain["experts/down/kernel"] == P("expert", "tensor", ("fsdp", "context"))


def test_devices_never_hold_the_experts_of_others():
    moe, mesh = mixture(Experts(count=E, per_token=2, width=F)), make_mesh({"fsdp": 2, "tensor": 2, "expert": 2})
    lain = nested({path: jax.NamedSharding(mesh, spec) for path, spec in shardings_of(moe, mesh).items()})
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(lambda params, x: moe(x, params=params)[0].sum()), out_shardings=lain)
        program = gradient.lower(jax.device_put(moe.params, lain), tokens(8, 4)).compile().as_text()
    moved = re.findall(r"= f32\[(\d+),\d+,\d+\]\S* (all-gather|all-reduce|reduce-scatter|all-to-all)\(", program)
    assert {(str(E // 2), "all-gather"), (str(E // 2), "reduce-scatter")} <= set(moved)  # along fsdp
    assert str(E) not in {size for size, _ in moved}


def test_experts_that_devices_cannot_share_evenly_are_refused():
    moe = mixture(Experts(count=6, per_token=2, width=F))
    with (
        jax.set_mesh(make_mesh({"expert": 4, "data": 2})),
        pytest.raises(ValueError, match=r"mesh\.expert: 4 devices cannot share 6 experts evenly"),
    ):
        jax.jit(moe.__call__)(tokens(8, 2))


@pytest.mark.parametrize("sizes", [(0, 0, 0), (5, 0, 300), (1, 1, 1), (128, 129, 43), (0, 300, 0)])
def test_a_grouped_product_and_its_gradients_are_those_of_each_group(sizes):
    random = np.random.default_rng(0)
    x_SD, kernel_EDF, probe_SF = (
        jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((305, 6), (3, 6, 4), (305, 4))
    )
    out, vjp = jax.vjp(lambda x, kernel: grouped_product(x, kernel, jnp.array(sizes)), x_SD, kernel_EDF)
    d_x, d_kernel = vjp(jnp.asarray(probe_SF))
    group_S = np.repeat([0, 1, 2, 3], [*sizes, 305 - sum(sizes)])
    used = (group_S < 3)[:, None]
    own_SDF = kernel_EDF[np.minimum(group_S, 2)]
    np.testing.assert_allclose(out, used * np.einsum("sd,sdf->sf", x_SD, own_SDF), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_x, used * np.einsum("sf,sdf->sd", probe_SF, own_SDF), rtol=1e-5, atol=1e-5)
    for group in range(3):
        mine = group_S == group
        np.testing.assert_allclose(d_kernel[group], x_SD[mine].T @ probe_SF[mine], rtol=1e-4, atol=1e-4)


def test_memory_does_not_grow_with_the_number_of_experts():
    def bytes_for(count: int) -> int:
        moe = mixture(Experts(count=count, per_token=2, width=F))
        return jax.jit(moe.__call__).lower(tokens(4, 256)).compile().memory_analysis().temp_size_in_bytes

    router = 1024 * 64 * 4 * 4  # logits and probabilities of 1024 tokens
    assert bytes_for(64) < bytes_for(8) + router
