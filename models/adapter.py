"""Adapters in and out of folders as peft has them: adapter_config.json and adapter_model.safetensors.

The tensors are called as the module that they adapt, `base_model.model.` before and `.lora_A.weight` [R, D] behind it,
one for each layer; modules trained whole keep the names of their own tensors behind that beginning. What lies in a
folder decides which modules an adapter has, not the patterns of its config.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.config import DecoderConfig
from models.decoder import Params, abstract_params
from models.families import AsStored, Table, table_of
from models.lora import MAGNITUDE, A, B, Lora, abstract_adapter, fused, is_adapter, merged
from models.safetensors_file import Spec, Stored, read_header, write_tensors
from models.selection import Names, names_of, short_names
from models.sharding import nested, parameter_shardings, paths
from models.shards import Place, fetch_tensor, find_place, read_leaves

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SUFFIX = {A: ".lora_A.weight", B: ".lora_B.weight", MAGNITUDE: ".lora_magnitude_vector"}

# Fields of adapter_config.json that are read here, those that change nothing once an adapter is trained, and peft's
# words for how one begins. Any other field must be empty: it may change what the adapter computes.
READ = {"peft_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias"}
HARMLESS = {
    *("task_type", "target_modules", "exclude_modules", "modules_to_save", "fan_in_fan_out", "inference_mode"),
    *("auto_mapping", "revision", "peft_version", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("megatron_config", "megatron_core", "qalora_group_size", "ensure_weight_tying", "runtime_config"),
    *("layers_pattern", "init_lora_weights"),
}
INITS = {"kaiming": True, "gaussian": "gaussian", "random": False}


def find_adapter(name: str) -> Path | None:
    """The folder of that name if it holds an adapter; one that holds a whole model beside it is that model."""
    folder = Path(name).expanduser()
    return folder if (folder / CONFIG).is_file() and not (folder / "config.json").is_file() else None


def base_of(folder: Path) -> str:
    """The name of the model that an adapter belongs to, as its config has it."""
    name = _fields(folder).get("base_model_name_or_path")
    if not name:
        raise ValueError(
            f"{folder / CONFIG} names no base_model_name_or_path; write the model's folder or hub name there"
        )
    return name


def read_settings(folder: Path, config: DecoderConfig, hf_config: Mapping[str, Any]) -> Lora:
    """What an adapter folder says of its adapter, held against the model; ValueError names what does not fit it, and
    what this port does not compute.
    """
    fields, stored = _fields(folder), _stored(folder, table_of(hf_config))
    _refuse_unknown(folder, fields)
    names = names_of(config, hf_config)
    modules = {path: [f"{PREFIX}{module}{SUFFIX[A]}" for module in each] for path, each in names.modules.items()}
    whole = {path: [PREFIX + tensor for tensor in each] for path, each in names.tensors.items()}
    init = fields.get("init_lora_weights", True)
    lora = Lora(
        rank=fields["r"],
        alpha=fields["lora_alpha"],
        dropout=fields.get("lora_dropout") or 0.0,
        rslora=bool(fields.get("use_rslora")),
        dora=bool(fields.get("use_dora")),
        init=next((ours for ours, peft in INITS.items() if peft == init), "kaiming"),
        modules=_there(folder, modules, stored),
        whole=_there(folder, whole, stored),
    )
    _check(folder, stored, places_of(lora, config, hf_config))
    return lora


def load_adapter(
    folder: Path,
    lora: Lora,
    config: DecoderConfig,
    hf_config: Mapping[str, Any],
    *,
    mesh: jax.sharding.Mesh,
    dtype: Any,
) -> Params:
    """The parameters of an adapter folder on the mesh: the adapter in float32, modules trained whole in `dtype`."""
    stored, places = _stored(folder, table_of(hf_config)), places_of(lora, config, hf_config)
    leaves = paths(abstract_trained(lora, config, dtype=dtype))
    shardings = paths(parameter_shardings(nested(leaves), mesh))
    return nested(read_leaves(leaves, stored, places, shardings=shardings))


def join_adapter(
    folder: Path, params: Params, config: DecoderConfig, hf_config: Mapping[str, Any], *, mesh: jax.sharding.Mesh
) -> Params:
    """The parameters of a model with the adapter of that folder merged in, in their own dtype and places."""
    lora = read_settings(folder, config, hf_config)
    dtype = params["embed"]["embedding"].dtype
    adapter = load_adapter(folder, lora, config, hf_config, mesh=mesh, dtype=dtype)
    join = jax.jit(lambda both: fused(both, lora), out_shardings=parameter_shardings(params, mesh))
    return join(merged(adapter, params))


def save_adapter(
    folder: Path,
    params: Params,
    lora: Lora,
    config: DecoderConfig,
    *,
    hf_config: Mapping[str, Any],
    base: str,
    tokenizer: Any = None,
    processor: Mapping[str, str] | None = None,
    fields: Mapping[str, Any] | None = None,
) -> None:
    """Writes an adapter folder that peft and vLLM load. `base` names the model it belongs to; `processor` are the files
    that say how its pictures are prepared, by name; `fields` is the adapter_config.json of a folder that this adapter
    came from, kept as it is.

    Every process calls this and the first one writes; adapter_config.json appears last.
    """
    leaves, places = paths(params), places_of(lora, config, hf_config)
    assert leaves.keys() == places.keys(), "not this adapter's parameters"
    origin = {name: (path, number) for path, place in places.items() for number, name in enumerate(place.names)}
    specs = {name: Spec(places[path].hf_shape, np.dtype(leaves[path].dtype)) for name, (path, _) in origin.items()}
    order = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))  # as the safetensors package has it

    def tensor(name: str) -> np.ndarray:
        path, number = origin[name]
        return fetch_tensor(leaves[path], number, places[path], dtype=specs[name].dtype)

    if jax.process_index() != 0:  # fetching what is spread over processes is collective
        for name in order:
            tensor(name)
        return
    part = folder / ".adapter.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write_tensors(part / TENSORS, {name: specs[name] for name in order}, tensor, metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(part)
    for name, text in (processor or {}).items():
        (part / name).write_text(text, encoding="utf-8")
    described = fields or describe(lora, config, hf_config, base=base)
    (part / CONFIG).write_text(json.dumps(described, indent=2, sort_keys=True), encoding="utf-8")
    (folder / CONFIG).unlink(missing_ok=True)
    for file in sorted(part.iterdir(), key=lambda file: file.name == CONFIG):
        file.replace(folder / file.name)
    part.rmdir()


def describe(lora: Lora, config: DecoderConfig, hf_config: Mapping[str, Any], *, base: str) -> dict[str, Any]:
    """The adapter_config.json of an adapter."""
    names, table = names_of(config, hf_config), table_of(hf_config).names
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "init_lora_weights": INITS[lora.init],
        "target_modules": short_names(names, lora.modules),
        "modules_to_save": _whole_modules(names, lora.whole) or None,
        "fan_in_fan_out": any(isinstance(table[f"{module}/kernel"], AsStored) for module in lora.modules),
        "bias": "none",
        "inference_mode": True,
    }


def abstract_trained(lora: Lora, config: DecoderConfig, *, dtype: Any) -> Params:
    """All that trains with an adapter: its own leaves, and those of the model that are trained whole, in `dtype`."""
    model = abstract_params(config, dtype=dtype)
    whole = {path: leaf for path, leaf in paths(model).items() if path in lora.whole}
    return nested(paths(abstract_adapter(model, lora)) | whole)


def places_of(lora: Lora, config: DecoderConfig, hf_config: Mapping[str, Any]) -> dict[str, Place]:
    """Where each leaf of an adapter lies in its file."""
    names, table = names_of(config, hf_config), table_of(hf_config).names
    places = {}
    for path, leaf in paths(abstract_trained(lora, config, dtype=jnp.float32)).items():
        if is_adapter(path):
            module, kind = path.rsplit("/", 1)
            tensors = tuple(f"{PREFIX}{name}{SUFFIX[kind]}" for name in names.modules[module])
            one = len(leaf.shape) - (1 if kind == MAGNITUDE else 2)  # the axes before are spread over tensors
            spread, shape = leaf.shape[:one], leaf.shape[one:]
            places[path] = Place(spread, tensors, shape[::-1], transposed=kind != MAGNITUDE)
        else:
            place = find_place(path, leaf.shape, table[path])
            places[path] = place._replace(names=tuple(PREFIX + name for name in names.tensors[path]))
    return places


def _whole_modules(names: Names, whole: tuple[str, ...]) -> list[str]:
    """Names that mean these leaves to peft, which takes any module whose name ends so."""
    return sorted({tensor.rpartition(".")[0] for path in whole for tensor in names.tensors[path]})


def _fields(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def _stored(folder: Path, table: Table) -> dict[str, Stored]:
    """The tensors of an adapter by the names that peft gives them now, whatever older versions called the modules."""
    found = {}
    for name, tensor in read_header(_file(folder)).items():
        inner = name.removeprefix(PREFIX)
        found[PREFIX + table.name_loaded(table.name_of(inner)) if inner != name else name] = tensor
    return found


def _file(folder: Path) -> Path:
    if not (folder / TENSORS).is_file():
        raise ValueError(f"{folder} has no {TENSORS}; only safetensors are read (peft's save_pretrained writes it)")
    return folder / TENSORS


def _refuse_unknown(folder: Path, fields: Mapping[str, Any]) -> None:
    if fields.get("peft_type") != "LORA" or fields.get("bias", "none") != "none":
        asked = f"peft_type {fields.get('peft_type')!r} with bias {fields.get('bias', 'none')!r}"
        raise ValueError(f"not implemented yet: {folder / CONFIG}: {asked}; LORA with bias 'none' is")
    if (init := fields.get("init_lora_weights", True)) not in (True, False, None, "gaussian", "eva", "orthogonal"):
        raise ValueError(
            f"not implemented yet: {folder / CONFIG}: init_lora_weights {init!r}, which changes the model's weights "
            "(peft's save_pretrained can convert it, with path_initial_model_for_weight_conversion)"
        )
    if unknown := sorted(name for name, value in fields.items() if value and name not in READ | HARMLESS):
        raise ValueError(f"not implemented yet: {folder / CONFIG}: {', '.join(unknown)}")


def _there(folder: Path, expected: Mapping[str, list[str]], stored: Mapping[str, Stored]) -> tuple[str, ...]:
    """The paths whose tensors are in the file, in all layers or in none."""
    found = []
    for path, tensors in expected.items():
        count = sum(name in stored for name in tensors)
        if 0 < count < len(tensors):
            raise ValueError(
                f"not implemented yet: {folder}: an adapter on {count} of the {len(tensors)} layers of {path}"
            )
        if count:
            found.append(path)
    return tuple(sorted(found))


def _check(folder: Path, stored: Mapping[str, Stored], places: Mapping[str, Place]) -> None:
    wanted = {name: place.hf_shape for place in places.values() for name in place.names}
    for name, shape in wanted.items():
        if name not in stored:
            raise ValueError(f"{folder / TENSORS} lacks {name}")
        if stored[name].shape != shape:
            raise ValueError(f"{folder / TENSORS}: {name} is {list(stored[name].shape)}, and should be {list(shape)}")
    if unclaimed := sorted(stored.keys() - wanted.keys()):
        raise ValueError(f"not implemented yet: {folder / TENSORS}: an adapter on {unclaimed[0]}")
