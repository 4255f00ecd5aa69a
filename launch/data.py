"""The data of a run from its configuration: batches to train and to evaluate on, and what there is to say of them."""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import derived, verl
from configs.methods import GRPO, PREFERENCE
from input_pipeline.batches import Part
from input_pipeline.counts import Counts
from input_pipeline.pipeline import Feed, LayOut, eval_feed, train_feed
from input_pipeline.prompts import Limit, Prompts, read_prompts
from input_pipeline.reading import Data, Reading, preview, read_data
from launch.assemble import Model
from launch.preferences import lay_out_of
from models.sharding import batch_sharding, replicas

log = logging.getLogger("einkorn")


def train_data(config: ConfigDict, model: Model, mesh: Mesh, *, to_train: bool = True) -> Feed:
    """The training batches; logs what became of the rows. Not `to_train`, nothing is computed with the model."""
    training = config.training
    rows = rows_per_step(config, mesh)
    feed = train_feed(
        config.data,
        model.tokenizer,
        rows_per_step=rows,
        accumulation=training.gradient_accumulation_steps,
        epochs=training.num_train_epochs if steps_of(config, mesh).run is None else None,
        reading=reading_of(config, model),
        shuffle_rows=derived.shuffles(config),
        drop_last=training.trainer_kwargs.dataloader_drop_last,
        part=part_of(mesh, rows // training.gradient_accumulation_steps),
        workers=derived.workers(config, cores=os.cpu_count() or 1),
        lay_out=_lay_out(config, model, mesh, to_train),
    )
    for notice in feed.notices:
        log.info(notice)
    return feed


def validation_data(config: ConfigDict, model: Model, mesh: Mesh, *, to_train: bool = True) -> Feed | None:
    """The batches of the validation split, if there is one, as `train_data`."""
    if not config.data.validation.datasets:
        return None
    validation = eval_feed(
        config.data,
        model.tokenizer,
        rows_per_step=config.training.per_device_eval_batch_size * replicas(mesh),
        reading=reading_of(config, model),
        lay_out=_lay_out(config, model, mesh, to_train),
    )
    for notice in validation.notices:
        log.info(notice)
    return validation


def _lay_out(config: ConfigDict, model: Model, mesh: Mesh, to_train: bool) -> LayOut | None:
    if config.training.trainer_type not in PREFERENCE:
        return None
    return lay_out_of(config, model, mesh, compute_reference=to_train)


def first_rows(config: ConfigDict, split: str, model: Model) -> Data | Prompts:
    """The rows of a split to look at: all of them, or the first few hundred of a stream."""
    if config.training.trainer_type in GRPO:
        return prompts_of(config, model, split)
    read = preview if config.data[split].stream else read_data
    return read(config.data[split], model.tokenizer, reading=reading_of(config, model), what=split)


def prompts_of(config: ConfigDict, model: Model, split: str) -> Prompts:
    """The prompts of a split, for methods that learn from their own answers."""
    return read_prompts(
        config.data[split],
        model.tokenizer,
        reading=reading_of(config, model),
        limit=limit_of(config),
        template_kwargs=template_kwargs(config),
        what=split,
    )


def limit_of(config: ConfigDict) -> Limit:
    """The longest prompt, and what becomes of a longer one."""
    length, too_long = derived.prompt_length(config)
    return Limit(length, too_long)  # type: ignore[arg-type]  # one of its words


def template_kwargs(config: ConfigDict) -> dict[str, Any]:
    """Variables of the chat template."""
    if config.training.trainer_type == "VERL_GRPO":
        return dict(verl.settings(config).template_kwargs)
    return dict(config.training.trainer_kwargs.chat_template_kwargs or {})


def reading_of(config: ConfigDict, model: Model) -> Reading:
    """How rows become tokens: the longest row, which tokens are trained, how pictures are prepared."""
    kwargs, cache = config.training.trainer_kwargs, config.training.token_cache_dir
    return Reading(
        max_length=derived.max_length(config),
        seed=config.training.data_seed,
        trainer=config.training.trainer_type,
        packing=derived.packing(config),
        completion_only_loss=kwargs.completion_only_loss,
        assistant_only_loss=kwargs.assistant_only_loss,
        text_field=kwargs.dataset_text_field,
        answers=kwargs.answer_tokens if config.training.trainer_type in PREFERENCE else None,
        cache=Path(cache).expanduser() if cache else None,
        processor=model.processor,
    )


def rows_per_step(config: ConfigDict, mesh: Mesh) -> int:
    """Rows of one optimizer step over all devices: those that share a row (tensor, context) count as one."""
    training = config.training
    if training.trainer_type in GRPO:
        sizes = derived.rollout(config, replicas=replicas(mesh))
        return sizes.microbatch * sizes.accumulation
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * replicas(mesh)


def steps_of(config: ConfigDict, mesh: Mesh) -> derived.Steps:
    """Optimizer steps of the run and of the parts of its schedule, as far as they are set; verl counts generations."""
    found = derived.steps(config, rows_per_step=rows_per_step(config, mesh))
    if config.training.trainer_type != "VERL_GRPO" or found.run is None:
        return found
    return found._replace(run=found.run * derived.rollout(config, replicas=replicas(mesh)).updates)


def part_of(mesh: Mesh, rows: int) -> Part | None:
    """Which of the rows of a microbatch the devices of this process hold; None where it is the only process."""
    if jax.process_count() == 1:
        return None
    shape = (1, rows, mesh.shape["context"])
    places = batch_sharding(mesh).addressable_devices_indices_map(shape).values()
    held = [place[1].indices(rows) for place in places if place is not None]
    first, stop = min(start for start, _, _ in held), max(stop for _, stop, _ in held)
    return Part(first, stop - first, rows)


def evaluation(validation: Feed | None) -> Callable[[], Iterator[Any]] | None:
    """A function that begins a pass over the validation split, or None where nothing is evaluated."""
    if validation is None:
        return None
    beginning = validation.batches.get_state()

    def again() -> Iterator[Any]:
        validation.batches.set_state(beginning)
        return validation.batches

    return again


def described(feed: Feed) -> str:
    """What is known of the rows before the first step."""
    if feed.data is None:
        return "a stream, read as it comes"
    counts = feed.data.counts
    if isinstance(feed.data, Prompts):
        return f"{counts.used:,} prompts of {feed.data.longest:,} tokens or less" + _refused(counts) + shares(feed)
    read = "" if counts.used == counts.read else f" of {counts.read:,}"
    text = f"{counts.used:,}{read} rows, {counts.tokens:,} tokens, {counts.trained_tokens:,} of them trained"
    return text + _refused(counts) + shares(feed)


def used(feed: Feed) -> str | None:
    """What became of the rows of a stream until now, as this process has read them; None where it was known before."""
    if feed.data is not None:
        return None
    counts = feed.counts
    return f"read {counts.read:,} rows, {counts.tokens:,} tokens" + _refused(counts) + shares(feed)


def _refused(counts: Counts) -> str:
    """The rows that were not used, and those that were cut, where there are such."""
    kinds = f" ({counts.refused()})" if counts.bad else ""
    refused = {
        f"bad{kinds}": counts.bad,
        "left out": counts.left_out,
        "without a trained token": counts.untrained,
        "cut to length": counts.over_long,
    }
    return "".join(f"; {number:,} {what}" for what, number in refused.items() if number)


def shares(feed: Feed) -> str:
    """Of several datasets the share that each has in the rows."""
    seen = feed.seen()
    return "; " + ", ".join(f"{100 * share:.1f} % {name}" for name, share in seen.items()) if len(seen) > 1 else ""


def mean_length(counts: Counts, *, default: int) -> float:
    """Tokens of a row on average; `default` where none was read yet."""
    return counts.tokens / counts.used if counts.used else float(default)
