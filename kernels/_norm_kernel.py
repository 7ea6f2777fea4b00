# mypy: allow-incomplete-defs
"""Triton pieces of the ops that norm rows: statistics, gradient, and the sum of partial gradients.

All in float32. Shapes: ``L`` rows, ``D`` width of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._launch import interpreting

INTERPRETED_ARCH = 90
"""What the interpreter decides as."""
TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def target_arch(device: torch.device) -> int:
    """Compute capability times ten of what is compiled for: the device, or, ahead of time, the driver's target."""
    if interpreting():
        return INTERPRETED_ARCH
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    return int(triton.runtime.driver.active.get_current_target().arch)


@triton.jit
def statistics(x, valid, dim, eps, RMS: tl.constexpr):
    """Mean (zero for RMS) and 1 / deviation of whole rows. x: [BLOCK_L, BLOCK_D] float32, zero where not valid."""
    if RMS:
        mean = tl.sum(x, axis=1) * 0.0
        variance = tl.sum(x * x, axis=1) / dim
    else:
        mean = tl.sum(x, axis=1) / dim
        centered = tl.where(valid, x - mean[:, None], 0.0)
        variance = tl.sum(centered * centered, axis=1) / dim
    return mean, tl.rsqrt(variance + eps)


@triton.jit
def chunked_statistics(x_ptr, rows, row_valid, stride, dim, eps,
                       RMS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """As :func:`statistics`, reading the rows in chunks of BLOCK_K columns (means and squares merged as in Chan
    et al. 1983, so a large mean does not swamp the deviation)."""
    mean = tl.zeros((BLOCK_L,), tl.float32)
    squares = tl.zeros((BLOCK_L,), tl.float32)
    for start in range(0, dim, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        valid = row_valid[:, None] & (columns < dim)[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride + columns[None, :], mask=valid, other=0.0).to(tl.float32)
        if RMS:
            squares += tl.sum(x * x, axis=1)
        else:
            count = tl.minimum(dim - start, BLOCK_K).to(tl.float32)
            chunk_mean = tl.sum(x, axis=1) / count
            centered = tl.where(valid, x - chunk_mean[:, None], 0.0)
            shift = chunk_mean - mean
            share = count / (start + count)
            squares += tl.sum(centered * centered, axis=1) + shift * shift * (start * share)
            mean += shift * share
    return mean, tl.rsqrt(squares / dim + eps)


@triton.jit
def normed_tile(x, mean, rstd, valid):
    """(x - mean) / deviation, zero where not valid."""
    return tl.where(valid, (x - mean[:, None]) * rstd[:, None], 0.0)


@triton.jit
def norm_gradient(d_normed, normed, rstd, dim, RMS: tl.constexpr):
    """Gradient with respect to the rows; d_normed and normed are zero outside the row."""
    along = tl.sum(d_normed * normed, axis=1) / dim
    d_x = d_normed - normed * along[:, None]
    if not RMS:
        d_x -= (tl.sum(d_normed, axis=1) / dim)[:, None]
    return d_x * rstd[:, None]


@triton.jit(do_not_specialize=["num_partials"])
def _sum_partials_kernel(
    partials_ptr, first_ptr, second_ptr, num_partials, num_first, num_values,
    BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partials: [num_partials, num_values] float32; the sums of the first num_first go to first, the rest to second."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = index < num_values
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_partials, BLOCK_P):
        partial = start + tl.arange(0, BLOCK_P)
        address = partials_ptr + partial[:, None].to(tl.int64) * num_values + index[None, :]
        inside = (partial < num_partials)[:, None] & valid[None, :]
        total += tl.sum(tl.load(address, mask=inside, other=0.0), axis=0)
    tl.store(first_ptr + index, total.to(first_ptr.dtype.element_ty), mask=index < num_first)
    rest = valid & (index >= num_first)
    tl.store(second_ptr + index - num_first, total.to(second_ptr.dtype.element_ty), mask=rest)


def sum_partials(partials: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """Sums partials [P, values] over P, in a fixed order, into ``first`` and then ``second`` (contiguous)."""
    num_partials, num_values = partials.shape
    block, block_p = (1024, 16) if interpreting() else (32, 128)
    _sum_partials_kernel[(triton.cdiv(num_values, block),)](
        partials, first, first if second is None else second, num_partials, first.numel(), num_values,
        BLOCK_P=block_p, BLOCK=block, num_warps=8,
    )  # fmt: skip
