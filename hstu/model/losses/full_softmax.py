"""Softmax over the whole catalogue, computed in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from hstu.config import LossConfig
from hstu.distributed import World
from hstu.embedding import ItemTable
from hstu.model.losses._mean import Loss, check_weights, weight_of_all


def make_full_softmax(config: LossConfig) -> Loss:
    """Label against all items; at most ``config.chunk_mib`` MiB of logits exist at a time. ``seed`` is not used."""

    def loss(
        queries: Tensor, labels: Tensor, weights: Tensor | None, table: ItemTable, seed: int,
        rows: Tensor | None = None, world: World | None = None, every: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        check_weights(labels, weights)
        share = torch.ones_like(labels, dtype=torch.float32) if weights is None else weights.float()
        # The shares are known before the pass, which lets the op make its gradients in the same pass.
        share = share / weight_of_all(share, world)
        return table.full_softmax(queries, labels, config.temperature, config.chunk_mib, share)

    return loss
