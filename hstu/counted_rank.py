"""Exact ranks where several items have the same row, or are scored as one.

The rank of an item among items is 1 + those that score higher + half of the others that score the same. Rows are scored
once and count as often as they have items; what a user has seen is taken off again.

Legend: B users, V rows with the padding row 0, C columns of a block, S seen items over all users.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import _common

_DOUBLES = 5
"""Bytes of the comparisons in float64 and of the scores, as a multiple of those of the scores, about."""


def before(scores: Tensor, target: Tensor, counts: Tensor, users: Tensor, columns: Tensor) -> Tensor:
    """[B] float64: items that score higher than ``target`` [B], half of those that score the same, without seen ones.

    scores: [B, C]. counts: [C] float64, items of each column. users, columns: [S], place of each seen item.
    """
    total = (scores > target[:, None]).double() @ counts
    total += 0.5 * ((scores == target[:, None]).double() @ counts)
    seen, other = scores[users, columns], target[users]
    return total.index_add_(0, users, -((seen > other).double() + 0.5 * (seen == other).double()))


@torch.no_grad()
def counted_rank(
    queries: Tensor, table: Tensor, targets: Tensor, counts: Tensor, seen_rows: Tensor, seen_offsets: Tensor,
    l2_normalize: bool, eps: float, chunk_mib: float,
) -> Tensor:  # fmt: skip
    """Ranks float64 [B] of items on the rows ``targets`` [B] of ``table`` [V, D].

    counts: [V] float64, items of each row. seen_rows: [S], the row of each item that a user has seen, each item once
    and none of them the target; seen_offsets: [B + 1].

    Raises ValueError where a score is not finite.
    """
    with _common.no_autocast(queries.device):
        q, e = _common.prepare(queries.detach(), table.detach(), l2_normalize, eps)
        users = torch.arange(len(q), device=q.device).repeat_interleave(seen_offsets.diff())
        bounds = seen_offsets.tolist()
        ranks = torch.empty(len(q), dtype=torch.float64, device=q.device)
        for part in _common.row_chunks(len(q), _common.rows_within(chunk_mib / _DOUBLES, len(e), q.dtype)):
            scores = q[part] @ e.mT
            if not bool(scores.isfinite().all()):
                raise ValueError("scores are not finite: queries or table hold NaN, infinite or huge values")
            target = scores.gather(1, targets[part].long()[:, None])[:, 0]
            own = slice(bounds[part.start], bounds[part.stop])
            ranks[part] = before(scores, target, counts, users[own] - part.start, seen_rows[own])
        return ranks + 0.5  # the target is among the items of its row
