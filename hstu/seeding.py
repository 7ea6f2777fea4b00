"""Seeds as pure functions of where the run is, so that resuming needs no generator state."""

from __future__ import annotations

import random

import numpy as np
import torch


def derive(*parts: int) -> int:
    """A seed in [0, 2^62) from non-negative integers such as (seed, purpose, step). Distinct parts, distinct seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(2))


def seed_everything(seed: int) -> None:
    """Seeds python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
