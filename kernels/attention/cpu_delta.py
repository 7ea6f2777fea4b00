"""CPU path of the delta form: a few query rows against a long cached history, targets' own rows apart.

Legend: L query rows in all, H heads, A query/key width, V value width, T targets among the queries; in a group b
units, R padded query rows, K padded keys; r query rows and c keys of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.attention.cpu import MASKED, add_by_index, add_power_law, heads_first, rows_first
from kernels.attention.layout import Group
from kernels.attention.layout_delta import HISTORY, NUM_KEYS, NUM_ROWS, DeltaGroup, DeltaLayout, delta_groups
from kernels.attention.reference import Mask, visible
from kernels.attention.times import PowerLaw, TimeBuckets

ROW_BLOCK = 128
"""Query rows of a block."""
BLOCK_SCORES = 160_000
"""Scores (units x heads x rows x keys) of a block: three float32 buffers of that size fit into a 2 MiB L2 cache."""
MIN_KEYS = 64
"""Keys of a block, at least, however many heads there are."""
SELF_ROWS = 1_024
"""Targets whose own rows are handled together."""


class DeltaWalk:
    """Walks the blocks of a delta layout and recomputes the scores of each."""

    def __init__(self, layout: DeltaLayout, times: tuple[Tensor | None, Tensor | None], kind: TimeBuckets | PowerLaw,
                 mask: Mask, position_weight: Tensor | None, time_weight: Tensor | None, num_heads: int,
                 work: torch.dtype, num_buffers: int):  # fmt: skip
        self.layout, self.times, self.kind, self.mask = layout, times, kind, mask
        self.num_heads, self.work = num_heads, work
        self.position_weight = None if position_weight is None else position_weight.to(work)
        self.time_weight = None if time_weight is None else time_weight.to(work)
        self.groups = list(delta_groups(layout.schedule))
        sizes = [g.num_units * (x.stop - x.start) * (y.stop - y.start) for g in self.groups for x, y in self.spans(g)]
        self.buffers = [torch.empty(max(sizes, default=0) * num_heads, dtype=work) for _ in range(num_buffers)]

    def spans(self, group: DeltaGroup) -> Iterator[tuple[slice, slice]]:
        """Query rows and keys of each block: the causal prefix of keys for history rows, all for targets."""
        for start in range(0, group.num_rows, ROW_BLOCK):
            stop = min(start + ROW_BLOCK, group.num_rows)
            end = group.num_keys
            if not group.are_targets and not self.mask.reaches_forward:
                end -= group.num_rows - stop
            step = max(MIN_KEYS, BLOCK_SCORES // (group.num_units * self.num_heads * (stop - start)))
            for first in range(0, end, step):
                yield slice(start, stop), slice(first, min(first + step, end))

    def blocks(self, group: DeltaGroup) -> Iterator[tuple[slice, slice, Tensor]]:
        """Query rows, keys and bias of each block; a bias that all rows share is made once."""
        alike = (group.are_targets or group.num_rows == 1) and (self.time_weight is None or group.bucket_rows == 1)
        shared = self.bias(group, slice(0, group.num_rows), slice(0, group.num_keys)) if alike else None
        for rows, keys in self.spans(group):
            yield rows, keys, self.bias(group, rows, keys) if shared is None else shared[..., keys]

    def buffer(self, which: int, shape: tuple[int, ...]) -> Tensor:
        return self.buffers[which][: shape[0] * shape[1] * shape[2]].view(shape)

    def scores(self, q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
        """Scores [b*H, r, c] of q [b*H, r, A], times the scale already, and k [b*H, c, A], in buffer 0."""
        out = self.buffer(0, (q.shape[0], q.shape[1], k.shape[1]))
        torch.bmm(q, k.mT, out=out)
        out.view(-1, self.num_heads, *out.shape[1:]).add_(bias)
        return out

    def bias(self, group: DeltaGroup, rows: slice, keys: slice) -> Tensor:
        """[b or 1, H or 1, r or 1, c]: of position and time together; MASKED where a pair is hidden."""
        at, j = _places(group, rows, keys)
        bias = torch.zeros(1, at.shape[0], j.shape[1], dtype=self.work)
        if self.position_weight is not None:
            bias = self.position_weight[:, (self.position_weight.shape[1] - 1) // 2 + j - at]  # [H or 1, r or 1, c]
        for seen in self.seen(group, at, j):
            bias = torch.where(seen[:, None], bias, MASKED)
        if self.time_weight is None:
            return bias if bias.dim() == 4 else bias[None]
        return bias + time_bias(self.time_weight, self.gaps(group, rows, keys)).transpose(0, 1)

    def seen(self, group: DeltaGroup, at: Tensor, j: Tensor) -> Iterator[Tensor]:
        """[b or 1, r or 1, c] bool each: what the mask lets see, if it hides anything, and the keys that are no pads.

        at, j: places of queries and keys, from the end of the history.
        """
        if self.mask.window or int(j[0, -1]) > int(at[0, 0]):  # else all keys are up to the first row's own
            history = torch.tensor(group.num_keys)
            if self.mask.contextual:  # the only part of the rule that asks how far the front is
                history = self.layout.units[group.units, HISTORY][:, None, None]
            seen = visible(at + history, j + history, history + 1, history, self.mask)
            yield seen.view(-1, *seen.shape[-2:])
        if group.num_units > 1:
            yield j >= -self.layout.units[group.units, NUM_KEYS][:, None, None]

    def gaps(self, group: DeltaGroup, rows: slice, keys: slice) -> Tensor:
        """[b, r or 1, c] time buckets, int32, or ln(1 + gap), float32: the plan's, or made here if it keeps none."""
        if group.bucket_rows and self.layout.buckets is not None:
            kept = self.layout.buckets[group.pairs].view(group.num_units, group.bucket_rows, group.num_keys)
            return kept[:, rows if group.bucket_rows > 1 else slice(0, 1), keys]
        query_time, key_time = self.times
        assert query_time is not None and key_time is not None  # as the op has checked
        asked_at = query_time[self.layout.query_rows[group.query_slots].view(group.num_units, -1)[:, rows]]
        happened_at = key_time[self.layout.key_rows[group.key_slots].view(group.num_units, -1)[:, keys]]
        return self.kind.of(asked_at[:, :, None] - happened_at[:, None, :])

    def own_gaps(self, some: slice) -> Tensor:
        """Buckets, or ln(1 + gap), of some of the T targets and themselves."""
        assert self.layout.buckets is not None
        return self.layout.buckets[self.layout.buckets.shape[0] - self.layout.targets.shape[1] :][some]

    def own_scores(self, q: Tensor, k: Tensor, some: slice) -> Tensor:
        """Scores [targets, H] of some targets and themselves; q, k: their rows."""
        score = (q * k).sum(-1)
        if self.position_weight is not None:
            score += self.position_weight[:, (self.position_weight.shape[1] - 1) // 2]
        if self.time_weight is not None:
            score += time_bias(self.time_weight, self.own_gaps(some)).T
        return score

    def own_rows(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Some targets at a time: which, and their rows of q and of k."""
        for start in range(0, self.layout.targets.shape[1], SELF_ROWS):
            some = slice(start, start + SELF_ROWS)
            yield some, self.layout.targets[0, some], self.layout.targets[1, some]

    def queries(self, x: Tensor, group: DeltaGroup) -> Tensor:
        """The group's rows of x [L, H, W] as [b*H, R, W] in the work dtype."""
        return self._take(x, self.layout.query_rows[group.query_slots], group.num_units, group.num_rows)

    def keys(self, x: Tensor, group: DeltaGroup) -> Tensor:
        """The group's rows of x, in the keys' order, as [b*H, K, W] in the work dtype."""
        return self._take(x, self.layout.key_rows[group.key_slots], group.num_units, group.num_keys)

    def _take(self, x: Tensor, index: Tensor, num_units: int, length: int) -> Tensor:
        if num_units == 1:  # a run of rows: no copy where the dtype is right
            return x.narrow(0, int(index[0]), length).transpose(0, 1).to(self.work)
        if x.is_contiguous():  # as a cache is: one copy, head by head
            num_heads, width = x.shape[1:]
            index = index.view(num_units, 1, length) * num_heads + torch.arange(num_heads)[:, None]
            picked = x.view(x.shape[0] * num_heads, width).index_select(0, index.view(-1))
            return picked.view(-1, length, width).to(self.work)
        return heads_first(x, index, Group(num_units, length, slice(0)))

    def add_rows(self, total: Tensor, index: Tensor, part: Tensor, group: DeltaGroup, column: int) -> None:
        """Adds part [b*H, n, W] to its real rows of total; column: of ``units``, that counts them."""
        if group.num_units == 1:
            total.narrow(0, int(index[0]), part.shape[1]).add_(part.transpose(0, 1))
            return
        real = ~self.pads(group, column, part.shape[1]).view(-1)
        total.index_add_(0, index[real], rows_first(part, self.num_heads)[real])

    def pads(self, group: DeltaGroup, column: int, length: int) -> Tensor:
        """[b, length] bool: the padded slots in front of each unit's rows or keys."""
        return torch.arange(length) < length - self.layout.units[group.units, column][:, None]


def _places(group: DeltaGroup, rows: slice, keys: slice) -> tuple[Tensor, Tensor]:
    """Places of query rows [r or 1, 1] (targets: all right after the history) and keys [1, c], from its end."""
    j = torch.arange(keys.start - group.num_keys, keys.stop - group.num_keys)[None, :]
    if group.are_targets:
        return torch.zeros(1, 1, dtype=torch.int64), j
    return torch.arange(rows.start - group.num_rows, rows.stop - group.num_rows)[:, None], j


def time_bias(weight: Tensor, gaps: Tensor) -> Tensor:
    """[H or 1, *gaps.shape] from a table [H or 1, buckets] by bucket, or from (a, b) [H or 1, 2] by ln(1 + gap)."""
    if gaps.is_floating_point():
        slope, level = (w.view(-1, *[1] * gaps.dim()) for w in weight.unbind(1))
        return level - slope * gaps.to(weight.dtype)
    return weight.index_select(1, gaps.reshape(-1)).view(-1, *gaps.shape)


def _work(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def attention_delta_fwd_cpu(
    q: Tensor, k: Tensor, v: Tensor, layout: DeltaLayout, times: tuple[Tensor | None, Tensor | None],
    kind: TimeBuckets | PowerLaw, mask: Mask, row_divisor: Tensor | None, position_weight: Tensor | None,
    time_weight: Tensor | None, divisor: float, scale: float,
) -> Tensor:  # fmt: skip
    """Output [L, H, V] in v's dtype. Arguments as in the op; times: of queries and of keys."""
    work = _work(q)
    walk = DeltaWalk(layout, times, kind, mask, position_weight, time_weight, q.shape[1], work, num_buffers=1)
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=work)
    for group in walk.groups:
        qp, kp = walk.queries(q, group) * scale, walk.keys(k, group)
        vp = walk.keys(v, group)
        part = torch.zeros(qp.shape[0], group.num_rows, v.shape[2], dtype=work)
        for rows, keys, bias in walk.blocks(group):
            weight = F.silu(walk.scores(qp[:, rows], kp[:, keys], bias), inplace=True)
            part[:, rows] += torch.bmm(weight, vp[:, keys])
        walk.add_rows(out, layout.query_rows[group.query_slots], part, group, NUM_ROWS)
    for some, q_row, k_row in walk.own_rows():
        score = walk.own_scores(q[q_row].to(work) * scale, k[k_row].to(work), some)
        out[q_row] += F.silu(score)[:, :, None] * v[k_row].to(work)
    return out.div_(_divisor(row_divisor, divisor, work)).to(v.dtype)


def _divisor(row_divisor: Tensor | None, divisor: float, work: torch.dtype) -> Tensor | float:
    return divisor if row_divisor is None else row_divisor.to(work)[:, None, None]


def attention_delta_bwd_cpu(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, layout: DeltaLayout, times: tuple[Tensor | None, Tensor | None],
    kind: TimeBuckets | PowerLaw, mask: Mask, row_divisor: Tensor | None, position_weight: Tensor | None,
    time_weight: Tensor | None, divisor: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and of both tables (empty where a table is None). Scores are recomputed."""
    work = _work(q)
    walk = DeltaWalk(layout, times, kind, mask, position_weight, time_weight, q.shape[1], work, num_buffers=3)
    grad = grad.to(work) / _divisor(row_divisor, divisor, work)
    d_q, d_k, d_v = (torch.zeros(x.shape, dtype=work) for x in (q, k, v))
    tables = _TableGrads(walk)
    for group in walk.groups:
        qp, kp = walk.queries(q, group) * scale, walk.keys(k, group)
        vp = walk.keys(v, group)
        gp = walk.queries(grad, group)
        if group.num_units > 1:
            pads = walk.pads(group, NUM_ROWS, group.num_rows)[:, None, :, None]
            gp.view(group.num_units, walk.num_heads, *gp.shape[1:]).masked_fill_(pads, 0.0)
        dq, dk, dv = (torch.zeros(x.shape, dtype=work) for x in (qp, kp, vp))
        for rows, keys, bias in walk.blocks(group):
            score = walk.scores(qp[:, rows], kp[:, keys], bias)
            weight = torch.ops.aten.silu.out(score, out=walk.buffer(1, score.shape))
            dv[:, keys] += torch.bmm(weight.mT, gp[:, rows])
            d_weight = torch.bmm(gp[:, rows], vp[:, keys].mT, out=walk.buffer(2, score.shape))
            d_score = torch.ops.aten.silu_backward.grad_input(d_weight, score, grad_input=weight)
            dq[:, rows] += torch.bmm(d_score, kp[:, keys])
            dk[:, keys] += torch.bmm(d_score.mT, qp[:, rows])
            tables.add(d_score.view(group.num_units, walk.num_heads, *d_score.shape[1:]), group, rows, keys)
        walk.add_rows(d_q, layout.query_rows[group.query_slots], dq, group, NUM_ROWS)
        walk.add_rows(d_k, layout.key_rows[group.key_slots], dk, group, NUM_KEYS)
        walk.add_rows(d_v, layout.key_rows[group.key_slots], dv, group, NUM_KEYS)
    for some, q_row, k_row in walk.own_rows():
        qs, ks, vs = q[q_row].to(work) * scale, k[k_row].to(work), v[k_row].to(work)
        score, g = walk.own_scores(qs, ks, some), grad[q_row]
        d_score = torch.ops.aten.silu_backward((g * vs).sum(-1), score)  # [targets, H]
        d_q[q_row] += d_score[:, :, None] * ks
        d_k.index_add_(0, k_row, d_score[:, :, None] * qs)
        d_v.index_add_(0, k_row, F.silu(score)[:, :, None] * g)
        tables.add_own(d_score, some)
    return (d_q * scale).to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), tables.position.to(work), tables.time.to(work)


class _TableGrads:
    """Sums the gradients of both tables, in float64, over blocks."""

    def __init__(self, walk: DeltaWalk) -> None:
        self.walk = walk
        shapes = ((0, 0) if w is None else w.shape for w in (walk.position_weight, walk.time_weight))
        self.position, self.time = (torch.zeros(shape, dtype=torch.float64) for shape in shapes)

    def add(self, d_score: Tensor, group: DeltaGroup, rows: slice, keys: slice) -> None:
        """d_score: [b, H, r, c] of one block."""
        if self.position.numel():
            at, j = _places(group, rows, keys)
            index = ((self.position.shape[1] - 1) // 2 + j - at)[None]  # [1, r or 1, c]
            summed = d_score.sum((0, 2) if group.are_targets else 0, keepdim=True)
            add_by_index(self.position, summed, index)
        if self.time.numel():
            gaps = self.walk.gaps(group, rows, keys)
            self._add_time(d_score if gaps.shape[1] == d_score.shape[2] else d_score.sum(2, keepdim=True), gaps)

    def add_own(self, d_score: Tensor, some: slice) -> None:
        """d_score: [targets, H] of some targets and themselves."""
        if self.position.numel():
            by_head = d_score.sum(0, dtype=torch.float64)
            center = self.position[:, (self.position.shape[1] - 1) // 2]
            center += by_head if center.shape[0] > 1 else by_head.sum()
        if self.time.numel():
            self._add_time(d_score.T[None, :, None, :], self.walk.own_gaps(some)[None, None])

    def _add_time(self, d_score: Tensor, gaps: Tensor) -> None:
        """d_score: [b, H, r, c]; gaps: [b, r, c]."""
        (add_power_law if gaps.is_floating_point() else add_by_index)(self.time, d_score, gaps)
