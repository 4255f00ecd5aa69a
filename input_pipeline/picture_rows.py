"""The pictures of tokenised rows, as arrays of a batch.

A tokenised row keeps its pictures' placeholder tokens only. The pictures themselves are read again from the row, by its
number, when a batch needs them, in the thread that makes batches ready ahead.
"""

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from input_pipeline.catalog import Dataset
from input_pipeline.collate import Line
from input_pipeline.content import pictures_of
from input_pipeline.examples import RowError
from input_pipeline.pictures import Pictures
from input_pipeline.processors.processor import Prepared, Processor
from input_pipeline.store import TokenStore

_THREADS = 4  # that prepare the pictures of a batch


class Shown(NamedTuple):
    """A picture of a row: what the row says of it, width and height, how many tokens stand for it, and the places of
    the first and the last of them."""

    name: str
    size: tuple[int, int]
    tokens: int
    first: int
    last: int


@dataclass(frozen=True)
class RowPictures:
    """The pictures of the rows of a store, by row; `examples` understands a row of a dataset again."""

    pictures: Pictures
    store: TokenStore
    datasets: tuple[Dataset, ...]

    @property
    def processor(self) -> Processor:
        """How they are prepared."""
        return self.pictures.processor

    def has(self, row: int) -> bool:
        """Whether a row has pictures."""
        return bool((self.store[row][0] == self.processor.feature_id).any())

    def shown(self, row: int) -> list[Shown]:
        """The pictures of a row for people to see, and where their tokens stand."""
        ids = self.store[row][0]
        if not self.has(row):
            return []
        dataset, index = map(int, self.store.sources[row])
        example = self.datasets[dataset].example(index)
        assert example is not None
        pictures = pictures_of(example)
        images = self.pictures.openers[dataset].open(pictures)
        feature = next(iter(self.processor.own))
        counts = [text.count(feature) for text in self.processor.expand([image.size for image in images])]
        places = np.split(np.flatnonzero(ids == self.processor.feature_id)[: sum(counts)], np.cumsum(counts)[:-1])
        return [
            Shown(repr(picture), image.size, len(at), int(at[0]), int(at[-1]))
            for picture, image, at in zip(pictures, images, places, strict=True)
        ]

    def any(self) -> bool:
        """Whether some row has."""
        step = 1 << 24
        ids = self.store.ids
        return any(bool((ids[at : at + step] == self.processor.feature_id).any()) for at in range(0, len(ids), step))

    def __call__(self, row: int) -> Prepared:
        """The pictures of a row; ValueError where they are others than when it was tokenised."""
        if not self.has(row):
            return self.processor.nothing()
        dataset, index = map(int, self.store.sources[row])
        example = self.datasets[dataset].example(index)
        assert example is not None
        where = functools.partial(self.datasets[dataset].rows.where, index)
        try:
            prepared = self.pictures.prepare(example, dataset)
        except RowError as error:
            raise error.at(where()) from error
        found, expected = int((self.store[row][0] == self.processor.feature_id).sum()), sum(prepared.features)
        if not expected or found % expected:
            raise ValueError(
                f"{where()}: its pictures have {expected} features, and its tokens were made for {found}: a picture has"
                " changed since; clear training.token_cache_dir"
            )
        return prepared


def joined(prepared: Sequence[Prepared]) -> Prepared:
    """The pictures of several rows as those of one, whose segments go on counting."""
    before = np.cumsum([0, *(int(one.segments.max(initial=0)) for one in prepared)])
    names = {name for one in prepared for name in one.more}
    return Prepared(
        np.concatenate([one.patches for one in prepared]),
        np.concatenate([one.segments + n for one, n in zip(prepared, before, strict=False)]),
        np.concatenate([one.places for one in prepared]),
        tuple(count for one in prepared for count in one.features),
        tuple(size for one in prepared for size in one.grids),
        {name: np.concatenate([one.more[name] for one in prepared if name in one.more]) for name in names},
    )


def bucket(patches: int, unit: int) -> int:
    """The smallest allowed number of patches that is enough: `unit` times 1, 2, 3, 4, 6, 8, 12, 16, …"""
    units, allowed = -(-patches // unit), 1
    while allowed < units:
        power_of_two = allowed & (allowed - 1) == 0
        allowed = 2 * allowed if allowed == 1 else allowed * 3 // 2 if power_of_two else allowed * 4 // 3
    return allowed * unit


def arrays_of(
    lines: Sequence[Line], pictures: RowPictures, *, accumulation: int, rows: int, length: int
) -> dict[str, np.ndarray]:
    """The arrays [A, B, …] of a batch for the pictures of its lines; none where they have no pictures."""
    asked = sorted({row for line in lines for row in line.rows})
    with ThreadPoolExecutor(_THREADS) as pool:  # Pillow and numpy let go of the interpreter
        of_row = dict(zip(asked, pool.map(pictures, asked), strict=True))
    prepared = [[of_row[row] for row in line.rows] for line in lines]
    return picture_arrays(lines, prepared, pictures.processor, accumulation=accumulation, rows=rows, length=length)


def picture_arrays(
    lines: Sequence[Line],
    prepared: Sequence[Sequence[Prepared]],
    processor: Processor,
    *,
    accumulation: int,
    rows: int,
    length: int,
) -> dict[str, np.ndarray]:
    """`arrays_of` lines whose pictures are prepared, `prepared[r]` those of the documents of line r."""
    of_line = [joined(documents) for documents in prepared]
    most = max(len(one.patches) for one in of_line)
    if not most:
        return {}
    shape, patches = (accumulation * rows,), bucket(most, processor.unit)
    arrays = {
        "patches": np.zeros((*shape, patches, processor.channels), np.float32),
        "patch_segments": np.zeros((*shape, patches), np.int32),
        "patch_places": np.zeros((*shape, patches, 2), np.int32),
    }
    for r, one in enumerate(of_line):
        n = len(one.patches)
        arrays["patches"][r, :n], arrays["patch_segments"][r, :n] = one.patches, one.segments
        arrays["patch_places"][r, :n] = one.places
        for name, array in one.more.items():
            arrays.setdefault(name, np.zeros((*shape, patches, *array.shape[1:]), array.dtype))[r, :n] = array
    beside = [token_arrays(line, each, processor) for line, each in zip(lines, prepared, strict=True)]
    for name, first in beside[0].items():
        arrays[name] = np.zeros((*shape, length, *first.shape[1:]), first.dtype)
        for r, of_tokens in enumerate(beside):
            arrays[name][r, : len(of_tokens[name])] = of_tokens[name]
    return {name: array.reshape(accumulation, rows, *array.shape[1:]) for name, array in arrays.items()}


def token_arrays(line: Line, prepared: Sequence[Prepared], processor: Processor) -> dict[str, np.ndarray]:
    """What stands beside the tokens of a line, made document by document; in a document with branches, along each
    branch with what it sees."""
    found: dict[str, np.ndarray] = {}
    branches, before = line.more.get("branches"), 0
    for segment, one in enumerate(prepared, 1):
        here = np.flatnonzero(line.segments == segment)
        for seen in [here] if branches is None else _along(branches, line.positions, here):
            trained = line.columns[seen, 2] > 0
            prefix = int(np.argmax(trained)) + 1 if trained.any() else None
            of_tokens = processor.token_arrays(line.columns[seen, 0], before, one, prefix=prefix)
            for name, array in of_tokens.items():
                if name not in found:
                    found[name] = np.zeros((len(line.columns), *array.shape[1:]), array.dtype)
                found[name][seen] = array
        before += sum(one.features)
    return found


def _along(branches: np.ndarray, positions: np.ndarray, here: np.ndarray) -> list[np.ndarray]:
    """The tokens that each branch sees, in the order of their positions."""
    asked = [branch for branch in np.unique(branches[here]) if branch] or [0]
    seen = [here[(branches[here] == 0) | (branches[here] == branch)] for branch in asked]
    return [places[np.argsort(positions[places], kind="stable")] for places in seen]
