"""Rows drawn one by one, any number of them: row i depends on seed, split and i alone."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Draw = Callable[[int], int]  # a number below its argument, each equally likely


@dataclass(frozen=True)
class Generated(Sequence):
    """Rows start, start + 1, … up to `stop`, each made by `make` from numbers drawn for it."""

    make: Callable[[Draw], Mapping[str, Any]]
    seed: int
    split: str
    stop: int
    start: int = 0

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index):
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            return Generated(self.make, self.seed, self.split, self.start + max(start, stop), self.start + start)
        if not 0 <= index < len(self):
            raise IndexError(index)
        # Python promises that this stays the same sequence in all versions, and says so of `random()` alone.
        numbers = random.Random(f"{self.seed} {self.split} {self.start + index}")
        return self.make(lambda below: int(numbers.random() * below))


def positive(value: Any, name: str, *, low: int = 1) -> int:
    """A whole number of at least `low`; ValueError names the key of `dataset_kwargs`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"dataset_kwargs.{name} must be a whole number of at least {low}, not {value!r}")
    return value
