"""``SiLU(norm(x) W)``: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_linear_silu_reference(
    x: Tensor, weight: Tensor, eps: float = 1e-6, norm: str = "layer", silu_columns: tuple[int, int] | None = None
) -> Tensor:
    """Arguments as in :func:`kernels.norm_linear_silu.norm_linear_silu`; float32 (float64) accumulation."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = x.to(work)
    centered = wide - wide.mean(-1, keepdim=True) if norm == "layer" else wide
    normed = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    z = normed @ weight.to(work)  # [L, O]
    start, stop = (0, z.shape[1]) if silu_columns is None else silu_columns
    columns = torch.arange(z.shape[1], device=z.device)
    active = (columns >= start) & (columns < stop)
    return torch.where(active, z * torch.sigmoid(z), z).to(x.dtype)
