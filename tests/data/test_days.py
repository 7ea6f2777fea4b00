"""Days of a log: what is trained on when, and with which history."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hstu.data.days import Day, DayBatches, StoreDays, day_label, first_rows_from
from hstu.data.share import Ranks
from hstu.data.store import SequenceStore, write_store

DAY = 100


def make_store(
    folder: Path, users: list[list[int]], first_item: int = 1, actions: list[float] | None = None
) -> SequenceStore:
    """Users by the times of their events; items are numbered through."""
    times = np.array([t for user in users for t in user], np.int64)
    offsets = np.cumsum([0, *map(len, users)])
    return write_store(
        folder, offsets=offsets, item_ids=np.arange(first_item, first_item + len(times)), timestamps=times,
        num_items=first_item + len(times), meta={}, actions=None if actions is None else np.float32(actions),
    )  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> SequenceStore:
    """Rows 0..2, 3..6, 7, 8..9."""
    return make_store(tmp_path / "store", [[10, 120, 130], [20, 30, 110, 510], [140], [520, 530]])


def random_store(folder: Path, seed: int = 0) -> SequenceStore:
    rng = np.random.default_rng(seed)
    return make_store(folder, [sorted(rng.integers(0, 1000, rng.integers(1, 60)).tolist()) for _ in range(40)])


def rows_of(day: Day) -> list[list[int]]:
    return [list(range(a, b)) for a, b in zip(day.first, day.end, strict=True)]


def test_days_without_events_are_left_out(store: SequenceStore) -> None:
    days = StoreDays(store, DAY)
    assert len(days) == 3
    found = [days.open(i) for i in range(3)]
    assert [rows_of(d) for d in found if d] == [[[0], [3, 4], [], []], [[1, 2], [5], [7], []], [[], [6], [], [8, 9]]]
    assert [(d.num_events, d.num_users) for d in found if d] == [(3, 2), (4, 3), (3, 2)]
    assert days.open(3) is None
    again = days.open(1)
    assert again is not None and rows_of(again) == [[1, 2], [5], [7], []], "days can be opened in any order"


def test_days_of_another_clock(store: SequenceStore) -> None:
    """25 s behind: days begin at -75, 25, 125, 425 and 525."""
    days = StoreDays(store, DAY, -25)
    found = [day for i in range(len(days)) if (day := days.open(i))]
    expected = [[[0], [3], [], []], [[1], [4, 5], [], []], [[2], [], [7], []], [[], [6], [], [8]], [[], [], [], [9]]]
    assert [rows_of(day) for day in found] == expected
    assert [day.label[-8:] for day in found] == ["23:58:20", "00:00:00", "00:01:40", "00:06:40", "00:08:20"]


def test_targets_are_the_first_events_with_a_history(store: SequenceStore) -> None:
    days = StoreDays(store, DAY)
    expected = {0: [], 1: [(0, 1), (1, 5)], 2: [(1, 6)]}
    for index, pairs in expected.items():
        day = days.open(index)
        assert day is not None
        targets = day.targets(0, seed=0)
        assert list(zip(targets.users.tolist(), targets.rows.tolist(), strict=True)) == pairs
    day = days.open(1)
    assert day is not None
    assert {tuple(day.targets(1, seed).users.tolist()) for seed in range(20)} == {(0,), (1,)}


@pytest.mark.parametrize("time", [-5, 0, 1, 499, 500, 999, 1000])
def test_first_rows_from_a_time(tmp_path: Path, time: int) -> None:
    store = random_store(tmp_path / "store")
    users = zip(store.offsets, store.offsets[1:], strict=False)
    expected = [a + int(np.searchsorted(store.timestamps[a:b], time)) for a, b in users]
    start = np.asarray(store.offsets[:-1])
    assert first_rows_from(store, time, start).tolist() == expected
    between = first_rows_from(store, time // 2, start)
    assert first_rows_from(store, time, between).tolist() == expected


def test_labels() -> None:
    assert day_label(1_700_006_400, 86_400) == "2023-11-15"
    assert day_label(1_700_010_000, 3_600) == "2023-11-15T01:00:00"


def batches(store: SequenceStore, max_len: int, **values: object) -> DayBatches:
    settings = {"seed": 0, "batch_users": 3, "batch_tokens": None, "event_weights": "none", **values}
    return DayBatches(StoreDays(store, DAY), max_len, device=torch.device("cpu"), **settings)  # type: ignore[arg-type]


def trained(store: SequenceStore, batch: object) -> list[tuple[int, list[int]]]:
    """(predicted row, rows of its history) of every position that counts; items are numbered like rows."""
    found = []
    offsets, counted = batch.offsets.tolist(), batch.counted  # type: ignore[attr-defined]
    counts = set(range(offsets[-1]) if counted is None else counted.tolist())
    items, labels = batch.item_ids.tolist(), batch.labels.tolist()  # type: ignore[attr-defined]
    for first, end in zip(offsets, offsets[1:], strict=False):
        for place in range(first, end):
            if place in counts:
                found.append((labels[place] - 1, [i - 1 for i in items[first : place + 1]]))
    return found


@pytest.mark.parametrize("max_len", [1, 2, 5, 100])
def test_every_event_is_trained_on_once_on_its_day(tmp_path: Path, max_len: int) -> None:
    store = random_store(tmp_path / "store")
    data = batches(store, max_len)
    owner = np.repeat(np.arange(store.num_users), np.diff(store.offsets))
    seen: list[int] = []
    for index, number in enumerate(data.days.numbers):  # type: ignore[attr-defined]
        today = []
        for step in range(data.num_steps(index)):
            share = data.share(index, step, Ranks())
            found = trained(store, share.batch)
            assert share.num_events == len(found)
            assert share.batch.max_len <= max_len
            for row, history in found:
                assert history == list(range(history[0], row)), "what came right before"
                assert len(history) <= max_len and owner[history[0]] == owner[row]
            today += [row for row, _ in found]
        assert {int(store.timestamps[row]) // DAY for row in today} <= {int(number)}
        seen += today
    first_events = store.offsets[:-1].tolist()
    assert sorted(seen) == sorted(set(range(store.num_events)) - set(first_events))


def test_a_day_has_the_longest_history_that_fits(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", [[1, 2, 3, 4, 5, 110, 120]])
    assert trained(store, batches(store, 4).share(1, 0, Ranks()).batch) == [(5, [2, 3, 4]), (6, [2, 3, 4, 5])]


def test_what_counts_of_a_day(tmp_path: Path) -> None:
    """Rows 0..4 and 5..7, the second day from rows 2 and 6; rows 3 and 7 have an action of 0."""
    times, actions = [[10, 20, 110, 120, 130], [30, 140, 150]], [1.0, 1.0, 1.0, 0.0, 2.0, 1.0, 3.0, 0.0]
    store = make_store(tmp_path / "store", times, actions=actions)
    for event_weights, rows in (("none", [2, 3, 4, 6, 7]), ("actions", [2, 4, 6])):
        share = batches(store, 100, event_weights=event_weights).share(1, 0, Ranks())
        assert sorted(row for row, _ in trained(store, share.batch)) == rows
        assert sorted(share.batch.predicted_items.tolist()) == [row + 1 for row in rows]
        assert share.num_events == 5 and share.batch.num_events == 6  # row 1 is read, and predicted the day before
    first = batches(store, 100).share(0, 0, Ranks()).batch
    assert first.counted is None and first.labels.tolist() == [2]


def test_order_is_a_function_of_seed_and_day(tmp_path: Path) -> None:
    store = random_store(tmp_path / "store")
    one, other = batches(store, 9), batches(store, 9)
    other.share(2, 0, Ranks())
    first = [one.share(4, step, Ranks()).batch.item_ids.tolist() for step in range(one.num_steps(4))]
    assert [other.share(4, step, Ranks()).batch.item_ids.tolist() for step in range(other.num_steps(4))] == first
    assert batches(store, 9, seed=1).share(4, 0, Ranks()).batch.item_ids.tolist() != first[0]


def test_ranks_share_a_batch(tmp_path: Path) -> None:
    store = random_store(tmp_path / "store")
    whole = batches(store, 9, batch_users=8).share(3, 0, Ranks())
    parts = [batches(store, 9, batch_users=8).share(3, 0, Ranks(rank, 2)) for rank in range(2)]
    assert parts[0].num_events == parts[1].num_events == whole.num_events
    users = [u for part in parts for u in part.batch.users.tolist()]
    assert sorted(users) == sorted(whole.batch.users.tolist())
    rows = torch.cat([part.batch.random_rows for part in parts])  # type: ignore[misc]
    items = torch.cat([part.batch.item_ids for part in parts])
    assert torch.equal(items, whole.batch.item_ids[rows]), "each event draws what it draws on one rank"
