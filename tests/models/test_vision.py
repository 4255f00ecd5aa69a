"""Every vision-language family computes what transformers does: logits and gradients of rows with several pictures, one
and none, and byte for byte through a folder. The families are those of tests/vision_families.py.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from models.decoder import Compute, abstract_params, head, hidden_states
from models.families import AsStored, decoder_config, table_of
from models.generate import complete
from models.selection import frozen_leaves, names_of
from models.sharding import make_mesh, parameter_shardings, paths
from models.shards import find_place
from models.vision import Shown, computed
from models.weights import load_params, save_folder
from tests.vision_families import (
    FAMILIES,
    IMAGE,
    LENGTH,
    NEW,
    PICTURES,
    VOCABULARY,
    Family,
    images_of,
    rows,
    seen,
    tiled_kwargs,
    types_of,
)

# SmolVLM is Idefics3 by another name, Qwen2-VL is Qwen2.5-VL without windows, and the tests are many.
SLOW = ("smolvlm", "qwen2_vl", "llava, SigLIP", "llava, CLIP, all outputs of two layers")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in FAMILIES],
)
def family(request, tmp_path_factory) -> tuple[Family, Path, Any]:
    """A family, a folder that transformers saved, and its model."""
    torch.manual_seed(0)
    chosen = FAMILIES[request.param]
    model = chosen.make().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases too, and norms that are not the identity
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("vision") / "model"
    model.save_pretrained(folder)
    return chosen, folder, model


def ours(family: Family, folder: Path, given: dict[str, np.ndarray], weights: np.ndarray, *, pictures: bool) -> Any:
    """Our logits, and the gradients of a weighted sum of them under their Hugging Face names."""
    hf_config = json.loads((folder / "config.json").read_text())
    config = decoder_config(hf_config)
    shardings = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = load_params(folder, config, shardings=shardings, dtype=jnp.float32)

    def total(params: Any) -> Any:
        hidden = hidden_states(
            params,
            config,
            tokens_BL=jnp.asarray(given["tokens"]),
            positions_BL=jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32)[None, :], given["tokens"].shape),
            segments_BL=jnp.asarray(given["segments"]),
            compute=Compute(),
            images=images_of(family, given) if pictures else None,
        )
        logits = head(params, config).logits(hidden)
        return (logits * weights).sum(), logits

    gradients, logits = jax.jit(jax.grad(total, has_aux=True))(params)
    return np.asarray(logits), paths(gradients), table_of(hf_config).names


def theirs(family: Family, model: Any, given: dict[str, np.ndarray], weights: np.ndarray, *, pictures: bool) -> Any:
    model.zero_grad()
    if family.ratios:  # row by row: rows of one batch see what pads the pictures of another
        found = np.zeros_like(weights)
        for row, length in enumerate(given["segments"].sum(axis=1)):
            kwargs = tiled_kwargs(family, given, row) if pictures and PICTURES[row] else {}
            logits = model(input_ids=torch.tensor(given["tokens"][row : row + 1, :length]).long(), **kwargs).logits
            (logits * torch.tensor(weights[row : row + 1, :length])).sum().backward()
            found[row, :length] = logits[0].detach().numpy()
        return found
    shown = seen(family, given) if pictures else {}
    if family.grids and pictures:
        shown["mm_token_type_ids"] = torch.tensor(given["tokens"] == IMAGE).long()
    if "groups" in given and (pictures or family.groups == "pictures"):
        shown["token_type_ids"] = types_of(family, given["groups"])
    logits = model(
        input_ids=torch.tensor(given["tokens"]).long(), attention_mask=torch.tensor(given["segments"]).long(), **shown
    ).logits
    (logits * torch.tensor(weights)).sum().backward()
    return logits.detach().numpy()


@pytest.mark.parametrize(
    "pictures", [pytest.param(True, id="pictures"), pytest.param(False, id="text only", marks=pytest.mark.slow)]
)
def test_logits_and_gradients_are_those_of_transformers(family, pictures, tmp_path):
    chosen, folder, model = family
    given = rows(chosen, pictures=pictures)
    weights = np.random.default_rng(2).normal(size=(3, LENGTH, VOCABULARY)).astype(np.float32)
    weights *= given["segments"][:, :, None]
    found, gradients, names = ours(chosen, folder, given, weights, pictures=pictures)
    expected = theirs(chosen, model, given, weights, pictures=pictures)
    has = given["segments"] > 0
    np.testing.assert_allclose(found[has], expected[has], rtol=1e-4, atol=1e-4 * np.abs(expected[has]).max())
    save_gradients(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    largest = max(np.abs(gradient).max() for gradient in stored.values())
    for path, gradient in gradients.items():
        place = find_place(path, gradient.shape, names[path])
        for name, one in zip(
            place.names, np.asarray(gradient) if place.spread else [np.asarray(gradient)], strict=True
        ):
            own = one.T if path.endswith("/kernel") and not isinstance(names[path], AsStored) else one
            close = 1e-4 * max(np.abs(stored[name]).max(), 1e-3 * largest)  # some are zero but for rounding
            np.testing.assert_allclose(own, stored[name], rtol=1e-4, atol=close, err_msg=name)


def test_names_are_those_of_the_loaded_model_and_what_leads_to_no_feature_has_no_gradient(family):
    chosen, folder, model = family
    weights = np.random.default_rng(2).normal(size=(3, LENGTH, VOCABULARY)).astype(np.float32)
    theirs(chosen, model, rows(chosen, pictures=True), weights, pictures=True)
    hf_config = json.loads((folder / "config.json").read_text())
    config = decoder_config(hf_config)
    tensors = names_of(config, hf_config).tensors
    assert {name for each in tensors.values() for name in each} == {name for name, _ in model.named_parameters()}
    idle = {path: computed(config.vision, path) for path in tensors}
    found = {name for path, layers in idle.items() if layers is not None for name in tensors[path][layers:]}
    assert found == {name for name, parameter in model.named_parameters() if parameter.grad is None}


def save_gradients(model: Any, folder: Path) -> None:
    """A folder with gradients in the places of weights: transformers itself says what each is called."""
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        model.save_pretrained(folder)
        for parameter, old in zip(model.parameters(), kept, strict=True):
            parameter.copy_(old)


def test_a_folder_is_written_byte_for_byte_and_loads_strictly(family, tmp_path):
    _, folder, model = family
    hf_config = json.loads((folder / "config.json").read_text())
    config = decoder_config(hf_config)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    shardings = parameter_shardings(abstract_params(config, dtype=jnp.float32), mesh)
    params = load_params(folder, config, shardings=shardings, dtype=jnp.float32)
    save_folder(tmp_path / "out", params, config, hf_config=hf_config, dtype=jnp.float32)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    loaded, report = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


RENAMED = [
    name for name in FAMILIES if name not in ("idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
]  # whose names are what they were


@pytest.mark.parametrize("family", RENAMED, indirect=True)
def test_older_names_of_tensors_are_understood(family, tmp_path):
    _, folder, _ = family
    config = decoder_config(json.loads((folder / "config.json").read_text()))
    stored = load_file(folder / "model.safetensors")
    older, newer = {}, {}
    for name, tensor in stored.items():
        inner = name.removeprefix("language_model.")
        text = inner.replace("model.", "model.language_model.", 1)
        newer[text if name.startswith("language_model.") else f"model.{name}"] = tensor
        plain = name.replace("vision_tower.vision_model.", "vision_tower.")
        older[plain if plain != name else name.replace("vision_tower.", "vision_tower.vision_model.")] = tensor
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    expected = load_params(folder, config, shardings=one, dtype=jnp.float32)
    for names in (older, newer):
        save_file(names, tmp_path / "model.safetensors")
        found = load_params(tmp_path, config, shardings=one, dtype=jnp.float32)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_answers_to_prompts_with_pictures_are_those_of_transformers(family):
    chosen, folder, model = family
    given = rows(chosen, pictures=True)
    config = decoder_config(json.loads((folder / "config.json").read_text()))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = load_params(folder, config, shardings=one, dtype=jnp.float32)
    if chosen.groups == "prefix":
        given["groups"] = given["segments"]  # all of a prompt is
    lengths, images = given["segments"].sum(axis=1), images_of(chosen, given)
    prompts = [given["tokens"][row, :length].tolist() for row, length in enumerate(lengths)]
    shown = [
        Shown(
            *(np.asarray(array)[row, : (np.asarray(images.segments)[row] > 0).sum()] for array in images[:3]),
            *(given[key][row, :length] if key in given else None for key in ("features", "groups", "axes")),
            *(None if x is None else np.asarray(x)[row] for x in (images.tiles,)),
            *(given[key][row, :length] if key in given else None for key in ("looks",)),
        )
        if PICTURES[row]
        else None
        for row, length in enumerate(lengths)
    ]
    # Each prompt twice, on fewer slots than there are requests: prompts are prefilled once, with their pictures.
    found = complete(
        params, config, prompts * 2, max_new_tokens=NEW, stop_ids=(), shown=shown * 2, slots=4, compute=Compute()
    )
    model.generation_config.eos_token_id = None
    for row, prompt in enumerate(prompts):
        kwargs = seen(chosen, given, row) if PICTURES[row] else {}
        if chosen.groups and (PICTURES[row] or chosen.groups == "pictures"):
            kwargs["token_type_ids"] = types_of(chosen, given["groups"][row : row + 1, : len(prompt)])
        if chosen.grids and PICTURES[row]:
            kwargs["mm_token_type_ids"] = torch.tensor([[token == IMAGE for token in prompt]]).long()
        expected = model.generate(torch.tensor([prompt]), **kwargs, max_new_tokens=NEW, do_sample=False)[
            0, len(prompt) :
        ]
        assert found[row].ids == found[row + len(prompts)].ids == expected.tolist()


@pytest.mark.parametrize(
    ("family", "name", "parts"),
    [
        ("qwen2_5_vl", "visual", {"vision", "projector"}),
        ("mllama", "vision_model", {"vision"}),
        ("idefics3", "vision_model", {"vision"}),
        ("llava, CLIP", "multi_modal_projector", {"projector"}),
    ],
    indirect=["family"],
)
def test_parts_are_frozen_by_their_names_of_older_versions(family, name, parts):
    hf_config = json.loads((family[1] / "config.json").read_text())
    names = names_of(decoder_config(hf_config), hf_config)
    expected = {path for path in names.tensors if path.split("/")[0] in parts}
    assert frozen_leaves(names, [name]) == expected
