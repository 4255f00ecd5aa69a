"""`einkorn check`: everything that can be found out without training, and who set what."""

import math
import os
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from configs.load import Loaded, explain
from configs.methods import GRPO
from input_pipeline.pipeline import Feed
from launch import assemble
from launch.assemble import Model
from launch.data import described, prompts_of, rows_per_step, validation_data
from launch.method import method_of
from launch.train import feed_of, schedule_of
from launch.update import learning_rate_of, step_of
from models.sharding import parameter_shardings
from models.weights import check_weights

GIB = 2**30


def run(loaded: Loaded) -> None:
    """Print the effective configuration, then what was found; the first thing that cannot work is a ValueError."""
    config = loaded.config
    console = Console()
    console.print(_settings(loaded))
    mesh = assemble.prepare_devices(config)
    model = assemble.open_model(config)
    if config.model.load_pretrained_weights:
        check_weights(model.folder, model.config)
    with feed_of(config, model, mesh, to_train=False) as feed:
        found, needed = _found(config, mesh, model, feed)
    for name, text in found:
        console.print(f"{name:>26}  {text}", highlight=False, markup=False, soft_wrap=True)
    console.print(_verdict(needed, mesh))


def _found(config: ConfigDict, mesh: Mesh, model: Model, feed: Feed) -> tuple[list[tuple[str, str]], float]:
    """What there is to say, a name and a text each, and the bytes that a device needs in all."""
    if config.training.trainer_type in GRPO:
        if config.data.validation.datasets:
            prompts_of(config, model, "validation")
    elif validation := validation_data(config, model, mesh, to_train=False):
        validation.batches.close()
    plan = schedule_of(config, mesh, feed)
    learning_rate = learning_rate_of(config, mesh, plan.steps)
    needed = memory(config, mesh, model, feed, learning_rate)
    count = assemble.parameter_count(model)
    share = "" if count.trained == count.total else f", {count.trained:,} of them trained"
    found = [
        ("model", f"{model.folder}, {count.total:,} parameters in {model.dtype.name}{share}"),
        ("devices", f"{mesh.size} × {mesh.devices.flat[0].device_kind}, {_split(mesh)}"),
        (
            "data",
            described(feed),
        ),
        ("steps", f"{plan.steps:,}, each with {rows_per_step(config, mesh):,} rows of up to {feed.longest:,} tokens"),
        (
            "learning rate",
            f"{float(learning_rate(0)):.3g} at first, {float(learning_rate(plan.steps - 1)):.3g} at last",
        ),
        *((name, f"{size / GIB:.2f} GiB a device") for name, size in needed),
    ]
    feed.batches.close()
    return found, needed[-1][1]


def memory(config: ConfigDict, mesh: Mesh, model: Model, feed: Feed, learning_rate) -> list[tuple[str, float]]:
    """Bytes a device, by kind. Exact for what lies there between steps; activations by a formula, good to some 30 %."""
    how: dict[str, Any] = {"longest_document": feed.longest_document, "packed": feed.packed}
    method = method_of(config, model, **how, together=feed.together)
    step = step_of(config, model, mesh, learning_rate, method)
    parts = assemble.abstract_parts(model)
    trained, frozen = parts.trained, method.frozen(parts)
    params = _bytes(trained, parameter_shardings(trained, mesh))
    kept_as_is = 0.0 if frozen is None else _bytes(frozen, parameter_shardings(frozen, mesh))
    state = jax.eval_shape(step.init, trained)
    moments = _bytes(state.opt_state, step.shardings.opt_state)
    compute = assemble.compute_of(config, model, **how)
    accumulating = config.training.gradient_accumulation_steps > 1
    gradients = params * (2 if accumulating and model.dtype.itemsize == 2 else 1) * (2 if accumulating else 1)
    c, width = model.config, compute.dtype.itemsize
    rows = config.training.per_device_train_batch_size / feed.together
    tokens = rows * feed.longest / (mesh.shape["context"] * mesh.shape["tensor"])
    whole = width * (8 * c.width + 3 * c.heads * c.head_width + 4 * c.mlp_width)
    kept = {"none": whole, "dots": whole / 2, "full": width * c.width}[compute.remat]
    activations = tokens * (c.layers * kept + (whole if compute.remat != "none" else 0)) + 1024 * c.vocabulary * 12
    needed = [
        ("parameters", params + kept_as_is),
        ("optimizer", moments),
        ("gradients", gradients),
        ("activations, about", activations),
    ]
    return [*needed, ("in all, about", sum(size for _, size in needed))]


def _verdict(needed: float, mesh: Mesh) -> str:
    """What to make of the memory that is needed on a device, where the device says what it has."""
    there = (mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit")
    if there is None and mesh.devices.flat[0].platform == "cpu" and hasattr(os, "sysconf"):
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / mesh.size
    if there is not None and needed > there:
        return (
            f"Memory is likely not to suffice: about {needed / GIB:.2f} GiB of {there / GIB:.2f} a device. Lower "
            "training.per_device_train_batch_size or model.model_max_length, or set training.remat_policy: full."
        )
    return "Nothing stands in the way of `einkorn train`."


def _bytes(tree, shardings) -> float:
    """Bytes that one device holds of a tree of ShapeDtypeStructs."""
    sizes = jax.tree.map(
        lambda leaf, place: math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        tree,
        shardings,
    )
    return sum(jax.tree.leaves(sizes))


def _settings(loaded: Loaded) -> Table:
    table = Table(title="Configuration", title_justify="left")
    for heading in ("key", "value", "set by"):
        table.add_column(heading, overflow="fold")
    for row in explain(loaded):
        if row.origin != "default":
            table.add_row(*(Text(cell) for cell in (row.path, row.value, row.origin)))  # brackets are no markup
    table.caption = "All other keys stand at their defaults."
    return table


def _split(mesh: Mesh) -> str:
    return " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
