"""Which events train, which are held out, and a hash that says two runs held out the same. numpy only."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np

from hstu.errors import UserError

if TYPE_CHECKING:
    from hstu.data.store import SequenceStore

_CHUNK_ROWS = 1 << 22


@dataclass(frozen=True)
class Targets:
    """Held-out events. A target's history is every event of the user before its row."""

    users: np.ndarray
    """[M] int64, user rows, ascending."""
    rows: np.ndarray
    """[M] int64, absolute event row of each target."""

    def __len__(self) -> int:
        return len(self.users)


@dataclass(frozen=True)
class Split:
    train_end: np.ndarray
    """[U] int64, absolute end row of the user's training events."""
    validation: Targets | None
    test: Targets


def make_split(store: SequenceStore, selection: str = "validation") -> Split:
    """The split that the store was prepared for (``meta["split"]``).

    leave-last-out: each user's last event is the test target and, with ``selection="validation"``, the second
    last the validation target. global-time: training events lie before T and each user's first event at or after
    T is the test target; with ``selection="validation"`` training ends at an earlier time Tv, such that as many
    events lie in [Tv, T) as from T on, and the first event of [Tv, T) is the validation target.
    A target without any event before it is none.

    selection: ``validation``, or ``reference`` (only the test targets are held out, as for the published numbers).
    """
    if selection not in ("validation", "reference"):
        raise ValueError(f"selection={selection!r}: expected validation or reference")
    kind = store.meta["split"]["kind"]
    if kind == "leave-last-out":
        return _leave_last_out(store, selection)
    if kind == "global-time":
        return _global_time(store, selection)
    raise UserError(f"split {kind!r} in {store.path}: expected leave-last-out or global-time")


def _leave_last_out(store: SequenceStore, selection: str) -> Split:
    starts, ends = store.offsets[:-1], store.offsets[1:]
    test = _targets(starts, ends - 1, ends)
    if selection == "reference":
        return Split(np.where(ends - starts > 1, ends - 1, ends), None, test)
    validation = _targets(starts, ends - 2, ends)
    held_out = np.clip(ends - starts - 1, 0, 2)  # the first event of a user is never a target
    return Split(ends - held_out, validation, test)


def _targets(starts: np.ndarray, rows: np.ndarray, ends: np.ndarray) -> Targets:
    """Rows that exist and have at least one event before them."""
    users = np.flatnonzero((rows > starts) & (rows < ends))
    return Targets(users.astype(np.int64), rows[users].astype(np.int64))


def _global_time(store: SequenceStore, selection: str) -> Split:
    starts, ends = store.offsets[:-1], store.offsets[1:]
    time = resolve_split_time(store.meta["split"]["time"], store.timestamps)
    test_rows = starts + _events_before(store, time)
    test = _targets(starts, test_rows, ends)
    if len(test) == 0:
        raise UserError(f"data.split_time={store.meta['split']['time']}: no user has events both before and after it")
    if selection == "reference":
        return Split(test_rows, None, test)
    before = int((test_rows - starts).sum())
    after = store.num_events - before
    if after >= before:
        raise UserError(
            f"data.split_time={store.meta['split']['time']}: only {before} of {store.num_events} events lie before it, "
            "which leaves none to train on beside a validation part; take a later time or run.selection=reference"
        )
    times = np.asarray(store.timestamps)
    validation_time = int(np.partition(times[times < time], before - after)[before - after])
    train_end = starts + _events_before(store, validation_time)
    return Split(train_end, _targets(starts, train_end, test_rows), test)


def _events_before(store: SequenceStore, time: int) -> np.ndarray:
    """[U] number of each user's events before ``time`` (s)."""
    early = np.zeros(store.num_events + 1, np.int64)
    np.cumsum(np.asarray(store.timestamps) < time, out=early[1:])
    return early[store.offsets[1:]] - early[store.offsets[:-1]]


def resolve_split_time(value: str | int | None, timestamps: np.ndarray) -> int:
    """Epoch seconds of ``data.split_time``: seconds, an ISO date (UTC unless it says otherwise) or ``0.9q``."""
    text = str(value).strip()
    hint = "expected epoch seconds, an ISO date such as 2015-03-31, or a quantile such as 0.9q"
    try:
        if text.endswith("q"):
            quantile = float(text[:-1])
            if not 0 < quantile < 1:
                raise UserError(f"data.split_time={text}: a quantile lies between 0 and 1, as in 0.9q")
            rank = int(quantile * len(timestamps))
            return int(np.partition(np.asarray(timestamps), rank)[rank])
        if text.lstrip("+-").isdigit() and len(text) != 8:
            return int(text)
        moment = datetime.fromisoformat(text)
    except UserError:
        raise
    except ValueError:
        raise UserError(f"data.split_time={text!r}: {hint}") from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def split_hash(store: SequenceStore) -> str:
    """16 hex digits over every user's ordered items and times and the targets that the split holds out.

    Two stores agree exactly when they hold the same sequences in the same order under the same split.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps([store.meta["split"], store.num_items], sort_keys=True).encode())
    for column in (store.offsets, store.item_ids, store.timestamps):
        for start in range(0, len(column), _CHUNK_ROWS):
            digest.update(np.ascontiguousarray(column[start : start + _CHUNK_ROWS]).data)
    if store.meta["split"]["kind"] == "global-time":
        digest.update(_global_time(store, "reference").test.rows.data)
    return digest.hexdigest()[:16]
