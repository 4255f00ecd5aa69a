"""Learning from preferences, from its configuration: which loss, which reference, how rows are laid out.

The keys of `trainer_kwargs` that belong to TRL_DPO and TRL_KTO are read here.
"""

from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import derived
from input_pipeline.pairs import Laid
from input_pipeline.pipeline import LayOut
from input_pipeline.reading import Data
from launch.assemble import Model
from launch.reference import known_log_probabilities
from models.config import Compute
from models.decoder import can_branch
from models.lora import Parts
from trainers.dpo import dpo_loss
from trainers.kto import partners, unpaired_loss
from trainers.pair_losses import Preference
from trainers.reference import Frozen, Sync, reference_leaves
from trainers.scoring import Scorer
from trainers.step import Loss


def loss_of(config: ConfigDict, model: Model, compute: Compute) -> Loss:
    """The loss of TRL_DPO or TRL_KTO; ValueError for settings that have no meaning together."""
    kwargs = config.training.trainer_kwargs
    scorer = Scorer(model.config, compute, shared=shares_prompt(config, model))
    if config.training.trainer_type == "TRL_DPO":
        return dpo_loss(scorer, preference(config), ld_alpha=kwargs.ld_alpha)
    kind: Any = derived.loss_types(config)[0]
    return unpaired_loss(
        scorer,
        loss_type=kind,
        beta=derived.beta(config),
        desirable_weight=kwargs.desirable_weight,
        undesirable_weight=kwargs.undesirable_weight,
    )


def preference(config: ConfigDict) -> Preference:
    """The settings of the losses on pairs, by the names that TRL has for them."""
    kwargs, types = config.training.trainer_kwargs, derived.loss_types(config)
    nll = {"orpo": 1.0, **dict.fromkeys(("cpo", "cpo_hinge", "cpo_ipo", "simpo"), kwargs.cpo_alpha)}
    try:
        return Preference(
            loss_type=types,
            loss_weights=derived.loss_weights(config),
            beta=derived.beta(config),
            label_smoothing=kwargs.label_smoothing,
            f_divergence_type=kwargs.f_divergence_type,
            f_alpha_divergence_coef=kwargs.f_alpha_divergence_coef,
            discopop_tau=kwargs.discopop_tau,
            use_weighting=kwargs.use_weighting,
            reference_free=kwargs.reference_free,
            nll_weight=nll.get(types[0] if types else "", 0.0) + (kwargs.rpo_alpha or 0.0),
            simpo_gamma=kwargs.simpo_gamma,
            alpha=kwargs.alpha,
        )
    except ValueError as error:
        raise ValueError(f"training.trainer_kwargs.{error}") from None


def sync_of(config: ConfigDict, model: Model) -> Sync | None:
    """How the reference moves, if it does; ValueError where there is none that could."""
    kwargs = config.training.trainer_kwargs
    if not kwargs.sync_ref_model:
        return None
    if model.lora is not None or config.model.freeze_layers:
        raise ValueError(
            "training.trainer_kwargs.sync_ref_model: there is no reference to move beside an adapter or frozen layers;"
            " set training.use_peft: false and no model.freeze_layers, or turn it off"
        )
    return Sync(kwargs.ref_model_sync_steps, kwargs.ref_model_mixup_alpha)


def shares_prompt(config: ConfigDict, model: Model) -> bool:
    """Whether a prompt is computed once for all its answers. By default not with a router's loss, in which its tokens
    count for each answer.
    """
    asked = config.training.trainer_kwargs.shared_prompt
    if asked and not can_branch(model.config):
        raise ValueError(
            "training.trainer_kwargs.shared_prompt: true, but this model's positions rotate otherwise in longer texts;"
            " set false or null"
        )
    balanced = model.config.experts is not None and model.config.experts.aux_coefficient > 0
    return can_branch(model.config) and not balanced if asked is None else asked


def frozen_of(config: ConfigDict, model: Model, parts: Parts) -> Frozen:
    """What the loss is given beside the parameters; nothing is copied."""
    if not computes_reference(config) or config.training.trainer_kwargs.sync_ref_model:
        return Frozen(parts.frozen, None)
    return Frozen(parts.frozen, reference_leaves(parts.trained, adapter_is_new=model.has_new_adapter))


def lay_out_of(config: ConfigDict, model: Model, mesh: Mesh, *, compute_reference: bool) -> LayOut:
    """How rows become lines. With `compute_reference`, the reference's log-probabilities are computed as soon as the
    rows are read, where the configuration asks for that.
    """
    shared = shares_prompt(config, model)
    with_others = derived.loss_types(config) == ("kto",)
    known = compute_reference and knows_reference(config)

    def lay_out(data: Data, microbatch: int) -> Laid:
        laid = Laid(shared=shared, partners=partners(len(data.store), block=microbatch) if with_others else None)
        return laid._replace(reference=known_log_probabilities(config, model, mesh, data, laid)) if known else laid

    return lay_out


def knows_reference(config: ConfigDict) -> bool:
    """Whether what the reference says of all rows is computed before the first step."""
    return _compares(config) and config.training.trainer_kwargs.precompute_ref_log_probs


def computes_reference(config: ConfigDict) -> bool:
    """Whether each step computes what the reference says of its batch."""
    return _compares(config) and not config.training.trainer_kwargs.precompute_ref_log_probs


def _compares(config: ConfigDict) -> bool:
    """Whether the loss has a reference at all."""
    return config.training.trainer_type == "TRL_KTO" or not preference(config).without_reference
