"""Rows of the batch of all ranks: by them random numbers are drawn, so that a rank's share draws what one rank would.

Legend: G users or sequences of the batch of all ranks, S of them on this rank.
"""

from __future__ import annotations

import numpy as np


def rows_of(counts: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Rows of the chosen groups, one group after the other, where all groups lie side by side; int64.

    Args:
        counts: [G] int64, >= 0. Rows of each group: events, tokens or predicted events.
        chosen: [S] int64. Groups of this rank in the order of its batch.
    """
    own = counts[chosen]
    ends = np.cumsum(own)
    shift = (np.cumsum(counts) - counts)[chosen] - (ends - own)
    return np.arange(int(own.sum()), dtype=np.int64) + np.repeat(shift, own)


def token_counts(lengths: np.ndarray, fused: bool, num_prefix: int) -> np.ndarray:
    """[G] int64. Tokens of ranking sequences of ``lengths`` [G] events: a prefix, then one (fused) or two an event."""
    return num_prefix + lengths * (1 if fused else 2)
