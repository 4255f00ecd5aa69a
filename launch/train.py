"""`einkorn train`: put a run together from its configuration, train, and leave a model that transformers loads."""

import contextlib
import dataclasses
import io
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from configs import derived
from configs.load import Loaded, dump, plain
from configs.methods import GRPO
from input_pipeline.inspect import print_row
from input_pipeline.pipeline import Feed
from launch import assemble, distributed
from launch.assemble import Model
from launch.data import (
    described,
    evaluation,
    first_rows,
    mean_length,
    rows_per_step,
    shares,
    steps_of,
    train_data,
    used,
    validation_data,
)
from launch.export import Described, write_adapter, write_model
from launch.fellows import Together
from launch.flops import flops_of
from launch.grpo import of_own_answers, own_answers
from launch.method import method_of
from launch.samples import sample_answers
from launch.update import learning_rate_of, step_of
from models.attention_check import check_attention
from models.decoder import Params
from models.lora import Parts, merged
from models.weights import processor_files
from trainers.checkpoint import Checkpoints, read_meta
from trainers.environment import describe_environment
from trainers.loop import Every, Run, Schedule
from trainers.loop import train as run_loop
from trainers.metrics import Metrics
from trainers.perplexity import text_measures
from trainers.profiler import Profiler, When
from trainers.progress import Progress, final_block, serve_command, start_block
from trainers.report import Sample, write_report
from trainers.resume import refuse_other_config
from trainers.step import Step, TrainState
from trainers.throughput import Throughput, peak_flops

log = logging.getLogger("einkorn")


def run(loaded: Loaded, *, allow_config_change: bool = False) -> None:
    """Run the configuration to its end. What a user can mend is a ValueError; see `trainers.loop.train` for the
    rest.
    """
    config = loaded.config
    distributed.start()
    with Together():
        _run(config, allow_config_change=allow_config_change)


def _run(config: ConfigDict, *, allow_config_change: bool) -> None:
    mesh = assemble.prepare_devices(config)
    model = assemble.open_model(config)
    folder = Path(config.training.output_dir)
    with (
        feed_of(config, model, mesh) as feed,
        Checkpoints(folder, keep=config.training.keep_checkpoints) as checkpoints,
    ):
        _train(config, mesh, model, feed, checkpoints, allow_config_change=allow_config_change)


@contextlib.contextmanager
def feed_of(config: ConfigDict, model: Model, mesh: Mesh, *, to_train: bool = True) -> Iterator[Feed]:
    """The batches to train on: of rows, or of the policy's own answers, whose reward functions then run as long as this
    is open. Not `to_train`, nothing is computed with the model.
    """
    if config.training.trainer_type not in GRPO:
        yield train_data(config, model, mesh, to_train=to_train)
        return
    with own_answers(config, model, mesh) as feed:
        yield feed


def _train(
    config: ConfigDict, mesh: Mesh, model: Model, feed: Feed, checkpoints: Checkpoints, *, allow_config_change: bool
) -> None:
    training, folder = config.training, checkpoints.folder
    plan = schedule_of(config, mesh, feed)
    asks = training.trainer_type in GRPO
    validation = validation_data(config, model, mesh) if training.eval_strategy != "no" and not asks else None
    learning_rate = learning_rate_of(config, mesh, plan.steps)
    rows = rows_of(feed, validation)
    method = method_of(config, model, **rows, together=feed.together)
    check_attention(model.config, assemble.compute_of(config, model, **rows), mesh=mesh, length=feed.longest)
    step = step_of(config, model, mesh, learning_rate, method)
    resumed = _resume(config, checkpoints, step, model, feed, allow_config_change=allow_config_change)
    if resumed is None:
        parts = first_weights(config, model, mesh)
        beside = method.beside(parts, given_away=True)
        state, meta = step.init(parts.trained), dict[str, Any]()
        frozen = parts.frozen
    else:
        state, meta = resumed
        beside, frozen = method.frozen(assemble.abstract_parts(model)), None
        if jax.tree.leaves(beside):
            parts = first_weights(config, model, mesh)
            beside, frozen = method.beside(parts, given_away=False), parts.frozen
    start = int(state.step)
    with (
        Metrics(
            folder,
            resume_step=start if resumed else None,
            tensorboard=training.enable_tensorboard,
            logging_dir=training.logging_dir,
            wandb=_wandb(config, meta) if training.enable_wandb else None,
        ) as metrics,
        Progress(plan.steps, done_steps=start) as progress,
        _profiled(config, step, folder, start, progress.note) as step,
    ):
        progress.note(_beginning(config, mesh, model, feed, plan, start))
        if training.log_model_summary:
            progress.note(assemble.summary(model, mesh))
        if training.log_examples:
            progress.note(_examples(config, feed, model))
        going = Run(
            step=step,
            frozen=beside,
            mesh=mesh,
            batches=feed.batches,
            schedule=plan,
            learning_rate=learning_rate,
            metrics=metrics,
            meter=_meter(model, mesh, plan, start, feed, forwards=method.forwards),
            progress=progress,
            checkpoints=checkpoints,
            **(of_own_answers(config, model, feed, beside, progress.note, start) if asks else {}),
            evaluation=evaluation(validation),
            measures=_measures(config, validation),
            meta={
                "config": plain(config),
                "config_text": dump(config),
                "rows_per_step": rows_per_step(config, mesh),
                "model": {
                    "folder": str(model.folder),
                    "hf_config": model.hf_config,
                    "dtype": model.dtype.name,
                    "chat_template": config.model.chat_template,
                    "base": model.base,
                    "lora": None if model.lora is None else dataclasses.asdict(model.lora),
                },
            },
            tokens_seen=int(meta.get("tokens_seen", 0)),
        )
        began = time.monotonic()
        state = run_loop(going, state)
        done = int(state.step)
        metrics.write_trainer_state(
            metrics.trainer_state(
                done,
                max_steps=plan.steps,
                epoch=done / plan.steps_per_epoch if plan.steps_per_epoch else 0.0,
                num_train_epochs=int(training.num_train_epochs),
                saved_steps=checkpoints.steps(),
            )
        )
        parts_now = Parts(state.params, frozen)
        del state
        if training.save_final_model:
            export(folder, parts_now, model, mode=config.peft.peft_save_mode)
        samples = sample_answers(
            config,
            model,
            packed=rows["packed"],
            after=merged(*parts_now),
            before=lambda: _at_first(config, model, mesh, frozen),
        )
        report = _report(config, model, feed, samples, folder) if jax.process_index() == 0 else None
        if said := used(feed):
            progress.note(said)
        progress.note(
            final_block(
                output_dir=training.output_dir,
                steps=done - start,
                seconds=time.monotonic() - began,
                values={},
                report=report,
                exported=training.save_final_model,
                adapter_of=_adapter_of(config, model),
                sees=model.processor is not None,
            )
        )


def schedule_of(config: ConfigDict, mesh: Mesh, feed: Feed) -> Schedule:
    """How long the run goes, and what is due when."""
    training = config.training
    steps = steps_of(config, mesh).run or feed.steps
    assert steps is not None
    by_epoch = {"logging_strategy: epoch": training.logging_strategy, "eval_strategy: epoch": training.eval_strategy}
    by_epoch["save_epoch: true"] = "epoch" if training.save_epoch and training.save_steps <= 0 else "no"
    for setting, strategy in by_epoch.items():
        if strategy == "epoch" and feed.steps_per_epoch is None:
            raise ValueError(f"training.{setting}: where an epoch of a stream ends is not known; count in steps")

    def every(strategy: str, count: int) -> Every:
        return Every(steps=count if strategy == "steps" else None, epoch=strategy == "epoch")

    save = Every(steps=training.save_steps) if training.save_steps > 0 else Every(epoch=training.save_epoch)
    return Schedule(
        steps=steps,
        steps_per_epoch=feed.steps_per_epoch,
        log=every(training.logging_strategy, training.logging_steps),
        log_first=training.logging_first_step,
        evaluate=every(training.eval_strategy, training.eval_steps),
        save=save,
    )


def first_weights(config: ConfigDict, model: Model, mesh: Mesh) -> Parts:
    """The parameters that training starts from, and those that are frozen."""
    return assemble.load_parts(model, mesh, pretrained=config.model.load_pretrained_weights, seed=config.training.seed)


def _at_first(config: ConfigDict, model: Model, mesh: Mesh, frozen: Params | None) -> Params:
    """The whole model as training found it; where a new adapter is all that is trained, that is what is frozen."""
    lora = model.lora
    if frozen is not None and lora and not lora.whole and model.adapter is None and lora.init != "random":
        return frozen
    return merged(*first_weights(config, model, mesh))


def rows_of(feed: Feed, validation: Feed | None) -> dict[str, Any]:
    """What attention is told of the rows of either: the most tokens that see one another, beyond which it need not
    reach back, and whether a row may hold several documents.
    """
    feeds = [feed] if validation is None else [feed, validation]
    longest = max(each.longest_document for each in feeds)
    return {"longest_document": longest, "packed": any(each.packed for each in feeds)}


@contextlib.contextmanager
def _profiled(config: ConfigDict, step: Step, folder: Path, start: int, say: Callable[[str], None]) -> Iterator[Step]:
    """The step, of which some are profiled where the configuration asks for it."""
    profiler = config.training.profiler
    host, devices, schedule = profiler.enable_cpu_profiling, profiler.enable_cuda_profiling, profiler.schedule
    if not (host or devices):
        yield step
        return
    when = When()
    if schedule.enable_schedule:
        when = When(schedule.skip_first, schedule.wait, schedule.warmup, schedule.active, schedule.repeat)
    to = Path(profiler.save_dir).expanduser() if profiler.save_dir else folder / "profiler"
    with Profiler(to, when, done_steps=start, host=host, say=say) as of:
        yield step._replace(train_leaves=of.around(step.train_leaves))


def export(folder: Path, parts: Parts, model: Model, *, mode: str) -> None:
    """Write what the run made to `folder`: a model, or an adapter; or, where `mode` is MERGED, the model with the
    adapter merged in, and the adapter in the folder `adapter` there.
    """
    about = Described(
        config=model.config,
        hf_config=model.hf_config,
        dtype=model.dtype,
        lora=model.lora,
        base=model.base,
        tokenizer=model.tokenizer,
        generation_config=model.generation_config,
        processor=processor_files(model.folder),
    )
    if model.lora is None or mode == "MERGED":
        write_model(folder, parts, about)
    if model.lora is not None:
        write_adapter(folder / "adapter" if mode == "MERGED" else folder, parts.trained, about)


class _Resumed(NamedTuple):
    state: TrainState
    meta: dict[str, Any]


def _resume(
    config: ConfigDict, checkpoints: Checkpoints, step: Step, model: Model, feed: Feed, *, allow_config_change: bool
) -> _Resumed | None:
    """The state to go on from, if the configuration asks for one and there is one; also moves the feed to its place."""
    training = config.training
    which: str | int | None = training.resume_from_checkpoint
    if which is None and training.try_resume_from_last_checkpoint:
        which = checkpoints.latest()
        if which is None:
            log.warning("no checkpoint in %s: starting afresh", checkpoints.folder)
    if which is None:
        return None
    meta = read_meta(checkpoints.find(which))
    for line in refuse_other_config(
        meta["config"],
        plain(config),
        same_rows_per_step=feed.batches.get_state()["data"]["rows_per_step"] == meta["rows_per_step"],
        allowed=allow_config_change,
        how_to_allow="pass --allow-config-change",
    ):
        log.warning("since the checkpoint: %s", line)
    abstract = jax.eval_shape(step.init, assemble.abstract_parts(model).trained)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, step.shardings
    )
    restored = checkpoints.restore(which, abstract)
    feed.batches.set_state(restored.data_state)
    return _Resumed(restored.state, restored.meta)


def _measures(config: ConfigDict, validation: Feed | None) -> Callable[[Any], dict[str, float]]:
    """What an evaluation says beside its losses: of pretraining, how well the text is predicted."""
    if config.training.trainer_type != "OUMI" or validation is None:
        return lambda sums: {}
    return lambda sums: text_measures(sums, text_bytes=validation.counts.text_bytes)


def _meter(model: Model, mesh: Mesh, plan: Schedule, start: int, feed: Feed, *, forwards: int) -> Throughput:
    flops = flops_of(model, context=mean_length(feed.counts, default=feed.longest), forwards=forwards)
    device = mesh.devices.flat[0]
    return Throughput(
        total_steps=plan.steps,
        done_steps=start,
        devices=mesh.size,
        flops_per_token=flops.token,
        flops_per_patch=flops.patch,
        flops_per_pair=flops.pair,
        device_peak=peak_flops(device.device_kind),
    )


def _beginning(config: ConfigDict, mesh: Mesh, model: Model, feed: Feed, plan: Schedule, start: int) -> str:
    """What the log begins with."""
    parameters = assemble.parameter_count(model)
    filled = [] if feed.useful is None else [("filled", f"{100 * feed.useful:.1f} % of all places hold a token")]
    return start_block(
        title=f"einkorn: {config.training.trainer_type} of {config.model.model_name}",
        device_kind=mesh.devices.flat[0].device_kind,
        devices=mesh.size,
        processes=jax.process_count(),
        mesh=mesh.shape,
        parameters=parameters.total,
        trained=parameters.trained,
        rows_per_step=rows_per_step(config, mesh),
        row_length=feed.longest,
        total_steps=plan.steps,
        done_steps=start,
        epochs=config.training.num_train_epochs if steps_of(config, mesh).run is None else None,
        resumed_from=f"checkpoint-{start}" if start else None,
        output_dir=config.training.output_dir,
        more=[("data", described(feed)), *filled],
    )


def _examples(config: ConfigDict, feed: Feed, model: Model) -> str:
    """The first rows of the training data, token by token, as `einkorn inspect` shows them."""
    console = Console(file=io.StringIO(), width=120)
    data = feed.data or first_rows(config, "train", model)
    for row in range(min(3, len(data.store))):
        print_row(console, data, row, model.tokenizer, ids=True)
    return console.file.getvalue()  # type: ignore[attr-defined]


def _report(config: ConfigDict, model: Model, feed: Feed, samples: list[Sample], folder: Path) -> Path:
    """The page that shows what the run did; reported beside the model."""
    total, counts = assemble.parameter_count(model).total, feed.counts
    period = "read" if feed.data is None else "in an epoch"
    return write_report(
        folder,
        title=derived.run_name(config) or f"{config.training.trainer_type} of {Path(config.model.model_name).name}",
        subtitle=f"{total:,} parameters, {counts.used:,} rows, {counts.tokens:,} tokens {period}{shares(feed)}",
        config_text=dump(config),
        environment=describe_environment(),
        samples=samples,
        counts={"train": counts.table()},
        commands=(serve_command(folder, _adapter_of(config, model)), f"einkorn chat -m {folder}"),
    )


def _adapter_of(config: ConfigDict, model: Model) -> str | None:
    """The name of the model beside which the output folder's adapter stands; None where the folder is a model."""
    return None if model.lora is None or config.peft.peft_save_mode == "MERGED" else model.base


def _wandb(config: ConfigDict, meta: dict[str, Any]) -> dict[str, Any]:
    name = derived.run_name(config)
    return {
        "config": plain(config),
        **({"name": name} if name else {}),
        **({"id": meta["wandb_id"]} if meta.get("wandb_id") else {}),
    }
