# mypy: allow-incomplete-defs
"""Triton forward and backward. See README.md for the gradient and for which kernels run when.

Widths and row strides are compile-time constants: a model has few, and with them a width such as 50 is known to be
even, so that two values are loaded at once, and rows lie at constant distances.

Legend: L rows, D normed width, O output width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._launch import Config, config, dot_precision, interpreting, length_bucket, num_sms, power_of_two, select
from kernels._norm_kernel import (
    norm_gradient,
    normed_tile,
    statistics,
    sum_partials,
    target_arch,
)
from kernels._projection import Products, columns_per_program, kernel_weight, mm_to, products, unit_stride

PROGRAMS_PER_SM = 4
"""The columns are split over programs until each multiprocessor has about this many."""


@triton.jit
def _silu_and_slope(z):
    sigmoid = tl.sigmoid(z)
    return z * sigmoid, sigmoid * (1.0 + z * (1.0 - sigmoid))


@triton.jit
def _store_silu(z, y_ptr, grad_ptr, rows, row_valid, columns, num_columns: tl.constexpr, grad_stride: tl.constexpr,
                silu_start: tl.constexpr, silu_stop: tl.constexpr, WITH_GRAD: tl.constexpr):  # fmt: skip
    """One tile of y = SiLU(z), contiguous. WITH_GRAD: grad times the slope of the SiLU at z instead."""
    valid = row_valid[:, None] & (columns < num_columns)[None, :]
    active = ((columns >= silu_start) & (columns < silu_stop))[None, :]
    silu, slope = _silu_and_slope(z)
    if WITH_GRAD:
        grad_at = grad_ptr + rows[:, None] * grad_stride + columns[None, :]
        out = tl.load(grad_at, mask=valid, other=0.0).to(tl.float32) * tl.where(active, slope, 1.0)
    else:
        out = tl.where(active, silu, z)
    tl.store(y_ptr + rows[:, None] * num_columns + columns[None, :], out.to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_linear_silu_fwd_kernel(
    x_ptr, w_ptr, y_ptr, grad_ptr, num_rows, columns_per_program, eps,
    dim: tl.constexpr, num_columns: tl.constexpr, silu_start: tl.constexpr, silu_stop: tl.constexpr,
    x_stride: tl.constexpr, w_stride: tl.constexpr, grad_stride: tl.constexpr,
    RMS: tl.constexpr, WITH_GRAD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = SiLU(norm(x) W), the product in y's dtype. WITH_GRAD: y = grad times the slope of the SiLU instead.

    BLOCK_K covers D: rows are read and normed once and multiplied with one column block after the other.
    x: [L, D]; w: [D, O]; y: [L, O] contiguous; grad: [L, O].
    """
    rows = (tl.program_id(0).to(tl.int64) * BLOCK_L) + tl.arange(0, BLOCK_L)
    row_valid = rows < num_rows
    first = tl.program_id(1) * columns_per_program
    inner = tl.arange(0, BLOCK_K)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    valid = row_valid[:, None] & (inner < dim)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + inner[None, :], mask=valid, other=0.0).to(tl.float32)
    mean, rstd = statistics(x, valid, dim, eps, RMS)
    normed = normed_tile(x, mean, rstd, valid).to(dtype)
    for start in range(first, tl.minimum(first + columns_per_program, num_columns), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        w_valid = (inner < dim)[:, None] & (columns < num_columns)[None, :]
        w = tl.load(w_ptr + inner[:, None] * w_stride + columns[None, :], mask=w_valid, other=0.0)
        z = tl.dot(normed, w.to(dtype), input_precision=PRECISION)
        _store_silu(z, y_ptr, grad_ptr, rows, row_valid, columns, num_columns, grad_stride,
                    silu_start, silu_stop, WITH_GRAD)  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _linear_silu_kernel(
    normed_ptr, w_ptr, y_ptr, grad_ptr, num_rows,
    dim: tl.constexpr, num_columns: tl.constexpr, silu_start: tl.constexpr, silu_stop: tl.constexpr,
    w_stride: tl.constexpr, grad_stride: tl.constexpr, WITH_GRAD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same from rows normed before (contiguous, in y's dtype), for any D. One tile of y per program; the column
    blocks of a row block come one after the other, so that its rows come from memory once and from L2 afterwards."""
    column_blocks: tl.constexpr = (num_columns + BLOCK_N - 1) // BLOCK_N
    rows = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    row_valid = rows < num_rows
    columns = (tl.program_id(0) % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    z = tl.zeros((BLOCK_L, BLOCK_N), tl.float32)
    for start in range(0, dim, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        valid = row_valid[:, None] & (inner < dim)[None, :]
        normed = tl.load(normed_ptr + rows[:, None] * dim + inner[None, :], mask=valid, other=0.0)
        w_valid = (inner < dim)[:, None] & (columns < num_columns)[None, :]
        w = tl.load(w_ptr + inner[:, None].to(tl.int64) * w_stride + columns[None, :], mask=w_valid, other=0.0)
        z = tl.dot(normed, w, z, input_precision=PRECISION)
    _store_silu(z, y_ptr, grad_ptr, rows, row_valid, columns, num_columns, grad_stride,
                silu_start, silu_stop, WITH_GRAD)  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _norm_linear_silu_bwd_kernel(
    x_ptr, w_ptr, grad_ptr, d_x_ptr, partials_ptr, num_rows, eps,
    dim: tl.constexpr, num_columns: tl.constexpr, silu_start: tl.constexpr, silu_stop: tl.constexpr,
    x_stride: tl.constexpr, w_stride: tl.constexpr, grad_stride: tl.constexpr,
    RMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Everything for small widths: BLOCK_K covers D, BLOCK_N covers O. Program p takes row blocks p, p + P, ...

    z and the weight gradient are made transposed, [O, .]: with O as its rows a product spreads over all warps, and
    d_z goes from one product to the next in registers.

    d_x: [L, D] contiguous; partials: [P, D, O] float32, the weight gradient of each program's rows.
    """
    inner, columns = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N)
    inner_valid, column_valid = inner < dim, columns < num_columns
    active = ((columns >= silu_start) & (columns < silu_stop))[:, None]
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    w_valid = inner_valid[:, None] & column_valid[None, :]
    w = tl.trans(tl.load(w_ptr + inner[:, None] * w_stride + columns[None, :], mask=w_valid, other=0.0).to(dtype))
    d_weight = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_L), tl.num_programs(0)):
        rows = tl.arange(0, BLOCK_L).to(tl.int64) + block * BLOCK_L
        row_valid = rows < num_rows
        valid = row_valid[:, None] & inner_valid[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + inner[None, :], mask=valid, other=0.0).to(tl.float32)
        mean, rstd = statistics(x, valid, dim, eps, RMS)
        normed = normed_tile(x, mean, rstd, valid)
        operand = normed.to(dtype)
        grad_valid = row_valid[:, None] & column_valid[None, :]
        grad = tl.load(grad_ptr + rows[:, None] * grad_stride + columns[None, :], mask=grad_valid, other=0.0)
        z = tl.dot(w, tl.trans(operand), input_precision=PRECISION)  # [O, BLOCK_L]
        slope = tl.where(active, _silu_and_slope(z)[1], 1.0)
        d_z = (tl.trans(grad).to(tl.float32) * slope).to(dtype)
        d_weight = tl.dot(d_z, operand, d_weight, input_precision=PRECISION)
        d_normed = tl.dot(tl.trans(d_z), w, input_precision=PRECISION)
        d_x = norm_gradient(d_normed, normed, rstd, dim, RMS)
        tl.store(d_x_ptr + rows[:, None] * dim + inner[None, :], d_x.to(d_x_ptr.dtype.element_ty), mask=valid)
    partial = partials_ptr + tl.program_id(0).to(tl.int64) * dim * num_columns
    tl.store(partial + inner[:, None] * num_columns + columns[None, :], tl.trans(d_weight), mask=w_valid)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_fwd_kernel(x_ptr, normed_ptr, num_rows, eps, dim: tl.constexpr, x_stride: tl.constexpr,
                     RMS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """normed: [L, D] contiguous, in the product's dtype."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    columns = tl.arange(0, BLOCK_K)
    valid = (rows < num_rows)[:, None] & (columns < dim)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=valid, other=0.0).to(tl.float32)
    mean, rstd = statistics(x, valid, dim, eps, RMS)
    normed = normed_tile(x, mean, rstd, valid).to(normed_ptr.dtype.element_ty)
    tl.store(normed_ptr + rows[:, None] * dim + columns[None, :], normed, mask=valid)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_bwd_kernel(
    d_normed_ptr, x_ptr, d_x_ptr, normed_ptr, num_rows, eps, dim: tl.constexpr, x_stride: tl.constexpr,
    RMS: tl.constexpr, STORE_NORMED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d_x from d_normed; STORE_NORMED: also norm(x) in the product's dtype, for the weight gradient."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    columns = tl.arange(0, BLOCK_K)
    valid = (rows < num_rows)[:, None] & (columns < dim)[None, :]
    packed = rows[:, None] * dim + columns[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=valid, other=0.0).to(tl.float32)
    d_normed = tl.load(d_normed_ptr + packed, mask=valid, other=0.0).to(tl.float32)
    mean, rstd = statistics(x, valid, dim, eps, RMS)
    normed = normed_tile(x, mean, rstd, valid)
    d_x = norm_gradient(d_normed, normed, rstd, dim, RMS)
    tl.store(d_x_ptr + packed, d_x.to(d_x_ptr.dtype.element_ty), mask=valid)
    if STORE_NORMED:
        tl.store(normed_ptr + packed, normed.to(normed_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["num_rows"])
def _silu_kernel(z_ptr, grad_ptr, num_rows, num_columns: tl.constexpr, silu_start: tl.constexpr,
                 silu_stop: tl.constexpr, grad_stride: tl.constexpr,
                 WITH_GRAD: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """In place on z [L, O] contiguous: its SiLU; WITH_GRAD: grad times the slope."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    active = ((columns >= silu_start) & (columns < silu_stop))[None, :]
    z_at = z_ptr + rows[:, None] * num_columns + columns[None, :]
    z = tl.load(z_at, mask=valid, other=0.0).to(tl.float32)
    silu, slope = _silu_and_slope(z)
    if WITH_GRAD:
        grad = tl.load(grad_ptr + rows[:, None] * grad_stride + columns[None, :], mask=valid, other=0.0).to(tl.float32)
        out = tl.where(active, grad * slope, grad)
    else:
        out = tl.where(active, silu, z)
    tl.store(z_at, out.to(z_ptr.dtype.element_ty), mask=valid)


def fwd_configs(dim: int) -> list[Config]:
    """Tiles of the fused forward. A weight value is read from L2 once per row block: more rows, less traffic."""
    block_k = power_of_two(dim)
    if interpreting():
        return [config(BLOCK_L=32, BLOCK_K=block_k, BLOCK_N=64)]
    if block_k <= 64:
        return [
            config(4, 2, BLOCK_L=64, BLOCK_K=block_k, BLOCK_N=64),
            config(4, 2, BLOCK_L=128, BLOCK_K=block_k, BLOCK_N=64),
            config(4, 2, BLOCK_L=64, BLOCK_K=block_k, BLOCK_N=128),
        ]
    return [
        config(8, 3, BLOCK_L=128, BLOCK_K=block_k, BLOCK_N=64),
        config(8, 2, BLOCK_L=128, BLOCK_K=block_k, BLOCK_N=128),
        config(4, 3, BLOCK_L=64, BLOCK_K=block_k, BLOCK_N=64),
    ]


CHUNK_BYTES = 128
"""Of a row of both operands in one step of a tiled product: what the matrix unit's shared memory layout spans."""


def split_configs(dtype: torch.dtype, with_grad: bool, arch: int) -> list[Config]:
    """Tiles of the product of rows normed before."""
    if interpreting():
        return [config(BLOCK_L=32, BLOCK_K=64, BLOCK_N=64)]
    chunk = CHUNK_BYTES // dtype.itemsize
    square = [
        config(8, 3, BLOCK_L=128, BLOCK_K=chunk, BLOCK_N=128),
        config(4, 4, BLOCK_L=128, BLOCK_K=chunk, BLOCK_N=128),
    ]
    if arch < 90:
        small, large = ([config(8, 3, BLOCK_L=r, BLOCK_K=k, BLOCK_N=128)] for r, k in ((64, chunk), (128, chunk // 2)))
        return small + large if with_grad else large + small
    wide = [config(8, 3, BLOCK_L=128, BLOCK_K=chunk, BLOCK_N=256)]
    return square + wide if with_grad or dtype == torch.float32 else wide + square


def bwd_configs(dim: int, out_width: int, arch: int) -> list[Config]:
    """Tiles of the one-kernel backward: the whole weight, a few rows at a time."""
    sizes = {"BLOCK_K": power_of_two(dim), "BLOCK_N": power_of_two(out_width)}
    if interpreting():
        return [config(BLOCK_L=16, **sizes)]
    rows = (16, 32) if arch >= 100 else (32, 16)
    return [config(8, 1, BLOCK_L=r, **sizes) for r in rows]


ROW_VALUES = 4096
"""Values of a tile of the element-wise kernels."""


def rows_config(dim: int) -> Config:
    """Tile of the kernels that hold whole rows and have no product."""
    block_k = power_of_two(dim)
    rows = 16 if interpreting() else max(1, ROW_VALUES // block_k)
    return config(8 if block_k <= 2 * ROW_VALUES else 16, 1, BLOCK_L=rows, BLOCK_K=block_k)


def _fused(
    x: Tensor, weight: Tensor, grad: Tensor | None, eps: float, rms: bool, silu: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """norm and product in one kernel: the forward, or d_z where ``grad`` is given."""
    (length, dim), out_width = x.shape, weight.shape[1]
    weight = kernel_weight(weight, dtype)

    def launch(c: Config) -> Tensor:
        y = torch.empty(length, out_width, dtype=dtype, device=x.device)
        row_blocks = triton.cdiv(length, c["BLOCK_L"])
        columns = columns_per_program(row_blocks, out_width, c["BLOCK_N"], PROGRAMS_PER_SM * num_sms(x.device))
        _norm_linear_silu_fwd_kernel[(row_blocks, triton.cdiv(out_width, columns))](
            x, weight, y, y if grad is None else grad, length, columns, eps, dim, out_width, *silu,
            x.stride(0), weight.stride(0), 0 if grad is None else grad.stride(0),
            RMS=rms, WITH_GRAD=grad is not None, PRECISION=dot_precision(), **c.launch(),
        )  # fmt: skip
        return y

    key = (length_bucket(length), dim, out_width, dtype, x.dtype, weight.dtype, grad is not None)
    return select("norm_linear_silu", key, fwd_configs(dim), launch)


def _linear_silu(normed: Tensor, weight: Tensor, grad: Tensor | None, silu: tuple[int, int]) -> Tensor:
    """The product of rows normed before: the forward, or d_z where ``grad`` is given."""
    (length, dim), out_width = normed.shape, weight.shape[1]
    weight = unit_stride(weight.to(normed.dtype))

    def launch(c: Config) -> Tensor:
        y = torch.empty(length, out_width, dtype=normed.dtype, device=normed.device)
        _linear_silu_kernel[(triton.cdiv(length, c["BLOCK_L"]) * triton.cdiv(out_width, c["BLOCK_N"]),)](
            normed, weight, y, y if grad is None else grad, length, dim, out_width, *silu,
            weight.stride(0), 0 if grad is None else grad.stride(0),
            WITH_GRAD=grad is not None, PRECISION=dot_precision(), **c.launch(),
        )  # fmt: skip
        return y

    key = (length_bucket(length), dim, out_width, normed.dtype, grad is not None)
    return select("linear_silu", key, split_configs(normed.dtype, grad is not None, target_arch(normed.device)), launch)


def _normed(x: Tensor, eps: float, rms: bool, dtype: torch.dtype) -> Tensor:
    (length, dim), c = x.shape, rows_config(x.shape[1])
    normed = torch.empty(length, dim, dtype=dtype, device=x.device)
    _norm_fwd_kernel[(triton.cdiv(length, c["BLOCK_L"]),)](
        x, normed, length, eps, dim, x.stride(0), RMS=rms, **c.launch()
    )  # fmt: skip
    return normed


def _silu_in_place(z: Tensor, grad: Tensor | None, silu: tuple[int, int]) -> Tensor:
    block_l, block_n = 16, 128
    _silu_kernel[(triton.cdiv(z.shape[0], block_l), triton.cdiv(z.shape[1], block_n))](
        z, z if grad is None else grad, *z.shape, *silu, 0 if grad is None else grad.stride(0),
        WITH_GRAD=grad is not None, BLOCK_L=block_l, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return z


def norm_linear_silu_fwd(
    x: Tensor, weight: Tensor, eps: float, rms: bool, silu: tuple[int, int], dtype: torch.dtype,
    how: Products | None = None,
) -> Tensor:  # fmt: skip
    """y [L, O] in ``dtype``. silu: first and last (exclusive) column of the SiLU; how: for tests and benchmarks."""
    if x.shape[0] == 0 or weight.shape[1] == 0:
        return torch.empty(x.shape[0], weight.shape[1], dtype=dtype, device=x.device)
    how = how or products("norm_linear_silu", x.shape[1], weight.shape[1], dtype, target_arch(x.device))
    x = unit_stride(x)
    if how.forward == "fused":
        return _fused(x, weight, None, eps, rms, silu, dtype)
    if how.forward == "split":
        return _linear_silu(_normed(x, eps, rms, dtype), weight, None, silu)
    z = torch.mm(_normed(x, eps, rms, dtype), weight.to(dtype))
    return _silu_in_place(z, None, silu) if silu[1] > silu[0] else z


def _bwd_in_one(
    x: Tensor, weight: Tensor, grad: Tensor, eps: float, rms: bool, silu: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    (length, dim), out_width = x.shape, weight.shape[1]
    weight_taken = kernel_weight(weight, grad.dtype)

    def launch(c: Config) -> tuple[Tensor, Tensor]:
        d_x = torch.empty(length, dim, dtype=x.dtype, device=x.device)
        programs = min(triton.cdiv(length, c["BLOCK_L"]), num_sms(x.device))
        partials = torch.empty(programs, dim * out_width, dtype=torch.float32, device=x.device)
        _norm_linear_silu_bwd_kernel[(programs,)](
            x, weight_taken, grad, d_x, partials, length, eps, dim, out_width, *silu,
            x.stride(0), weight_taken.stride(0), grad.stride(0),
            RMS=rms, PRECISION=dot_precision(), **c.launch(),
        )  # fmt: skip
        d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        sum_partials(partials, d_weight)
        return d_x, d_weight

    key = (length_bucket(length), dim, out_width, grad.dtype, x.dtype, weight_taken.dtype)
    return select("norm_linear_silu_bwd", key, bwd_configs(dim, out_width, target_arch(x.device)), launch)


def norm_linear_silu_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, rms: bool, silu: tuple[int, int],
    how: Products | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x and weight, in their dtypes. grad: [L, O] in the product's dtype."""
    (length, dim), out_width, dtype = x.shape, weight.shape[1], grad.dtype
    if length == 0 or out_width == 0:
        return torch.zeros_like(x), torch.zeros_like(weight)
    how = how or products("norm_linear_silu", dim, out_width, dtype, target_arch(x.device))
    x, grad = unit_stride(x), unit_stride(grad)
    if how.backward == "one":
        return _bwd_in_one(x, weight, grad, eps, rms, silu)
    cast = weight.to(dtype)
    d_x = torch.empty(length, dim, dtype=x.dtype, device=x.device)
    if how.backward == "fused":
        d_z = _fused(x, cast, grad, eps, rms, silu, dtype)
        normed = torch.empty(length, dim, dtype=dtype, device=x.device)
    else:
        normed = _normed(x, eps, rms, dtype)
        if how.backward == "split":
            d_z = _linear_silu(normed, cast, grad, silu)
        else:
            d_z = _silu_in_place(torch.mm(normed, cast), grad, silu)
    d_normed, c = torch.mm(d_z, cast.mT), rows_config(dim)
    _norm_bwd_kernel[(triton.cdiv(length, c["BLOCK_L"]),)](
        d_normed, x, d_x, normed, length, eps, dim, x.stride(0),
        RMS=rms, STORE_NORMED=how.backward == "fused", **c.launch(),
    )  # fmt: skip
    return d_x, mm_to(normed.mT, d_z, weight.dtype)
