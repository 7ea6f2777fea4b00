"""Tables of the relative attention bias.

Legend: H heads, N padded length.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hstu.config import BiasConfig
from kernels.attention import PowerLaw, TimeBuckets

INIT_STD = 0.02
"""Of both tables (reference code)."""


def time_buckets(config: BiasConfig) -> TimeBuckets | PowerLaw | None:
    """How time gaps become weights; None without a time bias."""
    if not config.time:
        return None
    return PowerLaw() if config.time_kind == "power_law" else TimeBuckets(config.num_buckets, config.bucket_width)


class RelativeBias(nn.Module):
    """Position table [H or 1, 2N-1] and time table [H or 1, buckets] of one layer; either may be absent (None).

    By a power law instead of buckets the time weight is [H or 1, 2]: its slope and its level.
    """

    def __init__(self, config: BiasConfig, num_heads: int, padded_len: int) -> None:
        super().__init__()
        tables = num_heads if config.per_head else 1
        self.position: Tensor | None = None
        self.time: Tensor | None = None
        if config.position:
            self.position = nn.Parameter(torch.randn(tables, 2 * padded_len - 1) * INIT_STD)
        if (buckets := time_buckets(config)) is not None:
            self.time = nn.Parameter(torch.randn(tables, buckets.num_weights) * INIT_STD)
