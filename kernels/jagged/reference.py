"""The specification, one user at a time. Arguments as in :mod:`kernels.jagged.op`.

Legend: B users, L total rows, D width, N table rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._common import compute_dtype
from kernels._dropout import keep_scale


def users(offsets: Tensor) -> list[slice]:
    """Rows of each user."""
    bounds = offsets.tolist()
    return [slice(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]


def interleave_reference(a: Tensor, b: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    rows = [row for pair in zip(a, b, strict=True) for row in pair]
    values = torch.stack(rows) if rows else a.new_zeros(0, *a.shape[1:])
    return values, torch.tensor([2 * o for o in offsets.tolist()], dtype=offsets.dtype)


def deinterleave_reference(values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return values[0::2], values[1::2], torch.tensor([o // 2 for o in offsets.tolist()], dtype=offsets.dtype)


def concat_jagged_reference(a: Tensor, a_offsets: Tensor, b: Tensor, b_offsets: Tensor) -> tuple[Tensor, Tensor]:
    parts = [
        part
        for of_a, of_b in zip(users(a_offsets), users(b_offsets), strict=True)
        for part in (a[of_a], b[of_b])
    ]  # fmt: skip
    lengths = [0, *(p.shape[0] + q.shape[0] for p, q in zip(parts[0::2], parts[1::2], strict=True))]
    return torch.cat(parts), torch.tensor(lengths).cumsum(0)


def split_jagged_reference(values: Tensor, a_offsets: Tensor, b_offsets: Tensor) -> tuple[Tensor, Tensor]:
    a_parts, b_parts, start = [], [], 0
    for of_a, of_b in zip(users(a_offsets), users(b_offsets), strict=True):
        middle = start + of_a.stop - of_a.start
        stop = middle + of_b.stop - of_b.start
        a_parts.append(values[start:middle])
        b_parts.append(values[middle:stop])
        start = stop
    return torch.cat(a_parts), torch.cat(b_parts)


def jagged_to_dense_reference(values: Tensor, offsets: Tensor, max_len: int, padding: float = 0.0) -> Tensor:
    rows = []
    for user in users(offsets):
        kept = values[user][:max_len]
        pad = values.new_full((max_len - kept.shape[0], *values.shape[1:]), padding)
        rows.append(torch.cat((kept, pad)))
    return torch.stack(rows) if rows else values.new_zeros(0, max_len, *values.shape[1:])


def dense_to_jagged_reference(dense: Tensor, offsets: Tensor) -> Tensor:
    rows = []
    for user, own in zip(users(offsets), dense, strict=True):
        length = user.stop - user.start
        beyond = dense.new_zeros(max(0, length - dense.shape[1]), *dense.shape[2:])
        rows += [own[:length], beyond]
    return torch.cat(rows)


def add_positions_reference(
    events: Tensor, table: Tensor, offsets: Tensor, scale: float, dropout: float = 0.0, seed: int | None = None,
    rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    work = compute_dtype(events, table)
    parts = [scale * events[user].to(work) + table[: user.stop - user.start].to(work) for user in users(offsets)]
    out = torch.cat(parts)
    if seed is not None and dropout > 0:
        out = out * keep_scale(out.shape, dropout, seed, out, rows)
    return out.to(torch.promote_types(events.dtype, table.dtype))
