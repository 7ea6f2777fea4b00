"""Chunked torch path of the full softmax: one [rows, V] block of logits at a time.

``L`` total events, ``D`` model width, ``V`` items (the padding row is left out). Inputs are in the
compute dtype and already normalised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._common import block_rows, row_chunks


def linear_cross_entropy_fwd(
    queries: Tensor, table: Tensor, labels: Tensor, scale: float, chunk_mib: float
) -> tuple[Tensor, Tensor]:
    """Loss [L] and logsumexp [L]."""
    items = table[1:]  # [V, D]
    loss, lse = queries.new_empty(queries.shape[0]), queries.new_empty(queries.shape[0])
    column = labels.long()[:, None] - 1  # [L, 1]
    rows = block_rows(queries, items.shape[0], chunk_mib)
    buffer = queries.new_empty(rows, items.shape[0])
    for part in row_chunks(queries.shape[0], rows):
        logits = torch.mm(queries[part], items.mT, out=buffer[: part.stop - part.start]).mul_(scale)  # [rows, V]
        own = logits.gather(1, column[part])[:, 0]
        lse[part] = _logsumexp_(logits)[0]
        loss[part] = lse[part] - own
    return loss, lse


def _logsumexp_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logsumexp [rows] of the rows, and exp(logits - row maximum) in place of the logits with its sum [rows]."""
    top = logits.amax(dim=1, keepdim=True)
    total = logits.sub_(top).exp_().sum(dim=1)
    return total.log() + top[:, 0], total


def linear_cross_entropy_bwd(
    grad: Tensor, queries: Tensor, table: Tensor, labels: Tensor, lse: Tensor, scale: float, chunk_mib: float
) -> tuple[Tensor, Tensor]:
    """Gradients of queries [L, D] and table [V + 1, D]; the logits are made again, chunk by chunk."""
    items = table[1:]
    grad = grad.to(queries.dtype)
    d_queries, d_items = torch.empty_like(queries), queries.new_zeros(queries.shape[1], items.shape[0])
    column = labels.long()[:, None] - 1
    rows = block_rows(queries, items.shape[0], chunk_mib)
    buffer = queries.new_empty(rows, items.shape[0])
    for part in row_chunks(queries.shape[0], rows):
        weights = torch.mm(queries[part], items.mT, out=buffer[: part.stop - part.start]).mul_(scale)
        weights.sub_(lse[part, None]).exp_()
        _accumulate(weights, column[part], grad[part], queries[part], items, d_queries[part], d_items)
    return d_queries.mul_(scale), _with_padding(d_items, scale)


def linear_cross_entropy_sum(
    queries: Tensor, table: Tensor, labels: Tensor, weights: Tensor, scale: float, chunk_mib: float
) -> tuple[Tensor, Tensor, Tensor]:
    """sum of weights * loss, and its gradients of queries [L, D] and table [V + 1, D], in one pass over the logits."""
    items = table[1:]
    total_loss = queries.new_zeros(())
    d_queries, d_items = torch.empty_like(queries), queries.new_zeros(queries.shape[1], items.shape[0])
    column = labels.long()[:, None] - 1
    rows = block_rows(queries, items.shape[0], chunk_mib)
    buffer = queries.new_empty(rows, items.shape[0])
    for part in row_chunks(queries.shape[0], rows):
        logits = torch.mm(queries[part], items.mT, out=buffer[: part.stop - part.start]).mul_(scale)
        own = logits.gather(1, column[part])[:, 0]
        lse, total = _logsumexp_(logits)
        total_loss += (lse - own) @ weights[part]
        # The block holds exp; what is left of the softmax is a factor per row, which goes with the queries.
        logits.scatter_add_(1, column[part], -total[:, None])
        factor = (weights[part] / total)[:, None]
        torch.mm(logits, items, out=d_queries[part]).mul_(factor)
        d_items.addmm_((queries[part] * factor).mT, logits)
    return total_loss, d_queries.mul_(scale), _with_padding(d_items, scale)


def _accumulate(weights: Tensor, column: Tensor, grad: Tensor, queries: Tensor, items: Tensor, d_queries: Tensor,
                d_items: Tensor) -> None:  # fmt: skip
    """Adds a block's part of both gradients; ``weights`` [rows, V] is the softmax and is used up."""
    weights.scatter_add_(1, column, -torch.ones_like(column, dtype=weights.dtype))  # softmax - one-hot
    torch.mm(weights, items, out=d_queries).mul_(grad[:, None])
    d_items.addmm_((queries * grad[:, None]).mT, weights)


def _with_padding(d_items: Tensor, scale: float) -> Tensor:
    """[D, V] to the table's gradient [V + 1, D] with a zero row in front."""
    return torch.nn.functional.pad(d_items.mul_(scale).mT, (0, 0, 1, 0)).contiguous()
