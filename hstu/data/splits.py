"""Which events train, which are held out, and a hash that says two runs held out the same. numpy only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from hstu.errors import UserError

if TYPE_CHECKING:
    from hstu.data.store import SequenceStore

_CHUNK_ROWS = 1 << 22
_BINS = 1 << 16


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
    return _leave_last_out(store, selection) if _is_leave_last_out(store, selection) else _global_time(store, selection)


def make_event_split(store: SequenceStore, selection: str = "validation") -> Split:
    """The split for ranking: like :func:`make_split`, but every event of the held-out parts is a target.

    global-time: validation targets are all events in [Tv, T), test targets all events from T on, also those of
    users without any event before (cold users are scored). A user's targets are consecutive rows.
    leave-last-out: as :func:`make_split`, one target of a user in each part.

    Raises UserError where no event lies from T on, or too few before it to train on.
    """
    if _is_leave_last_out(store, selection):
        return _leave_last_out(store, selection)
    starts, ends = store.offsets[:-1], store.offsets[1:]
    time = resolve_split_time(store.meta["split"]["time"], store.timestamps)
    test_start = starts + _events_before(store, time)
    num_before = int((test_start - starts).sum())
    if num_before in (0, store.num_events):
        where = "before" if num_before == 0 else "at or after"
        raise UserError(f"data.split_time={store.meta['split']['time']}: no event lies {where} it")
    test = _all_events(test_start, ends)
    if selection == "reference":
        return Split(test_start, None, test)
    train_end = starts + _events_before(store, _validation_time(store, time, num_before))
    return Split(train_end, _all_events(train_end, test_start), test)


def training_time(store: SequenceStore, selection: str) -> int | None:
    """Time in s from which on no event trains; None where the split is by place and not by time."""
    if _is_leave_last_out(store, selection):
        return None
    time = resolve_split_time(store.meta["split"]["time"], store.timestamps)
    if selection == "reference":
        return time
    return _validation_time(store, time, int(_events_before(store, time).sum()))


def training_ends(store: SequenceStore, selection: str, time: int | None) -> np.ndarray:
    """[U] int64 ``Split.train_end`` of ``store``, which may be one shard. time: :func:`training_time` of all shards."""
    if time is None:
        return _leave_last_out(store, selection).train_end
    return store.offsets[:-1] + _events_before(store, time)


def _is_leave_last_out(store: SequenceStore, selection: str) -> bool:
    """Whether the store's split is leave-last-out and not global-time; checks ``selection`` too."""
    if selection not in ("validation", "reference"):
        raise ValueError(f"selection={selection!r}: expected validation or reference")
    kind = store.meta["split"]["kind"]
    if kind not in ("leave-last-out", "global-time"):
        raise UserError(f"split {kind!r} in {store.path}: expected leave-last-out or global-time")
    return bool(kind == "leave-last-out")


def _all_events(starts: np.ndarray, ends: np.ndarray) -> Targets:
    """Every row of starts[u] .. ends[u], user by user."""
    counts = (ends - starts).astype(np.int64)
    users = np.repeat(np.arange(len(counts)), counts)
    shift = starts - (np.cumsum(counts) - counts)
    return Targets(users, np.arange(len(users), dtype=np.int64) + np.repeat(shift, counts))


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
    train_end = starts + _events_before(store, _validation_time(store, time, int((test_rows - starts).sum())))
    return Split(train_end, _targets(starts, train_end, test_rows), test)


def _first_events_from(store: SequenceStore) -> Targets:
    """Test targets of a split by time; a shard may have none."""
    starts = store.offsets[:-1]
    time = resolve_split_time(store.meta["split"]["time"], store.timestamps)
    return _targets(starts, starts + _events_before(store, time), store.offsets[1:])


def _validation_time(store: SequenceStore, time: int, before: int) -> int:
    """Tv: as many events lie in [Tv, time) as from ``time`` on (more where Tv is a tie). before: events before time."""
    after = store.num_events - before
    if after >= before:
        raise UserError(
            f"data.split_time={store.meta['split']['time']}: only {before} of {store.num_events} events lie before it, "
            "which leaves none to train on beside a validation part; take a later time or run.selection=reference"
        )
    return kth_smallest(store.timestamps, before - after)


def _events_before(store: SequenceStore, time: int) -> np.ndarray:
    """[U] number of each user's events before ``time`` (s)."""
    offsets = store.offsets
    found = np.empty(store.num_users, np.int64)
    cuts = np.searchsorted(offsets, np.arange(0, store.num_events, _CHUNK_ROWS))
    edges = np.unique(np.concatenate([[0], cuts, [store.num_users]]))
    for first, last in zip(edges[:-1], edges[1:], strict=True):  # users first .. last
        begin, end = int(offsets[first]), int(offsets[last])
        early = np.zeros(end - begin + 1, np.int64)
        np.cumsum(np.asarray(store.timestamps[begin:end]) < time, out=early[1:])
        found[first:last] = early[offsets[first + 1 : last + 1] - begin] - early[offsets[first:last] - begin]
    return found


def resolve_split_time(value: str | int | None, timestamps: Any) -> int:
    """Epoch seconds of ``data.split_time``: seconds, an ISO date (UTC unless it says otherwise) or ``0.9q``."""
    if isinstance(value, int):
        return value
    text = str(value).strip()
    hint = "expected epoch seconds, an ISO date such as 2015-03-31, or a quantile such as 0.9q"
    try:
        if text.endswith("q"):
            quantile = float(text[:-1])
            if not 0 < quantile < 1:
                raise UserError(f"data.split_time={text}: a quantile lies between 0 and 1, as in 0.9q")
            return kth_smallest(timestamps, int(quantile * len(timestamps)))
        if text.lstrip("+-").isdigit() and len(text) != 8:
            return int(text)
        moment = datetime.fromisoformat(text)
    except UserError:
        raise
    except ValueError:
        raise UserError(f"data.split_time={text!r}: {hint}") from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def kth_smallest(values: Any, k: int) -> int:
    """The value at place k (from 0) of the ascending ``values`` [E], integers; read in parts, without a copy of all."""

    def parts() -> Iterator[np.ndarray]:
        return (np.asarray(values[start : start + _CHUNK_ROWS]) for start in range(0, len(values), _CHUNK_ROWS))

    low, high = min(int(p.min()) for p in parts()), max(int(p.max()) for p in parts())
    while low < high:
        width = -(-(high - low + 1) // _BINS)
        counts = np.zeros(_BINS, np.int64)
        for part in parts():
            inside = part[(part >= low) & (part <= high)]
            counts += np.bincount((inside - low) // width, minlength=_BINS)
        ends = np.cumsum(counts)
        place = int(np.searchsorted(ends, k, side="right"))
        k -= int(ends[place] - counts[place])
        low, high = low + place * width, min(high, low + (place + 1) * width - 1)
    return low


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
        test = _first_events_from(store) if "shard" in store.meta else _global_time(store, "reference").test
        digest.update(test.rows.data)
    return digest.hexdigest()[:16]
