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
from hstu.data.random_rows import rows_of, token_counts
from hstu.data.ranking import RankingData, Sequences
from hstu.data.ranking_batches import PHASE_SEED, RankingBatch, count_sequences, cut, make_batch
from hstu.data.shard_source import PieceTable, ShardSource, pieces, training_lengths
from hstu.data.shard_stream import ShardBatches, column_types, shards_of_ranks
from hstu.data.sharded_store import ShardedStore
from hstu.data.shuffle_buffer import Users, places_within
from hstu.data.splits import training_time
from hstu.data.stream_length import StreamLength
from hstu.errors import UserError
from hstu.seeding import derive

if TYPE_CHECKING:
    from hstu.distributed import World


class Cuts:
    """How the users of each shard are cut into sequences. The cuts move from epoch to epoch, by random numbers of the
    shard's piece, whichever rank reads it.

    Attributes:
        lengths: by shard, int32 training events of each user.
    """

    def __init__(self, store: ShardedStore, config: Config) -> None:
        self.store, self.config = store, config
        time = training_time(store, config.run.selection)
        self.lengths = [training_lengths(shard, config.run.selection, time) for shard in store.shards]
        self._counts: dict[int, tuple[list[np.ndarray], np.ndarray]] = {}

    def seed(self, shard: int, piece: int, epoch: int) -> int:
        return derive(self.config.seed, PHASE_SEED, epoch, shard, piece)

    def counts(self, epoch: int) -> list[np.ndarray]:
        """By shard, int64, sequences of every piece; one empty piece of a shard without users."""
        return self._enter(epoch)[0]

    def totals(self, epoch: int) -> np.ndarray:
        """[S] int64 sequences of every shard."""
        return self._enter(epoch)[1]

    def _enter(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        found = self._counts.get(epoch)
        if found is None:
            counts = [self._of_shard(shard, epoch) for shard in range(len(self.lengths))]
            found = counts, np.array([count.sum() for count in counts])
            near = {e: kept for e, kept in self._counts.items() if abs(e - epoch) == 1}
            self._counts = {**near, epoch: found}  # a new one, as the loader thread is an epoch ahead
        return found

    def of_piece(self, number: int, piece: int, users: slice, epoch: int) -> Sequences:
        """The sequences of a piece of shard ``number``; rows of users and events are those of the shard."""
        lengths = self.lengths[number][users].astype(np.int64)
        chosen = np.flatnonzero(lengths)
        starts = np.asarray(self.store.shards[number].offsets[users])[chosen]
        seed = self.seed(number, piece, epoch)
        return cut(self.config, users.start + chosen, starts, starts, starts + lengths[chosen], seed)

    def _of_shard(self, shard: int, epoch: int) -> np.ndarray:
        found = []
        for piece, users in enumerate(pieces(self.store.shards[shard])):
            lengths = self.lengths[shard][users]
            seed = self.seed(shard, piece, epoch)
            found.append(count_sequences(self.config, lengths[lengths > 0].astype(np.int64), seed))
        return np.array(found, np.int64)


class ShardSequences(ShardSource):
    """Sequences that predict the training events of a shard, each event once.

    Beside its events a sequence has ``context``, how many of them come before the predicted ones, and ``first_row``,
    the row of its first event in the whole store.
    """

    def __init__(self, data: RankingData, cuts: Cuts, number: int) -> None:
        """number: of the shard."""
        store = data.store
        assert isinstance(store, ShardedStore)
        super().__init__(store, number, cuts.config.seed)
        self.cuts, self.first_row = cuts, int(store.first_rows[number])
        self._names = list(data.columns)
        self.begin(0)

    def counts(self, epoch: int) -> np.ndarray:
        return self.cuts.counts(epoch)[self.number]

    def make_table(self, users: slice, piece: int, epoch: int) -> PieceTable:
        found = self.cuts.of_piece(self.number, piece, users, epoch)
        values = {"context": found.split - found.first, "first_row": self.first_row + found.first}
        return PieceTable(found.users, found.first, found.stop - found.first, values)

    def columns(self) -> Mapping[str, np.ndarray]:
        store = self.shard
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
        store, owners = shards_of_ranks(data.store, world)
        self.data, self.fused = data, config.ranking.form == "fused"
        self.cuts = Cuts(store, config)
        num_users = sum(int(np.count_nonzero(lengths)) for lengths in self.cuts.lengths)
        if num_users == 0:
            raise UserError(f"{store.path}: no event lies in the training part; take a later data.split_time")
        self.num_skipped, self.users = store.num_users - num_users, range(num_users)
        own = np.flatnonzero(owners == world.rank).tolist()
        sources: list[ShardSource] = [ShardSequences(data, self.cuts, number) for number in own]
        columns = column_types(store, sources) | {"place": np.dtype(np.int32)}
        super().__init__(sources, owners, columns, config.run, config.seed, world, self._make_sampler(store, config))

    def _make_sampler(self, store: ShardedStore, config: Config) -> StreamLength | None:
        if config.run.stochastic_length.alpha is None:
            return None
        longest = min(config.model.max_len, max(int(lengths.max(initial=0)) for lengths in self.cuts.lengths))
        found = (
            self.cuts.of_piece(number, piece, users, epoch=0)
            for number, shard in enumerate(store.shards)
            for piece, users in enumerate(pieces(shard))
        )
        shapes, counts = zip(*(self._shapes(sequences) for sequences in found), strict=True)
        whole, cuttable = np.concatenate(shapes, axis=1)
        return StreamLength(config.run.stochastic_length, longest, config.seed, whole, cuttable, np.concatenate(counts))

    def _shapes(self, found: Sequences) -> tuple[np.ndarray, np.ndarray]:
        """[2, n] int64, events of a sequence and those that may be dropped; [n] how many sequences are so."""
        lengths = found.stop - found.first
        cuttable, base = self._cuttable(lengths, found.split - found.first), int(lengths.max(initial=0)) + 1
        shapes, counts = np.unique(lengths * base + cuttable, return_counts=True)
        return np.stack(np.divmod(shapes, base)), counts

    def _cuttable(self, lengths: np.ndarray, context: np.ndarray) -> np.ndarray:
        """As of :class:`hstu.data.ranking_batches.RankingBatches`."""
        return context if self.fused else lengths - 1

    def totals(self, epoch: int) -> np.ndarray:
        return self.cuts.totals(epoch)

    def prepared(self, users: Users, epoch: int) -> Users:
        """With ``place``, where each event stands in its whole sequence."""
        lengths, context = users.lengths, users.values["context"]
        place = places_within(lengths)
        columns = {**users.columns, "place": place.astype(np.int32)}
        if self.sampler is None:
            return replace(users, columns=columns)
        cuttable, ids = self._cuttable(lengths, context), users.values["first_row"] + context
        kept = self.sampler.kept(cuttable, ids, epoch)
        events = np.flatnonzero(place < np.repeat(cuttable, lengths))
        positions = self.sampler.positions(cuttable, kept, ids, epoch, users.columns["timestamps"][events])
        stays = place >= np.repeat(cuttable, lengths)
        stays[events[positions]] = True
        owners = np.repeat(np.arange(len(users)), lengths)
        before = np.bincount(owners, stays & (place < np.repeat(context, lengths)), len(users)).astype(np.int64)
        columns = {name: column[stays] for name, column in columns.items()}
        values = {**users.values, "context": before}
        return replace(users, lengths=lengths - cuttable + kept, columns=columns, values=values)

    def count(self, users: Users) -> tuple[np.ndarray, np.ndarray]:
        tokens = token_counts(users.lengths, self.fused, self.data.num_prefix)
        return tokens, users.lengths - users.values["context"]

    def make(self, users: Users) -> RankingBatch:
        lengths = users.lengths
        rows = np.repeat(users.values["first_row"], lengths) + users.columns["place"]
        predicted = places_within(lengths) >= np.repeat(users.values["context"], lengths)
        return make_batch(self.data, users.rows, lengths, rows, predicted, users.columns)

    def place(self, batch: RankingBatch, everyone: Users, chosen: np.ndarray) -> RankingBatch:
        tokens, predicted = self.count(everyone)
        return replace(
            batch, max_len=int(everyone.lengths.max()), max_targets=int(predicted.max()),
            random_rows=torch.from_numpy(rows_of(tokens, chosen)),
            random_targets=torch.from_numpy(rows_of(predicted, chosen)),
        )  # fmt: skip
