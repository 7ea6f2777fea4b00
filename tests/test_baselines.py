"""Baselines against numbers worked by hand and against a loop over every candidate."""

import numpy as np
import pytest

from hstu import baselines
from hstu.data.splits import Targets, make_split
from hstu.data.store import write_store
from tests.serving import brute_rank, seen_items, small_store


@pytest.fixture
def tiny(tmp_path):
    """Three users, five items; the last event of each is the test target.

    user 0: 1 2 1 2 | 3      user 1: 1 2 3 | 4      user 2: 2 1 | 2
    Training transitions: 1->2 three times, 2->1 twice, 2->3 once. Popularity 1: 4, 2: 4, 3: 1, 4: 0, 5: 0.
    """
    return write_store(
        tmp_path / "store",
        offsets=np.array([0, 5, 9, 12]),
        item_ids=np.array([1, 2, 1, 2, 3, 1, 2, 3, 4, 2, 1, 2]),
        timestamps=np.arange(12),
        num_items=5,
        meta={},
    )


def test_popularity_counts_training_events_only(tiny):
    split = make_split(tiny, "reference")
    assert baselines.popularity(tiny, split.train_end).tolist() == [0, 4, 4, 1, 0, 0]


def test_popularity_ranks_by_hand(tiny):
    split = make_split(tiny, "reference")
    model = baselines.MostPopular(tiny, split.train_end)
    # No filter: item 3 is after 1 and 2; item 4 ties with 5 after three; item 2 ties with 1.
    assert baselines.rank_baseline(model, tiny, split.test, "none").tolist() == [3.0, 4.5, 1.5]
    # Seen items removed: user 0 saw 1, 2; user 1 saw 1, 2, 3; user 2 saw 1 and the target, which stays.
    assert baselines.rank_baseline(model, tiny, split.test, "full").tolist() == [1.0, 1.5, 1.0]
    # Last event only: user 0 saw 2, user 1 saw 3, user 2 saw 1.
    assert baselines.rank_baseline(model, tiny, split.test, "truncated", max_len=1).tolist() == [2.0, 3.5, 1.0]


def test_transition_ranks_by_hand(tiny):
    split = make_split(tiny, "reference")
    model = baselines.Transitions(tiny, split.train_end)
    # user 0, last 2: 1 (twice), 3 (once), then by popularity. Item 3 is second.
    # user 1, last 3: nothing follows 3; popularity: 1 = 2, 3, then 4 = 5 -> 1 + 3 + 1/2.
    # user 2, last 1: 2 is first.
    assert baselines.rank_baseline(model, tiny, split.test, "none").tolist() == [2.0, 4.5, 1.0]


def test_transitions_do_not_cross_users(tmp_path):
    store = write_store(
        tmp_path / "s", offsets=np.array([0, 0, 3, 3, 6]), item_ids=np.array([1, 2, 5, 3, 4, 5]),
        timestamps=np.arange(6), num_items=5, meta={},
    )  # fmt: skip
    model = baselines.Transitions(store, make_split(store, "reference").train_end)
    assert [divmod(int(p), 6) for p in model.pairs] == [(1, 2), (3, 4)]


@pytest.mark.parametrize("filter_history", ["truncated", "full", "none"])
@pytest.mark.parametrize("selection", ["validation", "reference"])
def test_ranks_equal_a_loop_over_candidates(tmp_path, filter_history, selection):
    store = small_store(tmp_path / "store", lengths=tuple(np.random.default_rng(1).integers(0, 25, 60)))
    split = make_split(store, selection)
    counts = [0] * (store.num_items + 1)
    follow = {}
    for user in range(store.num_users):
        events = store.item_ids[store.offsets[user] : split.train_end[user]].tolist()
        for item in events:
            counts[item] += 1
        for pair in zip(events, events[1:], strict=False):
            follow[pair] = follow.get(pair, 0) + 1
    got = baselines.rank_baselines(store, split.train_end, split.test, filter_history, max_len=6)
    items = range(1, store.num_items + 1)
    for m, (user, row) in enumerate(zip(split.test.users, split.test.rows, strict=True)):
        last, target = int(store.item_ids[row - 1]), int(store.item_ids[row])
        seen = seen_items(store, user, row, filter_history, 6)
        popular = {i: counts[i] for i in items}
        moves = {i: (follow.get((last, i), 0), counts[i]) for i in items}
        assert got["most popular"][m] == brute_rank(popular, target, seen)
        assert got["last-item transitions"][m] == brute_rank(moves, target, seen)


def test_blocks_do_not_change_ranks(tmp_path, monkeypatch):
    store = small_store(tmp_path / "store", lengths=(20, 9, 14, 3, 30))
    split = make_split(store, "reference")
    whole = baselines.rank_baselines(store, split.train_end, split.test)
    monkeypatch.setattr(baselines, "BLOCK_SEEN", 10)
    parts = baselines.rank_baselines(store, split.train_end, split.test)
    for name, ranks in whole.items():
        assert ranks.tolist() == parts[name].tolist()


def test_no_training_pairs_falls_back_to_popularity(tmp_path):
    store = write_store(
        tmp_path / "s", offsets=np.array([0, 2, 4]), item_ids=np.array([1, 2, 1, 3]),
        timestamps=np.arange(4), num_items=3, meta={},
    )  # fmt: skip
    split = make_split(store, "reference")
    model = baselines.Transitions(store, split.train_end)
    # One training event each, item 1 twice: items 2 and 3 tie behind it.
    assert baselines.rank_baseline(model, store, split.test, "none").tolist() == [2.5, 2.5]
    assert baselines.rank_baseline(model, store, Targets(np.array([], int), np.array([], int)), "none").tolist() == []


def test_expand_by_hand():
    rows, offsets = baselines.expand(np.array([4, 9, 2]), np.array([7, 9, 3]))
    assert (rows.tolist(), offsets.tolist()) == ([4, 5, 6, 2], [0, 3, 3, 4])
