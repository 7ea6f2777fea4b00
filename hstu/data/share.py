"""A rank's share of the batch of all ranks: which users are its own, by work, and what all ranks have together.

Every rank computes the same division alone, from lengths. Legend: G users or sequences of the batch, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from hstu.data.balance import split_even, user_work

EVENT_WORK = 5
"""What an event costs outside attention, per model dimension, in the work of one query with one key. For HSTU with
equal query and value widths: the five products of width D x D of an event (U, V, Q, K and the output), each 2 D^2 H
multiply-adds, over the 2 D H of one pair, halved as the mask is causal. SASRec's is 4 + 2 F / D, so 6 at F = D."""
B = TypeVar("B")


@dataclass(frozen=True)
class Share(Generic[B]):
    """What one rank trains on in a step.

    Attributes:
        batch: the rank's own users; perhaps none.
        num_events: predicted events of all ranks.
        work: [R] float64. Of every rank, in query-key pairs.
    """

    batch: B
    num_events: int
    work: np.ndarray


@dataclass(frozen=True)
class Ranks:
    """Who divides a batch: this rank, R, and the work of an event outside attention (see :data:`EVENT_WORK`)."""

    rank: int = 0
    size: int = 1
    event_work: float = 0.0

    def divide(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The groups of this rank, int64, ascending, and the work [R] of every rank. lengths: [G] int64, tokens."""
        owners, work = self.divide_all(lengths)
        return np.flatnonzero(owners == self.rank), work

    def divide_all(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rank [G] int64 of every group, and the work [R] of every rank."""
        work = user_work(lengths, linear=self.event_work)
        owners = split_even(work, self.size)
        return owners, np.bincount(owners, weights=work, minlength=self.size)
