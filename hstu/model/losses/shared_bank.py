"""Softmax against one bank of K uniformly drawn items that all positions of a step share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hstu.config import LossConfig
from hstu.distributed import World
from hstu.embedding import ItemTable
from hstu.model.losses._mean import Loss, check_weights, weighted_mean
from hstu.transfer import to_device


def draw_bank(num_items: int, size: int, seed: int, device: torch.device) -> Tensor:
    """Uniform ids 1..num_items with replacement, int64 [size], a function of (seed, size, num_items).

    Drawn on the CPU: a few thousand numbers a step, and the same bank on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    return to_device(torch.randint(1, num_items + 1, (size,), generator=generator), device)


def make_shared_bank(config: LossConfig) -> Loss:
    """Label against a bank of ``config.num_negatives`` items; the label's own copies in the bank do not count.

    With ``logq_correction`` the log of how often an item is expected in the bank, K / num_live, is
    subtracted from the bank's logits, so that their sum estimates the sum over the whole catalogue. The
    label is in the sum with certainty: its correction is log 1 = 0. (Subtracting the same number from
    the label as well would cancel for a uniform bank.)
    """

    def loss(
        queries: Tensor, labels: Tensor, weights: Tensor | None, table: ItemTable, seed: int,
        rows: Tensor | None = None, world: World | None = None, every: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        check_weights(labels, weights)
        size = config.num_negatives
        bank_ids = draw_bank(table.num_live, size, seed, labels.device)  # [K]
        log_q = None
        if config.logq_correction:
            expected = math.log(size / table.num_live)
            log_q = torch.full((size,), expected, dtype=torch.float32, device=labels.device)
        losses = table.bank_softmax(queries, labels, bank_ids, log_q, temperature=config.temperature)  # [L]
        return weighted_mean(losses, weights, world)

    return loss
