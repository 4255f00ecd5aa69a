"""Learning from answers of its own, from its configuration: who asks, who answers, what answers are worth.

The keys of `training.grpo`, of `trainer_kwargs` that belong to TRL_GRPO, and verl's are read here and in
`configs/derived.py`.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from configs import derived, verl
from input_pipeline.pipeline import Feed
from input_pipeline.prompts import PromptRow, Prompts, prompt_feed
from launch import assemble
from launch.assemble import Model, abstract_parts, compute_of
from launch.data import limit_of, prompts_of, reading_of, steps_of, template_kwargs
from launch.pictures import shown_of
from launch.preferences import shares_prompt
from models import vision
from models.config import Compute
from models.generate import Generated, Sampling, complete, stop_ids_of
from models.lora import Parts, merged
from models.sharding import batch_sharding, parameter_shardings, replicas
from trainers.advantages import Valued, advantages, verl_advantages
from trainers.completions import Completions
from trainers.grpo import divergences, grpo_loss, policy_logprobs, reference_logprobs
from trainers.kl_reward import KlPenalty
from trainers.loop import HostBatch, device_batch
from trainers.policy_losses import GroupPolicy
from trainers.policy_verl import VerlPolicy
from trainers.reference import Frozen, reference_leaves
from trainers.rollout import Means, Rewards, Rollouts, Shape
from trainers.scoring import Scorer, by_answer
from trainers.step import Loss, TrainState
from trainers.throughput import flops_per_token

log = logging.getLogger("einkorn")


@contextlib.contextmanager
def own_answers(config: ConfigDict, model: Model, mesh: Mesh) -> Iterator[Feed]:
    """The batches that a policy makes of its own answers; reward functions run as long as this is open."""
    from trainers.reward_workers import RewardFunctions

    training = config.training
    sizes = derived.rollout(config, replicas=replicas(mesh))
    asked = prompt_feed(
        config.data,
        model.tokenizer,
        reading=reading_of(config, model),
        prompts_per_generation=sizes.prompts,
        epochs=training.num_train_epochs if steps_of(config, mesh).run is None else None,
        limit=limit_of(config),
        template_kwargs=template_kwargs(config),
        shuffle_rows=derived.shuffles(config),
    )
    for notice in asked.notices:
        log.info(notice)
    together = answers_in_row(config, model, sizes, replicas=replicas(mesh), prompt=asked.prompts.longest)
    longest = longest_row(config, asked.prompts.longest, together)
    shape = Shape(
        group=sizes.generations,
        together=together,
        rows=sizes.microbatch // together,
        accumulation=sizes.accumulation,
        updates=sizes.updates,
        max_length=longest,
        mask_truncated=masks_truncated(config),
        seed=training.seed,
    )
    with RewardFunctions(
        training.reward_functions,
        kwargs=dict(training.reward_function_kwargs),
        timeout=training.reward_timeout,
        workers=training.reward_workers,
    ) as judge:
        means = Means(
            sample=sampler(config, model, mesh, packed=together > 1),
            judge=judge,
            value=valuer(config, judge.names),
            decode=lambda ids: model.tokenizer.decode(ids, skip_special_tokens=True),
            score=old_logprobs(config, model, mesh, longest, shared=together > 1) if sizes.updates > 1 else None,
            penalty=kl_penalty(config, model, mesh, longest, together=together),
            attempts=training.grpo.max_generation_batches if training.grpo.dynamic_sampling else 1,
            processor=None if asked.prompts.pictures is None else model.processor,
        )
        yield Feed(
            batches=Rollouts(asked.batches, means, shape),
            steps=None if asked.generations is None else asked.generations * sizes.updates,
            steps_per_epoch=asked.generations_per_epoch * sizes.updates,
            data=asked.prompts,
            longest=longest,
            longest_document=longest,
            useful=None,
            notices=asked.notices,
            packed=together > 1,
            together=together,
        )


def longest_row(config: ConfigDict, prompt: int, together: int) -> int:
    """The most tokens of a row: a prompt of so many, and so many answers behind it."""
    shared = together - 1 if together > 1 else 0  # each begins with the prompt's last token
    return prompt + together * derived.completion_length(config) + shared


def answers_in_row(config: ConfigDict, model: Model, sizes: derived.Rollout, *, replicas: int, prompt: int) -> int:
    """How many answers stand behind one copy of their prompt of so many tokens: as many of a group as a device has in a
    microbatch, or fewer where that is less arithmetic, since a row's attention grows with all of them.

    One each where `shared_prompt` is false, where the model cannot branch, and by default where a generation is cut
    into several updates, in each of which TRL has answers drawn from all groups.
    """
    asked = config.training.trainer_kwargs.shared_prompt
    if not shares_prompt(config, model) or (asked is None and sizes.updates > sizes.passes):
        return 1
    most = math.gcd(sizes.generations, sizes.microbatch // replicas)
    count, answer = assemble.parameter_count(model), derived.completion_length(config)

    def flops(together: int) -> float:
        each = flops_per_token(
            trained=count.trained_products,
            frozen=count.frozen_products,
            layers=model.config.layers,
            heads=model.config.heads,
            head_dim=model.config.head_width,
            context=prompt + together * answer,
        )
        return (prompt / together + answer) * each

    return most if asked else min((n for n in range(1, most + 1) if most % n == 0), key=flops)


def validation_prompts(config: ConfigDict, model: Model) -> Prompts | None:
    """The prompts that evaluation asks, if there are any."""
    if not config.data.validation.datasets or config.training.eval_strategy == "no":
        return None
    return prompts_of(config, model, "validation")


def masks_truncated(config: ConfigDict) -> bool:
    """Whether answers that were cut off teach nothing; verl learns from them."""
    return config.training.trainer_type == "TRL_GRPO" and config.training.trainer_kwargs.mask_truncated_completions


def evaluated_group(config: ConfigDict) -> int:
    """Answers to each prompt in evaluation."""
    if config.training.trainer_type == "VERL_GRPO":
        return verl.settings(config).evaluation.generations
    return config.training.trainer_kwargs.num_generations_eval or derived.drawing(config).generations


def sampler(
    config: ConfigDict, model: Model, mesh: Mesh, *, packed: bool
) -> Callable[[TrainState, Any, Sequence[PromptRow], int, int], list[Generated]]:
    """A function (state, frozen, prompts, generation, group) → answers, by the parameters in training; generation -1 is
    an evaluation's. Prompts are never packed; attention is computed as in training, whose rows may be.
    """
    learning = learning_of(config)
    judged = _sampling(verl.settings(config).evaluation) if config.training.trainer_type == "VERL_GRPO" else learning
    stop_ids = stop_ids_of(model.generation_config or {}, model.tokenizer)
    strings, most = derived.stop_strings(config), derived.completion_length(config)
    compute = compute_of(config, model, longest_document=None, packed=packed)
    slots = slots_of(config, mesh)

    def sample(
        state: TrainState, frozen: Any, prompts: Sequence[PromptRow], generation: int, group: int
    ) -> list[Generated]:
        asked = [prompt.ids for prompt in prompts for _ in range(group)]
        seen = [shown_of(model.processor, prompt.ids, prompt.pictures) for prompt in prompts]
        first = EVALUATION if generation < 0 else generation * len(asked)
        with jax.set_mesh(mesh):
            return complete(
                merged(state.params, frozen.model),
                model.config,
                asked,
                max_new_tokens=most,
                stop_ids=stop_ids,
                sampling=learning if generation >= 0 else judged,
                seed=config.training.seed,
                numbers=range(first, first + len(asked)),
                stop_strings=strings,
                decode=lambda ids: model.tokenizer.decode(ids, skip_special_tokens=True),
                compute=compute,
                slots=slots,
                shown=[one for one in seen for _ in range(group)],
            )

    return sample


MOST_SLOTS = 256  # answered at once; more wait
EVALUATION = 2**30  # what draws of evaluations begin to be numbered with


def slots_of(config: ConfigDict, mesh: Any) -> int:
    """How many answers of a generation are drawn at once."""
    return min(derived.rollout(config, replicas=replicas(mesh)).answers, MOST_SLOTS)


def learning_of(config: ConfigDict) -> Sampling:
    """How answers that are learned from are drawn."""
    return _sampling(derived.drawing(config))


def _sampling(drawing: verl.Drawing) -> Sampling:
    return Sampling(
        drawing.temperature,
        drawing.top_k,
        drawing.top_p,
        min_p=drawing.min_p,
        repetition_penalty=drawing.repetition_penalty,
    )


def valuer(config: ConfigDict, names: Sequence[str]) -> Callable[[Rewards, np.ndarray, int, np.ndarray | None], Valued]:
    """A function (rewards [N, F], lengths [N], group, what rewards lose [N] or None) → what answers are worth."""
    if config.training.trainer_type == "VERL_GRPO":
        says = verl.settings(config)
        return lambda rewards, lengths, group, penalties: verl_advantages(
            rewards,
            lengths,
            names=names,
            group=group,
            estimator=says.adv_estimator,
            by_std=says.norm_adv_by_std_in_grpo,
            penalties=penalties,
        )
    kwargs, weights = config.training.trainer_kwargs, derived.reward_weights(config)
    return lambda rewards, lengths, group, _: advantages(
        rewards,
        names=names,
        weights=weights,
        group=group,
        scale=kwargs.scale_rewards,
        aggregation=kwargs.multi_objective_aggregation,
    )


def old_logprobs(
    config: ConfigDict, model: Model, mesh: Mesh, longest: int, *, shared: bool
) -> Callable[[TrainState, Any, HostBatch], np.ndarray]:
    """A function (state, frozen, batch) → log-probabilities of its targets [M, B, L] as training computes them."""
    compute = compute_of(config, model, longest_document=longest, packed=shared)
    score = policy_logprobs(scorer_of(config, model, compute, shared=shared))
    return _of_each(score, model, mesh)


def kl_penalty(config: ConfigDict, model: Model, mesh: Mesh, longest: int, *, together: int) -> KlPenalty | None:
    """What lowers rewards by the divergence from the reference, if anything does: verl's `use_kl_in_reward`."""
    if config.training.trainer_type != "VERL_GRPO" or not verl.settings(config).use_kl_in_reward:
        return None
    says = verl.settings(config)
    compute = compute_of(config, model, longest_document=longest, packed=together > 1)
    scorer = scorer_of(config, model, compute, shared=together > 1)
    policy, reference = policy_logprobs(scorer), reference_logprobs(scorer)

    def measure(params: Any, frozen: Frozen, micro: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        found = policy(params, frozen, micro), reference(frozen, micro), micro["weights"]
        old, other, weights = (by_answer(values, micro, together) for values in found)
        return divergences(old, other, weights, kind=says.kl_penalty)

    return KlPenalty(
        _of_each(measure, model, mesh),
        coefficient=says.kl_coef,
        target=says.kl_target if says.kl_ctrl_type == "adaptive" else None,
        horizon=says.kl_horizon,
    )


def _of_each(
    compute: Callable[[Any, Frozen, dict[str, jax.Array]], Any], model: Model, mesh: Mesh
) -> Callable[[TrainState, Frozen, Mapping[str, np.ndarray]], Any]:
    """A function (state, frozen, batch [M, B, L]) → what `compute(params, frozen, microbatch)` gives for each of its M
    microbatches, on the host.
    """
    trained = parameter_shardings(abstract_parts(model).trained, mesh)

    def of_each(params: Any, frozen: Frozen, batch: dict[str, jax.Array]) -> Any:
        return jax.lax.map(lambda micro: compute(params, frozen, micro), batch)

    jitted = jax.jit(
        of_each, in_shardings=(trained, None, batch_sharding(mesh)), out_shardings=NamedSharding(mesh, P())
    )

    def run(state: TrainState, frozen: Frozen, host: Mapping[str, np.ndarray]) -> Any:
        read = ("tokens", "targets", "weights", "segments", "positions", "branches", *vision.KEYS)
        needed = {name: host[name] for name in read if name in host}
        with jax.set_mesh(mesh):
            return jax.tree.map(np.asarray, jitted(state.params, frozen, device_batch(needed, mesh)))

    return run


def of_own_answers(
    config: ConfigDict, model: Model, feed: Feed, frozen: Any, show: Callable[[str], None], step: int
) -> dict[str, Any]:
    """What the loop needs beside its usual parts, where batches are the policy's own answers: see `loop.Run`."""
    rollouts, training = feed.batches, config.training
    assert isinstance(rollouts, Rollouts)
    shown = training.grpo.log_completions
    kept = Completions(
        Path(training.output_dir) / "completions.jsonl",
        names=rollouts.reward_names,
        every=training.logging_steps,
        rows=training.trainer_kwargs.num_completions_to_print if shown else 0,
        one_of_each=training.trainer_kwargs.log_unique_prompts,
        show=show,
    )
    kept.go_on(step)
    rollouts.on_answers = kept
    prompts, group = validation_prompts(config, model), evaluated_group(config)
    return {
        "sampled": lambda state: rollouts.sampled(state, frozen),
        "logged": rollouts.logged,
        "judged": None if prompts is None else lambda state: rollouts.judged(state, frozen, prompts, group=group),
    }


def policy_loss_of(config: ConfigDict, model: Model, compute: Compute, *, together: int) -> Loss:
    """The loss of TRL_GRPO or VERL_GRPO on rows of so many answers."""
    how = _of_verl(config) if config.training.trainer_type == "VERL_GRPO" else _of_trl(config)
    return grpo_loss(scorer_of(config, model, compute, shared=together > 1), how, together=together)


def scorer_of(config: ConfigDict, model: Model, compute: Compute, *, shared: bool) -> Scorer:
    """How answers are scored: at the temperature they are drawn at; `shared`: several behind one prompt."""
    return Scorer(model.config, compute, shared=shared, temperature=derived.drawing(config).temperature)


def _of_trl(config: ConfigDict) -> GroupPolicy:
    kwargs = config.training.trainer_kwargs
    (loss_type,) = derived.loss_types(config)
    try:
        return GroupPolicy(
            loss_type=loss_type,
            importance_sampling_level=kwargs.importance_sampling_level,
            epsilon=config.training.grpo.epsilon,
            epsilon_high=kwargs.epsilon_high,
            delta=kwargs.delta,
            beta=derived.beta(config),
            use_bias_correction_kl=kwargs.use_bias_correction_kl,
            max_completion_length=derived.completion_length(config),
            top_entropy_quantile=kwargs.top_entropy_quantile,
            entropy_coef=kwargs.entropy_coef,
            off_policy_mask_threshold=kwargs.off_policy_mask_threshold,
            sapo_temperature_pos=kwargs.sapo_temperature_pos,
            sapo_temperature_neg=kwargs.sapo_temperature_neg,
            vespo_k_pos=kwargs.vespo_k_pos,
            vespo_lambda_pos=kwargs.vespo_lambda_pos,
            vespo_k_neg=kwargs.vespo_k_neg,
            vespo_lambda_neg=kwargs.vespo_lambda_neg,
            sampler_correction=kwargs.vllm_importance_sampling_mode
            if kwargs.vllm_importance_sampling_correction
            else None,
            sampler_clip_max=kwargs.vllm_importance_sampling_clip_max,
            sampler_clip_min=kwargs.vllm_importance_sampling_clip_min,
        )
    except ValueError as error:
        raise ValueError(f"training.trainer_kwargs.{error}") from None


def _of_verl(config: ConfigDict) -> VerlPolicy:
    says = verl.settings(config)
    factor = says.loss_scale_factor
    if says.loss_agg_mode == "seq-mean-token-sum-norm" and factor is None:
        factor = says.max_response_length  # to which verl pads
    try:
        return VerlPolicy(
            loss_mode=says.loss_mode,
            loss_agg_mode=says.loss_agg_mode,
            loss_scale_factor=factor,
            clip_ratio_low=says.clip_ratio_low,
            clip_ratio_high=says.clip_ratio_high,
            clip_ratio_c=says.clip_ratio_c,
            tau_pos=says.tau_pos,
            tau_neg=says.tau_neg,
            entropy_coeff=says.entropy_coeff,
            use_kl_loss=says.use_kl_loss,
            kl_loss_coef=says.kl_loss_coef,
            kl_loss_type=says.kl_loss_type,
        )
    except ValueError as error:
        raise ValueError(f"{verl.PATH}.{verl.ACTOR}.{error}") from None


def frozen_of(config: ConfigDict, model: Model, parts: Parts) -> Frozen:
    """What the loss is given beside the parameters: a reference where there is something to compare with one."""
    if not compares(config) or config.training.trainer_kwargs.sync_ref_model:
        return Frozen(parts.frozen, None)
    return Frozen(parts.frozen, reference_leaves(parts.trained, adapter_is_new=model.has_new_adapter))


def compares(config: ConfigDict) -> bool:
    """Whether the loss has a divergence from a reference."""
    if config.training.trainer_type == "VERL_GRPO":
        says = verl.settings(config)
        return says.use_kl_loss or says.use_kl_in_reward
    return derived.beta(config) != 0
