"""Even work over ranks: the split of a global batch, and stochastic length under a target per rank."""

import itertools

import numpy as np
import pytest

from hstu.data.balance import balanced_lengths, imbalance, rank_work, split_even, user_work
from hstu.data.stochastic_length import cut_length, draw_lengths, whole_probability


def random(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def skewed_lengths(count, longest=2000, seed=0):
    """Lengths of a long-tailed log, the longest one at ``longest``."""
    lengths = np.minimum(random(seed).lognormal(4.6, 1.1, count).astype(np.int64) + 1, longest)
    lengths[0] = longest
    return lengths


def test_user_work_by_hand():
    assert user_work(np.array([0, 3, 10]), quadratic=2.0, linear=5.0).tolist() == [0, 33, 250]


def test_split_by_hand():
    # 9 -> rank 0; 8 -> 1; 5 -> 1 (13); 4 -> 0 (13); 3 -> 0 (16, first of equals); 1 -> 1 (14).
    ranks = split_even(np.array([3.0, 9, 1, 5, 8, 4]), 2)
    assert ranks.tolist() == [0, 0, 1, 1, 1, 0]
    assert rank_work(np.array([3.0, 9, 1, 5, 8, 4]), ranks, 2).tolist() == [16, 14]


def test_imbalance_by_hand():
    assert imbalance(np.array([16.0, 14.0])) == pytest.approx(1 / 15)
    assert imbalance(np.array([3.0, 3.0, 3.0])) == 0
    assert imbalance(np.zeros(4)) == 0


@pytest.mark.parametrize("users, ranks", [(0, 3), (1, 4), (5, 1), (7, 7), (500, 8)])
def test_every_user_once_and_every_rank_known(users, ranks):
    work = user_work(random(users).integers(0, 100, users))
    found = split_even(work, ranks)
    assert found.shape == (users,) and found.dtype == np.int64
    assert ((found >= 0) & (found < ranks)).all()
    assert rank_work(work, found, ranks).sum() == pytest.approx(work.sum())
    np.testing.assert_array_equal(found, split_even(work, ranks))


def test_users_without_work_are_spread_too():
    assert sorted(split_even(np.zeros(9), 3).tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_no_ranks_are_refused():
    with pytest.raises(ValueError, match="num_ranks=0: expected >= 1"):
        split_even(np.ones(3), 0)


@pytest.mark.parametrize("seed", range(5))
def test_never_worse_than_grahams_bound(seed):
    work = random(seed).integers(1, 50, 8).astype(float)
    best = min(rank_work(work, np.array(a), 3).max() for a in itertools.product(range(3), repeat=8))
    assert rank_work(work, split_even(work, 3), 3).max() <= (4 / 3 - 1 / 9) * best


def test_work_is_more_even_than_equal_numbers_of_users():
    lengths = skewed_lengths(512)
    work = user_work(lengths, 1.0, 300.0)
    dealt = np.arange(512) % 8
    assert imbalance(rank_work(work, dealt, 8)) > 0.2
    assert imbalance(rank_work(work, split_even(work, 8), 8)) < 0.01


# Stochastic length with a target per rank


def test_lengths_are_whole_or_cut_and_short_ones_stay():
    lengths, ranks = skewed_lengths(400), np.arange(400) % 4
    result = balanced_lengths(lengths, ranks, 4, 2000, 1.6, random())
    cut = cut_length(2000, 1.6)
    assert ((result == lengths) | (result == cut)).all()
    np.testing.assert_array_equal(result[lengths <= cut], lengths[lengths <= cut])
    assert 0 < (result < lengths).sum() < (lengths > cut).sum()
    np.testing.assert_array_equal(result, balanced_lengths(lengths, ranks, 4, 2000, 1.6, random()))
    np.testing.assert_array_equal(balanced_lengths(lengths, ranks, 4, 2000, 2.0, random()), lengths)


def test_each_rank_lands_within_half_a_sequence_of_the_target():
    lengths, ranks = skewed_lengths(4000), np.arange(4000) % 8
    cut, probability = cut_length(2000, 1.6), whole_probability(lengths, 2000, 1.6)
    short = np.minimum(lengths, cut)
    target = float((probability * lengths**2 + (1 - probability) * short**2).sum()) / 8
    half_a_sequence = (2000**2 - cut**2) / 2
    for seed in range(5):
        result = balanced_lengths(lengths, ranks, 8, 2000, 1.6, random(seed))
        work = rank_work(user_work(result), ranks, 8)
        assert np.abs(work - target).max() <= half_a_sequence
        assert (result < lengths).any()


def test_ranks_are_more_even_than_under_independent_draws():
    ranks = np.arange(2048) % 16
    lengths = skewed_lengths(2048)
    balanced, independent = [], []
    for seed in range(20):
        result = balanced_lengths(lengths, ranks, 16, 2000, 1.6, random(seed))
        balanced.append(imbalance(rank_work(user_work(result), ranks, 16)))
        drawn = draw_lengths(lengths, 2000, 1.6, random(seed))
        independent.append(imbalance(rank_work(user_work(drawn), ranks, 16)))
    assert np.mean(balanced) < 0.5 * np.mean(independent)


def test_whole_sequences_are_about_as_frequent_as_in_the_formula():
    # 1,000 sequences of each of two lengths on two ranks; keeping 600 whole costs what the formula expects.
    lengths = np.tile([600, 1000], 1000)
    ranks = np.repeat([0, 1], 1000)
    counts = {600: 0.0, 1000: 0.0}
    for seed in range(20):
        result = balanced_lengths(lengths, ranks, 2, 1000, 1.8, random(seed))
        for n in counts:
            counts[n] += float((result[lengths == n] == n).mean()) / 20
    expected = whole_probability(np.array([600, 1000]), 1000, 1.8)
    assert abs(counts[600] - expected[0]) < 0.03
    assert abs(counts[1000] - expected[1]) < 0.03


def test_a_rank_of_short_sequences_is_left_as_it_is():
    lengths, ranks = np.array([5, 6, 900, 1000, 800]), np.array([0, 0, 1, 1, 1])
    result = balanced_lengths(lengths, ranks, 2, 1000, 1.5, random())
    assert result[:2].tolist() == [5, 6]
    assert (result[2:] == cut_length(1000, 1.5)).all()  # rank 1 alone is over the mean already


def test_a_rank_without_users():
    assert balanced_lengths(np.array([3, 1000]), np.array([2, 2]), 4, 1000, 1.5, random()).tolist()[0] == 3
