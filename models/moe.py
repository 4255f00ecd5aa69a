"""A mixture of experts in the place of the MLP: a router sends each token to a few of many, and drops none.

B rows, L tokens of a row, T tokens in all, K experts of a token, E experts, D width, F width of an expert.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from models.activations import ACTIVATIONS
from models.config import DecoderConfig
from models.experts import Weights, counts, through_experts
from models.linear import Linear
from models.sharding import GATHERED, ROWS, dividing_spec, gathered


@dataclass(frozen=True, kw_only=True)
class Experts:
    """What a checkpoint decides about its experts: the sizes, and switches that stand at the plain mixture."""

    count: int
    per_token: int
    width: int
    score: str = "softmax"  # of all experts, before the choice; or "softmax_of_chosen", after it
    normalise: bool = False  # what the chosen ones get is made to sum to 1
    router_bias: bool = False
    expert_bias: bool = False
    fused: str = "none"  # gate and up as one matrix: "halves" gate | up, or "interleaved" gate, up, gate, up, …
    activation: str = ""  # "": as the config's; or "gpt_oss_clamped"
    shared_width: int = 0  # of one expert more that sees every token, through a sigmoid gate of its own
    aux_coefficient: float = 0.0  # of `load_balancing_loss` in the training loss


class RouterStats(NamedTuple):
    """What a router did with the real tokens: how often it chose each expert, the sum of the probabilities that it gave
    each, and the number of tokens; float32. Layers and batches add up.
    """

    chosen_E: jax.Array
    probability_E: jax.Array
    tokens: jax.Array


def load_balancing_loss(stats: RouterStats) -> jax.Array:
    """`E sum_e f_e p_e`, with f_e the share of tokens that chose expert e and p_e its mean probability; float32.

    K where experts are used alike, and more where not (arXiv:2101.03961, eqs. 4-6). Of the statistics summed over all
    layers it is what transformers calls `aux_loss`.
    """
    E, tokens = stats.chosen_E.shape[0], jnp.maximum(stats.tokens, 1.0)
    return E * jnp.sum((stats.chosen_E / tokens) * (stats.probability_E / tokens))


class Choice(NamedTuple):
    """Which experts each token goes to, what weight each gets, and the probabilities of all of them."""

    experts_TK: jax.Array
    weights_TK: jax.Array
    probability_TE: jax.Array


def route(logits_TE: jax.Array, experts: Experts) -> Choice:
    """The choice of a router with these logits, in float32; of equal ones the first is chosen."""
    logits_TE = logits_TE.astype(jnp.float32)
    probability_TE = jax.nn.softmax(logits_TE, axis=-1)
    if experts.score == "softmax_of_chosen":
        top_TK, experts_TK = jax.lax.top_k(logits_TE, experts.per_token)
        return Choice(experts_TK, jax.nn.softmax(top_TK, axis=-1), probability_TE)
    weights_TK, experts_TK = jax.lax.top_k(probability_TE, experts.per_token)
    if experts.normalise:
        weights_TK = weights_TK / weights_TK.sum(axis=-1, keepdims=True)
    return Choice(experts_TK, weights_TK, probability_TE)


class Bank(nnx.Module):
    """One linear layer of all experts: kernels [E, inputs, outputs], biases [E, outputs]."""

    def __init__(self, experts: Experts, inputs: int, outputs: int):
        self.kernel = nnx.Param(jnp.zeros((experts.count, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros((experts.count, outputs))) if experts.expert_bias else None


class Banks(nnx.Module):
    """The layers of all experts, gate and up apart or in one."""

    def __init__(self, experts: Experts, D: int):
        self.names = ("gate", "up", "down") if experts.fused == "none" else ("gate_up", "down")
        F = experts.width
        for name in self.names:
            inputs, outputs = {"gate_up": (D, 2 * F), "down": (F, D)}.get(name, (D, F))
            setattr(self, name, Bank(experts, inputs, outputs))

    def weights(self) -> Weights:
        """Every layer's arrays."""
        banks = {name: getattr(self, name) for name in self.names}
        return {
            name: {"kernel": bank.kernel[...]} | ({} if bank.bias is None else {"bias": bank.bias[...]})
            for name, bank in banks.items()
        }


class SharedExpert(nnx.Module):
    """An MLP that sees every token."""

    def __init__(self, config: DecoderConfig, F: int):
        self.gate = Linear(config.width, F, bias=False)
        self.up = Linear(config.width, F, bias=False)
        self.down = Linear(F, config.width, bias=False)
        self.activation = config.activation

    def __call__(self, x_BLD: jax.Array, lora: Any) -> jax.Array:
        return self.down(ACTIVATIONS[self.activation](self.gate(x_BLD, lora)) * self.up(x_BLD, lora), lora)


class MoE(nnx.Module):
    """`sum over chosen e of weight_e expert_e(x)`, and of a shared expert, `sigmoid(shared_gate(x)) shared(x)`."""

    def __init__(self, config: DecoderConfig):
        experts: Experts = config.experts
        self.config = config
        self.router = Linear(config.width, experts.count, bias=experts.router_bias)
        self.experts = Banks(experts, config.width)
        if experts.shared_width:
            self.shared = SharedExpert(config, experts.shared_width)
            self.shared_gate = Linear(config.width, 1, bias=False)

    def __call__(
        self, x_BLD: jax.Array, valid_BL: jax.Array | None = None, lora: Any = None
    ) -> tuple[jax.Array, RouterStats]:
        """The output [B, L, D], and what the router did where `valid_BL`; other tokens go to no chosen expert."""
        experts: Experts = self.config.experts
        valid_BL = jnp.ones(x_BLD.shape[:2], bool) if valid_BL is None else valid_BL
        logits_BLE = self.router(x_BLD, lora)
        activation = experts.activation or self.config.activation
        out_BLD, stats = _mixture(x_BLD, logits_BLE, valid_BL, self.experts.weights(), experts, activation)
        if experts.shared_width:
            out_BLD = out_BLD + jax.nn.sigmoid(self.shared_gate(x_BLD, lora)) * self.shared(x_BLD, lora)
        return out_BLD, stats


class Split(NamedTuple):
    """How the devices share the work: the axes that tokens are split over, those of each weight, and whether the hidden
    units of an expert are split.
    """

    tokens: tuple[str, ...]
    weights: dict[str, dict[str, P]]
    units: bool


def _mixture(
    x_BLD: jax.Array, logits_BLE: jax.Array, valid_BL: jax.Array, weights: Weights, experts: Experts, activation: str
) -> tuple[jax.Array, RouterStats]:
    """Sends tokens through their experts; under `jax.set_mesh` each device those that it has, with the experts and the
    hidden units that it has. Left to XLA, the tokens of all devices would be sorted together.
    """
    mesh = jax.sharding.get_abstract_mesh()
    part = functools.partial(_part, experts=experts, activation=activation, split=None)
    if mesh.empty or mesh.size == 1:
        return part(x_BLD, logits_BLE, valid_BL, weights)
    if experts.count % mesh.shape["expert"]:
        raise ValueError(f"mesh.expert: {mesh.shape['expert']} devices cannot share {experts.count} experts evenly")
    if experts.fused == "halves":  # a unit's gate and up belong on one device
        weights = weights | {"gate_up": {name: _interleaved(leaf) for name, leaf in weights["gate_up"].items()}}
        experts = dataclasses.replace(experts, fused="interleaved")
    rows, tokens = dividing_spec(x_BLD.shape[:2], ROWS, "context")
    split = _split(weights, experts, mesh, (*(rows or ()), *((tokens,) if tokens else ())))
    return jax.shard_map(
        functools.partial(part, experts=experts, split=split),
        in_specs=(P(rows, tokens), P(rows, tokens), P(rows, tokens), split.weights),
        out_specs=(P(rows, tokens), P()),
    )(x_BLD, logits_BLE, valid_BL, weights)


def _split(weights: Weights, experts: Experts, mesh: jax.sharding.AbstractMesh, tokens: tuple[str, ...]) -> Split:
    """As models/sharding.py splits parameters, but for what this many experts or units do not divide into."""
    units = "tensor" if experts.width % mesh.shape["tensor"] == 0 else None
    sizes = {axis: size if axis in tokens else 1 for axis, size in mesh.shape.items()}
    fsdp = "fsdp" if "fsdp" in tokens else None

    def axes(name: str, leaf: str, shape: tuple[int, ...]) -> P:
        if leaf == "bias":
            return P("expert", None if name == "down" else units)
        rule = ("expert", units, fsdp) if name == "down" else ("expert", fsdp, units)
        return dividing_spec(shape, *gathered(rule, shape, sizes))

    specs = {
        name: {leaf: axes(name, leaf, array.shape) for leaf, array in one.items()} for name, one in weights.items()
    }
    return Split(tokens, specs, units is not None)


def _interleaved(halves: jax.Array) -> jax.Array:
    """Columns gate, up, gate, up, … of columns gate | up."""
    *before, columns = halves.shape
    return halves.reshape(*before, 2, columns // 2).swapaxes(-1, -2).reshape(halves.shape)


def _part(
    x_BLD: jax.Array,
    logits_BLE: jax.Array,
    valid_BL: jax.Array,
    weights: Weights,
    *,
    experts: Experts,
    activation: str,
    split: Split | None,
) -> tuple[jax.Array, RouterStats]:
    """One device's part: its tokens, or along `expert` those of its neighbours too, through the experts it has."""
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    choice = route(logits_BLE.reshape(-1, experts.count), experts)
    valid_T1 = valid_BL.reshape(-1, 1)
    experts_TK = jnp.where(valid_T1, choice.experts_TK, experts.count)  # padding goes nowhere
    stats = RouterStats(
        counts(experts_TK, experts.count).astype(jnp.float32),
        jnp.where(valid_T1, choice.probability_TE, 0.0).sum(axis=0),
        valid_T1.sum().astype(jnp.float32),
    )
    run = functools.partial(through_experts, fused=experts.fused, activation=activation)
    if split is None:
        return run(x_TD, choice.weights_TK, experts_TK, weights).reshape(x_BLD.shape), stats
    weights = jax.tree.map(_gathered, weights, split.weights)
    neighbours = "expert" in split.tokens
    given = (x_TD, choice.weights_TK, experts_TK)
    if neighbours:
        given = jax.lax.all_gather(given, "expert", axis=0, tiled=True)
    x_TD, weights_TK, experts_TK = given
    first = jax.lax.axis_index("expert") * weights["down"]["kernel"].shape[0]
    out_TD = run(x_TD, weights_TK, experts_TK - first, weights, once=split.units)
    if neighbours:
        out_TD = jax.lax.psum_scatter(out_TD, "expert", scatter_dimension=0, tiled=True)
    unsummed = (*(() if neighbours else ("expert",)), *(("tensor",) if split.units else ()))
    return jax.lax.psum(out_TD, unsummed).reshape(x_BLD.shape), jax.lax.psum(stats, split.tokens)


def _gathered(weight: jax.Array, axes: P) -> jax.Array:
    """A weight whole along GATHERED; its gradient is then summed and split in one."""
    for number, over in enumerate(axes):
        if over in ("fsdp", GATHERED):
            return jax.lax.all_gather(weight, over, axis=number, tiled=True)
    return weight
