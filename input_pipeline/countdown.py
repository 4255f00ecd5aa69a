"""Puzzles: an equation is to be made of a few numbers, each used once. `dataset_name: countdown` is a set of them.

Each is made from its solution, so every one has one. Rows are as those of Jiayi-Pan/Countdown-Tasks-3to4 are stored,
`{"target": 98, "nums": [44, 19, 35]}`; `known.countdown` turns them into verl's.
"""

import functools
from typing import Any, NamedTuple
from zlib import crc32

from input_pipeline.generated import Draw, Generated, positive

HELD_OUT = 10  # of so many puzzles one is not in the split "train"


class Puzzle(NamedTuple):
    """The numbers, in no order; what is to be made of them; an equation's left side that does so."""

    numbers: list[int]
    target: int
    solution: str


def countdown(
    size: int = 1000,
    *,
    seed: int = 0,
    split: str = "train",
    fewest_numbers: int = 3,
    most_numbers: int = 4,
    highest_number: int = 99,
    lowest_target: int = 10,
    highest_target: int = 100,
    operations: str = "+-*/",
) -> Generated:
    """`size` puzzles of so many numbers from 1 to `highest_number`, whose targets and operations are these. None of the
    split "train" is in another one.
    """
    positive(size, "size")
    positive(fewest_numbers, "fewest_numbers", low=2)
    positive(most_numbers, "most_numbers", low=fewest_numbers)
    positive(highest_number, "highest_number")
    positive(lowest_target, "lowest_target")
    positive(highest_target, "highest_target", low=lowest_target)
    if not operations or not set(operations) <= set("+-*/"):
        raise ValueError(f"dataset_kwargs.operations must be some of '+-*/', not {operations!r}")
    one = functools.partial(
        puzzle,
        counts=range(fewest_numbers, most_numbers + 1),
        highest=highest_number,
        targets=range(lowest_target, highest_target + 1),
        operations=operations,
        trained=split == "train",
    )
    made = Generated(functools.partial(_row, one), seed, split, size)
    _ = made[0]  # a ValueError where these numbers hardly ever make such a target
    return made


def puzzle(draw: Draw, *, counts: range, highest: int, targets: range, operations: str, trained: bool) -> Puzzle:
    """A puzzle whose solution was drawn; ValueError where none is found with a target of `targets`.

    `trained`: one of the nine tenths of all puzzles that are for training, or of the others.
    """
    for _ in range(100_000):
        numbers = [1 + draw(highest) for _ in range(counts[draw(len(counts))])]
        target, solution = _combined(numbers, draw, operations)
        held_out = crc32(repr((sorted(numbers), target)).encode()) % HELD_OUT == 0
        if target in targets and held_out != trained:
            return Puzzle(numbers, target, solution)
    raise ValueError(
        f"dataset_name countdown: no target from {targets[0]} to {targets[-1]} was found for {counts[0]} to"
        f" {counts[-1]} numbers up to {highest} with {operations}; widen them in dataset_kwargs"
    )


def _row(one: Any, draw: Draw) -> dict[str, Any]:
    made = one(draw)
    return {"target": made.target, "nums": made.numbers}


def _combined(numbers: list[int], draw: Draw, operations: str) -> tuple[int, str]:
    """What an equation of all the numbers makes, 0 where it comes to nothing; and the equation: two parts at a time
    become one.
    """
    parts = [(number, str(number)) for number in numbers]
    while len(parts) > 1:
        (a, left), (b, right) = (parts.pop(draw(len(parts))) for _ in range(2))
        whole = {"+": a + b, "-": a - b, "*": a * b, "/": 0 if a % b else a // b}
        allowed = [sign for sign in operations if whole[sign] > 0]
        if not allowed:
            return 0, ""
        sign = allowed[draw(len(allowed))]
        parts.append((whole[sign], f"({left} {sign} {right})"))
    value, solution = parts[0]
    return value, solution[1:-1]
