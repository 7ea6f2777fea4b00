"""Public op: validation, custom ops, their fakes and gradients.

Legend: L total events, D model width, V items.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import _common
from kernels._backend import choose
from kernels.linear_cross_entropy import cpu, triton_op


def linear_cross_entropy(
    queries: Tensor,
    table: Tensor,
    labels: Tensor,
    temperature: float = 0.05,
    l2_normalize: bool = True,
    eps: float = 1e-6,
    chunk_mib: float = 64,
    weights: Tensor | None = None,
) -> Tensor:
    """Softmax cross-entropy over all items 1..num_items, with one block of logits in memory at a time.

    Args:
        queries: [L, D] floating. Encoder outputs.
        table: [num_items + 1, D] floating. Item embeddings; row 0 is padding and takes no part.
        labels: [L] int32 or int64, 1..num_items.
        temperature: > 0. Divides the logits.
        l2_normalize: normalise queries and item embeddings first; eps: > 0, lower bound of the norm.
        chunk_mib: > 0. Bound of one [rows, V] block of logits, in MiB (at least one row). The Triton path has no such
            block: its logits stay in registers.
        weights: [L] floating or None; no gradient. With weights the result is one number, the weighted sum, and on
            the torch path the gradients are made in the forward's pass over the logits: one pass less.

    Returns:
        loss [L], or the scalar ``sum(weights * loss)``; float32 (float64 if an input is float64).

    Raises:
        ValueError: shapes, dtypes or devices do not fit; on the CPU also labels out of range.

    Under autocast the Triton path rounds queries and embeddings to autocast's dtype; sums, statistics and the loss are
    float32. The torch path keeps their own dtype. Both are deterministic.
    """
    _common.check_queries_and_table(queries, table)
    _common.check_ids("labels", labels, (queries.shape[0],), queries)
    _common.check_positive(temperature=temperature, eps=eps, chunk_mib=chunk_mib)
    if weights is not None and tuple(weights.shape) != (queries.shape[0],):
        raise ValueError(f"weights has shape {list(weights.shape)}: expected [{queries.shape[0]}]")
    if weights is not None and weights.device != queries.device:
        raise ValueError(f"weights is on {weights.device}, queries on {queries.device}: expected one device")
    # An explicit backend that cannot be met raises.
    choice = choose("linear_cross_entropy", queries.device, _common.operand_dtype(queries, table))
    if choice.backend == "triton":
        loss = triton_op.softmax_blocks(
            queries, table, labels, None, None, None, temperature, l2_normalize, eps, deterministic=True
        )
        return loss if weights is None else (loss * weights.detach().to(loss.dtype)).sum()
    q, e = _common.prepare(queries, table, l2_normalize, eps)
    scale = 1.0 / temperature
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or e.requires_grad)
    if weights is None:
        return torch.ops.hstu.linear_cross_entropy(q, e, labels, scale, chunk_mib)[0]
    weights = weights.detach().to(q.dtype)
    if not needs_grad:
        return torch.ops.hstu.linear_cross_entropy(q, e, labels, scale, chunk_mib)[0] @ weights
    return torch.ops.hstu.linear_cross_entropy_sum(q, e, labels, weights, scale, chunk_mib)[0]


@torch.library.custom_op("hstu::linear_cross_entropy", mutates_args=())
def _op(queries: Tensor, table: Tensor, labels: Tensor, scale: float, chunk_mib: float) -> tuple[Tensor, Tensor]:
    _common.check_range_on_cpu("labels", labels, table.shape[0] - 1)
    with _common.no_autocast(queries.device):
        return cpu.linear_cross_entropy_fwd(queries, table, labels, scale, chunk_mib)


@_op.register_fake
def _(queries, table, labels, scale, chunk_mib):  # type: ignore[no-untyped-def]
    return queries.new_empty(queries.shape[0]), queries.new_empty(queries.shape[0])


@torch.library.custom_op("hstu::linear_cross_entropy_backward", mutates_args=())
def _op_backward(grad: Tensor, queries: Tensor, table: Tensor, labels: Tensor, lse: Tensor, scale: float,
                 chunk_mib: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    with _common.no_autocast(queries.device):
        return cpu.linear_cross_entropy_bwd(grad, queries, table, labels, lse, scale, chunk_mib)


@_op_backward.register_fake
def _(grad, queries, table, labels, lse, scale, chunk_mib):  # type: ignore[no-untyped-def]
    return queries.new_empty(queries.shape), table.new_empty(table.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # no zeros for the outputs that nobody sees
    queries, table, labels, ctx.scale, ctx.chunk_mib = inputs
    ctx.save_for_backward(queries, table, labels, output[1])


def _backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None, None, None
    d_queries, d_table = torch.ops.hstu.linear_cross_entropy_backward(
        grad, *ctx.saved_tensors, ctx.scale, ctx.chunk_mib
    )
    return d_queries, d_table, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("hstu::linear_cross_entropy_sum", mutates_args=())
def _sum_op(queries: Tensor, table: Tensor, labels: Tensor, weights: Tensor, scale: float,
            chunk_mib: float) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _common.check_range_on_cpu("labels", labels, table.shape[0] - 1)
    with _common.no_autocast(queries.device):
        return cpu.linear_cross_entropy_sum(queries, table, labels, weights, scale, chunk_mib)


@_sum_op.register_fake
def _(queries, table, labels, weights, scale, chunk_mib):  # type: ignore[no-untyped-def]
    return queries.new_empty(()), queries.new_empty(queries.shape), table.new_empty(table.shape)


def _sum_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # no zeros for the outputs that nobody sees
    ctx.save_for_backward(output[1], output[2])


def _sum_backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None, None, None, None
    d_queries, d_table = ctx.saved_tensors
    return grad * d_queries, grad * d_table, None, None, None, None


_sum_op.register_autograd(_sum_backward, setup_context=_sum_setup_context)
