"""Batches as whole arrays."""

import numpy as np
import pytest

from input_pipeline.collate import bucket_length, collate, line_of, shift
from input_pipeline.packing import join


def document(first, trained):
    """Tokens first, first + 1, … of which some are trained."""
    return shift(np.arange(first, first + len(trained), dtype=np.int32), np.asarray(trained, bool))


def test_targets_are_the_next_tokens_and_the_last_token_has_none():
    np.testing.assert_array_equal(
        document(10, [0, 0, 1, 1]),
        [
            [10, 11, 0],  # 11 is not trained
            [11, 12, 1],
            [12, 13, 1],
            [13, 0, 0],  # nothing follows
        ],
    )


def test_a_batch_of_packed_and_single_rows_in_two_microbatches():
    lines = [
        join([line_of(document(10, [0, 1, 1]), 0), line_of(document(20, [1, 1]), 1)]),
        line_of(document(30, [0, 0, 1, 1, 1]), 2),
        line_of(document(40, [0, 1]), 3),
    ]
    batch = collate(lines, accumulation=2, rows=2, length=6)
    expected = {
        "tokens": [
            [[10, 11, 12, 20, 21, 0], [30, 31, 32, 33, 34, 0]],
            [[40, 41, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]],  # one row too few: it stays empty
        ],
        "targets": [
            [[11, 12, 0, 21, 0, 0], [31, 32, 33, 34, 0, 0]],  # 12 never predicts 20, the next document's first
            [[41, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
        ],
        "weights": [
            [[1, 1, 0, 1, 0, 0], [0, 1, 1, 1, 0, 0]],  # 20 is trained in its own text, but nothing predicts it
            [[1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
        ],
        "segments": [
            [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 0]],
            [[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
        ],
        "positions": [
            [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 0]],
            [[0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
        ],
    }
    assert list(batch) == list(expected)
    for name, array in batch.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
        assert array.dtype == (np.float32 if name == "weights" else np.int32)


@pytest.mark.parametrize(
    ("longest", "max_length", "length"),
    [
        *[(1, 512, 64), (64, 512, 64), (65, 512, 128), (129, 512, 192), (193, 512, 256), (257, 512, 384)],
        *[(400, 512, 512), (600, 1000, 768), (900, 1000, 1000), (30, 40, 40), (3000, 8192, 3072), (5000, 8192, 6144)],
    ],
)
def test_rows_are_padded_to_few_lengths_and_never_beyond_max_length(longest, max_length, length):
    assert bucket_length(longest, max_length) == length
