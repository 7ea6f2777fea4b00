"""Pointwise aggregated attention of HSTU with relative bias: the specification, mask rule included.

Legend: B users, L query rows in all, H heads, A query/key width, V value width; n rows of a user's sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kernels.attention.plan import AttentionPlan


@dataclass(frozen=True)
class Mask:
    """Who sees whom within a user of n rows, of which the last ``num_targets[b]`` are targets and the rest history.

    One rule for all uses, written in :func:`visible`: a row sees history rows; a target
    sees the history and itself, never another target; history rows never see targets.
    """

    causal: bool = True
    """History row i sees history rows j <= i; otherwise all of the history."""
    contextual: int = 0
    """Rows 0 .. contextual-1 see and are seen by all of the history, beyond causality and window."""
    window: int = 0
    """Local attention: a row sees only the last ``window`` rows up to its own (that near on both sides when not
    causal); targets count as the row right after the history. 0: no limit."""
    full_rows: int = 0
    """With a window: the last ``full_rows`` history rows, and the targets, see without it (semi-local attention)."""

    def __post_init__(self) -> None:
        for name in ("contextual", "window", "full_rows"):
            if getattr(self, name) < 0:
                raise ValueError(f"mask {name}={getattr(self, name)}: expected >= 0")
        if self.full_rows and not self.window:
            raise ValueError(f"mask full_rows={self.full_rows} without a window: every row is full already")
        if self.contextual and not self.causal and not self.window:
            raise ValueError(
                f"mask contextual={self.contextual} without causality or window: every row sees all already"
            )

    @property
    def reaches_forward(self) -> bool:
        """Whether a history row may see a later one."""
        return not self.causal or self.contextual > 0


CAUSAL = Mask()


def visible(i: Tensor, j: Tensor, length: Tensor | int, history: Tensor | int, mask: Mask) -> Tensor:
    """Whether row i of a user's sequence sees row j: the one mask rule.

    Args:
        i, j: integer positions in the sequence, of shapes that broadcast.
        length: n, rows of the sequence; history: how many of them, from the first, are no targets.
        mask: the kind.

    Returns:
        bool, of the broadcast shape.
    """
    length, history = torch.as_tensor(length), torch.as_tensor(history)
    at = torch.minimum(i, history)  # a target stands right after the history
    sees = (j <= at) if mask.causal else torch.ones_like(at + j, dtype=torch.bool)
    if mask.window:
        near = (at - j).abs() < mask.window
        if mask.full_rows:
            near = near | (at >= history - mask.full_rows)
        sees = sees & near
    prefix = history.clamp(max=mask.contextual)
    sees = sees | (i < prefix) | (j < prefix)
    own_target = (i == j) & (i >= history)
    return ((sees & (j < history)) | own_target) & (i < length) & (j < length)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    position_weight: Tensor | None,
    time_weight: Tensor | None,
    divisor: float,
    scale: float = 1.0,
    row_divisor: Tensor | None = None,
) -> Tensor:
    """``SiLU(scale q.k + w_pos[N-1+j-i] + time bias(tq_i - tk_j)) / divisor @ v`` over visible pairs, user by user.

    Arguments as in :func:`kernels.attention.attention`; accumulates in float32 (float64 for float64 input).
    Source: Zhai et al. 2024, section 3.1; bias as in the reference code.
    """
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    bounds = plan.offsets.tolist()
    outputs = []
    for user, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        first, n = start, stop - start
        if plan.key_starts is not None and plan.key_lengths is not None:
            first, n = int(plan.key_starts[user]), int(plan.key_lengths[user])
        keys = slice(first, first + n)
        history = n if plan.num_targets is None else n - int(plan.num_targets[user])
        i = torch.arange(n - (stop - start), n, device=q.device)[:, None]
        j = torch.arange(n, device=q.device)[None, :]
        score = torch.einsum("iha,jha->hij", q[start:stop].to(work), k[keys].to(work)) * scale  # [H, rows, n]
        if position_weight is not None:
            center = (position_weight.shape[1] - 1) // 2
            apart = j.clamp(max=history) - i.clamp(max=history)
            score = score + position_weight.to(work)[:, center + apart]
        if time_weight is not None:
            assert plan.query_time is not None and plan.key_time is not None and plan.time_buckets is not None
            gap_s = plan.query_time[start:stop, None] - plan.key_time[None, keys]
            score = score + _time_bias(time_weight.to(work), plan.time_buckets.of(gap_s))
        weight = torch.nn.functional.silu(score) * visible(i, j, n, history, plan.mask)
        weight = weight / (divisor if row_divisor is None else row_divisor[start:stop, None].to(work))
        outputs.append(torch.einsum("hij,jhv->ihv", weight, v[keys].to(work)))
    return torch.cat(outputs).to(v.dtype) if outputs else v.new_zeros(0, *v.shape[1:])


def _time_bias(weight: Tensor, gaps: Tensor) -> Tensor:
    """[H or 1, rows, n] from a table [H or 1, buckets] by bucket, or from (a, b) [H or 1, 2] by ln(1 + gap)."""
    if gaps.is_floating_point():
        return weight[:, 1, None, None] - weight[:, 0, None, None] * gaps.to(weight.dtype)
    return weight[:, gaps.long()]
