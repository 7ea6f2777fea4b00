# mypy: allow-incomplete-defs
"""Softmax cross-entropy of positions against many shared items, in blocks on matrix units; logits never in memory.

The items are the rows of a table (*full*), or rows picked by ids (*bank*). In both, an item equal to a position's label
is left out of the sum over items, and the label itself is added once, from its own row: with the whole table as items
that is the softmax over the catalogue. Products are of the raw rows; inverse norms, kept per row, multiply the
logits in float32, so normalising rounds nothing.

Logits are in units of log 2 inside the kernels. Row 0 of the table is padding: never read, its gradient is zero.

Legend: ``L`` positions, ``D`` model width, ``V`` rows of the table, ``K`` items of a bank.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._rows import add_to_rows, inverses, products, read_rows

SIZES = ["num_items", "length", "per_split"]
"""Differ from call to call: one binary for all, and a size of 1 is no constant."""
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
OWN_COLUMNS = tl.constexpr(32)
SMALLEST = tl.constexpr(1e-37)
"""Keeps its inverse within float32."""


@triton.jit
def _items(ids, start, num_items, BANK: tl.constexpr, BLOCK_V: tl.constexpr):
    """Table rows [BLOCK_V] int64 of the items start.., and which of them exist."""
    at = start + tl.arange(0, BLOCK_V).to(tl.int64)
    if BANK:
        inside = at < num_items
        rows = tl.load(ids + at, mask=inside, other=0).to(tl.int64)
    else:
        inside = (at > 0) & (at < num_items)  # row 0 is padding
        rows = at
    return rows, inside


@triton.jit
def _column_bias(log_q, start, num_items, BIAS: tl.constexpr, BLOCK_V: tl.constexpr):
    """-log2 q of the items start.. of a bank; zeros without a correction."""
    at = start + tl.arange(0, BLOCK_V).to(tl.int64)
    if BIAS:
        return tl.load(log_q + at, mask=at < num_items, other=0.0).to(tl.float32) * -LOG2_E
    else:
        return at.to(tl.float32) * 0.0


@triton.jit(do_not_specialize=SIZES)
def _softmax_blocks_fwd_kernel(
    queries, table, labels, ids, log_q, label_log_q, inverse_e, own, loss, lse, inverse_out, num_items, length,
    per_split, scale, eps,
    D: tl.constexpr, STRIDE_Q: tl.constexpr, STRIDE_E: tl.constexpr, BANK: tl.constexpr, NORMALIZE: tl.constexpr,
    LOG_Q: tl.constexpr, LABEL_LOG_Q: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """SPLIT: ``lse`` [splits, L] gets the part of a range of items alone, ``own`` the label's logit."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = rows < length
    label = tl.load(labels + rows, mask=inside, other=0).to(tl.int64)
    label32 = label.to(tl.int32)
    # The label's product, a few columns at a time: two whole tiles in float32 would not fit into registers.
    own_logit = tl.zeros([BLOCK_L], tl.float32)
    squares = tl.zeros([BLOCK_L], tl.float32)
    for start in range(0, D, OWN_COLUMNS):
        d = start + tl.arange(0, OWN_COLUMNS)
        mask = inside[:, None] & (d < D)[None, :]
        q_part = tl.load(queries + rows[:, None] * STRIDE_Q + d[None, :], mask=mask, other=0.0)
        own_part = tl.load(table + label[:, None] * STRIDE_E + d[None, :], mask=mask, other=0.0)
        q_part, own_part = q_part.to(DTYPE).to(tl.float32), own_part.to(DTYPE).to(tl.float32)
        own_logit += tl.sum(q_part * own_part, axis=1)
        squares += tl.sum(q_part * q_part, axis=1)
    row_scale = tl.zeros([BLOCK_L], tl.float32) + scale
    if NORMALIZE:
        norm = tl.sqrt(squares)
        inverse_q = 1.0 / tl.maximum(norm, eps)
        row_scale *= inverse_q
        own_logit *= inverses(inverse_e, label, inside, True)[0]
        tl.store(inverse_out + rows, tl.where(norm > eps, inverse_q, -inverse_q), mask=inside)
    own_logit *= row_scale
    if LABEL_LOG_Q:
        own_logit -= tl.load(label_log_q + rows, mask=inside, other=0.0).to(tl.float32)
    own_logit *= LOG2_E
    row_scale *= LOG2_E
    q = read_rows(queries, rows, inside, D, STRIDE_Q, BLOCK_D, DTYPE)
    # Start at the label's logit, which always counts: no infinities to take differences of.
    top = own_logit
    total = tl.zeros([BLOCK_L], tl.float32)
    first = tl.program_id(1).to(tl.int64) * per_split
    for start in range(first, min(first + per_split, num_items), BLOCK_V):
        items, exist = _items(ids, start, num_items, BANK, BLOCK_V)
        e = read_rows(table, items, exist, D, STRIDE_E, BLOCK_D, DTYPE)
        logit = row_scale[:, None] * products(
            q, e, queries, rows, inside, table, items, exist, D, STRIDE_Q, STRIDE_E, CHUNK, PRECISION, DTYPE
        )
        if NORMALIZE:
            logit *= inverses(inverse_e, items, exist, True)[0][None, :]
        if LOG_Q:
            logit += _column_bias(log_q, start, num_items, True, BLOCK_V)[None, :]
        logit = tl.where(exist[None, :] & (items.to(tl.int32)[None, :] != label32[:, None]), logit, float("-inf"))
        new_top = tl.maximum(top, tl.max(logit, axis=1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(logit - new_top[:, None]), axis=1)
        top = new_top
    if SPLIT:
        tl.store(lse + tl.program_id(1).to(tl.int64) * length + rows, tl.log2(total) + top, mask=inside)
        tl.store(own + rows, own_logit, mask=inside)
    else:
        excess = tl.log2(total + tl.exp2(own_logit - top)) + (top - own_logit)  # ahead of the label
        tl.store(loss + rows, excess * LN_2, mask=inside)
        tl.store(lse + rows, excess + own_logit, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _join_splits_kernel(parts, own, loss, lse, length, SPLITS: tl.constexpr, BLOCK_L: tl.constexpr):
    """Loss and log-sum-exp from the label's logit and the parts [SPLITS, L], all in units of log 2."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = rows < length
    own_logit = tl.load(own + rows, mask=inside, other=0.0)
    top = own_logit
    for s in range(SPLITS):
        top = tl.maximum(top, tl.load(parts + s * length.to(tl.int64) + rows, mask=inside, other=0.0))
    total = tl.exp2(own_logit - top)
    for s in range(SPLITS):
        total += tl.exp2(tl.load(parts + s * length.to(tl.int64) + rows, mask=inside, other=0.0) - top)
    excess = tl.log2(total) + (top - own_logit)
    tl.store(loss + rows, excess * LN_2, mask=inside)
    tl.store(lse + rows, excess + own_logit, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _softmax_blocks_dq_kernel(
    queries, table, labels, ids, log_q, inverse_e, inverse_q, lse, sums, num_items, length, per_split, scale,
    D: tl.constexpr, STRIDE_Q: tl.constexpr, STRIDE_E: tl.constexpr, BANK: tl.constexpr, NORMALIZE: tl.constexpr,
    LOG_Q: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """sums [splits, L, D] float32: the items' part of sum of weight * unit item."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = rows < length
    d = tl.arange(0, BLOCK_D)
    label = tl.load(labels + rows, mask=inside, other=0).to(tl.int32)
    own_lse = tl.load(lse + rows, mask=inside, other=float("inf"))
    q = read_rows(queries, rows, inside, D, STRIDE_Q, BLOCK_D, DTYPE)
    row_scale = inverses(inverse_q, rows, inside, NORMALIZE)[0] * (scale * LOG2_E)
    into = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    first = tl.program_id(1).to(tl.int64) * per_split
    for start in range(first, min(first + per_split, num_items), BLOCK_V):
        items, exist = _items(ids, start, num_items, BANK, BLOCK_V)
        e = read_rows(table, items, exist, D, STRIDE_E, BLOCK_D, DTYPE)
        logit = row_scale[:, None] * products(
            q, e, queries, rows, inside, table, items, exist, D, STRIDE_Q, STRIDE_E, CHUNK, PRECISION, DTYPE
        )
        inverse_items = inverses(inverse_e, items, exist, NORMALIZE)[0]
        if NORMALIZE:
            logit *= inverse_items[None, :]
        if LOG_Q:
            logit += _column_bias(log_q, start, num_items, True, BLOCK_V)[None, :]
        counts = exist[None, :] & (items.to(tl.int32)[None, :] != label[:, None])
        weight = tl.where(counts, tl.exp2(logit - own_lse[:, None]), 0.0)
        if NORMALIZE:
            weight *= inverse_items[None, :]
        into = tl.dot(weight.to(DTYPE), e, into, input_precision=PRECISION)
    at = (tl.program_id(1).to(tl.int64) * length + rows)[:, None] * D + d[None, :]
    tl.store(sums + at, into, mask=inside[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=SIZES)
def _finish_dq_kernel(
    grad, queries, table, labels, inverse_e, inverse_q, loss, sums, per_quantum, d_queries, d_table, length, scale,
    stride_g, D: tl.constexpr, STRIDE_Q: tl.constexpr, STRIDE_E: tl.constexpr, BANK: tl.constexpr,
    NORMALIZE: tl.constexpr, FIXED: tl.constexpr, SPLITS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """d_queries [L, D] from the sums and the label's part; in a bank also the label's part of d_table [V, D]."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = rows < length
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d < D)[None, :]
    label = tl.load(labels + rows, mask=inside, other=0).to(tl.int64)
    factor = tl.load(grad + rows * stride_g, mask=inside, other=0.0).to(tl.float32) * scale
    weight = tl.exp2(tl.load(loss + rows, mask=inside, other=0.0) * -LOG2_E) - 1.0
    inverse, live = inverses(inverse_q, rows, inside, NORMALIZE)
    inverse_own, live_own = inverses(inverse_e, label, inside, NORMALIZE)
    unit_q = read_rows(queries, rows, inside, D, STRIDE_Q, BLOCK_D, DTYPE).to(tl.float32) * inverse[:, None]
    unit_own = read_rows(table, label, inside, D, STRIDE_E, BLOCK_D, DTYPE).to(tl.float32) * inverse_own[:, None]
    into = weight[:, None] * unit_own
    for s in range(SPLITS):
        at = (s * length.to(tl.int64) + rows)[:, None] * D + d[None, :]
        into += tl.load(sums + at, mask=mask, other=0.0)
    if NORMALIZE:
        into -= (live * tl.sum(unit_q * into, axis=1))[:, None] * unit_q
    value = into * (factor * inverse)[:, None]
    tl.store(d_queries + rows[:, None] * D + d[None, :], value.to(d_queries.dtype.element_ty), mask=mask)
    if BANK:
        along = tl.sum(unit_q * unit_own, axis=1) * live_own
        value = (weight * factor)[:, None] * (unit_q - along[:, None] * unit_own)
        quanta = 1.0
        if FIXED:
            quanta = tl.load(per_quantum)
        else:
            value *= inverse_own[:, None]
        add_to_rows(d_table + label[:, None] * D + d[None, :], value, mask, quanta, FIXED)


@triton.jit(do_not_specialize=SIZES)
def _softmax_blocks_de_kernel(
    grad, queries, table, labels, ids, log_q, inverse_e, inverse_q, loss, lse, largest, sums, num_items, length,
    per_split, scale, stride_g,
    D: tl.constexpr, STRIDE_Q: tl.constexpr, STRIDE_E: tl.constexpr, BANK: tl.constexpr, NORMALIZE: tl.constexpr,
    LOG_Q: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """sums [splits, items, D] float32: sum of weight * grad * unit query; the whole table's with the label's part.

    SCALED: factors are divided by ``largest`` before they are rounded: float16 has no room for 1 / L.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK_V
    items, exist = _items(ids, start, num_items, BANK, BLOCK_V)
    d = tl.arange(0, BLOCK_D)
    e = read_rows(table, items, exist, D, STRIDE_E, BLOCK_D, DTYPE)
    items32 = items.to(tl.int32)
    item_scale = inverses(inverse_e, items, exist, NORMALIZE)[0] * (scale * LOG2_E)
    bias = _column_bias(log_q, start, num_items, LOG_Q, BLOCK_V)
    shrink = 1.0
    if SCALED:
        shrink = 1.0 / tl.maximum(tl.load(largest), SMALLEST)
    into = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    first = tl.program_id(1).to(tl.int64) * per_split
    for begin in range(first, min(first + per_split, length), BLOCK_L):
        rows = begin + tl.arange(0, BLOCK_L).to(tl.int64)
        inside = rows < length
        q = read_rows(queries, rows, inside, D, STRIDE_Q, BLOCK_D, DTYPE)
        label = tl.load(labels + rows, mask=inside, other=0).to(tl.int32)
        own_lse = tl.load(lse + rows, mask=inside, other=float("inf"))
        inverse_rows = inverses(inverse_q, rows, inside, NORMALIZE)[0]
        factor = tl.load(grad + rows * stride_g, mask=inside, other=0.0).to(tl.float32) * inverse_rows * shrink
        logit = item_scale[:, None] * products(
            e, q, table, items, exist, queries, rows, inside, D, STRIDE_E, STRIDE_Q, CHUNK, PRECISION, DTYPE
        )
        if NORMALIZE:
            logit *= inverse_rows[None, :]
        if LOG_Q:
            logit += bias[:, None]
        weight = tl.exp2(logit - own_lse[None, :])
        is_label = items32[:, None] == label[None, :]
        if BANK:
            weight = tl.where(is_label, 0.0, weight)
        else:  # p - 1 from the loss: it is exact where the label is all there is
            own_weight = tl.exp2(tl.load(loss + rows, mask=inside, other=0.0) * -LOG2_E) - 1.0
            weight = tl.where(is_label, own_weight[None, :], weight)
        weight = tl.where(exist[:, None], weight * factor[None, :], 0.0)
        into = tl.dot(weight.to(DTYPE), q, into, input_precision=PRECISION)
    at = start + tl.arange(0, BLOCK_V)
    out = sums + (tl.program_id(1).to(tl.int64) * num_items + at)[:, None] * D + d[None, :]
    tl.store(out, into, mask=(at < num_items)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=SIZES)
def _finish_de_kernel(
    table, ids, inverse_e, largest, sums, per_quantum, d_table, num_items, scale,
    D: tl.constexpr, STRIDE_E: tl.constexpr, BANK: tl.constexpr, NORMALIZE: tl.constexpr, FIXED: tl.constexpr,
    SCALED: tl.constexpr, SPLITS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """d_table [V, D] from the sums of the whole table (``sums`` itself allowed), or a bank's added to it."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_V
    items, exist = _items(ids, start, num_items, BANK, BLOCK_V)
    d = tl.arange(0, BLOCK_D)
    at = start + tl.arange(0, BLOCK_V)
    mask = exist[:, None] & (d < D)[None, :]
    into = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for s in range(SPLITS):
        part = sums + (s * num_items.to(tl.int64) + at)[:, None] * D + d[None, :]
        into += tl.load(part, mask=mask, other=0.0)
    unit = scale
    if SCALED:
        unit = tl.maximum(tl.load(largest), SMALLEST) * scale
    into *= unit
    if NORMALIZE:
        inverse, live = inverses(inverse_e, items, exist, True)
        unit_e = read_rows(table, items, exist, D, STRIDE_E, BLOCK_D, DTYPE).to(tl.float32) * inverse[:, None]
        into -= (live * tl.sum(unit_e * into, axis=1))[:, None] * unit_e
        if not FIXED:
            into *= inverse[:, None]
    if BANK:
        quanta = 1.0
        if FIXED:
            quanta = tl.load(per_quantum)
        add_to_rows(d_table + items[:, None] * D + d[None, :], into, mask, quanta, FIXED)
    else:
        inside = (at < num_items)[:, None] & (d < D)[None, :]  # the padding row too: zeros
        tl.store(d_table + at[:, None] * D + d[None, :], into.to(d_table.dtype.element_ty), mask=inside)
