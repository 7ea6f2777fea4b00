"""What a step asks of one GPU: tokens, users, and the pairs that attention goes through.

Legend: B users, n a user's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hstu.config_model import ModelConfig
from hstu.planning.config import EVENTS, PlanConfig, TokenForm


@dataclass(frozen=True)
class Workload:
    """What a step asks of one GPU."""

    tokens: float
    users: float
    """Ranking: sequences."""
    longest: int
    """Tokens of the longest user."""
    squares: float
    """Sum over users of n^2."""
    pairs: float
    """Pairs of a token and one that it sees, by the model's mask."""
    events: float
    """Retrieval: the tokens."""
    predicted: float
    """Events at which something is predicted."""

    @classmethod
    def of_lengths(
        cls, lengths: Sequence[int] | np.ndarray, model: ModelConfig, form: TokenForm = EVENTS,
        targets: Sequence[int] | np.ndarray | int = 0,
    ) -> Workload:  # fmt: skip
        """Of a real batch. lengths: [B] events of each user; targets: [B] how many of them a fused form predicts."""
        events = np.asarray(lengths, dtype=np.float64)
        n = form.tokens_of(events)
        predicted = np.sum(targets) if form.is_fused else events.sum()
        pairs = float(visible_pairs(n, model, form, np.asarray(targets, np.float64)).sum())
        return cls(float(n.sum()), len(n), int(n.max()), float((n * n).sum()), pairs, float(events.sum()),
                   float(predicted))  # fmt: skip

    @classmethod
    def planned(cls, config: PlanConfig) -> Workload:
        """Of the batch that the config describes; every event of an interleaved form is predicted."""
        longest, mean, form = config.model.max_len, config.mean_len, config.form
        n = np.arange(1, longest + 1, dtype=np.float64)
        share = length_shares(mean, longest)
        events = n + form.targets
        tokens = form.tokens_of(events)
        users = config.batch.tokens_per_gpu / float(share @ tokens)
        square = float(share @ (tokens * tokens))
        pairs = float(share @ visible_pairs(tokens, config.model, form, np.full(longest, float(form.targets))))
        if config.batch.mean_square_len is not None:
            spread = form.per_event**2 * (config.batch.mean_square_len - float(share @ (n * n)))
            pairs *= (square + spread) / square
            square += spread
        each = float(share @ events)
        predicted = float(form.targets) if form.is_fused else each
        return cls(float(config.batch.tokens_per_gpu), users, int(tokens.max()), users * square, users * pairs,
                   users * each, users * predicted)  # fmt: skip


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


def visible_pairs(
    n: np.ndarray, model: ModelConfig, form: TokenForm = EVENTS, targets: np.ndarray | float = 0.0
) -> np.ndarray:
    """Pairs that the mask shows for users of n tokens, [...]: causal, with HSTU's window and full rows.

    targets: [...] of the n, at the end: each sees the history and itself. In a fused form the prefix sees, and is seen
    by, the whole history.
    """
    history = n - targets
    prefix = np.minimum(form.prefix if form.is_fused else 0, history)
    pairs = history * (history + 1) / 2 + prefix * history - prefix * (prefix + 1) / 2
    window, full_rows = getattr(model, "window", 0), getattr(model, "full_rows", 0)
    seen = history
    if window:
        hidden = np.maximum(history - window - full_rows - prefix, 0.0)
        pairs = pairs - hidden * (hidden + 1) / 2
        seen = history if full_rows else np.minimum(history, window - 1 + prefix)
    return pairs + targets * (seen + 1)
