"""CPU path of the attention: users grouped by length, causal row blocks, buffers that stay in cache.

Legend: L total events, N padded length, H heads, A query/key width, V value width, b users of a group,
n its padded length, r query rows of a block, m = its keys.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.attention.plan import Group, groups, row_blocks

MASKED = -1e4
"""Added where a key is not visible: SiLU and its derivative are exactly 0 there, in float32 and float64."""


def heads_first(x: Tensor, index: Tensor, group: Group) -> Tensor:
    """Rows of x [L, H, W] as [b*H, n, W] in the work dtype."""
    num_heads, width = x.shape[1:]
    padded = x.reshape(x.shape[0], num_heads * width).index_select(0, index)
    padded = padded.view(group.num_users, group.length, num_heads, width)
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    return padded.transpose(1, 2).reshape(-1, group.length, width).to(work)


def rows_first(x: Tensor, num_heads: int) -> Tensor:
    """[b*H, n, W] as padded rows [b*n, H, W]."""
    n, width = x.shape[1:]
    return x.view(-1, num_heads, n, width).transpose(1, 2).reshape(-1, num_heads, width)


def _position_bias(weight: Tensor | None, length: int, work: torch.dtype) -> Tensor:
    """[H or 1, n, n] bias of key j for query i, with MASKED above the diagonal."""
    hidden = torch.full((length, length), MASKED, dtype=work).triu_(1)
    if weight is None:
        return hidden[None]
    center = (weight.shape[1] - 1) // 2
    reach = weight[:, center - length + 1 : center + length].to(work).contiguous()  # [H or 1, 2n-1]
    i = torch.arange(length)
    return reach[:, length - 1 + i[None, :] - i[:, None]] + hidden


class BlockWalk:
    """Walks the (group, row block) pairs of a plan and recomputes the scores of each."""

    def __init__(self, schedule: Tensor, rows: Tensor, buckets: Tensor | None, position_weight: Tensor | None,
                 time_weight: Tensor | None, num_heads: int, work: torch.dtype, num_buffers: int):  # fmt: skip
        self.groups, self.rows, self.buckets = list(groups(schedule)), rows, buckets
        self.num_heads, self.work, self.time_weight = num_heads, work, time_weight
        longest = max((g.length for g in self.groups), default=0)
        self.bias = _position_bias(position_weight, longest, work)
        pairs = max((g.num_users * (b - a) * b for g in self.groups for a, b in row_blocks(g.length)), default=0)
        self.buffers = [torch.empty(pairs * num_heads, dtype=work) for _ in range(num_buffers)]
        self.bucket_start = 0

    def buffer(self, which: int, shape: tuple[int, ...]) -> Tensor:
        size = 1
        for n in shape:
            size *= n
        return self.buffers[which][:size].view(shape)

    def blocks(self, group: Group) -> Iterator[tuple[int, int, Tensor | None]]:
        """(start, stop, buckets [b, r, m] or None) of each block of the group."""
        for start, stop in row_blocks(group.length):
            bucket = None
            if self.buckets is not None:
                count = group.num_users * (stop - start) * stop
                bucket = self.buckets[self.bucket_start : self.bucket_start + count]
                bucket = bucket.view(group.num_users, stop - start, stop)
                self.bucket_start += count
            yield start, stop, bucket

    def scores(self, q: Tensor, k: Tensor, start: int, stop: int, bucket: Tensor | None, scale: float) -> Tensor:
        """Scores [b*H, r, m] of the query rows start..stop, in buffer 0."""
        shape = (q.shape[0], stop - start, stop)
        out = self.buffer(0, shape)
        bias = self.bias[:, start:stop, :stop]  # [H or 1, r, m]
        if bias.shape[0] > 1:
            bias = bias.repeat(q.shape[0] // self.num_heads, 1, 1)
        torch.baddbmm(bias.expand(shape), q[:, start:stop], k[:, :stop].mT, alpha=scale, out=out)
        if bucket is not None and self.time_weight is not None:
            by_user = out.view(-1, self.num_heads, *shape[1:])
            for head, weight in enumerate(self.time_weight.to(self.work)):
                picked = weight.index_select(0, bucket.view(-1)).view(-1, 1, *shape[1:])
                heads = slice(None) if self.time_weight.shape[0] == 1 else slice(head, head + 1)
                by_user[:, heads].add_(picked)
        return out


def attention_fwd_cpu(q: Tensor, k: Tensor, v: Tensor, schedule: Tensor, rows: Tensor, slots: Tensor,
                      buckets: Tensor | None, position_weight: Tensor | None, time_weight: Tensor | None,
                      divisor: float, scale: float) -> Tensor:  # fmt: skip
    """Output [L, H, V] in v's dtype. Arguments as in the op; schedule .. buckets from the plan."""
    num_heads = q.shape[1]
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    walk = BlockWalk(schedule, rows, buckets, position_weight, time_weight, num_heads, work, num_buffers=1)
    padded = torch.empty(rows.shape[0], num_heads, v.shape[2], dtype=work)
    for group in walk.groups:
        index = rows[group.slots]
        qp, kp, vp = (heads_first(x, index, group) for x in (q, k, v))
        out = torch.empty(qp.shape[0], group.length, v.shape[2], dtype=work)
        for start, stop, bucket in walk.blocks(group):
            weight = walk.scores(qp, kp, start, stop, bucket, scale)
            torch.nn.functional.silu(weight, inplace=True)
            out[:, start:stop] = torch.bmm(weight, vp[:, :stop])
        padded[group.slots] = rows_first(out, num_heads)
    padded.mul_(1.0 / divisor)
    return padded.index_select(0, slots).to(v.dtype)


def attention_bwd_cpu(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, schedule: Tensor, rows: Tensor, slots: Tensor,
                      buckets: Tensor | None, position_weight: Tensor | None, time_weight: Tensor | None,
                      divisor: float, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and of both tables (empty where a table is None). Scores are recomputed."""
    num_heads = q.shape[1]
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    walk = BlockWalk(schedule, rows, buckets, position_weight, time_weight, num_heads, work, num_buffers=3)
    is_pad = torch.ones(rows.shape[0], dtype=torch.bool)
    is_pad[slots] = False
    grads = [torch.empty(rows.shape[0], *x.shape[1:], dtype=work) for x in (q, k, v)]
    longest = walk.bias.shape[-1]
    position_heads = 0 if position_weight is None else position_weight.shape[0]
    by_pair = torch.zeros(position_heads, longest, longest, dtype=work)
    time_grad = torch.zeros((0, 0) if time_weight is None else time_weight.shape, dtype=torch.float64)
    for group in walk.groups:
        index = rows[group.slots]
        qp, kp, vp, gp = (heads_first(x, index, group) for x in (q, k, v, grad))
        gp.view(group.num_users, num_heads, group.length, -1).masked_fill_(
            is_pad[group.slots].view(group.num_users, 1, group.length, 1), 0.0
        )
        gp.mul_(1.0 / divisor)
        dq = torch.empty_like(qp)
        dk, dv = torch.zeros_like(kp), torch.zeros_like(vp)
        for start, stop, bucket in walk.blocks(group):
            score = walk.scores(qp, kp, start, stop, bucket, scale)
            weight = torch.ops.aten.silu.out(score, out=walk.buffer(1, score.shape))
            g = gp[:, start:stop]
            dv[:, :stop] += torch.bmm(weight.mT, g)  # baddbmm_ on this view would run user by user
            d_weight = torch.bmm(g, vp[:, :stop].mT, out=walk.buffer(2, score.shape))
            d_score = torch.ops.aten.silu_backward.grad_input(d_weight, score, grad_input=weight)
            dq[:, start:stop] = torch.bmm(d_score, kp[:, :stop])
            dk[:, :stop] += torch.bmm(d_score.mT, qp[:, start:stop])
            by_user = d_score.view(-1, num_heads, stop - start, stop)
            if position_heads:
                summed = by_user.sum((0, 1), keepdim=False)[None] if position_heads == 1 else by_user.sum(0)
                by_pair[:, start:stop, :stop] += summed
            if bucket is not None and time_weight is not None:
                _add_by_bucket(time_grad, by_user, bucket)
        for total, part in zip(grads, (dq, dk, dv), strict=True):
            total[group.slots] = rows_first(part, num_heads)
    d_q, d_k, d_v = (x.index_select(0, slots) for x in grads)
    if scale != 1.0:
        d_q, d_k = d_q * scale, d_k * scale
    d_position = _sum_diagonals(by_pair, 0 if position_weight is None else position_weight.shape[1])
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), d_position, time_grad.to(work)


def _add_by_bucket(total: Tensor, d_score: Tensor, bucket: Tensor) -> None:
    """Adds d_score [b, H, r, m], summed by bucket [b, r, m], to total [H or 1, buckets] (float64)."""
    per_head = d_score.unbind(1) if total.shape[0] > 1 else [d_score.sum(1) if d_score.shape[1] > 1 else d_score[:, 0]]
    for head, values in enumerate(per_head):
        total[head] += torch.bincount(bucket.reshape(-1), weights=values.reshape(-1), minlength=total.shape[1])


def _sum_diagonals(by_pair: Tensor, size: int) -> Tensor:
    """Sums [H or 1, n, n] over pairs of equal j - i into the position table's gradient [H or 1, size]."""
    num_tables, n = by_pair.shape[:2]
    out = torch.zeros(num_tables, size, dtype=by_pair.dtype)
    if num_tables and n:
        i = torch.arange(n)
        index = ((size - 1) // 2 + i[None, :] - i[:, None]).view(1, -1).expand(num_tables, -1)
        out.scatter_add_(1, index, by_pair.view(num_tables, -1))
    return out
