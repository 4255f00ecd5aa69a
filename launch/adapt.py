"""What of a model is trained: all of it, all but frozen layers, or an adapter beside it. Every key of `peft` is read
here or in `launch.export`.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from models import adapter as adapters
from models.config import DecoderConfig
from models.decoder import abstract_params
from models.lora import Lora
from models.selection import Names, frozen_leaves, names_of, target_modules, whole_leaves
from models.sharding import paths

log = logging.getLogger(__name__)

INITS = {"DEFAULT": "kaiming", "GAUSSIAN": "gaussian", "RANDOM": "random"}


class Named(NamedTuple):
    """A model by name, and the folder of an adapter that joins it."""

    base: str
    adapter: Path | None


def find_model(model: ConfigDict) -> Named:
    """What `model.model_name` names: a model, or an adapter and through it the model that it belongs to."""
    adapter = adapters.find_adapter(model.model_name)
    if model.adapter_model is None:
        return Named(model.model_name, None) if adapter is None else Named(adapters.base_of(adapter), adapter)
    folder = Path(model.adapter_model).expanduser()
    if adapter is not None:
        raise ValueError(f"model.adapter_model: model.model_name, {adapter}, is an adapter already; name one")
    if not (folder / adapters.CONFIG).is_file():
        raise ValueError(f"model.adapter_model: {folder} is no folder with {adapters.CONFIG}")
    return Named(model.model_name, folder)


def tokenizer_folder(named: Named, model: Path) -> Path:
    """Where the tokenizer lies: beside the adapter, if one is there, else with the model."""
    if named.adapter is not None and (named.adapter / "tokenizer_config.json").is_file():
        return named.adapter
    return model


def what_trains(
    config: ConfigDict, decoder: DecoderConfig, hf_config: Mapping[str, Any], *, adapter: Path | None
) -> tuple[Lora | None, frozenset[str]]:
    """The adapter to train, if any, and the paths of the model's own leaves that are trained."""
    leaves, freeze = frozenset(paths(abstract_params(decoder, dtype=jnp.float32))), config.model.freeze_layers
    if not config.training.use_peft and not freeze:
        return None, leaves
    names = names_of(decoder, hf_config)
    frozen = frozen_leaves(names, freeze)
    if not config.training.use_peft:
        if adapter is not None:
            raise ValueError("not implemented yet: model.freeze_layers of a model that an adapter is merged into")
        if frozen == leaves:
            raise ValueError(f"model.freeze_layers: nothing but {', '.join(freeze)} is there; leave something to train")
        return None, leaves - frozen
    if adapter is None:
        lora = _new_adapter(config.peft, names, frozen)
    else:
        lora = adapters.read_settings(adapter, decoder, hf_config)
        if both := _frozen_too(lora, frozen):
            raise ValueError(
                f"not implemented yet: model.freeze_layers of an adapter that goes on and stands on {both[0]}"
            )
        log.info("training goes on with %s, as its %s says; section peft is not read", adapter, adapters.CONFIG)
    if decoder.tied_head and "embed/embedding" in lora.whole:
        raise ValueError("not implemented yet: peft.lora_modules_to_save: an embedding that is the output head too")
    return lora, frozenset(lora.whole)


def quantisation(config: ConfigDict) -> str | None:
    """The format of the model's own kernels, a name of models.quantized.FORMATS, or None: as they are."""
    peft = config.peft
    if not (config.training.use_peft and peft.q_lora):
        return None
    return "int8" if peft.q_lora_bits == 8 else peft.bnb_4bit_quant_type


def _frozen_too(lora: Lora, frozen: frozenset[str]) -> list[str]:
    """What an adapter changes of the model's leaves that are frozen."""
    return sorted({*lora.whole, *(f"{module}/kernel" for module in lora.modules)} & frozen)


def _new_adapter(peft: ConfigDict, names: Names, frozen: frozenset[str]) -> Lora:
    whole = whole_leaves(names, peft.lora_modules_to_save or ())
    if both := frozen & set(whole):
        raise ValueError(f"peft.lora_modules_to_save: {min(both)} is frozen by model.freeze_layers; change one of them")
    modules = target_modules(
        names,
        peft.lora_target_modules,
        exclude=peft.lora_exclude_modules or (),
        patterns=peft.lora_target_modules_regex,
    )
    modules = tuple(module for module in modules if f"{module}/kernel" not in frozen.union(whole))
    if not modules:
        raise ValueError(
            "peft.lora_target_modules: no module is left for an adapter; name some that model.freeze_layers does not, "
            "or set all-linear"
        )
    assert (peft.lora_bias, peft.lora_task_type) == ("none", "CAUSAL_LM"), "the schema takes nothing else yet"
    return Lora(
        rank=peft.lora_r,
        alpha=peft.lora_alpha,
        dropout=peft.lora_dropout,
        rslora=peft.use_rslora,
        dora=peft.use_dora,
        init=INITS[peft.lora_init_weights],
        modules=modules,
        whole=whole,
    )
