"""Which rows of each dataset are used, and in which order the datasets follow each other."""

from collections.abc import Sequence

import numpy as np


def choose_rows(rows: int, *, sample_count: int | None, shuffle: bool, seed: int) -> np.ndarray:
    """Indices of the rows of one dataset that are used, in order.

    Without `sample_count` all rows, shuffled if asked. With fewer than there are, the first of the (shuffled) rows.
    With more, whole copies and then the first of the (shuffled) rows, the lot shuffled once more. The permutation is
    that of `datasets.Dataset.shuffle(seed)`.
    """
    order = _permutation(rows, seed) if shuffle else np.arange(rows)
    if sample_count is None or rows == 0:
        return order
    if sample_count <= rows:
        return order[:sample_count]
    copies, rest = divmod(sample_count, rows)
    repeated = np.concatenate([*[np.arange(rows)] * copies, order[:rest]])
    return repeated[_permutation(sample_count, seed)] if shuffle else repeated


def mix(
    lengths: Sequence[int], *, proportions: Sequence[float | None], strategy: str, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(dataset, position within it) of each row of the mixture.

    Without proportions the datasets follow each other. With them, rows are drawn as `datasets.interleave_datasets`
    does; "first_exhausted" stops when the first dataset has run out, "all_exhausted" repeats datasets until each has
    run out once.
    """
    if shares(proportions) is None:
        which = np.repeat(np.arange(len(lengths)), lengths)
        return which, np.concatenate([np.arange(n) for n in lengths]) if lengths else which
    if strategy not in ("first_exhausted", "all_exhausted"):
        raise ValueError(f"mixture_strategy {strategy!r} is unknown; allowed: first_exhausted, all_exhausted")
    import datasets

    numbered = [datasets.Dataset.from_dict({"set": [i] * n, "row": list(range(n))}) for i, n in enumerate(lengths)]
    mixed = datasets.interleave_datasets(
        numbered, probabilities=[float(p or 0) for p in proportions], seed=seed, stopping_strategy=strategy
    ).with_format("numpy")
    return np.asarray(mixed["set"][:]), np.asarray(mixed["row"][:])


def shares(proportions: Sequence[float | None]) -> tuple[float, ...] | None:
    """The proportions of a split's datasets; None where none is given. ValueError where only some are, or their sum is
    not 1."""
    given = [p for p in proportions if p is not None]
    if not given:
        return None
    if len(given) != len(proportions):
        raise ValueError("mixture_proportion must be set for all datasets of a split or for none")
    if not np.isclose(total := sum(given), 1.0):
        raise ValueError(f"the mixture_proportion values of a split must sum to 1, not {total}")
    return tuple(map(float, given))


def _permutation(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(rows)
