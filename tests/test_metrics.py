"""Metrics on tables small enough to redo by hand, and against torchmetrics."""

import math

import numpy as np
import pytest
import torch

from hstu import metrics


def log2(x):
    return math.log2(x)


def test_values_by_hand():
    # Three users whose targets have ranks 1, 3 and 11.
    got = metrics.summarize(np.array([1.0, 3.0, 11.0]), [1, 10])
    assert got == pytest.approx(
        {
            "hr@1": 1 / 3,
            "ndcg@1": 1 / 3,
            "hr@10": 2 / 3,
            "ndcg@10": (1 / log2(2) + 1 / log2(4)) / 3,  # 1/2 of 3/2
            "mrr": (1 / 1 + 1 / 3 + 1 / 11) / 3,
        }
    )
    assert got["ndcg@10"] == pytest.approx(1 / 2)


def test_tied_rank_counts_by_half():
    # Tied with one other candidate for the first two places: rank 1 + 0 + 1/2.
    got = metrics.summarize(np.array([1.5]), [1, 2])
    assert got == pytest.approx({"hr@1": 0, "ndcg@1": 0, "hr@2": 1, "ndcg@2": 1 / log2(2.5), "mrr": 2 / 3})


def test_rank_at_the_cut_is_a_hit_and_half_past_it_is_a_miss():
    assert metrics.summarize(np.array([10.0]), [10])["hr@10"] == 1
    assert metrics.summarize(np.array([10.5]), [10])["hr@10"] == 0


def test_ks_are_sorted_and_unique():
    assert metrics.metric_names([10, 1, 10]) == ["hr@1", "ndcg@1", "hr@10", "ndcg@10", "mrr"]
    assert metrics.summarize(np.array([5.0]), [10, 1]) == metrics.summarize(np.array([5.0]), [1, 10])


def test_no_rankings_give_nan():
    got = metrics.summarize(np.array([]), [10])
    assert list(got) == ["hr@10", "ndcg@10", "mrr"]
    assert all(math.isnan(v) for v in got.values())


@pytest.mark.parametrize("bad", [0.5, 0.0, -1.0, math.nan, math.inf])
def test_impossible_rank_raises(bad):
    with pytest.raises(ValueError, match="expected finite values >= 1"):
        metrics.summarize(np.array([1.0, bad]), [10])


@pytest.mark.parametrize("k", [1, 3, 10, 40])
def test_agrees_with_torchmetrics(k):
    """An independent implementation that ranks the scores itself; one relevant item per user, no ties."""
    from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR, RetrievalNormalizedDCG

    rng = np.random.default_rng(0)
    num_users, num_items = 57, 40
    scores = rng.permuted(np.tile(np.arange(num_items), (num_users, 1)), axis=1).astype(np.float32)
    target = rng.integers(0, num_items, num_users)
    ranks = 1.0 + (scores > scores[np.arange(num_users), target][:, None]).sum(axis=1)
    relevant = torch.zeros(num_users, num_items, dtype=torch.bool)
    relevant[torch.arange(num_users), torch.from_numpy(target)] = True
    index = torch.arange(num_users)[:, None].expand(-1, num_items)
    ours = metrics.summarize(ranks, [k])
    for name, theirs in (
        (f"hr@{k}", RetrievalHitRate(top_k=k)),
        (f"ndcg@{k}", RetrievalNormalizedDCG(top_k=k)),
        ("mrr", RetrievalMRR()),
    ):
        value = theirs(torch.from_numpy(scores).flatten(), relevant.flatten(), indexes=index.flatten())
        assert ours[name] == pytest.approx(float(value), abs=1e-6), name


def test_bootstrap_of_equal_users_has_no_width():
    got = metrics.bootstrap(np.full(20, 2.0), np.arange(20), [1, 10], resamples=50)
    assert got["hr@1"] == (0.0, 0.0)
    assert got["hr@10"] == (1.0, 1.0)
    assert got["mrr"] == pytest.approx((0.5, 0.5))


def test_bootstrap_matches_the_binomial_interval():
    """HR over n users with p = 1/4 has standard error sqrt(p (1 - p) / n): the interval is about +- 1.96 of it."""
    n = 1600
    ranks = np.where(np.arange(n) % 4 == 0, 1.0, 99.0)
    low, high = metrics.bootstrap(ranks, np.arange(n), [10], resamples=4000, seed=1)["hr@10"]
    error = math.sqrt(0.25 * 0.75 / n)
    assert low == pytest.approx(0.25 - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(0.25 + 1.96 * error, abs=0.1 * error)


def test_bootstrap_draws_whole_users():
    """Two users, of 1 hit and of 3 misses: a resample is one of {1, 1/4, 0}, never 2/4 or 3/4."""
    ranks, users = np.array([1.0, 99, 99, 99]), np.array([7, 3, 3, 3])
    low, high = metrics.bootstrap(ranks, users, [10], resamples=400, confidence=0.999)["hr@10"]
    assert (low, high) == (0.0, 1.0)
    quartiles = metrics.bootstrap(ranks, users, [10], resamples=400, confidence=0.2)["hr@10"]
    assert quartiles == (0.25, 0.25)


def test_bootstrap_is_seeded_and_independent_of_its_blocks():
    ranks, users = np.arange(1.0, 301.0), np.arange(300)
    once = metrics.bootstrap(ranks, users, [10, 100], resamples=300, seed=3)
    assert once == metrics.bootstrap(ranks, users, [10, 100], resamples=300, seed=3)
    assert once != metrics.bootstrap(ranks, users, [10, 100], resamples=300, seed=4)
    tiny_blocks = metrics.bootstrap(ranks, users, [10, 100], resamples=300, seed=3, block_mib=1)
    for name, interval in once.items():
        assert interval == pytest.approx(tiny_blocks[name]), name


def test_bootstrap_of_nothing_is_empty():
    assert metrics.bootstrap(np.array([]), np.array([]), [10], resamples=10) == {}
    assert metrics.bootstrap(np.array([1.0]), np.array([0]), [10], resamples=0) == {}


def test_breakdown_by_hand():
    groups = metrics.breakdown(
        np.array([1.0, 2.0, 20.0, 1.0]), np.array([1, 4, 5, 100]), (1, 5, 10), metrics.range_names((1, 5, 10)), [10]
    )
    assert [(g.name, g.count, g.metrics["hr@10"]) for g in groups] == [
        ("1-4", 2, 1.0),
        ("5-9", 1, 0.0),
        ("10+", 1, 1.0),
    ]
    assert groups[0].metrics["mrr"] == pytest.approx((1 + 1 / 2) / 2)


def test_breakdown_leaves_out_empty_groups_and_refuses_values_below_the_edges():
    names = metrics.range_names((1, 5, 10))
    assert [g.name for g in metrics.breakdown(np.ones(2), np.array([11, 12]), (1, 5, 10), names, [1])] == ["10+"]
    with pytest.raises(ValueError, match="below the first edge"):
        metrics.breakdown(np.ones(1), np.array([0]), (1, 5, 10), names, [1])


def test_range_names():
    assert metrics.range_names((0, 1, 10, 50)) == ["0", "1-9", "10-49", "50+"]


def test_breakdowns_count_everyone_once():
    rng = np.random.default_rng(0)
    parts = metrics.breakdowns(
        rng.integers(1, 300, 500).astype(float), rng.integers(1, 900, 500), rng.integers(0, 3000, 500),
        rng.integers(0, 10**7, 500), [10],
    )  # fmt: skip
    assert list(parts) == ["history length", "item popularity", "time gap"]
    assert [sum(g.count for g in groups) for groups in parts.values()] == [500, 500, 500]


@pytest.mark.parametrize(("gap_s", "name"), [(0, "same second"), (59, "< 1 min"), (60, "< 1 h"), (86_400, "< 1 week")])
def test_time_gap_groups(gap_s, name):
    parts = metrics.breakdowns(np.ones(1), np.ones(1), np.ones(1), np.array([gap_s]), [10])
    assert [g.name for g in parts["time gap"]] == [name]
