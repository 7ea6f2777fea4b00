"""CPU path of the attention: users grouped by length, causal row blocks, buffers that stay in cache.

Legend: L total events, N padded length, H heads, A query/key width, V value width, b users of a group,
n its padded length, r query rows of a block, m = its keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention.layout import Group, groups, row_blocks

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


def _position_bias(weight: Tensor | None, length: int, work: torch.dtype, causal: bool) -> Tensor:
    """[H or 1, n, n] bias of key j for query i; if causal, with MASKED above the diagonal."""
    if causal:
        hidden = torch.full((length, length), MASKED, dtype=work).triu_(1)
    else:
        hidden = torch.zeros(length, length, dtype=work)
    if weight is None:
        return hidden[None]
    center = (weight.shape[1] - 1) // 2
    reach = weight[:, center - length + 1 : center + length].to(work)  # [H or 1, 2n-1]
    return reach.unfold(1, length, 1).flip(1) + hidden  # row i is the window that begins at n - 1 - i


class Pairs(NamedTuple):
    """What the plan knows of the pairs of one block: query rows start..stop, keys 0..keys, of b users."""

    start: int
    stop: int
    keys: int
    bucket: Tensor | None = None
    """[b, r, m] int32 time bucket, or float32 ln(1 + gap)."""
    hidden: Tensor | None = None
    """[b, r, m] bool: the mask hides the pair. None: plainly causal, the position bias hides it."""
    position: Tensor | None = None
    """[b, r, m] int32 j - i. None: that of the rows."""


class BlockWalk:
    """Walks the (group, row block) pairs of a plan and recomputes the scores of each."""

    def __init__(self, schedule: Tensor, rows: Tensor, pair_tables: tuple[Tensor | None, Tensor | None, Tensor | None],
                 all_keys: bool, position_weight: Tensor | None, time_weight: Tensor | None,
                 num_heads: int, work: torch.dtype, num_buffers: int):  # fmt: skip
        self.groups, self.rows, self.pair_tables, self.all_keys = list(groups(schedule)), rows, pair_tables, all_keys
        self.num_heads, self.work = num_heads, work
        self.position_weight, self.time_weight = position_weight, time_weight
        _, hidden, position = pair_tables
        longest = max((g.length for g in self.groups), default=0)
        self.bias = _position_bias(position_weight if position is None else None, longest, work, hidden is None)
        sizes = (g.num_users * (b - a) * m for g in self.groups for a, b, m in row_blocks(g.length, all_keys))
        pairs = max(sizes, default=0)
        self.buffers = [torch.empty(pairs * num_heads, dtype=work) for _ in range(num_buffers)]
        self.num_pairs = 0

    def buffer(self, which: int, shape: tuple[int, ...]) -> Tensor:
        size = 1
        for n in shape:
            size *= n
        return self.buffers[which][:size].view(shape)

    def blocks(self, group: Group) -> Iterator[Pairs]:
        """The blocks of the group, in the plan's order."""
        for start, stop, keys in row_blocks(group.length, self.all_keys):
            shape = (group.num_users, stop - start, keys)
            first = self.num_pairs
            self.num_pairs += shape[0] * shape[1] * shape[2]
            bucket, hidden, position = (
                None if t is None else t[first : self.num_pairs].view(shape) for t in self.pair_tables
            )
            yield Pairs(start, stop, keys, bucket, hidden, position)

    def scores(self, q: Tensor, k: Tensor, pairs: Pairs, scale: float) -> Tensor:
        """Scores [b*H, r, m] of the block, in buffer 0; MASKED where a pair is hidden."""
        shape = (q.shape[0], pairs.stop - pairs.start, pairs.keys)
        out = self.buffer(0, shape)
        bias = self.bias[:, pairs.start : pairs.stop, : pairs.keys]  # [H or 1, r, m]
        if bias.shape[0] > 1:
            bias = bias.repeat(q.shape[0] // self.num_heads, 1, 1)
        torch.baddbmm(bias.expand(shape), q[:, pairs.start : pairs.stop], k[:, : pairs.keys].mT, alpha=scale, out=out)
        by_user = out.view(-1, self.num_heads, *shape[1:])
        if pairs.position is not None and self.position_weight is not None:
            center = (self.position_weight.shape[1] - 1) // 2
            _add_picked(by_user, self.position_weight.to(self.work), pairs.position + center)
        if pairs.bucket is not None and self.time_weight is not None:
            if pairs.bucket.is_floating_point():
                slope, level = self.time_weight.to(self.work).T[:, None, :, None, None]  # [1, H or 1, 1, 1] each
                by_user.add_(level).sub_(slope * pairs.bucket.to(self.work)[:, None])
            else:
                _add_picked(by_user, self.time_weight.to(self.work), pairs.bucket)
        if pairs.hidden is not None:
            by_user.masked_fill_(pairs.hidden[:, None], MASKED)
        return out


def _add_picked(scores: Tensor, table: Tensor, index: Tensor) -> None:
    """Adds table [H or 1, size] at index [b, r, m] to scores [b, H, r, m]."""
    for head, weight in enumerate(table):
        picked = weight.index_select(0, index.reshape(-1)).view(-1, 1, *scores.shape[2:])
        heads = slice(None) if table.shape[0] == 1 else slice(head, head + 1)
        scores[:, heads].add_(picked)


def attention_fwd_cpu(q: Tensor, k: Tensor, v: Tensor, schedule: Tensor, rows: Tensor, slots: Tensor,
                      buckets: Tensor | None, hidden: Tensor | None, pair_positions: Tensor | None,
                      row_divisor: Tensor | None, position_weight: Tensor | None, time_weight: Tensor | None,
                      divisor: float, scale: float, all_keys: bool) -> Tensor:  # fmt: skip
    """Output [L, H, V] in v's dtype. Arguments as in the op; schedule .. buckets from the plan."""
    num_heads = q.shape[1]
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    tables = (buckets, hidden, pair_positions)
    walk = BlockWalk(schedule, rows, tables, all_keys, position_weight, time_weight, num_heads, work, num_buffers=1)
    padded = torch.empty(rows.shape[0], num_heads, v.shape[2], dtype=work)
    for group in walk.groups:
        index = rows[group.slots]
        qp, kp, vp = (heads_first(x, index, group) for x in (q, k, v))
        out = torch.empty(qp.shape[0], group.length, v.shape[2], dtype=work)
        for pairs in walk.blocks(group):
            weight = walk.scores(qp, kp, pairs, scale)
            torch.nn.functional.silu(weight, inplace=True)
            out[:, pairs.start : pairs.stop] = torch.bmm(weight, vp[:, : pairs.keys])
        padded[group.slots] = rows_first(out, num_heads)
    if row_divisor is None:
        return padded.mul_(1.0 / divisor).index_select(0, slots).to(v.dtype)
    return padded.index_select(0, slots).div_(row_divisor.to(work)[:, None, None]).to(v.dtype)


def attention_bwd_cpu(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, schedule: Tensor, rows: Tensor, slots: Tensor,
                      buckets: Tensor | None, hidden: Tensor | None, pair_positions: Tensor | None,
                      row_divisor: Tensor | None, position_weight: Tensor | None, time_weight: Tensor | None,
                      divisor: float, scale: float, all_keys: bool
                      ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and of both tables (empty where a table is None). Scores are recomputed."""
    num_heads = q.shape[1]
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    tables = (buckets, hidden, pair_positions)
    walk = BlockWalk(schedule, rows, tables, all_keys, position_weight, time_weight, num_heads, work, num_buffers=3)
    if row_divisor is not None:
        grad, divisor = grad.to(work) / row_divisor.to(work)[:, None, None], 1.0
    is_pad = torch.ones(rows.shape[0], dtype=torch.bool)
    is_pad[slots] = False
    grads = [torch.empty(rows.shape[0], *x.shape[1:], dtype=work) for x in (q, k, v)]
    tables_grad = _TableGrads(walk, position_weight, time_weight)
    for group in walk.groups:
        index = rows[group.slots]
        qp, kp, vp, gp = (heads_first(x, index, group) for x in (q, k, v, grad))
        gp.view(group.num_users, num_heads, group.length, -1).masked_fill_(
            is_pad[group.slots].view(group.num_users, 1, group.length, 1), 0.0
        )
        gp.mul_(1.0 / divisor)
        dq = torch.empty_like(qp)
        dk, dv = torch.zeros_like(kp), torch.zeros_like(vp)
        for pairs in walk.blocks(group):
            start, stop, keys = pairs.start, pairs.stop, pairs.keys
            score = walk.scores(qp, kp, pairs, scale)
            weight = torch.ops.aten.silu.out(score, out=walk.buffer(1, score.shape))
            g = gp[:, start:stop]
            dv[:, :keys] += torch.bmm(weight.mT, g)  # baddbmm_ on this view would run user by user
            d_weight = torch.bmm(g, vp[:, :keys].mT, out=walk.buffer(2, score.shape))
            d_score = torch.ops.aten.silu_backward.grad_input(d_weight, score, grad_input=weight)
            dq[:, start:stop] = torch.bmm(d_score, kp[:, :keys])
            dk[:, :keys] += torch.bmm(d_score.mT, qp[:, start:stop])
            tables_grad.add(d_score.view(-1, num_heads, stop - start, keys), pairs)
        for total, part in zip(grads, (dq, dk, dv), strict=True):
            total[group.slots] = rows_first(part, num_heads)
    d_q, d_k, d_v = (x.index_select(0, slots) for x in grads)
    if scale != 1.0:
        d_q, d_k = d_q * scale, d_k * scale
    d_position, d_time = tables_grad.results()
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), d_position, d_time


class _TableGrads:
    """Sums the gradients of both tables over blocks."""

    def __init__(self, walk: BlockWalk, position_weight: Tensor | None, time_weight: Tensor | None) -> None:
        self.work, longest = walk.work, walk.bias.shape[-1]
        by_index = walk.pair_tables[2] is not None
        self.position_size = 0 if position_weight is None else position_weight.shape[1]
        heads = 0 if position_weight is None else position_weight.shape[0]
        # Without targets j - i is the same for all users: sum over users first, over diagonals once.
        self.by_pair = torch.zeros(0 if by_index else heads, longest, longest, dtype=walk.work)
        self.position = torch.zeros(heads if by_index else 0, self.position_size, dtype=torch.float64)
        self.time = torch.zeros((0, 0) if time_weight is None else time_weight.shape, dtype=torch.float64)

    def add(self, d_score: Tensor, pairs: Pairs) -> None:
        """d_score: [b, H, r, m] of one block."""
        if heads := self.by_pair.shape[0]:
            summed = d_score.sum((0, 1), keepdim=False)[None] if heads == 1 else d_score.sum(0)
            self.by_pair[:, pairs.start : pairs.stop, : pairs.keys] += summed
        if self.position.shape[0] and pairs.position is not None:
            add_by_index(self.position, d_score, pairs.position + (self.position_size - 1) // 2)
        if pairs.bucket is not None and self.time.numel():
            if pairs.bucket.is_floating_point():
                add_power_law(self.time, d_score, pairs.bucket)
            else:
                add_by_index(self.time, d_score, pairs.bucket)

    def results(self) -> tuple[Tensor, Tensor]:
        """Gradients of the position table [H or 1, 2N-1] and of the time weight, empty where there is none."""
        if self.position.shape[0]:
            return self.position.to(self.work), self.time.to(self.work)
        return _sum_diagonals(self.by_pair, self.position_size), self.time.to(self.work)


def add_power_law(total: Tensor, d_score: Tensor, log_gap: Tensor) -> None:
    """Adds to total [H or 1, 2] (float64) the gradients of a and b of ``-a log_gap + b``; log_gap [b, r, m]."""
    slope = -(d_score * log_gap.to(d_score.dtype)[:, None]).sum((0, 2, 3), dtype=torch.float64)  # [H]
    level = d_score.sum((0, 2, 3), dtype=torch.float64)
    by_head = torch.stack([slope, level], dim=1)  # [H, 2]
    total += by_head if total.shape[0] > 1 else by_head.sum(0, keepdim=True)


def add_by_index(total: Tensor, d_score: Tensor, index: Tensor) -> None:
    """Adds d_score [b, H, r, m], summed by index [b, r, m], to total [H or 1, size] (float64)."""
    per_head = d_score.unbind(1) if total.shape[0] > 1 else [d_score.sum(1) if d_score.shape[1] > 1 else d_score[:, 0]]
    for head, values in enumerate(per_head):
        total[head] += torch.bincount(index.reshape(-1), weights=values.reshape(-1), minlength=total.shape[1])


def _sum_diagonals(by_pair: Tensor, size: int) -> Tensor:
    """Sums [H or 1, n, n] over pairs of equal j - i into the position table's gradient [H or 1, size]."""
    num_tables, n = by_pair.shape[:2]
    out = torch.zeros(num_tables, size, dtype=by_pair.dtype)
    if num_tables and n:
        i = torch.arange(n)
        index = ((size - 1) // 2 + i[None, :] - i[:, None]).view(1, -1).expand(num_tables, -1)
        out.scatter_add_(1, index, by_pair.view(num_tables, -1))
    return out
