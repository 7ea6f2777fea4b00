"""``SiLU(LayerNorm(x) W)``: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_linear_silu_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Arguments as in :func:`kernels.norm_linear_silu.norm_linear_silu`; float32 (float64) accumulation."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = x.to(work)
    centered = wide - wide.mean(-1, keepdim=True)
    normed = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    z = normed @ weight.to(work)
    return (z * torch.sigmoid(z)).to(x.dtype)
