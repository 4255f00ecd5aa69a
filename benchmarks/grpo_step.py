"""A whole step of GRPO on this machine, answers and all: its seconds beside TRL's.

    python -m benchmarks.grpo_step                      full weights
    python -m benchmarks.grpo_step --lora               an adapter
    python -m benchmarks.grpo_step --shape 1b --bf16 --group 16 --answer 256        a GPU, no network

Both programs run whole, from a configuration to a log, in float32 or with `--bf16`, each in a process of its own, in
turns (einkorn, TRL, einkorn, TRL), both on the GPU where there is one, on the questions of the preference quickstart.
TRL generates with transformers, as it does where vLLM is not. What is generated differs, but no answer is longer than
`--answer` tokens, and the mean lengths are printed. The first steps are left out of the times: they compile.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.random_model import add_options, model_of
from benchmarks.sft_step import SMOLLM2, run

QUESTIONS = Path(__file__).resolve().parents[1] / "configs/quickstart/preferences_train.jsonl"


class Work(NamedTuple):
    """What both programs are given; JSON-able."""

    model: str
    data: str
    group: int
    answer: int
    steps: int
    warm: int
    lora: bool
    bf16: bool


class Measured(NamedTuple):
    """Seconds of each timed step, and the mean length of answers."""

    seconds: list[float]
    length: float


def main() -> None:
    options = parse()
    if options.trl:
        train_with_trl(Work(**json.loads(options.trl)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        options.model = model_of(options, Path(scratch))
        compare(options, Path(scratch))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_options(parser, model=SMOLLM2)
    add("--bf16", action="store_true", help="compute in bfloat16, with parameters in float32")
    add("--lora", action="store_true", help="train an adapter")
    add("--group", type=int, default=8, help="answers of a step, all to one prompt (default: %(default)s)")
    add("--answer", type=int, default=64, help="tokens of an answer at most (default: %(default)s)")
    add("--steps", type=int, default=4, help="timed steps of a run (default: %(default)s)")
    add("--warm", type=int, default=2, help="steps before them (default: %(default)s)")
    add("--repeat", type=int, default=2, help="runs of each program, in turns (default: %(default)s)")
    add("--trl", help=argparse.SUPPRESS)  # this script calls itself with it
    return parser.parse_args()


def compare(options: argparse.Namespace, scratch: Path) -> None:
    """Every run in turns, then the ratio of the medians."""
    data = scratch / "prompts.jsonl"
    rows = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    data.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows), encoding="utf-8")
    steps = options.warm + options.steps
    work = Work(
        options.model, str(data), options.group, options.answer, steps, options.warm, options.lora, options.bf16
    )
    print(f"{'LoRA' if options.lora else 'full weights'}, {work.group} answers of up to {work.answer} tokens")
    seconds: dict[str, list[float]] = {"einkorn": [], "TRL": []}
    for turn in range(options.repeat):
        for name in seconds:
            found = (run_einkorn if name == "einkorn" else run_trl)(work, scratch / f"{name}-{turn}")
            seconds[name].append(statistics.median(found.seconds))
            each = " ".join(f"{s:.2f}" for s in found.seconds)
            print(
                f"  {name:8} {seconds[name][-1]:7.3f} s/step, {found.length:.0f} tokens an answer; steps: {each}",
                flush=True,
            )
    ours, theirs = (statistics.median(seconds[name]) for name in ("einkorn", "TRL"))
    print(f"  einkorn / TRL, s/step: {ours / theirs:.3f}")


def configuration(work: Work, folder: Path) -> dict[str, Any]:
    """What `train_with_trl` is told, in our words."""
    return {
        "model": {"model_name": work.model, "torch_dtype_str": "float32"},
        "data": {"train": {"datasets": [{"dataset_name": "text_sft", "dataset_path": work.data}]}},
        "training": {
            "trainer_type": "TRL_GRPO",
            "reward_functions": ["soft_20tokens_completions"],
            "output_dir": str(folder),
            "per_device_train_batch_size": work.group,
            "max_steps": work.steps,
            "learning_rate": 1e-6,
            "logging_steps": 1,
            "save_steps": 0,
            "save_final_model": False,
            "enable_tensorboard": False,
            "mixed_precision_dtype": "BF16" if work.bf16 else "NONE",
            "use_peft": work.lora,
            "grpo": {"num_generations": work.group, "max_completion_length": work.answer, "temperature": 1.0},
        },
        "peft": {"lora_r": 16, "lora_target_modules": "all-linear"} if work.lora else {},
    }


def run_einkorn(work: Work, folder: Path) -> Measured:
    import yaml

    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(configuration(work, folder)), encoding="utf-8")
    run([sys.executable, "-m", "launch", "train", "-c", str(file)], folder.with_suffix(".log"))
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [event for event in events if "loss" in event]
    return timed([event["time"] for event in steps], [event["completions/mean_length"] for event in steps], work)


def run_trl(work: Work, folder: Path) -> Measured:
    """This script again, as a process that only trains with TRL."""
    log = folder.with_suffix(".log")
    run([sys.executable, "-m", "benchmarks.grpo_step", "--trl", json.dumps(work._asdict())], log)
    found = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    return timed(found["ends"], found["lengths"], work)


def timed(ends: list[float], lengths: list[float], work: Work) -> Measured:
    """Seconds between the ends of steps, without the first ones."""
    kept = ends[work.warm - 1 :]
    return Measured([b - a for a, b in itertools.pairwise(kept)], statistics.mean(lengths[work.warm :]))


def train_with_trl(work: Work) -> None:
    """GRPOTrainer as it comes, but without checkpointing; prints when steps ended, and answers' lengths."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from trainers.rewards.lengths import soft_20tokens_completions

    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ends.append(time.time())

    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(dir=Path(work.data).parent),
        per_device_train_batch_size=work.group,
        num_generations=work.group,
        max_completion_length=work.answer,
        temperature=1.0,
        max_steps=work.steps,
        learning_rate=1e-6,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=work.bf16,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32),
        reward_funcs=[soft_20tokens_completions],
        args=config,
        train_dataset=load_dataset("json", data_files=work.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(work.model, padding_side="left"),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if work.lora else None,
        callbacks=[Clock()],
    )
    trainer.train()
    lengths = [e["completions/mean_length"] for e in trainer.state.log_history if "completions/mean_length" in e]
    print(json.dumps({"ends": ends, "lengths": lengths}))


if __name__ == "__main__":
    main()
