"""Sampled softmax with fresh uniform negatives for every position: the published loss (PROTOCOL section 3)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hstu.config import LossConfig
from hstu.embedding import ItemTable
from hstu.model.losses._mean import check_weights, weighted_mean


def make_sampled_softmax(config: LossConfig) -> Callable[[Tensor, Tensor, Tensor | None, ItemTable, int], Tensor]:
    """Label against ``config.num_negatives`` items drawn uniformly with replacement from ``seed``, per position."""

    def loss(queries: Tensor, labels: Tensor, weights: Tensor | None, table: ItemTable, seed: int) -> Tensor:
        check_weights(labels, weights)
        losses = table.sampled_softmax(
            queries, labels, num_negatives=config.num_negatives, seed=seed, temperature=config.temperature
        )  # [L]
        return weighted_mean(losses, weights)

    return loss
