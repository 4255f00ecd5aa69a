"""Adapters and frozen layers: what is trained, what is computed, which modules a name means, which folders are refused.

That they compute and train as peft does is held in tests/parity/test_lora_peft.py.
"""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.adapter import CONFIG, TENSORS, base_of, find_adapter, load_adapter, read_settings, save_adapter
from models.decoder import Compute, abstract_params, head, hidden_states, init_params
from models.families import decoder_config
from models.lora import Lora, Parts, dropped, fused, init_adapter, merged, split
from models.selection import frozen_leaves, names_of, short_names, target_modules, whole_leaves
from models.sharding import make_mesh, paths
from trainers import optim
from trainers.loop import device_batch
from trainers.sft import sft_loss
from trainers.step import Step, TrainState, build_step

HF = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
MODEL = decoder_config(HF)
NAMES = names_of(MODEL, HF)
ROWS, LENGTH = 8, 20
Q, V = "layers/attention/q", "layers/attention/v"
LORA = Lora(rank=2, alpha=4, init="random", modules=(Q, V))


def own_params() -> Any:
    return init_params(jax.random.key(0), MODEL, dtype=jnp.float32)


def adapted(lora: Lora) -> Parts:
    own = own_params()
    parts = split(own, lora.whole)
    return Parts(merged(init_adapter(jax.random.key(1), own, lora), parts.trained), parts.frozen)


def batch(accumulation: int = 1) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    tokens = random.integers(1, 96, (ROWS, LENGTH)).astype(np.int32)
    arrays = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "weights": np.ones((ROWS, LENGTH), np.float32),
        "segments": np.ones_like(tokens),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
    }
    return {name: value.reshape(accumulation, -1, LENGTH) for name, value in arrays.items()}


def built(parts: Parts, lora: Lora | None, mesh: jax.sharding.Mesh, *, seed: int | None = None) -> Step:
    optimizer = optim.build(
        "adamw", schedule=lambda step: 1e-2, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8, momentum=0.0
    )
    loss = sft_loss(MODEL, compute=Compute(lora=lora))
    return build_step(loss, optimizer, parts.trained, mesh=mesh, max_grad_norm=1.0, frozen=parts.frozen, seed=seed)


def trained(
    parts: Parts,
    lora: Lora | None,
    *,
    sizes: dict[str, int] | None = None,
    accumulation: int = 1,
    seed: int | None = None,
) -> tuple[TrainState, list[float]]:
    """The state and losses of three steps."""
    count = int(np.prod(list((sizes or {}).values())))
    mesh = make_mesh(sizes or {}, devices=jax.devices()[:count])
    step = built(parts, lora, mesh, seed=seed)
    begun = jax.tree.map(jnp.copy, parts.trained)  # `init` donates them
    state = step.init(jax.device_put(begun, step.shardings.params))
    losses = []
    for _ in range(3):
        state, metrics = step.train(state, parts.frozen, device_batch(batch(accumulation), mesh))
        losses.append(float(metrics["loss"]))
    return state, losses


def logits(params: Any, lora: Lora | None) -> np.ndarray:
    given = {f"{name}_BL": value[0] for name, value in batch().items() if name in ("tokens", "positions", "segments")}
    hidden_BLD = hidden_states(params, MODEL, **given, compute=Compute(lora=lora))
    return np.asarray(head(params, MODEL).logits(hidden_BLD))


def test_only_the_adapter_has_optimizer_state_and_changes():
    parts = adapted(LORA)
    before = jax.device_get(parts.frozen)
    state, losses = trained(parts, LORA)
    leaves = {f"{module}/{name}" for module in (Q, V) for name in ("lora_a", "lora_b")}
    assert set(paths(state.params)) == leaves
    assert {slot: set(paths(tree)) for slot, tree in state.opt_state.items()} == {"m": leaves, "v": leaves}
    assert losses[2] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(parts.frozen))


def products(parts: Parts, lora: Lora | None) -> set[tuple[int, ...]]:
    """The shapes of all results of matrix products in the compiled step, smaller dimension first."""
    mesh = make_mesh({}, devices=jax.devices()[:1])
    step = built(parts, lora, mesh)
    state = jax.eval_shape(step.init, parts.trained)
    text = step.train_leaves.lower(jax.tree.leaves(state), parts.frozen, batch()).compile().as_text()  # type: ignore[attr-defined]
    shapes = re.findall(r"= f32\[([\d,]+)\]\{[\d,]*\} dot\(", text)
    return {tuple(sorted(map(int, shape.split(",")))) for shape in shapes}


def test_no_gradient_of_a_frozen_matrix_is_computed():
    kernels = {tuple(sorted(leaf.shape[-2:])) for path, leaf in paths(own_params()).items() if path.endswith("kernel")}
    assert kernels == {(32, 40), (16, 40), (40, 56), (40, 96)}
    everything = products(Parts(own_params(), None), None)
    assert kernels <= everything
    of_adapter = products(adapted(LORA), LORA)
    assert not kernels & of_adapter
    assert {(2, 40), (2, 32), (2, 16)} <= of_adapter
    of_half = products(split(own_params(), {"head/kernel", "layers/mlp/up/kernel"}), None)
    assert kernels & of_half == {(40, 96), (40, 56)}


def test_what_trains_beside_frozen_layers_trains_as_it_would_have():
    everything, losses = trained(Parts(own_params(), None), None)
    frozen = frozen_leaves(NAMES, ["model.embed_tokens", r"model\.layers\.\d+\.mlp"])
    parts = split(own_params(), set(paths(own_params())) - frozen)
    state, others = trained(parts, None)
    assert others[0] == pytest.approx(losses[0], rel=1e-6)
    assert set(paths(state.params)).isdisjoint(frozen)
    assert set(paths(state.params)) | frozen == set(paths(everything.params))


def test_the_scale_is_alpha_over_the_rank_or_its_root():
    assert Lora(rank=4, alpha=8).scale == 2
    assert Lora(rank=4, alpha=8, rslora=True).scale == 4


def test_a_new_adapter_changes_nothing_unless_it_is_random():
    own = own_params()
    for settings in ({"init": "kaiming"}, {"init": "gaussian"}, {"dora": True}):
        lora = Lora(rank=2, alpha=4, modules=(Q, V), **settings)
        np.testing.assert_allclose(logits(merged(*adapted(lora)), lora), logits(own, None), atol=1e-6)
    assert np.abs(logits(merged(*adapted(LORA)), LORA) - logits(own, None)).max() > 1e-3


def test_a_begins_as_peft_draws_it():
    wide = Lora(rank=64, alpha=1, modules=(Q,), init="kaiming")
    a = paths(adapted(wide).trained)[f"{Q}/lora_a"]
    assert a.shape == (2, 40, 64)
    assert 0.95 < float(jnp.abs(a).max()) * np.sqrt(40) <= 1
    normal = paths(adapted(Lora(rank=64, alpha=1, modules=(Q,), init="gaussian")).trained)[f"{Q}/lora_a"]
    assert float(normal.std()) == pytest.approx(1 / 64, rel=0.05)


@pytest.mark.parametrize("dora", [False, True])
def test_merged_into_the_kernels_it_computes_the_same(dora):
    lora = Lora(rank=2, alpha=4, rslora=True, dora=dora, init="random", modules=tuple(NAMES.modules))
    params = merged(*adapted(lora))
    in_one = fused(params, lora)
    assert set(paths(in_one)) == set(paths(own_params()))
    np.testing.assert_allclose(logits(in_one, None), logits(params, lora), atol=1e-5)


def test_dropout_drops_that_share_and_keeps_the_mean():
    x = jnp.ones((400, 100))
    y = np.asarray(dropped(x, jax.random.key_data(jax.random.key(0)), 0.25))
    assert set(np.unique(y)) == {0, np.float32(1 / 0.75)}
    assert (y == 0).mean() == pytest.approx(0.25, abs=0.01)


@pytest.mark.slow
def test_dropout_depends_on_seed_step_and_microbatch_and_not_on_devices():
    lora = Lora(rank=2, alpha=4, dropout=0.5, init="random", modules=(Q, V))
    parts = adapted(lora)
    _, losses = trained(parts, lora, seed=1, accumulation=2)
    assert trained(parts, lora, seed=1, accumulation=2)[1] == losses
    assert trained(parts, lora, seed=2, accumulation=2)[1] != losses
    _, spread = trained(parts, lora, seed=1, accumulation=2, sizes={"fsdp": 2, "tensor": 2})
    np.testing.assert_allclose(spread, losses, rtol=1e-5)


def test_without_dropout_a_seed_changes_no_bit_and_evaluation_never_drops():
    lora, dropping = LORA, Lora(rank=2, alpha=4, dropout=0.5, init="random", modules=(Q, V))
    parts, mesh = adapted(lora), make_mesh({}, devices=jax.devices()[:1])
    assert trained(parts, lora)[1] == trained(parts, lora, seed=3)[1]
    here = device_batch(batch(), mesh)
    losses = [
        built(parts, each, mesh, seed=3).evaluate(parts.trained, parts.frozen, here)["loss"].mean()
        for each in (lora, dropping)
    ]
    assert losses[0] == losses[1]


def test_names_mean_what_they_mean_to_peft():
    assert target_modules(NAMES, None) == (Q, V)
    assert target_modules(NAMES, ["q_proj", "mlp.up_proj"]) == (Q, "layers/mlp/up")
    assert target_modules(NAMES, ["all-linear"], exclude=[r".*\.mlp\..*", ".*[ko]_proj"]) == (Q, V)
    assert target_modules(NAMES, [r".*\.self_attn\.[qv]_proj"], patterns=True) == (Q, V)
    assert short_names(NAMES, (Q, "layers/mlp/up")) == ["q_proj", "up_proj"]
    assert whole_leaves(NAMES, ["lm_head", "embed_tokens"]) == ("embed/embedding", "head/kernel")
    assert frozen_leaves(NAMES, ["lm_head", "model.norm"]) == {"head/kernel", "norm/scale"}
    assert frozen_leaves(NAMES, ["model"]) == set(paths(own_params())) - {"head/kernel"}


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: target_modules(NAMES, ["qproj"]), "'qproj' is no module of this model; nearest: q_proj"),
        (lambda: target_modules(NAMES, ["lm_head"]), "not implemented yet: .* an adapter on lm_head"),
        (lambda: target_modules(NAMES, ["model.layers.0.self_attn.q_proj"]), "selects 1 of the 2 layers of layers/att"),
        (lambda: target_modules(NAMES, ["[q"], patterns=True), "no regular expression"),
        (lambda: target_modules(NAMES, None, exclude=["q_proj"]), "lora_exclude_modules: 'q_proj' matches no module"),
        (lambda: whole_leaves(NAMES, ["lm_haed"]), "'lm_haed' is no module of this model; nearest: lm_head"),
        (lambda: frozen_leaves(NAMES, ["embed_tokens"]), "no part of this model; nearest: model.embed_tokens"),
        (lambda: frozen_leaves(NAMES, ["model.layers.1"]), "not implemented yet: 'model.layers.1' selects 1 of the 2"),
    ],
)
def test_a_name_that_means_nothing_here_is_answered_with_the_nearest(ask, message):
    with pytest.raises(ValueError, match=message):
        ask()


@pytest.fixture
def folder(tmp_path) -> Path:
    """An adapter's folder."""
    save_adapter(tmp_path / "adapter", adapted(LORA).trained, LORA, MODEL, hf_config=HF, base="some/model")
    return tmp_path / "adapter"


def test_a_folder_holds_what_peft_names_so(folder):
    assert find_adapter(str(folder)) == folder
    assert base_of(folder) == "some/model"
    assert {file.name for file in folder.iterdir()} == {CONFIG, TENSORS}
    found = read_settings(folder, MODEL, HF)
    assert found == LORA
    loaded = load_adapter(folder, found, MODEL, HF, mesh=make_mesh({"fsdp": 8}), dtype=jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapted(LORA).trained)


def test_a_folder_with_a_whole_model_is_that_model(folder):
    (folder / "config.json").write_text("{}")
    assert find_adapter(str(folder)) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "not implemented yet: .* peft_type 'IA3'"),
        ({"bias": "all"}, "not implemented yet: .* bias 'all'"),
        ({"init_lora_weights": "pissa"}, "not implemented yet: .* 'pissa', which changes the model's weights"),
        ({"rank_pattern": {"q_proj": 4}}, "not implemented yet: .*rank_pattern"),
        ({"r": 4}, r"lora_A.weight is \[2, 40\], and should be \[4, 40\]"),
        ({"use_dora": True}, "lacks .*lora_magnitude_vector"),
    ],
)
def test_an_adapter_that_computes_something_else_is_refused(fields, message, folder):
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | fields))
    with pytest.raises(ValueError, match=message):
        read_settings(folder, MODEL, HF)


def test_an_adapter_of_another_model_is_refused(folder):
    deeper = HF | {"num_hidden_layers": 3}
    with pytest.raises(ValueError, match="on 2 of the 3 layers of layers/attention/q"):
        read_settings(folder, decoder_config(deeper), deeper)
    shallower = HF | {"num_hidden_layers": 1}
    with pytest.raises(ValueError, match=r"an adapter on base_model.model.model.layers.1.self_attn.q_proj"):
        read_settings(folder, decoder_config(shallower), shallower)


def test_a_pickled_adapter_is_not_read(folder):
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="only safetensors are read"):
        read_settings(folder, MODEL, HF)


def test_abstract_and_real_parts_agree():
    parts = split(abstract_params(MODEL, dtype=jnp.float32), {"head/kernel"})
    assert parts.frozen is not None
    assert set(paths(parts.trained)) == {"head/kernel"}
    assert split(abstract_params(MODEL, dtype=jnp.float32), set(paths(own_params()))).frozen is None
