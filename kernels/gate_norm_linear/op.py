"""Public op: validation, one custom op, its fake and its gradient.

Legend: L total events, D model width, W = H*V width of all heads together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels._backend import choose
from kernels._common import no_autocast
from kernels._dropout import check_rows
from kernels._projection import check_norm, product_dtype
from kernels.gate_norm_linear.cpu import gate_norm_linear_torch, gate_norm_linear_torch_backward


def gate_norm_linear(
    av: Tensor, u: Tensor, weight: Tensor, bias: Tensor, residual: Tensor,
    eps: float = 1e-6, dropout: float = 0.0, seed: int | None = None, norm: str = "layer", rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``Dropout(u * norm(av)) W + bias + residual``; the backward recomputes norm, gate and mask.

    Norm and gate run in float32. The product runs in av's dtype, or autocast's where it is on, W being cast to it;
    bias and residual are added in float32 on Triton.

    Args:
        av: [L, W] floating. Attention output, all heads side by side; normed over W together.
        u: [L, W], same dtype. The gate; strided views are fine.
        weight: [W, D]; bias: [D]. Output projection.
        residual: [L, D]. The layer's input.
        eps: > 0, added to the variance (published: 1e-6). The norm has no affine part.
        dropout: rate in [0, 1).
        seed: >= 0. The mask is a function of it; None: no dropout (evaluation).
        norm: ``layer`` (LayerNorm, published) or ``rms`` (RMSNorm: no mean subtracted).
        rows: [L] int64, >= 0. Row whose mask each row takes; None: its own, 0..L-1.

    Returns:
        [L, D] in residual's dtype.

    Raises:
        ValueError: shapes, dtypes, devices, the norm, the rate or the rows do not fit.

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
    check_norm(norm, eps)
    check_rows(rows, (av.shape[0],), av)
    tensors = {"av": av, "u": u, "weight": weight, "bias": bias, "residual": residual}
    if len({t.device for t in tensors.values()}) > 1:
        raise ValueError("av, u, weight, bias, residual: expected one device")
    for name, t in tensors.items():
        if not t.is_floating_point():
            raise ValueError(f"{name} has dtype {t.dtype}: expected a floating dtype")
    triton = choose("gate_norm_linear", av.device, av.dtype).backend == "triton"
    rate = dropout if seed is not None else 0.0
    return torch.ops.hstu.gate_norm_linear(
        av, u, weight, bias, residual, eps, norm == "rms", rate, seed or 0, product_dtype(av), triton, rows
    )


@torch.library.custom_op("hstu::gate_norm_linear", mutates_args=())
def _gate_norm_linear(
    av: Tensor, u: Tensor, weight: Tensor, bias: Tensor, residual: Tensor,
    eps: float, rms: bool, rate: float, seed: int, dtype: torch.dtype, triton: bool, rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    with no_autocast(av.device):
        if triton:
            from kernels.gate_norm_linear.kernel import gate_norm_linear_fwd

            return gate_norm_linear_fwd(av, u, weight, bias, residual, eps, rms, rate, seed, dtype, rows)
        return gate_norm_linear_torch(av, u, weight, bias, residual, eps, rms, rate, seed, dtype, rows)


@_gate_norm_linear.register_fake
def _(av, u, weight, bias, residual, eps, rms, rate, seed, dtype, triton, rows=None):  # type: ignore[no-untyped-def]
    return residual.new_empty(residual.shape)


@torch.library.custom_op("hstu::gate_norm_linear_backward", mutates_args=())
def _gate_norm_linear_backward(
    grad: Tensor, av: Tensor, u: Tensor, weight: Tensor,
    eps: float, rms: bool, rate: float, seed: int, dtype: torch.dtype, triton: bool, rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with no_autocast(av.device):
        if triton:
            from kernels.gate_norm_linear.kernel import gate_norm_linear_bwd

            return gate_norm_linear_bwd(grad, av, u, weight, eps, rms, rate, seed, dtype, rows)
        return gate_norm_linear_torch_backward(grad, av, u, weight, eps, rms, rate, seed, dtype, rows)


@_gate_norm_linear_backward.register_fake
def _(grad, av, u, weight, eps, rms, rate, seed, dtype, triton, rows=None):  # type: ignore[no-untyped-def]
    d_weight, d_bias = weight.new_empty(weight.shape), weight.new_empty(weight.shape[1])
    return av.new_empty(av.shape), u.new_empty(u.shape), d_weight, d_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    av, u, weight, bias, _, *ctx.rest, rows = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(av, u, weight, rows)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *tensors, rows = ctx.saved_tensors
    d_av, d_u, d_weight, d_bias = torch.ops.hstu.gate_norm_linear_backward(grad, *tensors, *ctx.rest, rows)
    return d_av, d_u, d_weight, d_bias.to(ctx.bias_dtype), grad, *[None] * 7


_gate_norm_linear.register_autograd(_backward, setup_context=_setup_context)
