"""What every loss is like, and what it ends with: a weighted mean over the positions of all ranks."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from hstu.distributed import World
from hstu.embedding import ItemTable
from hstu.model.shares import over_ranks, several


class Loss(Protocol):
    """One of the losses."""

    def __call__(
        self, queries: Tensor, labels: Tensor, weights: Tensor | None, table: ItemTable, seed: int,
        rows: Tensor | None = None, world: World | None = None, every: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """This rank's part of the loss, a scalar.

        Args:
            queries: [L, D]. labels: [L]. weights: [L] or None. Of the positions of this rank that count; L may be 0.
            table: of the items.
            seed: of what is drawn, the same on all ranks.
            rows: [L] int64. Places of the positions in the batch of all ranks, by which is drawn; None: 0..L-1.
            world: the ranks; None: only this one. All of them call the loss.
            every: labels of all positions of this rank, those that do not count as well; None: ``labels``.
        """


def check_weights(labels: Tensor, weights: Tensor | None) -> None:
    """Raises ValueError for weights that are not one per position."""
    if weights is not None and weights.shape != labels.shape:
        raise ValueError(f"weights has shape {list(weights.shape)}: expected {list(labels.shape)}, one per position")


def weighted_mean(loss: Tensor, weights: Tensor | None, world: World | None = None) -> Tensor:
    """This rank's part of sum(weights * loss) / sum(weights) in float32 (float64 for float64); without weights of the
    plain mean. 0 where there is no position."""
    dtype = torch.promote_types(loss.dtype, torch.float32)
    if weights is None:
        if loss.shape[0] > 0 and not several(world):
            return loss.mean(dtype=dtype)
        num = over_ranks(torch.full((), loss.shape[0], device=loss.device), world)
        return loss.sum(dtype=dtype) / num.clamp(min=1)
    weights = weights.to(dtype)
    return (loss * weights).sum() / weight_of_all(weights, world)


def weight_of_all(weights: Tensor, world: World | None = None) -> Tensor:
    """Sum over the positions of all ranks, as a divisor: a step in which nothing counts has a loss of 0."""
    return over_ranks(weights.sum(), world).clamp(min=torch.finfo(weights.dtype).tiny)
