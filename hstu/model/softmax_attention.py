"""Causal softmax attention over a jagged batch, for the baselines.

Legend: L total events, H heads, A head width, b users of a padded group, n its length, r query rows of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels._dropout import check_rows, kept_factor
from kernels._hash_dropout import hash_keep
from kernels.attention import AttentionPlan
from kernels.attention.cpu import BlockWalk, heads_first, rows_first


def causal_softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, dropout: float = 0.0, seed: int | None = None,
    rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``softmax(q k^T / sqrt(A)) v`` over each user's own earlier events, dropout on the weights.

    Args:
        q, k, v: [L, H, A] floating.
        plan: layout of the batch.
        dropout: rate on the attention weights.
        seed: of the dropout; None: none. The mask is a function of it, the head, the query's row and the key's place
            within the user, the same on every device.
        rows: [L] int64. The query's row in that; None: 0..L-1.

    Returns:
        [L, H, A].
    """
    check_rows(rows, (q.shape[0],), q)
    rate = dropout if seed is not None else 0.0
    if rate > 0 and rows is None:
        rows = torch.arange(q.shape[0], device=q.device)
    if plan.schedule is not None:
        return _Blocked.apply(q, k, v, plan, rate, seed or 0, rows)  # type: ignore[no-any-return]
    return _padded(q, k, v, plan, rate, seed or 0, rows)


def _keep(rows: Tensor, num_heads: int, num_keys: int, rate: float, seed: int) -> Tensor:
    """Weights that stay, bool [b, H, r, num_keys]; rows: [b, r] of the queries."""
    heads, keys = (torch.arange(n, device=rows.device) for n in (num_heads, num_keys))
    columns = keys * num_heads + heads[:, None, None]  # [H, 1, num_keys]
    return hash_keep(rows[:, None, :, None], columns, rate, seed)


class _Blocked(torch.autograd.Function):
    """CPU path: the groups and row blocks of the HSTU attention; the backward recomputes weights and mask."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, rate: float, seed: int, drawn: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, drawn)
        ctx.plan, ctx.rate, ctx.seed = plan, rate, seed
        walk, rows, slots = _walk(plan, q, num_buffers=2)
        padded = torch.empty(rows.shape[0], *v.shape[1:], dtype=walk.work)
        for group in walk.groups:
            index = rows[group.slots]
            qp, kp, vp = (heads_first(x, index, group) for x in (q, k, v))
            out = torch.empty_like(qp)
            for start, stop, weight, mask in _weights(walk, qp, kp, group, rate, seed, _of(drawn, index)):
                if mask is not None:
                    weight.mul_(mask)
                out[:, start:stop] = torch.bmm(weight, vp[:, :stop])
            padded[group.slots] = rows_first(out, walk.num_heads)
        return padded.mul_(kept_factor(rate)).index_select(0, slots).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        q, k, v, drawn = ctx.saved_tensors
        walk, rows, slots = _walk(ctx.plan, q, num_buffers=3)
        padded_grad = torch.zeros(rows.shape[0], *grad.shape[1:], dtype=walk.work)
        padded_grad[slots] = grad.to(walk.work) * kept_factor(ctx.rate)
        totals = [torch.empty_like(padded_grad) for _ in range(3)]
        every_slot = torch.arange(rows.shape[0])
        for group in walk.groups:
            index = rows[group.slots]
            qp, kp, vp = (heads_first(x, index, group) for x in (q, k, v))
            gp = heads_first(padded_grad, every_slot[group.slots], group)
            dq, dk, dv = torch.empty_like(qp), torch.zeros_like(kp), torch.zeros_like(vp)
            for start, stop, weight, mask in _weights(walk, qp, kp, group, ctx.rate, ctx.seed, _of(drawn, index)):
                g = gp[:, start:stop]
                d_weight = torch.bmm(g, vp[:, :stop].mT, out=walk.buffer(2, weight.shape))
                dropped = weight
                if mask is not None:
                    d_weight.mul_(mask)
                    dropped = weight * mask
                dv[:, :stop] += torch.bmm(dropped.mT, g)
                d_score = torch.ops.aten._softmax_backward_data(d_weight, weight, -1, weight.dtype)
                dq[:, start:stop] = torch.bmm(d_score, kp[:, :stop])
                dk[:, :stop] += torch.bmm(d_score.mT, qp[:, start:stop])
            for total, part in zip(totals, (dq, dk, dv), strict=True):
                total[group.slots] = rows_first(part, walk.num_heads)
        d_q, d_k, d_v = (x.index_select(0, slots) for x in totals)
        scale = 1.0 / math.sqrt(q.shape[2])
        return d_q.mul_(scale).to(q.dtype), d_k.mul_(scale).to(k.dtype), d_v.to(v.dtype), *[None] * 4


def _of(drawn: Tensor | None, index: Tensor) -> Tensor | None:
    return None if drawn is None else drawn[index]


def _walk(plan: AttentionPlan, q: Tensor, num_buffers: int) -> tuple[BlockWalk, Tensor, Tensor]:
    assert plan.schedule is not None and plan.rows is not None and plan.slots is not None
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    walk = BlockWalk(plan.schedule, plan.rows, (None, None, None), False, None, None, q.shape[1], work, num_buffers)
    return walk, plan.rows, plan.slots


def _weights(
    walk: BlockWalk, q: Tensor, k: Tensor, group: Any, rate: float, seed: int, drawn: Tensor | None
) -> Iterator[tuple[int, int, Tensor, Tensor | None]]:
    """(start, stop, softmax weights [b*H, r, stop], dropout mask of 0 and 1 or None) of each row block.

    drawn: [b*n] rows of the group's padded slots, or None.
    """
    scale = 1.0 / math.sqrt(q.shape[2])
    for pairs in walk.blocks(group):
        score = walk.scores(q, k, pairs, scale)
        weight = torch.softmax(score, dim=-1, out=walk.buffer(1, score.shape))
        mask = None
        if rate > 0 and drawn is not None:
            queries = drawn.view(-1, group.length)[:, pairs.start : pairs.stop]
            mask = _keep(queries, walk.num_heads, pairs.stop, rate, seed).to(walk.work).view(score.shape)
        yield pairs.start, pairs.stop, weight, mask


def _padded(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, rate: float, seed: int, drawn: Tensor | None
) -> Tensor:
    """Any device: the whole batch padded to its longest user."""
    offsets, n, device = plan.offsets, plan.max_len, q.device
    num_users, num_events = offsets.shape[0] - 1, q.shape[0]
    within = torch.arange(n, device=device)
    rows = torch.minimum(offsets[:-1, None] + within, (offsets[1:, None] - 1).clamp(min=0)).view(-1)
    owner = torch.repeat_interleave(torch.arange(num_users, device=device), offsets.diff(), output_size=num_events)
    slots = torch.arange(num_events, device=device) - offsets[owner] + owner * n
    shape = (num_users, n, *q.shape[1:])
    qp, kp, vp = (x.index_select(0, rows).view(shape).transpose(1, 2) for x in (q, k, v))  # [b, H, n, A]
    if drawn is None or rate == 0.0:
        out = torch.nn.functional.scaled_dot_product_attention(qp, kp, vp, is_causal=True)
    else:
        hidden = torch.full((n, n), -torch.inf, dtype=q.dtype, device=device).triu_(1)
        weight = torch.softmax(qp @ kp.mT / math.sqrt(q.shape[2]) + hidden, dim=-1)
        keep = _keep(drawn[rows].view(num_users, n), q.shape[1], n, rate, seed)
        out = (weight * keep * kept_factor(rate)) @ vp
    return out.transpose(1, 2).reshape(-1, *q.shape[1:]).index_select(0, slots)
