"""Softmax against the labels of the batch: popular items are negatives as often as they occur."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hstu.config import LossConfig
from hstu.embedding import ItemTable
from hstu.model.losses._mean import check_weights, weighted_mean


def make_in_batch(config: LossConfig) -> Callable[[Tensor, Tensor, Tensor | None, ItemTable, int], Tensor]:
    """Label against the labels of all other positions, each as often as it occurs; copies of the label left out.

    The bank holds every distinct label once: c copies of an item add log c to its logit, which is the same
    sum. With ``logq_correction`` the log of its frequency, c / L, is subtracted from every logit, the
    label's included (Yi et al. 2019); in the bank, log c cancels against it.
    """

    def loss(queries: Tensor, labels: Tensor, weights: Tensor | None, table: ItemTable, seed: int) -> Tensor:
        check_weights(labels, weights)
        bank_ids, place, counts = labels.unique(return_inverse=True, return_counts=True)
        log_count = counts.float().log()  # [K]
        if config.logq_correction:
            log_frequency = log_count - counts.new_tensor(labels.shape[0]).float().log()
            log_q, label_log_q = log_frequency - log_count, log_frequency[place]
        else:
            log_q, label_log_q = -log_count, None
        losses = table.bank_softmax(queries, labels, bank_ids, log_q, label_log_q, config.temperature)  # [L]
        return weighted_mean(losses, weights)

    return loss
