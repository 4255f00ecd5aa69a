"""A step of DPO on this machine: its seconds beside TRL's, and its memory beside a step of SFT.

    python -m benchmarks.dpo_step                       times: reference computed, and known beforehand, full weights
    python -m benchmarks.dpo_step --lora                the same with an adapter
    python -m benchmarks.dpo_step --memory              bytes of the compiled steps, by XLA's own account

Rows are real: the last turn of a conversation between two people (the package chitchat-dataset, MIT licence, fetched
once) is the chosen answer, that of another conversation the rejected one, and the turns before are the prompt. Both
programs run whole, from a configuration to a log, in float32, each in a process of its own, in turns (einkorn, TRL,
einkorn, TRL). Both see the same pairs in the same order, the longest cut to `--tokens`, and see them twice: in the
first round every length compiles, the second one is timed.
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

from benchmarks.sft_step import SMOLLM2, chats, measured, run

GIB = 2**30


class Work(NamedTuple):
    """What both programs are given; JSON-able."""

    model: str
    data: str
    count: int
    length: int
    batch: int
    steps: int
    warm: int
    lora: bool
    known: bool  # the reference's log-probabilities, beforehand


def main() -> None:
    options = parse()
    if options.trl:
        train_with_trl(Work(**json.loads(options.trl)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        if options.memory:
            compare_memory(options, Path(scratch))
            return
        for known in {"both": (False, True), "computed": (False,), "known": (True,)}[options.reference]:
            compare_times(options, Path(scratch), known=known)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(SMOLLM2), help="model folder (default: %(default)s)")
    add("--lora", action="store_true", help="train an adapter")
    add("--memory", action="store_true", help="compile only, and tell bytes")
    add("--batch", type=int, default=2, help="pairs of a step (default: %(default)s)")
    add("--tokens", type=int, default=512, help="prompt and answer are cut to so many (default: %(default)s)")
    add("--steps", type=int, default=4, help="steps of a round (default: %(default)s)")
    add("--repeat", type=int, default=2, help="runs of each program, in turns (default: %(default)s)")
    add("--prompts", choices=["shared", "apart"], help="how einkorn lays out prompts (default: as it thinks best)")
    add("--reference", choices=["both", "computed", "known"], default="both", help="settings (default: %(default)s)")
    add("--trl", help=argparse.SUPPRESS)  # this script calls itself with it
    return parser.parse_args()


def compare_times(options: argparse.Namespace, scratch: Path, *, known: bool) -> None:
    """One setting in turns: every run, then the ratio of the whole rounds' seconds."""
    steps, batch = options.steps, options.batch
    data, count = pairs(scratch, steps * batch)
    work = Work(options.model, data, count, options.tokens, batch, 2 * steps, steps, options.lora, known=known)
    print(f"\nreference {'known beforehand' if known else 'computed'}, {'LoRA' if options.lora else 'full weights'}")
    seconds: dict[str, list[float]] = {"einkorn": [], "TRL": []}
    for turn in range(options.repeat):
        for name in seconds:
            folder = scratch / f"{name}-{known}-{turn}"
            found = run_einkorn(work, folder, options.prompts) if name == "einkorn" else run_trl(work, folder)
            seconds[name].append(statistics.mean(found.seconds))
            each = " ".join(f"{s:.2f}" for s in found.seconds)
            print(
                f"  {name:8} {seconds[name][-1]:7.3f} s/step {found.gigabytes:6.2f} GB peak   steps: {each}", flush=True
            )
    ours, theirs = (statistics.mean(seconds[name]) for name in ("einkorn", "TRL"))
    print(f"  einkorn / TRL, s/step: {ours / theirs:.3f}")


def pairs(scratch: Path, count: int) -> tuple[str, int]:
    """A file of so many preference pairs, and how many they are."""
    rows = [row["messages"] for row in chats(None) if 4 <= len(row["messages"]) <= 8]
    made = [
        {"prompt": turns[:-1], "chosen": turns[-1:], "rejected": other[-1:]}
        for turns, other in itertools.pairwise(rows)
        if turns[-1] != other[-1]
    ][:count]
    file = scratch / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return str(file), len(made)


def configuration(work: Work, folder: Path, prompts: str | None = None, *, method: str = "TRL_DPO") -> dict[str, Any]:
    """What `train_with_trl` is told, in our words."""
    of_pairs = {
        "precompute_ref_log_probs": work.known,
        "shared_prompt": {None: None, "shared": True}.get(prompts, False),
    }
    name = "preference_pairs_jsonl" if method == "TRL_DPO" else "text_sft"
    return {
        "model": {"model_name": work.model, "torch_dtype_str": "float32", "model_max_length": work.length},
        "data": {"train": {"datasets": [{"dataset_name": name, "dataset_path": work.data}]}},
        "training": {
            "trainer_type": method,
            "output_dir": str(folder),
            "per_device_train_batch_size": work.batch,
            "max_steps": work.steps,
            "learning_rate": 1e-6,
            "logging_steps": 1,
            "save_steps": 0,
            "save_final_model": False,
            "enable_tensorboard": False,
            "use_peft": work.lora,
            "token_cache_dir": None,
            "trainer_kwargs": {"train_sampling_strategy": "sequential"} | (of_pairs if method == "TRL_DPO" else {}),
        },
        "peft": {"lora_r": 16, "lora_target_modules": "all-linear"} if work.lora else {},
    }


def run_einkorn(work: Work, folder: Path, prompts: str | None):
    import yaml

    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(configuration(work, folder, prompts)), encoding="utf-8")
    gigabytes = run([sys.executable, "-m", "launch", "train", "-c", str(file)], folder.with_suffix(".log"))
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return measured([(event["time"], event["epoch"]) for event in events if "loss" in event], work, gigabytes)


def run_trl(work: Work, folder: Path):
    """This script again, as a process that only trains with TRL."""
    log = folder.with_suffix(".log")
    gigabytes = run([sys.executable, "-m", "benchmarks.dpo_step", "--trl", json.dumps(work._asdict())], log)
    return measured(json.loads(log.read_text(encoding="utf-8").splitlines()[-1]), work, gigabytes)


def train_with_trl(work: Work) -> None:
    """DPOTrainer as it comes, but in float32 without checkpointing; prints the time and epoch of every step's end."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ends.append((time.time(), state.epoch))

    config = DPOConfig(
        output_dir=tempfile.mkdtemp(dir=Path(work.data).parent),
        per_device_train_batch_size=work.batch,
        max_steps=work.steps,
        max_length=work.length,
        learning_rate=1e-6,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        precompute_ref_log_probs=work.known,
    )
    DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32),
        args=config,
        train_dataset=load_dataset("json", data_files=work.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(work.model),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if work.lora else None,
        callbacks=[Clock()],
    ).train()
    print(json.dumps(ends))


def compare_memory(options: argparse.Namespace, scratch: Path) -> None:
    """Arguments and temporaries of the compiled steps of SFT and DPO on a batch of the same shape."""
    data, count = pairs(scratch, 64)
    shape = (1, options.batch, options.tokens)
    for lora in (True, False):
        work = Work(options.model, data, count, options.tokens, options.batch, 1, 0, lora, known=False)
        sft = step_bytes(work, scratch, "TRL_SFT", shape)
        dpo = step_bytes(work, scratch, "TRL_DPO", shape)
        known = step_bytes(work._replace(known=True), scratch, "TRL_DPO", shape)
        copy = sft[2]
        allowed = 1.1 * sum(sft[:2]) if lora else sum(sft[:2]) + copy
        print(f"\n{'LoRA' if lora else 'full weights'}, {shape[1]} rows of {shape[2]} tokens, GiB")
        for name, (arguments, temporaries, _) in (("SFT", sft), ("DPO", dpo), ("DPO, reference known", known)):
            parts = f"{arguments / GIB:.3f} arguments + {temporaries / GIB:.3f} temporaries"
            print(f"  {name:22} {(arguments + temporaries) / GIB:.3f} = {parts}")
        print(
            f"  DPO / SFT {sum(dpo[:2]) / sum(sft[:2]):.3f}; DPO / {'1.1 SFT' if lora else '(SFT + the weights)'} "
            f"{sum(dpo[:2]) / allowed:.3f}"
        )


def step_bytes(work: Work, scratch: Path, method: str, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Bytes of the arguments and the temporaries of a compiled step, and of the model's weights."""
    import jax
    import yaml

    from configs.load import load
    from launch import assemble
    from launch.method import method_of
    from launch.update import step_of

    file = scratch / "memory.yaml"
    file.write_text(yaml.safe_dump(configuration(work, scratch / "out", method=method)), encoding="utf-8")
    config = load(str(file)).config
    mesh = assemble.prepare_devices(config)
    model = assemble.open_model(config)
    chosen = method_of(config, model, longest_document=shape[2])
    step = step_of(config, model, mesh, lambda step: 1e-6, chosen)
    parts = assemble.abstract_parts(model)
    state = jax.eval_shape(step.init, parts.trained)
    integer, number = (jax.ShapeDtypeStruct(shape, dtype) for dtype in ("int32", "float32"))
    batch = dict.fromkeys(("tokens", "targets", "segments", "positions"), integer) | {"weights": number}
    if method == "TRL_DPO":
        batch |= {"branches": integer} | ({"reference": number} if work.known else {})
    compiled = step.train_leaves.lower(jax.tree.leaves(state), chosen.frozen(parts), batch).compile()  # type: ignore[attr-defined]
    found = compiled.memory_analysis()
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(assemble.abstract_parts(model)))
    return found.argument_size_in_bytes, found.temp_size_in_bytes, weights


if __name__ == "__main__":
    main()
