"""Retrieval losses: each one file and one config entry.

A loss is a :class:`~hstu.model.losses._mean.Loss`: the weighted mean over the positions of all ranks, in float32, or
this rank's part of it. It is a pure function of its arguments and of those of the other ranks.
"""

from __future__ import annotations

from collections.abc import Callable

from hstu.config import LossConfig
from hstu.model.losses._mean import Loss
from hstu.model.losses.full_softmax import make_full_softmax
from hstu.model.losses.in_batch import make_in_batch
from hstu.model.losses.sampled_softmax import make_sampled_softmax
from hstu.model.losses.shared_bank import make_shared_bank

LOSSES: dict[str, Callable[[LossConfig], Loss]] = {
    "sampled_softmax": make_sampled_softmax,
    "shared_bank": make_shared_bank,
    "in_batch": make_in_batch,
    "full_softmax": make_full_softmax,
}


def make_loss(config: LossConfig) -> Loss:
    """The loss that ``config.name`` picks.

    Raises ValueError for an unknown name.
    """
    if config.name not in LOSSES:
        raise ValueError(f"loss.name={config.name!r}: expected one of {', '.join(LOSSES)}")
    return LOSSES[config.name](config)
