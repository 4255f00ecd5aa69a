"""Which rows are used and in which order, against `datasets` itself and against Oumi's published cases."""

import datasets
import numpy as np
import pytest

from input_pipeline.mixing import choose_rows, mix


def rows(count: int) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"row": list(range(count))})


def test_all_rows_in_order_without_a_sample_or_shuffle():
    np.testing.assert_array_equal(choose_rows(4, sample_count=None, shuffle=False, seed=1), [0, 1, 2, 3])


def test_shuffling_is_that_of_datasets():
    np.testing.assert_array_equal(
        choose_rows(50, sample_count=None, shuffle=True, seed=7), rows(50).shuffle(seed=7)["row"][:]
    )


def test_a_small_sample_is_the_first_of_the_shuffled_rows():
    np.testing.assert_array_equal(choose_rows(9, sample_count=3, shuffle=False, seed=1), [0, 1, 2])
    np.testing.assert_array_equal(
        choose_rows(9, sample_count=3, shuffle=True, seed=1), rows(9).shuffle(seed=1).take(3)["row"][:]
    )


def test_a_large_sample_is_whole_copies_and_the_first_of_the_shuffled_rows():
    np.testing.assert_array_equal(choose_rows(3, sample_count=7, shuffle=False, seed=1), [0, 1, 2, 0, 1, 2, 0])
    expected = datasets.concatenate_datasets([rows(3), rows(3), rows(3).shuffle(seed=5).take(1)]).shuffle(seed=5)
    np.testing.assert_array_equal(choose_rows(3, sample_count=7, shuffle=True, seed=5), expected["row"][:])


def test_a_sample_of_no_rows_is_empty():
    assert choose_rows(5, sample_count=0, shuffle=True, seed=0).tolist() == []
    assert choose_rows(0, sample_count=5, shuffle=True, seed=0).tolist() == []


def test_datasets_without_proportions_follow_each_other():
    which, place = mix([2, 0, 3], proportions=[None, None, None], strategy="first_exhausted", seed=0)
    np.testing.assert_array_equal(which, [0, 0, 2, 2, 2])
    np.testing.assert_array_equal(place, [0, 1, 0, 1, 2])


@pytest.mark.parametrize(
    ("seed", "strategy", "count"),
    [(1, "first_exhausted", 9), (1, "all_exhausted", 124), (42, "first_exhausted", 7), (42, "all_exhausted", 113)],
)
def test_proportions_draw_as_oumi_does(seed, strategy, count):
    which, _ = mix([5, 50, 5], proportions=[0.1, 0.4, 0.5], strategy=strategy, seed=seed)
    assert len(which) == count
    if (seed, strategy) == (1, "first_exhausted"):
        assert "".join("abc"[i] for i in which) == "ccbcbbcbc"


def test_proportions_for_some_datasets_only_or_with_another_sum_are_refused():
    with pytest.raises(ValueError, match="must be set for all datasets of a split or for none"):
        mix([1, 1], proportions=[0.5, None], strategy="first_exhausted", seed=0)
    with pytest.raises(ValueError, match=r"must sum to 1, not 0\.9"):
        mix([1, 1], proportions=[0.5, 0.4], strategy="first_exhausted", seed=0)
    with pytest.raises(ValueError, match="'both' is unknown; allowed: first_exhausted, all_exhausted"):
        mix([1, 1], proportions=[0.5, 0.5], strategy="both", seed=0)
