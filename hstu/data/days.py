"""A log day by day: what each day adds, and the batches that train on it once.

A day trains on its events, each once, with the history that the user had by then: retrieval on those that have an event
of the same user before them, ranking on all. A user with many events on a day is cut into pieces (retrieval: of
``max_len`` predicted events; ranking: as in any training, :func:`hstu.data.ranking_batches.cut`).

Legend: U users, P pieces, S sequences, L events in the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from hstu.config import Config
from hstu.data.batches import Batch, EventColumns, cut_batches
from hstu.data.random_rows import rows_of
from hstu.data.ranking import RankingData, Sequences
from hstu.data.ranking_batches import RankingBatch, cut, gather_share, take
from hstu.data.share import Ranks, Share
from hstu.data.shuffle_buffer import joined_ranges
from hstu.data.splits import Targets
from hstu.data.store import SequenceStore
from hstu.errors import UserError
from hstu.seeding import derive
from hstu.transfer import to_device

ORDER_SEED = 104
"""Purpose number of the seed that shuffles the pieces of a day."""
SAMPLE_SEED = 105
"""Purpose number of the seed that draws the events a day is evaluated on."""
_CHUNK_ROWS = 1 << 22
NO_DAY = "the stream has no day: expected events in the store, or files in stream.watch"


@dataclass(frozen=True)
class Day:
    """One day of a log.

    Attributes:
        label: its date, with the time where days are no days.
        store: holds its events and each user's history.
        first, end: [U] int64. A user's event rows of the day are first .. end.
    """

    label: str
    store: SequenceStore
    first: np.ndarray
    end: np.ndarray

    @property
    def num_events(self) -> int:
        return int((self.end - self.first).sum())

    @property
    def num_users(self) -> int:
        return int(np.count_nonzero(self.end > self.first))

    def targets(self, limit: int, seed: int) -> Targets:
        """Each user's first event of the day, where there is one before it; at most ``limit`` of them (0: all), drawn
        by ``seed``."""
        users = _sample(np.flatnonzero((self.end > self.first) & ~self.is_cold), limit, seed)
        return Targets(users, self.first[users].astype(np.int64))

    def events(self, limit: int, seed: int) -> Targets:
        """All events of the day, cold users' too, by ascending row; of at most ``limit`` users (0: all), drawn by
        ``seed``."""
        users = _sample(np.flatnonzero(self.end > self.first), limit, seed)
        counts = self.end[users] - self.first[users]
        return Targets(np.repeat(users, counts), joined_ranges(self.first[users], counts).astype(np.int64))

    @property
    def is_cold(self) -> np.ndarray:
        """bool [U]: nothing is known of the user from before the day."""
        return np.asarray(self.first == self.store.offsets[:-1])


def _sample(users: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """int64: ``users``, or ``limit`` of them where that is above 0 and there are more."""
    if 0 < limit < len(users):
        users = np.sort(np.random.Generator(np.random.PCG64(seed)).choice(users, limit, replace=False))
    return users.astype(np.int64)


class Days(Protocol):
    """Where days come from. ``store`` is that of the first day, of as many items as all have."""

    store: SequenceStore

    def open(self, index: int, stopped: Callable[[], bool] = lambda: False) -> Day | None:
        """The day at place ``index``, waiting for it where days arrive; None after the last. The one that was opened
        last is kept.

        stopped: asked again and again while waiting, by all ranks together; True ends the wait with None.
        """


class StoreDays:
    """The days of a finished store, those without events left out."""

    def __init__(self, store: SequenceStore, day_s: int, utc_offset_s: int = 0) -> None:
        """day_s: length of a day in s; days begin at its multiples since 1970. utc_offset_s: of their clock, s."""
        self.store, self.day_s, self.utc_offset_s = store, day_s, utc_offset_s
        chunks = (store.timestamps[s : s + _CHUNK_ROWS] for s in range(0, store.num_events, _CHUNK_ROWS))
        parts = [np.unique((times + utc_offset_s) // day_s) for times in chunks]
        self.numbers: np.ndarray = np.unique(np.concatenate(parts))
        self._at: tuple[int, np.ndarray] | None = None  # a time, and each user's first row at or after it
        self._opened: tuple[int, Day] | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def open(self, index: int, stopped: Callable[[], bool] = lambda: False) -> Day | None:
        if index >= len(self.numbers):
            return None
        if self._opened is None or self._opened[0] != index:
            begin = int(self.numbers[index]) * self.day_s
            start = begin - self.utc_offset_s
            first = self._rows_from(start)
            end = self._rows_from(start + self.day_s)
            self._opened = index, Day(day_label(begin, self.day_s), self.store, first, end)
        return self._opened[1]

    def _rows_from(self, time: int) -> np.ndarray:
        low = np.asarray(self.store.offsets[:-1])
        if self._at is not None and self._at[0] <= time:
            low = self._at[1]
        self._at = time, first_rows_from(self.store, time, low)
        return self._at[1]


def day_label(start: int, day_s: int) -> str:
    """start: s since 1970 by the clock that days go by."""
    moment = datetime.fromtimestamp(start, UTC)
    return moment.date().isoformat() if day_s % 86_400 == 0 else moment.strftime("%Y-%m-%dT%H:%M:%S")


def first_rows_from(store: SequenceStore, time: int, low: np.ndarray) -> np.ndarray:
    """[U] int64 row of each user's first event at or after ``time`` (s), else the end of the user's events.

    low: [U], a row at or before it. Reads one event of each user, and some more of those who have one in between.
    """
    ends, times = np.asarray(store.offsets[1:]), store.timestamps
    found = low.copy()
    users = np.flatnonzero(found < ends)
    users = users[times[found[users]] < time]
    below, above = found[users] + 1, ends[users]
    while len(left := np.flatnonzero(below < above)):
        middle = (below[left] + above[left]) // 2
        early = times[middle] < time
        below[left[early]] = middle[early] + 1
        above[left[~early]] = middle[~early]
    found[users] = below
    return found


@dataclass(frozen=True)
class DayPlan:
    """The pieces of a day, in the order of training.

    users, first_rows, lengths: [P] int64; a piece's input rows are first_rows .. + lengths. predicted: [P] int64, the
    first event row that it predicts. bounds: [steps+1] int64.
    """

    day: Day
    users: np.ndarray
    first_rows: np.ndarray
    lengths: np.ndarray
    predicted: np.ndarray
    bounds: np.ndarray


@dataclass(frozen=True)
class RankingDayPlan:
    """The sequences of a day in the order of training, which predict each of its events once.

    bounds: [steps+1] int64.
    """

    day: Day
    data: RankingData
    sequences: Sequences
    bounds: np.ndarray


P = TypeVar("P", DayPlan, RankingDayPlan)


class _ByDay(ABC, Generic[P]):
    """Training data in which an epoch is a day; ``share`` is a function of (seed, day, step)."""

    def __init__(self, days: Days) -> None:
        self.days, self.num_skipped = days, 0
        self._plan: tuple[int, P] | None = None
        self.users = range(self.plan(0).day.num_users)

    @abstractmethod
    def make_plan(self, epoch: int, day: Day) -> P:
        """How the day at place ``epoch`` is trained on."""

    @abstractmethod
    def share(self, epoch: int, step: int, ranks: Ranks) -> Share[Any]:
        """What one rank trains on in a step."""

    def plan(self, epoch: int) -> P:
        if self._plan is None or self._plan[0] != epoch:
            day = self.days.open(epoch)
            if day is None:
                raise UserError(NO_DAY)
            self._plan = epoch, self.make_plan(epoch, day)
        return self._plan[1]

    def num_steps(self, epoch: int) -> int:
        return len(self.plan(epoch).bounds) - 1

    def savings(self, epoch: int, num_steps: int | None = None) -> dict[str, float]:
        return {}


class DayBatches(_ByDay[DayPlan]):
    """For retrieval."""

    def __init__(self, days: Days, max_len: int, seed: int, batch_users: int, batch_tokens: int | None,
                 event_weights: str, device: torch.device) -> None:  # fmt: skip
        self.max_len, self.seed = max_len, seed
        self.batch_users, self.batch_tokens = batch_users, batch_tokens
        self.event_weights, self.device = event_weights, device
        self._columns: EventColumns | None = None
        super().__init__(days)

    def make_plan(self, epoch: int, day: Day) -> DayPlan:
        if self._columns is None or self._plan is None or self._plan[1].day.store is not day.store:
            self._columns = EventColumns(day.store, self.device, self.event_weights)
        seed = derive(self.seed, ORDER_SEED, epoch)
        return plan_day(day, self.max_len, seed, self.batch_users, self.batch_tokens)

    def share(self, epoch: int, step: int, ranks: Ranks) -> Share[Batch]:
        """What one rank trains on in a step; ``num_events`` are the predicted ones."""
        plan = self.plan(epoch)
        assert self._columns is not None
        here = slice(plan.bounds[step], plan.bounds[step + 1])
        users, first_rows, lengths, predicted = (
            c[here] for c in (plan.users, plan.first_rows, plan.lengths, plan.predicted)
        )
        mine, work = ranks.divide(lengths)
        batch = self._columns.gather(users[mine], first_rows[mine], lengths[mine])
        skipped = predicted - 1 - first_rows  # inputs of a piece before the first one that is trained on
        batch = replace(batch, counted=_counted(batch, lengths[mine], skipped[mine]))
        if ranks.size > 1:
            places = to_device(torch.from_numpy(rows_of(lengths, mine)), batch.item_ids.device)
            batch = replace(batch, random_rows=places, max_len=int(lengths.max()))
        return Share(batch, int((lengths - skipped).sum()), work)


def _counted(batch: Batch, lengths: np.ndarray, skipped: np.ndarray) -> Tensor | None:
    """``counted`` of a batch of pieces of ``lengths`` [B], of whose inputs the first ``skipped`` [B] are only read."""
    if not skipped.any():
        return batch.counted
    ends = np.cumsum(lengths)
    places = torch.from_numpy(joined_ranges(ends - lengths + skipped, lengths - skipped).astype(np.int64))
    places = to_device(places, batch.item_ids.device)
    if batch.counted is None:
        return places
    assert batch.weights is not None
    return places[batch.weights[places] != 0]


def plan_day(day: Day, max_len: int, seed: int, batch_users: int, batch_tokens: int | None) -> DayPlan:
    """Cuts a day into pieces and shuffles them."""
    offsets = np.asarray(day.store.offsets[:-1])
    begin = np.maximum(day.first, offsets + 1)  # nothing comes before a user's very first event
    users = np.flatnonzero(day.end > begin)
    num_pieces = -(-(day.end[users] - begin[users]) // max_len)
    owner = np.repeat(users, num_pieces)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    predicted = begin[owner] + place * max_len
    stop = np.minimum(predicted + max_len, day.end[owner])
    first_rows = np.maximum(offsets[owner], stop - 1 - max_len)
    lengths = stop - 1 - first_rows
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(owner))
    bounds = cut_batches(lengths[order], batch_users, batch_tokens)
    return DayPlan(day, owner[order], first_rows[order], lengths[order], predicted[order], bounds)


class RankingDayBatches(_ByDay[RankingDayPlan]):
    """For ranking; the cuts are those of the evaluation of the day."""

    def __init__(self, days: Days, config: Config) -> None:
        self.config = config
        super().__init__(days)

    def make_plan(self, epoch: int, day: Day) -> RankingDayPlan:
        assert self.config.ranking is not None
        last = None if self._plan is None else self._plan[1].data
        data = last if last is not None and last.store is day.store else RankingData(day.store, self.config.ranking)
        users = np.flatnonzero(day.end > day.first).astype(np.int64)
        starts = np.asarray(day.store.offsets[:-1])[users]
        whole = cut(self.config, users, starts, day.first[users], day.end[users])
        seed = derive(self.config.seed, ORDER_SEED, epoch)
        sequences = take(whole, np.random.Generator(np.random.PCG64(seed)).permutation(len(whole)))
        run = self.config.run
        bounds = cut_batches(sequences.stop - sequences.first, run.batch_users, run.batch_tokens)
        return RankingDayPlan(day, data, sequences, bounds)

    def share(self, epoch: int, step: int, ranks: Ranks) -> Share[RankingBatch]:
        plan = self.plan(epoch)
        part = take(plan.sequences, slice(plan.bounds[step], plan.bounds[step + 1]))
        return gather_share(plan.data, self.config, part, ranks)
