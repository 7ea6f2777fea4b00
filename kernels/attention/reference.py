"""Pointwise aggregated attention of HSTU with relative bias: the specification.

Legend: B users, L total events, N padded length, H heads, A query/key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention.plan import AttentionPlan


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    position_weight: Tensor | None,
    time_weight: Tensor | None,
    divisor: float,
    scale: float = 1.0,
) -> Tensor:
    """``SiLU(scale q.k + w_pos[N-1+j-i] + w_time[bucket(tq_i - tk_j)]) / divisor @ v`` for j <= i, user by user.

    Arguments as in :func:`kernels.attention.attention`; accumulates in float32 (float64 for float64 input).
    Source: Zhai et al. 2024, section 3.1; bias as in the reference code.
    """
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    bounds = plan.offsets.tolist()
    outputs = []
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        n = stop - start
        i = torch.arange(n, device=q.device)
        score = torch.einsum("iha,jha->hij", q[start:stop].to(work), k[start:stop].to(work)) * scale  # [H, n, n]
        if position_weight is not None:
            center = (position_weight.shape[1] - 1) // 2
            score = score + position_weight.to(work)[:, center + i[None, :] - i[:, None]]
        if time_weight is not None:
            assert plan.query_time is not None and plan.key_time is not None and plan.time_buckets is not None
            gap_s = plan.query_time[start:stop, None] - plan.key_time[None, start:stop]
            score = score + time_weight.to(work)[:, plan.time_buckets.of(gap_s).long()]
        weight = torch.nn.functional.silu(score) / divisor
        weight = weight * (i[None, :] <= i[:, None])
        outputs.append(torch.einsum("hij,jhv->ihv", weight, v[start:stop].to(work)))
    return torch.cat(outputs).to(v.dtype) if outputs else torch.zeros_like(v)
