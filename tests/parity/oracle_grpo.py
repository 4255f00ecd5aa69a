"""What TRL's GRPOTrainer does with given answers: each step's loss, log and gradient, and the weights in the end.

Everything is TRL's own code but the answers, which are drawn here: advantages, log-probabilities of the policy that
answered and of the reference are its own. Float32 on CPU, no dropout, no checkpointing. Torch and TRL are imported on
use.
"""

import math
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

ROWS, GROUP = 8, 4  # answers of one microbatch, and to one prompt
LONGEST = 12  # tokens of an answer; prompts have fewer
PROMPTS = tuple(" ".join(["grain", "water", "mill", "stone", "bread"][: 1 + i % 5]) + "?" for i in range(16))
Tensors = dict[str, np.ndarray]


class Run(NamedTuple):
    """Of every step the microbatches as TRL saw them, the loss and the log; the last step's gradient before clipping;
    what was trained, before and after, by names in the checkpoint.
    """

    steps: list[list[Tensors]]
    loss: list[float]
    log: list[dict[str, float]]
    gradient: Tensors
    before: Tensors
    after: Tensors


def train(policy: Path, reference: Path, *, steps: int = 1, drift: float = 0.0, **options: Any) -> Run:
    """Trains some optimizer steps of the model in `policy`, beside the one in `reference` where `beta` asks for one.

    `drift` is the deviation of what is added to the log-probabilities of the policy that answered, as if it had been
    another, and to those of its sampler; `options` are GRPOConfig's, where `vllm_importance_sampling_mode` turns that
    correction on.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
    from trl import GRPOConfig, GRPOTrainer

    corrects = "vllm_importance_sampling_mode" in options
    random = np.random.default_rng(7)
    steps_seen: list[list[Tensors]] = []
    losses: list[float] = []
    gradient: Tensors = {}

    class Recording(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            found = super()._generate_and_score_completions(inputs)
            if drift:
                noise = torch.tensor(random.normal(scale=drift, size=found["completion_mask"].shape)).float()
                for name in ("old_per_token_logps", "sampling_per_token_logps"):
                    found[name] = found[name] + noise * found["completion_mask"]
            return found

        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            loss = super()._compute_loss(model, inputs)
            if self._step % self.args.gradient_accumulation_steps == 0:
                steps_seen.append([])
                losses.append(0.0)
            steps_seen[-1].append({name: value.detach().numpy().copy() for name, value in inputs.items()})
            losses[-1] += loss.item()
            return loss

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            gradient.update({name: value.grad.numpy().copy() for name, value in model.named_parameters()})

    plain = {
        "per_device_train_batch_size": ROWS,
        "num_generations": GROUP,
        "max_completion_length": LONGEST,
        "max_steps": steps,
        "max_grad_norm": 1e9,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle's own deprecations are not ours to answer for
        model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32, attn_implementation="eager")
        model.config._name_or_path = str(reference)
        tokenizer = AutoTokenizer.from_pretrained(policy)
        trainer = Recording(
            model=model,
            args=GRPOConfig(output_dir=folder, **plain | options),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
            processing_class=tokenizer,
            reward_funcs=[share_of_even, brevity],
            rollout_func=lambda prompts, _: answers(prompts, tokenizer, random),
            callbacks=[Gradients()],
        )
        if corrects:
            trainer.use_vllm = True
            trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
            trainer._last_loaded_step = -1
        before = _weights(model)
        trainer.train()
    torch.set_num_threads(threads)
    log = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return Run(steps_seen, losses, log, gradient, before, _weights(model))


def answers(prompts: list[str], tokenizer: Any, random: np.random.Generator) -> dict[str, Any]:
    """Answers of 1 to `LONGEST` tokens at random, of which the shorter ones end, and what a sampler says of each."""
    vocabulary, found = len(tokenizer), []
    for _ in prompts:
        ids = random.integers(3, vocabulary, random.integers(1, LONGEST + 1)).tolist()
        found.append([*ids[:-1], tokenizer.eos_token_id] if len(ids) < LONGEST else ids)
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": found,
        "logprobs": [(random.normal(scale=0.1, size=len(ids)) - math.log(vocabulary)).tolist() for ids in found],
    }


def share_of_even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """How many of an answer's tokens have an even id."""
    return [sum(1 - token % 2 for token in ids) / len(ids) for ids in completion_ids]


def brevity(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """1 for one token, less for more; no opinion of answers that were cut off."""
    return [None if len(ids) == LONGEST else 1 / len(ids) for ids in completion_ids]


def _weights(model: Any) -> Tensors:
    return {name: value.detach().numpy().copy() for name, value in model.named_parameters()}
