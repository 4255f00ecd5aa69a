"""What TRL's DPOTrainer, KTOTrainer, CPOTrainer and ORPOTrainer do with given rows: each step's log, and the weights.

Float32 on CPU, rows in their order, no dropout, no checkpointing: nothing but arithmetic is left. Rows are tokenised
and cut by the trainer itself. Torch, TRL and peft are imported on use.

TRL logs a step's metrics as the mean over its microbatches, each with its own mean over tokens or answers. Where
microbatches differ in these, ours is the mean over all tokens or answers of the step, and so it is here: each
microbatch's number is weighed by what it is a mean of. Loss and gradient are not touched by that.
"""

import contextlib
import importlib
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TRAINERS = {  # trainer, configuration, and where they are
    "dpo": ("DPOTrainer", "DPOConfig", "trl"),
    "kto": ("KTOTrainer", "KTOConfig", "trl"),
    "cpo": ("CPOTrainer", "CPOConfig", "trl.experimental.cpo"),
    "orpo": ("ORPOTrainer", "ORPOConfig", "trl.experimental.orpo"),
}
# What a metric is a mean of, as `_counts` names it; the others are means of pairs or count once for each microbatch.
COUNTED = {
    "entropy": "tokens",
    "logits/chosen": "chosen tokens",
    "logits/rejected": "rejected tokens",
    "mean_token_accuracy": "chosen tokens",
    "nll_loss": "likely tokens",
    **dict.fromkeys(("rewards/chosen", "logps/chosen"), "chosen"),
    **dict.fromkeys(("rewards/rejected", "logps/rejected"), "rejected"),
}
NOT_METRICS = ("step", "epoch", "num_tokens")


class Run(NamedTuple):
    """A run's log, by the names of TRL's metrics, one number for each optimizer step; what it trained, before and after
    it, by names in the checkpoint, or in the adapter's file.
    """

    log: dict[str, np.ndarray]
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]


def train(
    kind: str,
    model: Path,
    rows: Sequence[dict[str, Any]],
    *,
    steps: int,
    batch: int,
    accumulation: int = 1,
    adapter: Path | None = None,
    **options: Any,
) -> Run:
    """Trains `steps` optimizer steps of `accumulation` x `batch` rows with the trainer of that kind. With `adapter`, a
    folder of peft's, that adapter is trained, and as it begins it is the reference; `options` are the configuration's.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer

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
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), _one_thread():
        warnings.simplefilter("ignore")  # the oracle's own deprecations are not ours to answer for
        trainer_class, config_class = _recording(kind)
        trained = _model(model, adapter)
        trainer = trainer_class(
            model=trained,
            args=config_class(output_dir=folder, **plain | options),
            train_dataset=Dataset.from_list(list(rows)),
            processing_class=AutoTokenizer.from_pretrained(model),
        )
        before = _weights(trained)
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert [entry["step"] for entry in log] == list(range(1, steps + 1))
    names = sorted(set().union(*log) - set(NOT_METRICS))
    logged = {name: np.array([entry.get(name, np.nan) for entry in log], np.float64) for name in names}
    return Run(_by_count(logged, trainer.recorded, accumulation), before, _weights(trained))


def distance(ours: Run, theirs: Run) -> float:
    """How far two runs that began alike ended apart: the norm of the difference over the norm of what the second one
    changed, of all tensors together, in float64.
    """
    assert ours.after.keys() == theirs.after.keys()

    def squares(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
        return sum(float(np.sum(np.square(a[name] - b[name].astype(np.float64)))) for name in a)

    return float(np.sqrt(squares(ours.after, theirs.after) / squares(theirs.after, theirs.before)))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Torch without its threads, whose waiting for one another takes three times as long as such small products."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _recording(kind: str) -> tuple[Any, Any]:
    """The trainer of a kind, which keeps each microbatch's metrics with their counts in `recorded`; its config."""
    trainer_name, config_name, where = TRAINERS[kind]
    module = importlib.import_module(where)
    original = getattr(module, trainer_name)

    class Recording(original):
        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if not hasattr(self, "recorded"):
                self.recorded = []
            store = self._metrics if hasattr(self, "_metrics") else self._stored_metrics
            before = {name: len(values) for name, values in store["train"].items()}
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            found = {name: v[-1] for name, v in store["train"].items() if len(v) > before.get(name, 0)}
            self.recorded.append((found, _counts(kind, inputs)))
            return loss

    return Recording, getattr(module, config_name)


def _counts(kind: str, inputs: dict[str, Any]) -> dict[str, float]:
    """Tokens of all answers, of each kind of them, and of those whose likelihood is maximised; answers of each kind."""
    if kind in ("cpo", "orpo"):
        chosen, rejected = (inputs[f"{name}_labels"][:, 1:] != -100 for name in ("chosen", "rejected"))
        likely = inputs["chosen_attention_mask"][:, 1:] if kind == "orpo" else chosen
    else:
        mask = inputs["completion_mask"][:, 1:]
        chosen, rejected = mask.chunk(2) if kind == "dpo" else (mask[inputs["label"]], mask[~inputs["label"]])
        likely = chosen
    return {
        "tokens": float(chosen.sum() + rejected.sum()),
        "chosen tokens": float(chosen.sum()),
        "rejected tokens": float(rejected.sum()),
        "likely tokens": float(likely.sum()),
        "chosen": float(len(chosen)),
        "rejected": float(len(rejected)),
    }


def _by_count(log: dict[str, np.ndarray], recorded: list[Any], accumulation: int) -> dict[str, np.ndarray]:
    """The log with every metric's mean taken over what it is a mean of, once over the whole step."""
    steps = [recorded[at : at + accumulation] for at in range(0, len(recorded), accumulation)]
    again = dict(log)
    for name in log.keys() - {"loss", "grad_norm", "learning_rate"}:
        values = [[(found[name], counts) for found, counts in step if name in found] for step in steps]
        plain = [np.mean([value for value, _ in step]) if step else np.nan for step in values]
        np.testing.assert_allclose(plain, log[name], rtol=1e-6, err_msg=f"{name}: not what TRL's log is made of")
        again[name] = np.array([_mean(step, COUNTED.get(name)) for step in values])
    return again


def _mean(values: list[Any], counted: str | None) -> float:
    weights = [counts[counted] if counted else 1.0 for _, counts in values]
    return float(np.average([value for value, _ in values], weights=weights)) if values else np.nan


def _model(folder: Path, adapter: Path | None) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model if adapter is None else PeftModel.from_pretrained(model, adapter, is_trainable=True)


def _weights(model: Any) -> dict[str, np.ndarray]:
    """What is trained, copied, by names in a checkpoint or an adapter's file."""
    return {
        name.replace(".default", ""): value.detach().numpy().copy()
        for name, value in model.named_parameters()
        if value.requires_grad
    }
