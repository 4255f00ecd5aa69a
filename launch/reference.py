"""The reference's log-probabilities of all answers, computed once before training and kept beside the token cache.

A step then needs no reference, neither its weights nor its time (TRL's `precompute_ref_log_probs`).
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import xxhash
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from input_pipeline.cache import Writing, key_of, load
from input_pipeline.pairs import Laid
from input_pipeline.pipeline import once_through
from input_pipeline.reading import Data
from launch.assemble import Model, compute_of, load_parts
from models.sharding import batch_sharding, parameter_shardings, replicas
from trainers.dpo import CHOSEN, REJECTED
from trainers.kto import OTHERS, UNWANTED, WANTED
from trainers.loop import device_batch
from trainers.processes import on_any_process
from trainers.reference import Frozen, reference_leaves
from trainers.scoring import Scorer, reference_logprobs
from trainers.step import Batch

log = logging.getLogger("einkorn")


def known_log_probabilities(config: ConfigDict, model: Model, mesh: Mesh, data: Data, laid: Laid) -> np.ndarray:
    """Of every row's answers as they are laid out, in their order, float32 [R, K]: from the cache, or computed and
    kept.
    """
    training, began, rows = config.training, time.monotonic(), f"{len(data.store):,}"
    folder = Path(training.token_cache_dir).expanduser() if training.token_cache_dir else None
    key = _key(config, model, data, laid)
    kept = load(folder, key) if folder is not None else None
    if not on_any_process(kept is None):  # computed by all together, where a host's own cache has none
        assert kept is not None
        log.info("reference: log-probabilities of %s rows, from the cache", rows)
        return kept.arrays["reference"]
    found = _computed(config, model, mesh, data, laid)
    log.info("reference: log-probabilities of %s rows, computed in %.0f s", rows, time.monotonic() - began)
    if folder is not None:
        columns = {"reference": found.shape[1]}
        with Writing(folder, key, {"reference": np.float32}, columns=columns) as writing:
            writing.append("reference", found)
            writing.finish({})
    return found


def _key(config: ConfigDict, model: Model, data: Data, laid: Laid) -> str:
    """The name in the cache: of the rows, the weights, and how the ones are computed with the others."""
    others = [] if laid.partners is None else laid.partners.tolist()
    how = [_ld_alpha(config), data.limit, str(compute_of(config, model, longest_document=None).dtype), others]
    return key_of("reference", data.store.fingerprint(), _weights_hash(config, model), how)


def _computed(config: ConfigDict, model: Model, mesh: Mesh, data: Data, laid: Laid) -> np.ndarray:
    training = config.training
    each = training.trainer_kwargs.precompute_ref_batch_size or training.per_device_train_batch_size
    feed = once_through(data, lambda data, microbatch: laid, rows_per_step=each * replicas(mesh))
    compute = compute_of(config, model, longest_document=feed.longest_document)
    pairs = training.trainer_type == "TRL_DPO"
    numbers = (CHOSEN, REJECTED) if pairs else (WANTED, UNWANTED, OTHERS)
    sums = reference_logprobs(
        Scorer(model.config, compute, shared=laid.shared), numbers=numbers, ld_alpha=_ld_alpha(config)
    )
    parts = load_parts(model, mesh, pretrained=config.model.load_pretrained_weights, seed=training.seed)
    frozen = Frozen(parts.frozen, reference_leaves(parts.trained, adapter_is_new=model.has_new_adapter))
    sums_on_mesh = jax.jit(
        _of_one_microbatch(sums),
        in_shardings=(parameter_shardings(frozen, mesh), batch_sharding(mesh)),
        out_shardings=NamedSharding(mesh, P()),
    )
    found = np.zeros((len(data.store), len(numbers)), np.float32)
    with jax.set_mesh(mesh):
        for host in feed.batches:
            rows = np.asarray(feed.batches.rows)
            found[rows] = np.asarray(sums_on_mesh(frozen, device_batch(host, mesh)))[: len(rows)]
    feed.batches.close()
    if pairs:
        return found
    own = found[:, :1] + found[:, 1:2]  # an answer is of one kind, and 0 of the other
    return own if laid.partners is None else np.concatenate([own, found[:, 2:]], axis=1)


def _of_one_microbatch(function: Callable[[Frozen, Batch], jax.Array]) -> Callable[[Frozen, Batch], jax.Array]:
    return lambda frozen, batch: function(frozen, {name: value[0] for name, value in batch.items()})


def _ld_alpha(config: ConfigDict) -> float | None:
    """The weight of an answer's length beyond the other's; KTO has none."""
    return config.training.trainer_kwargs.ld_alpha if config.training.trainer_type == "TRL_DPO" else None


def _weights_hash(config: ConfigDict, model: Model) -> str:
    """A hash of the weights that training starts from, and of what becomes of them when they are read."""
    digest = xxhash.xxh3_128()
    folders = [model.folder, *([model.adapter] if model.adapter is not None else [])]
    for file in sorted(file for folder in folders for file in folder.glob("*.safetensors")):
        with open(file, "rb") as opened:
            while piece := opened.read(2**24):
                digest.update(piece)
    how = [config.model.load_pretrained_weights, config.training.seed, model.dtype.name, model.form, repr(model.lora)]
    return key_of(digest.hexdigest(), model.hf_config, how)
