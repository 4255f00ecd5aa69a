"""Which leaves a name of Hugging Face means: the targets of an adapter, modules trained whole, layers that are frozen.

The family's table says how each leaf is called in a loaded model: the module of
`model.layers.{i}.self_attn.q_proj.weight` is that without `.weight`. Our leaves hold all layers, so a name that means
some layers only means a part of a leaf, which nothing here can select.
"""

import difflib
import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from models.config import DecoderConfig
from models.decoder import abstract_params
from models.families import table_of
from models.layers import Block
from models.linear import Linear
from models.sharding import paths
from models.shards import find_place

ALL_LINEAR = "all-linear"
# What peft adapts where nothing is said; elsewhere queries and values, or the one matrix that makes them.
DEFAULT_TARGETS = {"phi": ("q_proj", "v_proj", "fc1", "fc2")}


# Parts of a model that sees, by names that hold for all families: which paths each has.
PARTS: dict[str, Callable[[str], bool]] = {
    "vision_encoder": lambda path: path.startswith("vision/"),
    "vision_tower": lambda path: path.startswith("vision/"),
    "multi_modal_projector": lambda path: path.startswith("projector/"),
    "language_model": lambda path: not path.startswith(("vision/", "projector/")),
}


class Names(NamedTuple):
    """What a model that transformers has loaded calls its leaves: path → one name for each layer (or one in all).

    `modules` are the linear layers but the output head, by path without `/kernel`, which an adapter can stand beside;
    `tensors` all leaves.
    """

    modules: dict[str, tuple[str, ...]]
    tensors: dict[str, tuple[str, ...]]
    default: tuple[str, ...]  # paths of modules


def names_of(config: DecoderConfig, hf_config: Mapping[str, Any]) -> Names:
    """The names of a model's leaves, by its family's table."""
    table = table_of(hf_config)
    tensors = {}
    for path, leaf in paths(abstract_params(config, dtype=jnp.float32)).items():
        stored = find_place(path, leaf.shape, table.names[path]).names
        tensors[path] = tuple(map(table.name_loaded, stored))
    modules = {
        path: tuple(name.removesuffix(".weight") for name in tensors[f"{path}/kernel"])
        for path in (*linear_layers(config), *_of_pictures(tensors))
    }
    usual = [path for path in modules if re.fullmatch(r"layers/attention/(q|v|qkv)", path)]
    if wanted := DEFAULT_TARGETS.get(hf_config["model_type"]):
        usual = [path for path, names in modules.items() if names[0].rpartition(".")[2] in wanted]
    return Names(modules, tensors, tuple(usual))


@functools.cache
def linear_layers(config: DecoderConfig) -> tuple[str, ...]:
    """The paths of a block's `Linear` modules that are linear layers in transformers too, where experts and the router
    to them are none.
    """
    block = nnx.eval_shape(lambda: Block(config))
    found = ["/".join(map(str, path)) for path, module in nnx.iter_modules(block) if isinstance(module, Linear)]
    return tuple(sorted(f"layers/{path}" for path in found if path != "moe/router"))


def _of_pictures(tensors: Mapping[str, tuple[str, ...]]) -> list[str]:
    """The paths of the linear layers of a tower, and of the projector behind it: what is no `.weight` is no layer."""
    kernel = re.compile(r"((?:\w+/)+layers/(?:attention|mlp)/\w+|projector/\w+)/kernel")
    found = [match for path in tensors if (match := kernel.fullmatch(path))]
    return sorted(match[1] for match in found if all(name.endswith(".weight") for name in tensors[match[0]]))


def target_modules(
    names: Names, targets: Sequence[str] | str | None, *, exclude: Sequence[str] = (), patterns: bool = False
) -> tuple[str, ...]:
    """The paths of the linear layers that get an adapter, by peft's rules.

    `targets` are whole module names or their ends, `q_proj` or `self_attn.q_proj`; with `patterns` regular expressions
    of whole names; "all-linear" all linear layers but the output head; None the family's usual ones. `exclude` are
    regular expressions of whole names.
    """
    excluded, without = set[str](), set[str]()
    for pattern in exclude:
        matches = _compiled(pattern, "peft.lora_exclude_modules").fullmatch
        if not (hit := set(filter(matches, _every_module(names)))):
            raise ValueError(f"peft.lora_exclude_modules: {pattern!r} matches no module of this model")
        without |= hit
        excluded |= _of_all_layers(names.modules, matches, pattern)
    if targets is None:
        chosen = set(names.default)
    elif targets == ALL_LINEAR or list(targets) == [ALL_LINEAR]:
        chosen = set(names.modules)
    else:
        chosen = set()
        for target in targets:
            chosen |= _modules_called(names, target, patterns=patterns, without=without)
    return tuple(sorted(chosen - excluded))


def _modules_called(names: Names, target: str, *, patterns: bool, without: Collection[str]) -> set[str]:
    key = "peft.lora_target_modules"
    matches = _compiled(target, key).fullmatch if patterns else _is_end(target)
    found = _of_all_layers(names.modules, matches, target)
    own = {name.removesuffix(".weight") for name in _flat(names.tensors) if name.endswith(".weight")}
    other = own - _flat(names.modules) - set(without)
    if hit := sorted(filter(matches, other if found else _every_module(names))):
        raise ValueError(
            f"not implemented yet: {key}: an adapter on {hit[0]}, which is no linear layer; "
            "peft.lora_modules_to_save can train it whole, and peft.lora_exclude_modules leave it out"
        )
    if found:
        return found
    raise ValueError(
        f"{key}: {target!r} is no module of this model{_nearest(target, map(_last, _flat(names.modules)))}"
    )


def whole_leaves(names: Names, modules: Sequence[str]) -> tuple[str, ...]:
    """The paths of all leaves in modules whose name ends so, `embed_tokens` or `mlp`: peft's `modules_to_save`."""
    found: set[str] = set()
    for module in modules:

        def inside(tensor: str, module: str = module) -> bool:
            return any(above.endswith(module) for above in _above(tensor))

        matched = _of_all_layers(names.tensors, inside, module)
        if not matched:
            every = map(_last, _every_module(names))
            raise ValueError(
                f"peft.lora_modules_to_save: {module!r} is no module of this model{_nearest(module, every)}"
            )
        found |= matched
    return tuple(sorted(found))


def frozen_leaves(names: Names, layers: Sequence[str]) -> frozenset[str]:
    """The paths of all leaves under these dotted paths from the model's root, `model.embed_tokens`, each of which may
    be a regular expression; or of one of PARTS, of a model that has it.
    """
    found: set[str] = set()
    sees = any(map(PARTS["vision_encoder"], names.tensors))
    for layer in layers:
        key = "model.freeze_layers"
        if layer in PARTS and sees:
            found |= set(filter(PARTS[layer], names.tensors))
            continue
        # In older versions of transformers the parts of a model that sees stood one step further up, at its root.
        root = r"(?:model\.)?" if sees else ""
        pattern = re.compile(rf"{root}(?:{_compiled(layer, key).pattern})(?:\..*)?")
        matched = _of_all_layers(names.tensors, pattern.fullmatch, layer)
        if not matched:
            parts = {above for each in names.tensors.values() for above in _above(each[0])}
            raise ValueError(f"{key}: {layer!r} is no part of this model{_nearest(layer, parts)}")
        found |= matched
    return frozenset(found)


def short_names(names: Names, modules: Collection[str]) -> list[str]:
    """Ends of module names that mean these paths and no others: `q_proj`, or more of it where that is not enough, or
    whole names of all layers where a part of the model has a module that is called the same, and no adapter.
    """
    every, adapted = _every_module(names), {name for path in modules for name in names.modules[path]}
    short: set[str] = set()
    for path in modules:
        own = set(names.modules[path])
        words = names.modules[path][0].split(".")
        ends = (".".join(words[-length:]) for length in range(1, len(words)))
        meant = ((end, set(filter(_is_end(end), every))) for end in ends)
        short |= next(({end} for end, found in meant if own <= found <= adapted), own)
    return sorted(short)


def _of_all_layers(table: Mapping[str, tuple[str, ...]], matches: Callable[[str], Any], asked: str) -> set[str]:
    """The paths whose names match, in all layers or in none."""
    found = set()
    for path, names in table.items():
        count = sum(bool(matches(name)) for name in names)
        if 0 < count < len(names):
            raise ValueError(
                f"not implemented yet: {asked!r} selects {count} of the {len(names)} layers of {path}; say all of them"
            )
        if count:
            found.add(path)
    return found


def _is_end(target: str) -> Callable[[str], bool]:
    return lambda name: name == target or name.endswith(f".{target}")


def _compiled(pattern: str, key: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{key}: {pattern!r} is no regular expression: {error}") from None


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight").removesuffix(".bias")


def _above(tensor: str) -> list[str]:
    """The module that holds a tensor, and all around it."""
    words = _module(tensor).split(".")
    return [".".join(words[:length]) for length in range(1, len(words) + 1)]


def _every_module(names: Names) -> set[str]:
    return {above for each in names.tensors.values() for name in each for above in _above(name)}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _flat(table: Mapping[str, tuple[str, ...]]) -> set[str]:
    return {name for names in table.values() for name in names}


def _nearest(asked: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(asked, sorted({name for name in names if not name.isdigit()}), n=4, cutoff=0.3)
    return f"; nearest: {', '.join(near)}" if near else ""
