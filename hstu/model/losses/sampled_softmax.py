"""Sampled softmax with fresh uniform negatives for every position: the published loss (PROTOCOL section 3)."""

from __future__ import annotations

from torch import Tensor

from hstu.config import LossConfig
from hstu.distributed import World
from hstu.embedding import ItemTable
from hstu.model.losses._mean import Loss, check_weights, weighted_mean
from hstu.model.mixture import MixtureTable
from hstu.model.shares import split_evenly


def make_sampled_softmax(config: LossConfig) -> Loss:
    """Label against ``config.num_negatives`` items drawn uniformly with replacement from ``seed``, per position."""

    def loss(
        queries: Tensor, labels: Tensor, weights: Tensor | None, table: ItemTable, seed: int,
        rows: Tensor | None = None, world: World | None = None, every: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        check_weights(labels, weights)
        extra = None
        if isinstance(table, MixtureTable):
            losses, extra = table.loss_parts(
                queries, labels, None, config.num_negatives, seed, config.temperature, rows, world
            )
        else:
            losses = table.sampled_softmax(
                queries, labels, None, config.num_negatives, seed, config.temperature, rows
            )  # [L]
        mean = weighted_mean(losses, weights, world)
        return mean if extra is None else mean + split_evenly(extra, world)

    return loss
