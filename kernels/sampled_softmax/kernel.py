# mypy: allow-incomplete-defs
"""Sampled softmax in Triton: draws, gathers, normalises, dots and sums in one pass, nothing of size [L, R] in memory.

One program per position. A tile of rows [BLOCK_R, D] is gathered, norms and products come from it, and the log-sum-exp
is kept per slot of the tile, so that slots meet once, at the end. The backward makes the logits again.

Legend: L total events, D model width, R negatives per position, V rows of the table.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._launch import Config, config, interpreting, power_of_two, select, unit_stride
from kernels._rows import add_to_rows, draw_ids, finish_fixed, inverse_norm, quantum_of

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
FWD_BYTES, BWD_ELEMENTS = 16_384, 4_096
"""Size of a gathered tile: loads in flight against registers, both of which several programs share."""


@triton.jit
def _columns(
    seed, row, drawn, start, negatives, stride_nl, stride_nr, num_negatives, num_items,
    DRAWN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Ids [BLOCK_R] of the negatives start.. of a position; 0 past the last. drawn: the position whose draws it has."""
    slots = start + tl.arange(0, BLOCK_R)
    if DRAWN:
        ids = draw_ids(seed, drawn, start, (num_negatives + 3) // 4, num_items, BLOCK_R)
        ids = tl.where(slots < num_negatives, ids, 0)
    else:
        at = row * stride_nl + slots.to(tl.int64) * stride_nr
        ids = tl.load(negatives + at, mask=slots < num_negatives, other=0).to(tl.int32)
    return ids


@triton.jit
def _cosines(rows, q, inverse_q, eps, NORMALIZE: tl.constexpr):
    """q . e of the rows [BLOCK_R, BLOCK_D], both normalised if asked; the inverse norms of the rows; which are live."""
    products = tl.sum(rows * q[None, :], axis=1)
    if NORMALIZE:
        inverse, live = inverse_norm(tl.sum(rows * rows, axis=1), eps)
        return products * inverse_q * inverse, inverse, live
    return products, products * 0.0 + 1.0, products * 0.0


@triton.jit(do_not_specialize=["seed", "num_items"])
def _sampled_softmax_fwd_kernel(
    queries, table, labels, negatives, log_q, label_log_q, loss, lse, random_rows, seed: tl.int64,
    num_items: tl.int32, num_negatives, scale, eps, stride_q, stride_nl, stride_nr,
    D: tl.constexpr, STRIDE_E: tl.constexpr, DRAWN: tl.constexpr, NORMALIZE: tl.constexpr, LOG_Q: tl.constexpr,
    LABEL_LOG_Q: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    drawn = row
    if ROWS:
        drawn = tl.load(random_rows + row)
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    label = tl.load(labels + row).to(tl.int32)
    q = tl.load(queries + row * stride_q + d, mask=in_d, other=0.0).to(tl.float32)
    own = tl.load(table + label.to(tl.int64) * STRIDE_E + d, mask=in_d, other=0.0).to(tl.float32)
    own_product = tl.sum(q * own, axis=0)
    inverse_q = 1.0
    if NORMALIZE:
        inverse_q = inverse_norm(tl.sum(q * q, axis=0), eps)[0]
        inverse_own = inverse_norm(tl.sum(own * own, axis=0), eps)[0]
        own_product = own_product * inverse_q * inverse_own
    own_logit = own_product * scale  # the label's
    if LABEL_LOG_Q:
        own_logit -= tl.load(label_log_q + row).to(tl.float32)
    own_logit *= LOG2_E
    # Every slot starts at the label's logit, which always counts: no infinities to take differences of.
    top = tl.zeros([BLOCK_R], tl.float32) + own_logit
    total = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, num_negatives, BLOCK_R):
        ids = _columns(
            seed, row, drawn, start, negatives, stride_nl, stride_nr, num_negatives, num_items, DRAWN, BLOCK_R
        )  # fmt: skip
        counts = (ids > 0) & (ids != label)
        rows = tl.load(
            table + ids.to(tl.int64)[:, None] * STRIDE_E + d[None, :], mask=counts[:, None] & in_d[None, :], other=0.0
        ).to(tl.float32)
        logit = _cosines(rows, q, inverse_q, eps, NORMALIZE)[0] * scale
        if LOG_Q:
            logit -= tl.load(log_q + ids, mask=counts, other=0.0).to(tl.float32)
        logit = tl.where(counts, logit * LOG2_E, float("-inf"))
        new_top = tl.maximum(top, logit)
        total = total * tl.exp2(top - new_top) + tl.exp2(logit - new_top)
        top = new_top
    highest = tl.max(top, axis=0)
    others = tl.sum(total * tl.exp2(top - highest), axis=0)
    excess = tl.log2(others + tl.exp2(own_logit - highest)) + (highest - own_logit)  # ahead of the label
    tl.store(loss + row, excess * LN_2)
    tl.store(lse + row, excess + own_logit)


@triton.jit(do_not_specialize=["seed", "num_items"])
def _sampled_softmax_bwd_kernel(
    grad, queries, table, labels, negatives, log_q, lse, slots, per_quantum, d_queries, d_table, random_rows,
    seed: tl.int64, num_items: tl.int32, num_negatives, scale, eps, stride_g, stride_q, stride_nl, stride_nr,
    D: tl.constexpr, STRIDE_E: tl.constexpr, DRAWN: tl.constexpr, NORMALIZE: tl.constexpr, LOG_Q: tl.constexpr,
    SPARSE: tl.constexpr, FIXED: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    drawn = row
    if ROWS:
        drawn = tl.load(random_rows + row)
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    label = tl.load(labels + row).to(tl.int32)
    q = tl.load(queries + row * stride_q + d, mask=in_d, other=0.0).to(tl.float32)
    inverse_q, live_q = 1.0, 0.0
    if NORMALIZE:
        inverse_q, live_q = inverse_norm(tl.sum(q * q, axis=0), eps)
    unit_q = q * inverse_q
    quanta = 1.0
    if FIXED:
        quanta = tl.load(per_quantum)
    factor = tl.load(grad + row * stride_g).to(tl.float32) * scale
    own_lse = tl.load(lse + row)
    d_unit_q = tl.zeros([BLOCK_D], tl.float32)
    weights = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, num_negatives, BLOCK_R):
        ids = _columns(
            seed, row, drawn, start, negatives, stride_nl, stride_nr, num_negatives, num_items, DRAWN, BLOCK_R
        )  # fmt: skip
        counts = (ids > 0) & (ids != label)
        mask = counts[:, None] & in_d[None, :]
        rows = tl.load(table + ids.to(tl.int64)[:, None] * STRIDE_E + d[None, :], mask=mask, other=0.0).to(tl.float32)
        cosine, inverse, live = _cosines(rows, q, inverse_q, eps, NORMALIZE)
        logit = cosine * scale
        if LOG_Q:
            logit -= tl.load(log_q + ids, mask=counts, other=0.0).to(tl.float32)
        weight = tl.where(counts, tl.exp2(logit * LOG2_E - own_lse), 0.0)
        weights += weight
        into = weight * factor  # d loss / d cosine
        d_unit_q += tl.sum((into * inverse)[:, None] * rows, axis=0)
        # d unit e = into * unit q; what follows takes it through the normalisation of the row.
        along = into if FIXED else into * inverse
        back = along * live * cosine * inverse
        value = along[:, None] * unit_q[None, :] - back[:, None] * rows
        target = ids
        if SPARSE:
            target = tl.load(slots + ids, mask=counts, other=0)
        add_to_rows(d_table + target.to(tl.int64)[:, None] * D + d[None, :], value, mask, quanta, FIXED)
    # The label: minus the weights of all others, which does not cancel.
    own = tl.load(table + label.to(tl.int64) * STRIDE_E + d, mask=in_d, other=0.0).to(tl.float32)
    own_inverse, own_live, own_cosine = 1.0, 0.0, 0.0
    if NORMALIZE:
        own_inverse, own_live = inverse_norm(tl.sum(own * own, axis=0), eps)
        own_cosine = tl.sum(unit_q * own, axis=0) * own_inverse
    into_own = -factor * tl.sum(weights, axis=0)
    d_unit_q += into_own * own_inverse * own
    along_own = into_own if FIXED else into_own * own_inverse
    own_value = along_own * (unit_q - own_live * own_cosine * own_inverse * own)
    if SPARSE:
        label = tl.load(slots + label)
    add_to_rows(d_table + label.to(tl.int64) * D + d, own_value, in_d, quanta, FIXED)
    if NORMALIZE:
        d_unit_q -= live_q * tl.sum(unit_q * d_unit_q, axis=0) * unit_q
    tl.store(d_queries + row * D + d, (d_unit_q * inverse_q).to(d_queries.dtype.element_ty), mask=in_d)


@triton.jit(do_not_specialize=["seed", "num_items"])
def _mark_kernel(
    labels, negatives, marks, random_rows, seed: tl.int64, num_items: tl.int32, num_negatives, stride_nl, stride_nr,
    DRAWN: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """marks[id] = 1 for the label and the negatives of a position."""
    row = tl.program_id(0).to(tl.int64)
    drawn = row
    if ROWS:
        drawn = tl.load(random_rows + row)
    tl.store(marks + tl.load(labels + row).to(tl.int64), 1)
    for start in range(0, num_negatives, BLOCK_R):
        ids = _columns(
            seed, row, drawn, start, negatives, stride_nl, stride_nr, num_negatives, num_items, DRAWN, BLOCK_R
        )  # fmt: skip
        tl.store(marks + ids.to(tl.int64), tl.full([BLOCK_R], 1, tl.int32), mask=ids > 0)


def configs(width: int, num_negatives: int, elements: int, warps: tuple[int, ...] = (4, 8)) -> list[Config]:
    """Rows of a gathered tile and warps; a tile has at most ``elements`` elements unless the width alone exceeds it."""
    block_d = power_of_two(width)
    most = power_of_two(num_negatives)
    if interpreting():
        return [config(BLOCK_R=min(16, most), BLOCK_D=block_d)]
    rows = [min(most, max(16, size // block_d)) for size in (elements, elements // 2, elements * 2)]
    return [config(num_warps=w, num_stages=1, BLOCK_R=r, BLOCK_D=block_d) for r in dict.fromkeys(rows) for w in warps]


class Draws:
    """Where the negatives of a call come from: given [L, R], or drawn from a seed in the kernel, at each position those
    of the position that ``rows`` [L] names."""

    def __init__(self, negatives: Tensor | None, num_negatives: int, seed: int, rows: Tensor | None = None) -> None:
        self.negatives, self.seed = negatives, seed
        self.rows = None if rows is None or negatives is not None else rows.contiguous()
        self.count = num_negatives if negatives is None else negatives.shape[1]

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments that every kernel here takes."""
        strides = (0, 0) if self.negatives is None else self.negatives.stride()
        return {
            "seed": self.seed, "num_negatives": self.count, "stride_nl": strides[0], "stride_nr": strides[1],
            "DRAWN": self.negatives is None, "random_rows": self.rows, "ROWS": self.rows is not None,
        }  # fmt: skip


def sampled_softmax_fwd(
    queries: Tensor, table: Tensor, labels: Tensor, draws: Draws, log_q: Tensor | None, label_log_q: Tensor | None,
    scale: float, normalize: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss [L], and log2 of the sum of the exponentials [L], both float32."""
    queries, table, labels = unit_stride(queries), unit_stride(table), labels.contiguous()
    length, width = queries.shape
    loss = torch.empty(length, dtype=torch.float32, device=queries.device)
    lse = torch.empty_like(loss)

    def launch(c: Config) -> None:
        _sampled_softmax_fwd_kernel[(length,)](
            queries, table, labels, draws.negatives, log_q, label_log_q, loss, lse, num_items=table.shape[0] - 1,
            scale=scale, eps=eps, stride_q=queries.stride(0), **draws.arguments(), D=width, STRIDE_E=table.stride(0),
            NORMALIZE=normalize, LOG_Q=log_q is not None, LABEL_LOG_Q=label_log_q is not None, **c.launch(),
        )  # fmt: skip

    key = (width, draws.count, table.dtype, draws.negatives is None)
    select("sampled_softmax_fwd", key, configs(width, draws.count, FWD_BYTES // table.element_size()), launch)
    return loss, lse


def sampled_softmax_bwd(
    grad: Tensor, queries: Tensor, table: Tensor, labels: Tensor, draws: Draws, log_q: Tensor | None, lse: Tensor,
    scale: float, normalize: bool, eps: float, fixed: bool, slots: Tensor | None = None, num_slots: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradient of queries [L, D]; sums of the table's [V, D], float32, or int64 with the quantum [2] when ``fixed``.

    slots: [V] int32 or None. Row of the sums [num_slots, D] that an item has; None: its own.
    """
    queries, table, labels = unit_stride(queries), unit_stride(table), labels.contiguous()
    length, width = queries.shape
    d_queries = torch.empty(length, width, dtype=queries.dtype, device=queries.device)
    fixed = fixed and length > 0
    quantum = quantum_of(grad, queries, scale, normalize) if fixed else None
    rows = table.shape[0] if slots is None else num_slots
    dtype = torch.int64 if fixed else torch.float32

    def launch(c: Config) -> Tensor:
        sums = torch.zeros(rows, width, dtype=dtype, device=table.device)
        _sampled_softmax_bwd_kernel[(length,)](
            grad, queries, table, labels, draws.negatives, log_q, lse, slots, None if quantum is None else quantum[1:],
            d_queries, sums, num_items=table.shape[0] - 1, scale=scale, eps=eps, stride_g=grad.stride(0),
            stride_q=queries.stride(0), **draws.arguments(), D=width, STRIDE_E=table.stride(0), NORMALIZE=normalize,
            LOG_Q=log_q is not None, SPARSE=slots is not None, FIXED=fixed, **c.launch(),
        )  # fmt: skip
        return sums

    key = (width, draws.count, table.dtype, draws.negatives is None, fixed)
    # Rows whose sums are not aligned to 16 bytes take more addresses, integers twice the registers.
    elements, warps = BWD_ELEMENTS // 2 if width % 4 else BWD_ELEMENTS, (8, 4) if fixed else (4, 8)
    sums = select("sampled_softmax_bwd", key, configs(width, draws.count, elements, warps), launch)
    return d_queries, sums, quantum


def finish(sums: Tensor, quantum: Tensor | None, table: Tensor, normalize: bool, eps: float, dtype: torch.dtype,
           ids: Tensor | None = None) -> Tensor:  # fmt: skip
    """The table's gradient in ``dtype`` from the sums of :func:`sampled_softmax_bwd`."""
    if quantum is None:
        return sums.to(dtype)
    return finish_fixed(sums, quantum, unit_stride(table), eps, normalize, dtype, ids)


def touched(labels: Tensor, draws: Draws, num_rows: int) -> Tensor:
    """int32 [V]: 1 for every item that a position has as its label or a negative."""
    marks = torch.zeros(num_rows, dtype=torch.int32, device=labels.device)
    labels = labels.contiguous()
    block = 16 if interpreting() else min(128, power_of_two(draws.count))
    _mark_kernel[(labels.shape[0],)](
        labels, draws.negatives, marks, num_items=num_rows - 1, **draws.arguments(), BLOCK_R=block, num_warps=1
    )
    return marks
