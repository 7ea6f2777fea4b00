"""Vectorised torch, any device; fbgemm's operators where they are installed and faster.

Legend: B users, L total rows, D width.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

FBGEMM_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64)
"""What fbgemm's operators take on the CPU."""


@cache
def fbgemm() -> Any | None:
    """fbgemm's operators, or None where fbgemm_gpu is not installed. Looked up at first use, never required."""
    try:
        import fbgemm_gpu  # noqa: F401
    except (ImportError, OSError):  # absent, or built for another torch
        return None
    found = torch.ops.fbgemm
    return found if hasattr(found, "jagged_to_padded_dense") and hasattr(found, "dense_to_jagged") else None


def _fbgemm_for(x: Tensor) -> Any | None:
    return fbgemm() if x.device.type == "cpu" and x.dtype in FBGEMM_DTYPES else None


def positions_of(offsets: Tensor, num_rows: int) -> Tensor:
    """[L] int64: index of each row within its user, 0 for the first. offsets: [B+1]; num_rows: L."""
    start = torch.repeat_interleave(offsets[:-1], offsets.diff(), output_size=num_rows)
    return torch.arange(num_rows, device=offsets.device) - start


def _slots(offsets: Tensor, num_rows: int, max_len: int) -> tuple[Tensor, Tensor]:
    """[L] int64 each: position within the user, and row in a dense [B * max_len, .]."""
    lengths = offsets.diff()
    user = torch.arange(lengths.shape[0], device=offsets.device)
    owner = torch.repeat_interleave(user, lengths, output_size=num_rows)
    position = torch.arange(num_rows, device=offsets.device) - offsets[owner]
    return position, position + owner * max_len


def jagged_to_dense_torch(values: Tensor, offsets: Tensor, max_len: int, padding: float) -> Tensor:
    """[B, max_len, ...], one copy of each row and one fill."""
    operators = _fbgemm_for(values)
    num_users = offsets.shape[0] - 1
    if operators is not None and num_users > 0 and max_len > 0:
        wide = values if values.dim() == 2 else values[:, None]
        dense = operators.jagged_to_padded_dense(wide.contiguous(), [offsets.to(torch.int64)], [max_len], padding)
        return dense if values.dim() == 2 else dense[:, :, 0]  # type: ignore[no-any-return]
    rest = values.shape[1:]
    dense = values.new_full((num_users * max_len, *rest), padding)
    position, slot = _slots(offsets.to(torch.int64), values.shape[0], max_len)
    kept = position < max_len
    # A row beyond max_len goes to a spare row at the end, so that no shape depends on the data.
    spare = torch.cat((dense, dense.new_zeros(1, *rest)))
    slot = torch.where(kept, slot, num_users * max_len)
    return spare.index_copy_(0, slot, values)[:-1].view(num_users, max_len, *rest)


def dense_to_jagged_torch(dense: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
    """[num_rows, ...]; rows beyond dense's max_len are zero."""
    operators = _fbgemm_for(dense)
    num_users, max_len, *rest = dense.shape
    if num_rows == 0 or max_len == 0:
        return dense.new_zeros(num_rows, *rest)
    if operators is not None:
        wide = dense if dense.dim() == 3 else dense[:, :, None]
        values = operators.dense_to_jagged(wide.contiguous(), [offsets.to(torch.int64)], num_rows)[0]
        return values if dense.dim() == 3 else values[:, 0]  # type: ignore[no-any-return]
    position, slot = _slots(offsets.to(torch.int64), num_rows, max_len)
    kept = position < max_len
    values = dense.flatten(0, 1).index_select(0, torch.where(kept, slot, 0))
    return values.masked_fill_(~kept.view(-1, *[1] * len(rest)), 0)


def _destinations(a_offsets: Tensor, b_offsets: Tensor, num_a: int, num_b: int) -> tuple[Tensor, Tensor]:
    """Where the rows of a and of b lie in the joined tensor."""
    a_offsets, b_offsets = a_offsets.to(torch.int64), b_offsets.to(torch.int64)
    before_a = torch.repeat_interleave(b_offsets[:-1], a_offsets.diff(), output_size=num_a)
    before_b = torch.repeat_interleave(a_offsets[1:], b_offsets.diff(), output_size=num_b)
    device = a_offsets.device
    return torch.arange(num_a, device=device) + before_a, torch.arange(num_b, device=device) + before_b


def concat_jagged_torch(a: Tensor, a_offsets: Tensor, b: Tensor, b_offsets: Tensor) -> Tensor:
    """Each user's rows of a, then of b."""
    of_a, of_b = _destinations(a_offsets, b_offsets, a.shape[0], b.shape[0])
    out = torch.empty(a.shape[0] + b.shape[0], *a.shape[1:], dtype=a.dtype, device=a.device)
    return out.index_copy_(0, of_a, a).index_copy_(0, of_b, b)


def split_jagged_torch(values: Tensor, a_offsets: Tensor, b_offsets: Tensor, num_a: int) -> tuple[Tensor, Tensor]:
    """The two parts that :func:`concat_jagged_torch` joined."""
    of_a, of_b = _destinations(a_offsets, b_offsets, num_a, values.shape[0] - num_a)
    return values.index_select(0, of_a), values.index_select(0, of_b)
