"""Stochastic length: long training sequences are cut to subsequences at random (Zhai et al. 2024, section 3.2).

With N the longest sequence that training sees and alpha in (1, 2], a sequence of n > N^(alpha/2) events is cut to
N^(alpha/2) of them with probability 1 - N^alpha / n^2 and is otherwise kept whole. The expected attention work of a
sequence, E[n'^2], then stays below 2 N^alpha instead of N^2. numpy only; no loop over users.

Everything here works on events: where an event is an item and its action, the two stay together.

Legend: B sequences, L events of the joined sequences, K events kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from hstu.config import StochasticLengthConfig
from hstu.seeding import derive

LENGTH_SEED, SELECT_SEED = 102, 103
"""Purpose numbers of the seeds that decide who is cut in an epoch, and which events of a batch are kept."""


def cut_length(longest: int, alpha: float) -> int:
    """Events that a cut sequence keeps: floor(N^(alpha/2)), such as 776 for N = 4096 and alpha = 1.6."""
    return math.floor(longest ** (alpha / 2) + 1e-9)  # 1024 ** 0.8 is 256, whatever the last bit of pow says


def whole_probability(lengths: np.ndarray, longest: int, alpha: float) -> np.ndarray:
    """[B] float64. Probability that each sequence is kept whole: 1 up to N^(alpha/2) events, else N^alpha / n^2.

    Args:
        lengths: [B] int64, at most ``longest``.
        longest: N.
        alpha: in (1, 2]; 2 keeps every sequence whole.
    """
    n = np.maximum(lengths, 1).astype(np.float64)
    probability = np.minimum(1.0, float(longest) ** alpha / n**2)
    return np.where(lengths <= cut_length(longest, alpha), 1.0, probability)


def draw_lengths(lengths: np.ndarray, longest: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    """[B] int64. Each sequence's length after the cut, drawn independently; arguments as in whole_probability."""
    whole = rng.random(len(lengths)) < whole_probability(lengths, longest, alpha)
    return np.where(whole, lengths, np.minimum(lengths, cut_length(longest, alpha)))


def select_positions(lengths: np.ndarray, kept: np.ndarray, selection: str, draw: Callable[[np.ndarray], np.ndarray],
                     timestamps: np.ndarray | None = None) -> np.ndarray:  # fmt: skip
    """[K] int64, ascending. Which events of the joined sequences stay: ``kept[b]`` of the ``lengths[b]`` of each.

    Args:
        lengths: [B] int64. Sequence b is the next lengths[b] events of the joined ones.
        kept: [B] int64, at most ``lengths``.
        selection: ``recent`` (the last ones), ``uniform`` (at random without replacement) or ``recency`` (without
            replacement by the weights of :func:`recency_weights`).
        draw: gives independent numbers, exponentially distributed with mean 1, for the events at some places.
        timestamps: [L] int64, s. Needed for ``recency`` only.
    """
    if selection == "recent":
        ends = np.cumsum(lengths)
        places = np.arange(int(lengths.sum()))
        return places[places >= np.repeat(ends - kept, lengths)]
    is_cut = kept < lengths
    keep = np.repeat(~is_cut, lengths)
    places = np.flatnonzero(~keep)
    cut, left = lengths[is_cut], kept[is_cut]
    keys = draw(places)
    if selection == "recency":
        assert timestamps is not None
        # The k smallest of Exp(1) / w are k drawn without replacement by weight (Efraimidis and Spirakis 2006);
        # a weight of 0 comes last.
        with np.errstate(divide="ignore"):
            keys /= recency_weights(timestamps[places], cut)
    order = np.lexsort((keys, np.repeat(np.arange(len(cut)), cut)))
    ranks = np.arange(len(places)) - np.repeat(np.cumsum(cut) - cut, cut)
    keep[places[order[ranks < np.repeat(left, cut)]]] = True
    return np.flatnonzero(keep)


def exponential(rng: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
    """``draw`` of :func:`select_positions` from one generator."""
    return lambda places: rng.standard_exponential(len(places))


def recency_weights(timestamps: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[L] float64 in [0, 1]. Weight of each event in its sequence: 1 - f_i / sum_j f_j with f_i = t_last - t_i.

    Feature-weighted selection of Zhai et al. 2024, appendix F.1. The sum goes over the whole sequence, so that no
    weight is negative. Where a sequence has hundreds of events each f_i is a small share of the sum: the weights
    then lie close together and the choice is nearly uniform.

    Args:
        timestamps: [L] int64, s, ascending in each sequence; lengths: [B] int64.
    """
    ends = np.cumsum(lengths)
    last = np.repeat(ends - 1, lengths)
    age = (timestamps[last] - timestamps).astype(np.float64)
    before = np.concatenate([[0.0], np.cumsum(age)])
    total = np.repeat(before[ends] - before[ends - lengths], lengths)
    return 1.0 - np.divide(age, total, out=np.zeros_like(age), where=total > 0)


def savings(lengths: np.ndarray, kept: np.ndarray) -> dict[str, float]:
    """Shares of the events and of the attention work (sum of n^2) that cutting ``lengths`` to ``kept`` saves."""
    events, work = int(lengths.sum()), float((lengths.astype(np.float64) ** 2).sum())
    return {
        "tokens_dropped": 1.0 - int(kept.sum()) / max(1, events),
        "attention_work_saved": 1.0 - float((kept.astype(np.float64) ** 2).sum()) / max(1.0, work),
    }


def savings_text(saved: Mapping[str, float], before: str) -> str:
    """What :func:`savings` gave, in words after the text ``before``; empty where it is not there."""
    if "tokens_dropped" not in saved:
        return ""
    dropped, work = 100 * saved["tokens_dropped"], 100 * saved["attention_work_saved"]
    return f"{before}{dropped:.1f} % of the events dropped, {work:.1f} % of the attention work saved"


def make_sampler(config: StochasticLengthConfig | None, longest: int, seed: int) -> StochasticLength | None:
    """The sampler of a training whose longest sequence is ``longest``; None where it is off."""
    return None if config is None or config.alpha is None else StochasticLength(config, longest, seed)


class StochasticLength:
    """The sampler of one training: what it keeps is a pure function of (seed, epoch, step), so resuming is exact.

    Args:
        config: alpha (not None) and selection.
        longest: N, the longest sequence that training sees.
        seed: of the run.
    """

    def __init__(self, config: StochasticLengthConfig, longest: int, seed: int) -> None:
        assert config.alpha is not None
        self.alpha, self.selection, self.seed, self.longest = config.alpha, config.selection, seed, longest

    def epoch_lengths(self, lengths: np.ndarray, epoch: int) -> np.ndarray:
        """[U] int64. What is left in this epoch of the ``lengths`` [U] of all sequences; known before any batch is
        made, so that batches can be filled and balanced by it."""
        rng = np.random.Generator(np.random.PCG64(derive(self.seed, LENGTH_SEED, epoch)))
        return draw_lengths(lengths, self.longest, self.alpha, rng)

    def positions(self, lengths: np.ndarray, kept: np.ndarray, epoch: int, step: int,
                  timestamps: np.ndarray | None = None) -> np.ndarray:  # fmt: skip
        """[K] int64. Kept events of one batch; arguments as in select_positions."""
        rng = np.random.Generator(np.random.PCG64(derive(self.seed, SELECT_SEED, epoch, step)))
        return select_positions(lengths, kept, self.selection, exponential(rng), timestamps)
