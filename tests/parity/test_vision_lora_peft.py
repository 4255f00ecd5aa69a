"""Adapters of models that see, against peft: the same modules chosen, folders through both, the same ten steps."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

from launch.export import Described, write_model
from models.adapter import load_adapter, read_settings, save_adapter
from models.decoder import Compute, head, hidden_states
from models.families import decoder_config
from models.lora import Lora, Parts, merged
from models.selection import names_of, target_modules
from models.vision import computed
from models.weights import load_params
from tests.models.test_vision import theirs
from tests.parity.test_lora_peft import one_device
from tests.vision_families import FAMILIES, LENGTH, VOCABULARY, Family, images_of, rows
from trainers import optim
from trainers.losses import Sum
from trainers.step import build_step

STEPS, RATE, DECAY, CLIP = 10, 1e-2, 0.1, 1.0
KINDS = ("llava, CLIP", "gemma3", "idefics3", "qwen2_vl", "mllama")  # each with a projector and names of its own
pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own


class Seeing(NamedTuple):
    """A family, a folder with a model of it, and what we read there."""

    family: Family
    folder: Path
    hf_config: dict[str, Any]
    config: Any

    def loaded(self) -> Any:
        """The model of transformers, anew."""
        return type(self.family.make()).from_pretrained(self.folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str], Seeing]:
    folder = tmp_path_factory.mktemp("models")

    def made(kind: str) -> Seeing:
        if not (folder / kind).exists():
            torch.manual_seed(0)
            FAMILIES[kind].make().save_pretrained(folder / kind)
        hf_config = json.loads((folder / kind / "config.json").read_text())
        return Seeing(FAMILIES[kind], folder / kind, hf_config, decoder_config(hf_config))

    return made


TARGETS: dict[str, Any] = {
    "all linear layers": "all-linear",
    "a name that both have": ["q_proj", "fc2"],
    "a name of the text's": ["down_proj"],
    "a pattern": r".*(vision|visual).*(k_proj|out_proj|attn\.proj)",
}

OWN = {"qwen2_5_vl": ["gate_proj", "attn.proj"], "qwen3_vl": ["q_proj", "linear_fc2"]}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["llava, SigLIP", "paligemma", "qwen2_5_vl", "qwen3_vl", *KINDS])
def test_the_modules_are_those_that_peft_chooses(kind, target, models):
    model, asked = models(kind), TARGETS[target]
    names, pattern = names_of(model.config, model.hf_config), target == "a pattern"
    if target == "a name that both have":
        asked = OWN.get(kind, asked)
    found = target_modules(names, [asked] if pattern else asked, patterns=pattern)
    chosen = get_peft_model(model.loaded(), LoraConfig(target_modules=asked))
    assert {module for path in found for module in names.modules[path]} == set(chosen.targeted_module_names)


def test_a_name_that_a_convolution_has_too_is_refused_unless_it_is_left_out(models):
    model = models("qwen2_vl")
    names, without = names_of(model.config, model.hf_config), [r".*patch_embed\.proj"]
    with pytest.raises(ValueError, match=r"an adapter on model\.visual\.patch_embed\.proj, which is no linear layer"):
        target_modules(names, ["proj"])
    found = target_modules(names, ["proj"], exclude=without)
    chosen = get_peft_model(model.loaded(), LoraConfig(target_modules=["proj"], exclude_modules=without[0]))
    assert {module for path in found for module in names.modules[path]} == set(chosen.targeted_module_names)


def prepared(model: Seeing, folder: Path, **settings: Any) -> Lora:
    """An adapter as peft makes it, but with B drawn at random, so that it changes something; its settings as read."""
    torch.manual_seed(1)
    get_peft_model(model.loaded(), LoraConfig(task_type="CAUSAL_LM", **settings)).save_pretrained(folder)
    random = np.random.default_rng(0)
    tensors = {
        name: random.normal(scale=0.1, size=value.shape).astype(np.float32) if "lora_B" in name else value
        for name, value in load_file(folder / "adapter_model.safetensors").items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return read_settings(folder, model.config, model.hf_config)


def parameters(model: Seeing, adapter: Path, lora: Lora) -> Parts:
    mesh = one_device()
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    own = load_params(model.folder, model.config, shardings=place, dtype=jnp.float32)
    return Parts(load_adapter(adapter, lora, model.config, model.hf_config, mesh=mesh, dtype=jnp.float32), own)


def logits(params: Any, model: Seeing, given: dict[str, np.ndarray], lora: Lora | None) -> jax.Array:
    hidden = hidden_states(
        params,
        model.config,
        tokens_BL=jnp.asarray(given["tokens"]),
        positions_BL=jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32)[None, :], given["tokens"].shape),
        segments_BL=jnp.asarray(given["segments"]),
        compute=Compute(lora=lora),
        images=images_of(model.family, given),
    )
    return head(params, model.config).logits(hidden)


def saved(model: Seeing, folder: Path, trained: Any, lora: Lora, **kwargs: Any) -> dict[str, np.ndarray]:
    save_adapter(folder, trained, lora, model.config, hf_config=model.hf_config, base=str(model.folder), **kwargs)
    return load_file(folder / "adapter_model.safetensors")


SETTINGS = {
    "all linear layers": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "magnitudes apart, of queries and the tower's MLP": {"r": 4, "use_dora": True, "target_modules": ["q_proj", "fc1"]},
    "the text's own queries": {"r": 4, "target_modules": r"model\.language_model.*\.q_proj"},
    "the projector whole": {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["multi_modal_projector"]},
}
CASES = [(kind, "all linear layers") for kind in (*KINDS, "qwen3_vl")] + [
    ("llava, CLIP", name) for name in list(SETTINGS)[1:]
]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_an_adapter_goes_through_both_programs_and_computes_the_same(kind, name, models, tmp_path):
    model = models(kind)
    lora = prepared(model, tmp_path / "peft", **SETTINGS[name])
    parts, given = parameters(model, tmp_path / "peft", lora), rows(model.family, pictures=True)
    fields = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    saved(model, tmp_path / "again", parts.trained, lora, fields=fields)
    there, again = (tmp_path / folder / "adapter_model.safetensors" for folder in ("peft", "again"))
    assert again.read_bytes() == there.read_bytes()

    ours = saved(model, tmp_path / "ours", parts.trained, lora)
    loaded = PeftModel.from_pretrained(model.loaded(), tmp_path / "ours").eval()
    loaded.save_pretrained(tmp_path / "theirs")
    returned = load_file(tmp_path / "theirs/adapter_model.safetensors")
    assert {key: value.tobytes() for key, value in ours.items()} == {k: v.tobytes() for k, v in returned.items()}
    for parameter in loaded.parameters():
        parameter.requires_grad_()
    nothing = np.zeros((3, LENGTH, VOCABULARY), np.float32)
    expected = theirs(model.family, loaded, given, nothing, pictures=True)
    found, has = np.asarray(jax.jit(lambda: logits(merged(*parts), model, given, lora))()), given["segments"] > 0
    np.testing.assert_allclose(found[has], expected[has], atol=1e-4 * np.abs(expected).max())

    about = Described(model.config, model.hf_config, np.dtype(np.float32), lora, str(model.folder), None, None)
    write_model(tmp_path / "whole", parts, about)
    whole = type(model.loaded()).from_pretrained(tmp_path / "whole", dtype=torch.float32).eval()
    in_one = theirs(model.family, whole, given, nothing, pictures=True)
    np.testing.assert_allclose(in_one[has], expected[has], atol=1e-4 * np.abs(expected).max())
    plain = theirs(model.family, model.loaded(), given, nothing, pictures=True)
    assert np.abs(plain[has] - expected[has]).max() > 1e-2 * np.abs(expected).max()


def test_an_adapter_of_older_versions_is_read(models, tmp_path):
    model = models("llava, CLIP")
    lora = prepared(model, tmp_path, target_modules="all-linear")
    expected = parameters(model, tmp_path, lora)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    older = {
        name.replace("model.model.language_model.", "model.language_model.model.")
        .replace("model.model.vision_tower.", "model.vision_tower.vision_model.")
        .replace("model.model.multi_modal_projector.", "model.multi_modal_projector."): value
        for name, value in tensors.items()
    }
    assert not older.keys() & tensors.keys()
    save_file(older, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    assert read_settings(tmp_path, model.config, model.hf_config) == lora
    jax.tree.map(np.testing.assert_array_equal, parameters(model, tmp_path, lora), expected)


def drawn(step: int) -> np.ndarray:
    """What the logits of a step are multiplied with."""
    return np.random.default_rng(step).normal(scale=0.02, size=(3, LENGTH, VOCABULARY)).astype(np.float32)


def steps_of_peft(model: Seeing, adapter: Path) -> tuple[list[float], dict[str, np.ndarray]]:
    peft = PeftModel.from_pretrained(model.loaded(), adapter, is_trainable=True)
    trained = {name: value for name, value in peft.named_parameters() if value.requires_grad}
    optimizer, found = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=DECAY), []
    given = rows(model.family, pictures=True)
    for step in range(STEPS):
        logits = theirs(model.family, peft, given, drawn(step) * given["segments"][:, :, None], pictures=True)
        torch.nn.utils.clip_grad_norm_(list(trained.values()), CLIP)
        optimizer.step()
        found.append(float((logits * drawn(step) * given["segments"][:, :, None]).sum()))
    return found, {name.replace(".default", ""): value.detach().numpy() for name, value in trained.items()}


def steps_of_ours(model: Seeing, adapter: Path, folder: Path) -> tuple[list[float], dict[str, np.ndarray]]:
    lora = read_settings(adapter, model.config, model.hf_config)
    parts, given = parameters(model, adapter, lora), rows(model.family, pictures=True)
    optimizer = optim.build(
        "adamw",
        schedule=lambda step: RATE,
        weight_decay=DECAY,
        betas=(0.9, 0.999),
        eps=1e-8,
        momentum=0.0,
        computed=functools.partial(computed, model.config.vision),
    )

    def loss(trained: Any, frozen: Any, batch: Any, key: Any = None) -> Any:
        total = (logits(merged(trained, frozen), model, given, lora) * batch["drawn"]).sum()
        return Sum(total, jnp.ones(())), {}

    step = build_step(loss, optimizer, parts.trained, mesh=one_device(), max_grad_norm=CLIP, frozen=parts.frozen)
    state, found = step.init(parts.trained), []
    for number in range(STEPS):
        weights = drawn(number) * given["segments"][:, :, None]
        state, metrics = step.train(state, parts.frozen, {"tokens": given["tokens"][None], "drawn": weights[None]})
        found.append(float(metrics["loss"]))
    return found, saved(model, folder, state.params, lora)


def test_ten_steps_are_those_of_peft_and_layers_that_no_feature_comes_from_stay(models, tmp_path):
    model = models("llava, CLIP")
    prepared(model, tmp_path / "adapter", r=4, lora_alpha=8, target_modules="all-linear")
    expected, their_weights = steps_of_peft(model, tmp_path / "adapter")
    found, our_weights = steps_of_ours(model, tmp_path / "adapter", tmp_path / "trained")
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    before = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert our_weights.keys() == their_weights.keys() == before.keys()
    for name, value in their_weights.items():
        assert np.array_equal(value, before[name]) == ("tower.encoder.layers.2." in name), name
        if "tower.encoder.layers.2." in name:
            np.testing.assert_array_equal(our_weights[name], before[name])
        elif "k_proj.lora_B" not in name:
            np.testing.assert_allclose(our_weights[name], value, atol=1e-3, err_msg=name)
