"""What a shard is: rows read from the beginning to the end, with a place of a few numbers to go on from."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

Position = dict[str, Any]  # plain JSON


class Record(NamedTuple):
    """A row as stored, or the RowError that says why it cannot be read; its number, as `Shard.where` knows it; and
    where the row after it begins."""

    row: Any
    number: int
    next: Position


class Shard(Protocol):
    """Rows in order, one after the other, whatever their number: memory stays as it is. Picklable."""

    @property
    def name(self) -> str:
        """What it is called in messages."""

    def read(self, position: Position | None = None) -> Iterator[Record]:
        """The rows from `position` on, or from the beginning."""

    def where(self, number: int) -> str:
        """What names a row, such as "row 17 of data/train.jsonl"."""

    def part(self, index: int, count: int) -> "Shard":
        """One of `count` parts of about the same size that together are this shard."""


def falls_to(number: int, *, index: int, count: int) -> bool:
    """Whether row `number`, from 1, belongs to part `index` of `count` where each part has every `count`-th row."""
    return (number - 1) % count == index
