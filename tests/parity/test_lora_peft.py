"""Adapters against peft: the same ten steps from the same beginning, folders through both, the same modules chosen."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Phi3Config, PhiConfig, Qwen2MoeConfig, set_seed

from launch.export import Described, write_model
from models.adapter import load_adapter, read_settings, save_adapter
from models.decoder import Compute, DecoderConfig, head, hidden_states
from models.families import decoder_config
from models.lora import Lora, Parts, merged, split
from models.selection import names_of, target_modules
from models.sharding import make_mesh
from models.weights import load_params
from trainers import optim
from trainers.loop import device_batch
from trainers.sft import sft_loss
from trainers.step import build_step

STEPS, ROWS, LENGTH, VOCABULARY = 10, 4, 16, 64
RATE, DECAY, CLIP = 1e-2, 0.1, 1.0
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False, attention_bias=True),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
    "phi": PhiConfig(**SIZES | {"num_key_value_heads": 4}),
    "phi3": Phi3Config(**SIZES),
    "qwen2_moe": Qwen2MoeConfig(
        **SIZES,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
    ),
}


class Both(NamedTuple):
    """A model's folder, an adapter of it that peft wrote, and both as we read them."""

    model: Path
    adapter: Path
    hf_config: dict[str, Any]
    config: DecoderConfig
    lora: Lora


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with a random model of each kind, in float32."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        set_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / name)
    return folder


def torch_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def prepared(models: Path, kind: str, folder: Path, **settings: Any) -> Both:
    """An adapter as peft makes it, but with B drawn at random, so that it changes something."""
    set_seed(1)
    theirs = get_peft_model(torch_model(models / kind), LoraConfig(task_type="CAUSAL_LM", **settings))
    theirs.save_pretrained(folder)
    random = np.random.default_rng(0)
    tensors = {
        name: random.normal(scale=0.1, size=value.shape).astype(np.float32) if "lora_B" in name else value
        for name, value in load_file(folder / "adapter_model.safetensors").items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return read(models / kind, folder)


def read(model: Path, adapter: Path) -> Both:
    hf_config = json.loads((model / "config.json").read_text())
    config = decoder_config(hf_config)
    return Both(model, adapter, hf_config, config, read_settings(adapter, config, hf_config))


def one_device() -> jax.sharding.Mesh:
    return make_mesh({}, devices=jax.devices()[:1])


def parameters(both: Both) -> tuple[Any, Any]:
    """The adapter's parameters and the model's."""
    mesh = one_device()
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    own = load_params(both.model, both.config, shardings=place, dtype=jnp.float32)
    return load_adapter(both.adapter, both.lora, both.config, both.hf_config, mesh=mesh, dtype=jnp.float32), own


def batch(step: int) -> dict[str, np.ndarray]:
    """Rows of full length with uneven masks, [1, B, L]."""
    random = np.random.default_rng(step)
    tokens = random.integers(3, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
    weights = (random.random((ROWS, LENGTH)) < random.choice([0.3, 0.9])).astype(np.float32)
    weights[:, -1] = 0
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    arrays = {
        "tokens": tokens,
        "targets": np.concatenate([tokens[:, 1:], np.zeros((ROWS, 1), np.int32)], axis=1),
        "weights": weights,
        "segments": np.ones_like(tokens),
        "positions": positions,
    }
    return {name: np.ascontiguousarray(value)[None] for name, value in arrays.items()}


def losses_of_peft(both: Both) -> tuple[list[float], dict[str, np.ndarray]]:
    theirs = PeftModel.from_pretrained(torch_model(both.model), both.adapter, is_trainable=True)
    trained = [value for value in theirs.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)
    found = []
    for step in range(STEPS):
        arrays = {name: torch.from_numpy(value[0]).long() for name, value in batch(step).items() if name != "weights"}
        weights = torch.from_numpy(batch(step)["weights"][0])
        logits = theirs(input_ids=arrays["tokens"]).logits
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), arrays["targets"], reduction="none")
        loss = (each * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        found.append(loss.item())
    return found, {name: value.detach().numpy() for name, value in theirs.named_parameters() if value.requires_grad}


def losses_of_ours(both: Both, folder: Path) -> tuple[list[float], dict[str, np.ndarray]]:
    mesh = one_device()
    trained, own = parameters(both)
    frozen = split(own, both.lora.whole).frozen
    optimizer = optim.build(
        "adamw", schedule=lambda step: RATE, weight_decay=DECAY, betas=(0.9, 0.999), eps=1e-8, momentum=0.0
    )
    loss = sft_loss(both.config, compute=Compute(lora=both.lora))
    step = build_step(loss, optimizer, trained, mesh=mesh, max_grad_norm=CLIP, frozen=frozen)
    state, found = step.init(trained), []
    for number in range(STEPS):
        state, metrics = step.train(state, frozen, device_batch(batch(number), mesh))
        found.append(float(metrics["loss"]))
    save_adapter(folder, state.params, both.lora, both.config, hf_config=both.hf_config, base=str(both.model))
    return found, load_file(folder / "adapter_model.safetensors")


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "queries and values": ("llama", {"r": 4, "lora_alpha": 8}),
    "all linear layers, scaled by the root of the rank": (
        "llama",
        {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear"},
    ),
    "magnitudes apart": ("llama", {"r": 4, "use_dora": True, "target_modules": ["q_proj", "o_proj", "down_proj"]}),
    "embedding and head trained whole": (
        "llama",
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "kernels stored the other way round": ("gpt2", {"r": 4, "target_modules": ["c_attn", "mlp.c_proj"]}),
    "fused matrices": ("phi3", {"r": 4, "target_modules": "all-linear"}),
}


@pytest.mark.filterwarnings("ignore")  # peft's own
@pytest.mark.parametrize("name", CASES)
def test_ten_steps_are_those_of_peft(name, models, tmp_path):
    kind, settings = CASES[name]
    both = prepared(models, kind, tmp_path / "adapter", **settings)
    theirs, their_weights = losses_of_peft(both)
    ours, our_weights = losses_of_ours(both, tmp_path / "trained")
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert ours[0] != ours[-1]
    renamed = {name.replace(".default", "").replace(".modules_to_save", ""): w for name, w in their_weights.items()}
    renamed = {name.replace("magnitude_vector.weight", "magnitude_vector"): w for name, w in renamed.items()}
    assert our_weights.keys() == renamed.keys()
    for key, value in renamed.items():
        np.testing.assert_allclose(our_weights[key], value, atol=2e-4, err_msg=key)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_an_adapter_of_peft_comes_back_byte_for_byte(name, models, tmp_path):
    kind, settings = CASES[name]
    both = prepared(models, kind, tmp_path / "adapter", **settings)
    trained, _ = parameters(both)
    fields = json.loads((both.adapter / "adapter_config.json").read_text())
    save_adapter(
        tmp_path / "again",
        trained,
        both.lora,
        both.config,
        hf_config=both.hf_config,
        base=str(both.model),
        fields=fields,
    )
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (both.adapter / file).read_bytes()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_an_adapter_of_ours_comes_back_from_peft_and_computes_the_same_there(name, models, tmp_path):
    kind, settings = CASES[name]
    both = prepared(models, kind, tmp_path / "adapter", **settings)
    trained, own = parameters(both)
    save_adapter(tmp_path / "ours", trained, both.lora, both.config, hf_config=both.hf_config, base=str(both.model))
    theirs = PeftModel.from_pretrained(torch_model(both.model), tmp_path / "ours").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, again = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "theirs"))
    assert {key: value.tobytes() for key, value in ours.items()} == {k: v.tobytes() for k, v in again.items()}
    assert read(both.model, tmp_path / "theirs").lora == both.lora

    tokens = batch(0)["tokens"][0]
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(tokens).long()).logits.numpy()
        in_one = theirs.merge_and_unload()(input_ids=torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(logits(merged(trained, own), both, tokens), expected, atol=1e-4)
    about = Described(
        both.config, both.hf_config, np.dtype(np.float32), both.lora, str(both.model), None, generation_config=None
    )
    write_model(tmp_path / "whole", Parts(trained, own), about)
    with torch.no_grad():
        exported = torch_model(tmp_path / "whole")(input_ids=torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(exported, in_one, atol=1e-4)


def logits(params: Any, both: Both, tokens_BL: np.ndarray) -> np.ndarray:
    positions_BL = np.broadcast_to(np.arange(tokens_BL.shape[1], dtype=np.int32), tokens_BL.shape)
    hidden_BLD = hidden_states(
        params,
        both.config,
        tokens_BL=tokens_BL,
        positions_BL=positions_BL,
        segments_BL=np.ones_like(tokens_BL),
        compute=Compute(lora=both.lora),
    )
    return np.asarray(head(params, both.config).logits(hidden_BLD))


WITHOUT_CHOICE = ("phi3", "qwen2_moe")  # of peft's own: targets must be named


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "targets"),
    [(kind, "all-linear") for kind in MODELS] + [(kind, None) for kind in MODELS if kind not in WITHOUT_CHOICE],
)
def test_the_modules_are_those_that_peft_chooses(kind, targets, models):
    hf_config = json.loads((models / kind / "config.json").read_text())
    names = names_of(decoder_config(hf_config), hf_config)
    ours = {module for path in target_modules(names, targets) for module in names.modules[path]}
    theirs = get_peft_model(torch_model(models / kind), LoraConfig(task_type="CAUSAL_LM", target_modules=targets))
    assert ours == set(theirs.targeted_module_names)
