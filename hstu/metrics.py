"""Ranking metrics from exact ranks: HR, NDCG and MRR, bootstrap intervals, breakdowns.

A rank is ``1 + (candidates that score higher) + (other candidates with an equal score) / 2``, so it may end
in .5. With one relevant item per ranking (PROTOCOL section 4):

    HR@K = [rank <= K]      NDCG@K = [rank <= K] / log2(rank + 1)      MRR = 1 / rank

Legend: ``M`` rankings (targets), ``C`` metrics, ``U`` users with at least one ranking.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

DAY_S = 86_400

LENGTH_EDGES = (1, 5, 10, 20, 50, 100, 200, 500)
POPULARITY_EDGES = (0, 1, 10, 50, 200, 1000)
GAP_EDGES_S = (0, 1, 60, 3600, DAY_S, 7 * DAY_S, 30 * DAY_S)
GAP_NAMES = ("same second", "< 1 min", "< 1 h", "< 1 day", "< 1 week", "< 30 days", ">= 30 days")


def metric_names(ks: Sequence[int]) -> list[str]:
    """Names in table order: ``hr@K`` and ``ndcg@K`` for every K ascending, then ``mrr``."""
    return [f"{name}@{k}" for k in sorted(set(ks)) for name in ("hr", "ndcg")] + ["mrr"]


def metric_values(ranks: np.ndarray, ks: Sequence[int]) -> np.ndarray:
    """Value of every metric for every ranking, float64 [M, C] with the columns of :func:`metric_names`.

    ranks: [M] float, >= 1.
    ks: cut-offs, each >= 1.

    Raises ValueError for a rank below 1 or not finite: such a rank comes from scores that are no numbers.
    """
    ranks = np.asarray(ranks, dtype=np.float64)
    if not np.all(np.isfinite(ranks) & (ranks >= 1.0)):
        bad = ranks[~(np.isfinite(ranks) & (ranks >= 1.0))][0]
        raise ValueError(f"ranks contains {bad}: expected finite values >= 1")
    gain = 1.0 / np.log2(ranks + 1.0)  # [M]
    columns = []
    for k in sorted(set(ks)):
        hit = ranks <= k
        columns += [hit.astype(np.float64), np.where(hit, gain, 0.0)]
    return np.stack([*columns, 1.0 / ranks], axis=1)  # [M, C]


def summarize(ranks: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """Mean of every metric over the rankings; NaN where there is no ranking at all."""
    values = metric_values(ranks, ks)
    means = values.mean(axis=0) if len(values) else np.full(values.shape[1], np.nan)
    return dict(zip(metric_names(ks), means.tolist(), strict=True))


def bootstrap(
    ranks: np.ndarray,
    users: np.ndarray,
    ks: Sequence[int],
    resamples: int,
    seed: int = 0,
    confidence: float = 0.95,
    block_mib: int = 64,
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals over users: whole users are drawn, with all their rankings.

    ranks: [M]; users: [M], the user of each ranking (a user with several rankings is drawn as one).
    resamples: number of draws of U users with replacement; 0 returns an empty dict.
    block_mib: bound of the memory for the draws held at once.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    values = metric_values(ranks, ks)
    if resamples == 0 or len(values) == 0:
        return {}
    _, code = np.unique(np.asarray(users), return_inverse=True)
    num_users = int(code.max()) + 1
    # Per user: the sum of each metric, and the number of rankings in the last column.
    stacked = np.concatenate([values, np.ones((len(values), 1))], axis=1)  # [M, C+1]
    sums = np.stack([np.bincount(code, weights=c, minlength=num_users) for c in stacked.T], axis=1)  # [U, C+1]
    means = []
    for times in resampled_counts(num_users, resamples, seed, block_mib):
        totals = times @ sums  # [rows, C+1]
        means.append(totals[:, :-1] / totals[:, -1:])
    tail = 100.0 * (1.0 - confidence) / 2.0
    low, high = np.percentile(np.concatenate(means), [tail, 100.0 - tail], axis=0)
    return {n: (float(a), float(b)) for n, a, b in zip(metric_names(ks), low, high, strict=True)}


def resampled_counts(num_users: int, resamples: int, seed: int, block_mib: int) -> Iterator[np.ndarray]:
    """How often each user is drawn: ``resamples`` draws of U users with replacement, in blocks float64 [rows, U].

    block_mib: bound of the memory of one block; the draws do not depend on it.
    """
    rng = np.random.default_rng(seed)
    block = max(1, block_mib * 2**20 // (16 * num_users))
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        draws = rng.integers(0, num_users, size=(rows, num_users))  # [rows, U]
        draws += np.arange(rows)[:, None] * num_users
        yield np.bincount(draws.ravel(), minlength=rows * num_users).reshape(rows, num_users).astype(np.float64)


@dataclass
class Group:
    """Metrics of one part of the rankings."""

    name: str
    count: int
    metrics: dict[str, float]


def breakdown(
    ranks: np.ndarray, values: np.ndarray, edges: Sequence[float], names: Sequence[str], ks: Sequence[int]
) -> list[Group]:
    """Metrics for each range of ``values``: group ``g`` holds ``edges[g] <= value < edges[g + 1]``, the last is open.

    ranks, values: [M]. Groups without a ranking are left out; a value below ``edges[0]`` raises ValueError.
    """
    code = np.searchsorted(np.asarray(edges), np.asarray(values), side="right") - 1
    if np.any(code < 0):
        raise ValueError(f"value {np.asarray(values)[code < 0][0]} is below the first edge {edges[0]}")
    groups = []
    for g, name in enumerate(names):
        inside = code == g
        if inside.any():
            groups.append(Group(name, int(inside.sum()), summarize(np.asarray(ranks)[inside], ks)))
    return groups


def range_names(edges: Sequence[int]) -> list[str]:
    """``(1, 5, 10)`` -> ``["1-4", "5-9", "10+"]``."""
    closed = [str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in zip(edges, edges[1:], strict=False)]
    return [*closed, f"{edges[-1]}+"]


def breakdowns(
    ranks: np.ndarray, history_len: np.ndarray, target_count: np.ndarray, time_gap_s: np.ndarray, ks: Sequence[int]
) -> dict[str, list[Group]]:
    """The three standard breakdowns.

    history_len: [M] events before the target; target_count: [M] training events of the target item;
    time_gap_s: [M] s, time of the target minus time of the last event of its history (>= 0).
    """
    return {
        "history length": breakdown(ranks, history_len, LENGTH_EDGES, range_names(LENGTH_EDGES), ks),
        "item popularity": breakdown(ranks, target_count, POPULARITY_EDGES, range_names(POPULARITY_EDGES), ks),
        "time gap": breakdown(ranks, time_gap_s, GAP_EDGES_S, GAP_NAMES, ks),
    }
