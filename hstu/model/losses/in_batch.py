"""Softmax against the labels of the batch: popular items are negatives as often as they occur."""

from __future__ import annotations

import torch
from torch import Tensor

from hstu.config import LossConfig
from hstu.distributed import World
from hstu.embedding import ItemTable
from hstu.model.losses._mean import Loss, check_weights, weighted_mean


def make_in_batch(config: LossConfig) -> Loss:
    """Label against the labels of all other positions, on all ranks, each as often as it occurs, but copies of it.

    The bank holds every distinct label once, those of positions that do not count too: c copies of an item add
    log c to its logit, which is the same sum. With ``logq_correction`` the log of its frequency, c / L, is
    subtracted from every logit, the label's included (Yi et al. 2019); in the bank, log c cancels against it.
    """

    def loss(
        queries: Tensor, labels: Tensor, weights: Tensor | None, table: ItemTable, seed: int,
        rows: Tensor | None = None, world: World | None = None, every: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        check_weights(labels, weights)
        every = labels if every is None else every
        every = every if world is None else world.gather(every)
        bank_ids, counts = every.unique(return_counts=True)  # ascending
        log_count = counts.float().log()  # [K]
        if config.logq_correction:
            log_frequency = log_count - counts.new_full((), every.shape[0]).float().log()
            log_q, label_log_q = log_frequency - log_count, log_frequency[torch.searchsorted(bank_ids, labels)]
        else:
            log_q, label_log_q = -log_count, None
        losses = table.bank_softmax(queries, labels, bank_ids, log_q, label_log_q, config.temperature)  # [L]
        return weighted_mean(losses, weights, world)

    return loss
