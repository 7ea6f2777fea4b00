"""Public ops: validation, one custom op each, its fake and its gradient.

Legend: L total events, D model width, R negatives per position, K items of a shared bank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import _common
from kernels._backend import choose
from kernels._dropout import check_rows
from kernels.linear_cross_entropy.triton_op import softmax_blocks
from kernels.sampled_softmax import cpu, triton_op  # noqa: F401  triton_op registers its op


def sampled_softmax(
    queries: Tensor,
    table: Tensor,
    labels: Tensor,
    negatives: Tensor | None = None,
    num_negatives: int = 128,
    seed: int = 0,
    temperature: float = 0.05,
    l2_normalize: bool = True,
    eps: float = 1e-6,
    log_q: Tensor | None = None,
    label_log_q: Tensor | None = None,
    deterministic: bool | None = None,
    sparse_grad: bool = False,
    rows: Tensor | None = None,
) -> Tensor:
    """Softmax cross-entropy of each position over its label and its own negatives.

    Args:
        queries: [L, D] floating. Encoder outputs.
        table: [num_items + 1, D] floating. Item embeddings; row 0 is padding and takes no part.
        labels: [L] int32 or int64, 1..num_items. The item that came next.
        negatives: [L, R] int32 or int64, 1..num_items; one that equals the label does not count. None: R =
            ``num_negatives`` of them are drawn uniformly with replacement, a function of (seed, position, R,
            num_items, device type).
        num_negatives: >= 1. R when ``negatives`` is None.
        seed: 0..2^63 - 1.
        temperature: > 0. Divides the logits.
        l2_normalize: normalise queries and item embeddings first.
        eps: > 0. Lower bound of the norm.
        log_q: [num_items + 1] floating or None. By item, subtracted from the logits of the negatives (a sampling
            correction); no gradient.
        label_log_q: [L] floating or None. Subtracted from the label's logit; no gradient.
        deterministic: whether two runs give the same bits (on Triton: integer sums, slower). None: what
            ``torch.use_deterministic_algorithms`` was told. The torch path always does.
        sparse_grad: the table's gradient as a coalesced sparse tensor of the rows that occur. Triton path only, not
            under torch.compile; the backward waits for the device once.
        rows: [L] int64, >= 0. Position whose drawn negatives each position takes; None: its own, 0..L-1. Of no use
            with given ``negatives``.

    Returns:
        loss [L], float32 (float64 if an input is float64).

    Raises:
        ValueError: shapes, dtypes or devices do not fit; a sparse gradient where there is none; on the CPU also ids
            out of range.

    Under autocast the Triton path rounds the embeddings to autocast's dtype; sums, statistics and the loss are
    float32. The torch path keeps their own dtype.

    Source: Zhai et al. 2024 (arXiv 2402.17152), section 4.1; negatives as in its reference code.
    """
    _common.check_queries_and_table(queries, table)
    length, num_items = queries.shape[0], table.shape[0] - 1
    _common.check_ids("labels", labels, (length,), queries)
    _common.check_positive(temperature=temperature, eps=eps)
    if negatives is None:
        _common.check_positive(num_negatives=num_negatives)
        if seed < 0:
            raise ValueError(f"seed={seed}: expected >= 0")
    else:
        num_negatives = negatives.shape[1] if negatives.ndim == 2 else num_negatives
        _common.check_positive(num_negatives=num_negatives)
        _common.check_ids("negatives", negatives, (length, num_negatives), queries)
    _check_offsets(queries, log_q=(log_q, num_items + 1), label_log_q=(label_log_q, length))
    check_rows(rows, (length,), queries)
    scale = 1.0 / temperature
    dtype = _common.operand_dtype(queries, table)
    choice = choose("sampled_softmax", queries.device, dtype)  # an explicit backend that cannot be met raises
    if sparse_grad and (choice.backend != "triton" or torch.compiler.is_compiling()):
        raise ValueError(f"sparse_grad=True: expected the Triton path outside torch.compile, got {choice}")
    if choice.backend == "triton":
        return torch.ops.hstu.sampled_softmax_triton(
            queries, table, labels, negatives, _detached(log_q), _detached(label_log_q), num_negatives, seed, scale,
            l2_normalize, eps, dtype, _common.deterministic_or(deterministic), sparse_grad, rows,
        )[0]  # fmt: skip
    if negatives is None:
        negatives = torch.ops.hstu.draw_negatives(labels, num_negatives, num_items, seed, rows)
    q, e = _common.prepare(queries, table, l2_normalize, eps)
    offsets = _detached(log_q), _detached(label_log_q)
    return torch.ops.hstu.sampled_softmax(q, e, labels, negatives, scale, *offsets)[0]


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _check_offsets(queries: Tensor, **offsets: tuple[Tensor | None, int]) -> None:
    for name, (value, size) in offsets.items():
        if value is not None and tuple(value.shape) != (size,):
            raise ValueError(f"{name} has shape {list(value.shape)}: expected [{size}]")
        if value is not None and value.device != queries.device:
            raise ValueError(f"{name} is on {value.device}, queries on {queries.device}: expected one device")


@torch.library.custom_op("hstu::draw_negatives", mutates_args=())
def _draw_negatives(
    labels: Tensor, num_negatives: int, num_items: int, seed: int, rows: Tensor | None = None
) -> Tensor:
    return cpu.draw_negatives(labels.shape[0], num_negatives, num_items, seed, labels.device, rows)


@_draw_negatives.register_fake
def _(labels, num_negatives, num_items, seed, rows=None):  # type: ignore[no-untyped-def]
    return labels.new_empty((labels.shape[0], num_negatives), dtype=torch.int32)


@torch.library.custom_op("hstu::sampled_softmax", mutates_args=())
def _sampled_softmax(
    queries: Tensor, table: Tensor, labels: Tensor, negatives: Tensor, scale: float, log_q: Tensor | None = None,
    label_log_q: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _common.check_range_on_cpu("labels", labels, table.shape[0] - 1)
    _common.check_range_on_cpu("negatives", negatives, table.shape[0] - 1)
    with _common.no_autocast(queries.device):
        return cpu.sampled_softmax_fwd(queries, table, labels, negatives, scale, log_q, label_log_q)


@_sampled_softmax.register_fake
def _(queries, table, labels, negatives, scale, log_q=None, label_log_q=None):  # type: ignore[no-untyped-def]
    shape = (negatives.shape[0], negatives.shape[1] + 1)
    return (
        queries.new_empty(queries.shape[0]),
        negatives.new_empty(shape, dtype=torch.int32),
        queries.new_empty(shape),
    )


@torch.library.custom_op("hstu::sampled_softmax_backward", mutates_args=())
def _sampled_softmax_backward(
    grad: Tensor, queries: Tensor, table: Tensor, ids: Tensor, weights: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    with _common.no_autocast(queries.device):
        return cpu.sampled_softmax_bwd(grad, queries, table, ids, weights, scale)


@_sampled_softmax_backward.register_fake
def _(grad, queries, table, ids, weights, scale):  # type: ignore[no-untyped-def]
    return queries.new_empty(queries.shape), table.new_empty(table.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # no zeros for the outputs that nobody sees
    queries, table, _, _, ctx.scale, _, _ = inputs
    ctx.save_for_backward(queries, table, output[1], output[2])


def _backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None, None, None, None, None
    d_queries, d_table = torch.ops.hstu.sampled_softmax_backward(grad, *ctx.saved_tensors, ctx.scale)
    return d_queries, d_table, None, None, None, None, None


_sampled_softmax.register_autograd(_backward, setup_context=_setup_context)


def bank_softmax(
    queries: Tensor,
    table: Tensor,
    labels: Tensor,
    bank_ids: Tensor,
    log_q: Tensor | None = None,
    label_log_q: Tensor | None = None,
    temperature: float = 0.05,
    l2_normalize: bool = True,
    eps: float = 1e-6,
    chunk_mib: float = 64,
    deterministic: bool | None = None,
) -> Tensor:
    """Softmax cross-entropy of each position over its label and one bank of items shared by all positions.

    Args:
        queries: [L, D] floating. Encoder outputs.
        table: [num_items + 1, D] floating. Item embeddings; row 0 is padding.
        labels: [L] int32 or int64, 1..num_items.
        bank_ids: [K] int32 or int64, 1..num_items, repeats allowed; a bank item that equals the position's label
            does not count for that position.
        log_q: [K] floating or None. Subtracted from the bank's logits (a sampling correction); no gradient.
        label_log_q: [L] floating or None. Subtracted from the label's logit; no gradient.
        temperature: > 0. Divides the dot products, not the corrections.
        l2_normalize, eps: as in :func:`sampled_softmax`.
        chunk_mib: > 0. Bound of one [rows, K] block of logits, in MiB; the Triton path has none.
        deterministic: as in :func:`sampled_softmax`.

    Returns:
        loss [L], float32 (float64 if an input is float64).

    Raises:
        ValueError: shapes, dtypes or devices do not fit; on the CPU also ids out of range.

    Source: Bengio and Senecal 2008 (correction); Yi et al. 2019 (in-batch items).
    """
    _common.check_queries_and_table(queries, table)
    _common.check_ids("labels", labels, (queries.shape[0],), queries)
    if bank_ids.ndim != 1 or bank_ids.shape[0] == 0:
        raise ValueError(f"bank_ids has shape {list(bank_ids.shape)}: expected [K] with K >= 1")
    _common.check_ids("bank_ids", bank_ids, (bank_ids.shape[0],), queries)
    _check_offsets(queries, log_q=(log_q, bank_ids.shape[0]), label_log_q=(label_log_q, queries.shape[0]))
    _common.check_positive(temperature=temperature, eps=eps, chunk_mib=chunk_mib)
    choice = choose("sampled_softmax", queries.device, _common.operand_dtype(queries, table))
    if choice.backend == "triton":
        return softmax_blocks(
            queries, table, labels, bank_ids, log_q, label_log_q, temperature, l2_normalize, eps, deterministic
        )
    if not torch.compiler.is_compiling():  # ids are read here, before the rows are looked up
        _common.check_range_on_cpu("labels", labels, table.shape[0] - 1)
        _common.check_range_on_cpu("bank_ids", bank_ids, table.shape[0] - 1)
    dtype = _common.compute_dtype(queries, table)
    # Only the rows that take part are normalised and get a gradient.
    q, bank = _common.prepare(queries, torch.nn.functional.embedding(bank_ids.long(), table), l2_normalize, eps)
    own = torch.nn.functional.embedding(labels.long(), table).to(dtype)
    own = _common.l2_normalize(own, eps) if l2_normalize else own
    positive = (q * own).sum(dim=-1) / temperature  # [L]
    if label_log_q is not None:
        positive = positive - label_log_q.detach().to(dtype)
    bias = None if log_q is None else -log_q.detach().to(dtype)
    return torch.ops.hstu.bank_softmax(q, bank, bias, bank_ids, labels, positive, 1.0 / temperature, chunk_mib)[0]


@torch.library.custom_op("hstu::bank_softmax", mutates_args=())
def _bank_softmax(queries: Tensor, bank: Tensor, bias: Tensor | None, bank_ids: Tensor, labels: Tensor,
                  positive: Tensor, scale: float, chunk_mib: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    with _common.no_autocast(queries.device):
        return cpu.bank_softmax_fwd(queries, bank, bias, bank_ids, labels, positive, scale, chunk_mib)


@_bank_softmax.register_fake
def _(queries, bank, bias, bank_ids, labels, positive, scale, chunk_mib):  # type: ignore[no-untyped-def]
    return torch.empty_like(positive), torch.empty_like(positive)


@torch.library.custom_op("hstu::bank_softmax_backward", mutates_args=())
def _bank_softmax_backward(
    grad: Tensor, queries: Tensor, bank: Tensor, bias: Tensor | None, bank_ids: Tensor, labels: Tensor,
    positive: Tensor, lse: Tensor, scale: float, chunk_mib: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with _common.no_autocast(queries.device):
        return cpu.bank_softmax_bwd(grad, queries, bank, bias, bank_ids, labels, positive, lse, scale, chunk_mib)


@_bank_softmax_backward.register_fake
def _(grad, queries, bank, bias, bank_ids, labels, positive, lse, scale, chunk_mib):  # type: ignore[no-untyped-def]
    return torch.empty_like(queries), torch.empty_like(bank), torch.empty_like(positive)


def _bank_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # no zeros for the outputs that nobody sees
    *tensors, ctx.scale, ctx.chunk_mib = inputs
    ctx.save_for_backward(*tensors, output[1])


def _bank_backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None, None, None, None, None, None
    d_queries, d_bank, d_positive = torch.ops.hstu.bank_softmax_backward(
        grad, *ctx.saved_tensors, ctx.scale, ctx.chunk_mib
    )
    return d_queries, d_bank, None, None, None, d_positive, None, None


_bank_softmax.register_autograd(_bank_backward, setup_context=_bank_setup_context)
