"""`einkorn export`: the model of a checkpoint, or of an adapter's folder, as a Hugging Face folder."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from input_pipeline.tokenizer import load_tokenizer
from launch.adapt import Named, tokenizer_folder
from models import adapter as adapters
from models import hub, weights
from models.config import DecoderConfig
from models.decoder import Params, abstract_params
from models.families import decoder_config
from models.lora import Lora, Parts, fused, merged, split
from models.quantized import unquantised
from models.sharding import make_mesh, parameter_shardings
from trainers.checkpoint import read_meta, restore_part
from trainers.checkpoint_files import refuse_damaged

log = logging.getLogger("einkorn")


class Described(NamedTuple):
    """What an exported folder says of its model beside the weights; `base` names the model of an adapter."""

    config: DecoderConfig
    hf_config: Mapping[str, Any]
    dtype: Any
    lora: Lora | None
    base: str
    tokenizer: Any
    generation_config: Mapping[str, Any] | None
    processor: Mapping[str, str] | None = None


def write_model(folder: Path, parts: Parts, about: Described) -> None:
    """Write a whole model to `folder`, as transformers and vLLM load it; an adapter is merged into it."""
    params = merged(*parts)
    if about.lora is not None:
        lora = about.lora
        params = jax.jit(lambda params: fused(unquantised(params, about.dtype), lora))(params)
    weights.save_folder(
        folder,
        params,
        about.config,
        hf_config=about.hf_config,
        dtype=about.dtype,
        tokenizer=about.tokenizer,
        generation_config=about.generation_config,
        processor=about.processor,
    )


def write_adapter(folder: Path, trained: Params, about: Described) -> None:
    """Write an adapter, its tokenizer and what prepares its pictures to `folder`, as peft and vLLM load it."""
    assert about.lora is not None
    base = Path(about.base).expanduser()
    adapters.save_adapter(
        folder,
        trained,
        about.lora,
        about.config,
        hf_config=about.hf_config,
        base=str(base.absolute()) if base.is_dir() else about.base,
        tokenizer=about.tokenizer,
        processor=about.processor,
    )


def run(source: Path, folder: Path, *, dtype: str | None, merge: bool) -> None:
    """Write `folder` from the parameters in a checkpoint or an adapter's folder, in their own dtype unless another is
    given; of an adapter it is the adapter, or with `merge` the whole model.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"--dtype is {dtype!r}; allowed: float32, bfloat16")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and is not empty; name another folder")
    mesh = make_mesh({"fsdp": -1})
    if adapters.find_adapter(str(source)):
        parts, about = _of_adapter(source, mesh)
        merge = True  # the adapter alone is there already
    else:
        parts, about = _of_checkpoint(source, mesh, merge=merge)
    if about.lora is not None and not merge:
        if dtype is not None:
            raise ValueError("--dtype is for whole models: an adapter keeps its own; add --merge")
        write_adapter(folder, parts.trained, about)
    else:
        write_model(folder, parts, about._replace(dtype=dtype or about.dtype))
    log.info("%s holds the %s of %s", folder, "model" if merge or about.lora is None else "adapter", source)


def _of_checkpoint(checkpoint: Path, mesh: Mesh, *, merge: bool) -> tuple[Parts, Described]:
    refuse_damaged(checkpoint)
    meta = read_meta(checkpoint)
    model = meta["model"]
    config, dtype, original = decoder_config(model["hf_config"]), jnp.dtype(model["dtype"]), Path(model["folder"])
    lora = _lora(model.get("lora"))
    if lora is not None:
        stored, rest = adapters.abstract_trained(lora, config, dtype=dtype), merge
    else:
        there = {name.removeprefix("params/") for name in meta["checkpoint"]["tree"] if name.startswith("params/")}
        stored, frozen = split(abstract_params(config, dtype=dtype), there)
        rest = frozen is not None
    wanted = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        stored,
        parameter_shardings(stored, mesh),
    )
    trained = restore_part(checkpoint, "params", wanted)
    if rest and not original.is_dir():
        raise ValueError(f"{checkpoint} holds what was trained only, and the rest of the model, {original}, is gone")
    parts = Parts(trained, _load(original, config, dtype, mesh) if rest else None)
    tokenizer = load_tokenizer(str(original), chat_template=model["chat_template"]) if original.is_dir() else None
    about = Described(
        config=config,
        hf_config=model["hf_config"],
        dtype=dtype,
        lora=lora,
        base=model.get("base", str(original)),
        tokenizer=tokenizer,
        generation_config=_generation(original),
        processor=weights.processor_files(original),
    )
    return parts, about


def _of_adapter(adapter: Path, mesh: Mesh) -> tuple[Parts, Described]:
    named = Named(adapters.base_of(adapter), adapter)
    original = hub.resolve(named.base)
    hf_config = json.loads((original / "config.json").read_text(encoding="utf-8"))
    config = decoder_config(hf_config)
    dtype = jnp.dtype(hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32")
    lora = adapters.read_settings(adapter, config, hf_config)
    trained = adapters.load_adapter(adapter, lora, config, hf_config, mesh=mesh, dtype=dtype)
    parts = Parts(trained, _load(original, config, dtype, mesh))
    tokenizer = load_tokenizer(str(tokenizer_folder(named, original)))
    return parts, Described(
        config=config,
        hf_config=hf_config,
        dtype=dtype,
        lora=lora,
        base=named.base,
        tokenizer=tokenizer,
        generation_config=_generation(original),
        processor=weights.processor_files(original),
    )


def _load(folder: Path, config: DecoderConfig, dtype: Any, mesh: Mesh) -> Params:
    shardings = parameter_shardings(abstract_params(config, dtype=dtype), mesh)
    return weights.load_params(folder, config, shardings=shardings, dtype=dtype)


def _lora(fields: Mapping[str, Any] | None) -> Lora | None:
    """An adapter's settings as a checkpoint's meta.json has them."""
    if fields is None:
        return None
    settings: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
    return Lora(**settings)


def _generation(folder: Path) -> dict[str, Any] | None:
    file = folder / "generation_config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
