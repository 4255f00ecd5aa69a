"""The quickstart's second half: ask the model, train it, ask it again, and show what changed.

    python -m launch.quickstart [--key value …]        (launch/quickstart.sh installs and then calls this)

Further arguments go to `einkorn train` as they are. What counts is exact match: the answer to a held-out message, read
as JSON, equals the expected object in all five fields. One process does it all: an accelerator serves one at a time.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

CONFIG = "configs/quickstart/sft.yaml"
HELD_OUT = Path("configs/quickstart/heldout.jsonl")
ROWS = 32  # of the held-out file: enough to see the difference, few enough for a laptop
LONGEST_ANSWER = 56  # tokens; the longest expected answer has 55
SHOWN = 3


def main(overrides: Sequence[str] = ()) -> None:
    """Runs the whole comparison from the repository's root; progress goes to stderr, the result to stdout."""
    from configs.load import load
    from launch import cli
    from launch.smollm2 import fetch_smollm2

    started = time.monotonic()
    model = fetch_smollm2()
    arguments = [f"--model.model_name={model}", *overrides]
    output = Path(load(CONFIG, arguments).config.training.output_dir)
    rows = read_rows(HELD_OUT)[:ROWS]

    say(f"before: {model.name} answers {len(rows)} held-out messages")
    before = answer(model, rows)
    say(f"training: einkorn train -c {CONFIG} {' '.join(arguments)}")
    cli.app(["train", "-c", CONFIG, *arguments], standalone_mode=False)
    say(f"after: {output} answers the same messages")
    after = answer(output, rows)

    show(rows, before, after)
    say(f"{time.monotonic() - started:.0f} seconds in all. Talk to it: .venv/bin/einkorn chat -m {output}")


def read_rows(file: Path) -> list["Row"]:
    """The conversations of a jsonl file, each split into what is asked and what should be answered."""
    conversations = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    return [Row(messages[:-1], messages[-1]["content"]) for messages in conversations]


def answer(folder: Path, rows: Sequence["Row"]) -> list[str]:
    """The model's greedy answers, all rows in one batch."""
    from launch.talk import open_talker
    from models.generate import generate

    talker = open_talker(str(folder))
    prompts = [talker.prompt_ids(row.prompt) for row in rows]
    stop_ids = talker.stop_ids
    answers = generate(talker.params, talker.config, prompts, max_new_tokens=LONGEST_ANSWER, stop_ids=stop_ids)
    return [talker.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


def share_exact(answers: Sequence[str], rows: Sequence["Row"]) -> float:
    """The share of answers that are exact."""
    return sum(is_exact(answer, row.expected) for answer, row in zip(answers, rows, strict=True)) / len(rows)


def is_exact(given: str, expected: str) -> bool:
    """Whether two texts are the same JSON value: 66.0 is 66.00, and spaces do not count."""
    try:
        return bool(json.loads(given) == json.loads(expected))
    except ValueError:
        return False


def show(rows: Sequence["Row"], before: Sequence[str], after: Sequence[str]) -> None:
    """Prints a few answers side by side, and how many are exact of all."""
    for row, old, new in list(zip(rows, before, after, strict=True))[:SHOWN]:
        print(f"\nmessage   {row.prompt[-1]['content']}")
        print(f"before    {_one_line(old)}\nafter     {_one_line(new)}\nexpected  {row.expected}")
    shares = [share_exact(answers, rows) for answers in (before, after)]
    print(f"\nexact match on {len(rows)} held-out messages: {shares[0]:.0%} before, {shares[1]:.0%} after")


def say(line: str) -> None:
    """A line about what is going on, apart from the result."""
    print(f"\n== {line}", file=sys.stderr, flush=True)


def _one_line(text: str, *, width: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


class Row(NamedTuple):
    """What is asked, as messages, and the text of the right answer."""

    prompt: list[dict[str, Any]]
    expected: str


if __name__ == "__main__":
    main(sys.argv[1:])
