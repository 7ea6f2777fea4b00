"""What a step asks of one GPU: tokens, users, and the pairs that attention goes through.

Legend: B users, n a user's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hstu.config_model import ModelConfig
from hstu.plan_config import PlanConfig


@dataclass(frozen=True)
class Workload:
    """What a step asks of one GPU."""

    tokens: float
    users: float
    longest: int
    squares: float
    """Sum over users of n^2."""
    pairs: float
    """Pairs of a token and one that it sees, by the model's mask."""

    @classmethod
    def of_lengths(cls, lengths: Sequence[int] | np.ndarray, model: ModelConfig) -> Workload:
        """Of a real batch; lengths: [B] tokens of each user."""
        n = np.asarray(lengths, dtype=np.float64)
        pairs = float(visible_pairs(n, model).sum())
        return cls(float(n.sum()), len(n), int(n.max()), float((n * n).sum()), pairs)

    @classmethod
    def planned(cls, config: PlanConfig) -> Workload:
        """Of the batch that the config describes."""
        longest, mean, tokens = config.model.max_len, config.mean_len, float(config.batch.tokens_per_gpu)
        users = tokens / mean
        n = np.arange(1, longest + 1, dtype=np.float64)
        share = length_shares(mean, longest)
        square = float(share @ (n * n))
        pairs = float(share @ visible_pairs(n, config.model))
        if config.batch.mean_square_len is not None:
            pairs *= config.batch.mean_square_len / square
            square = config.batch.mean_square_len
        return cls(tokens, users, longest, users * square, users * pairs)


def length_shares(mean: float, longest: int) -> np.ndarray:
    """Share of users with 1..longest tokens, [longest]: of all distributions with this mean the one of most entropy.

    Their shares are proportional to exp(slope * n); the slope is found by bisection.
    """
    n = np.arange(1, longest + 1, dtype=np.float64)

    def shares(slope: float) -> np.ndarray:
        weight = np.exp(slope * n - max(slope, slope * longest))
        return weight / weight.sum()

    low, high = -50.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if shares(middle) @ n < mean else (low, middle)
    return shares((low + high) / 2)


def visible_pairs(n: np.ndarray, model: ModelConfig) -> np.ndarray:
    """Pairs that the mask shows for users of n tokens, [...]: causal, with HSTU's window and full rows."""
    pairs = n * (n + 1) / 2
    window = getattr(model, "window", 0)
    if not window:
        return pairs

    def triangle(x: np.ndarray) -> np.ndarray:
        x = np.maximum(x, 0.0)
        return x * (x + 1) / 2

    return pairs - triangle(n - window - getattr(model, "full_rows", 0))
