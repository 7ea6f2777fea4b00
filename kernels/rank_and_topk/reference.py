"""Exact rank of a target and the best k items over the whole catalogue: the specification.

``B`` users, ``D`` model width, ``S`` seen items over all users. Row 0 of the table is padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._common import prepare


def _seen(row: int, seen_ids: Tensor | None, seen_offsets: Tensor | None) -> set[int]:
    if seen_ids is None or seen_offsets is None:
        return set()
    return set(seen_ids[int(seen_offsets[row]) : int(seen_offsets[row + 1])].tolist())


def rank_reference(
    queries: Tensor, table: Tensor, targets: Tensor, seen_ids: Tensor | None = None,
    seen_offsets: Tensor | None = None, l2_normalize: bool = True, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """1 + number of better candidates + half the number of other candidates with the same score, float64 [B].

    Candidates are 1..num_items without the row's seen ids; the target itself is always one. Expected
    rank of the target when equal scores are ordered at random (PROTOCOL: ties count by half).
    """
    q, e = prepare(queries, table, l2_normalize, eps)
    ranks = []
    for row, target in enumerate(targets.tolist()):
        scores = (e @ q[row]).tolist()
        others = set(range(1, len(scores))) - _seen(row, seen_ids, seen_offsets) - {target}
        better = sum(scores[i] > scores[target] for i in others)
        equal = sum(scores[i] == scores[target] for i in others)
        ranks.append(1.0 + better + 0.5 * equal)
    return torch.tensor(ranks, dtype=torch.float64)


def topk_reference(
    queries: Tensor, table: Tensor, k: int, seen_ids: Tensor | None = None, seen_offsets: Tensor | None = None,
    l2_normalize: bool = True, eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scores [B, k] and ids [B, k] of the best candidates; missing ones are score -inf, id 0.

    Equal scores: the smaller id first.
    """
    q, e = prepare(queries, table, l2_normalize, eps)
    out_scores = q.new_full((q.shape[0], k), -torch.inf)
    out_ids = torch.zeros(q.shape[0], k, dtype=torch.int64)
    for row in range(q.shape[0]):
        scores = e @ q[row]
        seen = _seen(row, seen_ids, seen_offsets)
        order = sorted((i for i in range(1, len(scores)) if i not in seen), key=lambda i: (-float(scores[i]), i))
        for place, item in enumerate(order[:k]):
            out_scores[row, place], out_ids[row, place] = scores[item], item
    return out_scores, out_ids
