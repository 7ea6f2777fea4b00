"""Vectorised torch path of ranking: blocks of users against the whole table, memory bounded.

``B`` users, ``V`` rows of the table. Inputs are in the compute dtype and already normalised.
``rank_scored`` and ``topk_scored`` take any scores: a function of a slice of users that gives [rows, V].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels._common import row_chunks, rows_within


def _blocks(score: Callable[[slice], Tensor], queries: Tensor, num_rows: int, seen_ids: Tensor | None,
            seen_offsets: Tensor | None, chunk_mib: float,
) -> Iterator[tuple[slice, Tensor, tuple[Tensor, Tensor]]]:  # fmt: skip
    """Slice of users, their scores [rows, V], and (row, id) of what they have seen, padding included."""
    # Half of the bound: the comparison needs as much again.
    for part in row_chunks(queries.shape[0], rows_within(chunk_mib / 2, num_rows, queries.dtype)):
        scores = score(part)  # [rows, V]
        scores[:, 0] = 0.0  # the padding row counts for nothing, whatever it holds
        lowest, highest = torch.aminmax(scores)
        if not bool(lowest.isfinite() & highest.isfinite()):
            raise ValueError("scores are not finite: queries or table hold NaN, infinite or huge values")
        rows = part.stop - part.start
        hidden_rows = torch.arange(rows, device=queries.device)
        hidden_ids = torch.zeros_like(hidden_rows)
        if seen_ids is not None and seen_offsets is not None:
            offsets = seen_offsets[part.start : part.stop + 1].long()
            ids = seen_ids[int(offsets[0]) : int(offsets[-1])].long()
            hidden_ids = torch.cat([hidden_ids, ids])
            hidden_rows = torch.cat([hidden_rows, hidden_rows.repeat_interleave(offsets.diff())])
        yield part, scores, (hidden_rows, hidden_ids)


def rank_torch(queries: Tensor, table: Tensor, targets: Tensor, seen_ids: Tensor | None,
               seen_offsets: Tensor | None, chunk_mib: float) -> Tensor:  # fmt: skip
    """Exact ranks float64 [B] by dot products."""
    products = lambda part: queries[part] @ table.mT  # noqa: E731
    return rank_scored(products, queries, table.shape[0], targets, seen_ids, seen_offsets, chunk_mib)


def rank_scored(score: Callable[[slice], Tensor], queries: Tensor, num_rows: int, targets: Tensor,
                seen_ids: Tensor | None, seen_offsets: Tensor | None, chunk_mib: float) -> Tensor:  # fmt: skip
    """Exact ranks float64 [B]. The target's score is read from the block, so that ties are exact.

    score: slice of users -> scores [rows, V], which are overwritten. num_rows: V. queries: for B, dtype and device.
    """
    ranks = torch.empty(queries.shape[0], dtype=torch.float64, device=queries.device)
    for part, scores, hidden in _blocks(score, queries, num_rows, seen_ids, seen_offsets, chunk_mib):
        column = targets[part].long()[:, None]
        target = scores.gather(1, column)  # [rows, 1]
        scores.index_put_(hidden, scores.new_full((1,), -torch.inf))
        scores.scatter_(1, column, target)  # a seen target stays a candidate
        better = _count(torch.gt(scores, target, out=torch.empty_like(scores)))
        equal = _count(torch.eq(scores, target, out=scores)) - 1  # without the target itself
        ranks[part] = 1.0 + better + 0.5 * equal
    return ranks


def _count(ones: Tensor) -> Tensor:
    """Ones per row, float64 [rows]. Sums of 0.0 and 1.0: five times faster than of booleans, exact up to 2^24."""
    return ones.sum(dim=1).double() if ones.shape[1] <= 2**24 else ones.sum(dim=1, dtype=torch.float64)


def topk_torch(queries: Tensor, table: Tensor, k: int, seen_ids: Tensor | None, seen_offsets: Tensor | None,
               chunk_mib: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scores [B, k], ids [B, k] int64 by dot products."""
    products = lambda part: queries[part] @ table.mT  # noqa: E731
    return topk_scored(products, queries, table.shape[0], k, seen_ids, seen_offsets, chunk_mib)


def topk_scored(score: Callable[[slice], Tensor], queries: Tensor, num_rows: int, k: int, seen_ids: Tensor | None,
                seen_offsets: Tensor | None, chunk_mib: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scores [B, k], ids [B, k] int64, best first; missing ones -inf and 0. Arguments as of :func:`rank_scored`."""
    out_scores = queries.new_full((queries.shape[0], k), -torch.inf)
    out_ids = torch.zeros(queries.shape[0], k, dtype=torch.int64, device=queries.device)
    found = min(k, num_rows)
    for part, scores, hidden in _blocks(score, queries, num_rows, seen_ids, seen_offsets, chunk_mib):
        scores.index_put_(hidden, scores.new_full((1,), -torch.inf))
        best, ids = scores.topk(found, dim=1)
        out_scores[part, :found] = best
        out_ids[part, :found] = ids.masked_fill_(best == -torch.inf, 0)
    return out_scores, out_ids
