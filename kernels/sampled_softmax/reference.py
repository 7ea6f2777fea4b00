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
) -> Tensor:
    """Loss of each position against its own negatives; a negative equal to the label does not count.

    queries: [L, D] float. Encoder outputs.
    table: [num_items + 1, D] float. Item embeddings.
    labels: [L] int. The item that came next, 1..num_items.
    negatives: [L, R] int. 1..num_items.
    Returns [L]: ``logsumexp(s_label, s_negatives) - s_label`` with ``s = q . e / temperature``.
    Source: Zhai et al. 2024 (arXiv 2402.17152), section 4.1.
    """
    q, e = prepare(queries, table, l2_normalize, eps)
    losses = []
    for row in range(q.shape[0]):
        label = int(labels[row])
        positive = q[row] @ e[label] / temperature
        logits = [positive]
        for negative in negatives[row].tolist():
            if negative != label:
                logits.append(q[row] @ e[negative] / temperature)
        losses.append(torch.logsumexp(torch.stack(logits), 0) - positive)
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
        label = int(labels[row])
        positive = q[row] @ e[label] / temperature
        if label_log_q is not None:
            positive = positive - label_log_q[row]
        logits = [positive]
        for column, item in enumerate(bank_ids.tolist()):
            if item != label:
                logit = q[row] @ e[item] / temperature
                logits.append(logit if log_q is None else logit - log_q[column])
        losses.append(torch.logsumexp(torch.stack(logits), 0) - positive)
    return torch.stack(losses) if losses else q.new_zeros(0)
