"""Public op: validation, one custom op, its fake and its gradient.

Legend: L total events, D model width, O output width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels._backend import choose
from kernels._common import no_autocast
from kernels._projection import check_norm, product_dtype
from kernels.norm_linear_silu.cpu import norm_linear_silu_torch, norm_linear_silu_torch_backward


def norm_linear_silu(
    x: Tensor, weight: Tensor, eps: float = 1e-6, norm: str = "layer", silu_columns: tuple[int, int] | None = None
) -> Tensor:
    """``SiLU(norm(x) W)`` in one op; the backward keeps only x and W and recomputes the rest.

    The norm runs in float32. The product runs in x's dtype, W being cast to it; under autocast both are cast to
    autocast's dtype (x after the norm) and the result has it.

    Args:
        x: [L, D] floating.
        weight: [D, O] floating. Projection to u, v, q, k side by side.
        eps: > 0, added to the variance (published: 1e-6). The norm has no affine part, the projection no bias.
        norm: ``layer`` (LayerNorm, published) or ``rms`` (RMSNorm: no mean subtracted).
        silu_columns: (first, last exclusive) of the columns that pass through SiLU; the others stay linear. None:
            all (published). ``(0, width of u)``: u alone.

    Returns:
        [L, O] in x's dtype; under autocast in autocast's.

    Raises:
        ValueError: shapes, dtypes, devices, the norm or the columns do not fit.

    Source: Zhai et al. 2024, equation 1; norm as in the reference code.
    """
    if x.dim() != 2 or weight.dim() != 2 or weight.shape[0] != x.shape[1]:
        raise ValueError(f"x [L, D] and weight [D, O]: got {list(x.shape)} and {list(weight.shape)}")
    if not x.is_floating_point() or not weight.is_floating_point() or x.device != weight.device:
        raise ValueError(
            f"x and weight: expected floating on one device, got {x.dtype} {x.device}, {weight.dtype} {weight.device}"
        )
    check_norm(norm, eps)
    start, stop = (0, weight.shape[1]) if silu_columns is None else silu_columns
    if not 0 <= start <= stop <= weight.shape[1]:
        raise ValueError(f"silu_columns={silu_columns}: expected 0 <= first <= last <= {weight.shape[1]}")
    triton = choose("norm_linear_silu", x.device, x.dtype).backend == "triton"
    return torch.ops.hstu.norm_linear_silu(x, weight, eps, norm == "rms", start, stop, product_dtype(x), triton)


@torch.library.custom_op("hstu::norm_linear_silu", mutates_args=())
def _norm_linear_silu(
    x: Tensor, weight: Tensor, eps: float, rms: bool, silu_start: int, silu_stop: int, dtype: torch.dtype, triton: bool
) -> Tensor:
    with no_autocast(x.device):
        if triton:
            from kernels.norm_linear_silu.kernel import norm_linear_silu_fwd

            return norm_linear_silu_fwd(x, weight, eps, rms, (silu_start, silu_stop), dtype)
        return norm_linear_silu_torch(x, weight, eps, rms, (silu_start, silu_stop), dtype)


@_norm_linear_silu.register_fake
def _(x, weight, eps, rms, silu_start, silu_stop, dtype, triton):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight.shape[1], dtype=dtype)


@torch.library.custom_op("hstu::norm_linear_silu_backward", mutates_args=())
def _norm_linear_silu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, rms: bool, silu_start: int, silu_stop: int, triton: bool
) -> tuple[Tensor, Tensor]:
    with no_autocast(x.device):
        if triton:
            from kernels.norm_linear_silu.kernel import norm_linear_silu_bwd

            return norm_linear_silu_bwd(grad, x, weight, eps, rms, (silu_start, silu_stop))
        return norm_linear_silu_torch_backward(grad, x, weight, eps, rms, (silu_start, silu_stop))


@_norm_linear_silu_backward.register_fake
def _(grad, x, weight, eps, rms, silu_start, silu_stop, triton):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *ctx.rest, _, ctx.triton = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gradients = torch.ops.hstu.norm_linear_silu_backward(grad, *ctx.saved_tensors, *ctx.rest, ctx.triton)
    return *gradients, *[None] * 6


_norm_linear_silu.register_autograd(_backward, setup_context=_setup_context)
