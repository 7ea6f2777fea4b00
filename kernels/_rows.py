# mypy: allow-incomplete-defs
"""Rows of a table in Triton: their norms, products, draws of them, sums into them. Shared by all ops over a table.

Normalised rows are ``x * inverse`` with ``inverse = 1 / max(|x|, eps)``. With ``y = x * inverse`` the gradient is
``d x = inverse * (d y - y (y . d y))`` where ``|x| > eps`` (*live*), and ``inverse * d y`` below.

Sums into rows are float32 atomics, whose order and last bits vary, or, on request, 64-bit integers in units of a
*quantum*: integer sums do not depend on the order, so two runs agree bit for bit, at twice the memory.

Legend: ``L`` total events, ``D`` model width, ``V`` rows of the table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._launch import Config, config, interpreting, power_of_two, select

STREAM_NEGATIVES = tl.constexpr(1)
"""As ``kernels._philox.STREAM_NEGATIVES``."""
FIXED_BITS = 62
"""The largest sum that can occur takes this many bits; one is left for rounding, one is the sign."""
SMALLEST_QUANTUM = 1e-37
"""Keeps 1 / quantum within float32."""
NORMS_ELEMENTS = 4096
"""Elements of a tile of the kernels that read a table once."""


@triton.jit
def inverse_norm(squares, eps):
    """1 / max(|x|, eps) from the sum of squares, and 1.0 where |x| > eps, else 0.0."""
    norm = tl.sqrt(squares)
    return 1.0 / tl.maximum(norm, eps), tl.where(norm > eps, 1.0, 0.0)


@triton.jit
def read_rows(base, rows, inside, D: tl.constexpr, STRIDE: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr):
    """Rows of a matrix, [rows, BLOCK_D] in the dtype of the products, zero where not inside."""
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d < D)[None, :]
    return tl.load(base + rows[:, None] * STRIDE + d[None, :], mask=mask, other=0.0).to(DTYPE)


@triton.jit
def products(
    a, b, a_base, a_rows, a_inside, b_base, b_rows, b_inside, D: tl.constexpr, STRIDE_A: tl.constexpr,
    STRIDE_B: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """a b^T [a rows, b rows] float32, of the tiles, or, with a CHUNK, of the rows read again CHUNK columns at a time.

    Products of float32 that are no TF32 run without matrix units and hold both operands in registers.
    """
    if CHUNK == 0:
        return tl.dot(a, tl.trans(b), input_precision=PRECISION)
    else:
        total = tl.zeros([a_rows.shape[0], b_rows.shape[0]], tl.float32)
        for start in range(0, D, CHUNK):
            d = start + tl.arange(0, CHUNK)
            a_part = tl.load(
                a_base + a_rows[:, None] * STRIDE_A + d[None, :], mask=a_inside[:, None] & (d < D)[None, :], other=0.0
            ).to(DTYPE)
            b_part = tl.load(
                b_base + b_rows[None, :] * STRIDE_B + d[:, None], mask=b_inside[None, :] & (d < D)[:, None], other=0.0
            ).to(DTYPE)
            total = tl.dot(a_part, b_part, total, input_precision=PRECISION)
        return total


@triton.jit
def inverses(inverse, rows, inside, NORMALIZE: tl.constexpr):
    """1 / max(norm, eps) of rows, and 1.0 where the norm exceeds eps; ones and zeros without normalisation."""
    if NORMALIZE:
        signed = tl.load(inverse + rows, mask=inside, other=1.0)
        return tl.abs(signed), tl.where(signed > 0, 1.0, 0.0)
    else:
        one = rows.to(tl.float32) * 0.0 + 1.0
        return one, one * 0.0


@triton.jit
def draw_ids(seed, row, start, fours, num_items, BLOCK_R: tl.constexpr):
    """Ids 1..num_items [BLOCK_R] of columns start.. of a row: the stream of ``kernels._philox.uniform_ids``.

    start: a multiple of 4. fours: counters per row, ceil(columns / 4).
    """
    counter = row.to(tl.int64) * fours + start // 4 + tl.arange(0, BLOCK_R // 4)
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    a, b, c, d = tl.philox(seed, low, high, zero + STREAM_NEGATIVES, zero)
    bits = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))  # a0 b0 c0 d0 a1 ...
    return (tl.umulhi(bits, (bits * 0).to(tl.uint32) + num_items.to(tl.uint32)) + 1).to(tl.int32)


@triton.jit
def add_to_rows(pointers, values, mask, per_quantum, FIXED: tl.constexpr):
    """Adds float32 values to float32 sums, or rounds them to the quantum and adds to int64 sums."""
    if FIXED:
        units = tl.floor(values * per_quantum + 0.5).to(tl.int64)
        tl.atomic_add(pointers, units, mask=mask, sem="relaxed")
    else:
        tl.atomic_add(pointers, values, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["num_rows"])
def _inverse_norms_kernel(
    table, out, num_rows, stride, eps, D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < num_rows)[:, None] & (columns < D)[None, :]
    x = tl.load(table + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    inverse, live = inverse_norm(tl.sum(x * x, axis=1), eps)
    # The sign carries whether the row is live: one number to read per row.
    tl.store(out + rows, tl.where(live > 0, inverse, -inverse), mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _finish_fixed_kernel(
    sums, table, ids, quantum, out, num_rows, stride, eps,
    D: tl.constexpr, NORMALIZE: tl.constexpr, PICKED: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = sums * quantum, times the inverse norm of the row's item when NORMALIZE."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    columns = tl.arange(0, BLOCK_D)
    inside = rows < num_rows
    mask = inside[:, None] & (columns < D)[None, :]
    at = rows[:, None] * D + columns[None, :]
    value = tl.load(sums + at, mask=mask, other=0).to(tl.float32) * tl.load(quantum)
    if NORMALIZE:
        items = rows
        if PICKED:
            items = tl.load(ids + rows, mask=inside, other=0).to(tl.int64)
        x = tl.load(table + items[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        inverse = inverse_norm(tl.sum(x * x, axis=1), eps)[0]
        value = value * inverse[:, None]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


def rows_configs(width: int) -> list[Config]:
    """Configurations of the kernels that read a table once."""
    block_d = power_of_two(width)
    if interpreting():
        return [config(BLOCK_V=16, BLOCK_D=block_d)]
    return [config(num_warps=4, BLOCK_V=max(1, NORMS_ELEMENTS // block_d), BLOCK_D=block_d)]


def inverse_norms(table: Tensor, eps: float) -> Tensor:
    """1 / max(|row|, eps), float32 [V]; negative where |row| <= eps."""
    num_rows, width = table.shape
    out = torch.empty(num_rows, dtype=torch.float32, device=table.device)

    def launch(c: Config) -> None:
        grid = (triton.cdiv(num_rows, c["BLOCK_V"]),)
        _inverse_norms_kernel[grid](table, out, num_rows, table.stride(0), eps, D=width, **c.launch())

    select("inverse_norms", (width, table.dtype), rows_configs(width), launch)
    return out


def quantum_of(grad: Tensor, queries: Tensor, scale: float, normalize: bool) -> Tensor:
    """float32 [2]: a quantum such that no sum of contributions overflows, and its inverse.

    A position gives at most ``|grad| * scale * |q|`` to any one item (its softmax weights sum to one), and no more
    than L positions give.
    """
    largest = grad.detach().float().abs()
    if not normalize:
        largest = largest * queries.detach().abs().amax(dim=1).float()
    quantum = (largest.amax() * (scale * max(1, grad.shape[0]) * 2.0**-FIXED_BITS)).clamp(min=SMALLEST_QUANTUM)
    return torch.stack([quantum, 1.0 / quantum])


def finish_fixed(
    sums: Tensor, quantum: Tensor, table: Tensor, eps: float, normalize: bool, dtype: torch.dtype,
    ids: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The gradient [rows, D] in ``dtype`` from its int64 sums; ``ids`` [rows] are the items of the rows, None: all."""
    out = torch.empty(sums.shape, dtype=dtype, device=sums.device)
    num_rows, width = sums.shape
    where = sums if ids is None else ids

    def launch(c: Config) -> None:
        grid = (triton.cdiv(num_rows, c["BLOCK_V"]),)
        _finish_fixed_kernel[grid](
            sums, table, where, quantum, out, num_rows, table.stride(0), eps,
            D=width, NORMALIZE=normalize, PICKED=ids is not None, **c.launch(),
        )  # fmt: skip

    select("finish_fixed", (width, table.dtype), rows_configs(width), launch)
    return out
