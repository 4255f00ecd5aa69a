"""The iterator over batches, with a state that another run can go on from."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

Batch = dict[str, np.ndarray]
State = Mapping[str, Any]  # JSON: of which data, and where in it


class Part(NamedTuple):
    """The rows of a batch that a process is given: `count` of the `rows` of a microbatch, from row `first` on."""

    first: int
    count: int  # type: ignore[assignment]  # shadows tuple.count, which nobody calls
    rows: int


def same_data(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """ValueError says what differs between the data of a state and those here."""
    changed = [key for key in sorted({**saved, **here}) if saved.get(key) != here.get(key)]
    if changed:
        was = ", ".join(f"{key} {saved.get(key)} → {here.get(key)}" for key in changed)
        raise ValueError(f"the checkpoint is of other data, so its place in them is meaningless: {was}")


def merged(states: Sequence[State]) -> State:
    """The states of all processes as one: where each says what only it knows, all of that."""
    lanes = {lane: place for state in states for lane, place in state["position"].get("lanes", {}).items()}
    return {**states[0], "position": {**states[0]["position"], "lanes": lanes}} if lanes else states[0]


class Batches:
    """Batches [A, B, L] one after the other.

    `get_state()` is plain JSON, the same on every process and for every number of processes, and says where the *next*
    batch starts; after `set_state` of it the same batches follow, bit for bit, however many were prefetched. State of
    other data is refused.
    """

    part: Part | None = None  # every process is given the whole batch

    def __init__(self, dataset: grain.IterDataset, *, fingerprint: Mapping[str, Any], name_of: Callable[[int], str]):
        """`dataset` yields (batch, rows of the store in it); `name_of` names a row of the store."""
        self._open = [iter(dataset)]
        self._fingerprint = dict(fingerprint)
        self._name_of = name_of
        self._rows: tuple[int, ...] = ()
        # Runs at exit at the latest: Grain's prefetching iterator fails noisily if it is collected after its modules.
        self._close = weakref.finalize(self, _close, self._open)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        batch, self._rows = next(self._iterator())
        return batch

    @property
    def rows(self) -> tuple[int, ...]:
        """The rows of the last batch, by their numbers."""
        return self._rows

    def name_of(self, row: int) -> str:
        """Where a row comes from, such as "row 17 of data/train.jsonl"."""
        return self._name_of(row)

    def get_state(self) -> State:
        """Where the next batch starts, and what data this is."""
        return {"data": dict(self._fingerprint), "position": self._iterator().get_state()}

    def set_state(self, state: State) -> None:
        """Go on where `state` was taken; ValueError says what differs if it is of other data."""
        same_data(state["data"], self._fingerprint)
        self._iterator().set_state(state["position"])
        self._rows = ()

    def close(self) -> None:
        """Stop prefetching; there are no more batches then."""
        self._close()

    def _iterator(self) -> grain.DatasetIterator:
        if not self._open:
            raise ValueError("the batches were closed")
        return self._open[0]


def _close(iterators: list[grain.DatasetIterator]) -> None:
    while iterators:
        iterators.pop().close()
