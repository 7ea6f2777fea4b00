"""What a time gap means for the attention: a bucket of a table, or a power law.

Legend: H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_GAP_S = 2**31 - 2
"""Longest time gap told apart, s (68 years): differences of times then fit into 32 bits. Longer gaps count as it."""


MIN_WIDTH = 0.001
"""Of a bucket, in ln(s): what float32 logarithms of gaps can tell apart."""


@dataclass(frozen=True)
class TimeBuckets:
    """Buckets of a time gap: ``floor(ln(max(1, |gap_s|)) / width)``, the last one open.

    Source of the function: Zhai et al. 2024, reference code (its width, 0.301, looks like log10(2) but divides a
    natural log). With 0.301 and 129 buckets: bucket 0 holds gaps of 0 and 1 s, bucket 10 those of 21 to 27 s,
    bucket 40 those of 2.0 to 2.6 days, bucket 59 those of 1.6 to 2.2 years; those above 71 stay empty.
    """

    count: int = 129
    width: float = 0.301
    """In ln(s)."""

    def __post_init__(self) -> None:
        if self.count < 1 or not self.width >= MIN_WIDTH:
            raise ValueError(f"time buckets {self.count} x {self.width}: expected count >= 1, width >= {MIN_WIDTH}")

    @property
    def num_weights(self) -> int:
        """Columns of the time table."""
        return self.count

    def of(self, gap_s: Tensor) -> Tensor:
        """Bucket of each gap (any shape, int64 or float64, whole s; the sign is dropped): int32, 0 .. count-1."""
        exact = gap_s.to(torch.float64, copy=True)  # whole numbers below 2^53 stay exact
        return exact.abs_().clamp_(1.0, self._last_s).log_().div_(self.width).to(torch.int32)

    @property
    def _last_s(self) -> float:
        """A gap inside the last bucket, or the longest one."""
        return min(math.exp(min((self.count - 0.5) * self.width, 700.0)), float(MAX_GAP_S))

    def thresholds(self) -> Tensor:
        """[count+1] int32, s: smallest whole gap of each bucket, 0 first; MAX_GAP_S + 1 where none is so long.

        With it a kernel needs no logarithm. Agrees with :meth:`of` for every whole gap.
        """
        longest = math.log(MAX_GAP_S)
        steps = [b * self.width for b in range(1, self.count)]
        reached = [math.ceil(math.exp(x)) if x <= longest else MAX_GAP_S + 1 for x in steps]
        return torch.tensor([0, *reached, MAX_GAP_S + 1], dtype=torch.int32)


@dataclass(frozen=True)
class PowerLaw:
    """Time bias without a table: ``-a ln(1 + |gap_s|) + b``, a weight decaying with a power of the gap.

    The time weight is then [H or 1, 2]: a and b.
    """

    num_weights: int = 2

    def of(self, gap_s: Tensor) -> Tensor:
        """``ln(1 + |gap_s|)`` of each gap (any shape, int64 or float64, whole s): float32."""
        exact = gap_s.to(torch.float64, copy=True)
        return exact.abs_().clamp_(max=float(MAX_GAP_S)).log1p_().to(torch.float32)
