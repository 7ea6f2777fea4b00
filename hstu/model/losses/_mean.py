"""The weighted mean that every loss ends with."""

from __future__ import annotations

import torch
from torch import Tensor


def check_weights(labels: Tensor, weights: Tensor | None) -> None:
    """Raises ValueError for an empty batch, or weights that are not one per position."""
    if labels.shape[0] == 0:
        raise ValueError("labels is empty: a loss needs at least one position")
    if weights is not None and weights.shape != labels.shape:
        raise ValueError(f"weights has shape {list(weights.shape)}: expected {list(labels.shape)}, one per position")


def weighted_mean(loss: Tensor, weights: Tensor | None) -> Tensor:
    """sum(weights * loss) / sum(weights) in float32 (float64 for float64); the plain mean without weights."""
    if weights is None:
        return loss.mean(dtype=torch.promote_types(loss.dtype, torch.float32))
    weights = weights.to(torch.promote_types(loss.dtype, torch.float32))
    return (loss * weights).sum() / weights.sum()
