"""A folder in which files arrive: which day is complete when, and the store that grows with the days."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from hstu.config import DataConfig
from hstu.data.hashing import hash_ids
from hstu.data.watch import StreamSource, WatchedDays, merge_day
from hstu.errors import UserError

NOW = 1_700_000_000.0


@dataclass
class Clock:
    """Time that passes while somebody sleeps, and what happens then."""

    time: float = NOW
    plans: list[tuple[float, Callable[[], None]]] = field(default_factory=list)

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.time += seconds
        due = [action for at, action in self.plans if at <= self.time]
        self.plans = [(at, action) for at, action in self.plans if at > self.time]
        for action in due:
            action()


def put(path: Path, age_s: float = 1000.0, text: str = "user,item,timestamp\n", clock: Clock | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    changed = (clock.now() if clock else NOW) - age_s
    os.utime(path, (changed, changed))
    return path


def source(folder: Path, clock: Clock, settle_s: float = 60, timeout_s: float = 600) -> StreamSource:
    return StreamSource(folder, settle_s, timeout_s, now=clock.now, sleep=clock.sleep)


def test_days_come_in_order_and_the_last_at_the_time_out(tmp_path: Path) -> None:
    clock = Clock()
    for name in ("dt=2026-03-02/a.csv", "dt=2026-03-01/b.csv", "dt=2026-03-01/a.csv", "clicks-20260304.csv"):
        put(tmp_path / name)
    put(tmp_path / ".hidden-2026-03-01.csv")
    put(tmp_path / "notes.md")
    watched = source(tmp_path, clock)
    assert watched.next_day(None) == ("2026-03-01", [tmp_path / f"dt=2026-03-01/{n}.csv" for n in "ab"])
    assert watched.next_day("2026-03-01") == ("2026-03-02", [tmp_path / "dt=2026-03-02/a.csv"])
    assert clock.time == NOW, "a later day has begun: nothing to wait for"
    assert watched.next_day("2026-03-02") == ("2026-03-04", [tmp_path / "clicks-20260304.csv"])
    assert clock.time == pytest.approx(NOW + 600), "more files may come for the last day"
    assert watched.next_day("2026-03-04") is None


def test_a_marker_makes_a_day_complete_at_once(tmp_path: Path) -> None:
    clock = Clock()
    put(tmp_path / "2026-03-01/a.csv", age_s=0)
    put(tmp_path / "2026-03-01/_SUCCESS", age_s=0)
    assert source(tmp_path, clock).next_day(None) == ("2026-03-01", [tmp_path / "2026-03-01/a.csv"])
    assert clock.time == NOW


def test_a_growing_file_holds_its_day_and_later_ones_back(tmp_path: Path) -> None:
    clock = Clock()
    put(tmp_path / "2026-03-01.csv", age_s=50)
    put(tmp_path / "2026-03-02.csv")
    put(tmp_path / "2026-03-03.csv")
    clock.plans = [(NOW + 5, lambda: None if put(tmp_path / "2026-03-01.csv", age_s=0, clock=clock) else None)]
    found = source(tmp_path, clock).next_day(None)
    assert found is not None and found[0] == "2026-03-01"
    assert clock.time == pytest.approx(NOW + 65), "60 s after the last change"


def test_files_that_arrive_while_waiting(tmp_path: Path) -> None:
    clock = Clock()
    clock.plans = [
        (NOW + 100, lambda: None if put(tmp_path / "2026-03-01.csv", clock=clock) else None),
        (NOW + 200, lambda: None if put(tmp_path / "2026-03-02.csv", clock=clock) else None),
    ]
    found = source(tmp_path, clock).next_day(None)
    assert found == ("2026-03-01", [tmp_path / "2026-03-01.csv"]) and clock.time == pytest.approx(NOW + 200)


def test_late_files_are_noted_and_left_out(tmp_path: Path) -> None:
    clock = Clock()
    put(tmp_path / "2026-03-01/a.csv")
    put(tmp_path / "2026-03-02/a.csv")
    watched, said = source(tmp_path, clock), []
    watched.say = said.append
    watched.next_day(None)
    late, older = put(tmp_path / "2026-03-01/b.csv"), put(tmp_path / "2026-02-27.csv")
    found = watched.next_day("2026-03-01")
    assert found == ("2026-03-02", [tmp_path / "2026-03-02/a.csv"])
    assert watched.next_day("2026-03-02") is None
    assert watched.late == {"2026-02-27": ["2026-02-27.csv"], "2026-03-01": ["2026-03-01/b.csv"]}
    assert said == [
        f"{older} came late and is left out: 2026-02-27 has passed",
        f"{late} came late and is left out: 2026-03-01 has passed",
    ]


def test_a_wait_that_is_stopped_gives_no_day(tmp_path: Path) -> None:
    clock = Clock()
    put(tmp_path / "2026-03-01.csv")
    assert source(tmp_path, clock).next_day(None, lambda: clock.time >= NOW + 5) is None
    assert clock.time == NOW + 5


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stream.watch=.*/none: no such folder"):
        source(tmp_path / "none", Clock()).next_day(None)
    put(tmp_path / "log.csv")
    with pytest.raises(UserError, match=r"no date in its path below stream.watch, as in dt=2026-03-01/log.csv"):
        source(tmp_path, Clock()).next_day(None)


# The store of each day


def at(day: str, seconds: int) -> int:
    return int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()) + seconds


def write_day(folder: Path, day: str, rows: list[tuple[str, str, int]]) -> None:
    """rows: user, item, seconds into the day."""
    text = "".join(f"{user},{item},{at(day, second)}\n" for user, item, second in rows)
    put(folder / f"dt={day}" / "part-0.csv", text="user,item,timestamp\n" + text)


def watched_days(tmp_path: Path, max_len: int = 2) -> WatchedDays:
    config = DataConfig(name="log", source="log", root=str(tmp_path / "root"))
    return WatchedDays(source(tmp_path / "in", Clock()), config, tmp_path / "days", max_len, item_rows=1000)


def item_id(raw: str) -> int:
    return int(hash_ids(np.array([raw]))[0] % np.uint64(1000)) + 1


def test_a_day_adds_to_the_histories_before_it(tmp_path: Path) -> None:
    write_day(tmp_path / "in", "2026-03-01", [("ann", "a", 5), ("ann", "b", 1), ("bob", "c", 7)])
    write_day(tmp_path / "in", "2026-03-02", [("cid", "d", 3), ("ann", "e", 9), ("ann", "f", 2), ("ann", "g", 4)])
    write_day(tmp_path / "in", "2026-03-03", [("ann", "h", 1), ("bob", "i", 90_000)])
    days = watched_days(tmp_path)
    second = days.open(1)
    assert second is not None and second.label == "2026-03-02"
    names = second.store.user_raw_ids.tolist()
    found = {n: second.store.item_ids[a:b].tolist() for n, a, b in zip(names, second.store.offsets, second.end)}  # noqa: B905
    expected = {"ann": "bafge", "bob": "c", "cid": "d"}
    assert found == {name: [item_id(i) for i in items] for name, items in expected.items()}
    assert dict(zip(names, (second.end - second.first).tolist(), strict=True)) == {"ann": 3, "bob": 0, "cid": 1}
    third = days.open(2)
    assert third is not None
    ann = third.store.item_ids[third.store.offsets[0] : third.store.offsets[1]].tolist()
    assert ann == [item_id(i) for i in "fgeh"], "the last max_len + 1 before the day, and the day"
    assert third.num_events == 1 and third.store.meta["events_outside"] == 1
    assert days.open(3) is None


def test_dates_of_another_clock(tmp_path: Path) -> None:
    """Midnight of a clock 8 hours ahead is 16 h of the day before in UTC."""
    late = 86_400 - 8 * 3600
    write_day(tmp_path / "in", "2026-03-01", [("ann", "a", -8 * 3600), ("ann", "b", late - 1), ("ann", "c", late)])
    config = DataConfig(name="log", source="log", root=str(tmp_path / "root"))
    days = WatchedDays(source(tmp_path / "in", Clock()), config, tmp_path / "days", 2, 1000, utc_offset_s=8 * 3600)
    assert days.store.item_ids.tolist() == [item_id("a"), item_id("b")] and days.store.meta["events_outside"] == 1


def test_days_that_were_built_are_not_built_again(tmp_path: Path) -> None:
    for number in (1, 2, 3, 4, 5):
        write_day(tmp_path / "in", f"2026-03-0{number}", [("ann", f"{number}", 5)])
    days = watched_days(tmp_path)
    assert [day.label for i in range(5) if (day := days.open(i))] == [f"2026-03-0{n}" for n in (1, 2, 3, 4, 5)]
    kept = sorted(p.name for p in (tmp_path / "days").iterdir() if p.is_dir())
    assert kept == ["2026-03-01", "2026-03-04", "2026-03-05"], "the first and the last two"
    with pytest.raises(UserError, match="2026-03-03 is not there on rank 0: expected one of the last two days"):
        days.open(2)
    again = watched_days(tmp_path)
    write_day(tmp_path / "in", "2026-03-06", [("bob", "6", 5)])
    write_day(tmp_path / "in", "2026-03-02", [("bob", "7", 5)])
    put(tmp_path / "in/dt=2026-03-02/part-1.csv")
    last, new = again.open(4), again.open(5)
    assert last is not None and new is not None
    assert (last.label, new.label, new.store.num_users) == ("2026-03-05", "2026-03-06", 2)
    late = {"2026-03-02": ["dt=2026-03-02/part-1.csv"]}
    assert again.source.late == late and watched_days(tmp_path).source.late == late, "part-0 had been given"


def test_no_day_at_all(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="no complete day within stream.timeout_s=600"):
        watched_days(tmp_path)


def test_a_bad_row_is_named(tmp_path: Path) -> None:
    put(tmp_path / "in/dt=2026-03-01/part-0.csv", text="user,item,timestamp\nann,a,1772323201\nann,a,never\n")
    with pytest.raises(UserError, match=r"part-0.csv, row 3: timestamp 'never' is not a number"):
        watched_days(tmp_path)


def test_merge_into_nothing_and_of_nothing() -> None:
    empty = {
        "user": np.empty(0, "<U1"),
        "item": np.empty(0, np.int32),
        "time": np.empty(0, int),
        "row": np.empty(0, int),
    }
    merged = merge_day(None, empty, 3)
    assert merged.offsets.tolist() == [0] and len(merged.users) == len(merged.item_ids) == 0
