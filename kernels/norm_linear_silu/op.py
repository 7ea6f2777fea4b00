"""Public op: validation, one custom op, its fake and its gradient.

Legend: L total events, D model width, O output width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels._backend import choose


def norm_linear_silu(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """``SiLU(LayerNorm(x) W)`` in one op; the backward keeps only x and W and recomputes the rest.

    Args:
        x: [L, D] floating.
        weight: [D, O]. Projection to u, v, q, k side by side.
        eps: > 0, added to the variance (published: 1e-6). The norm has no affine part, the projection no bias.

    Returns:
        [L, O] in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Source: Zhai et al. 2024, equation 1; norm as in the reference code.
    """
    if x.dim() != 2 or weight.dim() != 2 or weight.shape[0] != x.shape[1]:
        raise ValueError(f"x [L, D] and weight [D, O]: got {list(x.shape)} and {list(weight.shape)}")
    if not x.is_floating_point() or x.device != weight.device:
        raise ValueError(f"x and weight: expected floating on one device, got {x.dtype} {x.device}, {weight.device}")
    if not eps > 0:
        raise ValueError(f"eps={eps}: expected > 0")
    choose("norm_linear_silu", x.device)  # an explicit backend that cannot be met raises
    return torch.ops.hstu.norm_linear_silu(x, weight, eps)


@torch.library.custom_op("hstu::norm_linear_silu", mutates_args=())
def _norm_linear_silu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    normed = torch.nn.functional.layer_norm(x, x.shape[1:], eps=eps)
    return torch.nn.functional.silu(normed @ weight.to(x.dtype), inplace=True)


@_norm_linear_silu.register_fake
def _(x, weight, eps):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("hstu::norm_linear_silu_backward", mutates_args=())
def _norm_linear_silu_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    cast = weight.to(x.dtype)
    normed, mean, rstd = torch.native_layer_norm(x, x.shape[1:], None, None, eps)
    d_z = torch.ops.aten.silu_backward(grad.contiguous(), normed @ cast)
    d_weight = (normed.mT @ d_z).to(weight.dtype)
    d_x = torch.ops.aten.native_layer_norm_backward(
        d_z @ cast.mT, x, x.shape[1:], mean, rstd, None, None, [True, False, False]
    )[0]
    return d_x, d_weight


@_norm_linear_silu_backward.register_fake
def _(grad, x, weight, eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *torch.ops.hstu.norm_linear_silu_backward(grad, *ctx.saved_tensors, ctx.eps), None


_norm_linear_silu.register_autograd(_backward, setup_context=_setup_context)
