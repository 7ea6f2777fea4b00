# mypy: allow-incomplete-defs
"""Triton forward and backward. See README.md for the gradient and for which kernels run when.

Widths and row strides are compile-time constants, as in norm_linear_silu.

Legend: L rows, W gate width (of all heads together), D output width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._dropout import OCTET, dropped_levels, kept_factor
from kernels._dropout_kernel import drawn_by, drawn_rows, keep_tile, seed_words
from kernels._launch import (
    Config,
    config,
    dot_precision,
    interpreting,
    length_bucket,
    num_sms,
    power_of_two,
    select,
    unit_stride,
)
from kernels._norm_kernel import (
    TL_DTYPES,
    chunked_statistics,
    norm_gradient,
    normed_tile,
    statistics,
    sum_partials,
    target_arch,
)
from kernels._projection import (
    MAX_HELD_BYTES,
    Products,
    columns_per_program,
    kernel_weight,
    mm_to,
    products,
)

PROGRAMS_PER_SM = 2
"""The columns are split over programs until each multiprocessor has about this many."""


@triton.jit
def _gate(normed, u, drawn, start, octets, seed_low, seed_high, dropped, factor,
          DROPOUT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """normed * u with dropout, for the columns from ``start`` on; drawn: rows whose masks are taken."""
    gated = normed * u
    if DROPOUT:
        keep = keep_tile(seed_low, seed_high, dropped, drawn, start, octets, BLOCK_L, BLOCK_K)
        gated = tl.where(keep, gated * factor, 0.0)
    return gated


@triton.jit
def _store_projection(product, bias_ptr, residual_ptr, y_ptr, rows, row_valid, columns,
                      num_columns: tl.constexpr, residual_stride: tl.constexpr):  # fmt: skip
    """y = product + bias + residual for one tile; y is contiguous."""
    column_valid = columns < num_columns
    valid = row_valid[:, None] & column_valid[None, :]
    bias = tl.load(bias_ptr + columns, mask=column_valid, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + rows[:, None] * residual_stride + columns[None, :], mask=valid, other=0.0)
    out = product + bias[None, :] + residual.to(tl.float32)
    tl.store(y_ptr + rows[:, None] * num_columns + columns[None, :], out.to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["num_rows", "seed_low", "seed_high", "dropped"])
def _gate_norm_linear_fwd_kernel(
    av_ptr, u_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr, random_rows, num_rows, columns_per_program,
    eps, seed_low, seed_high, dropped, factor,
    width: tl.constexpr, num_columns: tl.constexpr, av_stride: tl.constexpr, u_stride: tl.constexpr,
    w_stride: tl.constexpr, residual_stride: tl.constexpr, octets: tl.constexpr,
    RMS: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = Dropout(u * norm(av)) W + bias + residual, the product in DTYPE; BLOCK_K covers W.

    The gated rows are made once and multiplied with one column block after the other.
    av, u: [L, W]; w: [W, D]; bias: [D]; residual: [L, D]; y: [L, D] contiguous.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    row_valid = rows < num_rows
    first = tl.program_id(1) * columns_per_program
    inner = tl.arange(0, BLOCK_K)
    valid = row_valid[:, None] & (inner < width)[None, :]
    av = tl.load(av_ptr + rows[:, None] * av_stride + inner[None, :], mask=valid, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + rows[:, None] * u_stride + inner[None, :], mask=valid, other=0.0).to(tl.float32)
    mean, rstd = statistics(av, valid, width, eps, RMS)
    drawn = drawn_rows(random_rows, rows, row_valid, ROWS)
    gated = _gate(normed_tile(av, mean, rstd, valid), u, drawn, 0, octets, seed_low, seed_high, dropped, factor,
                  DROPOUT, BLOCK_L, BLOCK_K).to(DTYPE)  # fmt: skip
    for start in range(first, tl.minimum(first + columns_per_program, num_columns), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        w_valid = (inner < width)[:, None] & (columns < num_columns)[None, :]
        w = tl.load(w_ptr + inner[:, None] * w_stride + columns[None, :], mask=w_valid, other=0.0)
        product = tl.dot(gated, w.to(DTYPE), input_precision=PRECISION)
        _store_projection(product, bias_ptr, residual_ptr, y_ptr, rows, row_valid, columns,
                          num_columns, residual_stride)  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "seed_low", "seed_high", "dropped"])
def _gate_norm_linear_wide_fwd_kernel(
    av_ptr, u_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr, random_rows, num_rows, eps, seed_low, seed_high, dropped,
    factor,
    width: tl.constexpr, num_columns: tl.constexpr, av_stride: tl.constexpr, u_stride: tl.constexpr,
    w_stride: tl.constexpr, residual_stride: tl.constexpr, octets: tl.constexpr,
    RMS: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As the narrow kernel, for rows too wide to be held: statistics first, then the gate in chunks of BLOCK_K.

    One tile of y per program; the column blocks of a row block come one after the other, so that av and u are read
    from memory once and from L2 afterwards.
    """
    column_blocks: tl.constexpr = (num_columns + BLOCK_N - 1) // BLOCK_N
    rows = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    row_valid = rows < num_rows
    columns = (tl.program_id(0) % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    mean, rstd = chunked_statistics(av_ptr, rows, row_valid, av_stride, width, eps, RMS, BLOCK_L, BLOCK_K)
    drawn = drawn_rows(random_rows, rows, row_valid, ROWS)
    product = tl.zeros((BLOCK_L, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        valid = row_valid[:, None] & (inner < width)[None, :]
        av = tl.load(av_ptr + rows[:, None] * av_stride + inner[None, :], mask=valid, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + rows[:, None] * u_stride + inner[None, :], mask=valid, other=0.0).to(tl.float32)
        w_valid = (inner < width)[:, None] & (columns < num_columns)[None, :]
        w = tl.load(w_ptr + inner[:, None] * w_stride + columns[None, :], mask=w_valid, other=0.0)
        gated = _gate(normed_tile(av, mean, rstd, valid), u, drawn, start, octets, seed_low, seed_high, dropped, factor,
                      DROPOUT, BLOCK_L, BLOCK_K)  # fmt: skip
        product = tl.dot(gated.to(DTYPE), w.to(DTYPE), product, input_precision=PRECISION)
    _store_projection(product, bias_ptr, residual_ptr, y_ptr, rows, row_valid, columns, num_columns, residual_stride)


@triton.jit(do_not_specialize=["num_rows", "seed_low", "seed_high", "dropped"])
def _gate_norm_linear_bwd_kernel(
    grad_ptr, av_ptr, u_ptr, w_ptr, d_av_ptr, d_u_ptr, partials_ptr, random_rows, num_rows,
    eps, seed_low, seed_high, dropped, factor,
    width: tl.constexpr, num_columns: tl.constexpr, grad_stride: tl.constexpr, av_stride: tl.constexpr,
    u_stride: tl.constexpr, w_stride: tl.constexpr, octets: tl.constexpr,
    RMS: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Everything for small widths: BLOCK_K covers W, BLOCK_N covers D. Program p takes row blocks p, p + P, ...

    grad: [L, D]; d_av, d_u: [L, W] contiguous; partials: [P, W + 1, D] float32, of each program's rows the gradient
    of the weight and, last, of the bias.
    """
    inner, columns = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N)
    inner_valid, column_valid = inner < width, columns < num_columns
    w_valid = inner_valid[:, None] & column_valid[None, :]
    w = tl.load(w_ptr + inner[:, None] * w_stride + columns[None, :], mask=w_valid, other=0.0).to(DTYPE)
    d_weight = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    d_bias = tl.zeros((BLOCK_N,), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_L), tl.num_programs(0)):
        rows = tl.arange(0, BLOCK_L).to(tl.int64) + block * BLOCK_L
        row_valid = rows < num_rows
        grad_valid = row_valid[:, None] & column_valid[None, :]
        grad = tl.load(grad_ptr + rows[:, None] * grad_stride + columns[None, :], mask=grad_valid, other=0.0)
        d_bias += tl.sum(grad.to(tl.float32), axis=0)
        operand = grad.to(DTYPE)
        d_gated = tl.dot(operand, tl.trans(w), input_precision=PRECISION)
        valid = row_valid[:, None] & inner_valid[None, :]
        av = tl.load(av_ptr + rows[:, None] * av_stride + inner[None, :], mask=valid, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + rows[:, None] * u_stride + inner[None, :], mask=valid, other=0.0).to(tl.float32)
        mean, rstd = statistics(av, valid, width, eps, RMS)
        normed = normed_tile(av, mean, rstd, valid)
        gated = normed * u
        if DROPOUT:
            drawn = drawn_rows(random_rows, rows, row_valid, ROWS)
            keep = keep_tile(seed_low, seed_high, dropped, drawn, 0, octets, BLOCK_L, BLOCK_K)
            d_gated = tl.where(keep, d_gated * factor, 0.0)
            gated = tl.where(keep, gated * factor, 0.0)
        d_weight = tl.dot(tl.trans(gated.to(DTYPE)), operand, d_weight, input_precision=PRECISION)
        d_av = norm_gradient(d_gated * u, normed, rstd, width, RMS)
        packed = rows[:, None] * width + inner[None, :]
        tl.store(d_u_ptr + packed, (d_gated * normed).to(d_u_ptr.dtype.element_ty), mask=valid)
        tl.store(d_av_ptr + packed, d_av.to(d_av_ptr.dtype.element_ty), mask=valid)
    partial = partials_ptr + tl.program_id(0).to(tl.int64) * (width + 1) * num_columns
    tl.store(partial + inner[:, None] * num_columns + columns[None, :], d_weight, mask=w_valid)
    tl.store(partial + width * num_columns + columns, d_bias, mask=column_valid)


@triton.jit(do_not_specialize=["num_rows", "seed_low", "seed_high", "dropped"])
def _gate_kernel(
    av_ptr, u_ptr, d_gated_ptr, gated_ptr, d_av_ptr, d_u_ptr, random_rows, num_rows, eps, seed_low, seed_high, dropped,
    factor,
    width: tl.constexpr, av_stride: tl.constexpr, u_stride: tl.constexpr, octets: tl.constexpr,
    RMS: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """gated = Dropout(u * norm(av)) in the product's dtype; BACKWARD: also d_av and d_u from d_gated.

    BLOCK_K covers W. d_gated, gated, d_av, d_u: [L, W] contiguous.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    columns = tl.arange(0, BLOCK_K)
    valid = (rows < num_rows)[:, None] & (columns < width)[None, :]
    packed = rows[:, None] * width + columns[None, :]
    av = tl.load(av_ptr + rows[:, None] * av_stride + columns[None, :], mask=valid, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + rows[:, None] * u_stride + columns[None, :], mask=valid, other=0.0).to(tl.float32)
    mean, rstd = statistics(av, valid, width, eps, RMS)
    normed = normed_tile(av, mean, rstd, valid)
    gated = normed * u
    if DROPOUT:
        drawn = drawn_rows(random_rows, rows, rows < num_rows, ROWS)
        keep = keep_tile(seed_low, seed_high, dropped, drawn, 0, octets, BLOCK_L, BLOCK_K)
        gated = tl.where(keep, gated * factor, 0.0)
    tl.store(gated_ptr + packed, gated.to(gated_ptr.dtype.element_ty), mask=valid)
    if BACKWARD:
        d_gated = tl.load(d_gated_ptr + packed, mask=valid, other=0.0).to(tl.float32)
        if DROPOUT:
            d_gated = tl.where(keep, d_gated * factor, 0.0)
        d_av = norm_gradient(d_gated * u, normed, rstd, width, RMS)
        tl.store(d_u_ptr + packed, (d_gated * normed).to(d_u_ptr.dtype.element_ty), mask=valid)
        tl.store(d_av_ptr + packed, d_av.to(d_av_ptr.dtype.element_ty), mask=valid)


CHUNK_BYTES = 128
"""Of a row in one step of the wide product: what the matrix unit's shared memory layout spans."""


def fwd_configs(width: int, out_width: int, dtype: torch.dtype) -> list[Config]:
    """Tiles of the forward; BLOCK_K below the width asks for the wide kernel."""
    block_k, block_n = power_of_two(width), min(64, power_of_two(out_width))
    if interpreting():
        return [config(BLOCK_L=32, BLOCK_K=block_k if width <= 128 else 64, BLOCK_N=64)]
    if block_k <= 64:
        return [config(4, 2, BLOCK_L=rows, BLOCK_K=block_k, BLOCK_N=block_n) for rows in (64, 128)]
    if width * dtype.itemsize <= MAX_HELD_BYTES:
        sizes = {"BLOCK_K": block_k, "BLOCK_N": block_n}
        return [config(8, 2, BLOCK_L=128, **sizes), config(4, 2, BLOCK_L=64, **sizes)]
    chunk = CHUNK_BYTES // dtype.itemsize
    return [
        config(8, 3, BLOCK_L=64, BLOCK_K=chunk, BLOCK_N=256),
        config(8, 3, BLOCK_L=128, BLOCK_K=chunk, BLOCK_N=128),
        config(4, 3, BLOCK_L=64, BLOCK_K=chunk, BLOCK_N=128),
    ]


def bwd_configs(width: int, out_width: int, dtype: torch.dtype, arch: int) -> list[Config]:
    """Tiles of the one-kernel backward: the whole weight, a few rows at a time."""
    sizes = {"BLOCK_K": power_of_two(width), "BLOCK_N": power_of_two(out_width)}
    if interpreting():
        return [config(BLOCK_L=16, **sizes)]
    small = [config(4, 1, BLOCK_L=16, **sizes)]
    large = [config(8, 1, BLOCK_L=32, **sizes), config(8, 1, BLOCK_L=64, **sizes)]
    spills = arch < 90 or (arch >= 100 and dtype == torch.float32)
    return small + large if spills else large + small


ROW_VALUES = 2048
"""Values of a tile of the element-wise kernel."""


def rows_config(width: int) -> Config:
    """Tile of the element-wise kernel, which holds whole rows."""
    block_k = power_of_two(width)
    rows = 16 if interpreting() else max(1, ROW_VALUES // block_k)
    return config(4 if block_k <= 2 * ROW_VALUES else 16, 1, BLOCK_L=rows, BLOCK_K=block_k)


def _dropout_arguments(rate: float, seed: int) -> tuple[int, int, int, float]:
    return (*seed_words(seed), dropped_levels(rate), kept_factor(rate))


def _elementwise(
    av: Tensor, u: Tensor, d_gated: Tensor | None, eps: float, rms: bool, rate: float, seed: int, dtype: torch.dtype,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(gated, d_av, d_u); without d_gated the last two are gated itself and mean nothing."""
    (length, width), c = av.shape, rows_config(av.shape[1])
    gated = torch.empty(length, width, dtype=dtype, device=av.device)
    d_av, d_u = gated, gated
    if d_gated is not None:
        d_av = torch.empty(length, width, dtype=av.dtype, device=av.device)
        d_u = torch.empty(length, width, dtype=u.dtype, device=u.device)
    _gate_kernel[(triton.cdiv(length, c["BLOCK_L"]),)](
        av, u, gated if d_gated is None else d_gated, gated, d_av, d_u, rows, length,
        eps, *_dropout_arguments(rate, seed), width, av.stride(0), u.stride(0), triton.cdiv(width, OCTET),
        RMS=rms, DROPOUT=rate > 0, ROWS=rows is not None, BACKWARD=d_gated is not None, **c.launch(),
    )  # fmt: skip
    return gated, d_av, d_u


def gate_norm_linear_fwd(
    av: Tensor, u: Tensor, weight: Tensor, bias: Tensor, residual: Tensor,
    eps: float, rms: bool, rate: float, seed: int, dtype: torch.dtype, rows: Tensor | None = None,
    how: Products | None = None,
) -> Tensor:  # fmt: skip
    """y [L, D] in residual's dtype, contiguous. dtype: of the product; how: for tests and benchmarks."""
    (length, width), out_width = av.shape, weight.shape[1]
    if length == 0 or out_width == 0:
        return torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    how = how or products("gate_norm_linear", width, out_width, dtype, target_arch(av.device))
    av, u, residual, rows = unit_stride(av), unit_stride(u), unit_stride(residual), drawn_by(rows, rate)
    if how.forward == "blas":
        gated = _elementwise(av, u, None, eps, rms, rate, seed, dtype, rows)[0]
        out = torch.addmm(bias.to(dtype), gated, weight.to(dtype))
        return torch.add(residual, out).to(residual.dtype)
    weight, bias = kernel_weight(weight, dtype), unit_stride(bias)

    def launch(c: Config) -> Tensor:
        y = torch.empty(length, out_width, dtype=residual.dtype, device=residual.device)
        row_blocks = triton.cdiv(length, c["BLOCK_L"])
        tensors, constants = (av, u, weight, bias, residual, y, rows), {
            "width": width, "num_columns": out_width, "octets": triton.cdiv(width, OCTET),
            "av_stride": av.stride(0), "u_stride": u.stride(0), "w_stride": weight.stride(0),
            "residual_stride": residual.stride(0), "RMS": rms, "DROPOUT": rate > 0, "ROWS": rows is not None,
            "DTYPE": TL_DTYPES[dtype], "PRECISION": dot_precision(), **c.launch(),
        }  # fmt: skip
        if c["BLOCK_K"] < width:
            tiles = row_blocks * triton.cdiv(out_width, c["BLOCK_N"])
            _gate_norm_linear_wide_fwd_kernel[(tiles,)](
                *tensors, length, eps, *_dropout_arguments(rate, seed), **constants
            )  # fmt: skip
            return y
        columns = columns_per_program(row_blocks, out_width, c["BLOCK_N"], PROGRAMS_PER_SM * num_sms(av.device))
        _gate_norm_linear_fwd_kernel[(row_blocks, triton.cdiv(out_width, columns))](
            *tensors, length, columns, eps, *_dropout_arguments(rate, seed), **constants
        )
        return y

    key = (length_bucket(length), width, out_width, dtype, av.dtype, residual.dtype, rate > 0)
    return select("gate_norm_linear", key, fwd_configs(width, out_width, dtype), launch)


def _bwd_in_one(
    grad: Tensor, av: Tensor, u: Tensor, weight: Tensor,
    eps: float, rms: bool, rate: float, seed: int, dtype: torch.dtype, rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (length, width), out_width = av.shape, weight.shape[1]
    taken = kernel_weight(weight, dtype)

    def launch(c: Config) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d_av = torch.empty(length, width, dtype=av.dtype, device=av.device)
        d_u = torch.empty(length, width, dtype=u.dtype, device=u.device)
        programs = min(triton.cdiv(length, c["BLOCK_L"]), num_sms(av.device))
        partials = torch.empty(programs, (width + 1) * out_width, dtype=torch.float32, device=av.device)
        _gate_norm_linear_bwd_kernel[(programs,)](
            grad, av, u, taken, d_av, d_u, partials, rows, length, eps, *_dropout_arguments(rate, seed),
            width, out_width, grad.stride(0), av.stride(0), u.stride(0), taken.stride(0), triton.cdiv(width, OCTET),
            RMS=rms, DROPOUT=rate > 0, ROWS=rows is not None, DTYPE=TL_DTYPES[dtype], PRECISION=dot_precision(),
            **c.launch(),
        )  # fmt: skip
        d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        d_bias = torch.empty(out_width, dtype=weight.dtype, device=weight.device)
        sum_partials(partials, d_weight, d_bias)
        return d_av, d_u, d_weight, d_bias

    key = (length_bucket(length), width, out_width, dtype, av.dtype, grad.dtype, rate > 0)
    return select("gate_norm_linear_bwd", key, bwd_configs(width, out_width, dtype, target_arch(av.device)), launch)


def gate_norm_linear_bwd(
    grad: Tensor, av: Tensor, u: Tensor, weight: Tensor,
    eps: float, rms: bool, rate: float, seed: int, dtype: torch.dtype, rows: Tensor | None = None,
    how: Products | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of av, u and weight in their dtypes, and of the bias in weight's. grad: [L, D]."""
    (length, width), out_width = av.shape, weight.shape[1]
    if length == 0 or out_width == 0:
        return torch.zeros_like(av), torch.zeros_like(u), torch.zeros_like(weight), weight.new_zeros(out_width)
    how = how or products("gate_norm_linear", width, out_width, dtype, target_arch(av.device))
    grad, av, u, rows = unit_stride(grad), unit_stride(av), unit_stride(u), drawn_by(rows, rate)
    if how.backward == "one":
        return _bwd_in_one(grad, av, u, weight, eps, rms, rate, seed, dtype, rows)
    operand = grad.to(dtype)
    d_gated = torch.mm(operand, weight.to(dtype).mT)
    gated, d_av, d_u = _elementwise(av, u, d_gated, eps, rms, rate, seed, dtype, rows)
    d_weight = mm_to(gated.mT, operand, weight.dtype)
    return d_av, d_u, d_weight, grad.sum(0, dtype=torch.float32).to(weight.dtype)
