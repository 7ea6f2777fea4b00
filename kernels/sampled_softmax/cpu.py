"""Vectorised torch path of the sampled softmax: never an [L, R, D] tensor.

``L`` total events, ``D`` model width, ``R`` negatives per position, ``V`` rows of the table,
``K`` items of a shared bank. Inputs are in the compute dtype and already normalised.

Column 0 of ``ids`` and ``weights`` [L, R + 1] is the label, so that the label needs no path of its own.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._backend import get_backend
from kernels._common import block_rows, row_chunks, rows_within
from kernels._dropout import draw_at
from kernels._philox import uniform_ids

# torch says once that sparse CSR is beta; a training run has no use for it.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

SORT_BITS = 18
"""Elements of a block of ids that is transposed at a time, as a power of two. Measured at L = 14,000, R = 128,
D = 50, V = 3,884 on 2 cores: whole transposed gradient 39 / 39 / 43 / 50 / 96 ms at 2^16 / 17 / 18 / 19 / 20. A dense
[128, V] block per 128 positions took 51 ms there, grows with V, and waits for its threads 400 times."""
SORT_ELEMENTS_PER_ITEM = 8
"""At least so many elements a block per row of the table: a block writes the whole table's gradient once."""
DENSE_MIB = 64
"""Bound of a dense [rows, V] block, in MiB."""
PAD_WIDTH = 16
"""Widths are padded to a multiple of this for the sampled product and the bags: no remainder loop."""


def draw_negatives(
    num_positions: int, num_negatives: int, num_items: int, seed: int, device: torch.device, rows: Tensor | None = None
) -> Tensor:
    """Uniform ids 1..num_items with replacement, [num_positions, num_negatives] int32, a function of ``seed``.

    rows: [num_positions] int64, >= 0. Position whose ids each position draws; None: its own.

    On CUDA, and where the Triton kernels were asked for, these are the ids that the Triton kernel draws.
    """
    if device.type == "cpu" and get_backend() != "triton":  # numpy draws bounded int32 faster than torch does

        def draw(own_seed: Any, count: int) -> np.ndarray:
            shape = (count, num_negatives)
            return np.random.default_rng(own_seed).integers(1, num_items + 1, size=shape, dtype=np.int32)

        if rows is None or num_positions == 0:
            return torch.from_numpy(draw(seed, num_positions))
        return torch.from_numpy(draw_at(rows, seed, draw))
    return uniform_ids(num_positions, num_negatives, num_items, seed, device, rows)


def _padded(x: Tensor) -> Tensor:
    return F.pad(x, (0, -x.shape[1] % PAD_WIDTH)).contiguous()


def sampled_softmax_fwd(
    queries: Tensor, table: Tensor, labels: Tensor, negatives: Tensor, scale: float,
    log_q: Tensor | None = None, label_log_q: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss [L], ids [L, R + 1] int32 and d loss / d logit [L, R + 1]."""
    ids = torch.cat([labels[:, None].to(torch.int32), negatives.to(torch.int32)], dim=1)  # [L, R + 1]
    # Minus infinity where a negative is the label; the products are added to it.
    bias = queries.new_zeros(()) if log_q is None else -log_q.to(queries.dtype)[ids]
    logits = torch.where(ids == ids[:, :1], queries.new_full((), -torch.inf), bias)
    logits[:, 0] = 0.0 if label_log_q is None else -label_log_q.to(queries.dtype)
    if queries.device.type == "cpu" and ids.shape[1] < table.shape[0]:
        _add_products_cpu(logits, queries, table, ids, scale)
    else:
        _add_products(logits, queries, table, ids, scale)
    log_weights = torch.log_softmax(logits, dim=1)
    loss = -log_weights[:, 0]
    weights = log_weights.exp_()
    weights[:, 0] = -weights[:, 1:].sum(dim=1)  # p_label - 1, without the cancellation
    return loss, ids, weights


def _add_products_cpu(logits: Tensor, queries: Tensor, table: Tensor, ids: Tensor, scale: float) -> None:
    """logits[l, c] += scale * queries[l] . table[ids[l, c]], as a product sampled at a sparse pattern."""
    columns = ids.shape[1]
    # torch cuts a pattern to rows * V elements, under our feet when a row has more than V.
    assert columns < table.shape[0], (columns, table.shape)
    queries, table = _padded(queries), _padded(table)
    rows = min(ids.shape[0], (2**31 - 1) // columns)  # the pattern is int32
    crow = torch.arange(0, rows * columns + 1, columns, dtype=torch.int32)
    with torch.sparse.check_sparse_tensor_invariants(False):  # torch 2.11 warns where only the call says so
        for part in row_chunks(ids.shape[0], rows):
            size = (part.stop - part.start, table.shape[0])
            pattern = torch.sparse_csr_tensor(
                crow[: size[0] + 1], ids[part].view(-1), logits[part].view(-1), size=size, check_invariants=False
            )
            torch.sparse.sampled_addmm(pattern, queries[part], table.mT, beta=1.0, alpha=scale, out=pattern)


def _add_products(logits: Tensor, queries: Tensor, table: Tensor, ids: Tensor, scale: float) -> None:
    """The same on other devices, and where V <= R + 1: dense [rows, V] blocks and a gather."""
    for part in row_chunks(ids.shape[0], rows_within(DENSE_MIB, table.shape[0], table.dtype)):
        block = queries[part] @ table.mT  # [rows, V]
        logits[part] += block.gather(1, ids[part].long()).mul_(scale)


def sampled_softmax_bwd(
    grad: Tensor, queries: Tensor, table: Tensor, ids: Tensor, weights: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of queries [L, D] and table [V, D], given d / d loss [L]."""
    grad = grad.to(queries.dtype)[:, None] * scale  # [L, 1]
    width = queries.shape[1]
    d_queries = F.embedding_bag(ids, _padded(table), per_sample_weights=weights, mode="sum")[:, :width] * grad
    # The weights of a position share its factor: scaling [L, D] is cheaper than scaling [L, R + 1].
    table_grad = _table_grad if ids.shape[1] < table.shape[0] else _table_grad_dense
    d_table = table_grad(queries * grad, ids, weights, table.shape[0])
    return d_queries, d_table


def _table_grad(queries: Tensor, ids: Tensor, weights: Tensor, num_rows: int) -> Tensor:
    """sum of weights[l, c] * queries[l] into row ids[l, c]: elements sorted by id, then one bag per id.

    Every bag is summed in the order of the positions, by one thread: the result is the same for any
    number of threads.
    """
    columns = ids.shape[1]
    padded = _padded(queries)
    total = queries.new_zeros(num_rows, padded.shape[1])
    transpose = _transpose_numpy if ids.device.type == "cpu" else _transpose_torch
    for part in row_chunks(ids.shape[0], _block_elements(num_rows) // columns):
        place, rows, offsets = transpose(ids[part].reshape(-1), num_rows, columns)
        bag_weights = weights[part].reshape(-1).index_select(0, place)
        total += F.embedding_bag(rows, padded[part], offsets, per_sample_weights=bag_weights, mode="sum")
    return total[:, : queries.shape[1]].contiguous()


def _table_grad_dense(queries: Tensor, ids: Tensor, weights: Tensor, num_rows: int) -> Tensor:
    """The same sum where V <= R + 1: dense [rows, V] weights, then a product (bags of thousands would round worse)."""
    total = queries.new_zeros(num_rows, queries.shape[1])
    for part in row_chunks(ids.shape[0], rows_within(DENSE_MIB, num_rows, queries.dtype)):
        dense = weights.new_zeros(part.stop - part.start, num_rows).scatter_add_(1, ids[part].long(), weights[part])
        total.addmm_(dense.mT, queries[part])
    return total


def _block_elements(num_rows: int) -> int:
    """Elements of a block, such that id and place fit into 32 bits unless the table is too large for that."""
    bits = 32 - num_rows.bit_length()
    if bits >= SORT_BITS - 1:
        return 1 << min(bits, SORT_BITS)
    return max(1 << SORT_BITS, SORT_ELEMENTS_PER_ITEM * num_rows)


def _transpose_numpy(ids: Tensor, num_rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ascending order of ids [E]: place and position (place // columns) of each element, start of each id [V].

    Equal ids keep their order. Id and place are packed into one key: a plain sort of 32-bit keys, which
    numpy vectorises, is several times faster than a stable argsort.
    """
    bits = max(1, (ids.shape[0] - 1).bit_length())
    key: Any = np.uint32 if num_rows.bit_length() + bits <= 32 else np.uint64
    keys = ids.numpy().astype(key)
    keys <<= key(bits)
    keys |= np.arange(keys.size, dtype=key)
    keys.sort()
    offsets = np.searchsorted(keys, np.arange(num_rows, dtype=key) << key(bits))
    keys &= key((1 << bits) - 1)  # the places
    parts = (keys, keys // key(columns), offsets)
    return tuple(torch.from_numpy(x.astype(np.int32)) for x in parts)  # type: ignore[return-value]


def _transpose_torch(ids: Tensor, num_rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same with torch, for other devices."""
    ordered, place = ids.sort(stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(num_rows, dtype=ids.dtype, device=ids.device))
    return place, place // columns, offsets


def bank_softmax_fwd(
    queries: Tensor, bank: Tensor, bias: Tensor | None, bank_ids: Tensor, labels: Tensor, positive: Tensor,
    scale: float, chunk_mib: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss [L] and logsumexp [L] of the label and the bank; ``positive`` [L] is the label's logit."""
    lse = torch.empty_like(positive)
    rows = block_rows(queries, bank.shape[0], chunk_mib)
    buffer = queries.new_empty(rows, bank.shape[0])
    for part in row_chunks(queries.shape[0], rows):
        logits = _bank_logits(queries[part], bank, bias, bank_ids, labels[part], scale, buffer)
        lse[part] = torch.logaddexp(logits.logsumexp(dim=1), positive[part])
    return lse - positive, lse


def _bank_logits(queries: Tensor, bank: Tensor, bias: Tensor | None, bank_ids: Tensor, labels: Tensor,
                 scale: float, buffer: Tensor) -> Tensor:  # fmt: skip
    logits = torch.mm(queries, bank.mT, out=buffer[: queries.shape[0]]).mul_(scale)  # [rows, K]
    if bias is not None:
        logits += bias
    return logits.masked_fill_(labels[:, None] == bank_ids, -torch.inf)


def bank_softmax_bwd(
    grad: Tensor, queries: Tensor, bank: Tensor, bias: Tensor | None, bank_ids: Tensor, labels: Tensor,
    positive: Tensor, lse: Tensor, scale: float, chunk_mib: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries [L, D], bank [K, D] and positive [L]; the logits are made again, chunk by chunk."""
    grad = grad.to(queries.dtype)
    d_queries, d_bank = torch.empty_like(queries), torch.zeros_like(bank)
    rows = block_rows(queries, bank.shape[0], chunk_mib)
    buffer = queries.new_empty(rows, bank.shape[0])
    for part in row_chunks(queries.shape[0], rows):
        logits = _bank_logits(queries[part], bank, bias, bank_ids, labels[part], scale, buffer)
        weights = logits.sub_(lse[part, None]).exp_().mul_(grad[part, None])  # d / d logit, [rows, K]
        torch.mm(weights, bank, out=d_queries[part])
        d_bank.addmm_(weights.mT, queries[part])
    d_positive = grad * torch.expm1(positive - lse)
    return d_queries.mul_(scale), d_bank.mul_(scale), d_positive
