"""Softmax cross-entropy over the label and some negatives: the specification.

``L`` total events, ``D`` model width, ``R`` negatives per position, ``K`` items of a shared bank.
Row 0 of the table is padding: never a label, never a negative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._common import prepare


def sampled_softmax_reference(
    queries: Tensor,
    table: Tensor,
    labels: Tensor,
    negatives: Tensor,
    temperature: float = 0.05,
    l2_normalize: bool = True,
    eps: float = 1e-6,
    log_q: Tensor | None = None,
    label_log_q: Tensor | None = None,
) -> Tensor:
    """Loss of each position against its own negatives; a negative equal to the label does not count.

    queries: [L, D] float. Encoder outputs.
    table: [num_items + 1, D] float. Item embeddings.
    labels: [L] int. The item that came next, 1..num_items.
    negatives: [L, R] int. 1..num_items.
    log_q: [num_items + 1] float. Subtracted from the logits of the negatives, by item.
    label_log_q: [L] float. Subtracted from the logit of the label.
    Returns [L]: ``logsumexp(s_label, s_negatives) - s_label`` with ``s = q . e / temperature``.
    Source: Zhai et al. 2024 (arXiv 2402.17152), section 4.1.
    """
    q, e = prepare(queries, table, l2_normalize, eps)
    losses = []
    for row in range(q.shape[0]):
        others = negatives[row][negatives[row] != labels[row]]
        ids = torch.cat([labels[row : row + 1], others]).long()  # label first
        logits = e[ids] @ q[row] / temperature
        if log_q is not None:
            logits = torch.cat([logits[:1], logits[1:] - log_q[others.long()].to(q)])
        if label_log_q is not None:
            logits = torch.cat([logits[:1] - label_log_q[row].to(q), logits[1:]])
        losses.append(torch.logsumexp(logits, 0) - logits[0])
    return torch.stack(losses) if losses else q.new_zeros(0)


def bank_softmax_reference(
    queries: Tensor,
    table: Tensor,
    labels: Tensor,
    bank_ids: Tensor,
    log_q: Tensor | None = None,
    label_log_q: Tensor | None = None,
    temperature: float = 0.05,
    l2_normalize: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """Loss of each position against one bank of items shared by all positions.

    bank_ids: [K] int. Items of the bank, 1..num_items, repeats allowed; a bank item equal to the
        position's label does not count for that position.
    log_q: [K] float. Subtracted from the logits of the bank items.
    label_log_q: [L] float. Subtracted from the logit of the label.
    Returns [L]. Source of the correction: Bengio and Senecal 2008; Yi et al. 2019 for in-batch items.
    """
    q, e = prepare(queries, table, l2_normalize, eps)
    losses = []
    for row in range(q.shape[0]):
        counted = bank_ids != labels[row]
        ids = torch.cat([labels[row : row + 1], bank_ids[counted]]).long()  # label first
        logits = e[ids] @ q[row] / temperature
        if log_q is not None:
            logits = logits - torch.cat([log_q.new_zeros(1), log_q[counted]]).to(q)
        if label_log_q is not None:
            logits = torch.cat([logits[:1] - label_log_q[row].to(q), logits[1:]])
        losses.append(torch.logsumexp(logits, 0) - logits[0])
    return torch.stack(losses) if losses else q.new_zeros(0)
