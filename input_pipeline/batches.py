"""The iterator over batches, with a state that another run can go on from."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import grain
import numpy as np

Batch = dict[str, np.ndarray]


class Batches:
    """Batches [A, B, L] one after the other.

    `get_state()` is plain JSON, the same on every process and for every number of processes, and says where the *next*
    batch starts; after `set_state` of it the same batches follow, bit for bit, however many were prefetched. State of
    other data is refused.
    """

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

    def get_state(self) -> dict[str, Any]:
        """Where the next batch starts, and what data this is."""
        return {"data": dict(self._fingerprint), "position": self._iterator().get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; ValueError says what differs if it is of other data."""
        saved = dict(state["data"])
        changed = [key for key in sorted(saved | self._fingerprint) if saved.get(key) != self._fingerprint.get(key)]
        if changed:
            was = ", ".join(f"{key} {saved.get(key)} → {self._fingerprint.get(key)}" for key in changed)
            raise ValueError(f"the checkpoint is of other data, so its place in them is meaningless: {was}")
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
