"""From `training.trainer_type` to what a step computes: the loss, what evaluation computes, what is held beside.

A new method is a loss in `trainers/` and a function here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import derived
from configs.methods import GRPO, PREFERENCE
from launch import grpo
from launch.assemble import Model, compute_of
from launch.preferences import computes_reference, frozen_of, loss_of, sync_of
from models.lora import Parts
from trainers.reference import Frozen, Sync, copied
from trainers.sft import cross_entropy_alone, sft_loss
from trainers.step import Loss


class Method(NamedTuple):
    """A method of training. `frozen` makes of a model's parts what its losses are given beside the parameters; it
    copies nothing. `draws`: whether the loss is random. `forwards`: passes through the model beside the trained one.
    `by_rows`: the loss and what stands beside it in the log are sums over rows, and nothing looks from one to another.
    """

    loss: Loss
    evaluated: Loss
    frozen: Callable[[Parts], Any]
    draws: bool
    sync: Sync | None = None
    forwards: int = 0
    by_rows: bool = False

    def beside(self, parts: Parts, *, given_away: bool) -> Any:
        """What the losses are given beside the parameters; `given_away` says that those of `parts` will not stay, so
        that a reference needs its own.
        """
        held = self.frozen(parts)
        return held._replace(reference=copied(held.reference)) if given_away and isinstance(held, Frozen) else held


def method_of(
    config: ConfigDict, model: Model, *, longest_document: int, packed: bool = True, together: int = 1
) -> Method:
    """The method that the configuration names; ValueError for settings of it that do not fit together. `packed`: rows
    may hold several documents; of the policy's own answers, they have so many `together`.
    """
    compute = compute_of(config, model, longest_document=longest_document, packed=packed)
    drops = model.lora is not None and model.lora.dropout > 0
    if config.training.trainer_type in GRPO:
        loss = grpo.policy_loss_of(config, model, compute, together=together)
        return Method(
            loss,
            loss,
            frozen=lambda parts: grpo.frozen_of(config, model, parts),
            draws=drops and not derived.disables_dropout(config),
            sync=sync_of(config, model) if grpo.compares(config) else None,
            forwards=int(grpo.compares(config)),
        )
    if config.training.trainer_type in PREFERENCE:
        loss = loss_of(config, model, compute)
        return Method(
            loss,
            loss,
            frozen=lambda parts: frozen_of(config, model, parts),
            draws=drops and not derived.disables_dropout(config),
            sync=sync_of(config, model),
            forwards=int(computes_reference(config)),
        )
    (kind,) = derived.loss_types(config)
    shaping: dict[str, Any] = {"kind": kind, "label_smoothing": config.training.trainer_kwargs.label_smoothing_factor}
    if config.training.trainer_type == "OUMI":
        evaluated = cross_entropy_alone(model.config, compute=compute)
    else:
        evaluated = sft_loss(model.config, compute=compute, **shaping)
    loss = sft_loss(model.config, compute=compute, z_loss=config.training.z_loss, **shaping)
    balances = model.config.experts is not None and model.config.experts.aux_coefficient > 0  # over all tokens
    return Method(loss, evaluated, frozen=lambda parts: parts.frozen, draws=drops, by_rows=not balances)
