"""Parameters in and out of Hugging Face folders, piece by piece.

A family's table says where each leaf of our tree lies, say `layers/mlp/up/kernel` in the tensors
`model.layers.{i}.mlp.up_proj.weight` of all layers i, or a leaf of experts in a tensor for each expert e of each layer.
Reading takes from the files only the bytes of this process's shards; writing takes from the devices one tensor at a
time. Neither ever holds more of the model in host memory than two shards of one leaf, or one tensor.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.decoder import DecoderConfig, Params, abstract_params
from models.families import table_of
from models.hub import INDEX, SINGLE, weight_files
from models.safetensors_file import Spec, Stored, copy_rows, read_header, write_tensors
from models.sharding import nested, paths
from models.shards import Place, fetch_tensor, find_place, read_leaves

HEAD, EMBEDDING = "head/kernel", "embed/embedding"


def load_params(
    folder: Path,
    config: DecoderConfig,
    *,
    shardings: Any,
    dtype: Any,
    keep: Callable[[str, jax.Array], Mapping[str, jax.Array]] | None = None,
) -> Params:
    """Reads a model folder's weights into sharded arrays: the tree of `abstract_params(config, dtype=dtype)`.

    `shardings` is a tree like it, or one sharding for all leaves. Host memory beyond the arrays themselves stays
    below two shards of one leaf. Raises ValueError naming each tensor that is missing, misshapen, unclaimed or unlike
    its tied twin. `keep` turns a leaf, as soon as it is read, into those by path that take its place, so that what is
    quantised need never be there whole.
    """
    leaves = paths(abstract_params(config, dtype=dtype))
    stored, places = check_weights(folder, config)
    alike = isinstance(shardings, jax.sharding.Sharding)
    sharding_of = dict.fromkeys(leaves, shardings) if alike else paths(shardings)
    return nested(read_leaves(leaves, stored, places, shardings=sharding_of, keep=keep))


def check_weights(folder: Path, config: DecoderConfig) -> tuple[dict[str, Stored], dict[str, Place]]:
    """Holds the headers of a folder's files against the parameter tree, without reading the weights.

    Returns the stored tensors by name, and the place of each leaf in them; raises as `load_params` does.
    """
    table = table_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    leaves = paths(abstract_params(config, dtype=jnp.float32))
    places = _places(leaves, table.names)
    named = {table.name_of(name): tensor for name, tensor in stored_tensors(folder).items()}
    stored = _with_prefix(named, table.names[EMBEDDING])
    _check(folder, stored, places, table.names, ignored=table.ignored, tied=config.tied_head)
    return stored, places


def save_folder(
    folder: Path,
    params: Params,
    config: DecoderConfig,
    *,
    hf_config: Mapping[str, Any],
    dtype: Any,
    tokenizer: Any = None,
    generation_config: Mapping[str, Any] | None = None,
    processor: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a folder that transformers and vLLM load: config, weights as `dtype` in safetensors, tokenizer.

    `hf_config` is the original `config.json`; only its dtype changes. `processor` are the files that say how pictures
    are prepared, by name, as `processor_files` reads them. Every process calls this and the first one
    writes. The folder (or, where it exists, its config.json) appears once all of it is on disk; its other files are
    left alone.
    """
    dtype = jnp.dtype(dtype)
    leaves, expected = paths(params), paths(abstract_params(config, dtype=dtype))
    assert {p: x.shape for p, x in leaves.items()} == {p: x.shape for p, x in expected.items()}, (
        "not config's parameters"
    )
    places = _places(leaves, table_of(hf_config).names)
    origin = {name: (path, number) for path, place in places.items() for number, name in enumerate(place.names)}
    specs = {name: Spec(places[origin[name][0]].hf_shape, dtype) for name in sorted(origin, key=_by_layer)}

    def tensor(name: str) -> np.ndarray:
        path, number = origin[name]
        return fetch_tensor(leaves[path], number, places[path], dtype=dtype)

    if jax.process_index() == 0:
        with _appearing_whole(folder) as part:
            _write_weights(part, specs, tensor, max_shard_bytes=max_shard_bytes)
            _write_json(part / "config.json", _with_dtype(hf_config, dtype.name))
            if generation_config is not None:
                _write_json(part / "generation_config.json", generation_config)
            if tokenizer is not None:
                tokenizer.save_pretrained(part)
            for name, text in (processor or {}).items():
                (part / name).write_text(text, encoding="utf-8")
    else:  # fetching a tensor that is spread over processes is collective: all take part, in the same order
        for name in specs:
            tensor(name)
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(f"saved {folder.name}")


def processor_files(folder: Path) -> dict[str, str]:
    """The files of a model folder that say how pictures are prepared, by name; none of a model that takes none."""
    names = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
    return {name: (folder / name).read_text(encoding="utf-8") for name in names if (folder / name).is_file()}


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a model folder by name, from its single file or from all shards of its index."""
    stored = {name: tensor for file in weight_files(folder) for name, tensor in read_header(file).items()}
    if not (folder / SINGLE).is_file():
        indexed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        if missing := [f"{name} of {file}" for name, file in indexed.items() if name not in stored]:
            raise ValueError(f"{folder}: {INDEX} lists {_some(missing)}, which is not there; download it again")
    return stored


def _places(leaves: Mapping[str, Any], table: Mapping[str, str]) -> dict[str, Place]:
    if missing := [path for path in leaves if path not in table]:
        raise ValueError(f"the family's WEIGHTS has no entry for {_some(missing)}")
    return {path: find_place(path, leaf.shape, table[path]) for path, leaf in leaves.items()}


def _with_prefix(stored: Mapping[str, Stored], embedding: str) -> dict[str, Stored]:
    """The names that a whole model gives its tensors: files of one without its head, as GPT-2's own, lack the first
    word of each.
    """
    prefix, _, bare = embedding.partition(".")
    lacking = embedding not in stored and bare in stored
    return {f"{prefix}.{name}" if lacking else name: tensor for name, tensor in stored.items()}


def _check(
    folder: Path,
    stored: Mapping[str, Stored],
    places: Mapping[str, Place],
    table: Mapping[str, str],
    *,
    ignored: Iterable[str],
    tied: bool,
) -> None:
    """Holds files against tree: each leaf filled, each tensor claimed, shapes equal, a tied head tied."""
    wanted = {name: place.hf_shape for place in places.values() for name in place.names}
    if missing := [name for name in wanted if name not in stored]:
        raise ValueError(f"{folder}: the weights lack {_some(missing)}")
    if misshapen := [
        f"{name} is {list(stored[name].shape)} where config.json asks for {list(shape)}"
        for name, shape in wanted.items()
        if stored[name].shape != shape
    ]:
        raise ValueError(f"{folder}: {_some(misshapen)}")
    head, embedding = table[HEAD], table[EMBEDDING]
    if tied and head in stored and not _same(stored[head], stored[embedding]):
        raise ValueError(
            f"{folder}: {head} differs from {embedding} though config.json ties them; "
            "set tie_word_embeddings to false there to keep both, or remove the tensor"
        )
    accepted = re.compile("|".join([*ignored, *([re.escape(head)] if tied else [])]) or r"(?!)")
    if unclaimed := [name for name in stored if name not in wanted and not accepted.fullmatch(name)]:
        raise ValueError(f"{folder}: no parameter claims {_some(unclaimed)}; without it the model would be another one")


def _same(one: Stored, other: Stored) -> bool:
    """Whether two stored matrices hold the same values, compared a strip of rows at a time."""
    if one.shape != other.shape:
        return False
    rows, width = one.shape
    step = 1024
    for start in range(0, rows, step):
        a, b = np.empty((2, min(step, rows - start), width), np.float32)
        copy_rows(one, (slice(start, start + step), slice(None)), a)
        copy_rows(other, (slice(start, start + step), slice(None)), b)
        if not np.array_equal(a, b):
            return False
    return True


def _write_weights(
    folder: Path, specs: Mapping[str, Spec], tensor: Callable[[str], np.ndarray], *, max_shard_bytes: int
) -> None:
    """Writes the tensors in order; where they pass `max_shard_bytes` in all, as several files and an index."""
    groups: list[dict[str, Spec]] = [{}]
    for name, spec in specs.items():
        if groups[-1] and sum(other.nbytes for other in groups[-1].values()) + spec.nbytes > max_shard_bytes:
            groups.append({})
        groups[-1][name] = spec
    files = [f"model-{k:05}-of-{len(groups):05}.safetensors" for k in range(1, len(groups) + 1)]
    if len(groups) == 1:
        files = [SINGLE]
    else:
        total = sum(spec.nbytes for spec in specs.values())
        where = {name: file for file, group in zip(files, groups, strict=True) for name in group}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    for file, group in zip(files, groups, strict=True):
        write_tensors(folder / file, group, tensor, metadata={"format": "pt"})


@contextlib.contextmanager
def _appearing_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder to write in, put in the place of `folder` when all went well, and removed in any case."""
    part = folder / ".export.part" if folder.exists() else folder.parent / f".{folder.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        _publish(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _publish(part: Path, folder: Path) -> None:
    """Puts a finished folder in its place: by one rename, or, where the place is taken, file by file.

    config.json goes first and comes back last, so that nobody can load a mixture of old and new.
    """
    if not folder.exists():
        part.rename(folder)
        return
    (folder / "config.json").unlink(missing_ok=True)
    for old in [*folder.glob("model*.safetensors"), folder / INDEX]:
        old.unlink(missing_ok=True)
    for file in sorted(part.iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(folder / file.name)


def _with_dtype(hf_config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    keys = [key for key in ("dtype", "torch_dtype") if key in hf_config] or ["dtype"]
    return {**hf_config, **dict.fromkeys(keys, dtype)}


def _by_layer(name: str) -> list[tuple[int, str]]:
    """Sorts model.layers.2 before model.layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
