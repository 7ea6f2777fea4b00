"""Training batches from a sharded store, read in sequence: each rank its own shards, through shuffle buffers.

Against :class:`hstu.data.batches.TrainBatches`, which draws each batch from all users and keeps about 85 bytes a user,
this reads every file from front to back and holds the events of the buffers. Every shard has a buffer of its own, and
every step takes the same part of all of them: what a batch holds depends on the shards, not on the ranks. The ranks
that read its users then send them to those that train on them (``hstu/data/exchange.py``).
``hstu/data/ranking_stream.py`` does it for ranking.

Legend: S shards, G users of a batch of all ranks, B users of this rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch

from hstu.data.batches import Batch, weighting
from hstu.data.exchange import Exchange
from hstu.data.random_rows import rows_of
from hstu.data.shard_source import PieceTable, ShardSource, count_by_piece, training_lengths
from hstu.data.sharded_store import ShardedStore, assign_shards
from hstu.data.share import Share
from hstu.data.shuffle_buffer import ShuffleBuffer, Users, joined_ranges
from hstu.data.splits import training_time
from hstu.data.stream_length import StreamLength
from hstu.errors import UserError
from hstu.seeding import derive

if TYPE_CHECKING:
    from hstu.config import RunConfig
    from hstu.data.share import Ranks
    from hstu.data.store import SequenceStore
    from hstu.distributed import World

TAKEN_USERS = 4096
"""Users that leave the buffers at once, for a few steps; no more than the buffers hold."""
B = TypeVar("B", bound=Any)


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
                 seed: int, world: World, sampler: StreamLength | None) -> None:  # fmt: skip
        """sources: the shards of this rank. owners: [S] the rank of each. columns: of an event as it travels."""
        self.run, self.world, self.sampler = run, world, sampler
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
    def prepared(self, users: Users, epoch: int) -> Users:
        """Users that were read, as they travel and train: with all that a batch needs, cut to what stays."""

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
        """As of :class:`hstu.data.batches.TrainBatches`, but on average over epochs: see :class:`StreamLength`."""
        return {} if self.sampler is None else self.sampler.expected

    def share(self, epoch: int, step: int, ranks: Ranks) -> Share[B]:
        """What this rank trains on in a step."""
        own, counts = self._take(epoch, step)
        users = self.exchange.everyone(own, counts)
        tokens, predicted = self.count(users)
        owners, work = ranks.divide_all(tokens)
        chosen = np.flatnonzero(owners == ranks.rank)
        batch = self.make(self.exchange.deliver(own, users, counts, owners))
        if ranks.size > 1:
            batch = self.place(batch, users, chosen)
        return Share(batch.to(self.world.device), int(predicted.sum()), work)

    def left(self, epoch: int, step: int) -> np.ndarray:
        """[S] int64. Users that have left the buffer of every shard before a step."""
        totals = self.totals(epoch)
        return apportion(totals, step * int(totals.sum()) // self.num_steps(epoch))

    def close(self) -> None:
        """Frees what the ranks exchange through."""
        self.exchange.close()

    def _take(self, epoch: int, step: int) -> tuple[Users, np.ndarray]:
        """The users of a step that this rank reads, by shard; and [S] how many every shard gives."""
        if self._taken is None or not self._taken.holds(epoch, step):
            self._taken = self._take_steps(epoch, step)
        return self._taken.at(step)

    def _take_steps(self, epoch: int, step: int) -> TakenSteps:
        """Of a few steps from ``step`` on, at once: many shards give a few users each to a step."""
        if self._next != (epoch, step):
            for buffer, position in zip(self.buffers, self.left(epoch, step)[self.own].tolist(), strict=True):
                buffer.seek(epoch, position)
        stop = step + max(1, min(TAKEN_USERS, self.run.buffer_users) // self.run.batch_users)
        stop = min(stop, self.num_steps(epoch))
        left = np.stack([self.left(epoch, s) for s in range(step, stop + 1)])
        taken = [b.take(int(left[-1, n] - left[0, n])) for n, b in zip(self.own, self.buffers, strict=True)]
        self._next = (epoch, stop)
        if stop == self.num_steps(epoch):
            for buffer in self.buffers:
                buffer.start(epoch + 1)
            self._next = (epoch + 1, 0)
        return TakenSteps(epoch, step, self.prepared(Users.concatenate(taken), epoch), left, self.own)


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
    whole = int(counts.sum())
    assert 0 <= total <= whole, "more than there are"

    def given(time: float) -> np.ndarray:
        return np.minimum(np.floor(counts * time + 0.5).astype(np.int64), counts)

    # low gives no more than total, high no less: rounding gives or takes half a user of each part
    low, high = (total + side * (len(counts) / 2 + 1) for side in (-1, 1))
    low, high = max(0.0, low / max(1, whole)), min(1.0, high / max(1, whole))
    found = given(low)
    while found.sum() < total and low < (middle := (low + high) / 2) < high:
        between = given(middle)
        if between.sum() <= total:
            low, found = middle, between
        else:
            high = middle
    if (missing := total - int(found.sum())) == 0:  # high is perhaps far away
        return found
    last = np.repeat(np.arange(len(counts)), given(high) - found)[:missing]
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


class StreamBatches(ShardBatches[Batch]):
    """Users with their last events, for retrieval.

    Raises UserError where there are fewer shards than ranks, no user has two training events, or events cannot be
    weighted by their actions.
    """

    def __init__(
        self, store: SequenceStore, max_len: int, run: RunConfig, seed: int, world: World, event_weights: str = "none"
    ) -> None:
        whole, owners = shards_of_ranks(store, world)
        time = training_time(store, run.selection)
        sources: list[ShardSource] = []
        self._totals = np.zeros(len(whole.shards), np.int64)
        sizes = np.zeros(max_len + 1, np.int64)  # users by their inputs
        for number, shard in enumerate(whole.shards):
            lengths = training_lengths(shard, run.selection, time)
            inputs = np.minimum(lengths[lengths >= 2] - 1, max_len)
            self._totals[number] = len(inputs)
            sizes += np.bincount(inputs, minlength=max_len + 1)
            if owners[number] == world.rank:
                sources.append(ShardUsers(whole, number, lengths, max_len, seed))
        total = int(self._totals.sum())
        if total == 0:
            raise UserError(f"{store.path}: no user has two training events; loosen the filters or the split")
        self.num_skipped, self.users = store.num_users - total, range(total)
        self.weight_scale, self.has_zero_weights = weighting(whole, event_weights)
        sampler, config = None, run.stochastic_length
        if config.alpha is not None:
            n = np.arange(max_len + 1)
            sampler = StreamLength(config, int(np.flatnonzero(sizes)[-1]), seed, n, n, sizes)
        columns = column_types(whole, sources)
        columns |= {f"next_{name}": dtype for name, dtype in columns.items()}
        super().__init__(sources, owners, columns, run, seed, world, sampler)

    def totals(self, epoch: int) -> np.ndarray:
        return self._totals

    def prepared(self, users: Users, epoch: int) -> Users:
        """The inputs of each user, with the event after each; dropped ones are still what comes after those before."""
        inputs = users.lengths - 1
        rows = joined_ranges(np.cumsum(users.lengths) - users.lengths, inputs)
        kept = inputs
        if self.sampler is not None:
            kept = self.sampler.kept(inputs, users.rows, epoch)
            times = users.columns["timestamps"][rows]
            rows = rows[self.sampler.positions(inputs, kept, users.rows, epoch, times)]
        columns = {name: column[rows] for name, column in users.columns.items()}
        columns |= {f"next_{name}": column[rows + 1] for name, column in users.columns.items()}
        return Users(users.refs, users.rows, kept, columns, users.values)

    def count(self, users: Users) -> tuple[np.ndarray, np.ndarray]:
        return users.lengths, users.lengths

    def make(self, users: Users) -> Batch:
        columns, actions = users.columns, users.columns.get("actions")
        weights = counted = None
        if self.weight_scale is not None:
            weights = torch.from_numpy(columns["next_actions"]) * self.weight_scale
            counted = weights.nonzero()[:, 0] if self.has_zero_weights else None
        return Batch(
            offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(users.lengths)]).astype(np.int64)),
            item_ids=torch.from_numpy(columns["item_ids"].astype(np.int64)),
            timestamps=torch.from_numpy(columns["timestamps"]),
            request_times=torch.from_numpy(columns["next_timestamps"]),
            labels=torch.from_numpy(columns["next_item_ids"].astype(np.int64)),
            users=torch.from_numpy(users.rows),
            max_len=int(users.lengths.max(initial=0)),
            weights=weights,
            actions=None if actions is None else torch.from_numpy(actions),
            counted=counted,
        )

    def place(self, batch: Batch, everyone: Users, chosen: np.ndarray) -> Batch:
        lengths = everyone.lengths
        return replace(batch, random_rows=torch.from_numpy(rows_of(lengths, chosen)), max_len=int(lengths.max()))


def column_types(store: ShardedStore, sources: list[ShardSource]) -> dict[str, np.dtype]:
    """Of the event columns that are read, over all shards."""
    whole = {"item_ids": store.item_ids, "timestamps": store.timestamps, "actions": store.actions, **store.columns}
    return {name: whole[name].dtype for name in sources[0].columns()}
