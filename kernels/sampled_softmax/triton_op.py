"""Custom op of the Triton path of :func:`kernels.sampled_softmax.sampled_softmax`: fake, gradient, sparse gradient.

It takes the raw queries and the raw table: normalisation and its gradient are in the kernels. Triton is imported when
the op runs, not when this file is.

Legend: L total events, D model width, R negatives per position, V rows of the table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import _common


def _check_ranges(labels: Tensor, negatives: Tensor | None, table: Tensor) -> None:
    _common.check_range_on_cpu("labels", labels, table.shape[0] - 1)
    if negatives is not None:
        _common.check_range_on_cpu("negatives", negatives, table.shape[0] - 1)


@torch.library.custom_op("hstu::sampled_softmax_triton", mutates_args=())
def _op(
    queries: Tensor, table: Tensor, labels: Tensor, negatives: Tensor | None, log_q: Tensor | None,
    label_log_q: Tensor | None, num_negatives: int, seed: int, scale: float, normalize: bool, eps: float,
    dtype: torch.dtype, deterministic: bool, sparse: bool, rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss [L] and the log2 of the sum of the exponentials [L]; see :func:`sampled_softmax` for the arguments."""
    from kernels.sampled_softmax.kernel import Draws, sampled_softmax_fwd

    _check_ranges(labels, negatives, table)
    draws = Draws(negatives, num_negatives, seed, rows)
    table = _common.rounded(table, dtype)  # fewer bytes to gather; queries are read once
    return sampled_softmax_fwd(queries, table, labels, draws, log_q, label_log_q, scale, normalize, eps)


@_op.register_fake
def _(queries, table, labels, *rest):  # type: ignore[no-untyped-def]
    shape = (queries.shape[0],)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("hstu::sampled_softmax_triton_backward", mutates_args=())
def _op_backward(
    grad: Tensor, queries: Tensor, table: Tensor, labels: Tensor, negatives: Tensor | None, log_q: Tensor | None,
    lse: Tensor, num_negatives: int, seed: int, scale: float, normalize: bool, eps: float, dtype: torch.dtype,
    deterministic: bool, rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from kernels.sampled_softmax.kernel import Draws, finish, sampled_softmax_bwd

    draws = Draws(negatives, num_negatives, seed, rows)
    rounded = _common.rounded(table, dtype)
    d_queries, sums, quantum = sampled_softmax_bwd(
        grad, queries, rounded, labels, draws, log_q, lse, scale, normalize, eps, deterministic
    )
    return d_queries, finish(sums, quantum, rounded, normalize, eps, table.dtype)


@_op_backward.register_fake
def _(grad, queries, table, *rest):  # type: ignore[no-untyped-def]
    return queries.new_empty(queries.shape), table.new_empty(table.shape)


def _sparse_backward(
    grad: Tensor, queries: Tensor, table: Tensor, labels: Tensor, negatives: Tensor | None, log_q: Tensor | None,
    lse: Tensor, num_negatives: int, seed: int, scale: float, normalize: bool, eps: float, dtype: torch.dtype,
    deterministic: bool, rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same with the table's gradient as a coalesced sparse tensor; waits for the device to count its rows."""
    from kernels.sampled_softmax.kernel import Draws, finish, sampled_softmax_bwd, touched

    draws = Draws(negatives, num_negatives, seed, rows)
    rounded = _common.rounded(table, dtype)
    marks = touched(labels, draws, table.shape[0])
    ids = marks.nonzero()[:, 0]  # ascending; the one wait
    slots = marks.cumsum(0, dtype=torch.int32) - 1
    d_queries, sums, quantum = sampled_softmax_bwd(
        grad, queries, rounded, labels, draws, log_q, lse, scale, normalize, eps, deterministic, slots, ids.shape[0],
    )  # fmt: skip
    values = finish(sums, quantum, rounded, normalize, eps, table.dtype, ids)
    d_table = torch.sparse_coo_tensor(ids[None], values, table.shape, is_coalesced=True, check_invariants=False)
    return d_queries, d_table


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # no zeros for the output that nobody sees
    queries, table, labels, negatives, log_q, _, *ctx.options, ctx.sparse, rows = inputs
    ctx.save_for_backward(queries, table, labels, negatives, log_q, output[1], rows)


def _backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    nothing = (None,) * 13
    if grad is None:
        return (None, None, *nothing)
    backward: Any = _sparse_backward if ctx.sparse else torch.ops.hstu.sampled_softmax_triton_backward
    *tensors, rows = ctx.saved_tensors
    return (*backward(grad, *tensors, *ctx.options, rows), *nothing)


_op.register_autograd(_backward, setup_context=_setup_context)
