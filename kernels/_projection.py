"""What norm_linear_silu and gate_norm_linear share in plain torch: norms, dtypes, and where their products run.

Shapes: ``L`` total events, ``D`` width that is normed, ``O`` width after the projection.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels._common import compute_dtype
from kernels._launch import dot_precision, unit_stride

NORMS = ("layer", "rms")


class Products(NamedTuple):
    """Where the matrix products of one op run on Triton's side."""

    forward: str
    """``fused``: one kernel norms and multiplies; ``split``: one kernel norms, the next multiplies and finishes;
    ``blas``: torch.mm (cuBLAS) between element-wise kernels."""
    backward: str
    """``one``: a single kernel does everything and leaves partial weight gradients; else the recomputed product runs
    as in the forward and the two gradient products are torch.mm."""


MAX_HELD_BYTES = 512
"""Widest row that is held as a product's operand: 256 values of 16 bits, 128 of TF32 (64 KiB for 128 rows)."""
ONE_KERNEL_WIDTHS = {"norm_linear_silu": (64, 256), "gate_norm_linear": (64, 64)}
"""Largest (D, O) whose weight gradient stays in the registers of one program (128 by 128 gates spilled)."""
ONE_KERNEL_FLOAT32_OUT = 128
"""Largest O of norm_linear_silu in float32 (TF32) before sm_90, which has less shared memory than the weight takes."""


def products(op: str, width: int, out_width: int, dtype: torch.dtype, arch: int = 90) -> Products:
    """The one place that decides it; the reasons are in the README of norm_linear_silu.

    Args:
        op: norm_linear_silu or gate_norm_linear.
        width: of the rows that are normed; out_width: after the projection.
        dtype: of the product's operands. float32 products run on cuBLAS unless TF32 is allowed: Triton's exact
            float32 product uses no matrix instruction.
        arch: compute capability times ten.
    """
    if dtype == torch.float32 and dot_precision() == "ieee":
        return Products("blas", "blas")
    max_width, max_out = ONE_KERNEL_WIDTHS[op]
    if op == "norm_linear_silu" and dtype == torch.float32 and arch < 90:
        max_out = ONE_KERNEL_FLOAT32_OUT
    one = width <= max_width and out_width <= max_out
    if op == "gate_norm_linear":
        return Products("fused", "one" if one else "blas")
    forward = "fused" if width * dtype.itemsize <= MAX_HELD_BYTES else "split"
    return Products(forward, "one" if one else forward)


def columns_per_program(row_blocks: int, out_width: int, block_n: int, programs: int) -> int:
    """Columns of one program, a multiple of block_n: all of them where the row blocks alone make enough programs."""
    column_blocks = -(-out_width // block_n)
    splits = min(column_blocks, -(-programs // row_blocks))
    return block_n * -(-column_blocks // splits)


def product_dtype(x: Tensor) -> torch.dtype:
    """Dtype of an op's product: autocast's where it is on for x's device, else x's own; float64 stays."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


CAST_ONCE_VALUES = 2**14
"""A weight with more values is cast to the product's dtype once, by a launch of its own; a smaller one by every
program as it loads it."""


def kernel_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight as a kernel takes it: unit stride, cast where that pays."""
    if weight.dtype != dtype and weight.numel() > CAST_ONCE_VALUES:
        weight = weight.to(dtype)
    return unit_stride(weight)


def mm_to(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` in ``dtype``; on CUDA a float32 result of narrower operands is not rounded on the way."""
    if a.dtype == dtype or not a.is_cuda or dtype != torch.float32:
        return torch.mm(a, b).to(dtype)
    return torch.mm(a, b, out_dtype=dtype)


def norm_rows(x: Tensor, eps: float, rms: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` [L, D] normed over D, without affine part, in x's dtype; and the mean (zero for RMS) and 1 / deviation."""
    if not rms:
        return torch.native_layer_norm(x, x.shape[1:], None, None, eps)
    wide = x.to(compute_dtype(x))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd).to(x.dtype), torch.zeros_like(rstd), rstd


def norm_rows_backward(d_normed: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, rms: bool) -> Tensor:
    """Gradient of :func:`norm_rows` with respect to x, in x's dtype."""
    if not rms:
        return torch.ops.aten.native_layer_norm_backward(
            d_normed.to(x.dtype), x, x.shape[1:], mean, rstd, None, None, [True, False, False]
        )[0]
    wide, normed = d_normed.to(rstd.dtype), x.to(rstd.dtype) * rstd
    return (rstd * (wide - normed * (wide * normed).mean(-1, keepdim=True))).to(x.dtype)


def check_norm(norm: str, eps: float) -> None:
    """Raises ValueError unless norm is one of :data:`NORMS` and eps > 0."""
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r}: expected one of {', '.join(NORMS)}")
    if not eps > 0:
        raise ValueError(f"eps={eps}: expected > 0")
