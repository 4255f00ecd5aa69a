"""From a configuration to the parts of a run: devices, model, tokenizer, optimizer. Every key of `model` is read here
or in `configs.derived`.
"""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import derived
from input_pipeline.tokenizer import load_tokenizer
from models import hub, weights
from models.decoder import Compute, DecoderConfig, Params, abstract_params, init_params
from models.families import decoder_config
from models.sharding import make_mesh, parameter_shardings, paths

log = logging.getLogger(__name__)


class Model(NamedTuple):
    """A model without its weights: its folder, what Hugging Face's files say of it, and what we make of that."""

    folder: Path
    hf_config: dict[str, Any]
    generation_config: dict[str, Any] | None
    config: DecoderConfig
    dtype: Any
    tokenizer: Any


def prepare_devices(config: ConfigDict) -> Mesh:
    """The mesh of this run; also turns on the cache of compiled programs."""
    if cache := config.training.compile_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path(cache).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return make_mesh(derived.mesh_axes(config, hosts=jax.process_count()))


def open_model(config: ConfigDict) -> Model:
    """Find the model and read its configuration and tokenizer, no weights; ValueError says what does not fit."""
    model = config.model
    folder = hub.resolve(model.model_name, revision=model.model_revision, weights=model.load_pretrained_weights)
    hf_config = _read(folder / "config.json") | _changes(folder, dict(model.model_kwargs))
    tokenizer = load_tokenizer(
        model.tokenizer_name or str(folder),
        chat_template=model.chat_template,
        pad_token=model.tokenizer_pad_token,
        revision=model.model_revision if model.tokenizer_name is None and not Path(model.model_name).is_dir() else None,
        **dict(model.tokenizer_kwargs),
    )
    decoder = decoder_config(hf_config)
    if len(tokenizer) > decoder.vocabulary:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {decoder.vocabulary} (vocab_size): they do not "
            f"belong together; change model.tokenizer_name"
        )
    generation = folder / "generation_config.json"
    dtype = _dtype(model.torch_dtype_str, hf_config, folder, read=model.load_pretrained_weights)
    return Model(folder, hf_config, _read(generation) if generation.is_file() else None, decoder, dtype, tokenizer)


def load_weights(model: Model, mesh: Mesh, *, pretrained: bool, seed: int) -> Params:
    """The parameters on the mesh: read from the model's folder, or drawn at random."""
    abstract = abstract_params(model.config, dtype=model.dtype)
    shardings = parameter_shardings(abstract, mesh)
    if pretrained:
        return weights.load_params(model.folder, model.config, shardings=shardings, dtype=model.dtype)
    draw = jax.jit(lambda key: init_params(key, model.config, dtype=model.dtype), out_shardings=shardings)
    return draw(jax.random.key(seed))


def compute_of(config: ConfigDict, model: Model, *, longest_document: int | None) -> Compute:
    """How to compute: dtype, attention, what is recomputed, layers in one scan step, how far back attention reaches."""
    return Compute(
        dtype=jnp.dtype(derived.compute_dtype(config) or model.dtype),
        attention=derived.attention(config),
        remat=derived.remat_policy(config),
        scan_unroll=min(config.training.scan_unroll, model.config.layers),
        longest_document=longest_document,
    )


def parameter_count(model: Model) -> tuple[int, int]:
    """All parameters, and those that take part in matrix products (an embedding that is no head is only looked up)."""
    sizes = {path: leaf.size for path, leaf in paths(abstract_params(model.config, dtype=model.dtype)).items()}
    total = sum(sizes.values())
    return total, total - (0 if model.config.tied_head else sizes["embed/embedding"])


def summary(model: Model, mesh: Mesh) -> str:
    """Every parameter: its path, shape, dtype, and how it is split over the mesh."""
    abstract = abstract_params(model.config, dtype=model.dtype)
    places = paths(parameter_shardings(abstract, mesh))
    lines = [
        f"  {path:36} {leaf.shape!s:24} {leaf.dtype} {places[path].spec}" for path, leaf in paths(abstract).items()
    ]
    return "\n".join(["Parameters", *lines])


def _changes(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """`model.model_kwargs` as fields of config.json; Oumi's `disable_dropout` sets every dropout to zero."""
    if changes.pop("disable_dropout", False):
        changes |= {k: 0.0 for k, v in _read(folder / "config.json").items() if "drop" in k and isinstance(v, float)}
    return changes


def _dtype(asked: str, hf_config: dict[str, Any], folder: Path, *, read: bool) -> Any:
    """The dtype of parameters: as `model.torch_dtype_str` says, and for "auto" the checkpoint's own."""
    if asked == "auto":
        asked = hf_config.get("dtype") or hf_config.get("torch_dtype") or ""
        if not asked and read:
            asked = next(iter(weights.stored_tensors(folder).values())).dtype.name
    if asked not in ("float32", "bfloat16", ""):
        raise ValueError(f"model.torch_dtype_str: the checkpoint's dtype is {asked!r}; set float32 or bfloat16 here")
    return jnp.dtype(asked or "float32")


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))
