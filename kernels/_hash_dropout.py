"""Dropout whose mask is a hash of the place of each element: any part of a mask without the rest of it.

For masks that a stream of draws (``kernels/_dropout.py``) would have to go through from their first element: attention
weights, whose blocks depend on who else is in the batch, and tensors with many values a row. A row and a column have a
word of 32 bits each, hashed from their numbers and the seed; an element's bits are the upper half of a shorter hash of
one word XOR the other, whose passes over the whole mask are what it costs.

Source: lowbias32 of Wellons 2018, Prospecting for hash functions (nullprogram.com/blog/2018/07/31).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels._backend import choose
from kernels._dropout import LEVELS, check_rate, dropped_levels, kept_factor, seeded_dropout

FACTOR_A, FACTOR_B = 0x7FEB_352D, 0x846C_A68B - 2**32
"""Of lowbias32, as signed words."""
COLUMN_SALT = 0x9E37_79B9 - 2**32
"""Keeps the words of row n and column n apart."""


def hash_keep(rows: Tensor, columns: Tensor, rate: float, seed: int) -> Tensor:
    """Which elements stay: bool, False with probability ``rate`` (to 1/65536).

    Args:
        rows, columns: int64, >= 0, columns below 2^32. Of each element; they are broadcast.
        rate: in [0, 1).
        seed: 0..2^64 - 1.
    """
    low = _mix(torch.tensor(_signed(seed & 0xFFFF_FFFF), dtype=torch.int32))
    high = int(_mix(low ^ _signed(seed >> 32)))  # of the whole seed: no seed has the words of another in another order
    row_words = _mix(_mix(rows.to(torch.int32) ^ int(low)) ^ (rows >> 32).to(torch.int32) ^ high)
    column_words = _mix(_mix(columns.to(torch.int32) + COLUMN_SALT) ^ high)
    words = row_words ^ column_words
    words *= FACTOR_A
    words ^= (words >> 15) & 0x1_FFFF
    words *= FACTOR_B
    return words >= dropped_levels(rate) * LEVELS - 2**31  # signed words: as many below as of 2^16 draws are dropped


def row_dropout(x: Tensor, rate: float, seed: int | None, rows: Tensor) -> Tensor:
    """``x`` with dropout, the mask being a function of (seed, the row's number, the place within the row).

    On Triton the draws are those of ``seeded_dropout``; either way nothing is stored for the backward but ``rows``.

    Args:
        x: [n, ..., C] floating, at least two dimensions.
        rate: in [0, 1). seed: >= 0; None: x itself (evaluation).
        rows: [n] int64, >= 0. Number of each row.
    """
    check_rate(rate)
    if seed is None or rate == 0.0:
        return x
    if choose("jagged", x.device, x.dtype).backend == "triton":
        inner = torch.arange(x.shape[1:-1].numel(), device=x.device).view(x.shape[1:-1])
        places = rows.view(-1, *[1] * inner.dim()) * inner.numel() + inner
        return seeded_dropout(x, rate, seed, places)
    return _RowDropout.apply(x, rate, seed, rows)  # type: ignore[no-any-return]


class _RowDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float, seed: int, rows: Tensor) -> Tensor:
        ctx.rate, ctx.seed = rate, seed
        ctx.save_for_backward(rows)
        return _dropped(x, rate, seed, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (rows,) = ctx.saved_tensors
        return _dropped(grad, ctx.rate, ctx.seed, rows), None, None, None


def _dropped(x: Tensor, rate: float, seed: int, rows: Tensor) -> Tensor:
    columns = torch.arange(x.shape[1:].numel(), device=x.device)
    keep = hash_keep(rows[:, None], columns, rate, seed).view(x.shape)
    return x * keep.to(x.dtype).mul_(kept_factor(rate))


def _mix(x: Tensor) -> Tensor:
    """Hash of each 32-bit word, in place; int32, whose products wrap and whose shifts are made logical."""
    x ^= (x >> 16) & 0xFFFF
    x *= FACTOR_A
    x ^= (x >> 15) & 0x1_FFFF
    x *= FACTOR_B
    x ^= (x >> 16) & 0xFFFF
    return x


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word
