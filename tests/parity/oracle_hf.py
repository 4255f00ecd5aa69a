"""What transformers' Trainer does with given rows of tokens: loss, gradient norm and rate of every step, and the
weights it ends with.

Float32 on CPU, rows in their order: nothing but arithmetic is left. Torch and transformers are imported on use.
"""

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.parity.oracle_trl import Run


def clm(model: Path, batches: Sequence[dict[str, np.ndarray]], **options) -> Run:
    """Trains an optimizer step on each host batch [A, B, L] of ours; `options` are TrainingArguments'.

    Every row is one text without a mask: what is told apart in it by segments is not told to the model.
    """
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

    set_seed(0)
    trained = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    accumulation, rows_at_once, _ = batches[0]["tokens"].shape
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle's own deprecations are not ours to answer for
        trainer = Trainer(
            model=trained,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=len(batches),
                per_device_train_batch_size=rows_at_once,
                gradient_accumulation_steps=accumulation,
                train_sampling_strategy="sequential",
                use_cpu=True,
                bf16=False,
                optim="adamw_torch",
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
                **options,
            ),
            train_dataset=[row for batch in batches for row in _rows(batch)],
            data_collator=lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]},
        )
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert [entry["step"] for entry in log] == list(range(1, len(batches) + 1))
    return Run(
        *(np.array([entry[key] for entry in log]) for key in ("loss", "grad_norm", "learning_rate")),
        weights={name: value.detach().numpy() for name, value in trained.named_parameters()},
    )


def _rows(batch: dict[str, np.ndarray]) -> list[dict]:
    """The rows of a host batch by transformers' names: targets are shifted already, and -100 where nothing is
    trained.
    """
    import torch

    targets = np.where(batch["weights"] > 0, batch["targets"], -100)
    length = targets.shape[-1]
    return [
        {
            "input_ids": torch.tensor(ids, dtype=torch.long),
            "labels": torch.tensor(labels, dtype=torch.long),
            "shift_labels": torch.tensor(labels, dtype=torch.long),
        }
        for ids, labels in zip(batch["tokens"].reshape(-1, length), targets.reshape(-1, length), strict=True)
    ]
