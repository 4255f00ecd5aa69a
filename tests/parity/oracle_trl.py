"""What TRL's SFTTrainer does with given rows: loss, gradient norm and rate of every step, and the weights it ends with.

Float32 on CPU, rows in their order, no dropout, no checkpointing: nothing but arithmetic is left. Torch and TRL are
imported on use.
"""

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Run(NamedTuple):
    """A run's log, one entry per optimizer step, and its final weights by their names in the checkpoint."""

    loss: np.ndarray
    grad_norm: np.ndarray  # before clipping
    learning_rate: np.ndarray  # the one the step used
    weights: dict[str, np.ndarray]


def sft(
    model: Path, rows: Sequence[dict[str, Any]], *, steps: int, batch: int, accumulation: int = 1, **options
) -> Run:
    """Trains `steps` optimizer steps of `accumulation` x `batch` rows with SFTTrainer; `options` are SFTConfig's."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import SFTConfig, SFTTrainer

    set_seed(0)
    trained = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    plain = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "max_steps": steps,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle's own deprecations are not ours to answer for
        trainer = SFTTrainer(
            model=trained,
            args=SFTConfig(output_dir=folder, **plain | options),
            train_dataset=Dataset.from_list(list(rows)),
            processing_class=AutoTokenizer.from_pretrained(model),
        )
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert [entry["step"] for entry in log] == list(range(1, steps + 1))
    return Run(
        *(np.array([entry[key] for entry in log]) for key in ("loss", "grad_norm", "learning_rate")),
        weights={name: value.detach().numpy() for name, value in trained.named_parameters()},
    )


def distance(weights: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The norm of the difference over the norm, of all tensors together, in float64."""
    assert weights.keys() == expected.keys()
    squares = [
        (np.sum(np.square(weights[name] - value.astype(np.float64))), np.sum(np.square(value.astype(np.float64))))
        for name, value in expected.items()
    ]
    difference, size = np.sum(squares, axis=0)
    return float(np.sqrt(difference / size))
