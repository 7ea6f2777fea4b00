"""Vectorised torch path of the sampled softmax: never an [L, R, D] tensor.

``L`` total events, ``D`` model width, ``R`` negatives per position, ``V`` rows of the table,
``K`` items of a shared bank. Inputs are in the compute dtype and already normalised.

Column 0 of ``ids`` and ``weights`` [L, R + 1] is the label, so that the label needs no path of its own.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._common import row_chunks, rows_within

# torch says once that sparse CSR is beta; a training run has no use for it.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

DENSE_TABLE_ROWS = 8_192
"""Up to so many rows of the table, its gradient goes through dense [DENSE_BLOCK, V] blocks (time grows
with V), above through a sort of the negatives (time does not)."""
DENSE_BLOCK = 128
"""Positions per dense block: [128, V] float32 then stays in the L2 cache of a core for V up to about 4,000."""
SORT_ELEMENTS = 2**20
"""Ids sorted at a time; bounds the memory of the sort."""
PAD_WIDTH = 16
"""Widths are padded to a multiple of this for the sampled product and the bags: no remainder loop."""


def draw_negatives(num_positions: int, num_negatives: int, num_items: int, seed: int, device: torch.device) -> Tensor:
    """Uniform ids 1..num_items with replacement, [num_positions, num_negatives] int32, a function of ``seed``."""
    shape = (num_positions, num_negatives)
    if device.type == "cpu":  # numpy draws bounded int32 faster than torch does
        return torch.from_numpy(np.random.default_rng(seed).integers(1, num_items + 1, size=shape, dtype=np.int32))
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randint(1, num_items + 1, shape, dtype=torch.int32, device=device, generator=generator)


def _padded(x: Tensor) -> Tensor:
    return F.pad(x, (0, -x.shape[1] % PAD_WIDTH)).contiguous()


def sampled_softmax_fwd(
    queries: Tensor, table: Tensor, labels: Tensor, negatives: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [L], ids [L, R + 1] int32 and d loss / d logit [L, R + 1]."""
    ids = torch.cat([labels[:, None].to(torch.int32), negatives.to(torch.int32)], dim=1)  # [L, R + 1]
    hit = ids == ids[:, :1]
    hit[:, 0] = False
    # Minus infinity where a negative is the label; the products are added to it.
    logits = queries.new_zeros(ids.shape).masked_fill_(hit, -torch.inf)
    if queries.device.type == "cpu":
        _add_products_cpu(logits, queries, table, ids, scale)
    else:
        _add_products(logits, queries, table, ids, scale)
    lse = logits.logsumexp(dim=1, keepdim=True)  # [L, 1]
    loss = lse[:, 0] - logits[:, 0]
    weights = logits.sub_(lse).exp_()
    weights[:, 0] = -weights[:, 1:].sum(dim=1)  # p_label - 1, without the cancellation
    return loss, ids, weights


def _add_products_cpu(logits: Tensor, queries: Tensor, table: Tensor, ids: Tensor, scale: float) -> None:
    """logits[l, c] += scale * queries[l] . table[ids[l, c]], as a product sampled at a sparse pattern."""
    queries, table = _padded(queries), _padded(table)
    columns = ids.shape[1]
    rows = min(ids.shape[0], (2**31 - 1) // columns)  # the pattern is int32
    crow = torch.arange(0, rows * columns + 1, columns, dtype=torch.int32)
    for part in row_chunks(ids.shape[0], rows):
        size = (part.stop - part.start, table.shape[0])
        pattern = torch.sparse_csr_tensor(
            crow[: size[0] + 1], ids[part].view(-1), logits[part].view(-1), size=size, check_invariants=False
        )
        torch.sparse.sampled_addmm(pattern, queries[part], table.mT, beta=1.0, alpha=scale, out=pattern)


def _add_products(logits: Tensor, queries: Tensor, table: Tensor, ids: Tensor, scale: float) -> None:
    """The same on other devices: dense [rows, V] blocks and a gather."""
    for part in row_chunks(ids.shape[0], rows_within(256, table.shape[0], table.dtype)):
        block = queries[part] @ table.mT  # [rows, V]
        logits[part] += block.gather(1, ids[part].long()).mul_(scale)


def sampled_softmax_bwd(
    grad: Tensor, queries: Tensor, table: Tensor, ids: Tensor, weights: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of queries [L, D] and table [V, D], given d / d loss [L]."""
    grad = grad.to(queries.dtype)[:, None] * scale  # [L, 1]
    width = queries.shape[1]
    d_queries = F.embedding_bag(ids, _padded(table), per_sample_weights=weights, mode="sum")[:, :width] * grad
    scaled = queries * grad  # the weights of a position share its factor: [L, D] is cheaper than [L, R + 1]
    if table.shape[0] <= DENSE_TABLE_ROWS or queries.device.type != "cpu":
        d_table = _table_grad_dense(scaled, ids, weights, table.shape[0])
    else:
        d_table = _table_grad_sorted(scaled, ids, weights, table.shape[0])
    return d_queries, d_table


def _table_grad_dense(queries: Tensor, ids: Tensor, weights: Tensor, num_rows: int) -> Tensor:
    """sum of weights[l, c] * queries[l] into row ids[l, c], through dense blocks."""
    block_rows = DENSE_BLOCK if queries.device.type == "cpu" else rows_within(256, num_rows, queries.dtype)
    total = queries.new_zeros(queries.shape[1], num_rows)  # [D, V]: the faster orientation of the product
    buffer = queries.new_empty(min(block_rows, ids.shape[0]), num_rows)
    for part in row_chunks(ids.shape[0], block_rows):
        block = buffer[: part.stop - part.start].zero_()
        block.scatter_add_(1, ids[part].long(), weights[part])
        total.addmm_(queries[part].mT, block)
    return total.mT.contiguous()


def _table_grad_sorted(queries: Tensor, ids: Tensor, weights: Tensor, num_rows: int) -> Tensor:
    """The same sum through the transposed pattern: positions sorted by id, then one bag per id."""
    columns = ids.shape[1]
    padded = _padded(queries)
    total = queries.new_zeros(num_rows, padded.shape[1])
    boundaries = np.arange(num_rows, dtype=np.int64)
    for part in row_chunks(ids.shape[0], SORT_ELEMENTS // columns):
        size = (part.stop - part.start) * columns
        # id and place packed into one key: a plain sort is then stable, and faster than an argsort.
        bits = (size - 1).bit_length()
        key = np.uint32 if num_rows.bit_length() + bits <= 32 else np.int64
        packed = ids[part].reshape(-1).numpy().astype(key)
        packed <<= key(bits)
        packed |= np.arange(size, dtype=key)
        packed.sort()
        starts = np.searchsorted(packed, (boundaries << bits).astype(key))
        place = torch.from_numpy((packed & key((1 << bits) - 1)).astype(np.int32))
        bag_weights = weights[part].reshape(-1).index_select(0, place)
        rows = place.div_(columns, rounding_mode="floor")
        offsets = torch.from_numpy(starts.astype(np.int32))
        total += F.embedding_bag(rows, padded[part], offsets, per_sample_weights=bag_weights, mode="sum")
    return total[:, : queries.shape[1]].contiguous()


def bank_softmax_fwd(
    queries: Tensor, bank: Tensor, bias: Tensor | None, bank_ids: Tensor, labels: Tensor, positive: Tensor,
    scale: float, chunk_mib: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss [L] and logsumexp [L] of the label and the bank; ``positive`` [L] is the label's logit."""
    lse = torch.empty_like(positive)
    for part in row_chunks(queries.shape[0], rows_within(chunk_mib, bank.shape[0], bank.dtype)):
        logits = _bank_logits(queries[part], bank, bias, bank_ids, labels[part], scale)
        lse[part] = torch.logaddexp(logits.logsumexp(dim=1), positive[part])
    return lse - positive, lse


def _bank_logits(queries: Tensor, bank: Tensor, bias: Tensor | None, bank_ids: Tensor, labels: Tensor,
                 scale: float) -> Tensor:  # fmt: skip
    logits = (queries @ bank.mT).mul_(scale)  # [rows, K]
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
    for part in row_chunks(queries.shape[0], rows_within(chunk_mib, bank.shape[0], bank.dtype)):
        logits = _bank_logits(queries[part], bank, bias, bank_ids, labels[part], scale)
        weights = logits.sub_(lse[part, None]).exp_().mul_(grad[part, None])  # d / d logit, [rows, K]
        torch.mm(weights, bank, out=d_queries[part])
        d_bank.addmm_(weights.mT, queries[part])
    d_positive = grad * torch.expm1(positive - lse)
    return d_queries.mul_(scale), d_bank.mul_(scale), d_positive
