"""Every vision-language family computes what transformers does: logits and gradients of rows with several pictures, one
and none, and byte for byte through a folder.

A family is a line of FAMILIES: its model, and how its pictures become patches.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from input_pipeline.processors.qwen_vl import axes as qwen_vl_axes
from models.decoder import Compute, abstract_params, head, hidden_states
from models.families import AsStored, decoder_config, table_of
from models.generate import complete
from models.sharding import make_mesh, parameter_shardings, paths
from models.vision import Images, Shown
from models.weights import load_params, save_folder

VOCABULARY, IMAGE, LENGTH, NEW = 96, 90, 24, 64
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
TOWER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "initializer_range": 0.1,
}
PICTURES = (2, 1, 0)  # of each row


class Family(NamedTuple):
    """How a tiny model of a family is made, and how many tokens a picture takes."""

    make: Callable[[], Any]
    features: int
    side: int = 28
    groups: str = ""  # which tokens see one another both ways: of each of the "pictures", or of the "prefix"
    apart: bool = False  # pictures of rows stand on an axis of their own
    grids: tuple[tuple[int, int], ...] = ()  # rows and columns of patches, where pictures have shapes of their own


def llava(text: Any, tower: Any, **kwargs: Any) -> Any:
    config = transformers.LlavaConfig(vision_config=tower, text_config=text, image_token_index=IMAGE, **kwargs)
    return transformers.LlavaForConditionalGeneration(config)


def gemma3() -> Any:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    text = transformers.Gemma3TextConfig(
        **TEXT | {"num_hidden_layers": 3}, head_dim=8, sliding_window=6, layer_types=kinds
    )
    tower = transformers.SiglipVisionConfig(**TOWER | {"image_size": 56}, vision_use_head=False)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=tower, mm_tokens_per_image=4, image_token_index=IMAGE
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def paligemma() -> Any:
    text = transformers.GemmaConfig(**TEXT, head_dim=8)
    tower = transformers.SiglipVisionConfig(**TOWER, vision_use_head=False, projection_dim=32)
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=tower, image_token_index=IMAGE, projection_dim=32, hidden_size=32
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def idefics3(config: Any, model: Any, **kwargs: Any) -> Any:
    tower = TOWER | {"image_size": 56, **kwargs}
    return model(
        config(vision_config=tower, text_config=transformers.LlamaConfig(**TEXT).to_dict(), image_token_id=IMAGE)
    )


def qwen_vl(config: Any, model: Any, **tower: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
    tower = {"depth": 3, "num_heads": 2, "initializer_range": 0.1, **tower}
    text = TEXT | {"rope_parameters": rope}
    return model(config(text_config=text, vision_config=tower, image_token_id=IMAGE))


GRIDS = ((4, 6), (6, 2), (2, 6))
FAMILIES = {
    "llava, CLIP": Family(
        lambda: llava(transformers.LlamaConfig(**TEXT), transformers.CLIPVisionConfig(**TOWER, projection_dim=16)), 4
    ),
    "llava, CLIP, all outputs of two layers": Family(
        lambda: llava(
            transformers.Qwen2Config(**TEXT, tie_word_embeddings=True),
            transformers.CLIPVisionConfig(**TOWER, projection_dim=16),
            vision_feature_layer=[1, -1],
            vision_feature_select_strategy="full",
        ),
        5,
    ),
    "llava, SigLIP": Family(
        lambda: llava(
            transformers.MistralConfig(**TEXT, sliding_window=None),
            transformers.SiglipVisionConfig(**TOWER, vision_use_head=False),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        4,
    ),
    "gemma3": Family(gemma3, 4, side=56, groups="pictures"),
    "paligemma": Family(paligemma, 4, groups="prefix"),
    "idefics3": Family(
        lambda: idefics3(transformers.Idefics3Config, transformers.Idefics3ForConditionalGeneration),
        4,
        side=56,
        apart=True,
    ),
    "smolvlm": Family(
        lambda: idefics3(transformers.SmolVLMConfig, transformers.SmolVLMForConditionalGeneration),
        4,
        side=56,
        apart=True,
    ),
    "qwen2_vl": Family(
        lambda: qwen_vl(
            transformers.Qwen2VLConfig,
            transformers.Qwen2VLForConditionalGeneration,
            embed_dim=24,
            hidden_size=32,
            mlp_ratio=2,
        ),
        0,
        grids=GRIDS,
    ),
    "qwen2_5_vl": Family(
        lambda: qwen_vl(
            transformers.Qwen2_5_VLConfig,
            transformers.Qwen2_5_VLForConditionalGeneration,
            hidden_size=24,
            out_hidden_size=32,
            intermediate_size=40,
            window_size=56,
            fullatt_block_indexes=[1],
        ),
        0,
        grids=GRIDS,
    ),
}


# SmolVLM is Idefics3 by another name, and the tests are many.
@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name == "smolvlm" else ()) for name in FAMILIES],
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


def rows(family: Family, *, pictures: bool) -> dict[str, np.ndarray]:
    """Rows of uneven lengths, with pictures or without, as both programs read them."""
    random = np.random.default_rng(1)
    tokens = random.integers(1, 80, (3, LENGTH)).astype(np.int32)
    lengths = np.array([LENGTH, 17, 9])
    numbers = np.zeros((3, LENGTH), np.int32)
    if pictures:
        sizes = iter(features_of(family))
        for row, count in enumerate(PICTURES):
            first, before = 2, 0
            for _, features in zip(range(count), sizes, strict=False):
                at = slice(first, first + features)
                tokens[row, at] = IMAGE
                numbers[row, at] = 1 + before + np.arange(features)
                first, before = first + features + 3, before + features
    segments = (np.arange(LENGTH)[None, :] < lengths[:, None]).astype(np.int32)
    pixels = random.normal(size=(sum(PICTURES), 3, family.side, family.side)).astype(np.float32)
    if family.grids:
        pixels = random.normal(size=(sum(h * w for h, w in family.grids), 3 * 2 * 14 * 14)).astype(np.float32)
    given = {"tokens": tokens * segments, "segments": segments, "features": numbers, "pixels": pixels}
    if family.groups == "prefix":
        return given | {"groups": (np.arange(LENGTH)[None, :] < np.array([16, 10, 3])[:, None]).astype(np.int32)}
    if family.grids:
        own = np.split(np.array(family.grids), np.cumsum(PICTURES)[:-1])
        axes = [qwen_vl_axes(row == IMAGE, grids // 2) for row, grids in zip(tokens, own, strict=True)]
        return given | ({"axes": np.array(axes) * segments[:, :, None]} if pictures else {})
    return given | ({"groups": -(-numbers // family.features)} if family.groups else {})


def features_of(family: Family) -> list[int]:
    """How many tokens each picture of the rows takes."""
    return [h * w // 4 for h, w in family.grids] or [family.features] * sum(PICTURES)


def pixels_of(family: Family, pictures: list[np.ndarray]) -> torch.Tensor:
    """Pictures of rows as a family's model of transformers takes them: all in a row, or [B, n, 3, H, W]."""
    if not family.apart:
        return torch.tensor(np.concatenate(pictures))
    made = np.zeros((len(pictures), max(map(len, pictures)), *pictures[0].shape[1:]), np.float32)
    for row, own in enumerate(pictures):
        made[row, : len(own)] = own
    return torch.tensor(made)


def types_of(family: Family, groups: np.ndarray) -> torch.Tensor:
    """Groups as transformers' `token_type_ids`: 1 for pictures, or for what is no prefix."""
    return torch.tensor(groups == 0 if family.groups == "prefix" else groups > 0).long()


def images_of(family: Family, given: dict[str, np.ndarray]) -> Images:
    """The pictures as patches, those of a row one after the other."""
    if family.grids:
        return merged_images(family, given)
    side = given["pixels"].shape[-1] // 14
    p = side * side
    cut = given["pixels"].reshape(-1, 3, side, 14, side, 14).transpose(0, 2, 4, 1, 3, 5).reshape(-1, p, 3 * 14 * 14)
    patches, segments = np.zeros((3, 2 * p, cut.shape[-1]), np.float32), np.zeros((3, 2 * p), np.int32)
    places = np.zeros((3, 2 * p, 2), np.int32)
    taken = iter(cut)
    for row, count in enumerate(PICTURES):
        for n in range(count):
            at = slice(p * n, p * n + p)
            patches[row, at], segments[row, at] = next(taken), n + 1
            places[row, at] = [divmod(number, side) for number in range(p)]
    found = Images(*map(jnp.asarray, (patches, segments, places, given["features"])))
    return found._replace(groups=jnp.asarray(given["groups"])) if "groups" in given else found


def merged_images(family: Family, given: dict[str, np.ndarray]) -> Images:
    """As `images_of`, of pictures whose patches come square by square."""
    most = 40
    patches, segments = np.zeros((3, most, given["pixels"].shape[1]), np.float32), np.zeros((3, most), np.int32)
    places = np.zeros((3, most, 2), np.int32)
    taken, grids = iter(given["pixels"]), iter(family.grids)
    for row, count in enumerate(PICTURES):
        at = 0
        for n, (rows, columns) in zip(range(count), grids, strict=False):
            for up, left, down, right in np.ndindex(rows // 2, columns // 2, 2, 2):
                patches[row, at], segments[row, at] = next(taken), n + 1
                places[row, at] = (2 * up + down, 2 * left + right)
                at += 1
    found = Images(*map(jnp.asarray, (patches, segments, places, given["features"])))
    return found._replace(axes=jnp.asarray(given["axes"]))


def seen(family: Family, given: dict[str, np.ndarray], row: int | None = None) -> dict[str, torch.Tensor]:
    """The pictures of all rows, or of one, as a family's model of transformers takes them."""
    if not family.grids:
        each = np.split(given["pixels"], np.cumsum(PICTURES)[:-1])
        return {"pixel_values": pixels_of(family, each if row is None else [each[row]])}
    counts = [sum(PICTURES[:at]) for at in range(len(PICTURES) + 1)]
    own = slice(None) if row is None else slice(counts[row], counts[row + 1])
    patches = np.cumsum([0, *(h * w for h, w in family.grids)])
    pixels = given["pixels"][patches[own.start or 0] : patches[-1 if own.stop is None else own.stop]]
    grids = torch.tensor([(1, h, w) for h, w in family.grids[own]])
    return {"pixel_values": torch.tensor(pixels), "image_grid_thw": grids}


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


@pytest.mark.parametrize("pictures", [True, False], ids=["pictures", "text only"])
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
        spread = "{i}" in names[path]
        for number, one in enumerate(np.asarray(gradient) if spread else np.asarray(gradient)[None]):
            name = names[path].replace("{i}", str(number))
            own = one.T if path.endswith("/kernel") and not isinstance(names[path], AsStored) else one
            close = 1e-4 * max(np.abs(stored[name]).max(), 1e-3 * largest)  # some are zero but for rounding
            np.testing.assert_allclose(own, stored[name], rtol=1e-4, atol=close, err_msg=name)


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
    name for name in FAMILIES if name not in ("idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl")
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
