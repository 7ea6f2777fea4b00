"""Causal softmax attention over a jagged batch, for the baselines.

Legend: L total events, H heads, A head width, b users of a padded group, n its length.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels._dropout import seeded_dropout
from kernels.attention import AttentionPlan
from kernels.attention.plan import Group, groups

from hstu.seeding import derive


def causal_softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, dropout: float = 0.0, seed: int | None = None
) -> Tensor:
    """``softmax(q k^T / sqrt(A)) v`` over each user's own earlier events, dropout on the weights.

    Args:
        q, k, v: [L, H, A] floating.
        plan: layout of the batch.
        dropout: rate on the attention weights.
        seed: of the dropout; None: none.

    Returns:
        [L, H, A].
    """
    rows, slots, parts = _padding(plan, q.shape[0])
    outputs = []
    for index, group in enumerate(parts):
        chosen = rows[group.slots]
        shape = (group.num_users, group.length, *q.shape[1:])
        qp, kp, vp = (x.index_select(0, chosen).view(shape).transpose(1, 2) for x in (q, k, v))  # [b, H, n, A]
        if seed is None or dropout == 0.0:
            out = torch.nn.functional.scaled_dot_product_attention(qp, kp, vp, is_causal=True)
        else:
            hidden = torch.full((group.length, group.length), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
            weight = torch.softmax(qp @ kp.mT / math.sqrt(q.shape[2]) + hidden, dim=-1)
            out = seeded_dropout(weight, dropout, derive(seed, index)) @ vp
        outputs.append(out.transpose(1, 2).reshape(-1, *q.shape[1:]))
    return torch.cat(outputs).index_select(0, slots) if outputs else torch.zeros_like(q)


def _padding(plan: AttentionPlan, num_events: int) -> tuple[Tensor, Tensor, list[Group]]:
    """rows [slots], slots [L] and the groups; a plan made on a GPU is padded as a single group."""
    if plan.schedule is not None and plan.rows is not None and plan.slots is not None:
        return plan.rows, plan.slots, list(groups(plan.schedule))
    offsets, n = plan.offsets, plan.max_len
    num_users = offsets.shape[0] - 1
    within = torch.arange(n, device=offsets.device)
    rows = torch.minimum(offsets[:-1, None] + within, (offsets[1:, None] - 1).clamp(min=0)).view(-1)
    owner = torch.repeat_interleave(
        torch.arange(num_users, device=offsets.device), offsets.diff(), output_size=num_events
    )
    slots = torch.arange(num_events, device=offsets.device) - offsets[owner] + owner * n
    return rows, slots, [Group(num_users, n, slice(0, num_users * n))]
