"""Philox 4x32-10 in plain torch: the stream of ``tl.philox``, bit for bit, on any device.

A draw is a pure function of (seed, stream, counter). A kernel draws the same numbers in registers; torch paths
and tests draw them here.

Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3 (known answers from its Random123 library).
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFF_FFFF
KEY_A, KEY_B = 0x9E37_79B9, 0xBB67_AE85
ROUND_A, ROUND_B = 0xD251_1F53, 0xCD9E_8D57
ROUNDS = 10

STREAM_DEFAULT = 0
"""What ``tl.rand`` and ``tl.randint4x`` draw from."""
STREAM_NEGATIVES = 1
"""Negatives of the sampled softmax: a seed that something else uses too gives unrelated numbers."""


def philox_4x32(
    counter_lo: Tensor, counter_hi: Tensor | int, seed: int, stream: int = STREAM_DEFAULT, high: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 random bits for each counter, as ``tl.philox(seed, counter_lo, counter_hi, stream, high)``.

    Args:
        counter_lo: any shape, int64, 0..2^32 - 1.
        counter_hi: the same, or one number for all.
        seed: 0..2^64 - 1.
        stream, high: 0..2^32 - 1. The two upper words of the counter.

    Returns:
        Four int64 tensors of that shape, values 0..2^32 - 1.
    """
    zeros = torch.zeros_like(counter_lo)
    c0, c1, c2, c3 = counter_lo, zeros + counter_hi, zeros + stream, zeros + high
    key_a, key_b = seed & MASK, (seed >> 32) & MASK
    for _ in range(ROUNDS):
        high_a, low_a = _multiply(ROUND_A, c0)
        high_b, low_b = _multiply(ROUND_B, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ key_a, low_b, high_a ^ c3 ^ key_b, low_a
        key_a, key_b = (key_a + KEY_A) & MASK, (key_b + KEY_B) & MASK
    return c0, c1, c2, c3


def _multiply(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of factor * x, both below 2^32, without leaving 63 bits."""
    upper, lower = factor * (x >> 16), factor * (x & 0xFFFF)  # below 2^48
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & MASK


def uniform_ids(
    num_rows: int, num_columns: int, num_items: int, seed: int, device: torch.device, rows: Tensor | None = None
) -> Tensor:
    """Ids 1..num_items drawn uniformly with replacement, int32 [num_rows, num_columns].

    Row l uses the counters ``l * ceil(num_columns / 4) + 0, 1, ...``, four columns each. 32 bits become an id by the
    upper half of a product, ``1 + bits * num_items / 2^32``: an item's probability differs from 1 / num_items by
    less than 2^-32, a share of less than num_items / 2^32 of itself.

    num_items: 1..2^31 - 1. seed: 0..2^64 - 1. rows: [num_rows] int64, the l of each row; None: 0..num_rows - 1.
    """
    fours = -(-num_columns // 4)
    counter = torch.arange(num_rows * fours, dtype=torch.int64, device=device)
    if rows is not None:
        counter = (rows[:, None] * fours + counter[:fours]).view(-1)
    words = philox_4x32(counter & MASK, counter >> 32, seed, STREAM_NEGATIVES)
    bits = torch.stack(words, dim=1).view(num_rows, 4 * fours)[:, :num_columns]
    # bits * num_items stays below 2^63.
    return ((bits * num_items) >> 32).add_(1).to(torch.int32)
