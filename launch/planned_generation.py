"""The answers of a planned run that learns from its own: the block of decode steps that its engine runs, its cache, and
what a device holds beside them.

S slots, P places of a slot in the cache, at the end, when every answer is as long as it may be.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from configs import derived
from configs.methods import GRPO
from launch import assemble
from launch.ahead import Found, compiled, placed
from launch.chips import Target
from launch.data import limit_of
from launch.estimate import gathered_bytes, lasting_bytes, sent_to_gather, split_bytes
from launch.grpo import learning_of, slots_of
from launch.planned_batch import LENGTH, Planned
from models import slots
from models.decoding import for_decoding
from models.engine import STOPS, places_of
from models.generate import BLOCK
from models.lora import merged
from models.sharding import ROWS, nested, parameter_shardings, paths, replicas


class Generation(NamedTuple):
    """A generation without a number of it: slots and places, the parameters as decoding reads them with their config,
    and where every slot stands.
    """

    slots: int
    places: int
    decoding: Any
    config: Any
    rows: slots.Rows
    prompts: int  # that are prefilled together and wait for slots


def generation_of(planned: Planned) -> Generation | None:
    """What a run generates at a time; None where it learns from others' answers."""
    config, model, mesh = planned.config, planned.model, planned.mesh
    if config.training.trainer_type not in GRPO:
        return None
    count = slots_of(config, mesh)
    count += -count % replicas(mesh)
    prompt = limit_of(config).length or LENGTH
    places = places_of(prompt + derived.completion_length(config), prompt)
    params = merged(*assemble.abstract_parts(model))
    made: dict[str, Any] = {}

    def decoded(params: Any) -> Any:
        made["params"], made["config"] = for_decoding(params, config=model.config, compute=planned.compute, apart=False)
        return made["params"]

    decoding = jax.eval_shape(decoded, params)
    vision = model.config.vision
    looks = 0 if vision is None or vision.further is None else vision.tiles * (vision.tile + vision.class_token)
    rows = jax.eval_shape(
        lambda: slots.empty_rows(
            config=model.config,
            slots=count,
            places=places,
            dtype=planned.compute.dtype,
            apart=False,
            penalises=learning_of(config).penalises,
            looks=looks,
        )
    )
    asked = derived.rollout(config, replicas=replicas(mesh))
    return Generation(count, places, decoding, made["config"], rows, min(asked.prompts, -(-count // asked.generations)))


def cache_bytes(generation: Generation, mesh: Any) -> float:
    """Bytes a device of the keys and values of all slots, and of what they look at."""
    leaves = jax.tree.leaves((generation.rows.cache, generation.rows.sight))
    return float(sum(_place(leaf, mesh)[1] for leaf in leaves))


def copied_bytes(planned: Planned, generation: Generation) -> float:
    """Bytes a device of what decoding has in another dtype than training, from the first answer to the last."""
    own = paths(merged(*assemble.abstract_parts(planned.model)))
    here = paths(generation.decoding)
    changed = nested({path: leaf for path, leaf in here.items() if leaf.dtype != own[path].dtype})
    return split_bytes(changed, planned.mesh)


def passing_bytes(planned: Planned, generation: Generation) -> dict[str, float]:
    """About how many bytes a device holds while it decodes, beside what lasts: its copies of parameters, the cache, the
    layers in the dtype of the products (all of them, for a block of steps), and the logits of all slots.
    """
    mesh, config, width = planned.mesh, planned.model.config, planned.compute.dtype.itemsize
    layers = {name: part for name, part in generation.decoding.items() if name == "layers"}
    narrow = split_bytes(layers, mesh) != split_bytes(layers, mesh, width=width)
    copies = copied_bytes(planned, generation) + (split_bytes(layers, mesh, width=width) if narrow else 0.0)
    return {
        "copies of parameters": copies,
        "cache": cache_bytes(generation, mesh),
        "gathered weights": 2 * gathered_bytes(layers, mesh, width) / config.layers,
        "logits": 3 * 4 * generation.slots / replicas(mesh) * config.vocabulary,
    }


def compiled_block(planned: Planned, generation: Generation) -> Found:
    """The engine's block of decode steps compiled for the devices of the mesh; `ahead.TooLarge` where it does not fit.
    What is said is of all steps of the block.
    """
    mesh = planned.mesh
    rows = jax.tree.map(lambda leaf: placed(leaf, _place(leaf, mesh)[0]), generation.rows)
    decoding = placed(generation.decoding, parameter_shardings(generation.decoding, mesh))
    flags = jax.ShapeDtypeStruct((generation.slots,), jnp.bool_)
    key, stops = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((STOPS,), jnp.int32)
    settings = {
        "config": generation.config,
        "compute": dataclasses.replace(planned.compute, longest_document=None),
        "sampling": learning_of(planned.config),
        "steps": BLOCK,
        "until_free": False,
    }
    return compiled(slots.decode, (decoding, rows, flags, key, stops), settings, mesh=mesh)


def needed_bytes(planned: Planned, generation: Generation, found: Found | None = None) -> float:
    """Bytes a device of a generation: what lasts, and what the block has beside it, by the compiler or by formulas."""
    if found is None:
        return sum(lasting_bytes(planned).values()) + sum(passing_bytes(planned, generation).values())
    own = paths(merged(*assemble.abstract_parts(planned.model)))
    here = paths(generation.decoding)
    shared = nested({path: leaf for path, leaf in here.items() if leaf.dtype == own[path].dtype})
    return sum(lasting_bytes(planned).values()) + found.needed - split_bytes(shared, planned.mesh)


def times_of(planned: Planned, goal: Target, generation: Generation, *, sent: float | None) -> dict[str, float]:
    """Seconds that a step of decoding takes at least: all weights and the cache read once; and so many bytes sent, by
    formula those that gather the weights.
    """
    mesh, width = planned.mesh, planned.compute.dtype.itemsize
    tied = planned.model.config.tied_head
    read = {name: part for name, part in generation.decoding.items() if tied or name != "embed"}
    if sent is None:
        sent = sent_to_gather(read, mesh, width)
    memory = gathered_bytes(read, mesh, width) + cache_bytes(generation, mesh)
    return {"memory": memory / goal.chip.hbm_rate, "links between chips": sent / goal.chip.link_rate}


def _place(leaf: jax.ShapeDtypeStruct, mesh: Any) -> tuple[NamedSharding, int]:
    """Where an array of the slots lies, and its bytes a device: caches [n, S, K, P, H] by rows and heads, the rest
    whole.
    """
    heads = "tensor" if leaf.ndim == 5 and leaf.shape[2] % mesh.shape["tensor"] == 0 else None
    place = NamedSharding(mesh, PartitionSpec(*((None, ROWS, heads) if leaf.ndim == 5 else ())))
    return place, math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
