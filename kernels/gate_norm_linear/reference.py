"""``Dropout(u * norm(av)) W + bias + residual``: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._dropout import keep_scale


def gate_norm_linear_reference(
    av: Tensor, u: Tensor, weight: Tensor, bias: Tensor, residual: Tensor,
    eps: float = 1e-6, dropout: float = 0.0, seed: int | None = None, norm: str = "layer", rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Arguments as in :func:`kernels.gate_norm_linear.gate_norm_linear`; float32 (float64) accumulation."""
    work = torch.float64 if av.dtype == torch.float64 else torch.float32
    wide = av.to(work)
    centered = wide - wide.mean(-1, keepdim=True) if norm == "layer" else wide
    normed = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    gated = u.to(work) * normed
    if seed is not None and dropout > 0:
        gated = gated * keep_scale(gated.shape, dropout, seed, gated, rows)
    return (gated @ weight.to(work) + bias.to(work) + residual.to(work)).to(residual.dtype)
