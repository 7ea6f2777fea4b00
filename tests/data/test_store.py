"""The store: what is written is read, nothing half-made is left, another schema is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hstu.data.store import SCHEMA_VERSION, SequenceStore, new_store, write_store
from hstu.errors import UserError

META = {"name": "toy", "protocol": "stable", "split": {"kind": "leave-last-out", "time": None}}


def toy(path: Path) -> SequenceStore:
    return write_store(
        path,
        offsets=np.array([0, 3, 3, 5]),
        item_ids=np.array([2, 1, 3, 3, 1]),
        timestamps=np.array([10, 20, 20, 5, 9]),
        actions=np.array([1.0, 2.0, 3.0, 4.0, 5.0]),
        columns={"flag": np.array([0, 1, 0, 0, 1], np.int32)},
        user_raw_ids=np.array(["ann", "bo", "cy"]),
        item_attributes={"title": np.array(["Ä", "B", "C"])},
        user_attributes={"plan": np.array(["a", "", "b"]), "age": np.array([30, np.nan, 4], np.float32)},
        num_items=4,
        meta=META,
    )


def test_round_trip(tmp_path: Path) -> None:
    store = toy(tmp_path / "toy")
    assert (store.num_users, store.num_items, store.num_events) == (3, 4, 5)
    assert store.item_ids.tolist() == [2, 1, 3, 3, 1] and store.item_ids.dtype == np.int32
    assert store.timestamps.tolist() == [10, 20, 20, 5, 9] and store.timestamps.dtype == np.int64
    assert store.actions is not None and store.actions.dtype == np.float32
    assert store.columns["flag"].tolist() == [0, 1, 0, 0, 1] and store.columns["flag"].dtype == np.int32
    assert store.user_raw_ids.tolist() == ["ann", "bo", "cy"]
    assert store.item_raw_ids.tolist() == [1, 2, 3, 4]
    title = store.item_attribute("title")
    assert title is not None and title.tolist() == ["Ä", "B", "C"]
    assert store.item_attribute("genres") is None
    plan, age = store.user_attribute("plan"), store.user_attribute("age")
    assert plan is not None and plan.tolist() == ["a", "", "b"] and store.user_attribute("gender") is None
    assert age is not None and np.array_equal(age, np.array([30, np.nan, 4], np.float32), equal_nan=True)
    assert store.meta["counts"] == {"users": 3, "items": 4, "events": 5}
    assert store.meta["schema_version"] == SCHEMA_VERSION


def test_readable_from_numpy_in_three_lines(tmp_path: Path) -> None:
    folder = toy(tmp_path / "toy").path
    offsets = np.load(folder / "offsets.npy")
    item_ids = np.load(folder / "item_ids.npy", mmap_mode="r")
    history = item_ids[offsets[0] : offsets[1]]
    assert history.tolist() == [2, 1, 3]


def test_event_columns_are_mapped_and_not_loaded(tmp_path: Path) -> None:
    n = 1000
    store = write_store(
        tmp_path / "s", offsets=np.array([0, n]), item_ids=np.ones(n), timestamps=np.arange(n), meta=META
    )
    assert isinstance(store.item_ids, np.memmap)


def test_store_without_events_of_a_user_and_without_any(tmp_path: Path) -> None:
    empty = np.zeros(0)
    store = write_store(
        tmp_path / "s", offsets=np.array([0, 0]), item_ids=empty, timestamps=empty, num_items=2, meta=META
    )
    assert store.num_events == 0 and store.num_users == 1


def test_absent_store_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hstu-prepare data=NAME"):
        SequenceStore.open(tmp_path)


def test_other_schema_version_is_refused(tmp_path: Path) -> None:
    store = toy(tmp_path / "toy")
    meta = {**store.meta, "schema_version": SCHEMA_VERSION + 1}
    (store.path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=f"schema version {SCHEMA_VERSION + 1}, this release reads {SCHEMA_VERSION}"):
        SequenceStore.open(store.path)


@pytest.mark.parametrize("damage", ["short column", "missing column", "broken meta", "cut file"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    path = toy(tmp_path / "toy").path
    if damage == "short column":
        np.save(path / "timestamps.npy", np.arange(4))
    elif damage == "missing column":
        (path / "item_ids.npy").unlink()
    elif damage == "broken meta":
        (path / "meta.json").write_text("{")
    else:
        whole = (path / "columns" / "flag.npy").read_bytes()
        (path / "columns" / "flag.npy").write_bytes(whole[:-4])
    with pytest.raises(UserError, match="delete"):
        SequenceStore.open(path)


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), new_store(tmp_path / "s") as writer:
        writer.save("offsets", np.arange(3))
        raise OSError(28, "disk full")
    assert list(tmp_path.iterdir()) == []


def test_column_with_missing_rows_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="2 of 3 rows"), new_store(tmp_path / "s") as writer:
        with writer.column("item_ids", np.int32, 3) as column:
            column.append(np.arange(2))
    assert list(tmp_path.iterdir()) == []


def test_finished_store_is_not_replaced(tmp_path: Path) -> None:
    first = toy(tmp_path / "toy")
    again = write_store(
        tmp_path / "toy", offsets=np.array([0, 1]), item_ids=np.ones(1), timestamps=np.ones(1), meta=META
    )
    assert again.num_events == first.num_events == 5
    assert [p.name for p in tmp_path.iterdir()] == ["toy"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="tells a dead writer by /proc")
def test_killed_writer_leaves_no_store_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    code = (
        "import sys, time, numpy as np\nfrom hstu.data.store import new_store\n"
        "with new_store(sys.argv[1]) as writer:\n"
        "    writer.save('offsets', np.arange(3))\n    print('half', flush=True)\n    time.sleep(60)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "toy")], stdout=subprocess.PIPE, env=env)
    assert child.stdout is not None and child.stdout.readline() == b"half\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child.pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not (tmp_path / "toy").exists()
    assert len(list(tmp_path.iterdir())) == 1  # the leftover
    toy(tmp_path / "toy")
    assert [p.name for p in tmp_path.iterdir()] == ["toy"]
