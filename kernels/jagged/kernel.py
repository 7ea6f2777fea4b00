# mypy: allow-incomplete-defs
"""Triton: one launch each. Copies find the user of a row by bisection of the offsets, which stay in cache.

Legend: B users, L total rows, D width, N table rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._dropout import OCTET, dropped_levels, kept_factor
from kernels._dropout_kernel import drawn_by, drawn_rows, keep_tile, seed_words
from kernels._launch import Config, config, interpreting, power_of_two, unit_stride

COUNTS = ["num_rows", "num_users", "steps"]
"""Arguments that change from batch to batch: not compiled for."""


@triton.jit
def _user_of(offsets_ptr, other_ptr, rows, num_users, steps, TWO: tl.constexpr):
    """The user that owns each row: the last one whose first row is not behind it. rows: [n] int64, all of some user.

    steps: bits of num_users. TWO: the first row is the sum of both offsets.
    """
    low = (rows * 0).to(tl.int32)
    high = low + num_users
    for _ in range(steps):
        middle = (low + high) // 2
        first = tl.load(offsets_ptr + middle).to(tl.int64)
        if TWO:
            first += tl.load(other_ptr + middle).to(tl.int64)
        behind = first <= rows
        low = tl.where(behind, middle, low)
        high = tl.where(behind, high, middle)
    return low


@triton.jit(do_not_specialize=COUNTS)
def _concat_kernel(
    a_ptr, b_ptr, joined_ptr, a_offsets_ptr, b_offsets_ptr, num_rows, num_users, steps,
    width: tl.constexpr, a_stride: tl.constexpr, b_stride: tl.constexpr, joined_stride: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Copies a and b into joined, user by user; SPLIT: joined into a and b."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    valid = rows < num_rows
    rows = tl.where(valid, rows, 0)
    user = _user_of(a_offsets_ptr, b_offsets_ptr, rows, num_users, steps, True)
    a_stop = tl.load(a_offsets_ptr + user + 1).to(tl.int64)
    b_start = tl.load(b_offsets_ptr + user).to(tl.int64)
    from_a = rows < a_stop + b_start
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (columns < width)[None, :]
    in_a, in_b = inside & from_a[:, None], inside & (from_a == 0)[:, None]
    a_at = a_ptr + (rows - b_start)[:, None] * a_stride + columns[None, :]
    b_at = b_ptr + (rows - a_stop)[:, None] * b_stride + columns[None, :]
    joined_at = joined_ptr + rows[:, None] * joined_stride + columns[None, :]
    if SPLIT:
        value = tl.load(joined_at, mask=inside)
        tl.store(a_at, value, mask=in_a)
        tl.store(b_at, value, mask=in_b)
    else:
        value = tl.where(from_a[:, None], tl.load(a_at, mask=in_a), tl.load(b_at, mask=in_b))
        tl.store(joined_at, value, mask=inside)


@triton.jit(do_not_specialize=["num_rows", "padding"])
def _to_dense_kernel(
    values_ptr, dense_ptr, offsets_ptr, num_rows, padding,
    max_len, width: tl.constexpr, stride: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dense: [B * max_len = num_rows, D] contiguous."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    valid = rows < num_rows
    user, position = rows // max_len, rows % max_len
    start = tl.load(offsets_ptr + user, mask=valid, other=0).to(tl.int64)
    stop = tl.load(offsets_ptr + user + 1, mask=valid, other=0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (columns < width)[None, :]
    own = inside & (start + position < stop)[:, None]
    value = tl.load(values_ptr + (start + position)[:, None] * stride + columns[None, :], mask=own)
    value = tl.where(own, value, padding).to(dense_ptr.dtype.element_ty)
    tl.store(dense_ptr + rows[:, None] * width + columns[None, :], value, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def _to_jagged_kernel(
    dense_ptr, values_ptr, offsets_ptr, num_rows, num_users, steps,
    max_len, width: tl.constexpr, user_stride, stride, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """values: [L = num_rows, D] contiguous; rows beyond max_len become zero."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    valid = rows < num_rows
    rows = tl.where(valid, rows, 0)
    user = _user_of(offsets_ptr, offsets_ptr, rows, num_users, steps, False).to(tl.int64)
    position = rows - tl.load(offsets_ptr + user).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (columns < width)[None, :]
    kept = inside & (position < max_len)[:, None]
    dense_at = dense_ptr + (user * user_stride + position * stride)[:, None] + columns[None, :]
    tl.store(values_ptr + rows[:, None] * width + columns[None, :], tl.load(dense_at, mask=kept, other=0), mask=inside)


@triton.jit(do_not_specialize=[*COUNTS, "seed_low", "seed_high", "dropped"])
def _add_positions_fwd_kernel(
    events_ptr, table_ptr, out_ptr, offsets_ptr, random_rows, num_rows, num_users, steps, scale,
    seed_low, seed_high, dropped, factor,
    width: tl.constexpr, stride: tl.constexpr, table_stride: tl.constexpr, octets: tl.constexpr,
    DROPOUT: tl.constexpr, ROWS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out: [L, D] contiguous = Dropout(scale * events + table[position])."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    valid = rows < num_rows
    rows = tl.where(valid, rows, 0)
    user = _user_of(offsets_ptr, offsets_ptr, rows, num_users, steps, False)
    position = rows - tl.load(offsets_ptr + user).to(tl.int64)
    first = tl.program_id(1) * BLOCK_D
    columns = first + tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (columns < width)[None, :]
    events = tl.load(events_ptr + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    added = tl.load(table_ptr + position[:, None] * table_stride + columns[None, :], mask=inside, other=0.0)
    out = events.to(tl.float32) * scale + added.to(tl.float32)
    if DROPOUT:
        drawn = drawn_rows(random_rows, rows, valid, ROWS)
        keep = keep_tile(seed_low, seed_high, dropped, drawn, first, octets, BLOCK_L, BLOCK_D)
        out = tl.where(keep, out * factor, 0.0)
    tl.store(out_ptr + rows[:, None] * width + columns[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_users", "max_len", "seed_low", "seed_high", "dropped"])
def _add_positions_bwd_kernel(
    grad_ptr, d_events_ptr, d_table_ptr, offsets_ptr, random_rows, num_users, max_len, scale,
    seed_low, seed_high, dropped, factor,
    width: tl.constexpr, stride: tl.constexpr, octets: tl.constexpr,
    DROPOUT: tl.constexpr, ROWS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """d_events: [L, D] and d_table: [N, D], contiguous. A program owns one position: it visits that row of every
    user, BLOCK_B users at a time, so each row is visited once and the sum over users needs neither atomics nor
    memory; its order is fixed."""
    position = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_D
    columns = first + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for begin in range(0, tl.where(position < max_len, num_users, 0), BLOCK_B):
        user = begin + tl.arange(0, BLOCK_B)
        start = tl.load(offsets_ptr + user, mask=user < num_users, other=0).to(tl.int64)
        stop = tl.load(offsets_ptr + user + 1, mask=user < num_users, other=0).to(tl.int64)
        rows = start + position
        inside = (rows < stop)[:, None] & (columns < width)[None, :]
        grad = tl.load(grad_ptr + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if DROPOUT:
            drawn = drawn_rows(random_rows, rows, rows < stop, ROWS)
            keep = keep_tile(seed_low, seed_high, dropped, drawn, first, octets, BLOCK_B, BLOCK_D)
            grad = tl.where(keep, grad * factor, 0.0)
        total += tl.sum(grad, axis=0)
        d_events = (grad * scale).to(d_events_ptr.dtype.element_ty)
        tl.store(d_events_ptr + rows[:, None] * width + columns[None, :], d_events, mask=inside)
    total = total.to(d_table_ptr.dtype.element_ty)
    tl.store(d_table_ptr + position * width + columns, total, mask=columns < width)


TILE = 4096
"""Values of a tile."""
MAX_COLUMNS = 256
"""Widest tile; wider rows take several programs."""
BLOCK_USERS = 32
"""Users whose rows of one position are loaded together."""


def tile(width: int, least: int = 1) -> Config:
    """BLOCK_L rows of BLOCK_D columns."""
    columns = min(MAX_COLUMNS, power_of_two(width, least))
    rows = 64 if interpreting() else max(16, min(1024, TILE // columns))
    return config(4, 1, BLOCK_L=rows, BLOCK_D=columns)


def _grid(num_rows: int, width: int, c: Config) -> tuple[int, int]:
    return triton.cdiv(num_rows, c["BLOCK_L"]), triton.cdiv(width, c["BLOCK_D"])


def _flat(x: Tensor, dims: int) -> Tensor:
    """x with ``dims`` leading dimensions and one of columns, of unit stride; booleans as bytes."""
    x = x.view(torch.uint8) if x.dtype == torch.bool else x
    x = x if x.dim() > dims else x[..., None]
    return unit_stride(x)


def _steps(num_users: int) -> int:
    return max(1, (num_users - 1).bit_length())


def concat_jagged_fwd(a: Tensor, a_offsets: Tensor, b: Tensor, b_offsets: Tensor) -> Tensor:
    """[La + Lb, ...] contiguous."""
    out = torch.empty(a.shape[0] + b.shape[0], *a.shape[1:], dtype=a.dtype, device=a.device)
    _concat(_flat(a, 1), a_offsets, _flat(b, 1), b_offsets, _flat(out, 1), False)
    return out


def split_jagged_fwd(values: Tensor, a_offsets: Tensor, b_offsets: Tensor, num_a: int) -> tuple[Tensor, Tensor]:
    """[num_a, ...] and [L - num_a, ...], contiguous."""
    rows, device = (num_a, values.shape[0] - num_a), values.device
    a, b = (torch.empty(n, *values.shape[1:], dtype=values.dtype, device=device) for n in rows)
    _concat(_flat(a, 1), a_offsets, _flat(b, 1), b_offsets, _flat(values, 1), True)
    return a, b


def _concat(a: Tensor, a_offsets: Tensor, b: Tensor, b_offsets: Tensor, joined: Tensor, split: bool) -> None:
    a_offsets, b_offsets = a_offsets.contiguous(), b_offsets.contiguous()
    (num_rows, width), num_users = joined.shape, a_offsets.shape[0] - 1
    if num_rows * width == 0:
        return
    c = tile(width)
    _concat_kernel[_grid(num_rows, width, c)](
        a, b, joined, a_offsets, b_offsets, num_rows, num_users, _steps(num_users),
        width, a.stride(0), b.stride(0), joined.stride(0), SPLIT=split, **c.launch(),
    )  # fmt: skip


def jagged_to_dense_fwd(values: Tensor, offsets: Tensor, max_len: int, padding: float) -> Tensor:
    """[B, max_len, ...] contiguous."""
    offsets, num_users = offsets.contiguous(), offsets.shape[0] - 1
    dense = torch.empty(num_users, max_len, *values.shape[1:], dtype=values.dtype, device=values.device)
    if dense.numel() == 0:
        return dense
    flat = _flat(values, 1)
    c = tile(flat.shape[1])
    number = padding if values.is_floating_point() else int(padding)
    _to_dense_kernel[_grid(num_users * max_len, flat.shape[1], c)](
        flat, _flat(dense, 2), offsets, num_users * max_len, number,
        max_len, flat.shape[1], flat.stride(0), **c.launch(),
    )  # fmt: skip
    return dense


def dense_to_jagged_fwd(dense: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
    """[num_rows, ...] contiguous."""
    values = torch.empty(num_rows, *dense.shape[2:], dtype=dense.dtype, device=dense.device)
    if values.numel() == 0:
        return values
    flat, offsets, num_users = _flat(dense, 2), offsets.contiguous(), dense.shape[0]
    c = tile(flat.shape[2])
    _to_jagged_kernel[_grid(num_rows, flat.shape[2], c)](
        flat, _flat(values, 1), offsets, num_rows, num_users, _steps(num_users),
        dense.shape[1], flat.shape[2], flat.stride(0), flat.stride(1), **c.launch(),
    )  # fmt: skip
    return values


def _dropout_arguments(rate: float, seed: int) -> tuple[int, int, int, float]:
    return (*seed_words(seed), dropped_levels(rate), kept_factor(rate))


def add_positions_fwd(
    events: Tensor, table: Tensor, offsets: Tensor, scale: float, rate: float, seed: int, dtype: torch.dtype,
    rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[L, D] contiguous, in ``dtype``."""
    (num_rows, width), offsets, num_users = events.shape, offsets.contiguous(), offsets.shape[0] - 1
    out = torch.empty(num_rows, width, dtype=dtype, device=events.device)
    if out.numel() == 0:
        return out
    events, table, rows, c = _flat(events, 1), _flat(table, 1), drawn_by(rows, rate), tile(width, 16)
    _add_positions_fwd_kernel[_grid(num_rows, width, c)](
        events, table, out, offsets, rows, num_rows, num_users, _steps(num_users), scale,
        *_dropout_arguments(rate, seed), width, events.stride(0), table.stride(0), triton.cdiv(width, OCTET),
        DROPOUT=rate > 0, ROWS=rows is not None, **c.launch(),
    )  # fmt: skip
    return out


def add_positions_bwd(
    grad: Tensor, offsets: Tensor, num_positions: int, max_len: int, scale: float, rate: float, seed: int,
    events_dtype: torch.dtype, table_dtype: torch.dtype, rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of events [L, D] and of the table [num_positions, D], contiguous."""
    num_rows, width = grad.shape
    d_events = torch.empty(num_rows, width, dtype=events_dtype, device=grad.device)
    d_table = torch.empty(num_positions, width, dtype=table_dtype, device=grad.device)
    if d_table.numel() == 0:
        return d_events, d_table
    grad, offsets, rows = _flat(grad, 1), offsets.contiguous(), drawn_by(rows, rate)
    columns = min(MAX_COLUMNS, power_of_two(width))
    _add_positions_bwd_kernel[(num_positions, triton.cdiv(width, columns))](
        grad, d_events, d_table, offsets, rows, offsets.shape[0] - 1, max_len, scale, *_dropout_arguments(rate, seed),
        width, grad.stride(0), triton.cdiv(width, OCTET),
        DROPOUT=rate > 0, ROWS=rows is not None, BLOCK_B=BLOCK_USERS, BLOCK_D=columns, num_warps=4,
    )  # fmt: skip
    return d_events, d_table
