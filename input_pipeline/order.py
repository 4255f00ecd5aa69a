"""The order of an epoch's rows: a permutation drawn from (seed, epoch), all rows exactly once."""

import functools

import grain
import numpy as np


@functools.lru_cache(maxsize=4)
def permutation(count: int, seed: int | None, epoch: int, stream: int = 0) -> np.ndarray:
    """An order of `count` things in an epoch, int64 [count]; their own order without a seed. Different `stream`s are
    independent.

    Sorted by the raw output of numpy's Philox generator, whose stream is guaranteed to stay as it is, unlike that of
    `Generator.permutation`: a run can be resumed with another numpy.
    """
    if seed is None:
        return np.arange(count)
    key = np.asarray([seed % 2**64, 2 * epoch + stream], np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


class EpochOrder(grain.MapDataset):
    """Another dataset with every epoch in its own order, cut to its first `keep` elements.

    Index e * keep + i is element i of epoch e.
    """

    def __init__(self, parent: grain.MapDataset, *, seed: int | None, keep: int):
        super().__init__(parent)
        self._seed = seed
        self._keep = keep

    def __len__(self) -> int:
        return self._keep

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, self._keep)
        count = len(self._parent)
        return self._parent[epoch * count + int(permutation(count, self._seed, epoch)[place])]
