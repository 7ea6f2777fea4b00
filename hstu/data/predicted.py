"""The positions of a retrieval batch that its loss scores.

Legend: L events of the batch, n positions that count.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Predicted:
    """What a loss takes of a batch; of a rank's share n may be 0.

    Attributes:
        labels: [n] int64. Items, or rows of a table that has fewer.
        every: [L] int64. As ``labels``, of all events.
        weights: [n] float32; None: all are alike.
        random_rows: [n] int64. Places by which random numbers are drawn; None: 0..n-1.
        places: [n] int64, ascending. Which of the L events they stand at; None: n = L.
    """

    labels: Tensor
    every: Tensor
    weights: Tensor | None = None
    random_rows: Tensor | None = None
    places: Tensor | None = None

    def at(self, places: Tensor) -> Predicted:
        """Those at ``places`` [m] int64 among these n, which keep what they draw."""
        rows = places if self.random_rows is None else self.random_rows.index_select(0, places)
        weights = None if self.weights is None else self.weights.index_select(0, places)
        events = places if self.places is None else self.places.index_select(0, places)
        return Predicted(self.labels.index_select(0, places), self.every, weights, rows, events)

    def of(self, x: Tensor) -> Tensor:
        """[n, ...] of values [L, ...] of all events."""
        return x if self.places is None else x.index_select(0, self.places)
