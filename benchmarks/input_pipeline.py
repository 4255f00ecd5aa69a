"""Rows and tokens that one core makes ready in a second: einkorn against the bare tokenizer, and against TRL.

    python -m benchmarks.input_pipeline
    python -m benchmarks.input_pipeline --model ~/.cache/einkorn/SmolLM2-135M-Instruct --rows 1500 --repeat 3

Two pairs, each in turns (einkorn, other, einkorn, other), every run in a process of its own that is pinned to one core.
Times are those of the processor, in which other programs on the machine count little.

text: documents of real prose (the State of the Union addresses, `launch/corpus.py`) from a JSON Lines file to arrays of
tokens, against the library `tokenizers` alone on the same texts, which it is given in memory.

chats: real conversations of two people (as in `benchmarks/sft_step.py`) from a JSON Lines file through the chat
template to batches of packed rows, against SFTTrainer's own preparation of the dataset with packing, and without the
time in which the file is read. Both cut rows to the same length. With `--assistant` only the assistant's turns are
trained, by a template that marks them, since TRL asks for one.

At the end: medians, their ratios with the bars, and how full the rows are.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = Path("~/.cache/einkorn/SmolLM2-135M-Instruct").expanduser()
PAIRS = {"text": ("einkorn, text", "tokenizer alone", 0.85), "chats": ("einkorn, chats", "TRL, chats", 2.0)}


class Work(NamedTuple):
    """What a run is given; JSON-able."""

    model: str
    texts: str  # JSON Lines files
    chats: str
    length: int
    assistant: bool
    core: int


class Measured(NamedTuple):
    """Seconds of the processor; rows and tokens made ready; the share of packed rows' places that holds a token."""

    seconds: float
    rows: int
    tokens: int
    useful: float | None = None


def main() -> None:
    options = parse()
    if options.one:
        name, work = json.loads(options.one)
        print(json.dumps(measure(name, Work(*work))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        compare(options, Path(scratch))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(SMOLLM2), help="folder of the tokenizer (default: %(default)s)")
    add("--rows", type=int, default=1500, help="conversations (default: %(default)s)")
    add("--documents", type=int, default=120, help="documents of prose (default: %(default)s)")
    add("--length", type=int, default=1024, help="tokens of a packed row (default: %(default)s)")
    add("--assistant", action="store_true", help="train the assistant's turns only")
    add("--repeat", type=int, default=3, help="runs of each, in turns (default: %(default)s)")
    add("--core", type=int, default=max(os.sched_getaffinity(0)), help="the core to run on (default: %(default)s)")
    add("--one", help=argparse.SUPPRESS)  # this script calls itself with it
    return parser.parse_args()


def compare(options: argparse.Namespace, scratch: Path) -> None:
    """Runs the pairs in turns and prints every run, then medians and ratios."""
    work = Work(
        options.model,
        texts=documents(scratch, options.documents),
        chats=conversations(scratch, options.rows),
        length=options.length,
        assistant=options.assistant,
        core=options.core,
    )
    found: dict[str, list[Measured]] = {name: [] for pair in PAIRS.values() for name in pair[:2]}
    print(f"{Path(options.model).name}, packed rows of {work.length}, core {work.core}")
    for ours, other, _ in PAIRS.values():
        for _ in range(options.repeat):
            for name in (ours, other):
                result = run(name, work)
                found[name].append(result)
                print(f"  {described(name, result)}", flush=True)
    print("medians")
    for ours, other, bar in PAIRS.values():
        a, b = (middle(found[name]) for name in (ours, other))
        print(f"  {described(ours, a)}\n  {described(other, b)}")
        rate = (a.rows / a.seconds) / (b.rows / b.seconds)
        print(
            f"  {ours} / {other}: {rate:.2f} in rows per second; at least {bar:g}: {'met' if rate >= bar else 'missed'}"
        )


def middle(runs: list[Measured]) -> Measured:
    """One of the runs with the median of the times."""
    return runs[0]._replace(seconds=statistics.median(run.seconds for run in runs))


def described(name: str, result: Measured) -> str:
    rates = f"{result.rows / result.seconds:9,.0f} rows/s {result.tokens / result.seconds:11,.0f} tokens/s"
    full = "" if result.useful is None else f"   {result.useful:.2%} of the places of packed rows are tokens"
    return f"{name:16} {result.seconds:7.2f} s {rates}{full}"


def documents(scratch: Path, count: int) -> str:
    """The first so many addresses, spread over the two centuries."""
    from launch.corpus import fetch_addresses

    lines = (fetch_addresses() / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    file = scratch / "texts.jsonl"
    file.write_text("".join(lines[:: max(1, len(lines) // count)][:count]), encoding="utf-8")
    return str(file)


def conversations(scratch: Path, count: int) -> str:
    from benchmarks.sft_step import chats, write_rows

    return write_rows(chats(most=None)[:count], scratch)


def run(name: str, work: Work) -> Measured:
    """This script again, as a process that makes one run."""
    environment = os.environ | {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HOME": tempfile.mkdtemp(dir=Path(work.texts).parent),  # nothing is found that an earlier run has cached
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "benchmarks.input_pipeline", "--one", json.dumps([name, work])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    return Measured(*json.loads(done.stdout.splitlines()[-1]))


def measure(name: str, work: Work) -> Measured:
    os.sched_setaffinity(0, {work.core})
    runs = {
        "einkorn, text": einkorn_text,
        "tokenizer alone": tokenizer_alone,
        "einkorn, chats": einkorn_chats,
        "TRL, chats": trl_chats,
    }
    return runs[name](work)


def tokenizer_of(work: Work) -> Any:
    from input_pipeline.tokenizer import load_tokenizer

    return load_tokenizer(work.model, chat_template="default_gen" if work.assistant else None)


def einkorn_text(work: Work) -> Measured:
    feed, seconds, _ = einkorn(work._replace(assistant=False), work.texts, packing="wrapped")
    return Measured(seconds, feed.counts.used, feed.counts.tokens, feed.useful)


def einkorn_chats(work: Work) -> Measured:
    feed, _, seconds = einkorn(work, work.chats, packing="bfd")
    return Measured(seconds, feed.counts.used, feed.counts.tokens, feed.useful)


def einkorn(work: Work, file: str, *, packing: str) -> tuple[Any, float, float]:
    """The feed, the seconds until all rows were tokenised, and those until all batches of an epoch were made."""
    from input_pipeline.pipeline import train_feed
    from input_pipeline.reading import Reading

    tokenizer = tokenizer_of(work)
    data = {"train": {"datasets": [{"dataset_name": "text_sft", "dataset_path": file}], "pack": True}}
    reading = Reading(max_length=work.length, seed=0, packing=packing, assistant_only_loss=work.assistant)
    start = time.process_time()
    feed = train_feed(data, tokenizer, reading=reading, rows_per_step=1, accumulation=1, epochs=1, prefetch=0)
    ready = time.process_time() - start
    for _ in feed.batches:
        pass
    return feed, ready, time.process_time() - start


def tokenizer_alone(work: Work) -> Measured:
    """The ids of the same texts from the library, 512 at a time; they are not taken out of it."""
    backend = tokenizer_of(work).backend_tokenizer
    texts = [json.loads(line)["text"] for line in Path(work.texts).read_text(encoding="utf-8").splitlines()]
    start = time.process_time()
    tokens = sum(len(e) for i in range(0, len(texts), 512) for e in backend.encode_batch_fast(texts[i : i + 512]))
    return Measured(time.process_time() - start, len(texts), tokens)


def trl_chats(work: Work) -> Measured:
    """SFTTrainer's preparation of the dataset, as it is made when a trainer is."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    seconds = []

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *args, **kwargs):
            start = time.process_time()
            prepared = super()._prepare_dataset(*args, **kwargs)
            seconds.append(time.process_time() - start)
            return prepared

    datasets.disable_progress_bars()
    tokenizer = tokenizer_of(work)
    rows = datasets.load_dataset("json", data_files=work.chats, split="train")
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(dir=Path(work.texts).parent),
        max_length=work.length,
        packing=True,
        assistant_only_loss=work.assistant,
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    trainer = Timed(
        model=LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)),
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    return Measured(seconds[0], len(rows), sum(lengths), sum(lengths) / (len(lengths) * work.length))


if __name__ == "__main__":
    main()
