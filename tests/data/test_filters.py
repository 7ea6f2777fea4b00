"""Filters, deduplication, maximum length and the vocabulary cap, on logs small enough to redo by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu.config import DataConfig
from hstu.data.store import SequenceStore
from hstu.errors import UserError
from hstu.prepare import prepare
from tests.data.logs import nothing_left, prepare_log, sequences, write_ml_1m

# user: items. Item counts: a 4, b 3, c 2, d 1. User counts: 1 3, 2 3, 3 2, 4 2.
LOG = {1: "abc", 2: "abd", 3: "ab", 4: "ac"}


def write_log(tmp_path: Path, log: dict[int, str] = LOG) -> Path:
    lines = ["user,item,timestamp"]
    lines += [f"{user},{item},{10 * user + place}" for user, items in log.items() for place, item in enumerate(items)]
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "log.csv"


def items_of(store: SequenceStore) -> dict[Any, str]:
    return {user: "".join(item for item, _ in events) for user, events in sequences(store).items()}


def test_no_filter(tmp_path: Path) -> None:
    assert items_of(prepare_log(tmp_path, write_log(tmp_path))) == LOG


def test_one_pass_counts_on_the_raw_log_only(tmp_path: Path) -> None:
    # Item d (1 event) and users 3 and 4 (2 events) go; user 2 is then left with ab and goes too. Iterating would
    # drop b and c next, which have one event left.
    store = prepare_log(tmp_path, write_log(tmp_path), min_user_events=3, min_item_events=2)
    assert items_of(store) == {1: "abc"}
    assert store.item_raw_ids.tolist() == ["a", "b", "c"]
    assert store.meta["removed"] == {"minimum counts": 7}


def test_vocabulary_holds_items_that_only_dropped_users_had(tmp_path: Path) -> None:
    # First drop: item x and user 3. User 2 is left with bc and goes in the second drop.
    log = {1: "aab", 2: "bcx", 3: "c"}  # a 2, b 2, c 2, x 1; user 3 has 1
    store = prepare_log(tmp_path, write_log(tmp_path, log), min_user_events=3, min_item_events=2)
    assert items_of(store) == {1: "aab"}
    assert store.item_raw_ids.tolist() == ["a", "b", "c"]  # c is nobody's now, but was counted
    assert store.meta["counts"]["items_with_events"] == 2


def test_iterative_reaches_the_core(tmp_path: Path) -> None:
    # 2-core of a chain: 5 ef goes with f, then 4 de with e, ...; users 1 2 (ab) remain.
    log = {1: "ab", 2: "ab", 3: "bc", 4: "cd", 5: "de", 6: "ef"}
    store = prepare_log(
        tmp_path, write_log(tmp_path, log), min_user_events=2, min_item_events=2, filter_mode="iterative"
    )
    assert items_of(store) == {1: "ab", 2: "ab"}
    assert store.item_raw_ids.tolist() == ["a", "b"]


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no event is left of 10 .*data.min_user_events=9.*lower them"):
        prepare_log(tmp_path, write_log(tmp_path), min_user_events=9)
    assert nothing_left(tmp_path)


REPEATS = "user,item,timestamp,rating\n1,a,30,1\n1,a,10,2\n1,b,20,3\n1,a,10,2\n1,a,10,5\n2,a,10,2\n"


@pytest.mark.parametrize(
    ("policy", "expected", "removed"),
    [
        ("none", [("a", 10, 2), ("a", 10, 2), ("a", 10, 5), ("b", 20, 3), ("a", 30, 1)], None),
        ("exact", [("a", 10, 2), ("a", 10, 5), ("b", 20, 3), ("a", 30, 1)], 1),
        ("first", [("a", 10, 2), ("b", 20, 3)], 3),
        ("last", [("b", 20, 3), ("a", 30, 1)], 3),
    ],
)
def test_dedup(tmp_path: Path, policy: str, expected: list[tuple[str, int, int]], removed: int | None) -> None:
    (tmp_path / "log.csv").write_text(REPEATS)
    store = prepare_log(tmp_path, tmp_path / "log.csv", {"action": "rating"}, dedup=policy)
    assert store.actions is not None
    found = [(*event, int(a)) for event, a in zip(sequences(store)[1], store.actions, strict=False)]
    assert found == expected
    assert len(sequences(store)[2]) == 1
    assert store.meta["removed"].get("duplicates") == removed


def test_counts_are_taken_after_dedup(tmp_path: Path) -> None:
    path = write_log(tmp_path, {1: "aab", 2: "abc"})
    assert items_of(prepare_log(tmp_path, path, dedup="first", min_user_events=3)) == {2: "abc"}


def test_max_events_keeps_the_most_recent(tmp_path: Path) -> None:
    store = prepare_log(tmp_path, write_log(tmp_path), max_events=2)
    assert items_of(store) == {1: "bc", 2: "bd", 3: "ab", 4: "ac"}
    assert store.meta["removed"] == {"maximum length": 2}
    assert store.offsets.tolist() == [0, 2, 4, 6, 8]


def test_vocabulary_cap(tmp_path: Path) -> None:
    store = prepare_log(tmp_path, write_log(tmp_path), max_items=3)
    assert store.num_items == 3
    assert store.item_raw_ids.tolist() == ["a", "b", "<rare>"]
    assert store.item_ids.tolist() == [1, 2, 3, 1, 2, 3, 1, 2, 1, 3]
    assert prepare_log(tmp_path, write_log(tmp_path), max_items=4).item_raw_ids.tolist() == list("abcd")


def test_vocabulary_cap_of_integer_ids_and_of_ties(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,item,timestamp\n1,30,1\n1,20,2\n1,10,3\n")
    store = prepare_log(tmp_path, tmp_path / "log.csv", max_items=2)
    assert store.item_raw_ids.tolist() == [10, -1]  # equally frequent: the smaller raw id stays
    assert store.item_ids.tolist() == [2, 2, 1]


def test_cap_on_a_catalogue_keeps_titles(tmp_path: Path) -> None:
    raw = write_ml_1m(tmp_path / "raw")
    config = DataConfig(
        name="ml", source="movielens-dat", raw=str(raw), root=str(tmp_path), max_items=3, protocol="stable"
    )
    store = prepare(config, quiet=True)
    title = store.item_attribute("title")
    assert store.item_raw_ids.tolist() == [7, 10, -1]
    assert title is not None and title.tolist() == ["Heat (1995)", "Big (1988)", "<rare>"]


def test_a_minimum_on_a_catalogue_drops_its_rare_films(tmp_path: Path) -> None:
    raw = write_ml_1m(tmp_path / "raw")
    config = DataConfig(name="ml", source="movielens-dat", raw=str(raw), root=str(tmp_path), min_item_events=2)
    assert prepare(config, quiet=True).item_raw_ids.tolist() == [7, 10, 30]


def books_by_hand(rows: list[tuple[str, str]], least: int) -> tuple[set[str], dict[str, int]]:
    """The one-pass filter of docs/data.md, word for word."""
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    for user, item in rows:
        users[user] = users.get(user, 0) + 1
        items[item] = items.get(item, 0) + 1
    kept = [(u, i) for u, i in rows if users[u] >= least and items[i] >= least]
    vocabulary = {i for _, i in kept}
    left: dict[str, int] = {}
    for user, _ in kept:
        left[user] = left.get(user, 0) + 1
    return vocabulary, {u: n for u, n in left.items() if n >= least}


def test_amazon_books_filter_against_the_protocol(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [(f"A{u}", f"B{i:03d}") for u, i in zip(rng.zipf(1.4, 4000) % 400, rng.zipf(1.3, 4000) % 500, strict=True)]
    path = tmp_path / "ratings_Books.csv"
    path.write_text("".join(f"{u},{i},5.0,{86400 * (n % 40)}\n" for n, (u, i) in enumerate(rows)))
    config = DataConfig(
        name="books",
        source="amazon-2014",
        category="Books",
        raw=str(path),
        root=str(tmp_path),
        min_user_events=5,
        min_item_events=5,
    )
    store = prepare(config, quiet=True)
    vocabulary, users = books_by_hand(rows, 5)
    assert store.item_raw_ids.tolist() == sorted(vocabulary)
    assert dict(zip(store.user_raw_ids.tolist(), np.diff(store.offsets).tolist(), strict=True)) == users
    assert len(users) < len({u for u, _ in rows})
    assert store.actions is not None and (np.asarray(store.actions) == 5).all()
