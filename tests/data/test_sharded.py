"""Sharded stores: the same data as one store, bounded memory, disjoint shards, one view, and every kind of failure."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from hstu.config import DataConfig
from hstu.config_ranking import ActionConfig, FeatureConfig, RankingConfig, TaskConfig
from hstu.data import sharded_build, spill
from hstu.data.hashing import hash_ids, hash_texts, shards_of
from hstu.data.ranking import RankingData
from hstu.data.sharded_store import JoinedColumn, ShardedStore, assign_shards
from hstu.data.splits import kth_smallest, make_event_split, make_split, split_hash
from hstu.data.store import SequenceStore
from hstu.errors import UserError
from hstu.prepare import print_summary
from tests.data.logs import log_config, nothing_left, prepare_log

COLUMNS = {"action": "stars", "values": ["price"], "features": ["device"], "optional": ["price"]}


def write_files(folder: Path, num_files: int = 4, ending: str = "parquet", seed: int = 0) -> Path:
    """Many users, ties, duplicates, rare items, missing prices and devices, over several files."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(num_files):
        size = 700 + number
        frame = pl.DataFrame(
            {
                "user": [f"user {i}" for i in rng.integers(0, 150, size)],
                "item": rng.zipf(1.5, size) % 80,
                "timestamp": 10**9 + rng.integers(0, 400, size),
                "stars": rng.integers(1, 6, size).astype(np.float32),
                "price": [None if p < 0.2 else float(p) for p in rng.random(size).astype(np.float32)],
                "device": [[None, "web", "app", "téléphone"][d] for d in rng.integers(0, 4, size)],
            }
        )
        frame = pl.concat([frame, frame.sample(20, seed=number)])
        path = folder / f"part-{number:03d}.{ending}"
        if ending == "parquet":
            frame.write_parquet(path)
        elif ending == "csv":
            frame.write_csv(path)
        else:
            frame.write_ndjson(path)
    return folder


def by_user(store: SequenceStore) -> dict[Any, dict[str, list[Any]]]:
    """Raw user id -> every event column, in order."""
    columns = {"items": store.item_ids, "times": store.timestamps, **store.columns}
    if store.actions is not None:
        columns["actions"] = store.actions
    bounds = zip(store.user_raw_ids.tolist(), store.offsets, store.offsets[1:], strict=False)
    # NaN is not equal to itself: compared as text
    return {user: {n: [str(v) for v in c[a:b].tolist()] for n, c in columns.items()} for user, a, b in bounds}


def assert_same(sharded: SequenceStore, single: SequenceStore) -> None:
    assert isinstance(sharded, ShardedStore)
    assert by_user(sharded) == by_user(single)
    assert sharded.item_raw_ids.tolist() == single.item_raw_ids.tolist()
    for name in ("users", "items", "items_with_events", "events"):
        assert sharded.meta["counts"][name] == single.meta["counts"][name]
    assert sharded.meta["removed"] == single.meta["removed"]
    assert sharded.meta["rejects"] == single.meta["rejects"]
    assert sharded.meta["rows_read"] == single.meta["rows_read"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"protocol": "reference", "protocol_seed": 3},
        {"dedup": "exact"},
        {"dedup": "last", "min_item_events": 4},
        {"min_user_events": 18, "min_item_events": 40},
        {"min_user_events": 17, "min_item_events": 15, "filter_mode": "iterative"},
        {"max_items": 10, "max_events": 7},
    ],
    ids=lambda settings: ",".join(settings) or "plain",
)
def test_same_data_as_one_store(tmp_path: Path, settings: dict[str, Any]) -> None:
    raw = write_files(tmp_path / "raw")
    assert_same(
        prepare_log(tmp_path, raw, COLUMNS, shards=3, **settings), prepare_log(tmp_path, raw, COLUMNS, **settings)
    )


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_other_formats_and_bad_rows(tmp_path: Path, ending: str) -> None:
    raw = write_files(tmp_path / "raw", ending=ending)
    with open(raw / f"part-002.{ending}", "a") as file:
        file.write("user 3,7,never,3.0,0.5,web\n" if ending == "csv" else '{"user": "user 3", "item": 7}\n')
    stores = [prepare_log(tmp_path, raw, COLUMNS, on_bad_row="skip", shards=s) for s in (5, None)]
    assert sum(stores[0].meta["rejects"].values()) == 1
    assert_same(*stores)
    assert (stores[0].path / "rejects.csv").read_text() == (stores[1].path / "rejects.csv").read_text()


def test_small_pieces_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many flushes, many chunks and many buckets instead of one of each."""
    raw = write_files(tmp_path / "raw")
    monkeypatch.setattr(spill, "CHUNK_ROWS", 100)
    monkeypatch.setattr(spill, "_MIN_COMPACTION", 50)
    monkeypatch.setattr(sharded_build, "SPILL_SHARE", 1e-5)
    monkeypatch.setattr(sharded_build, "_MIN_BUCKET_EVENTS", 64)
    monkeypatch.setattr(sharded_build, "EVENT_BYTES", 2**30)
    monkeypatch.setattr(sharded_build, "_LARGEST_TABLE", 10)
    sharded = prepare_log(tmp_path, raw, COLUMNS, shards=2, dedup="first", min_item_events=5)
    assert_same(sharded, prepare_log(tmp_path, raw, COLUMNS, dedup="first", min_item_events=5))


def test_every_shard_is_a_store_that_numpy_reads(tmp_path: Path) -> None:
    store = prepare_log(tmp_path, write_files(tmp_path / "raw"), COLUMNS, shards=3)
    seen: list[str] = []
    for number, entry in enumerate(store.meta["shards"]):
        folder = store.path / entry["folder"]
        users = np.load(folder / "users" / "raw_id.npy")
        assert shards_of(hash_ids(users), 3).tolist() == [number] * len(users)
        assert len(np.load(folder / "offsets.npy")) == entry["users"] + 1
        assert len(np.load(folder / "item_ids.npy")) == entry["events"]
        assert np.load(folder / "items" / "raw_id.npy").tolist() == store.item_raw_ids.tolist()
        alone = SequenceStore.open(folder)
        assert alone.meta["split_hash"] == entry["split_hash"] == split_hash(alone)
        feature = alone.feature_values("device")
        assert feature is not None and feature.tolist() == ["app", "téléphone", "web"]
        seen += users.tolist()
    assert len(seen) == len(set(seen)) == store.num_users


def test_integer_ids_in_text_become_integers_in_every_shard(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,item,timestamp\n" + "".join(f"{u},1,{u}\n" for u in range(40)))
    store = prepare_log(tmp_path, tmp_path / "log.csv", shards=4)
    assert store.user_raw_ids.dtype == np.int64 and sorted(store.user_raw_ids.tolist()) == list(range(40))
    (tmp_path / "log.csv").write_text("user,item,timestamp\nx,1,5\n" + "".join(f"{u},1,{u}\n" for u in range(40)))
    store = prepare_log(tmp_path, tmp_path / "log.csv", shards=4)
    assert store.user_raw_ids.dtype.kind == "U" and "x" in store.user_raw_ids


def test_more_shards_than_users(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,item,timestamp\na,1,5\na,2,6\n")
    settings = {"split": "global-time", "split_time": "6"}
    store = prepare_log(tmp_path, tmp_path / "log.csv", shards=8, **settings)
    assert [e["users"] for e in store.meta["shards"]].count(0) == 7
    assert_same(store, prepare_log(tmp_path, tmp_path / "log.csv", **settings))


@pytest.mark.parametrize("time", ["0.8q", str(10**9 + 300)])
@pytest.mark.parametrize("selection", ["validation", "reference"])
@pytest.mark.parametrize("make", [make_split, make_event_split])
def test_same_events_are_held_out(tmp_path: Path, time: str, selection: str, make: Any) -> None:
    raw = write_files(tmp_path / "raw")
    held = []
    for shards in (3, None):
        store = prepare_log(tmp_path, raw, split="global-time", split_time=time, shards=shards)
        split = make(store, selection)
        users = store.user_raw_ids
        held.append([
            sorted(zip(users[t.users].tolist(), (t.rows - store.offsets[t.users]).tolist(), strict=True))
            for t in (split.test, split.validation) if t is not None
        ])  # fmt: skip
        trained = dict(zip(users.tolist(), (split.train_end - store.offsets[:-1]).tolist(), strict=True))
        held[-1].append(sorted(trained.items()))
    assert held[0] == held[1] and len(held[0][0]) > 5


def test_split_hash_tells_contents_apart(tmp_path: Path) -> None:
    raw = write_files(tmp_path / "raw")
    first = prepare_log(tmp_path, raw, shards=3).meta["split_hash"]
    assert prepare_log(tmp_path, raw, shards=3, memory_mib=64).meta["split_hash"] == first
    assert prepare_log(tmp_path, raw, shards=4).meta["split_hash"] != first
    assert prepare_log(tmp_path, raw, shards=3, protocol="reference").meta["split_hash"] != first


def test_memory_does_not_change_which_store_it_is(tmp_path: Path) -> None:
    raw = write_files(tmp_path / "raw")
    assert prepare_log(tmp_path, raw, shards=2).path == prepare_log(tmp_path, raw, shards=2, memory_mib=64).path
    assert prepare_log(tmp_path, raw, shards=2).path != prepare_log(tmp_path, raw).path


def test_attributes_of_items_and_users(tmp_path: Path) -> None:
    raw = write_files(tmp_path / "raw")
    (tmp_path / "items.csv").write_text("id,title\n3,Three\n5,Five\n")
    (tmp_path / "users.csv").write_text("id,age\nuser 7,31\nuser 90,50\n")
    given = {"items_file": str(tmp_path / "items.csv"), "users_file": str(tmp_path / "users.csv")}
    columns = {"numeric": ["age"]}
    store = prepare_log(tmp_path, raw, columns, shards=3, **given)
    titles, ages = store.item_attribute("title"), store.user_attribute("age")
    assert titles is not None and titles[store.item_raw_ids.tolist().index(5)] == "Five"
    assert ages is not None and ages[store.user_raw_ids.tolist().index("user 90")] == 50.0
    assert store.user_attribute("height") is None


# The joined view


def test_ranking_data_of_shards(tmp_path: Path) -> None:
    """Labels, action bits and features of every event, by user, as of one store."""
    raw = write_files(tmp_path / "raw")
    config = RankingConfig(
        tasks={"stars": TaskConfig("actions", kind="ordinal", levels=[1, 2, 3, 4, 5])},
        actions={"price": ActionConfig(kind="thresholds", thresholds=[0.5])},
        event_features={"device": FeatureConfig(min_count=2)},
    )
    found = []
    for shards in (3, None):
        store = prepare_log(tmp_path, raw, COLUMNS, shards=shards)
        data, rows = RankingData(store, config), np.arange(store.num_events)
        device = data.event_features["device"].take(rows)[0]  # type: ignore[union-attr]
        values = np.column_stack([data.label("stars", rows), data.action_bits(rows), device])
        bounds = zip(store.user_raw_ids.tolist(), store.offsets, store.offsets[1:], strict=False)
        found.append({user: values[a:b].tolist() for user, a, b in bounds})
    assert found[0] == found[1] and len(found[0]) == 150


def test_joined_column_is_indexed_like_an_array() -> None:
    parts = [np.arange(4, dtype=np.int32), np.empty(0, np.int32), np.arange(4, 9, dtype=np.int32)]
    column, whole = JoinedColumn(parts), np.arange(9, dtype=np.int32)
    for index in (3, -1, slice(2, 7), slice(None), slice(0, 4), slice(8, 2), slice(1, 9, 3), whole > 3):
        assert np.array_equal(column[index], whole[index])
    rows = np.array([[8, 0], [-2, 4]])
    assert column[rows].tolist() == whole[rows].tolist()
    assert np.asarray(column).tolist() == whole.tolist() and column.dtype == np.int32 and len(column) == 9
    assert np.shares_memory(column[5:8], parts[2]), "a range inside one shard is no copy"
    with pytest.raises(IndexError, match="row 9 of a column with 9 rows"):
        column[np.array([9])]


def test_joined_texts_are_as_wide_as_the_widest() -> None:
    column = JoinedColumn([np.array(["a" * width]) for width in range(1, 101)])
    assert column.dtype == np.dtype("U100") and column[np.array([99, 0])].tolist() == ["a" * 100, "a"]


def test_kth_smallest() -> None:
    values = np.random.default_rng(0).integers(-50, 10**12, 1000)
    values[:300] = 7
    assert [kth_smallest(values, k) for k in (0, 299, 300, 500, 999)] == np.sort(values)[
        [0, 299, 300, 500, 999]
    ].tolist()


def test_shards_go_to_ranks_evenly_and_once() -> None:
    assert assign_shards([5, 1, 4, 2, 3], 2) == [[0, 1, 3], [2, 4]]
    assert assign_shards([0, 0, 0], 3) == [[0], [1], [2]]
    with pytest.raises(UserError, match="4 ranks and 2 shards: every rank needs one; prepare again with data.shards=4"):
        assign_shards([5, 5], 4)


# The hash


def test_hash_is_the_documented_one() -> None:
    """splitmix64 by hand, one text at a time."""

    def mix(z: int) -> int:
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    texts = ["", "7", "12345678", "123456789", "téléphone", "x" * 100]
    expected = []
    for text in texts:
        raw = text.encode()
        h = len(raw)
        for start in range(0, len(raw), 8):
            h = mix(h ^ int.from_bytes(raw[start : start + 8].ljust(8, b"\0"), "little"))
        expected.append(h)
    joined = "".join(texts).encode()
    assert hash_texts(joined, np.array([len(t.encode()) for t in texts])).tolist() == expected
    assert hash_ids(np.array(texts)).tolist() == expected
    assert spill.id_hashes(pl.Series(texts)).tolist() == expected
    assert hash_ids(np.array([7])).tolist() == hash_ids(np.array(["7"])).tolist() == [13566731111258911605]


# Failures


def failing_config(tmp_path: Path, **values: Any) -> DataConfig:
    return log_config(tmp_path, write_files(tmp_path / "raw"), **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shards": 0}, "data.shards=0: expected 1 to 65536 or null"),
        ({"shards": 2, "memory_mib": 8}, "data.memory_mib=8: expected >= 64"),
    ],
    ids=["no shard", "no memory"],
)
def test_bad_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataConfig(**{"name": "log", "source": "log", **values})


def test_bad_row_and_empty_result_leave_nothing(tmp_path: Path) -> None:
    raw = write_files(tmp_path / "raw", num_files=2, ending="csv")
    with open(raw / "part-001.csv", "a") as file:
        file.write("user 3,7,never,3.0,0.5,web\n")
    with pytest.raises(UserError, match=r"part-001.csv, row 723: timestamp 'never' is not a number; mend the row"):
        prepare_log(tmp_path, raw, shards=3)
    assert nothing_left(tmp_path)
    with pytest.raises(UserError, match="no event is left of 1441 after the filters"):
        prepare_log(tmp_path, raw, shards=3, on_bad_row="skip", min_user_events=1000)
    assert nothing_left(tmp_path)


def test_full_disk_while_rows_are_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = write_files(tmp_path / "raw")

    def full(*_: object, **__: object) -> None:
        raise pl.exceptions.ComputeError("No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(pl.DataFrame, "write_ipc", full)
        with pytest.raises(OSError, match="No space left") as caught:
            prepare_log(tmp_path, raw, shards=2)
    assert caught.value.errno == errno.ENOSPC and nothing_left(tmp_path)


def test_interrupted_preparation_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = write_files(tmp_path / "raw")
    with monkeypatch.context() as patch:
        patch.setattr(sharded_build, "write_events", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_log(tmp_path, raw, shards=2)
    assert nothing_left(tmp_path)
    assert prepare_log(tmp_path, raw, shards=2).num_users == 150


def test_mixed_and_missing_shards_are_refused(tmp_path: Path) -> None:
    raw = write_files(tmp_path / "raw")
    store = prepare_log(tmp_path, raw, shards=2)
    other = prepare_log(tmp_path, raw, shards=2, protocol="reference")
    os.replace(other.path / "shards/00001", store.path / "shards/kept")
    os.replace(store.path / "shards/00001", other.path / "shards/00001")
    with pytest.raises(UserError, match="shards of two preparations are mixed"):
        SequenceStore.open(other.path)
    with pytest.raises(UserError, match="no sequence store at .*00001"):
        SequenceStore.open(store.path)


def test_summary_names_the_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = prepare_log(tmp_path, write_files(tmp_path / "raw"), shards=3)
    events = [entry["events"] for entry in store.meta["shards"]]
    print_summary(store, 1.0)
    assert f"3 shards of {min(events):,} to {max(events):,} events" in capsys.readouterr().out


def test_meta_says_how_users_are_spread(tmp_path: Path) -> None:
    store = prepare_log(tmp_path, write_files(tmp_path / "raw"), shards=2)
    meta = json.loads((store.path / "meta.json").read_text())
    assert meta["shard_rule"] == "hstu.data.hashing.hash_ids modulo the number of shards"
    assert [e["folder"] for e in meta["shards"]] == ["shards/00000", "shards/00001"]
    assert sum(e["events"] for e in meta["shards"]) == meta["counts"]["events"]
