"""Public op: validation, one custom op, its fake and its gradient.

Legend: L total events, D model width, W = H*V width of all heads together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels._backend import choose
from kernels._dropout import keep_scale


def gate_norm_linear(
    av: Tensor, u: Tensor, weight: Tensor, bias: Tensor, residual: Tensor,
    eps: float = 1e-6, dropout: float = 0.0, seed: int | None = None,
) -> Tensor:  # fmt: skip
    """``Dropout(u * LayerNorm(av)) W + bias + residual``; the backward recomputes norm, gate and mask.

    Args:
        av: [L, W] floating. Attention output, all heads side by side; normed over W together.
        u: [L, W], same dtype. The gate; strided views are fine.
        weight: [W, D]; bias: [D]. Output projection.
        residual: [L, D]. The layer's input.
        eps: > 0, added to the variance (published: 1e-6). The norm has no affine part.
        dropout: rate in [0, 1).
        seed: >= 0. The mask is a function of it; None: no dropout (evaluation).

    Returns:
        [L, D] in residual's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or the rate do not fit.

    Source: Zhai et al. 2024, equation 3.
    """
    if av.dim() != 2 or u.shape != av.shape:
        raise ValueError(f"av and u: expected the same [L, W], got {list(av.shape)} and {list(u.shape)}")
    if weight.dim() != 2 or weight.shape[0] != av.shape[1] or bias.shape != weight.shape[1:]:
        raise ValueError(
            f"weight [{av.shape[1]}, D] and bias [D]: got {list(weight.shape)} and {list(bias.shape)}"
        )  # fmt: skip
    if residual.shape != (av.shape[0], weight.shape[1]):
        raise ValueError(f"residual: expected {[av.shape[0], weight.shape[1]]}, got {list(residual.shape)}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout={dropout}: expected in [0, 1)")
    if len({t.device for t in (av, u, weight, bias, residual)}) > 1:
        raise ValueError("av, u, weight, bias, residual: expected one device")
    choose("gate_norm_linear", av.device)  # an explicit backend that cannot be met raises
    rate = dropout if seed is not None else 0.0
    return torch.ops.hstu.gate_norm_linear(av, u, weight, bias, residual, eps, rate, seed or 0)


def _gated(normed: Tensor, u: Tensor, rate: float, seed: int) -> tuple[Tensor, Tensor | None]:
    mask = keep_scale(normed.shape, rate, seed, normed) if rate > 0 else None
    gated = normed * u
    return (gated.mul_(mask) if mask is not None else gated), mask


@torch.library.custom_op("hstu::gate_norm_linear", mutates_args=())
def _gate_norm_linear(av: Tensor, u: Tensor, weight: Tensor, bias: Tensor, residual: Tensor,
                      eps: float, rate: float, seed: int) -> Tensor:  # fmt: skip
    normed = torch.nn.functional.layer_norm(av, av.shape[1:], eps=eps)
    gated, _ = _gated(normed, u, rate, seed)
    out = torch.addmm(bias.to(gated.dtype), gated, weight.to(gated.dtype))
    return residual + out.to(residual.dtype)


@_gate_norm_linear.register_fake
def _(av, u, weight, bias, residual, eps, rate, seed):  # type: ignore[no-untyped-def]
    return torch.empty_like(residual)


@torch.library.custom_op("hstu::gate_norm_linear_backward", mutates_args=())
def _gate_norm_linear_backward(
    grad: Tensor, av: Tensor, u: Tensor, weight: Tensor, eps: float, rate: float, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    normed, mean, rstd = torch.native_layer_norm(av, av.shape[1:], None, None, eps)
    gated, mask = _gated(normed, u, rate, seed)
    g = grad.to(gated.dtype)
    d_weight, d_bias = (gated.mT @ g).to(weight.dtype), g.sum(0)
    d_gated = g @ weight.to(g.dtype).mT
    if mask is not None:
        d_gated.mul_(mask)
    d_u = d_gated * normed
    d_av = torch.ops.aten.native_layer_norm_backward(
        d_gated.mul_(u), av, av.shape[1:], mean, rstd, None, None, [True, False, False]
    )[0]
    return d_av, d_u, d_weight, d_bias


@_gate_norm_linear_backward.register_fake
def _(grad, av, u, weight, eps, rate, seed):  # type: ignore[no-untyped-def]
    return torch.empty_like(av), av.new_empty(u.shape), torch.empty_like(weight), av.new_empty(weight.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    av, u, weight, bias, _, ctx.eps, ctx.rate, ctx.seed = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(av, u, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    d_av, d_u, d_weight, d_bias = torch.ops.hstu.gate_norm_linear_backward(
        grad, *ctx.saved_tensors, ctx.eps, ctx.rate, ctx.seed
    )
    return d_av, d_u, d_weight, d_bias.to(ctx.bias_dtype), grad, None, None, None


_gate_norm_linear.register_autograd(_backward, setup_context=_setup_context)
