"""Batches of a stream: each step takes the same number of lines from every lane.

The lines of a step are the same for every number of processes, workers and accumulation steps; a process reads the
lanes that its part of the batch comes from. Line c of a step, counted lane by lane, stands in microbatch c mod A as row
c // A, so that neighbouring rows come from neighbouring lanes.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from input_pipeline.batches import Batch, Part, State, same_data
from input_pipeline.collate import Line, bucket_length, collate
from input_pipeline.counts import too_many_bad
from input_pipeline.lanes import Found, Lane, Place, Recipe

log = logging.getLogger(__name__)

_ENOUGH = 1000  # rows, before the share of bad ones is judged
LANES = 16  # more would let more processes share the work, and make every start tokenise more rows


class Portion(NamedTuple):
    """What one lane gives to one step: lines, the lane's state after them, what became of the rows read for them; or
    the error that ended it."""

    lane: int
    lines: list[Line]
    state: dict[str, Any]
    found: Found
    error: Exception | None = None


def lanes_for(rows_per_step: int, *, shuffled: bool) -> int:
    """How many lanes a stream is read by: a divisor of the rows of a step; one if rows come in the order stored."""
    return max(n for n in range(1, LANES + 1) if rows_per_step % n == 0) if shuffled else 1


class StreamBatches:
    """Batches [A, B, L] one after the other, like `batches.Batches`; of B the rows of this process's `part`.

    `get_state()` covers the lanes that this process reads: `batches.merged` puts those of all processes together.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        accumulation: int,
        part: Part,
        fingerprint: Mapping[str, Any],
        workers: int = 0,
        prefetch: int = 2,
        max_bad_fraction: float | None = None,
    ):
        """`workers`: processes that read and tokenise; 0: a thread. `prefetch`: steps made ready ahead."""
        rows_per_step = part.rows * accumulation
        if part.count < part.rows and recipe.packing is None:
            raise ValueError("only packed rows, which are all of one length, can be read in parts")
        self.part = part
        self.names = recipe.names
        self._recipe = recipe
        self._accumulation = accumulation
        self._each = rows_per_step // recipe.lanes  # lines of a lane in a step
        first, last = part.first * accumulation, (part.first + part.count) * accumulation - 1
        self._mine = range(first // self._each, last // self._each + 1)
        self._fingerprint = dict(fingerprint)
        self._workers = max(n for n in range(min(workers, len(self._mine)) + 1) if n == 0 or len(self._mine) % n == 0)
        self._prefetch = prefetch
        self._max_bad_fraction = max_bad_fraction
        self._states: dict[str, Any] = {str(lane): None for lane in self._mine}
        self._open: list[Any] = []
        self._close = weakref.finalize(self, _close, self._open)
        self.rows: tuple[Place, ...] = ()
        self.found = Found()
        self.seen: Counter[int] = Counter()  # lines' documents by dataset

    def __iter__(self) -> "StreamBatches":
        return self

    def __next__(self) -> Batch:
        if not self._open:
            self._open.append(iter(self._dataset()))
        portions = [next(self._open[0]) for _ in self._mine]
        for portion in portions:
            if portion.error is not None:
                raise portion.error
        lines = [line for portion in portions for line in portion.lines]
        if not lines:
            raise StopIteration
        self._states = {str(portion.lane): portion.state for portion in portions}
        self._account(portions, lines)
        return self._batch(portions, lines)

    def name_of(self, row: Place) -> str:
        """Where a row comes from, such as "row 17 of data/train.jsonl"."""
        return self._recipe.name_of(row)

    def get_state(self) -> State:
        """Where the next batch starts in the lanes of this process, and what data this is."""
        return {"data": dict(self._fingerprint), "position": {"lanes": dict(self._states)}}

    def set_state(self, state: State) -> None:
        """Go on where `state` was taken; ValueError says what differs if it is of other data."""
        same_data(state["data"], self._fingerprint)
        lanes = state["position"]["lanes"]
        self._states = {str(lane): lanes[str(lane)] for lane in self._mine}
        _close(self._open)
        self.rows, self.found = (), Found()

    def close(self) -> None:
        """Stop reading."""
        self._close()

    def _dataset(self) -> grain.IterDataset:
        states = {lane: self._states[str(lane)] for lane in self._mine}
        dataset: grain.IterDataset = _Portions(self._recipe, states, self._each)
        if self._workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain asks for its own, which are parsed in programs of absl's only
            options = grain.MultiprocessingOptions(
                num_workers=self._workers, per_worker_buffer_size=max(1, self._prefetch * len(states) // self._workers)
            )
            return dataset.mp_prefetch(options)
        if self._prefetch:
            ahead = self._prefetch * len(states)
            return grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=ahead)
        return dataset

    def _batch(self, portions: Sequence[Portion], lines: Sequence[Line]) -> Batch:
        """The part [A, b, L] of a step's batch."""
        recipe, A, b = self._recipe, self._accumulation, self.part.count
        nothing = Line(np.empty((0, 3), np.int32), np.empty(0, np.int32), np.empty(0, np.int32), ())
        laid = [line for p in portions for line in [*p.lines, *[nothing] * (self._each - len(p.lines))]]
        skipped = self.part.first * A - self._mine[0] * self._each
        longest = max(len(line.columns) for line in lines)
        length = bucket_length(longest, recipe.length) if recipe.packing is None else recipe.length
        flat = collate(laid[skipped : skipped + b * A], accumulation=1, rows=b * A, length=length)
        return {
            name: np.ascontiguousarray(x.reshape(b, A, length).swapaxes(0, 1))  # line c → microbatch c mod A
            for name, x in flat.items()
        }

    def _account(self, portions: Sequence[Portion], lines: Sequence[Line]) -> None:
        self.rows = tuple(place for line in lines for place in line.rows)
        self.seen.update(place.dataset for place in self.rows)
        known = self.found
        for portion in portions:
            self.found = self.found.plus(portion.found)
        for notice in sorted(self.found.notices - known.notices):
            log.info(notice)
        for kind in self.found.counts.first_bad.keys() - known.counts.first_bad.keys():
            log.info("skipped a bad row, the first of its kind: %s", self.found.counts.first_bad[kind])
        if self.found.counts.read >= _ENOUGH:
            too_many_bad(self.found.counts, self._max_bad_fraction)


class _Portions(grain.IterDataset):
    """The portions of some lanes, in turn, without end; workers take every n-th lane each."""

    def __init__(self, recipe: Recipe, states: Mapping[int, Any], each: int):
        super().__init__()
        self._recipe = recipe
        self._states = dict(states)
        self._each = each

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Keep a part of the lanes; Grain calls it in each worker."""
        self._states = dict(list(self._states.items())[sl])

    def __iter__(self) -> grain.DatasetIterator:
        return _PortionIterator(self._recipe, self._states, self._each)


class _PortionIterator(grain.DatasetIterator):
    def __init__(self, recipe: Recipe, states: Mapping[int, Any], each: int):
        super().__init__()
        self._lanes = [(lane, Lane(recipe, lane, state)) for lane, state in states.items()]
        self._each = each
        self._turn = 0

    def __next__(self) -> Portion:
        number, lane = self._lanes[self._turn % len(self._lanes)]
        self._turn += 1
        lines: list[Line] = []
        error = None
        try:
            for line in lane:
                lines.append(line)
                if len(lines) == self._each:
                    break
        except (ValueError, OSError, NotImplementedError) as caught:  # a user can mend these
            error = caught
        return Portion(number, lines, lane.state(), lane.found(), error)

    def get_state(self) -> dict[str, Any]:
        """Every portion carries the state of its lane, so this one says nothing."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Lanes begin where they were made to."""


def _close(iterators: list[Any]) -> None:
    while iterators:
        iterators.pop().close()
