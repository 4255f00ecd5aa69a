"""Each optimizer against torch's or transformers', with the Trainer's decay groups; clipping, refusal, placement."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from transformers import LlamaConfig, LlamaForCausalLM, Trainer
from transformers.optimization import Adafactor

from configs.default import SCHEMA
from trainers import optim
from trainers.schedules import schedule

# V vocabulary, D width, F feed-forward width, n layers
V, D, F, n = 11, 6, 10, 3
SHAPES = {
    "embed/embedding": (V, D),
    "layers/input_norm/scale": (n, D),
    "layers/attention/q/kernel": (n, D, D),
    "layers/attention/q/bias": (n, D),
    "layers/mlp/up/kernel": (n, D, F),
    "layers/mlp/down/kernel": (n, F, D),
    "norm/scale": (D,),
    "head/kernel": (D, V),
}
DECAYED = {path for path in SHAPES if path.endswith(("kernel", "embedding"))}
STEPS = 20
RATE = schedule("linear", learning_rate=1e-2, steps=STEPS, warmup_steps=3)
HYPER = {"weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "momentum": 0.9}


def random_tree(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return unflatten_dict({path: rng.standard_normal(s, dtype=np.float32) for path, s in shapes.items()}, sep="/")


def gradients():
    return [random_tree(100 + t) for t in range(STEPS)]


def ours(name, params, grads, *, rate=RATE, **hyper):
    optimizer = optim.build(name, schedule=rate, **HYPER | hyper)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    params = jax.tree.map(jnp.asarray, params)
    for step, g in enumerate(grads):
        params, state = update(g, state, params, step=jnp.int32(step), scale=jnp.float32(1), ok=jnp.bool_(True))
    return params


def tensors_of_layers(tree):
    """Our tree as torch's would be: a tensor for each layer, kernels as [out, in]; in one order."""
    for path, value in sorted(flatten_dict(tree, sep="/").items()):
        for tensor in np.asarray(value) if path.startswith("layers/") else np.asarray(value)[None]:
            yield path, tensor.T if path.endswith("kernel") else tensor


def theirs(make, params, grads, *, rate=RATE, weight_decay=HYPER["weight_decay"]):
    named = [(path, torch.nn.Parameter(torch.tensor(t.copy()))) for path, t in tensors_of_layers(params)]
    groups = [
        {"params": [p for path, p in named if path in DECAYED], "weight_decay": weight_decay},
        {"params": [p for path, p in named if path not in DECAYED], "weight_decay": 0.0},
    ]
    optimizer = make(groups)
    for step, g in enumerate(grads):
        for (_, p), (_, gradient) in zip(named, tensors_of_layers(g), strict=True):
            p.grad = torch.tensor(gradient.copy())
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
    return [(path, p.detach().numpy()) for path, p in named]


TORCH = {
    "adamw": lambda groups: torch.optim.AdamW(groups, betas=HYPER["betas"], eps=HYPER["eps"]),
    "adam": lambda groups: torch.optim.Adam(groups, betas=HYPER["betas"], eps=HYPER["eps"]),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=HYPER["momentum"]),
    "adafactor": lambda groups: Adafactor(groups, lr=1.0, scale_parameter=False, relative_step=False),
}


@pytest.mark.parametrize("name", TORCH)
def test_twenty_updates_are_those_of_torch(name):
    params, grads = random_tree(0), gradients()
    for (path, mine), (_, expected) in zip(
        tensors_of_layers(ours(name, params, grads)), theirs(TORCH[name], params, grads), strict=True
    ):
        np.testing.assert_allclose(mine, expected, rtol=2e-6, atol=1e-6, err_msg=path)


def used(path):
    """Two layers of the MLP, none of the last norm, and all of the rest."""
    return {"layers/mlp/up/kernel": 2, "layers/mlp/down/kernel": 2, "norm/scale": 0}.get(path)


@pytest.mark.parametrize("name", [*TORCH, "lion", "optax"])
def test_what_no_loss_depends_on_is_left_alone_and_the_rest_is_updated_as_ever(name):
    params, grads = random_tree(0), gradients()
    alone, whole = (
        optim.from_optax(optax.adamw(1e-2, weight_decay=0.1), computed)
        if name == "optax"
        else optim.build(name, schedule=RATE, **HYPER, decayed=lambda path: True, computed=computed)
        for computed in (used, lambda path: None)
    )
    found = []
    for optimizer in (alone, whole):
        state, new = optimizer.init(jax.tree.map(jnp.asarray, params)), jax.tree.map(jnp.asarray, params)
        update = jax.jit(optimizer.update)
        for step, g in enumerate(grads[:3]):
            new, state = update(g, state, new, step=jnp.int32(step), scale=jnp.float32(1), ok=jnp.bool_(True))
        found.append(flatten_dict(new, sep="/"))
    for path, before in flatten_dict(params, sep="/").items():
        layers = used(path)
        moved = slice(layers)
        np.testing.assert_array_equal(found[0][path][moved], found[1][path][moved], err_msg=path)
        if layers is not None:
            np.testing.assert_array_equal(found[0][path][layers:], before[layers:], err_msg=path)
            assert not np.array_equal(found[1][path][layers:], before[layers:])


def test_small_gradients_feel_the_eps_that_stands_after_the_root():
    params = random_tree(0)
    grads = [jax.tree.map(lambda g: g * 1e-7, g) for g in gradients()]
    adamw = ours("adamw", params, grads, eps=1e-6)
    expected = theirs(lambda groups: torch.optim.AdamW(groups, betas=HYPER["betas"], eps=1e-6), params, grads)
    for (path, mine), (_, other) in zip(tensors_of_layers(adamw), expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=2e-6, atol=1e-6, err_msg=path)


def test_sgd_without_momentum_remembers_nothing():
    params, grads = random_tree(0), gradients()
    assert optim.build("sgd", schedule=RATE, **HYPER | {"momentum": 0.0}).init(params) == {}
    plain = ours("sgd", params, grads, momentum=0.0)
    for (path, mine), (_, expected) in zip(
        tensors_of_layers(plain), theirs(torch.optim.SGD, params, grads), strict=True
    ):
        np.testing.assert_allclose(mine, expected, rtol=2e-6, atol=1e-6, err_msg=path)


def test_lion_by_hand():
    # betas (0.5, 0.75), rate 0.1, decay 0.5 on a kernel of 1, gradients 1 and -1:
    # step 1: direction sign(0.5 * 0 + 0.5 * 1) = 1,     p = 1 * 0.95 - 0.1 = 0.85,      m = 0.25 * 1 = 0.25
    # step 2: direction sign(0.125 - 0.5) = -1,          p = 0.85 * 0.95 + 0.1 = 0.9075, m = 0.1875 - 0.25 = -0.0625
    def constant(step):
        return 0.1

    optimizer = optim.build("lion", schedule=constant, weight_decay=0.5, betas=(0.5, 0.75), eps=0.0, momentum=0.0)
    params = {"kernel": jnp.ones((1, 1))}
    state = optimizer.init(params)
    for step, (gradient, p, m) in enumerate([(1.0, 0.85, 0.25), (-1.0, 0.9075, -0.0625)]):
        g = {"kernel": jnp.full((1, 1), gradient)}
        params, state = optimizer.update(g, state, params, step=step, scale=1.0, ok=True)
        np.testing.assert_allclose([params["kernel"].item(), state["m"]["kernel"].item()], [p, m], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "oracle"),
    [
        ("lion", optax.lion(RATE, 0.9, 0.95, weight_decay=0.1)),
        ("adamw", optax.adamw(RATE, 0.9, 0.95, eps=1e-8, weight_decay=0.1)),
    ],
)
def test_what_optax_has_is_optax_numbers(name, oracle):
    grads, shapes = gradients(), {path: SHAPES[path] for path in DECAYED}
    grads = [
        unflatten_dict({p: g for p, g in flatten_dict(t, sep="/").items() if p in DECAYED}, sep="/") for t in grads
    ]
    params = expected = random_tree(0, shapes)
    state = oracle.init(expected)
    for g in grads:
        updates, state = oracle.update(g, state, expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6), ours(name, params, grads), expected
    )


def test_the_decayed_parameters_are_those_of_the_trainer():
    # The Trainer's own rule asked about a model, and the names our paths would have there.
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    config.attention_bias, config.num_key_value_heads = True, 2
    theirs = set(Trainer.get_decay_parameter_names(None, LlamaForCausalLM(config)))
    names = {
        "embed/embedding": "model.embed_tokens.weight",
        "layers/input_norm/scale": "model.layers.0.input_layernorm.weight",
        "layers/attention/q/kernel": "model.layers.0.self_attn.q_proj.weight",
        "layers/attention/q/bias": "model.layers.0.self_attn.q_proj.bias",
        "layers/mlp/down/kernel": "model.layers.0.mlp.down_proj.weight",
        "norm/scale": "model.norm.weight",
        "head/kernel": "lm_head.weight",
    }
    assert {path: optim.hf_decayed(path) for path in names} == {path: name in theirs for path, name in names.items()}


def test_a_stack_of_layers_is_updated_as_its_layers_one_by_one():
    # Adafactor holds each tensor's update to a root mean square of 1: a large layer must not shrink a small one's step.
    params, size = random_tree(0), np.array([1.0, 1e-3, 1e3], np.float32)
    grads = jax.tree.map(lambda g: g * size.reshape(-1, 1, 1), random_tree(1)["layers"]["mlp"])
    stacked = ours("adafactor", {"layers": {"mlp": params["layers"]["mlp"]}}, [{"layers": {"mlp": grads}}])
    for i in range(n):
        one = jax.tree.map(lambda p, i=i: p[i], params["layers"]["mlp"])
        alone = ours("adafactor", {"mlp": one}, [{"mlp": jax.tree.map(lambda g, i=i: g[i], grads)}])
        for kernel in ("up", "down"):
            np.testing.assert_allclose(
                stacked["layers"]["mlp"][kernel]["kernel"][i], alone["mlp"][kernel]["kernel"], rtol=1e-6
            )


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_clipping_is_torchs(max_norm, size):
    grads = jax.tree.map(lambda g: g * np.float32(size), random_tree(1))
    tensors = [torch.nn.Parameter(torch.zeros(g.shape)) for g in jax.tree.leaves(grads)]
    for p, g in zip(tensors, jax.tree.leaves(grads), strict=True):
        p.grad = torch.tensor(g)
    expected = torch.nn.utils.clip_grad_norm_(tensors, max_norm * size).item()
    norm = optim.global_norm(grads)
    assert float(norm) == pytest.approx(expected, rel=1e-6)
    scale = optim.clip_scale(norm, max_norm * size)
    for p, g in zip(tensors, jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(g * scale, p.grad, rtol=1e-6)


def test_the_epsilon_of_clipping_shows_on_a_tiny_norm():
    # 1e-6 / (1e-6 + 1e-6) = 0.5, where a plain ratio would leave the gradients as they are
    assert float(optim.clip_scale(jnp.float32(1e-6), 1e-6)) == pytest.approx(0.5)


@pytest.mark.parametrize("max_norm", [None, 0, 0.0])
def test_no_maximum_means_no_clipping(max_norm):
    assert optim.clip_scale(jnp.float32(100.0), max_norm) == 1.0


def test_the_norm_of_many_half_precision_gradients_is_exact():
    # 3 * 2^20 ones: bfloat16 would stop counting at 256, float32 summed one by one at 2^24
    assert optim.global_norm({"a": jnp.ones((3, 1 << 20), jnp.bfloat16)}) == pytest.approx((3 * 2**20) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("name", optim.RULES)
def test_a_refused_update_changes_nothing(name):
    params, grads = jax.tree.map(jnp.asarray, random_tree(0)), random_tree(1)
    optimizer = optim.build(name, schedule=RATE, **HYPER)
    update = jax.jit(optimizer.update)
    params, state = update(grads, optimizer.init(params), params, step=jnp.int32(5), scale=1.0, ok=True)
    bad = jax.tree.map(lambda g: g * jnp.nan, grads)
    kept, remembered = update(bad, state, params, step=jnp.int32(6), scale=jnp.nan, ok=False)
    jax.tree.map(np.testing.assert_array_equal, (kept, remembered), (params, state))


@pytest.mark.parametrize("name", optim.RULES)
def test_moments_have_the_dtype_of_their_parameters(name):
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), random_tree(0))
    optimizer = optim.build(name, schedule=RATE, **HYPER)
    state = optimizer.init(params)
    update = partial(optimizer.update, step=3, scale=1.0, ok=True)
    new_params, new_state = jax.eval_shape(update, params, state, params)
    expected = jnp.float32 if name == "adafactor" else jnp.bfloat16  # its means are a thousandth of the parameters
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(expected)}
    for new, old in ((new_params, params), (new_state, state)):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), old)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_the_update_is_made_in_place(name):
    # Where a rule took its step from moments other than those it stores, XLA would copy all of them first: slow, and
    # twice the memory. lion must do that.
    optimizer = optim.build(name, schedule=RATE, **HYPER)
    shapes = {"layers": {"mlp": {"up": {"kernel": jax.ShapeDtypeStruct((n, 64, 256), jnp.float32)}}}}
    state = jax.eval_shape(optimizer.init, shapes)

    def step(params, state, grads, step, scale, ok):
        return optimizer.update(grads, state, params, step=step, scale=scale, ok=ok)

    scalars = (
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.float32),
        jax.ShapeDtypeStruct((), bool),
    )
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(shapes, state, shapes, *scalars).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1024
    assert " copy(" not in compiled.as_text()


def test_state_lies_where_its_parameters_lie():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    params = {
        "layers": {"up": {"kernel": jax.ShapeDtypeStruct((n, 8, 4), jnp.float32)}},
        "norm": {"scale": jnp.ones(8)},
    }
    shardings = {
        "layers": {"up": {"kernel": NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))}},
        "norm": {"scale": NamedSharding(mesh, PartitionSpec())},
    }
    adamw = optim.state_shardings(optim.build("adamw", schedule=RATE, **HYPER), params, shardings)
    assert {slot: tree["layers"]["up"]["kernel"].spec for slot, tree in adamw.items()} == {
        "m": PartitionSpec(None, "fsdp", "tensor"),
        "v": PartitionSpec(None, "fsdp", "tensor"),
    }
    adafactor = optim.state_shardings(optim.build("adafactor", schedule=RATE, **HYPER), params, shardings)
    assert adafactor["row"]["layers"]["up"]["kernel"].spec == PartitionSpec(None, "fsdp")
    assert adafactor["column"]["layers"]["up"]["kernel"].spec == PartitionSpec(None, "tensor")
    assert adafactor["square"]["norm"]["scale"].spec == PartitionSpec(None)


OWN = """
import optax


def lamb(learning_rate, weight_decay, betas, decayed, floor=1e-6):
    return optax.lamb(learning_rate, *betas, eps=floor, weight_decay=weight_decay, mask=decayed)


def adamw(**given):
    assert given["momentum"] == 0.9
    rest = {name: given[name] for name in ("eps", "weight_decay")}
    return optax.adamw(given["learning_rate"], *given["betas"], **rest, mask=given["decayed"])


def factored(learning_rate):
    return optax.adafactor(learning_rate, min_dim_size_to_factor=2)


def late(learning_rate, beta3):
    return optax.sgd(learning_rate)


def nothing(learning_rate):
    return None
"""


@pytest.fixture
def own(tmp_path):
    """`own("lamb")` is the reference of a function of the user's."""
    (tmp_path / "own.py").write_text(OWN)
    return lambda name: f"{tmp_path}/own.py:{name}"


def test_a_function_of_the_users_may_be_the_optimizer(own):
    # The same twenty updates by optax itself, with the mask written out.
    params, grads = random_tree(0), gradients()
    mask = unflatten_dict({path: path in DECAYED for path in SHAPES}, sep="/")
    oracle = optax.lamb(RATE, *HYPER["betas"], eps=1e-6, weight_decay=HYPER["weight_decay"], mask=mask)
    expected, state = params, oracle.init(params)
    for g in grads:
        updates, state = oracle.update(g, state, expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6), ours(own("lamb"), params, grads), expected
    )


def test_adamw_of_optax_is_our_own(own):
    params, grads = random_tree(0), gradients()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6),
        ours(own("adamw"), params, grads),
        ours("adamw", params, grads),
    )


def test_a_refused_update_changes_nothing_of_the_users_optimizer(own):
    params, grads = jax.tree.map(jnp.asarray, random_tree(0)), random_tree(1)
    optimizer = optim.build(own("lamb"), schedule=RATE, **HYPER)
    update = jax.jit(optimizer.update)
    params, state = update(grads, optimizer.init(params), params, step=0, scale=1.0, ok=True)
    bad = jax.tree.map(lambda g: g * jnp.nan, grads)
    kept = update(bad, state, params, step=1, scale=jnp.nan, ok=False)
    jax.tree.map(np.testing.assert_array_equal, kept, (params, state))


def test_memory_of_the_users_optimizer_keeps_its_dtype(own):
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), random_tree(0))
    optimizer = optim.build(own("lamb"), schedule=RATE, **HYPER)
    state = optimizer.init(params)
    new = jax.eval_shape(partial(optimizer.update, step=3, scale=1.0, ok=True), params, state, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), (params, state)
    )


@pytest.mark.parametrize("name", ["lamb", "factored"])
def test_memory_of_the_users_optimizer_lies_where_its_parameters_lie(own, name):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    split, whole = PartitionSpec(None, "fsdp", "tensor"), PartitionSpec()
    params = {"layers": {"up": {"kernel": jnp.ones((n, 8, 4))}}, "norm": {"scale": jnp.ones(8)}}
    shardings = {
        "layers": {"up": {"kernel": NamedSharding(mesh, split)}},
        "norm": {"scale": NamedSharding(mesh, whole)},
    }
    optimizer = optim.build(own(name), schedule=RATE, **HYPER)
    places = optim.state_shardings(optimizer, params, shardings)
    state = jax.device_put(optimizer.init(params), places)
    lying = [leaf.sharding.spec for leaf in jax.tree.leaves(state) if leaf.shape == (n, 8, 4)]
    assert lying == ([split, split] if name == "lamb" else [])
    assert all(
        leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state) if leaf.shape != (n, 8, 4)
    )  # counts, and means over an axis


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "late",
            "optimizer '.*own.py:late' asks for beta3; it is called with learning_rate, weight_decay, betas, eps,",
        ),
        ("nothing", r"must return an optax\.GradientTransformation, not NoneType"),
        ("gone", "training.optimizer '.*own.py:gone': .* has no function 'gone'"),
    ],
)
def test_a_function_that_is_no_optimizer_is_refused(own, name, message):
    with pytest.raises(ValueError, match=message):
        optim.build(own(name), schedule=RATE, **HYPER)


def test_names_of_the_schema_stand_for_rules_and_what_they_lose_is_said():
    assert set(SCHEMA["training"]["optimizer"].choices) == {*optim.RULES, *optim.SAME_AS}
    assert [optim.resolve(name) for name in ("adamw_torch_fused", "sgd", "lion_32bit")] == ["adamw", "sgd", "lion"]
    assert optim.notice("adamw_torch") is None
    assert optim.notice("my_8bit.py:adam") is None
    assert optim.notice("paged_adamw_8bit") == (
        "optimizer 'paged_adamw_8bit' runs as 'adamw': moments are neither quantised nor paged here"
    )
    with pytest.raises(ValueError, match="optimizer is 'adamw_hf'; allowed: adamw, adam, sgd, adafactor, lion, ada"):
        optim.build("adamw_hf", schedule=RATE, **HYPER)
