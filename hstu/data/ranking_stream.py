"""Ranking batches from a sharded store, read in sequence; see ``hstu/data/shard_stream.py``.

What goes through the shuffle buffer are sequences, so that a user with many events takes no more of it than another.

Legend: S sequences in the batch, L events, T predicted events.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from hstu.config import Config
from hstu.data.random_rows import token_counts
from hstu.data.ranking import RankingData
from hstu.data.ranking_batches import PHASE_SEED, RankingBatch, count_sequences, cut, make_batch
from hstu.data.shard_stream import ShardBatches, ShardSource, ShardTable, own_shards
from hstu.data.sharded_store import ShardedStore
from hstu.data.shuffle_buffer import Users, joined_ranges
from hstu.data.splits import training_ends, training_time
from hstu.errors import UserError
from hstu.seeding import derive

if TYPE_CHECKING:
    from hstu.distributed import World


class Cuts:
    """How the users of each shard are cut into sequences. The cuts move from epoch to epoch, by random numbers of the
    shard, whichever rank reads it.

    Attributes:
        lengths: by shard, int32 training events of each user.
    """

    def __init__(self, store: ShardedStore, config: Config) -> None:
        self.config = config
        time = training_time(store, config.run.selection)
        ends = ((shard, training_ends(shard, config.run.selection, time)) for shard in store.shards)
        self.lengths = [(end - np.asarray(shard.offsets)[:-1]).astype(np.int32) for shard, end in ends]
        self._counts: dict[int, np.ndarray] = {}

    def seed(self, shard: int, epoch: int) -> int:
        return derive(self.config.seed, PHASE_SEED, epoch, shard)

    def counts(self, epoch: int) -> np.ndarray:
        """int64, sequences of every shard."""
        if epoch not in self._counts:
            found = [
                count_sequences(self.config, lengths[lengths > 0].astype(np.int64), self.seed(shard, epoch))
                for shard, lengths in enumerate(self.lengths)
            ]
            self._counts[epoch] = np.array(found, np.int64)
        return self._counts[epoch]


class ShardSequences(ShardSource):
    """Sequences that predict the training events of some shards, each event once.

    Beside its events a sequence has ``context``, how many of them come before the predicted ones, and ``first_row``,
    the row of its first event in the whole store.
    """

    def __init__(self, data: RankingData, cuts: Cuts, numbers: list[int]) -> None:
        """numbers: of the shards."""
        store = data.store
        assert isinstance(store, ShardedStore)
        super().__init__(store, numbers, cuts.config.seed)
        self.cuts, self.first_rows = cuts, [int(store.first_rows[n]) for n in numbers]
        self._names = list(data.columns)
        self.begin(0)

    def counts(self, epoch: int) -> np.ndarray:
        return self.cuts.counts(epoch)[self.numbers]

    def make_table(self, shard: int, epoch: int) -> ShardTable:
        number = self.numbers[shard]
        users = np.flatnonzero(self.cuts.lengths[number])
        starts = np.asarray(self.shards[shard].offsets)[users]
        ends = starts + self.cuts.lengths[number][users]
        found = cut(self.cuts.config, users, starts, starts, ends, self.cuts.seed(number, epoch))
        values = {"context": found.split - found.first, "first_row": self.first_rows[shard] + found.first}
        return ShardTable(found.users, found.first, found.stop - found.first, values)

    def columns(self, shard: int) -> Mapping[str, np.ndarray]:
        store = self.shards[shard]
        found = {"item_ids": store.item_ids, "timestamps": store.timestamps}
        if store.actions is not None and "actions" in self._names:
            found["actions"] = store.actions
        return found | {name: store.columns[name] for name in self._names if name != "actions"}


class RankingStreamBatches(ShardBatches[RankingBatch]):
    """The training data of one rank: as :class:`hstu.data.ranking_batches.RankingBatches` every training event once an
    epoch, from as much context.

    Raises UserError where there are fewer shards than ranks, or nothing to train on.
    """

    def __init__(self, data: RankingData, config: Config, world: World) -> None:
        assert config.ranking is not None
        store, mine = own_shards(data.store, world)
        self.data, self.fused = data, config.ranking.form == "fused"
        self.cuts = Cuts(store, config)
        num_users = sum(int(np.count_nonzero(lengths)) for lengths in self.cuts.lengths)
        if num_users == 0:
            raise UserError(f"{store.path}: no event lies in the training part; take a later data.split_time")
        self.num_skipped, self.users = store.num_users - num_users, range(num_users)
        source = ShardSequences(data, self.cuts, mine)
        super().__init__(source, config.run.batch_users, config.run.buffer_users, config.seed, world)

    def total(self, epoch: int) -> int:
        return int(self.cuts.counts(epoch).sum())

    def make(self, users: Users, first_row: int) -> tuple[RankingBatch, np.ndarray]:
        lengths = users.lengths
        rows = joined_ranges(users.values["first_row"], lengths)
        place = joined_ranges(np.zeros(len(users), np.int64), lengths)
        predicted = place >= np.repeat(users.values["context"], lengths)
        batch = make_batch(self.data, users.rows, lengths, rows, predicted, users.columns)
        tokens = token_counts(lengths, self.fused, self.data.num_prefix)
        if self.world.size > 1:  # ranks draw different random numbers
            batch = replace(
                batch, random_rows=torch.arange(int(tokens.sum())) + first_row,
                random_targets=torch.arange(batch.num_events) + first_row,
            )  # fmt: skip
        return batch, tokens
