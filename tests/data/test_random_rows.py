"""Rows of chosen groups in the batch of all ranks."""

import numpy as np

from hstu.data.random_rows import rows_of, token_counts


def test_rows_by_hand():
    counts = np.array([2, 0, 3, 1])  # rows 0 1 | | 2 3 4 | 5
    assert rows_of(counts, np.array([2, 0])).tolist() == [2, 3, 4, 0, 1]
    assert rows_of(counts, np.array([3, 1])).tolist() == [5]
    assert rows_of(counts, np.array([], np.int64)).tolist() == []
    assert rows_of(counts, np.arange(4)).tolist() == [0, 1, 2, 3, 4, 5]


def test_tokens_of_both_forms():
    lengths = np.array([2, 1])
    assert token_counts(lengths, fused=True, num_prefix=3).tolist() == [5, 4]
    assert token_counts(lengths, fused=False, num_prefix=1).tolist() == [5, 3]
