"""The quickstarts' second half: ask the model, train it, ask it again, and show what changed.

    python -m launch.quickstart [sft | dpo | grpo | vl_sft | vl_grpo] [--key value …]

(launch/quickstart.sh installs, then calls this.) `sft` turns messages into JSON: what counts is that the answer, read
as JSON, equals the expected object in all five fields. `dpo` learns to be brief from pairs of answers, `grpo` from
rewards of its own: what counts is one paragraph of whole sentences with at most 40 words. `vl_sft` learns to read
handwritten digits in pictures, `vl_grpo` goes on from what that made, by rewards, to such that hang askew: what counts
is the right digit.
Further arguments go to `einkorn train` as they are. One process does it all: an accelerator serves one at a time.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch.brief_answers import is_brief
from launch.smollm2 import default_cache

ROWS = 32  # of a held-out file: enough to see the difference, few enough for a laptop
SHOWN = 3


def main(arguments: Sequence[str] = ()) -> None:
    """Runs a whole comparison from the repository's root; progress goes to stderr, the result to stdout."""
    from configs.load import load
    from launch import cli

    started = time.monotonic()
    task, overrides = chosen(arguments)
    model, data = task.prepare()
    options = [f"--model.model_name={model}", *data, *overrides]
    training = load(task.config, options).config.training
    rows = read_rows(task.held_out)[: task.rows]

    say(f"before: {model.name} answers {len(rows)} held-out messages")
    before = answer(model, rows, longest=task.longest_answer)
    say(f"training: einkorn train -c {task.config} {' '.join(options)}")
    cli.app(["train", "-c", task.config, *options], standalone_mode=False)
    say(f"after: {training.output_dir} answers the same messages")
    after = answer(Path(training.output_dir), rows, longest=task.longest_answer)

    show(task, rows, before, after)
    say(f"{time.monotonic() - started:.0f} seconds in all. Talk to it: .venv/bin/einkorn chat -m {training.output_dir}")


def chosen(arguments: Sequence[str]) -> tuple["Task", list[str]]:
    """The task that the first argument names, sft where it names none, and the other arguments."""
    if not arguments or arguments[0].startswith("-"):
        return TASKS["sft"], list(arguments)
    if arguments[0] not in TASKS:
        raise SystemExit(f"quickstart: '{arguments[0]}' is no task; allowed: {', '.join(TASKS)}")
    return TASKS[arguments[0]], list(arguments[1:])


def read_rows(file: Path) -> list["Row"]:
    """The rows of a jsonl file, conversations or preference pairs, each split into what is asked and what should be
    answered.
    """
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    asked = [(row["prompt"], row["chosen"]) if "chosen" in row else _split(row["messages"]) for row in rows]
    return [
        Row(_with_pictures(prompt, file.parent), expected[0]["content"], _said(prompt[-1]["content"]))
        for prompt, expected in asked
    ]


def answer(folder: Path, rows: Sequence["Row"], *, longest: int) -> list[str]:
    """The model's greedy answers of at most `longest` tokens, all rows in one batch."""
    from launch.talk import open_talker
    from models.generate import generate

    talker = open_talker(str(folder))
    asked = [talker.question(row.prompt) for row in rows]
    answers = generate(
        talker.params,
        talker.config,
        [one.ids for one in asked],
        max_new_tokens=longest,
        stop_ids=talker.stop_ids,
        shown=[one.shown for one in asked],
    )
    return [talker.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


def share_right(task: "Task", answers: Sequence[str], rows: Sequence["Row"]) -> float:
    """The share of answers that are as the task wants them."""
    return sum(task.is_right(answer, row.expected) for answer, row in zip(answers, rows, strict=True)) / len(rows)


def is_exact(given: str, expected: str) -> bool:
    """Whether two texts are the same JSON value: 66.0 is 66.00, and spaces do not count."""
    try:
        return bool(json.loads(given) == json.loads(expected))
    except ValueError:
        return False


def show(task: "Task", rows: Sequence["Row"], before: Sequence[str], after: Sequence[str]) -> None:
    """Prints a few answers side by side, and how many are right of all."""
    for row, old, new in list(zip(rows, before, after, strict=True))[:SHOWN]:
        print(f"\nmessage   {row.said}")
        print(f"before    {_one_line(old)}\nafter     {_one_line(new)}\n{task.expected:9} {row.expected}")
    shares = [share_right(task, answers, rows) for answers in (before, after)]
    print(f"\n{task.counts} on {len(rows)} held-out messages: {shares[0]:.0%} before, {shares[1]:.0%} after")


def say(line: str) -> None:
    """A line about what is going on, apart from the result."""
    print(f"\n== {line}", file=sys.stderr, flush=True)


def _split(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return messages[:-1], messages[-1:]


def _with_pictures(messages: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The messages with the bytes of pictures in the place of their files' names, which count from `folder`."""
    return [
        {**message, "content": [_opened(part, folder) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


def _opened(part: dict[str, Any], folder: Path) -> dict[str, Any]:
    if part["type"] != "image_path":
        return part
    return {"type": "image_binary", "binary": (folder / part["content"]).read_bytes()}


def _said(content: Any) -> str:
    return content if isinstance(content, str) else " ".join(str(part["content"]) for part in content)


def _one_line(text: str, *, width: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


class Row(NamedTuple):
    """What is asked, as messages, the text of the right answer, or of a preferred one, and the question for people."""

    prompt: list[dict[str, Any]]
    expected: str
    said: str


def _smollm2() -> "Prepared":
    from launch.smollm2 import fetch_smollm2

    return Prepared(fetch_smollm2(), [])


def _small_llava() -> "Prepared":
    from launch.digits import fetch_digits
    from launch.small_llava import make_small_llava

    return Prepared(make_small_llava(), [f"--data.train.datasets[0].dataset_path={fetch_digits() / 'train.jsonl'}"])


def _that_reads() -> "Prepared":
    from configs.load import load
    from launch.digits import fetch_digits

    model = Path(load(TASKS["vl_sft"].config, []).config.training.output_dir)
    if not (model / "config.json").is_file():
        raise SystemExit(f"quickstart: vl_grpo goes on from {model}, which vl_sft makes; run that first")
    return Prepared(model, [f"--data.train.datasets[0].dataset_path={fetch_digits() / 'train_turned_prompts.jsonl'}"])


class Prepared(NamedTuple):
    """The model that a quickstart begins with, and options that say where its data is."""

    model: Path
    options: list[str]


class Task(NamedTuple):
    """A quickstart: its configuration, its held-out rows, and what counts."""

    config: str
    held_out: Path
    longest_answer: int  # tokens
    is_right: Callable[[str, str], bool]  # an answer, and the expected one
    expected: str  # what the answer in the data is called
    counts: str  # what is_right says
    prepare: Callable[[], Prepared] = _smollm2  # fetches and makes what is not there
    rows: int = ROWS  # held-out ones that are asked


DATA = Path("configs/quickstart")
LONGEST_BRIEF = 64  # tokens: forty words are some fifty, and what is longer need not be read to its end
TASKS = {
    # the longest expected answer has 55 tokens
    "sft": Task(f"{DATA}/sft.yaml", DATA / "heldout.jsonl", 56, is_exact, "expected", "exact match"),
    "dpo": Task(
        f"{DATA}/dpo.yaml",
        DATA / "preferences_heldout.jsonl",
        LONGEST_BRIEF,
        lambda given, _: is_brief(given),
        "preferred",
        "brief answers",
    ),
    "grpo": Task(
        f"{DATA}/grpo.yaml",
        DATA / "preferences_heldout.jsonl",
        LONGEST_BRIEF,
        lambda given, _: is_brief(given),
        "such as",
        "brief answers",
    ),
    **{
        name: Task(
            f"{DATA}/{name}.yaml",
            default_cache() / f"digits/{held_out}.jsonl",
            12,
            lambda given, expected: given.strip() == expected,
            "expected",
            "the right digit",
            prepare,
            297,
        )
        for name, held_out, prepare in (
            ("vl_sft", "heldout", _small_llava),
            ("vl_grpo", "heldout_turned", _that_reads),
        )
    },
}


if __name__ == "__main__":
    main(sys.argv[1:])
