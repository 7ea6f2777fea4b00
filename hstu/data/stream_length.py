"""Stochastic length for what is read in sequence: each sequence is cut by random numbers of its own.

Whoever reads it cuts it, before it travels and whatever batch it comes to: what is kept is a function of (seed, epoch,
sequence). The rule is that of ``hstu/data/stochastic_length.py``, whose batches draw theirs together.

Legend: n sequences, L events of them that may be dropped.
"""

from __future__ import annotations

import numpy as np

from hstu.config import StochasticLengthConfig
from hstu.data.order import mix64
from hstu.data.shuffle_buffer import places_within
from hstu.data.stochastic_length import LENGTH_SEED, SELECT_SEED, cut_length, select_positions, whole_probability
from hstu.seeding import derive


class StreamLength:
    """The sampler of one training.

    Attributes:
        expected: ``tokens_dropped`` and ``attention_work_saved``, as shares, of an epoch on average: what an epoch
            drops is not known before it is read.
    """

    def __init__(self, config: StochasticLengthConfig, longest: int, seed: int, whole: np.ndarray,
                 cuttable: np.ndarray, counts: np.ndarray) -> None:  # fmt: skip
        """config: with an alpha. longest: N, the longest sequence that training sees. whole, cuttable, counts: int64,
        sequences of ``whole`` events, of which ``cuttable`` may be dropped, and how many of each there are."""
        assert config.alpha is not None
        self.alpha, self.selection, self.longest, self.seed = config.alpha, config.selection, longest, seed
        kept = whole_probability(cuttable, longest, self.alpha)
        short = whole - cuttable + np.minimum(cuttable, cut_length(longest, self.alpha))
        shares = [
            1.0 - float((counts * (kept * n + (1.0 - kept) * m)).sum()) / max(1.0, float((counts * n).sum()))
            for n, m in ((whole, short), (whole.astype(np.float64) ** 2, short.astype(np.float64) ** 2))
        ]
        self.expected = {"tokens_dropped": shares[0], "attention_work_saved": shares[1]}

    def kept(self, cuttable: np.ndarray, ids: np.ndarray, epoch: int) -> np.ndarray:
        """[n] int64. How many of the ``cuttable`` [n] events of each sequence stay. ids: [n] int64, one of its own."""
        draws = _uniform(self._bits(ids, LENGTH_SEED, epoch))
        whole = draws < whole_probability(cuttable, self.longest, self.alpha)
        return np.where(whole, cuttable, np.minimum(cuttable, cut_length(self.longest, self.alpha)))

    def positions(self, cuttable: np.ndarray, kept: np.ndarray, ids: np.ndarray, epoch: int,
                  timestamps: np.ndarray) -> np.ndarray:  # fmt: skip
        """[K] int64, ascending. Which of the joined cuttable events stay: ``kept`` [n] of each, as :meth:`kept` says.
        timestamps: [L] int64, s."""
        bases = self._bits(ids, SELECT_SEED, epoch)
        owners = np.repeat(np.arange(len(cuttable)), cuttable)
        numbers = places_within(cuttable)

        def draw(places: np.ndarray) -> np.ndarray:
            return -np.log(_uniform(mix64(bases[owners[places]] + numbers[places].astype(np.uint64))))

        return select_positions(cuttable, kept, self.selection, draw, timestamps)

    def _bits(self, ids: np.ndarray, purpose: int, epoch: int) -> np.ndarray:
        """[n] uint64, random by id."""
        return mix64(ids.astype(np.uint64) ^ np.uint64(derive(self.seed, purpose, epoch)))


def _uniform(bits: np.ndarray) -> np.ndarray:
    """float64 in (0, 1) of random uint64."""
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
