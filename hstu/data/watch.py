"""A folder in which the files of a log arrive, and a store that grows with them, day by day.

The date in a file's path says which day it belongs to (``dt=2026-03-01/part-0.parquet``, ``clicks-20260301.csv``).
Days are given in order. A file is complete when its folder holds ``_SUCCESS``, or when it has not changed for some
seconds; a day is complete when its files are and either its folder holds ``_SUCCESS`` or a later day has begun.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from hstu.config import DataConfig
from hstu.config_ranking import RankingConfig
from hstu.data.build import to_numpy
from hstu.data.days import Day
from hstu.data.features import DERIVED, FIRST_DAY, HASHED, MISSING
from hstu.data.importers import log
from hstu.data.shuffle_buffer import joined_ranges
from hstu.data.spill import id_hashes
from hstu.data.store import SequenceStore, write_store
from hstu.data.tables import Rejects, read_tables
from hstu.distributed import World
from hstu.errors import UserError

SUCCESS = "_SUCCESS"
RECORD = "days.json"
DAY_S = 86_400
_DATE = re.compile(r"(?<!\d)(\d{4})-?(\d\d)-?(\d\d)(?!\d)")
_POLL_S = 1.0
_COLUMN = "column."
"""Begins the names of further columns among events at hand, beside ``user``, ``item``, ``time`` and ``row``."""


@dataclass
class StreamSource:
    """The days of a folder as they become complete; see the head of this file.

    Attributes:
        settle_s: seconds without a change after which a file is complete.
        timeout_s: gives up when no new day is complete for so long; a last day whose files are complete is then given.
        world: the ranks, which call :meth:`next_day` together. The first one looks and decides.
        say: told of each late file, once.
        given: on the first rank, the files of each day that was given, by their paths below ``folder``.
        late: likewise, the files found for a day that had passed; they are left out.
        now, sleep: the clock, s, and how to wait.
    """

    folder: Path
    settle_s: float
    timeout_s: float
    world: World = field(default_factory=World)
    say: Callable[[str], None] = lambda line: None
    given: dict[str, list[str]] = field(default_factory=dict)
    late: dict[str, list[str]] = field(default_factory=dict)
    now: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep

    def next_day(
        self, after: str | None, stopped: Callable[[], bool] = lambda: False
    ) -> tuple[str, list[Path]] | None:  # fmt: skip
        """Date (ISO) and files of the earliest complete day later than ``after``; None after the time-out, or where
        ``stopped`` says so, which all ranks ask together every second or so.

        Raises UserError where the folder is missing or holds a file without a date in its path.
        """
        deadline = self.now() + self.timeout_s
        while True:
            found, timed_out = self.world.on_first(lambda: self._look(after, deadline))
            if found is not None or timed_out or stopped():
                return found
            self.sleep(min(_POLL_S, max(0.0, deadline - self.now())))

    def _look(self, after: str | None, deadline: float) -> tuple[tuple[str, list[Path]] | None, bool]:
        """The earliest complete day, where there is one now, and whether the time is over."""
        found = self._scan(after)
        timed_out = self.now() >= deadline
        for place, (label, files) in enumerate(sorted(found.items())):
            begun_later = place + 1 < len(found)
            if not self._all_complete(files):
                break  # days are given in order
            if begun_later or timed_out or all((f.parent / SUCCESS).exists() for f in files):
                self.given[label] = [self._name(f) for f in files]
                return (label, files), timed_out
        return None, timed_out

    def _scan(self, after: str | None) -> dict[str, list[Path]]:
        """Files of each day later than ``after``; notes the late ones."""
        if not self.folder.is_dir():
            raise UserError(f"stream.watch={self.folder}: no such folder")
        found: dict[str, list[Path]] = {}
        known = {label: {*names, *self.late.get(label, ())} for label, names in self.given.items()}
        for path in sorted(self.folder.rglob("*")):
            is_log = log.FORMATS.get(path.suffix.lower()) is not None
            if not is_log or path.name.startswith((".", "_")) or not path.is_file():
                continue
            label = self._date(path)
            if after is None or label > after:
                found.setdefault(label, []).append(path)
            elif self._name(path) not in known.get(label, self.late.get(label, ())):
                self.late.setdefault(label, []).append(self._name(path))
                self.say(f"{path} came late and is left out: {label} has passed")
        return found

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _date(self, path: Path) -> str:
        for year, month, day in reversed(_DATE.findall(str(path.relative_to(self.folder)))):
            try:
                return date(int(year), int(month), int(day)).isoformat()
            except ValueError:
                continue
        raise UserError(f"{path}: no date in its path below stream.watch, as in dt=2026-03-01/{path.name}")

    def _all_complete(self, files: list[Path]) -> bool:
        return all(
            (f.parent / SUCCESS).exists() or self.now() - f.stat().st_mtime >= self.settle_s for f in files
        )  # fmt: skip


class WatchedDays:
    """Days of a :class:`StreamSource`, each with a store of its events and of each user's last ``max_len + 1`` before.

    Item ids are ``1 + hash % item_rows`` (:func:`hstu.data.hashing.hash_ids`), so that new items need no growing table;
    items that share an id share everything. The store of a day is built from the one of the day before and lies under
    ``folder``; the first and the last two are kept. Events whose time lies outside the day of their file are left out
    and counted (``events_outside`` in the store's ``meta.json``). All ranks of the source call :meth:`open` together;
    the first one builds.

    With ``ranking`` the store has the event columns that it names: numbers as they are, categorical features as codes
    ``1 + hash % hash_rows``, 0 where missing. Edges and scales of numbers are those of the first day's.
    """

    def __init__(
        self, source: StreamSource, config: DataConfig, folder: Path, max_len: int, item_rows: int,
        ranking: RankingConfig | None = None, utc_offset_s: int = 0,
    ) -> None:  # fmt: skip
        self.source, self.config, self.folder = source, config, folder
        self.max_len, self.item_rows, self.utc_offset_s = max_len, item_rows, utc_offset_s
        self.columns, self.hashed = event_columns(ranking)
        self.world = source.world
        self._opened: tuple[int, Day] | None = None
        self.labels: list[str] = self.world.on_first(self._begin)
        first = self.open(0)
        if first is None:
            raise UserError(f"stream.watch={source.folder}: no complete day within stream.timeout_s={source.timeout_s}")
        self.store = first.store

    def _begin(self) -> list[str]:
        """What earlier runs have built."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = read_record(self.folder)
        self.source.given.update(record["days"])
        self.source.late.update(record["late"])
        return list(record["days"])

    def open(self, index: int, stopped: Callable[[], bool] = lambda: False) -> Day | None:
        if index >= len(self.labels):
            found = self.source.next_day(self.labels[-1] if self.labels else None, stopped)
            self.world.on_first(lambda: self._keep(found))
            if found is None:
                return None
            self.labels.append(found[0])
        if self._opened is not None and self._opened[0] == index:
            return self._opened[1]
        label = self.labels[index]
        if not (self.folder / label).is_dir():
            shared = ", on a disk that all machines share" if self.world.size > 1 else ""
            raise UserError(
                f"{self.folder / label} is not there on rank {self.world.rank}: expected one of the last two days, "
                f"which are kept{shared}; take another run.dir to start anew"
            )
        store = SequenceStore.open(self.folder / label)
        first = np.load(self.folder / f"{label}.first.npy")
        self._opened = index, Day(label, store, first, np.asarray(store.offsets[1:]))
        return self._opened[1]

    def _keep(self, found: tuple[str, list[Path]] | None) -> None:
        """Builds the store of a day that was found, and writes down what was given and what came late."""
        if found is not None:
            self._build(*found)
        partial = self.folder / ".days.json.partial"
        record = {"days": self.source.given, "late": self.source.late}
        partial.write_text(json.dumps(record), encoding="utf-8")
        partial.replace(self.folder / RECORD)
        for old in self.labels[1:-1] if found is not None else ():
            shutil.rmtree(self.folder / old, ignore_errors=True)
            (self.folder / f"{old}.first.npy").unlink(missing_ok=True)

    def _build(self, label: str, files: list[Path]) -> None:
        before = SequenceStore.open(self.folder / self.labels[-1]) if self.labels else None
        events, rejects = self._read(label, files)
        start = int(datetime.fromisoformat(label).replace(tzinfo=UTC).timestamp()) - self.utc_offset_s
        inside = (events["time"] >= start) & (events["time"] < start + DAY_S)
        outside = int((~inside).sum())
        events = {name: column[inside] for name, column in events.items()}
        merged = merge_day(before, events, self.max_len + 1)
        path = self.folder / label
        shutil.rmtree(path, ignore_errors=True)
        write_store(
            path, offsets=merged.offsets, item_ids=merged.item_ids, timestamps=merged.timestamps,
            user_raw_ids=merged.users, num_items=self.item_rows, actions=merged.columns.pop("actions", None),
            columns=merged.columns,
            meta={"name": self.config.name, "source": "stream", "protocol": self.config.protocol, "day": label,
                  "events_outside": outside, "rejects": rejects, "files": [str(f) for f in files],
                  HASHED: self.hashed, FIRST_DAY: self.labels[0] if self.labels else label},
        )  # fmt: skip
        np.save(self.folder / f"{label}.first.npy", merged.first)

    def _read(self, label: str, files: list[Path]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        """Events of the files of a day: ``user`` text, ``item`` id, ``time`` s, ``row``, further columns of the store;
        and the reasons of rejected rows."""
        work = self.folder / ".work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            shards, layouts, _ = log.plan(self.config, files)
            rejects = Rejects(work / "rejects.csv", self.config.on_bad_row)
            table = read_tables(shards, layouts, work, rejects)
            roles = {name: self._role(name) for name in self.columns}
            rows = table.scan().select("user", "item", "time", "row", *roles.values()).collect()
        finally:
            shutil.rmtree(work, ignore_errors=True)
        events = {
            "user": to_numpy(rows["user"].cast(pl.String)), "item": _hashed(rows["item"], self.item_rows),
            "time": rows["time"].to_numpy() // table.per_second, "row": rows["row"].to_numpy(),
        }  # fmt: skip
        for name, role in roles.items():
            column = rows[role]
            if name in self.hashed:
                codes = _hashed(column.fill_null(""), self.hashed[name])
                events[_COLUMN + name] = np.where(column.is_null(), MISSING, codes)
            elif not column.dtype.is_numeric():
                raise UserError(f"data.columns.action={self.config.columns.action}: {label} holds names, which have no "
                                "codes in files that arrive; expected numbers")  # fmt: skip
            else:
                events[_COLUMN + name] = column.cast(pl.Float32).fill_null(float("nan")).to_numpy()
        return events, rejects.reasons

    def _role(self, name: str) -> str:
        """Of a column of the store in a table that was read."""
        if name == "actions":
            return "action"
        return f"feature.{name}" if name in self.hashed else f"value.{name}"


def _hashed(raw: pl.Series, rows: int) -> np.ndarray:
    """[n] int32, 1..rows."""
    return (id_hashes(raw) % np.uint64(rows)).astype(np.int32) + 1


def event_columns(ranking: RankingConfig | None) -> tuple[list[str], dict[str, int]]:
    """The event columns of the store that a ranking reads, and to how many rows each of the categorical ones is
    hashed."""
    if ranking is None:
        return [], {}
    named = [c for task in ranking.tasks.values() for c in (task.column, task.mask_column) if c is not None]
    features = {n: f for n, f in ranking.event_features.items() if n not in DERIVED} if ranking.use_features else {}
    actions = list(ranking.actions) if ranking.use_actions else []
    hashed = {name: feature.hash_rows for name, feature in features.items() if feature.hash_rows is not None}
    return list(dict.fromkeys([*named, *actions, *features])), hashed


def read_record(folder: Path) -> dict[str, dict[str, list[str]]]:
    """``days`` and ``late``: the files of each day that was given, and those that came after it, by their paths."""
    path = folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"days": {}, "late": {}}


def remove_days(folder: Path) -> None:
    """Removes the stores of days in ``folder``; any other folder is left alone."""
    if (folder / RECORD).exists():
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Merged:
    """Columns of a store, and the first row [U] of each user that is of the new day. columns: the further ones of
    events, ``actions`` among them."""

    users: np.ndarray
    offsets: np.ndarray
    item_ids: np.ndarray
    timestamps: np.ndarray
    first: np.ndarray
    columns: dict[str, np.ndarray]


def merge_day(before: SequenceStore | None, events: dict[str, np.ndarray], keep: int) -> Merged:
    """The last ``keep`` events of each user of ``before``, then the user's new ``events`` by time and row."""
    names, codes = np.unique(events["user"], return_inverse=True)
    old = np.empty(0, names.dtype) if before is None else np.asarray(before.user_raw_ids)
    users = np.union1d(old, names)
    order = np.lexsort((events["row"], events["time"], codes))
    added = np.zeros(len(users), np.int64)
    added[np.searchsorted(users, names)] = np.bincount(codes, minlength=len(names))
    kept = np.zeros(len(users), np.int64)
    if before is not None:
        lengths = np.minimum(np.diff(before.offsets), keep)
        kept[np.searchsorted(users, old)] = lengths
        rows = joined_ranges(before.offsets[1:] - lengths, lengths)
    offsets = np.concatenate([[0], np.cumsum(kept + added)]).astype(np.int64)
    new = joined_ranges(offsets[:-1] + kept, added)
    wanted = ["item", "time", *(name for name in events if name.startswith(_COLUMN))]
    columns = {name: np.empty(offsets[-1], events[name].dtype) for name in wanted}
    for name, column in columns.items():
        column[new] = events[name][order]
    if before is not None:
        history = joined_ranges(offsets[:-1], kept)
        known: dict[str, Any] = {
            "item": before.item_ids,
            "time": before.timestamps,
            _COLUMN + "actions": before.actions,
        }
        known |= {_COLUMN + name: column for name, column in before.columns.items()}
        for name, column in columns.items():
            column[history] = known[name][rows]
    items, times = columns.pop("item"), columns.pop("time")
    further = {name.removeprefix(_COLUMN): column for name, column in columns.items()}
    return Merged(users, offsets, items, times, offsets[:-1] + kept, further)
