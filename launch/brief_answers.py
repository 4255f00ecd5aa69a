"""The preference quickstart's data: SmolLM2 answers short questions twice, and the brief answer is preferred.

    python -m launch.brief_answers     writes configs/quickstart/preferences_{train,heldout}.jsonl anew, in ten minutes

Both answers of a pair are what the model itself says, greedily: the rejected one when it is only asked, the chosen one
when it has three questions with brief answers before it (`SHOWN`). What is to be learned is thus a manner it has
already, to be had without being shown it: `is_brief` says when an answer has it. It learns nothing about the world,
and is as often wrong as before. Questions ask for things of every day; those held out are never asked for in training.

The seed decides which thing is asked for how. Answers are as near to the same elsewhere as the model's arithmetic is.
"""

import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path("configs/quickstart")
SEED = 20250611
TRAIN_PAIRS, HELD_OUT_PAIRS = 48, 32
MOST_WORDS = 40
LONGEST_ANSWER = 128  # tokens; what goes on is cut back to its last whole sentence
BATCH = 44

QUESTIONS = [
    "What is {}?",
    "What is {} used for?",
    "How does {} work?",
    "Tell me about {}.",
    "Why would anyone need {}?",
    "Can you explain what {} is?",
]
SHOWN = [
    ("What is a ladder?", "A ladder is two long rails with steps between them. People climb it to reach high places."),
    ("How does a candle work?", "The flame melts the wax, the wick draws it up, and the wax burns."),
    (
        "Why would anyone need soap?",
        "Soap loosens dirt and grease from skin and cloth, so that water can wash them away.",
    ),
]
THINGS = [
    *("a lighthouse", "a compass", "a kettle", "a violin", "an umbrella", "a zipper", "a hammock", "a telescope"),
    *("a bridge", "a sundial", "yeast", "an anchor", "a backpack", "a bakery", "a balloon", "a barometer"),
    *("a battery", "a bell", "a bicycle", "a blanket", "a boat", "a bookshelf", "a boomerang", "a broom"),
    *("a bucket", "a button", "a calculator", "a calendar", "a camera", "a canal", "a canoe", "a carpet"),
    *("a castle", "a ceiling fan", "a cello", "a chair", "a chimney", "a clarinet", "a clock", "a coat"),
    *("a coffee grinder", "a coin", "a comb", "a computer mouse", "a cork", "a crane", "a cup", "a curtain"),
    *("a dam", "a diary", "a dictionary", "a dishwasher", "a door lock", "a drum", "an elevator", "an envelope"),
    *("an escalator", "a fan", "a farm", "a fence", "a ferry", "a fire alarm", "a fire extinguisher", "a fireplace"),
    *("a fishing net", "a flashlight", "a flute", "a fountain", "a freezer", "a garden hose", "a glacier", "glass"),
    *("a globe", "glue", "a greenhouse", "a guitar", "a hairbrush", "a hammer", "a harbour", "a helmet"),
    *("honey", "an hourglass", "ink", "an iron", "a jar", "a kite", "a lamp", "a lawn mower"),
    *("leather", "a lens", "a library", "a lighter", "a magnet", "a mailbox", "a map", "a mattress"),
    *("a microphone", "a microscope", "a mirror", "a museum", "a nail", "a needle", "a newspaper", "a notebook"),
    *("an orchard", "an oven", "paper", "a parachute", "a pencil", "a piano", "a pillow", "a pipe"),
    *("a postage stamp", "a pulley", "a pump", "a radio", "a raincoat", "a refrigerator", "a ring", "a robot"),
    *("a rope", "a sail", "salt", "a saw", "a scarf", "scissors", "a screwdriver", "a sewing machine"),
    *("a ship", "a shovel", "silk", "a skateboard", "a sled", "a smoke detector", "a spoon", "a stethoscope"),
    *("a stove", "a submarine", "sugar", "a suitcase", "a swimming pool", "a tent", "a thermometer", "a thermos"),
    *("a ticket", "a toaster", "a toothbrush", "a towel", "a tractor", "a train", "a tunnel", "a typewriter"),
    *("a vacuum cleaner", "vinegar", "a wallet", "a watch", "a water filter", "a wheel", "a wheelbarrow", "a whistle"),
    *("a windmill", "a window", "wool", "a wrench"),
]


def main() -> None:
    """Asks the model, and writes both files; progress goes to stderr."""
    pairs = list(make_pairs(questions()))
    wanted = TRAIN_PAIRS + HELD_OUT_PAIRS
    if len(pairs) < wanted:
        raise RuntimeError(f"{len(pairs)} of {len(THINGS)} questions gave a pair; needed: {wanted}")
    splits = {"train": pairs[HELD_OUT_PAIRS:wanted], "heldout": pairs[:HELD_OUT_PAIRS]}
    for name, part in splits.items():
        lines = [json.dumps(pair.row(), ensure_ascii=False) + "\n" for pair in part]
        (FOLDER / f"preferences_{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def questions() -> list[str]:
    """A question for each thing, all kinds in equal shares, in an order of their own."""
    rng = random.Random(SEED)
    things = rng.sample(THINGS, len(THINGS))
    asked = [QUESTIONS[n % len(QUESTIONS)].format(thing) for n, thing in enumerate(things)]
    return rng.sample(asked, len(asked))


def is_brief(answer: str) -> bool:
    """Whether an answer is one paragraph of whole sentences with at most `MOST_WORDS` words, and not nothing."""
    return 3 < len(answer.split()) <= MOST_WORDS and "\n" not in answer and answer.endswith((".", "!", "?"))


def goes_in_circles(answer: str) -> bool:
    """Whether more than two fifths of the words have been said before, as small models do ("a ring made of a ring")."""
    words = re.findall(r"[\w'’]+", answer.lower())
    return len(set(words)) < 3 / 5 * len(words)


def make_pairs(asked: Sequence[str]) -> Iterator["Pair"]:
    """Those questions to which the shown answers make the model brief, and which it answers at length without them."""
    examples = [
        message for question, answer in SHOWN for message in (_turn("user", question), _turn("assistant", answer))
    ]
    plain = [[_turn("user", question)] for question in asked]
    for prompt, chosen, rejected in zip(asked, _answers([examples + p for p in plain]), _answers(plain), strict=True):
        if is_brief(chosen) and not goes_in_circles(chosen) and len(rejected.split()) > MOST_WORDS:
            yield Pair(prompt, chosen, rejected)


def _answers(prompts: Sequence[list[dict[str, str]]]) -> list[str]:
    """The model's greedy answers; one that has no end by then is cut back to its last whole sentence."""
    from launch.smollm2 import fetch_smollm2
    from launch.talk import open_talker
    from models.generate import generate

    talker = open_talker(str(fetch_smollm2()))
    ids = [talker.question(prompt).ids for prompt in prompts]
    found: list[str] = []
    for start in range(0, len(ids), BATCH):
        answers = generate(
            talker.params,
            talker.config,
            ids[start : start + BATCH],
            max_new_tokens=LONGEST_ANSWER,
            stop_ids=talker.stop_ids,
        )
        found += [talker.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
        print(f"{len(found)} of {len(prompts)} answers", file=sys.stderr)
    return [re.sub(r"(?s)(.*[.!?]).*", r"\1", answer) for answer in found]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


class Pair(NamedTuple):
    """A question and two answers to it."""

    prompt: str
    chosen: str
    rejected: str

    def row(self) -> dict[str, Any]:
        """The pair as it is stored."""
        return {
            "prompt": [_turn("user", self.prompt)],
            "chosen": [_turn("assistant", self.chosen)],
            "rejected": [_turn("assistant", self.rejected)],
        }


if __name__ == "__main__":
    main()
