"""Stochastic length: the rule of the paper, what is kept, and what it must not change."""

import itertools
import math

import numpy as np
import pytest
import torch

from hstu.config import RunConfig, StochasticLengthConfig, from_dict
from hstu.data.batches import EventColumns, TrainBatches
from hstu.data.splits import make_split
from hstu.data.stochastic_length import (
    StochasticLength,
    cut_length,
    draw_lengths,
    exponential,
    recency_weights,
    savings,
    select_positions,
    whole_probability,
)
from hstu.errors import UserError
from tests.serving import small_store

LENGTHS = (12, 3, 2, 7, 1, 0, 40, 33, 25)


def random(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def within(count, trials, probability, deviations=5.0):
    """Whether a binomial count lies within so many standard deviations of its mean."""
    return abs(count - trials * probability) <= deviations * math.sqrt(trials * probability * (1 - probability))


# The rule


@pytest.mark.parametrize("longest, alpha, expected", [(4096, 1.6, 776), (1024, 1.6, 256), (100, 1.5, 31), (9, 2.0, 9)])
def test_cut_length_is_the_floor_of_the_power(longest, alpha, expected):
    assert cut_length(longest, alpha) == expected  # 776: Zhai et al. 2024, section 4.2


def test_probability_by_hand():
    # N = 16, alpha = 1.5: N^(alpha/2) = 8, N^alpha = 64.
    lengths = np.array([0, 1, 7, 8, 9, 10, 16])
    expected = [1, 1, 1, 1, 64 / 81, 64 / 100, 64 / 256]
    np.testing.assert_allclose(whole_probability(lengths, 16, 1.5), expected, rtol=1e-12)


def test_alpha_2_keeps_everything():
    lengths = np.arange(200)
    assert whole_probability(lengths, 199, 2.0).min() == 1.0
    np.testing.assert_array_equal(draw_lengths(lengths, 199, 2.0, random()), lengths)


@pytest.mark.parametrize("alpha", [1.1, 1.6, 1.9])
def test_frequencies_match_the_formula(alpha):
    trials = 4000
    for n in (20, 60, 100):
        drawn = draw_lengths(np.full(trials, n), 100, alpha, random(n))
        short = min(n, cut_length(100, alpha))
        assert set(drawn.tolist()) <= {n, short}
        if short < n:
            assert within((drawn == n).sum(), trials, 100**alpha / n**2)
        else:
            assert (drawn == n).all()


def test_expected_attention_work_is_below_twice_n_to_the_alpha():
    lengths = np.arange(1, 1001)
    whole, short = whole_probability(lengths, 1000, 1.6), np.minimum(lengths, cut_length(1000, 1.6))
    assert (whole * lengths**2.0 + (1 - whole) * short**2.0).max() <= 2 * 1000**1.6


@pytest.mark.parametrize("alpha", [1.0, 0.5, 2.1, -1.0])
def test_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(UserError, match=r"run.stochastic_length.alpha=.*\(1, 2\] or null"):
        StochasticLengthConfig(alpha)


def test_unknown_selection_is_refused_and_the_default_is_off():
    with pytest.raises(UserError, match="run.stochastic_length.selection='oldest'"):
        from_dict({"run": {"stochastic_length": {"selection": "oldest"}}})
    assert RunConfig().stochastic_length.alpha is None


# Selection


def test_recent_keeps_the_last_events():
    kept = select_positions(np.array([4, 2, 0, 3]), np.array([2, 2, 0, 1]), "recent", exponential(random()))
    assert kept.tolist() == [2, 3, 4, 5, 8]


@pytest.mark.parametrize("selection", ["recent", "uniform", "recency"])
def test_order_is_kept_and_every_sequence_has_its_length(selection):
    rng = random(3)
    lengths = rng.integers(0, 50, 40)
    kept = np.minimum(lengths, rng.integers(0, 50, 40))
    times = np.concatenate([np.sort(rng.integers(0, 10**6, n)) for n in lengths])
    positions = select_positions(lengths, kept, selection, exponential(rng), times)
    assert (np.diff(positions) > 0).all()
    owner = np.repeat(np.arange(40), lengths)[positions]
    np.testing.assert_array_equal(np.bincount(owner, minlength=40), kept)


def test_uniform_takes_every_subset_equally_often():
    trials = 6000
    positions = select_positions(np.full(trials, 4), np.full(trials, 2), "uniform", exponential(random(1))).reshape(
        trials, 2
    )
    chosen = [tuple(row) for row in (positions - 4 * np.arange(trials)[:, None]).tolist()]
    pairs = list(itertools.combinations(range(4), 2))
    assert set(chosen) == set(pairs)
    assert all(within(chosen.count(pair), trials, 1 / 6) for pair in pairs)


def test_recency_weights_by_hand():
    # Ages 6, 2, 0 of 8 in all; one event; two at the same time; none.
    weights = recency_weights(np.array([10, 14, 16, 5, 7, 7]), np.array([3, 1, 2, 0]))
    np.testing.assert_allclose(weights, [1 - 6 / 8, 1 - 2 / 8, 1, 1, 1, 1], rtol=1e-12)


def test_recency_draws_in_proportion_to_the_weights():
    trials, times = 6000, np.array([10, 14, 16])
    positions = select_positions(
        np.full(trials, 3), np.full(trials, 1), "recency", exponential(random(2)), np.tile(times, trials)
    )
    counts = np.bincount(positions - 3 * np.arange(trials), minlength=3)
    total = 0.25 + 0.75 + 1.0
    assert all(within(c, trials, w / total) for c, w in zip(counts, (0.25, 0.75, 1.0), strict=True))


def test_recency_leaves_an_event_of_weight_0_to_the_end():
    # Of two events at different times the first has all the age, hence weight 0.
    positions = select_positions(
        np.full(500, 2), np.full(500, 1), "recency", exponential(random(4)), np.tile([3, 9], 500)
    )
    assert (positions % 2 == 1).all()


def test_savings_by_hand():
    result = savings(np.array([10, 4]), np.array([5, 4]))
    assert result == pytest.approx({"tokens_dropped": 5 / 14, "attention_work_saved": 1 - 41 / 116})


def test_what_is_kept_is_a_function_of_seed_epoch_and_step():
    lengths = np.full(200, 50)
    first = StochasticLength(StochasticLengthConfig(1.5, "uniform"), 50, seed=7)
    second = StochasticLength(StochasticLengthConfig(1.5, "uniform"), 50, seed=7)
    kept = second.epoch_lengths(lengths, 4)  # asked without the epochs before it
    np.testing.assert_array_equal(first.epoch_lengths(lengths, 4), kept)
    np.testing.assert_array_equal(first.positions(lengths, kept, 4, 9), second.positions(lengths, kept, 4, 9))
    assert not np.array_equal(first.epoch_lengths(lengths, 5), kept)
    other = StochasticLength(StochasticLengthConfig(1.5, "uniform"), 50, seed=8)
    assert not np.array_equal(other.epoch_lengths(lengths, 4), kept)
    assert not np.array_equal(first.positions(lengths, kept, 4, 10), first.positions(lengths, kept, 4, 9))


# Training batches


@pytest.fixture
def store(tmp_path):
    return small_store(tmp_path / "store", LENGTHS)


def batches(store, alpha, selection="uniform", **options):
    settings = {"max_len": 100, "seed": 0, "batch_users": 4} | options
    split = make_split(store, "reference")
    config = StochasticLengthConfig(alpha, selection)
    return TrainBatches(EventColumns(store), store, split, stochastic_length=config, **settings)


def events(batch):
    """(user, item, time, label, request time) of every row."""
    users = torch.repeat_interleave(batch.users, batch.offsets.diff())
    columns = (users, batch.item_ids, batch.timestamps, batch.labels, batch.request_times)
    return list(zip(*(c.tolist() for c in columns), strict=True))


@pytest.mark.parametrize("selection", ["recent", "uniform", "recency"])
def test_a_kept_event_has_the_label_it_has_in_the_log(store, selection):
    whole, cut = batches(store, None, batch_users=100), batches(store, 1.2, selection, batch_users=100)
    full = sorted(events(whole.batch(0, 0)), key=lambda e: (e[0], e[2]))
    dropped = 0
    for epoch in range(4):
        batch = cut.batch(epoch, 0)
        left = iter(full)
        mine = sorted(events(batch), key=lambda e: (e[0], e[2]))
        assert all(event in left for event in mine)  # a subsequence: in order, each as in the log
        assert batch.max_len == int(batch.offsets.diff().max())
        dropped += len(full) - len(mine)
    assert dropped > 0


def test_actions_stay_with_their_items(tmp_path):
    store = small_store(tmp_path / "s", LENGTHS, actions=np.arange(sum(LENGTHS), dtype=np.float32))
    batch = batches(store, 1.2, batch_users=100).batch(0, 0)
    rows = batch.actions.long().numpy()  # the action of an event is its row
    assert len(rows) < sum(LENGTHS) - len(LENGTHS)
    assert batch.item_ids.tolist() == store.item_ids[rows].tolist()
    assert batch.timestamps.tolist() == store.timestamps[rows].tolist()


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_off_and_alpha_2_are_the_same_training(store, alpha):
    plain = TrainBatches(EventColumns(store), store, make_split(store, "reference"), 100, 0, 4)
    other = batches(store, alpha)
    for epoch in range(2):
        assert plain.num_steps(epoch) == other.num_steps(epoch)
        for step in range(plain.num_steps(epoch)):
            assert events(plain.batch(epoch, step)) == events(other.batch(epoch, step))


def test_a_batch_does_not_depend_on_the_batches_before_it(store):
    first, second = batches(store, 1.2), batches(store, 1.2)
    all_of_first = [events(first.batch(e, s)) for e in range(3) for s in range(first.num_steps(e))]
    assert events(second.batch(2, 1)) == all_of_first[-(second.num_steps(2) - 1)]
    assert second.savings(1) == first.savings(1)


def test_the_token_budget_counts_what_is_left(store):
    whole, cut = batches(store, None, batch_tokens=40), batches(store, 1.05, batch_tokens=40)
    sizes = [cut.batch(0, s).num_events for s in range(cut.num_steps(0))]
    assert sum(sizes) < sum(whole.batch(0, s).num_events for s in range(whole.num_steps(0)))
    assert cut.num_steps(0) < whole.num_steps(0)
    assert all(size <= 40 for size in sizes)


def test_savings_of_an_epoch_are_those_of_its_batches(store):
    data, whole = batches(store, 1.2), batches(store, None)
    steps = data.num_steps(0)
    for stop in (1, steps):
        before = [whole.batch(0, s).offsets.diff() for s in range(stop)]
        after = [data.batch(0, s).offsets.diff() for s in range(stop)]
        b, a = torch.cat(before).double(), torch.cat(after).double()
        expected = {"tokens_dropped": 1 - (a.sum() / b.sum()), "attention_work_saved": 1 - (a**2).sum() / (b**2).sum()}
        assert data.savings(0, stop) == pytest.approx({k: float(v) for k, v in expected.items()})
    assert data.savings(0) == data.savings(0, steps)
    assert whole.savings(0) == {}
