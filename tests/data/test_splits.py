"""Splits by hand: leave-last-out, global time, short users, the hash."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hstu.data.splits import make_event_split, make_split, resolve_split_time, split_hash
from hstu.data.store import SequenceStore, write_store
from hstu.errors import UserError


def make_store(
    path: Path, sequences: list[list[tuple[int, int]]], kind: str = "leave-last-out", time: str | None = None
) -> SequenceStore:
    """Sequences of (item, timestamp)."""
    flat = [event for sequence in sequences for event in sequence]
    return write_store(
        path,
        offsets=np.cumsum([0] + [len(s) for s in sequences]),
        item_ids=np.array([i for i, _ in flat]),
        timestamps=np.array([t for _, t in flat]),
        num_items=9,
        meta={"split": {"kind": kind, "time": time}},
    )


FIVE_TWO_ONE_ZERO_THREE = [
    [(1, 10), (2, 20), (3, 30), (4, 40), (5, 50)],
    [(6, 10), (7, 20)],
    [(8, 10)],
    [],
    [(1, 1), (2, 2), (3, 3)],
]


def test_leave_last_out_with_validation(tmp_path: Path) -> None:
    split = make_split(make_store(tmp_path / "s", FIVE_TWO_ONE_ZERO_THREE))
    assert split.test.users.tolist() == [0, 1, 4]
    assert split.test.rows.tolist() == [4, 6, 10]
    assert split.validation is not None
    assert split.validation.users.tolist() == [0, 4]
    assert split.validation.rows.tolist() == [3, 9]
    assert split.train_end.tolist() == [3, 6, 8, 8, 9]


def test_leave_last_out_reference_selection(tmp_path: Path) -> None:
    split = make_split(make_store(tmp_path / "s", FIVE_TWO_ONE_ZERO_THREE), "reference")
    assert split.validation is None
    assert split.test.rows.tolist() == [4, 6, 10]
    assert split.train_end.tolist() == [4, 6, 8, 8, 10]


GLOBAL = [
    [(1, 10), (2, 20), (3, 70), (4, 80)],  # first event from T = 60 on: row 2
    [(5, 30), (6, 50)],  # all before T
    [(7, 65), (8, 66)],  # all after T: no history, no target
    [(1, 15), (2, 25), (3, 55), (4, 60)],
]


def test_global_time_reference_selection(tmp_path: Path) -> None:
    split = make_split(make_store(tmp_path / "s", GLOBAL, "global-time", "60"), "reference")
    assert split.train_end.tolist() == [2, 6, 6, 11]
    assert split.test.users.tolist() == [0, 3]
    assert split.test.rows.tolist() == [2, 11]
    assert split.validation is None


def test_global_time_with_validation(tmp_path: Path) -> None:
    # 7 events lie before 60 and 5 from 60 on: so Tv is the third smallest time of those before, 20.
    split = make_split(make_store(tmp_path / "s", GLOBAL, "global-time", "60"))
    assert split.train_end.tolist() == [1, 4, 6, 9]
    assert split.validation is not None
    assert split.validation.users.tolist() == [0, 3]
    assert split.validation.rows.tolist() == [1, 9]
    assert split.test.rows.tolist() == [2, 11]


def test_global_time_nothing_leaks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sequences = [[(1, int(t)) for t in np.sort(rng.integers(0, 1000, rng.integers(1, 30)))] for _ in range(200)]
    store = make_store(tmp_path / "s", sequences, "global-time", "0.8q")
    split = make_split(store)
    times, time = np.asarray(store.timestamps), resolve_split_time("0.8q", store.timestamps)
    assert split.validation is not None
    trained = np.concatenate([times[a:b] for a, b in zip(store.offsets, split.train_end, strict=False)])
    assert trained.max() < times[split.validation.rows].min()
    assert times[split.validation.rows].max() < time <= times[split.test.rows].min()
    for targets in (split.validation, split.test):
        assert (targets.rows > store.offsets[targets.users]).all()
        assert (targets.rows < store.offsets[targets.users + 1]).all()


def test_event_split_by_time_holds_out_every_event(tmp_path: Path) -> None:
    split = make_event_split(make_store(tmp_path / "s", GLOBAL, "global-time", "60"))
    assert split.train_end.tolist() == [1, 4, 6, 9]  # Tv = 20, as above
    assert split.validation is not None
    assert split.validation.rows.tolist() == [1, 4, 5, 9, 10]
    assert split.validation.users.tolist() == [0, 1, 1, 3, 3]  # user 1 is cold: nothing before Tv
    assert split.test.rows.tolist() == [2, 3, 6, 7, 11]
    assert split.test.users.tolist() == [0, 0, 2, 2, 3]  # user 2 is cold
    assert split.test.rows.dtype == split.test.users.dtype == np.int64


def test_event_split_by_time_with_reference_selection(tmp_path: Path) -> None:
    split = make_event_split(make_store(tmp_path / "s", GLOBAL, "global-time", "60"), "reference")
    assert split.train_end.tolist() == [2, 6, 6, 11]
    assert split.validation is None
    assert split.test.rows.tolist() == [2, 3, 6, 7, 11]


def test_event_split_by_quantile_holds_out_each_event_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    sequences = [[(1, int(t)) for t in np.sort(rng.integers(0, 10**6, rng.integers(0, 30)))] for _ in range(200)]
    store = make_store(tmp_path / "s", sequences, "global-time", "0.8q")
    split = make_event_split(store)
    assert split.validation is not None
    train = [row for a, b in zip(store.offsets, split.train_end, strict=False) for row in range(a, b)]
    rows = np.concatenate([train, split.validation.rows, split.test.rows])
    assert np.array_equal(np.sort(rows), np.arange(store.num_events))
    times = np.asarray(store.timestamps)
    assert times[train].max() < times[split.validation.rows].min()
    assert times[split.validation.rows].max() < times[split.test.rows].min()
    assert abs(len(split.test) - 0.2 * store.num_events) <= 2
    for targets in (split.validation, split.test):
        assert (np.diff(targets.rows) > 0).all() and (np.diff(targets.users) >= 0).all()
        assert (store.offsets[targets.users] <= targets.rows).all()
        assert (targets.rows < store.offsets[targets.users + 1]).all()


@pytest.mark.parametrize("selection", ["validation", "reference"])
def test_event_split_leave_last_out_is_the_plain_one(tmp_path: Path, selection: str) -> None:
    store = make_store(tmp_path / "s", FIVE_TWO_ONE_ZERO_THREE)
    events, plain = make_event_split(store, selection), make_split(store, selection)
    assert events.train_end.tolist() == plain.train_end.tolist()
    assert events.test.rows.tolist() == plain.test.rows.tolist()
    assert (events.validation is None) == (plain.validation is None)
    if events.validation is not None and plain.validation is not None:
        assert events.validation.rows.tolist() == plain.validation.rows.tolist()


@pytest.mark.parametrize(
    ("time", "selection", "message"),
    [
        ("1000", "reference", "data.split_time=1000: no event lies at or after it"),
        ("5", "reference", "data.split_time=5: no event lies before it"),
        ("25", "validation", "only 3 of 12 events lie before"),
    ],
)
def test_event_split_without_a_part(tmp_path: Path, time: str, selection: str, message: str) -> None:
    store = make_store(tmp_path / "s", GLOBAL, "global-time", "60")
    store.meta["split"]["time"] = time
    with pytest.raises(UserError, match=message):
        make_event_split(store, selection)


def test_global_time_without_any_target(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no user has events both before and after"):
        make_store(tmp_path / "s", GLOBAL, "global-time", "1000")


def test_global_time_too_early_for_a_validation_part(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", GLOBAL, "global-time", "25")
    with pytest.raises(UserError, match="only 3 of 12 events lie before"):
        make_split(store)
    assert len(make_split(store, "reference").test) == 2


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1400000000", 1_400_000_000),
        ("2015-03-31", 1_427_760_000),
        ("2015-03-31T12:00:00", 1_427_803_200),
        ("2015-03-31T14:00:00+02:00", 1_427_803_200),
        ("2015-03-31T12:00:00Z", 1_427_803_200),
        ("0.5q", 6),
        ("0.9q", 10),
    ],
)
def test_split_time(value: str, expected: int) -> None:
    assert resolve_split_time(value, np.arange(1, 11)) == expected


@pytest.mark.parametrize("value", ["tomorrow", "1.5q", "0q", "xq", "2015-13-01"])
def test_wrong_split_time(value: str) -> None:
    with pytest.raises(UserError, match="data.split_time"):
        resolve_split_time(value, np.arange(10))


def test_unknown_selection_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected validation or reference"):
        make_split(make_store(tmp_path / "s", GLOBAL), "best")
    with pytest.raises(ValueError, match="expected validation or reference"):
        make_event_split(make_store(tmp_path / "t", GLOBAL), "best")


def test_hash_tells_order_split_and_catalogue(tmp_path: Path) -> None:
    base = [[(1, 5), (2, 5), (3, 5), (4, 9)], [(1, 1), (2, 2)]]
    swapped = [[(2, 5), (1, 5), (3, 5), (4, 9)], [(1, 1), (2, 2)]]  # same targets, other history
    same = split_hash(make_store(tmp_path / "a", base))
    assert split_hash(make_store(tmp_path / "b", base)) == same
    assert split_hash(make_store(tmp_path / "c", swapped)) != same
    assert split_hash(make_store(tmp_path / "d", base, "global-time", "9")) != same
    assert len(same) == 16
