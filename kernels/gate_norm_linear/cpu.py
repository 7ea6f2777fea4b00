"""Plain torch, any device: norm, gate, mask, one product; the backward computes norm, gate and mask again."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._dropout import keep_scale
from kernels._projection import mm_to, norm_rows, norm_rows_backward


def _gated(normed: Tensor, u: Tensor, rate: float, seed: int, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
    mask = keep_scale(normed.shape, rate, seed, normed, rows) if rate > 0 else None
    gated = normed * u
    return (gated.mul_(mask) if mask is not None else gated), mask


def gate_norm_linear_torch(
    av: Tensor, u: Tensor, weight: Tensor, bias: Tensor, residual: Tensor,
    eps: float, rms: bool, rate: float, seed: int, dtype: torch.dtype, rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y [L, D] in residual's dtype. dtype: of the product."""
    gated, _ = _gated(norm_rows(av, eps, rms)[0], u, rate, seed, rows)
    out = torch.addmm(bias.to(dtype), gated.to(dtype), weight.to(dtype))
    return residual + out.to(residual.dtype)


def gate_norm_linear_torch_backward(
    grad: Tensor, av: Tensor, u: Tensor, weight: Tensor,
    eps: float, rms: bool, rate: float, seed: int, dtype: torch.dtype, rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of av, u and weight in their dtypes, and of the bias in weight's."""
    normed, mean, rstd = norm_rows(av, eps, rms)
    gated, mask = _gated(normed, u, rate, seed, rows)
    g = grad.to(dtype)
    d_weight, d_bias = mm_to(gated.to(dtype).mT, g, weight.dtype), g.sum(0).to(weight.dtype)
    d_gated = (g @ weight.to(dtype).mT).to(gated.dtype)
    if mask is not None:
        d_gated.mul_(mask)
    d_u = (d_gated * normed).to(u.dtype)
    return norm_rows_backward(d_gated.mul_(u), av, mean, rstd, rms), d_u, d_weight, d_bias
