"""Even work for every rank of a step: which user goes to which rank, and who is cut where users cannot move.

Attention costs n^2 and everything else n, so ranks with equal numbers of users, or of events, still wait for the
longest. All functions are deterministic and look at lengths only, so every rank computes the same answer alone.

Legend: B users of a step over all ranks, R ranks.
"""

from __future__ import annotations

import heapq
import math

import numpy as np

from hstu.data.stochastic_length import cut_length, whole_probability

ONE_BY_ONE = 2048
"""Users of a step that are dealt out one by one, in about 1 ms; see :func:`split_even`."""
GOLDEN = (math.sqrt(5) - 1) / 2


def user_work(lengths: np.ndarray, quadratic: float = 1.0, linear: float = 0.0) -> np.ndarray:
    """[B] float64. Work of each user, ``quadratic * n^2 + linear * n``, in any unit."""
    n = lengths.astype(np.float64)
    return quadratic * n**2 + linear * n


def split_even(work: np.ndarray, num_ranks: int) -> np.ndarray:
    """[B] int64. Rank of every user: the heaviest first, each to the rank with the least work so far.

    The heaviest rank is then at most 4/3 - 1/(3R) times the best possible (Graham 1969). So are dealt out the
    ``max(ONE_BY_ONE, 16 R)`` heaviest users. Lighter ones fill the ranks up to one level, each a stretch of them in a
    mixed order, in which every stretch has long and short ones alike: no rank passes the level by more than the work w
    of its heaviest user. The level is at most the mean work of a rank, and w at most 1/16 of that, as 16 R users have
    as much or more: the bound holds, for R = 1 trivially. O(B log B) in numpy, and O(R log R) in Python.

    Sums run in a fixed order, so that all ranks get the same answer whatever machine they are on.

    Args:
        work: [B] float64, >= 0. num_ranks: R.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks={num_ranks}: expected >= 1")
    if num_ranks == 1:
        return np.zeros(len(work), np.int64)
    order = np.argsort(-work, kind="stable")
    heavy, light = np.split(order, [max(ONE_BY_ONE, 16 * num_ranks)])
    ranks = np.empty(len(work), np.int64)
    ranks[heavy], loads = _deal_out(work[heavy], num_ranks)
    light = light[_mixed(len(light))]
    ranks[light] = _fill_up(work[light], loads)
    return ranks


def _deal_out(work: np.ndarray, num_ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Rank of every user, [B] int64, and work of every rank, [R] float64. work: descending."""
    ranks = np.empty(len(work), np.int64)
    loads = [(0.0, 0, rank) for rank in range(num_ranks)]  # work, users (so that idle users spread too), rank
    for user, cost in enumerate(work.tolist()):
        load, count, rank = loads[0]
        ranks[user] = rank
        heapq.heapreplace(loads, (load + cost, count + 1, rank))
    totals = np.empty(num_ranks)
    for load, _, rank in loads:
        totals[rank] = load
    return ranks, totals


def _mixed(count: int) -> np.ndarray:
    """[count] int64. A permutation in which every stretch is spread evenly over 0 .. count - 1: steps of the golden
    ratio, or of the next number that has no factor in common with ``count``."""
    step = max(1, round(count * GOLDEN))
    while math.gcd(step, count) > 1:
        step += 1
    return np.arange(count) * step % max(1, count)


def _fill_up(work: np.ndarray, loads: np.ndarray) -> np.ndarray:
    """[B] int64. Rank of every user, ascending, where ``loads`` [R] are filled up to one level.

    A user goes where the middle of its work lies. Ranks above the level get none; users without work go round.
    """
    spent = np.cumsum(work)
    if not len(work) or spent[-1] <= 0:
        return np.arange(len(work)) % len(loads)
    level = ((spent[-1] + np.cumsum(np.sort(loads))) / np.arange(1, len(loads) + 1)).min()
    ends = np.cumsum(np.maximum(level - loads, 0.0))
    last = np.searchsorted(ends, ends[-1])  # the last one below the level gets what rounding leaves
    return np.minimum(np.searchsorted(ends, spent - work / 2, side="right"), last)


def rank_work(work: np.ndarray, ranks: np.ndarray, num_ranks: int) -> np.ndarray:
    """[R] float64. Work of every rank."""
    return np.bincount(ranks, weights=work, minlength=num_ranks)


def imbalance(work_of_ranks: np.ndarray) -> float:
    """Share of time that the slowest rank takes beyond the mean: max / mean - 1; 0 where there is no work."""
    mean = float(work_of_ranks.mean())
    return float(work_of_ranks.max()) / mean - 1.0 if mean > 0 else 0.0


def balanced_lengths(lengths: np.ndarray, ranks: np.ndarray, num_ranks: int, longest: int, alpha: float,
                     rng: np.random.Generator) -> np.ndarray:  # fmt: skip
    """[B] int64. Lengths after stochastic length that bring every rank to the same attention work (sum of n^2).

    For users that are already on their ranks, as when each rank reads its own part of a stream. The independent draw
    of :func:`hstu.data.stochastic_length.draw_lengths` leaves each rank's work to chance; here the number of whole
    sequences of a rank follows from a target instead: the work expected of a mean rank under that draw. Each rank
    takes its long sequences in a random order, those with a larger probability of being kept whole tending to come
    first (order sampling, Rosen 1997), and keeps them whole while that brings its work closer to the target. Load-
    balanced stochastic length of Ding et al. 2026 (arXiv 2602.16986, algorithm 1), which estimates the target from
    warm-up steps; here all lengths of the step are known on every rank.

    A rank whose sequences are all short, or all cut and still too much, stays off the target.

    Args:
        lengths: [B] int64. ranks: [B] int64 in [0, R). longest, alpha: N and alpha of stochastic length.
        rng: the same state on every rank.
    """
    short = np.minimum(lengths, cut_length(longest, alpha))
    whole, least = user_work(lengths), user_work(short)
    probability = whole_probability(lengths, longest, alpha)
    target = float((probability * whole + (1.0 - probability) * least).sum()) / num_ranks
    draws = rng.random(len(lengths))
    long = np.flatnonzero(lengths > short)
    odds = draws[long] / (1.0 - draws[long]) * (1.0 - probability[long]) / probability[long]
    order = long[np.lexsort((odds, ranks[long]))]
    extra = (whole - least)[order]
    spent = np.cumsum(extra)
    first = np.searchsorted(ranks[order], np.arange(num_ranks))
    spent -= np.concatenate([[0.0], spent])[first][ranks[order]]
    room = target - rank_work(least, ranks, num_ranks)
    kept = order[spent - extra / 2 <= room[ranks[order]]]
    result = short.copy()
    result[kept] = lengths[kept]
    return result
