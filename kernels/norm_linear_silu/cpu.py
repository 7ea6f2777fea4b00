"""Plain torch, any device: norm, one product, SiLU in place; the backward computes norm and product again."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._projection import mm_to, norm_rows, norm_rows_backward


def norm_linear_silu_torch(
    x: Tensor, weight: Tensor, eps: float, rms: bool, silu: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """y [L, O] in ``dtype``. silu: first and last (exclusive) column of the SiLU."""
    y = norm_rows(x, eps, rms)[0].to(dtype) @ weight.to(dtype)
    torch.nn.functional.silu(y[:, slice(*silu)], inplace=True)
    return y


def norm_linear_silu_torch_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, rms: bool, silu: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, in their dtypes. grad: [L, O] in the product's dtype."""
    cast, active = weight.to(grad.dtype), slice(*silu)
    normed, mean, rstd = norm_rows(x, eps, rms)
    taken = normed.to(grad.dtype)
    if silu == (0, weight.shape[1]):
        d_z = torch.ops.aten.silu_backward(grad.contiguous(), taken @ cast)
    else:
        d_z = grad.clone(memory_format=torch.contiguous_format)
        d_z[:, active] = torch.ops.aten.silu_backward(grad[:, active], taken @ cast[:, active])
    d_weight = mm_to(taken.mT, d_z, weight.dtype)
    return norm_rows_backward(d_z @ cast.mT, x, mean, rstd, rms), d_weight
