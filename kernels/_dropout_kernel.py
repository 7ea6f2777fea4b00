# mypy: allow-incomplete-defs
"""The ``philox`` dropout stream inside Triton kernels, and seeded dropout alone. See ``kernels/_dropout.py``.

A draw per element costs most of its time in Philox, so one call serves the 8 neighbours of an octet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._dropout import OCTET, dropped_levels, kept_factor
from kernels._launch import Config, config, interpreting

DRAW_BITS = tl.constexpr(16)
DRAW_MASK = tl.constexpr(0xFFFF)
DRAWS = tl.constexpr(OCTET)


@triton.jit
def octet_draws(seed_low, seed_high, counter):
    """The 8 draws of each octet. counter: [...] int64; seed words: int32. Returns [..., 8] uint32 below 65536."""
    seed = (seed_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | seed_low.to(tl.uint32, bitcast=True)
    low = counter.to(tl.uint32)
    zero = low * 0
    word0, word1, word2, word3 = tl.philox(seed, low, (counter >> 32).to(tl.uint32), zero, zero)
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))  # [..., 2, 2]: word 2 a + b at (a, b)
    draws = tl.join(words & DRAW_MASK, words >> DRAW_BITS)  # [..., 2, 2, 2]
    return draws


@triton.jit
def drawn_rows(random_rows, rows, valid, GIVEN: tl.constexpr):
    """Rows [BLOCK_L] whose numbers the rows draw: those in random_rows [L] int64, or, without them, their own."""
    if GIVEN:
        return tl.load(random_rows + rows, mask=valid, other=0)
    else:
        return rows


@triton.jit
def keep_tile(seed_low, seed_high, dropped, rows, first_column, num_octets,
              BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """[BLOCK_L, BLOCK_D] bool: which elements of the tile stay.

    rows: [BLOCK_L] int64; first_column: a multiple of 8; num_octets: of a whole row.
    """
    octets = first_column // DRAWS + tl.arange(0, BLOCK_D // DRAWS)
    draws = octet_draws(seed_low, seed_high, rows[:, None] * num_octets + octets[None, :])
    return tl.reshape(draws, (BLOCK_L, BLOCK_D)) >= dropped


@triton.jit(do_not_specialize=["num_octets", "seed_low", "seed_high", "dropped"])
def _seeded_dropout_kernel(
    x_ptr, y_ptr, random_rows, num_octets, width, octets_per_row, seed_low, seed_high, dropped, factor,
    FLAT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x, y: [rows, width] contiguous. FLAT: the width is a multiple of 8, so octets lie side by side."""
    octet = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    within = tl.arange(0, DRAWS)[None, :]
    valid = (octet < num_octets)[:, None]
    if FLAT:
        index = octet[:, None] * DRAWS + within
    else:
        column = (octet % octets_per_row)[:, None] * DRAWS + within
        index = (octet // octets_per_row)[:, None] * width + column
        valid = valid & (column < width)
    counter = octet
    if ROWS:
        row = tl.load(random_rows + octet // octets_per_row, mask=octet < num_octets, other=0)
        counter = row * octets_per_row + octet % octets_per_row
    keep = tl.reshape(octet_draws(seed_low, seed_high, counter), (BLOCK, DRAWS)) >= dropped
    x = tl.load(x_ptr + index, mask=valid, other=0.0).to(tl.float32)
    tl.store(y_ptr + index, tl.where(keep, x * factor, 0.0).to(y_ptr.dtype.element_ty), mask=valid)


def seed_words(seed: int) -> tuple[int, int]:
    """The two 32-bit halves of a seed below 2^64 as signed integers, so that every seed launches the same binary."""
    halves = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    return tuple(half - (1 << 32) if half >= 1 << 31 else half for half in halves)  # type: ignore[return-value]


def configs() -> list[Config]:
    """Octets per program."""
    if interpreting():
        return [config(BLOCK=64)]
    return [config(BLOCK=256, num_warps=4)]


def drawn_by(rows: Tensor | None, rate: float) -> Tensor | None:
    """What the kernels take as random rows: nothing where nothing is drawn."""
    return None if rows is None or rate == 0.0 else rows.contiguous()


def seeded_dropout_fwd(x: Tensor, rate: float, seed: int, random_rows: Tensor | None = None) -> Tensor:
    """``x`` times its mask, contiguous. The gradient is the same function of the upstream gradient."""
    x, random_rows = x.contiguous(), drawn_by(random_rows, rate)
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    width = x.shape[-1] if x.dim() else 1
    rows, octets = x.numel() // width, -(-width // OCTET)
    c = configs()[0]
    _seeded_dropout_kernel[(triton.cdiv(rows * octets, c["BLOCK"]),)](
        x, y, random_rows, rows * octets, width, octets, *seed_words(seed), dropped_levels(rate),
        kept_factor(rate), FLAT=width % OCTET == 0, ROWS=random_rows is not None, **c.launch(),
    )  # fmt: skip
    return y
