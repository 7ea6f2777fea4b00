"""Even work over ranks: the split of a global batch, and stochastic length under a target per rank."""

import itertools

import numpy as np
import pytest

from hstu.data import balance
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


def by_grahams_rule(work, num_ranks):
    """Written anew: the heaviest first, to the rank of least work, then fewest users, then least number."""
    loads, counts, ranks = np.zeros(num_ranks), np.zeros(num_ranks), np.zeros(len(work), np.int64)
    for user in np.argsort(-work, kind="stable"):
        rank = min(range(num_ranks), key=lambda r: (loads[r], counts[r], r))
        loads[rank], counts[rank], ranks[user] = loads[rank] + work[user], counts[rank] + 1, rank
    return ranks


@pytest.mark.parametrize("users, ranks", [(128, 8), (balance.ONE_BY_ONE, 3), (balance.ONE_BY_ONE + 1, 140)])
def test_few_users_are_dealt_out_one_by_one(users, ranks):
    work = user_work(skewed_lengths(users), 1.0, 300.0)
    np.testing.assert_array_equal(split_even(work, ranks), by_grahams_rule(work, ranks))


@pytest.mark.parametrize("users, ranks", [(6_000, 2), (20_000, 8), (20_000, 64), (20_000, 1000)])
def test_many_users_keep_the_bound_and_are_mixed(users, ranks):
    lengths = skewed_lengths(users)
    work = user_work(lengths, 1.0, 300.0)
    found = split_even(work, ranks)
    assert found.dtype == np.int64 and found.min() == 0 and found.max() == ranks - 1
    one_by_one = max(balance.ONE_BY_ONE, 16 * ranks)
    assert users > one_by_one
    heaviest_light = np.sort(work)[-one_by_one - 1]
    loads = rank_work(work, found, ranks)
    assert heaviest_light <= loads.mean() / 16
    assert loads.max() <= max(work.max(), loads.mean() + heaviest_light)
    if ranks <= 64:
        assert imbalance(loads) < 0.01 and imbalance(rank_work(lengths.astype(float), found, ranks)) < 0.01
        assert imbalance(np.bincount(found).astype(float)) < 0.05  # long and short users alike


def test_a_rank_with_work_enough_gets_no_light_users():
    # The 6,000 others share three ranks, though 3,953 of them are not dealt out one by one.
    work = np.concatenate([np.ones(3_000), [1e6], np.ones(3_000)])
    found = split_even(work, 4)
    assert np.flatnonzero(found == found[3_000]).tolist() == [3_000]
    assert sorted(np.bincount(found).tolist()) == [1, 2_000, 2_000, 2_000]


def test_many_users_without_work_are_spread_too():
    work = np.zeros(10_000)
    work[17] = 5.0
    counts = np.bincount(split_even(work, 4), minlength=4)
    assert sorted(counts.tolist()) == [1 + 1_988, 2_670, 2_670, 2_671]
    assert sorted(np.bincount(split_even(np.zeros(10_000), 4)).tolist()) == [2_500] * 4


def test_light_users_too_light_to_count():
    work = np.concatenate([np.full(3_000, 1e20), np.full(3_000, 1e-3)])
    found = split_even(work, 3)
    assert np.bincount(found[:3_000]).tolist() == [1_000] * 3 and ((found >= 0) & (found < 3)).all()


@pytest.mark.parametrize("count", [1, 2, 3, 10, 997, 4_096])
def test_mixed_orders_are_permutations_whose_stretches_are_even(count):
    mixed = balance._mixed(count)
    assert sorted(mixed.tolist()) == list(range(count))
    for first in range(0, count - 50, 37):  # 50 of them: in every fifth of all about 10
        assert np.bincount(mixed[first : first + 50] * 5 // count, minlength=5) == pytest.approx(10, abs=2)


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
