"""Batches: what a batch holds, the order as a function of (seed, epoch, step), the token budget, the prefetcher."""

import time

import numpy as np
import pytest
import torch

from hstu.data.batches import EventColumns, Prefetcher, TrainBatches, eval_batches
from hstu.data.splits import Targets, make_split
from hstu.errors import UserError
from tests.serving import small_store

LENGTHS = (12, 3, 2, 7, 1, 0, 40)


@pytest.fixture
def store(tmp_path):
    return small_store(tmp_path / "store", LENGTHS, actions=np.arange(1, sum(LENGTHS) + 1, dtype=np.float32))


def batches(store, selection="reference", event_weights="none", **options):
    settings = {"max_len": 10, "seed": 0, "batch_users": 3} | options
    return TrainBatches(EventColumns(store, None, event_weights), store, make_split(store, selection), **settings)


def all_batches(data, epoch):
    return [data.batch(epoch, step) for step in range(data.num_steps(epoch))]


@pytest.mark.parametrize("selection, held_out", [("reference", 1), ("validation", 2)])
def test_a_user_is_the_last_events_before_the_held_out_ones(store, selection, held_out):
    seen = {}
    for batch in all_batches(batches(store, selection), 0):
        bounds = batch.offsets.tolist()
        for user, start, stop in zip(batch.users.tolist(), bounds[:-1], bounds[1:], strict=True):
            seen[user] = [t[start:stop].tolist() for t in (batch.item_ids, batch.labels, batch.request_times)]
        assert batch.max_len == max(np.diff(bounds)) <= 10
    expected = [u for u, n in enumerate(LENGTHS) if n - held_out >= 2]
    assert sorted(seen) == expected
    for user in expected:
        end = int(store.offsets[user + 1]) - held_out
        first = max(int(store.offsets[user]), end - 1 - 10)
        assert seen[user][0] == store.item_ids[first : end - 1].tolist()
        assert seen[user][1] == store.item_ids[first + 1 : end].tolist()
        assert seen[user][2] == store.timestamps[first + 1 : end].tolist()


def test_the_held_out_events_are_in_no_training_batch(store):
    # Items are replaced by event numbers, so that an event is recognised wherever it turns up.
    columns = EventColumns(store)
    columns.item_ids = torch.arange(store.num_events, dtype=torch.int32)
    split = make_split(store, "validation")
    data = TrainBatches(columns, store, split, max_len=100, seed=0, batch_users=100)
    batch = data.batch(0, 0)
    used = set(batch.item_ids.tolist()) | set(batch.labels.tolist())
    assert not used & (set(split.test.rows.tolist()) | set(split.validation.rows.tolist()))
    assert batch.timestamps.shape == batch.item_ids.shape


def test_order_is_a_function_of_seed_and_epoch(store):
    first, second = batches(store), batches(store)
    late = second.batch(3, 1)  # asked without the epochs before it
    assert torch.equal(late.users, first.batch(3, 1).users)
    orders = {tuple(torch.cat([b.users for b in all_batches(first, e)]).tolist()) for e in range(8)}
    assert len(orders) > 1
    other = {tuple(torch.cat([b.users for b in all_batches(batches(store, seed=1), e)]).tolist()) for e in range(8)}
    assert orders != other


def test_every_user_once_an_epoch_by_users_and_by_tokens(store):
    by_users, by_tokens = batches(store), batches(store, batch_tokens=12)
    for data in (by_users, by_tokens):
        users = torch.cat([b.users for b in all_batches(data, 2)]).tolist()
        assert sorted(users) == data.users.tolist()
    sizes = [b.num_events for b in all_batches(by_tokens, 2)]
    assert max(sizes) <= 12
    assert by_tokens.num_skipped == 3


def test_a_user_over_the_token_budget_stands_alone(store):
    sizes = [len(b.users) for b in all_batches(batches(store, max_len=100, batch_tokens=5), 0)]
    assert min(sizes) == 1 and sum(sizes) == 4


def test_weights_are_actions_over_their_mean(store):
    batch = batches(store, event_weights="actions", batch_users=10).batch(0, 0)
    mean = float(np.mean(store.actions))
    rows = [np.flatnonzero(store.timestamps == t)[0] for t in batch.request_times.tolist()]
    assert batch.weights.tolist() == pytest.approx([float(store.actions[r]) / mean for r in rows])


def test_positions_of_weight_zero_do_not_count(tmp_path, store):
    actions = np.arange(sum(LENGTHS), dtype=np.float32) % 3
    zeros = small_store(tmp_path / "zeros", LENGTHS, actions=actions)
    batch = batches(zeros, event_weights="actions", batch_users=10).batch(0, 0)
    rows = [np.flatnonzero(zeros.timestamps == t)[0] for t in batch.request_times.tolist()]
    expected = [place for place, row in enumerate(rows) if row % 3]
    assert 0 < len(expected) < batch.num_events and batch.counted.tolist() == expected
    assert batch.predicted_items.tolist() == batch.labels[expected].tolist()
    assert batches(store, event_weights="actions", batch_users=10).batch(0, 0).counted is None
    assert batches(zeros, batch_users=10).batch(0, 0).counted is None


def test_weights_without_actions_are_refused(tmp_path):
    with pytest.raises(UserError, match="no actions"):
        EventColumns(small_store(tmp_path / "s"), None, "actions")


def test_nobody_to_train_on_is_refused(tmp_path):
    store = small_store(tmp_path / "s", (1, 1, 2))
    with pytest.raises(UserError, match="no user has two training events"):
        batches(store)


def test_eval_batches_end_in_the_target(store):
    targets = Targets(np.array([0, 3, 6]), store.offsets[[1, 4, 7]] - 1)
    rows = []
    for batch, labels in eval_batches(store, targets, max_len=5, batch_users=2):
        last = batch.offsets[1:] - 1
        assert torch.equal(batch.labels[last], labels)
        assert batch.offsets.diff().tolist() == [5] * len(labels)
        rows += list(zip(labels.tolist(), batch.request_times[last].tolist(), strict=True))
    assert rows == [(int(store.item_ids[r]), int(store.timestamps[r])) for r in targets.rows]


def test_prefetcher_keeps_order_and_passes_errors_on():
    with Prefetcher(lambda i: i * i, 3, 20) as items:
        assert list(items) == [i * i for i in range(3, 20)]

    def fails(i):
        if i == 2:
            raise OSError("disk")
        return i

    with pytest.raises(OSError, match="disk"), Prefetcher(fails, 0, 5) as items:
        list(items)


def test_prefetcher_stops_when_left_early():
    made = []
    with Prefetcher(lambda i: made.append(i) or i, 0, 10_000) as items:
        assert next(iter(items)) == 0
    assert len(made) < 10


@pytest.mark.parametrize("slow", [0.0, 0.02])
@pytest.mark.parametrize("taken", [0, 1, 3, 8])
def test_prefetcher_of_ranks_stops_after_as_many_on_all(taken, slow):
    """However far the thread has come: with `ahead` items waiting one more may have begun."""
    made = []

    def make(i):
        time.sleep(slow)
        made.append(i)
        return i

    with Prefetcher(make, 5, 15, ahead=2, together=True) as items:
        iterator = iter(items)
        for _ in range(taken):
            next(iterator)
        time.sleep(0.03)
    assert made == list(range(5, min(5 + taken + 3, 15)))
