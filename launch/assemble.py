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
from input_pipeline.processors import Processor, open_processor
from input_pipeline.tokenizer import load_tokenizer
from launch.adapt import find_model, quantisation, tokenizer_folder, what_trains
from models import hub, weights
from models.adapter import abstract_trained, join_adapter, load_adapter
from models.decoder import Compute, DecoderConfig, Params, abstract_params, init_params
from models.families import decoder_config
from models.lora import Lora, Parts, abstract_adapter, init_adapter, merged, split
from models.quantized import quantised, quantised_leaf, unquantised
from models.sharding import make_mesh, parameter_shardings, paths, slices_of

log = logging.getLogger(__name__)


class Model(NamedTuple):
    """A model without its weights: its folder, what Hugging Face's files say of it, and what we make of that."""

    folder: Path
    hf_config: dict[str, Any]
    generation_config: dict[str, Any] | None
    config: DecoderConfig
    dtype: Any
    tokenizer: Any
    base: str  # its name, for an adapter that belongs to it
    adapter: Path | None  # the folder of an adapter that the run starts from
    lora: Lora | None  # the adapter that is trained
    trained: frozenset[str]  # paths of its own leaves that are
    processor: Processor | None  # how its pictures are prepared; None: it takes none
    form: str | None  # of its kernels, where they are kept in few bits: a name of models.quantized.FORMATS

    @property
    def has_new_adapter(self) -> bool:
        """Whether training begins with an adapter that there was not before."""
        return self.lora is not None and self.adapter is None


class Count(NamedTuple):
    """Parameters: all that there are, those that are trained, and of either those that text takes part in matrix
    products with (an embedding that is no head is only looked up).
    """

    total: int
    trained: int
    trained_products: int
    frozen_products: int


def prepare_devices(config: ConfigDict) -> Mesh:
    """The mesh of this run; also turns on the cache of compiled programs."""
    if cache := config.training.compile_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path(cache).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return make_mesh(derived.mesh_axes(config, hosts=jax.process_count(), slices=len(slices_of(jax.devices()))))


def open_model(config: ConfigDict, *, only_config: bool = False) -> Model:
    """Find the model and read its configuration and tokenizer, no weights; ValueError says what does not fit. With
    `only_config` there is config.json alone, and no tokenizer.
    """
    model = config.model
    named = find_model(model)
    weighs = model.load_pretrained_weights and not only_config
    folder = hub.resolve(named.base, revision=model.model_revision, weights=weighs)
    hf_config = _read(folder / "config.json") | _changes(folder, dict(model.model_kwargs))
    tokenizer = None if only_config else _tokenizer(config, named, folder)
    if not model.load_pretrained_weights and tokenizer is not None:
        hf_config |= _special_ids(tokenizer)
    decoder = decoder_config(hf_config)
    if tokenizer is not None and len(tokenizer) > decoder.vocabulary + decoder.more_tokens:
        cure = "" if model.load_pretrained_weights else f", or set model.model_kwargs.vocab_size: {len(tokenizer)}"
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {decoder.vocabulary} (vocab_size): they do not "
            f"belong together; change model.tokenizer_name{cure}"
        )
    generation = folder / "generation_config.json"
    dtype = _dtype(model.torch_dtype_str, hf_config, folder, read=weighs)
    lora, trained = what_trains(config, decoder, hf_config, adapter=named.adapter)
    return Model(
        folder=folder,
        hf_config=hf_config,
        generation_config=_read(generation) if generation.is_file() else None,
        config=decoder,
        dtype=dtype,
        tokenizer=tokenizer,
        base=named.base,
        adapter=named.adapter,
        lora=lora,
        trained=trained,
        processor=None if tokenizer is None else _processor(config, hf_config, folder, tokenizer),
        form=quantisation(config),
    )


def _tokenizer(config: ConfigDict, named: Any, folder: Path) -> Any:
    model = config.model
    return load_tokenizer(
        model.tokenizer_name or str(tokenizer_folder(named, folder)),
        chat_template=model.chat_template,
        pad_token=model.tokenizer_pad_token,
        revision=model.model_revision if model.tokenizer_name is None and not Path(named.base).is_dir() else None,
        **dict(model.tokenizer_kwargs),
    )


def _processor(config: ConfigDict, hf_config: dict[str, Any], folder: Path, tokenizer: Any) -> Processor | None:
    """How the model's pictures are prepared, by the settings of the folder that is named, or its own."""
    split = config.data.train
    places = (split.collator_kwargs, *(dataset.dataset_kwargs for dataset in split.datasets))
    named = config.model.processor_name or next((p["processor_name"] for p in places if p.get("processor_name")), None)
    if named is not None:
        folder = Path(named).expanduser() if Path(named).expanduser().is_dir() else hub.resolve(named, weights=False)
    return open_processor(hf_config, folder, tokenizer, kwargs=dict(config.model.processor_kwargs))


def load_weights(model: Model, mesh: Mesh, *, pretrained: bool, seed: int) -> Params:
    """The parameters on the mesh: read from the model's folder, or drawn at random; quantised one by one."""
    abstract = abstract_params(model.config, dtype=model.dtype)
    shardings = parameter_shardings(abstract, mesh)
    form = model.form
    if pretrained:
        keep = None if form is None else lambda path, leaf: quantised_leaf(path, leaf, form, but=model.trained)
        return weights.load_params(model.folder, model.config, shardings=shardings, dtype=model.dtype, keep=keep)
    draw = jax.jit(lambda key: init_params(key, model.config, dtype=model.dtype), out_shardings=shardings)
    params = draw(jax.random.key(seed))
    return params if form is None else quantised(params, form, but=model.trained)


def load_parts(model: Model, mesh: Mesh, *, pretrained: bool, seed: int) -> Parts:
    """What is trained, as it begins, and what is frozen; an adapter that is not trained is merged into the model."""
    own = load_weights(model, mesh, pretrained=pretrained, seed=seed)
    if model.adapter is not None and model.lora is None:
        own = join_adapter(model.adapter, own, model.config, model.hf_config, mesh=mesh)
    parts = split(own, model.trained)
    if model.lora is None:
        return parts
    if model.adapter is not None:
        lora = model.lora
        begun = load_adapter(model.adapter, lora, model.config, model.hf_config, mesh=mesh, dtype=model.dtype)
        return parts._replace(trained=begun)
    return parts._replace(trained=merged(_new_adapter(model, model.lora, own, mesh, seed), parts.trained))


def _new_adapter(model: Model, lora: Lora, own: Params, mesh: Mesh, seed: int) -> Params:
    places = parameter_shardings(abstract_adapter(abstract_params(model.config, dtype=model.dtype), lora), mesh)
    draw = jax.jit(lambda key, own: init_adapter(key, unquantised(own, model.dtype), lora), out_shardings=places)
    return draw(jax.random.key(seed), own)


def abstract_parts(model: Model) -> Parts:
    """The trees of `load_parts` as `jax.ShapeDtypeStruct`s."""
    own = abstract_params(model.config, dtype=model.dtype)
    if (form := model.form) is not None:
        own = jax.eval_shape(lambda own: quantised(own, form, but=model.trained), own)
    parts = split(own, model.trained)
    if model.lora is None:
        return parts
    return parts._replace(trained=abstract_trained(model.lora, model.config, dtype=model.dtype))


def compute_of(config: ConfigDict, model: Model, *, longest_document: int | None, packed: bool = True) -> Compute:
    """How to compute: dtype, attention, what is recomputed, layers in one scan step, how far back attention reaches,
    whether a row may hold several documents.
    """
    return Compute(
        dtype=jnp.dtype(derived.compute_dtype(config) or model.dtype),
        attention=derived.attention(config),
        remat=derived.remat_policy(config),
        scan_unroll=min(config.training.scan_unroll, model.config.layers),
        longest_document=longest_document,
        packed=packed,
        lora=model.lora,
    )


def parameter_count(model: Model) -> Count:
    """How many parameters there are, and how many of them are trained."""
    looked_up = {"positions/embedding"} | (set() if model.config.tied_head else {"embed/embedding"})
    mixture = model.config.experts

    def product(path: str, size: int) -> int:
        """How many of a leaf's numbers a token is multiplied with: of the experts those that it goes to, of a tower
        none."""
        if path.startswith(("vision/", "projector/")):
            return 0
        routed = mixture is not None and path.startswith("layers/moe/experts/")
        return 0 if path in looked_up else size * mixture.per_token // mixture.count if routed else size

    def sizes(part: Params | None) -> tuple[int, int]:
        leaves = {} if part is None else {path: leaf.size for path, leaf in paths(part).items()}
        return sum(leaves.values()), sum(product(path, size) for path, size in leaves.items())

    (trained, in_products), (frozen, frozen_in_products) = map(sizes, abstract_parts(model))
    return Count(trained + frozen, trained, in_products, frozen_in_products)


def summary(model: Model, mesh: Mesh) -> str:
    """Every parameter: its path, shape, dtype, how it is split over the mesh, and whether it is frozen."""
    parts = abstract_parts(model)
    abstract, trained = merged(*parts), paths(parts.trained)
    places = paths(parameter_shardings(abstract, mesh))
    lines = [
        f"  {path:36} {leaf.shape!s:24} {leaf.dtype} {places[path].spec}{'' if path in trained else ' frozen'}"
        for path, leaf in paths(abstract).items()
    ]
    return "\n".join(["Parameters", *lines])


def _changes(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """`model.model_kwargs` as fields of config.json; Oumi's `disable_dropout` sets every dropout to zero."""
    if changes.pop("disable_dropout", False):
        changes |= {k: 0.0 for k, v in _read(folder / "config.json").items() if "drop" in k and isinstance(v, float)}
    return changes


def _special_ids(tokenizer: Any) -> dict[str, int | None]:
    """The ids that begin and end a text, for the config.json of a model whose weights know none yet. A token that pads
    and ends is named as the end only: the embedding of what pads is never trained.
    """
    pad = tokenizer.pad_token_id
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None if pad == tokenizer.eos_token_id else pad,
    }


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
