"""What became of the rows of a dataset: how many were used, cut, refused, and of which kinds the refused were."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from input_pipeline.examples import BAD_KINDS, RowError


class Counts(NamedTuple):
    """What became of the rows."""

    read: int = 0
    used: int = 0
    bad: int = 0  # skipped, with on_bad_row: skip
    left_out: int = 0  # by dataset_kwargs.transform
    untrained: int = 0  # dropped: no trained token left within max_length
    over_long: int = 0  # cut to max_length (some of them are untrained then)
    tokens: int = 0  # of the rows used
    trained_tokens: int = 0  # of these, the ones in the loss
    text_bytes: int = 0  # of the text that they spell, in UTF-8
    bad_kinds: Mapping[str, int] = {}  # never changed
    first_bad: Mapping[str, str] = {}  # of each kind, with its place

    def plus(self, later: "Counts") -> "Counts":
        """The counts of these rows and of `later` ones."""
        both: Iterator[tuple[str, Any, Any]] = zip(self._fields, self, later, strict=True)
        sums: dict[str, Any] = {name: a + b for name, a, b in both if isinstance(a, int)}
        kinds = {kind: self.bad_kinds.get(kind, 0) + n for kind, n in later.bad_kinds.items()}
        first = {**self.first_bad, **later.first_bad, **self.first_bad}
        return Counts(**sums, bad_kinds={**self.bad_kinds, **kinds}, first_bad=first)

    def table(self) -> dict[str, int]:
        """All numbers by name, the bad rows' kinds among them."""
        kinds = {f"bad: {BAD_KINDS[kind]}": number for kind, number in sorted(self.bad_kinds.items())}
        numbers = {name: value for name, value in self._asdict().items() if name not in ("bad_kinds", "first_bad")}
        return {**numbers, **kinds}

    def refused(self) -> str:
        """The bad rows by kind, most frequent first: "2 not JSON, 1 empty"."""
        ordered = sorted(self.bad_kinds.items(), key=lambda item: -item[1])
        return ", ".join(f"{number:,} {BAD_KINDS.get(kind, kind)}" for kind, number in ordered)


def too_many_bad(counts: Counts, fraction: float | None) -> None:
    """ValueError where a greater share than `fraction` of the rows read was bad; None allows any.

    It names the counts by kind and the first of each.
    """
    if fraction is not None and counts.bad > fraction * counts.read:
        raise ValueError(
            f"{counts.bad:,} of {counts.read:,} rows are bad, more than max_bad_row_fraction {fraction:g}"
            f" ({counts.refused()}); mend them, or raise data.<split>.max_bad_row_fraction. The first of each kind:"
            f" {'; '.join(counts.first_bad.values())}"
        )


def first_of_each(errors: Iterable[RowError]) -> dict[str, str]:
    """The first message of each kind."""
    first: dict[str, str] = {}
    for error in errors:
        first.setdefault(error.kind, str(error))
    return first
