"""Training batches from a sharded store, read in sequence: each rank its own shards, through a shuffle buffer.

Against :class:`hstu.data.batches.TrainBatches`, which draws each batch from all users and keeps about 85 bytes a user,
this reads every file from front to back and holds the events of one buffer. The price: a batch mixes the users of a
few shards, and which users meet depends on the number of ranks. ``hstu/data/ranking_stream.py`` does it for ranking.

Legend: R ranks, B users in the batch, L events in the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch

from hstu.data.balance import user_work
from hstu.data.batches import Batch
from hstu.data.sharded_store import ShardedStore, assign_shards
from hstu.data.shuffle_buffer import ShuffleBuffer, Users, joined_ranges
from hstu.data.splits import training_ends, training_time
from hstu.errors import UserError
from hstu.seeding import derive

if TYPE_CHECKING:
    from hstu.data.share import Ranks
    from hstu.data.store import SequenceStore
    from hstu.distributed import World

SHARD_SEED = 102
"""Purpose number of the seed that orders the shards of an epoch."""
RANK_BITS = 24
"""The events of rank r draw the random numbers of the rows from r * 2^24 on."""
_SHARD_BITS = 40
"""A reference is the shard above the user's place among the shard's training users."""
_READ_ROWS = 1 << 22
"""Event rows read at once; a longer single user is read whole."""
B = TypeVar("B", bound=Any)


@dataclass(frozen=True)
class ShardTable:
    """Training users of a shard, or sequences of them, in the order of the files: row of the user in the shard, first
    event row, number of events, further numbers of each by name."""

    users: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    values: dict[str, np.ndarray] = field(default_factory=dict)


class ShardSource(ABC):
    """Users, or sequences of them, of some shards, a source of :class:`ShuffleBuffer`: shard by shard, in an order of
    the epoch."""

    def __init__(self, store: ShardedStore, numbers: list[int], seed: int) -> None:
        """numbers: of the shards."""
        self.shards, self.numbers, self.seed = [store.shards[n] for n in numbers], numbers, seed
        self.first_users = [int(store.first_users[n]) for n in numbers]
        self._table: tuple[int, int, ShardTable] | None = None

    @abstractmethod
    def counts(self, epoch: int) -> np.ndarray:
        """int64, users in the table of each shard."""

    @abstractmethod
    def make_table(self, shard: int, epoch: int) -> ShardTable:
        """The table of the shard at place ``shard``."""

    @abstractmethod
    def columns(self, shard: int) -> Mapping[str, np.ndarray]:
        """The event columns that are read."""

    def begin(self, epoch: int) -> int:
        generator = np.random.Generator(np.random.PCG64(derive(self.seed, SHARD_SEED, epoch)))
        self._epoch, self._counts = epoch, self.counts(epoch)
        self._order = generator.permutation(len(self.shards))
        self._ends = np.cumsum(self._counts[self._order])
        return int(self._ends[-1])

    def refs(self, start: int, stop: int) -> np.ndarray:
        positions = np.arange(start, stop)
        place = np.searchsorted(self._ends, positions, side="right")
        shards = self._order[place]
        return (shards << _SHARD_BITS) + positions - (self._ends[place] - self._counts[shards])

    def fetch(self, refs: np.ndarray) -> Users:
        shards, places = refs >> _SHARD_BITS, refs & ((1 << _SHARD_BITS) - 1)
        parts, at = [], []
        for s in dict.fromkeys(shards.tolist()):
            here = np.flatnonzero(shards == s)
            parts.append(self._fetch_from(s, refs[here], places[here]))
            at.append(here)
        if not parts:
            return self._fetch_from(0, refs, places)
        users = Users.concatenate(parts)
        order = np.argsort(np.concatenate(at))
        return users if np.array_equal(order, np.arange(len(order))) else users.take(order)

    def _fetch_from(self, shard: int, refs: np.ndarray, places: np.ndarray) -> Users:
        table = self._load_table(shard)
        sequential = len(places) > 0 and np.array_equal(places, np.arange(places[0], places[0] + len(places)))
        starts, lengths = table.starts[places], table.lengths[places]
        read = _read_in_sequence if sequential else _read_by_row
        found = {name: read(column, starts, lengths) for name, column in self.columns(shard).items()}
        values = {name: value[places] for name, value in table.values.items()}
        return Users(refs, self.first_users[shard] + table.users[places], lengths, found, values)

    def _load_table(self, shard: int) -> ShardTable:
        """Where the users of a shard lie. That of one shard is kept."""
        if self._table is None or self._table[:2] != (shard, self._epoch):
            self._table = shard, self._epoch, self.make_table(shard, self._epoch)
        return self._table[2]


class ShardUsers(ShardSource):
    """Users with the last ``max_len + 1`` of their events that train. Users with fewer than two are left out."""

    def __init__(self, store: ShardedStore, numbers: list[int], counts: list[int], selection: str, time: int | None,
                 max_len: int, seed: int) -> None:  # fmt: skip
        """counts: training users of each shard. selection, time: which events train
        (:func:`hstu.data.splits.training_ends`)."""
        super().__init__(store, numbers, seed)
        self.num_users = np.array(counts, np.int64)
        self.selection, self.time, self.max_len = selection, time, max_len
        self.begin(0)

    def counts(self, epoch: int) -> np.ndarray:
        return self.num_users

    def make_table(self, shard: int, epoch: int) -> ShardTable:
        return shard_table(self.shards[shard], self.selection, self.time, self.max_len)

    def columns(self, shard: int) -> Mapping[str, np.ndarray]:
        store = self.shards[shard]
        found = {"item_ids": store.item_ids, "timestamps": store.timestamps}
        return found if store.actions is None else {**found, "actions": store.actions}


def shard_table(shard: SequenceStore, selection: str, time: int | None, max_len: int) -> ShardTable:
    offsets = np.asarray(shard.offsets)
    ends = training_ends(shard, selection, time)
    users = np.flatnonzero(ends - offsets[:-1] >= 2)
    lengths = np.minimum(ends[users] - offsets[users], max_len + 1)
    return ShardTable(users, ends[users] - lengths, lengths)


def _read_in_sequence(column: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Rows of users that follow each other, through plain reads from front to back: nothing stays mapped."""
    ends, parts, first = starts + lengths, [], 0
    while first < len(starts):
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + _READ_ROWS, side="right")))
        begin, stop = int(starts[first]), int(ends[last - 1])
        rows = joined_ranges(starts[first:last] - begin, lengths[first:last])
        parts.append(_read_rows(column, begin, stop)[rows])
        first = last
    return np.concatenate(parts)


def _read_rows(column: np.ndarray, start: int, stop: int) -> np.ndarray:
    if not isinstance(column, np.memmap):
        return column[start:stop]
    assert column.filename is not None
    offset = column.offset + start * column.dtype.itemsize
    return np.fromfile(column.filename, column.dtype, stop - start, offset=offset)


def _read_by_row(column: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return np.asarray(column[joined_ranges(starts, lengths)])


@dataclass(frozen=True)
class StreamShare(Generic[B]):
    """As :class:`hstu.data.share.Share`; what all ranks have is asked when it is needed, by all ranks together."""

    batch: B
    lengths: np.ndarray
    """Tokens of each user of this rank."""
    world: World
    event_work: float

    @cached_property
    def num_events(self) -> int:
        return int(self.world.sum(torch.tensor([self.batch.num_events], device=self.world.device)))

    @cached_property
    def work(self) -> np.ndarray:
        return self.world.gather_arrays(np.array([user_work(self.lengths, linear=self.event_work).sum()]))


class ShardBatches(ABC, Generic[B]):
    """The training data of one rank, for :class:`hstu.problem.Problem`.

    In every step a rank takes the same part of what its shards hold, so that all come to their end together however
    uneven the shards are. ``share`` is a function of (seed, epoch, step, ranks), fast when steps follow each other.

    Attributes:
        users: those that train, of all ranks. num_skipped: the others.
    """

    users: range
    num_skipped: int

    def __init__(self, source: ShardSource, batch_users: int, buffer_users: int, seed: int, world: World) -> None:
        """batch_users: of all ranks in a step. buffer_users: in the shuffle buffer of this rank."""
        self.source, self.batch_users, self.world = source, batch_users, world
        self.buffer = ShuffleBuffer(source, buffer_users, derive(seed, world.rank))
        self._next = (0, 0)

    @abstractmethod
    def total(self, epoch: int) -> int:
        """What the shards of all ranks hold in an epoch: users, or sequences of them."""

    @abstractmethod
    def make(self, users: Users, first_row: int) -> tuple[B, np.ndarray]:
        """The batch of ``users`` on the CPU and the tokens of each. first_row: as of :data:`RANK_BITS`."""

    def num_steps(self, epoch: int) -> int:
        return -(-self.total(epoch) // self.batch_users)

    def savings(self, epoch: int, num_steps: int | None = None) -> dict[str, float]:
        return {}

    def share(self, epoch: int, step: int, ranks: Ranks) -> StreamShare[B]:
        """What this rank trains on in a step."""
        begin, end = (self.buffer_position(epoch, s) for s in (step, step + 1))
        if self._next != (epoch, step):
            self.buffer.seek(epoch, begin)
        users = self.buffer.take(end - begin)
        self._next = (epoch, step + 1)
        if step + 1 == self.num_steps(epoch):
            self.buffer.start(epoch + 1)
            self._next = (epoch + 1, 0)
        batch, lengths = self.make(users, ranks.rank << RANK_BITS)
        return StreamShare(batch.to(self.world.device), lengths, self.world, ranks.event_work)

    def buffer_position(self, epoch: int, step: int) -> int:
        """Users that have left the buffer of this rank before a step."""
        return step * int(self.source.counts(epoch).sum()) // self.num_steps(epoch)


def own_shards(store: SequenceStore, world: World) -> tuple[ShardedStore, list[int]]:
    """``store`` and the numbers of the shards that this rank reads.

    Raises UserError where there are fewer shards than ranks.
    """
    if not isinstance(store, ShardedStore):
        raise UserError(f"run.reader=stream: {store.path} is one store; prepare it with data.shards=S")
    return store, assign_shards([s.num_events for s in store.shards], world.size)[world.rank]


class StreamBatches(ShardBatches[Batch]):
    """Users with their last events, for retrieval.

    Raises UserError where there are fewer shards than ranks, or no user has two training events.
    """

    def __init__(self, store: SequenceStore, selection: str, max_len: int, seed: int, batch_users: int,
                 buffer_users: int, world: World) -> None:  # fmt: skip
        """batch_users, buffer_users: as of :class:`ShardBatches`."""
        whole, mine = own_shards(store, world)
        time = training_time(store, selection)
        counts = [len(shard_table(s, selection, time, max_len).users) for s in whole.shards]
        if sum(counts) == 0:
            raise UserError(f"{store.path}: no user has two training events; loosen the filters or the split")
        self.num_skipped, self.users = store.num_users - sum(counts), range(sum(counts))
        source = ShardUsers(whole, mine, [counts[s] for s in mine], selection, time, max_len, seed)
        super().__init__(source, batch_users, buffer_users, seed, world)

    def total(self, epoch: int) -> int:
        return len(self.users)

    def make(self, users: Users, first_row: int) -> tuple[Batch, np.ndarray]:
        batch = make_batch(users)
        if self.world.size > 1:  # ranks draw different random numbers
            batch = replace(batch, random_rows=torch.arange(batch.num_events) + first_row)
        return batch, users.lengths - 1


def make_batch(users: Users) -> Batch:
    """The batch of users whose last event is only a label."""
    lengths = users.lengths - 1
    starts = np.cumsum(users.lengths) - users.lengths
    rows = joined_ranges(starts, lengths)  # [L] inputs; the label of a row is the row after it
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    items, times = users.columns["item_ids"].astype(np.int64), users.columns["timestamps"]
    actions = users.columns.get("actions")
    return Batch(
        offsets=torch.from_numpy(offsets),
        item_ids=torch.from_numpy(items[rows]),
        timestamps=torch.from_numpy(times[rows]),
        request_times=torch.from_numpy(times[rows + 1]),
        labels=torch.from_numpy(items[rows + 1]),
        users=torch.from_numpy(users.rows),
        max_len=int(lengths.max(initial=0)),
        actions=None if actions is None else torch.from_numpy(actions[rows]),
    )
