"""Einkorn against transformers' Trainer: the same initial weights, the same rows of tokens in the same order, step by
step.

    python -m benchmarks.pretrain                        # the pretraining quickstart's model and corpus, 300 steps
    python -m benchmarks.pretrain --steps 3 --output runs/compared

The settings are those of configs/quickstart/pretrain.yaml, but that a text sees the one before it in its row
(`isolate_documents: false`), as the Trainer's own rows would, and that there is no z-loss, which it does not have. The
rows are taken from einkorn's feed. Writes `curves.csv` (loss, gradient norm and learning rate of both, at every step)
and `curves.png`, prints the largest differences, and ends with code 1 where a loss differs by more than 1 %.
"""

import argparse
import csv
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

CONFIG = "configs/quickstart/pretrain.yaml"
NAMES = ("loss", "grad_norm", "learning_rate")
ALLOWED = 0.01


def main() -> None:
    options = parse()
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = prepared(Path(scratch), options.steps)
        ours = with_einkorn(Path(scratch), arguments)
        theirs = with_transformers(Path(scratch), arguments, options.steps)
    write(options.output, ours, theirs)
    worst = {name: float(np.max(np.abs(ours[name] - theirs[name]) / np.abs(theirs[name] + 1e-30))) for name in NAMES}
    print(f"loss {ours['loss'][0]:.4f} → {ours['loss'][-1]:.4f} in {options.steps} steps; transformers")
    print(f"     {theirs['loss'][0]:.4f} → {theirs['loss'][-1]:.4f}")
    print("largest relative difference at a step: " + ", ".join(f"{name} {value:.1e}" for name, value in worst.items()))
    print(f"curves: {options.output}/curves.csv, curves.png")
    if worst["loss"] > ALLOWED:
        sys.exit(1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/compared"), help="folder (default: %(default)s)")
    return parser.parse_args()


def prepared(folder: Path, steps: int) -> list[str]:
    """Fetch the corpus, learn the tokenizer, draw the weights; returns what the configuration is told."""
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    from configs.load import load
    from launch.corpus import fetch_addresses
    from launch.tokenizer import Options, train

    corpus, drawn = fetch_addresses(), Path(load(CONFIG).config.model.model_name)
    about = AutoConfig.from_pretrained(drawn)
    train([str(corpus / "train.jsonl")], folder / "model", Options(about.vocab_size, ("<|endoftext|>",)))
    set_seed(0)
    AutoModelForCausalLM.from_config(about).save_pretrained(folder / "model")
    settings = {
        "model.model_name": folder / "model",
        "model.tokenizer_name": "null",
        "model.load_pretrained_weights": "true",
        "data.train.datasets[0].dataset_path": corpus / "train.jsonl",
        "data.train.isolate_documents": "false",
        "training.output_dir": folder / "output",
        "training.max_steps": steps,
        "training.max_tokens": "null",
        "training.warmup_steps": max(1, steps // 20),
        "training.warmup_tokens": "null",
        "training.z_loss": 0,
        "training.eval_strategy": "no",
        "training.save_final_model": "false",
        "training.logging_steps": 1,
        "training.enable_tensorboard": "false",
    }
    return [f"--{name}={value}" for name, value in settings.items()]


def with_einkorn(folder: Path, arguments: list[str]) -> dict[str, np.ndarray]:
    """The curves of `einkorn train`, from its log."""
    from configs.load import load
    from launch.train import run

    run(load(CONFIG, arguments))
    lines = (folder / "output/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    log = [event for event in map(json.loads, lines) if "loss" in event]
    return {name: np.array([event[name] for event in log]) for name in NAMES}


def with_transformers(folder: Path, arguments: list[str], steps: int) -> dict[str, np.ndarray]:
    """The curves of the Trainer over the rows that the same configuration's feed gives."""
    from configs.load import load
    from launch import assemble
    from launch.data import train_data
    from tests.parity.oracle_hf import clm

    config = load(CONFIG, arguments).config
    training = config.training
    feed = train_data(config, assemble.open_model(config), assemble.prepare_devices(config))
    batches = [next(feed.batches) for _ in range(steps)]
    feed.batches.close()
    found = clm(
        folder / "model",
        batches,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        lr_scheduler_kwargs=dict(training.lr_scheduler_kwargs),
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_epsilon=training.adam_epsilon,
        max_grad_norm=training.max_grad_norm,
    )
    return {name: getattr(found, name) for name in NAMES}


def write(folder: Path, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """Both programs' numbers as a table, and their losses as a picture."""
    from matplotlib.figure import Figure

    steps = range(1, len(ours["loss"]) + 1)
    with (folder / "curves.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["step", *(f"{program}_{name}" for name in NAMES for program in ("einkorn", "transformers"))])
        columns = [values[name].tolist() for name in NAMES for values in (ours, theirs)]
        table.writerows(zip(steps, *columns, strict=True))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, theirs["loss"], label="transformers", linewidth=3, alpha=0.4)
    axes.plot(steps, ours["loss"], label="einkorn", linewidth=1)
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)")
    axes.legend()
    figure.savefig(folder / "curves.png", dpi=150)


if __name__ == "__main__":
    main()
