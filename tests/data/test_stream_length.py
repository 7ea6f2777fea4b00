"""Stochastic length of streams: the rule of the paper, decided for each sequence alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hstu.config import StochasticLengthConfig
from hstu.data.stochastic_length import cut_length
from hstu.data.stream_length import StreamLength
from tests.data.test_stochastic_length import within

TRIALS = 6000


def make(alpha: float = 1.5, selection: str = "uniform", longest: int = 16, seed: int = 0) -> StreamLength:
    nothing = np.zeros(1, np.int64)
    return StreamLength(StochasticLengthConfig(alpha, selection), longest, seed, nothing, nothing, nothing)


def test_frequencies_match_the_formula() -> None:
    # N = 16, alpha = 1.5: N^(alpha/2) = 8, N^alpha = 64.
    ids = np.arange(TRIALS)
    for n, probability in ((10, 64 / 100), (16, 64 / 256)):
        kept = make().kept(np.full(TRIALS, n), ids, epoch=n)
        assert set(kept.tolist()) == {8, n} and within((kept == n).sum(), TRIALS, probability)
    assert make().kept(np.array([0, 1, 8]), np.arange(3), 0).tolist() == [0, 1, 8]


def test_every_subset_is_as_likely() -> None:
    lengths, kept, ids = np.full(TRIALS, 4), np.full(TRIALS, 2), np.arange(TRIALS)
    positions = make().positions(lengths, kept, ids, 0, np.zeros(4 * TRIALS, np.int64)).reshape(TRIALS, 2)
    chosen = [tuple(row) for row in (positions - 4 * np.arange(TRIALS)[:, None]).tolist()]
    assert all(within(chosen.count(pair), TRIALS, 1 / 6) for pair in itertools.combinations(range(4), 2))


def test_recency_draws_in_proportion_to_the_weights() -> None:
    times = np.tile([10, 14, 16], TRIALS)  # ages 6, 2, 0 of 8 in all: weights 1/4, 3/4, 1
    positions = make(selection="recency").positions(np.full(TRIALS, 3), np.full(TRIALS, 1), np.arange(TRIALS), 0, times)
    counts = np.bincount(positions - 3 * np.arange(TRIALS), minlength=3)
    assert all(within(c, TRIALS, w / 2.0) for c, w in zip(counts, (0.25, 0.75, 1.0), strict=True))


def test_a_sequence_is_cut_alike_in_any_company() -> None:
    sampler, rng = make(1.2, longest=50), np.random.default_rng(0)
    lengths, ids = rng.integers(0, 50, 200), rng.permutation(10**6)[:200]
    times = np.arange(int(lengths.sum()))
    kept = sampler.kept(lengths, ids, 3)
    stays = np.zeros(len(times), bool)
    stays[sampler.positions(lengths, kept, ids, 3, times)] = True
    ends = np.cumsum(lengths)
    for one in (0, 57, 199):
        rows = slice(ends[one] - lengths[one], ends[one])
        alone = (lengths[[one]], kept[[one]], ids[[one]], 3, times[rows])
        assert sampler.kept(lengths[[one]], ids[[one]], 3) == kept[one]
        assert np.flatnonzero(stays[rows]).tolist() == sampler.positions(*alone).tolist()
    assert not np.array_equal(sampler.kept(lengths, ids, 4), kept)
    assert not np.array_equal(make(1.2, longest=50, seed=1).kept(lengths, ids, 3), kept)


def test_expected_savings_by_hand() -> None:
    # Two sequences of 16 events, 12 of which may be dropped (whole with probability 64/144, else 8), three of 6.
    sampler = StreamLength(
        StochasticLengthConfig(1.5), 16, 0, np.array([16, 6]), np.array([12, 5]), np.array([2, 3])
    )  # fmt: skip
    whole = 64 / 144
    left, work = 2 * (16 * whole + 12 * (1 - whole)) + 18, 2 * (256 * whole + 144 * (1 - whole)) + 108
    assert sampler.expected == pytest.approx({"tokens_dropped": 1 - left / 50, "attention_work_saved": 1 - work / 620})
    assert cut_length(16, 1.5) == 8


def test_expected_savings_are_those_of_many_epochs() -> None:
    lengths = np.random.default_rng(1).integers(1, 101, 3000)
    sampler = StreamLength(StochasticLengthConfig(1.3), 100, 0, lengths, lengths, np.ones(3000, np.int64))
    kept = np.stack([sampler.kept(lengths, np.arange(3000), epoch) for epoch in range(40)])
    assert 1 - kept.mean() / lengths.mean() == pytest.approx(sampler.expected["tokens_dropped"], abs=0.002)
    work = 1 - (kept.astype(float) ** 2).mean() / (lengths.astype(float) ** 2).mean()
    assert work == pytest.approx(sampler.expected["attention_work_saved"], abs=0.002)
