"""Public functions over jagged tensors: validation, custom ops, their fakes and gradients.

Every result's length follows from shapes or from a number that the caller has, so nothing waits for the device.
On the CPU, where reading is free, offsets that do not fit the rows raise; elsewhere that is not looked at.

Legend: B users, L total rows (of the values at hand), D width, N table rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels._backend import choose
from kernels._dropout import FAKE, check_rate, check_rows, seeded_dropout
from kernels.jagged import cpu
from kernels.jagged.cpu import positions_of

__all__ = [
    "add_positions",
    "concat_jagged",
    "deinterleave",
    "dense_to_jagged",
    "interleave",
    "jagged_to_dense",
    "positions_of",
    "split_jagged",
]


def interleave(a: Tensor, b: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Two tokens for each event: a's row, then b's (item and action tokens, for example).

    One copy in plain torch, which is as fast as a copy can be; the gradient is two views.

    Args:
        a, b: [L, ...] of one shape and dtype.
        offsets: [B+1] int32 or int64, of both.

    Returns:
        values [2L, ...] with rows a0, b0, a1, b1, ..., and their offsets [B+1].
    """
    if a.shape != b.shape or a.dtype != b.dtype or a.dim() < 1:
        raise ValueError(
            f"a and b: expected one shape [L, ...] and dtype, "
            f"got {list(a.shape)} {a.dtype} and {list(b.shape)} {b.dtype}"
        )
    _check_offsets("offsets", offsets, a, a.shape[0])
    return torch.stack((a, b), dim=1).flatten(0, 1), offsets * 2


def deinterleave(values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`interleave` joined, as views: a [L, ...], b [L, ...] and their offsets [B+1].

    Raises ValueError for an odd number of rows.
    """
    if values.dim() < 1 or values.shape[0] % 2:
        raise ValueError(f"values has shape {list(values.shape)}: expected [2L, ...]")
    _check_offsets("offsets", offsets, values, values.shape[0])
    a, b = values.unflatten(0, (-1, 2)).unbind(1)
    return a, b, offsets // 2


def concat_jagged(a: Tensor, a_offsets: Tensor, b: Tensor, b_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Each user's rows of a, then the same user's rows of b.

    Args:
        a: [La] or [La, D], any dtype; b: [Lb] or [Lb, D], same dtype and D.
        a_offsets, b_offsets: [B+1] int32 or int64.

    Returns:
        values [La + Lb(, D)] and their offsets [B+1].
    """
    _check_pair(a_offsets, b_offsets)
    if a.dim() not in (1, 2) or a.dim() != b.dim() or a.shape[1:] != b.shape[1:] or a.dtype != b.dtype:
        raise ValueError(
            f"a and b: expected [La] and [Lb], or [La, D] and [Lb, D], of one dtype, "
            f"got {list(a.shape)} {a.dtype} and {list(b.shape)} {b.dtype}"
        )
    if a.device != b.device:
        raise ValueError(f"a is on {a.device}, b on {b.device}: expected one device")
    _check_offsets("a_offsets", a_offsets, a, a.shape[0])
    _check_offsets("b_offsets", b_offsets, b, b.shape[0])
    return torch.ops.hstu.concat_jagged(a, a_offsets, b, b_offsets, _on_triton(a)), a_offsets + b_offsets


def split_jagged(values: Tensor, a_offsets: Tensor, b_offsets: Tensor, num_a: int) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`concat_jagged`.

    Args:
        values: [L] or [L, D], any dtype.
        a_offsets, b_offsets: [B+1] int32 or int64, of the two parts.
        num_a: rows of the first part in all. Asked for, since on a GPU reading it from the offsets would wait.

    Returns:
        a [num_a(, D)] and b [L - num_a(, D)].
    """
    _check_pair(a_offsets, b_offsets)
    _check_values(values)
    if not 0 <= num_a <= values.shape[0]:
        raise ValueError(f"num_a={num_a}: expected 0..{values.shape[0]}, the rows of values")
    _check_offsets("a_offsets", a_offsets, values, num_a)
    _check_offsets("b_offsets", b_offsets, values, values.shape[0] - num_a)
    return torch.ops.hstu.split_jagged(values, a_offsets, b_offsets, num_a, _on_triton(values))


def jagged_to_dense(values: Tensor, offsets: Tensor, max_len: int, padding: float = 0.0) -> Tensor:
    """Users side by side, each padded or cut to ``max_len`` rows.

    Args:
        values: [L] or [L, D], any dtype.
        offsets: [B+1] int32 or int64.
        max_len: rows per user; a longer user loses its last rows (and they get a zero gradient).
        padding: what the rows behind a user's last one hold.

    Returns:
        [B, max_len(, D)] in values' dtype.
    """
    _check_values(values)
    _check_offsets("offsets", offsets, values, values.shape[0])
    if max_len < 0:
        raise ValueError(f"max_len={max_len}: expected >= 0")
    return torch.ops.hstu.jagged_to_dense(values, offsets, max_len, float(padding), _on_triton(values))


def dense_to_jagged(dense: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
    """Inverse of :func:`jagged_to_dense`: each user's first rows, one user after the other.

    Args:
        dense: [B, max_len] or [B, max_len, D], any dtype.
        offsets: [B+1] int32 or int64. Rows of a user beyond max_len are zero.
        num_rows: L, the last offset. Asked for, since on a GPU reading it would wait.

    Returns:
        [num_rows(, D)] in dense's dtype.
    """
    if dense.dim() not in (2, 3):
        raise ValueError(f"dense has shape {list(dense.shape)}: expected [B, max_len] or [B, max_len, D]")
    _check_offsets("offsets", offsets, dense, num_rows)
    if offsets.shape[0] != dense.shape[0] + 1:
        raise ValueError(f"offsets has shape {list(offsets.shape)}: expected [{dense.shape[0] + 1}], B + 1")
    return torch.ops.hstu.dense_to_jagged(dense, offsets, num_rows, _on_triton(dense))


def add_positions(
    events: Tensor, table: Tensor, offsets: Tensor, scale: float, max_len: int,
    dropout: float = 0.0, seed: int | None = None, rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``Dropout(scale * events + table[position])``, position being the index within the user: the input of a model.

    Args:
        events: [L, D] floating. Item embeddings.
        table: [N, D] floating. Position embeddings.
        offsets: [B+1] int32 or int64.
        scale: of the events (published: sqrt(D)).
        max_len: at least the longest user, at most N.
        dropout: rate in [0, 1).
        seed: >= 0. The mask is a function of it (``kernels/_dropout.py``); None: no dropout (evaluation).
        rows: [L] int64, >= 0. Row whose mask each row takes; None: its own, 0..L-1.

    Returns:
        [L, D] in the wider of both dtypes.
    """
    if events.dim() != 2 or table.dim() != 2 or events.shape[1] != table.shape[1]:
        raise ValueError(f"events [L, D] and table [N, D]: got {list(events.shape)} and {list(table.shape)}")
    if not events.is_floating_point() or not table.is_floating_point() or events.device != table.device:
        raise ValueError(
            f"events and table: expected floating on one device, "
            f"got {events.dtype} {events.device} and {table.dtype} {table.device}"
        )
    if not 0 <= max_len <= table.shape[0]:
        raise ValueError(f"max_len={max_len}: expected 0..{table.shape[0]}, the rows of the table")
    check_rate(dropout)
    check_rows(rows, (events.shape[0],), events)
    _check_offsets("offsets", offsets, events, events.shape[0])
    dtype = torch.promote_types(events.dtype, table.dtype)
    if choose("jagged", events.device, dtype).backend == "triton":
        rate = dropout if seed is not None else 0.0
        return torch.ops.hstu.add_positions(events, table, offsets, scale, max_len, rate, seed or 0, rows)
    added = torch.nn.functional.embedding(positions_of(offsets, events.shape[0]), table)
    return seeded_dropout(torch.add(added, events, alpha=scale), dropout, seed, rows)


def _on_triton(values: Tensor) -> bool:
    """Copies run on Triton in every dtype but float64, which all ops leave to torch."""
    dtype = values.dtype if values.is_floating_point() else None
    return choose("jagged", values.device, dtype).backend == "triton"


def _check_values(values: Tensor) -> None:
    if values.dim() not in (1, 2):
        raise ValueError(f"values has shape {list(values.shape)}: expected [L] or [L, D]")


def _check_pair(a_offsets: Tensor, b_offsets: Tensor) -> None:
    if a_offsets.shape != b_offsets.shape:
        raise ValueError(
            f"a_offsets and b_offsets: expected the same [B+1], got {list(a_offsets.shape)} and {list(b_offsets.shape)}"
        )


def _check_offsets(name: str, offsets: Tensor, values: Tensor, num_rows: int) -> None:
    if offsets.dim() != 1 or offsets.shape[0] < 1 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: expected [B+1] int32 or int64, got {list(offsets.shape)} {offsets.dtype}")
    if offsets.device != values.device:
        raise ValueError(f"{name} is on {offsets.device}, the values on {values.device}: expected one device")
    if torch.compiler.is_compiling() or offsets.device.type != "cpu" or isinstance(offsets, FAKE):
        return
    if int(offsets[-1]) != num_rows:
        raise ValueError(f"{name} end at {int(offsets[-1])}: expected {num_rows}, the number of rows")


@torch.library.custom_op("hstu::concat_jagged", mutates_args=())
def _concat_jagged(a: Tensor, a_offsets: Tensor, b: Tensor, b_offsets: Tensor, triton: bool) -> Tensor:
    if triton:
        from kernels.jagged.kernel import concat_jagged_fwd

        return concat_jagged_fwd(a, a_offsets, b, b_offsets)
    return cpu.concat_jagged_torch(a, a_offsets, b, b_offsets)


@_concat_jagged.register_fake
def _(a, a_offsets, b, b_offsets, triton):  # type: ignore[no-untyped-def]
    return a.new_empty(a.shape[0] + b.shape[0], *a.shape[1:])


@torch.library.custom_op("hstu::split_jagged", mutates_args=())
def _split_jagged(
    values: Tensor, a_offsets: Tensor, b_offsets: Tensor, num_a: int, triton: bool
) -> tuple[Tensor, Tensor]:
    if triton:
        from kernels.jagged.kernel import split_jagged_fwd

        return split_jagged_fwd(values, a_offsets, b_offsets, num_a)
    return cpu.split_jagged_torch(values, a_offsets, b_offsets, num_a)


@_split_jagged.register_fake
def _(values, a_offsets, b_offsets, num_a, triton):  # type: ignore[no-untyped-def]
    rest = values.shape[1:]
    return values.new_empty(num_a, *rest), values.new_empty(values.shape[0] - num_a, *rest)


def _setup_concat(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, a_offsets, _, b_offsets, ctx.triton = inputs
    ctx.num_a = a.shape[0]
    ctx.save_for_backward(a_offsets, b_offsets)


def _backward_concat(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    d_a, d_b = torch.ops.hstu.split_jagged(grad, *ctx.saved_tensors, ctx.num_a, ctx.triton)
    return d_a, None, d_b, None, None


def _setup_split(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, a_offsets, b_offsets, _, ctx.triton = inputs
    ctx.save_for_backward(a_offsets, b_offsets)


def _backward_split(ctx: Any, d_a: Tensor, d_b: Tensor) -> tuple[Any, ...]:
    a_offsets, b_offsets = ctx.saved_tensors
    return torch.ops.hstu.concat_jagged(d_a, a_offsets, d_b, b_offsets, ctx.triton), *[None] * 4


_concat_jagged.register_autograd(_backward_concat, setup_context=_setup_concat)
_split_jagged.register_autograd(_backward_split, setup_context=_setup_split)


@torch.library.custom_op("hstu::jagged_to_dense", mutates_args=())
def _jagged_to_dense(values: Tensor, offsets: Tensor, max_len: int, padding: float, triton: bool) -> Tensor:
    if triton:
        from kernels.jagged.kernel import jagged_to_dense_fwd

        return jagged_to_dense_fwd(values, offsets, max_len, padding)
    return cpu.jagged_to_dense_torch(values, offsets, max_len, padding)


@_jagged_to_dense.register_fake
def _(values, offsets, max_len, padding, triton):  # type: ignore[no-untyped-def]
    return values.new_empty(offsets.shape[0] - 1, max_len, *values.shape[1:])


@torch.library.custom_op("hstu::dense_to_jagged", mutates_args=())
def _dense_to_jagged(dense: Tensor, offsets: Tensor, num_rows: int, triton: bool) -> Tensor:
    if triton:
        from kernels.jagged.kernel import dense_to_jagged_fwd

        return dense_to_jagged_fwd(dense, offsets, num_rows)
    return cpu.dense_to_jagged_torch(dense, offsets, num_rows)


@_dense_to_jagged.register_fake
def _(dense, offsets, num_rows, triton):  # type: ignore[no-untyped-def]
    return dense.new_empty(num_rows, *dense.shape[2:])


def _setup_to_dense(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, offsets, _, _, ctx.triton = inputs
    ctx.num_rows = values.shape[0]
    ctx.save_for_backward(offsets)


def _backward_to_dense(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.hstu.dense_to_jagged(grad, *ctx.saved_tensors, ctx.num_rows, ctx.triton), *[None] * 4


def _setup_to_jagged(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dense, offsets, _, ctx.triton = inputs
    ctx.max_len = dense.shape[1]
    ctx.save_for_backward(offsets)


def _backward_to_jagged(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.hstu.jagged_to_dense(grad, *ctx.saved_tensors, ctx.max_len, 0.0, ctx.triton), *[None] * 3


_jagged_to_dense.register_autograd(_backward_to_dense, setup_context=_setup_to_dense)
_dense_to_jagged.register_autograd(_backward_to_jagged, setup_context=_setup_to_jagged)


@torch.library.custom_op("hstu::add_positions", mutates_args=())
def _add_positions(
    events: Tensor, table: Tensor, offsets: Tensor, scale: float, max_len: int, rate: float, seed: int,
    rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    from kernels.jagged.kernel import add_positions_fwd

    dtype = torch.promote_types(events.dtype, table.dtype)
    return add_positions_fwd(events, table, offsets, scale, rate, seed, dtype, rows)


@_add_positions.register_fake
def _(events, table, offsets, scale, max_len, rate, seed, rows=None):  # type: ignore[no-untyped-def]
    return events.new_empty(events.shape, dtype=torch.promote_types(events.dtype, table.dtype))


@torch.library.custom_op("hstu::add_positions_backward", mutates_args=())
def _add_positions_backward(
    grad: Tensor, offsets: Tensor, num_positions: int, scale: float, max_len: int, rate: float, seed: int,
    events_dtype: torch.dtype, table_dtype: torch.dtype, rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from kernels.jagged.kernel import add_positions_bwd

    return add_positions_bwd(grad, offsets, num_positions, max_len, scale, rate, seed, events_dtype, table_dtype, rows)


@_add_positions_backward.register_fake
def _(grad, offsets, num_positions, scale, max_len, rate, seed, events_dtype, table_dtype, rows=None):  # type: ignore[no-untyped-def]
    d_table = grad.new_empty(num_positions, grad.shape[1], dtype=table_dtype)
    return grad.new_empty(grad.shape, dtype=events_dtype), d_table


def _setup_add_positions(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    events, table, offsets, *ctx.rest, rows = inputs
    ctx.num_positions, ctx.dtypes = table.shape[0], (events.dtype, table.dtype)
    ctx.save_for_backward(offsets, rows)


def _backward_add_positions(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    offsets, rows = ctx.saved_tensors
    gradients = torch.ops.hstu.add_positions_backward(grad, offsets, ctx.num_positions, *ctx.rest, *ctx.dtypes, rows)
    return *gradients, *[None] * 6


_add_positions.register_autograd(_backward_add_positions, setup_context=_setup_add_positions)
