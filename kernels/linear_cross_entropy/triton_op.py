"""Custom op of the Triton path, for the whole table and for a bank of items: fake and gradient.

It takes raw queries and the raw table: normalisation and its gradient are in the kernels. Triton is imported when the
op runs, not when this file is.

Legend: L total events, D model width, V rows of the table, K items of a bank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import _common


@torch.library.custom_op("hstu::softmax_blocks", mutates_args=())
def _op(
    queries: Tensor, table: Tensor, labels: Tensor, ids: Tensor | None, log_q: Tensor | None,
    label_log_q: Tensor | None, scale: float, normalize: bool, eps: float, dtype: torch.dtype, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss [L], log2 of the sum of the exponentials [L], signed inverse norms of the queries [L] and the table [V].

    ids: [K], the bank; None: all items. The others as in the public ops.
    """
    from kernels.linear_cross_entropy.kernel import problem, softmax_blocks_fwd

    _common.check_range_on_cpu("labels", labels, table.shape[0] - 1)
    if ids is not None:
        _common.check_range_on_cpu("bank_ids", ids, table.shape[0] - 1)
    queries, table = _common.rounded(queries, dtype), _common.rounded(table, dtype)
    return softmax_blocks_fwd(problem(queries, table, labels, ids, log_q, label_log_q, scale, normalize, eps, dtype))


@_op.register_fake
def _(queries, table, labels, ids, log_q, label_log_q, scale, normalize, eps, dtype, deterministic):  # type: ignore[no-untyped-def]
    length, rows = queries.shape[0], table.shape[0]
    sizes = (length, length, length if normalize else 0, rows if normalize else 0)
    return tuple(queries.new_empty(size, dtype=torch.float32) for size in sizes)


@torch.library.custom_op("hstu::softmax_blocks_backward", mutates_args=())
def _op_backward(
    grad: Tensor, queries: Tensor, table: Tensor, labels: Tensor, ids: Tensor | None, log_q: Tensor | None,
    loss: Tensor, lse: Tensor, inverse_q: Tensor, inverse_e: Tensor, scale: float, normalize: bool, eps: float,
    dtype: torch.dtype, deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from kernels.linear_cross_entropy.kernel import problem, softmax_blocks_bwd

    narrow = _common.rounded(queries, dtype), _common.rounded(table, dtype)
    return softmax_blocks_bwd(
        problem(*narrow, labels, ids, log_q, None, scale, normalize, eps, dtype), grad, loss, lse, inverse_q,
        inverse_e, deterministic, queries.dtype, table.dtype,
    )  # fmt: skip


@_op_backward.register_fake
def _(grad, queries, table, *rest):  # type: ignore[no-untyped-def]
    return queries.new_empty(queries.shape), table.new_empty(table.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # no zeros for the outputs that nobody sees
    queries, table, labels, ids, log_q, _, *ctx.options = inputs
    ctx.save_for_backward(queries, table, labels, ids, log_q, *output)


def _backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    nothing = (None,) * 9
    if grad is None:
        return (None, None, *nothing)
    return (*torch.ops.hstu.softmax_blocks_backward(grad, *ctx.saved_tensors, *ctx.options), *nothing)


_op.register_autograd(_backward, setup_context=_setup_context)


def softmax_blocks(
    queries: Tensor, table: Tensor, labels: Tensor, ids: Tensor | None, log_q: Tensor | None,
    label_log_q: Tensor | None, temperature: float, normalize: bool, eps: float, deterministic: bool | None,
) -> Tensor:  # fmt: skip
    """Loss [L] float32; inputs as the public ops have checked them."""
    log_q, label_log_q = (None if x is None else x.detach() for x in (log_q, label_log_q))
    return torch.ops.hstu.softmax_blocks(
        queries, table, labels, ids, log_q, label_log_q, 1.0 / temperature, normalize, eps,
        _common.operand_dtype(queries, table), _common.deterministic_or(deterministic),
    )[0]  # fmt: skip
