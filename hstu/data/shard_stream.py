"""Training batches from a sharded store, read in sequence: each rank its own shards, through shuffle buffers.

Against :class:`hstu.data.batches.TrainBatches`, which draws each batch from all users and keeps about 85 bytes a user,
this reads every file from front to back and holds the events of the buffers. Every shard has a buffer of its own, and
every step takes the same part of all of them: what a batch holds depends on the shards, not on the ranks. The ranks
that read its users then send them to those that train on them (``hstu/data/exchange.py``).
``hstu/data/ranking_stream.py`` does it for ranking.

Legend: S shards, G users of a batch of all ranks, R ranks, B users of this rank, L events.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch

from hstu.data.batches import Batch
from hstu.data.exchange import Exchange
from hstu.data.random_rows import rows_of
from hstu.data.sharded_store import ShardedStore, assign_shards
from hstu.data.share import Share
from hstu.data.shuffle_buffer import ShuffleBuffer, Users, joined_ranges
from hstu.data.splits import training_ends, training_time
from hstu.errors import UserError
from hstu.seeding import derive

if TYPE_CHECKING:
    from hstu.config import RunConfig
    from hstu.data.share import Ranks
    from hstu.data.store import SequenceStore
    from hstu.distributed import World

SHARD_SEED = 102
"""Purpose number of the seed that orders the pieces of a shard."""
PIECE_USERS = 1 << 14
"""Users of a shard that are read in sequence; pieces come in an order of the epoch."""
TAKEN_USERS = 4096
"""Users that leave the buffers at once, for a few steps; no more than the buffers hold."""
_PIECE_BITS = 40
"""A reference is the piece above the place among the piece's training users."""
_READ_ROWS = 1 << 22
"""Event rows read at once; a longer single user is read whole."""
B = TypeVar("B", bound=Any)


@dataclass(frozen=True)
class PieceTable:
    """Training users of a piece, or sequences of them, in the order of the files: row of the user in the shard, first
    event row, number of events, further numbers of each by name."""

    users: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    values: dict[str, np.ndarray] = field(default_factory=dict)


class ShardSource(ABC):
    """Users of a shard, or sequences of them, a source of :class:`ShuffleBuffer`: piece by piece, in an order of the
    epoch."""

    def __init__(self, store: ShardedStore, number: int, seed: int) -> None:
        """number: of the shard."""
        self.shard, self.number, self.seed = store.shards[number], number, seed
        self.first_user = int(store.first_users[number])
        self._table: tuple[int, int, PieceTable] | None = None

    @abstractmethod
    def counts(self, epoch: int) -> np.ndarray:
        """int64, users in the table of each piece."""

    @abstractmethod
    def make_table(self, users: slice, piece: int, epoch: int) -> PieceTable:
        """The table of a piece; users: of the shard."""

    @abstractmethod
    def columns(self) -> Mapping[str, np.ndarray]:
        """The event columns that are read."""

    def begin(self, epoch: int) -> int:
        generator = np.random.Generator(np.random.PCG64(derive(self.seed, SHARD_SEED, epoch, self.number)))
        self._epoch, self._counts = epoch, self.counts(epoch)
        self._order = generator.permutation(len(self._counts))
        self._ends = np.cumsum(self._counts[self._order])
        return int(self._counts.sum())

    def refs(self, start: int, stop: int) -> np.ndarray:
        positions = np.arange(start, stop)
        place = np.searchsorted(self._ends, positions, side="right")
        pieces = self._order[place]
        return (pieces << _PIECE_BITS) + positions - (self._ends[place] - self._counts[pieces])

    def fetch(self, refs: np.ndarray) -> Users:
        pieces, places = refs >> _PIECE_BITS, refs & ((1 << _PIECE_BITS) - 1)
        parts, at = [], []
        for piece in dict.fromkeys(pieces.tolist()):
            here = np.flatnonzero(pieces == piece)
            parts.append(self._fetch_from(self._load_table(piece), refs[here], places[here]))
            at.append(here)
        if not parts:
            return self._fetch_from(self._load_table(0), refs, places)
        users = Users.concatenate(parts)
        order = np.argsort(np.concatenate(at))
        return users if np.array_equal(order, np.arange(len(order))) else users.take(order)

    def _fetch_from(self, table: PieceTable, refs: np.ndarray, places: np.ndarray) -> Users:
        sequential = len(places) > 0 and np.array_equal(places, np.arange(places[0], places[0] + len(places)))
        starts, lengths = table.starts[places], table.lengths[places]
        read = _read_in_sequence if sequential else _read_by_row
        found = {name: read(column, starts, lengths) for name, column in self.columns().items()}
        values = {name: value[places] for name, value in table.values.items()}
        return Users(refs, self.first_user + table.users[places], lengths, found, values)

    def _load_table(self, piece: int) -> PieceTable:
        """Where the users of a piece lie. That of one piece is kept."""
        if self._table is None or self._table[:2] != (piece, self._epoch):
            users = slice(piece * PIECE_USERS, min((piece + 1) * PIECE_USERS, self.shard.num_users))
            self._table = piece, self._epoch, self.make_table(users, piece, self._epoch)
        return self._table[2]


def training_lengths(shard: SequenceStore, selection: str, time: int | None) -> np.ndarray:
    """int32, training events of each user. selection, time: as of :func:`hstu.data.splits.training_ends`."""
    return (training_ends(shard, selection, time) - np.asarray(shard.offsets)[:-1]).astype(np.int32)


def count_by_piece(counts: np.ndarray) -> np.ndarray:
    """int64, the sum over each piece of what every user of a shard has; one empty piece of a shard without users."""
    if len(counts) == 0:
        return np.zeros(1, np.int64)
    return np.add.reduceat(counts, np.arange(0, len(counts), PIECE_USERS), dtype=np.int64)


class ShardUsers(ShardSource):
    """Users with the last ``max_len + 1`` of their events that train. Users with fewer than two are left out."""

    def __init__(self, store: ShardedStore, number: int, lengths: np.ndarray, max_len: int, seed: int) -> None:
        """lengths: of :func:`training_lengths`."""
        super().__init__(store, number, seed)
        self.lengths, self.max_len = lengths, max_len
        self._num_users = count_by_piece(lengths >= 2)
        self.begin(0)

    def counts(self, epoch: int) -> np.ndarray:
        return self._num_users

    def make_table(self, users: slice, piece: int, epoch: int) -> PieceTable:
        trained = self.lengths[users].astype(np.int64)
        chosen = np.flatnonzero(trained >= 2)
        lengths = np.minimum(trained[chosen], self.max_len + 1)
        ends = np.asarray(self.shard.offsets[users])[chosen] + trained[chosen]
        return PieceTable(users.start + chosen, ends - lengths, lengths)

    def columns(self) -> Mapping[str, np.ndarray]:
        store = self.shard
        found = {"item_ids": store.item_ids, "timestamps": store.timestamps}
        return found if store.actions is None else {**found, "actions": store.actions}


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


class ShardBatches(ABC, Generic[B]):
    """The training data of one rank, for :class:`hstu.problem.Problem`.

    ``share`` is a function of (seed, epoch, step) and the shards, divided among the ranks as
    :class:`hstu.data.batches.TrainBatches` divides it; all ranks call it, in the same order. It is fast when steps
    follow each other.

    Attributes:
        users: those that train, of all ranks. num_skipped: the others.
        own: numbers of the shards that this rank reads, ascending.
    """

    users: range
    num_skipped: int

    def __init__(self, sources: list[ShardSource], owners: np.ndarray, columns: dict[str, np.dtype], run: RunConfig,
                 seed: int, world: World) -> None:  # fmt: skip
        """sources: the shards of this rank. owners: [S] the rank of each. columns: what is read of an event."""
        self.run, self.world = run, world
        self.own = [source.number for source in sources]
        share = -(-run.buffer_users // len(owners))
        self.buffers = [ShuffleBuffer(source, share, derive(seed, source.number)) for source in sources]
        self.exchange = Exchange(owners, columns, world, run.timeout_s)
        self._next = (0, 0)
        self._taken: TakenSteps | None = None

    @abstractmethod
    def totals(self, epoch: int) -> np.ndarray:
        """[S] int64. What every shard holds in an epoch: users, or sequences of them."""

    @abstractmethod
    def count(self, users: Users) -> tuple[np.ndarray, np.ndarray]:
        """[G] int64 tokens and [G] int64 predicted events; the columns of the users are elsewhere."""

    @abstractmethod
    def make(self, users: Users) -> B:
        """Their batch on the CPU."""

    @abstractmethod
    def place(self, batch: B, everyone: Users, chosen: np.ndarray) -> B:
        """The batch of the users ``chosen`` of ``everyone``, with its place in the batch of all ranks."""

    def num_steps(self, epoch: int) -> int:
        return -(-int(self.totals(epoch).sum()) // self.run.batch_users)

    def savings(self, epoch: int, num_steps: int | None = None) -> dict[str, float]:
        return {}

    def share(self, epoch: int, step: int, ranks: Ranks) -> Share[B]:
        """What this rank trains on in a step."""
        own, counts = self._take(epoch, step)
        users = self.exchange.everyone(own, counts)
        tokens, predicted = self.count(users)
        owners, work = ranks.divide_all(tokens)
        chosen = np.flatnonzero(owners == ranks.rank)
        batch = self.make(self.exchange.deliver(users, counts, owners))
        if ranks.size > 1:
            batch = self.place(batch, users, chosen)
        return Share(batch.to(self.world.device), int(predicted.sum()), work)

    def left(self, epoch: int, step: int) -> np.ndarray:
        """[S] int64. Users that have left the buffer of every shard before a step."""
        totals = self.totals(epoch)
        return apportion(totals, step * int(totals.sum()) // self.num_steps(epoch))

    def _take(self, epoch: int, step: int) -> tuple[Users, np.ndarray]:
        """The users of a step that this rank reads, by shard; and [S] how many every shard gives."""
        if self._taken is None or not self._taken.holds(epoch, step):
            self._taken = self._take_steps(epoch, step)
        return self._taken.at(step)

    def _take_steps(self, epoch: int, step: int) -> TakenSteps:
        """Of a few steps from ``step`` on, at once: many shards give a few users each to a step."""
        if self._next != (epoch, step):
            for number, buffer in zip(self.own, self.buffers, strict=True):
                buffer.seek(epoch, int(self.left(epoch, step)[number]))
        stop = step + max(1, min(TAKEN_USERS, self.run.buffer_users) // self.run.batch_users)
        stop = min(stop, self.num_steps(epoch))
        left = np.stack([self.left(epoch, s) for s in range(step, stop + 1)])
        taken = [b.take(int(left[-1, n] - left[0, n])) for n, b in zip(self.own, self.buffers, strict=True)]
        self._next = (epoch, stop)
        if stop == self.num_steps(epoch):
            for buffer in self.buffers:
                buffer.start(epoch + 1)
            self._next = (epoch + 1, 0)
        return TakenSteps(epoch, step, Users.concatenate(taken), left, self.own)


@dataclass(frozen=True)
class TakenSteps:
    """Users that a rank has read for steps from ``first`` on, shard by shard.

    left: [steps + 1, S] int64, of :meth:`ShardBatches.left`. own: numbers of the rank's shards.
    """

    epoch: int
    first: int
    users: Users
    left: np.ndarray
    own: list[int]

    def holds(self, epoch: int, step: int) -> bool:
        return epoch == self.epoch and self.first <= step < self.first + len(self.left) - 1

    def at(self, step: int) -> tuple[Users, np.ndarray]:
        """The users of a step, and [S] how many every shard gives."""
        left = self.left - self.left[0]
        before, after = left[step - self.first], left[step - self.first + 1]
        starts = np.cumsum(left[-1, self.own]) - left[-1, self.own]
        counts = after - before
        return self.users.take(joined_ranges(starts + before[self.own], counts[self.own])), counts


def apportion(counts: np.ndarray, total: int) -> np.ndarray:
    """[S] int64. How many of ``total`` come from each of S parts that hold ``counts``, by Webster's method: the k-th of
    n, from 0, has its turn at (k + 1/2) / n. It gives every part its share to within about one, all of everything at
    the end, and never less of a part for a larger ``total``; the same numbers on all machines.

    Args:
        counts: [S] int64. total: 0 .. sum of counts.
    """
    assert 0 <= total <= counts.sum(), "more than there are"

    def given(time: float) -> np.ndarray:
        return np.minimum(np.floor(counts * time + 0.5).astype(np.int64), counts)

    low, high, found = 0.0, 1.0, np.zeros_like(counts)  # low gives no more than total, high no less
    while found.sum() < total and low < (middle := (low + high) / 2) < high:
        between = given(middle)
        if between.sum() <= total:
            low, found = middle, between
        else:
            high = middle
    last = np.repeat(np.arange(len(counts)), given(high) - found)[: total - int(found.sum())]
    return found + np.bincount(last, minlength=len(counts))


def shards_of_ranks(store: SequenceStore, world: World) -> tuple[ShardedStore, np.ndarray]:
    """``store``, and the rank [S] that reads each of its shards.

    Raises UserError where there are fewer shards than ranks.
    """
    if not isinstance(store, ShardedStore):
        raise UserError(f"run.reader=stream: {store.path} is one store; prepare it with data.shards=S")
    owners = np.empty(len(store.shards), np.int64)
    for rank, shards in enumerate(assign_shards([s.num_events for s in store.shards], world.size)):
        owners[shards] = rank
    return store, owners


class StreamBatches(ShardBatches[Batch]):
    """Users with their last events, for retrieval.

    Raises UserError where there are fewer shards than ranks, or no user has two training events.
    """

    def __init__(self, store: SequenceStore, max_len: int, run: RunConfig, seed: int, world: World) -> None:
        whole, owners = shards_of_ranks(store, world)
        time = training_time(store, run.selection)
        sources: list[ShardSource] = []
        self._totals = np.zeros(len(whole.shards), np.int64)
        for number, shard in enumerate(whole.shards):
            lengths = training_lengths(shard, run.selection, time)
            self._totals[number] = np.count_nonzero(lengths >= 2)
            if owners[number] == world.rank:
                sources.append(ShardUsers(whole, number, lengths, max_len, seed))
        total = int(self._totals.sum())
        if total == 0:
            raise UserError(f"{store.path}: no user has two training events; loosen the filters or the split")
        self.num_skipped, self.users = store.num_users - total, range(total)
        super().__init__(sources, owners, column_types(whole, sources), run, seed, world)

    def totals(self, epoch: int) -> np.ndarray:
        return self._totals

    def count(self, users: Users) -> tuple[np.ndarray, np.ndarray]:
        return users.lengths - 1, users.lengths - 1

    def make(self, users: Users) -> Batch:
        return make_batch(users)

    def place(self, batch: Batch, everyone: Users, chosen: np.ndarray) -> Batch:
        inputs = everyone.lengths - 1
        return replace(batch, random_rows=torch.from_numpy(rows_of(inputs, chosen)), max_len=int(inputs.max()))


def column_types(store: ShardedStore, sources: list[ShardSource]) -> dict[str, np.dtype]:
    """Of the event columns that are read, over all shards: texts are as wide as the widest."""
    whole = {"item_ids": store.item_ids, "timestamps": store.timestamps, "actions": store.actions, **store.columns}
    return {name: whole[name].dtype for name in sources[0].columns()}


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
