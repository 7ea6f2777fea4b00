"""Softmax cross-entropy over the whole catalogue: the specification.

``L`` total events, ``D`` model width, ``V`` items. Row 0 of the table is padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._common import prepare


def linear_cross_entropy_reference(
    queries: Tensor,
    table: Tensor,
    labels: Tensor,
    temperature: float = 0.05,
    l2_normalize: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """``logsumexp over items 1..num_items of s - s_label`` with ``s = q . e / temperature``, [L].

    queries: [L, D] float. table: [num_items + 1, D] float. labels: [L] int, 1..num_items.
    """
    q, e = prepare(queries, table, l2_normalize, eps)
    losses = []
    for row, label in enumerate(labels.tolist()):
        logits = e[1:] @ q[row] / temperature  # [num_items]
        losses.append(torch.logsumexp(logits, 0) - logits[label - 1])
    return torch.stack(losses) if losses else q.new_zeros(0)
