"""Ranking batches: sequences of events with their actions, features and labels, gathered without a loop over users.

Legend: S sequences in the batch, L events, T predicted events, F features, V values of all features.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hstu.config import Config
from hstu.data.batches import cut_batches
from hstu.data.random_rows import rows_of, token_counts
from hstu.data.ranking import RankingData, Sequences, count_fused, count_interleaved, cut_fused, cut_interleaved
from hstu.data.share import Ranks, Share
from hstu.data.splits import Split, Targets
from hstu.data.stochastic_length import make_sampler, savings
from hstu.distributed import World
from hstu.errors import UserError
from hstu.seeding import derive
from hstu.transfer import to_device

ORDER_SEED, PHASE_SEED = 104, 105
"""Purpose numbers of the seeds that shuffle sequences and move their cuts."""


@dataclass(frozen=True)
class Features:
    """Features of n rows in the layout of torchrec's KeyedJaggedTensor.

    Attributes:
        keys: names of the F categorical features.
        values: [V] int64. Codes, feature after feature.
        lengths: [F * n] int64. Values of each row, at least 1, feature after feature.
        counts: how many values each feature has.
        numbers: [n, numeric features] float32, standardised, NaN where missing.
    """

    keys: tuple[str, ...]
    values: Tensor
    lengths: Tensor
    counts: tuple[int, ...]
    numbers: Tensor

    @property
    def num_rows(self) -> int:
        return int(self.numbers.shape[0])


def make_features(coded: dict[str, tuple[np.ndarray, np.ndarray]], numbers: np.ndarray) -> Features:
    """coded: name -> values [V_f] and lengths [n]; numbers: [n, numeric features] float32."""
    values = [v for v, _ in coded.values()]
    lengths = [n for _, n in coded.values()]
    return Features(
        tuple(coded),
        torch.from_numpy(np.concatenate([np.empty(0, np.int64), *values])),
        torch.from_numpy(np.concatenate([np.empty(0, np.int64), *lengths])),
        tuple(len(v) for v in values),
        torch.from_numpy(np.ascontiguousarray(numbers, np.float32)),
    )


@dataclass(frozen=True)
class RankingBatch:
    """Events of S sequences; the last ``num_targets[s]`` of each are predicted.

    Attributes:
        offsets: [S+1] int64.
        item_ids: [L] int64, 1..num_items.
        timestamps: [L] int64, s.
        action_bits: [L, bits] float32, 0 or 1.
        num_targets: [S] int64.
        targets: [T] int64. Places of the predicted events among the L.
        labels: task -> [T] float32, NaN where missing. Empty where none are wanted.
        rows: [T] int64. Event rows of the store.
        users: [S] int64. User rows of the store; -1: a user outside it.
        item_features: of the L events; user_features: of the S sequences.
        max_len: longest sequence; max_targets: most predicted events of one.
        random_rows: [tokens] int64 or None. Where each token stands among the tokens of the batch of all ranks, by
            which random numbers are drawn; None: 0..tokens-1. Tokens as the model lays them out: each sequence's
            prefix, then its events (interleaved: item and action of each).
        random_targets: [T] int64 or None. The same for the predicted events.
    """

    offsets: Tensor
    item_ids: Tensor
    timestamps: Tensor
    action_bits: Tensor
    num_targets: Tensor
    targets: Tensor
    labels: dict[str, Tensor]
    rows: Tensor
    users: Tensor
    item_features: Features
    user_features: Features
    max_len: int
    max_targets: int
    random_rows: Tensor | None = None
    random_targets: Tensor | None = None

    def to(self, device: torch.device) -> RankingBatch:
        """The batch on ``device``; a GPU is not waited for."""
        return _to(self, device)  # type: ignore[no-any-return]

    @property
    def num_events(self) -> int:
        """Predicted events."""
        return int(self.targets.shape[0])

    @property
    def predicted_items(self) -> Tensor:
        """[T] int64. Items of the predicted events."""
        return self.item_ids[self.targets]


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return to_device(value, device)
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    if isinstance(value, RankingBatch | Features):
        return type(value)(**{f.name: _to(getattr(value, f.name), device) for f in fields(value)})
    return value


def sequence_rows(sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    """[L] int64 absolute event rows of the joined sequences, and which sequence each belongs to."""
    lengths = sequences.stop - sequences.first
    owner = np.repeat(np.arange(len(sequences)), lengths)
    return np.arange(len(owner)) + (sequences.first - np.cumsum(lengths) + lengths)[owner], owner


def gather(data: RankingData, sequences: Sequences, with_labels: bool = True,
           keep: np.ndarray | None = None) -> RankingBatch:  # fmt: skip
    """The batch of ``sequences``, on the CPU.

    keep: [K] int64, ascending. Places among their joined events that stay; None: all.
    """
    rows, owner = sequence_rows(sequences)
    if keep is not None:
        rows, owner = rows[keep], owner[keep]
    lengths = np.bincount(owner, minlength=len(sequences))
    columns = {"item_ids": data.store.item_ids, "timestamps": data.store.timestamps, **data.columns}
    events = {name: np.asarray(column[rows]) for name, column in columns.items()}
    return make_batch(data, sequences.users, lengths, rows, rows >= sequences.split[owner], events, with_labels)


def make_batch(data: RankingData, users: np.ndarray, lengths: np.ndarray, rows: np.ndarray, predicted: np.ndarray,
               events: dict[str, np.ndarray], with_labels: bool = True) -> RankingBatch:  # fmt: skip
    """The batch of events that were read, on the CPU.

    users: [S] int64; lengths: [S] int64; rows: [L] int64, as of :class:`RankingBatch`; predicted: [L] bool; events: [L]
    each, ``item_ids``, ``timestamps`` and the raw values of ``data.columns``.
    """
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    targets = np.flatnonzero(predicted)
    num_targets = np.diff(np.searchsorted(targets, offsets))
    item_ids, times = events["item_ids"].astype(np.int64), events["timestamps"]
    labels = {}
    if with_labels:
        asked = {name: events[name][targets] for name in data.columns}
        labels = {task: torch.from_numpy(data.label(task, rows[targets], asked)) for task in data.config.tasks}
    return RankingBatch(
        offsets=torch.from_numpy(offsets),
        item_ids=torch.from_numpy(item_ids),
        timestamps=torch.from_numpy(times),
        action_bits=torch.from_numpy(data.action_bits(rows, events).astype(np.float32)),
        num_targets=torch.from_numpy(num_targets),
        targets=torch.from_numpy(targets),
        labels=labels,
        rows=torch.from_numpy(rows[targets]),
        users=torch.from_numpy(users),
        item_features=make_features(*data.token_features(item_ids, times, data.event_values(rows, events))),
        user_features=make_features(*data.prefix_features(users)),
        max_len=int(lengths.max(initial=0)),
        max_targets=int(num_targets.max(initial=0)),
    )


def gather_share(data: RankingData, config: Config, sequences: Sequences, ranks: Ranks,
                 stays: np.ndarray | None = None) -> Share[RankingBatch]:  # fmt: skip
    """What one rank has of the batch of ``sequences``.

    stays: bool, for each of their joined events; None: all of them.
    """
    assert config.ranking is not None
    whole = sequences.stop - sequences.first
    lengths, counts = whole, sequences.stop - sequences.split
    if stays is not None:
        rows, owner = sequence_rows(sequences)
        lengths = np.bincount(owner, stays, len(sequences)).astype(np.int64)
        counts = np.bincount(owner, stays & (rows >= sequences.split[owner]), len(sequences)).astype(np.int64)
    tokens = token_counts(lengths, config.ranking.form == "fused", data.num_prefix)
    mine, work = ranks.divide(tokens)
    keep = None if stays is None else np.flatnonzero(stays[rows_of(whole, mine)])
    batch = gather(data, take(sequences, mine), keep=keep)
    if ranks.size > 1:
        batch = replace(
            batch, max_len=int(lengths.max()), max_targets=int(counts.max()),
            random_rows=torch.from_numpy(rows_of(tokens, mine)),
            random_targets=torch.from_numpy(rows_of(counts, mine)),
        )  # fmt: skip
    return Share(batch, int(counts.sum()), work)


def cut(config: Config, users: np.ndarray, starts: np.ndarray, begins: np.ndarray, ends: np.ndarray,
        phase_seed: int | None = None) -> Sequences:  # fmt: skip
    """The sequences in which the config's form predicts the events begins[u] .. ends[u] of each user."""
    fused, step = _cutting(config)
    phases = _phases(step, len(users), phase_seed)
    return (cut_fused if fused else cut_interleaved)(users, starts, begins, ends, config.model.max_len, step, phases)


def count_sequences(config: Config, lengths: np.ndarray, phase_seed: int) -> int:
    """How many sequences :func:`cut` makes of users all of whose events, ``lengths`` [U] int64, are predicted."""
    fused, step = _cutting(config)
    phases = _phases(step, len(lengths), phase_seed)
    return (count_fused if fused else count_interleaved)(lengths, config.model.max_len, step, phases)


def _cutting(config: Config) -> tuple[bool, int]:
    """Whether the form is fused, and how many events the sequences of a long user predict each."""
    ranking, max_len = config.ranking, config.model.max_len
    assert ranking is not None
    fused = ranking.form == "fused"
    return fused, ranking.targets if fused else min(ranking.stride or -(-max_len // 2), max_len)


def _phases(step: int, num_users: int, seed: int | None) -> np.ndarray | None:
    return None if seed is None else np.random.Generator(np.random.PCG64(seed)).integers(0, step, num_users)


@dataclass(frozen=True)
class EpochPlan:
    """The sequences of an epoch, shuffled, and how many of their events stay."""

    epoch: int
    sequences: Sequences
    lengths: np.ndarray
    """[S] int64. Events that stay."""
    kept: np.ndarray
    """[S] int64. Those of them that stochastic length chose."""
    bounds: np.ndarray
    """[steps+1] int64. Batch s is the sequences bounds[s] .. bounds[s+1]."""


class RankingBatches:
    """Training batches; ``batch(epoch, step)`` is a pure function of (seed, epoch, step).

    Every training event is predicted once an epoch. Where a user's events need several sequences, their cuts move
    from epoch to epoch. With ``run.stochastic_length`` long sequences keep some of their events, each with its action:
    in the interleaved form of all of them, so that a dropped event is not predicted in this epoch; in the fused form
    of the history only, so that all are.

    Args:
        data: what to train on.
        split: users' training events end at ``split.train_end``.
        config: form, lengths, batch size, seed.
    """

    def __init__(self, data: RankingData, split: Split, config: Config) -> None:
        self.data, self.config = data, config
        offsets = data.store.offsets
        self.users = np.flatnonzero(split.train_end > offsets[:-1]).astype(np.int64)
        if len(self.users) == 0:
            raise UserError(f"{data.store.path}: no event lies in the training part; take a later data.split_time")
        self.num_skipped = int(data.store.num_users - len(self.users))
        self.starts, self.ends = offsets[:-1][self.users], split.train_end[self.users]
        longest = min(config.model.max_len, int((self.ends - self.starts).max()))
        self.sampler = make_sampler(config.run.stochastic_length, longest, config.seed)
        self._epoch: EpochPlan | None = None
        self._lock = threading.Lock()

    def _enter(self, epoch: int) -> EpochPlan:
        with self._lock:
            if self._epoch is None or self._epoch.epoch != epoch:
                seed, run = self.config.seed, self.config.run
                phase = derive(seed, PHASE_SEED, epoch)
                whole = cut(self.config, self.users, self.starts, self.starts, self.ends, phase)
                order = np.random.Generator(np.random.PCG64(derive(seed, ORDER_SEED, epoch))).permutation(len(whole))
                sequences = take(whole, order)
                cuttable = self._cuttable(sequences)
                kept = cuttable if self.sampler is None else self.sampler.epoch_lengths(cuttable, epoch)
                lengths = sequences.stop - sequences.first - cuttable + kept
                bounds = cut_batches(lengths, run.batch_users, run.batch_tokens)
                self._epoch = EpochPlan(epoch, sequences, lengths, kept, bounds)
            return self._epoch

    def _cuttable(self, sequences: Sequences) -> np.ndarray:
        """[S] int64. How many events of each sequence stochastic length chooses from; they come first. The last event
        always stays, so that every sequence predicts something."""
        assert self.config.ranking is not None
        return (sequences.split if self.config.ranking.form == "fused" else sequences.stop - 1) - sequences.first

    def num_steps(self, epoch: int) -> int:
        """Batches in the epoch; it can differ between epochs."""
        return len(self._enter(epoch).bounds) - 1

    def batch(self, epoch: int, step: int) -> RankingBatch:
        """The whole batch."""
        return self.share(epoch, step, Ranks()).batch

    def share(self, epoch: int, step: int, ranks: Ranks) -> Share[RankingBatch]:
        """What one rank has of the batch: with one rank all of it."""
        plan = self._enter(epoch)
        part = slice(plan.bounds[step], plan.bounds[step + 1])
        sequences, kept = take(plan.sequences, part), plan.kept[part]
        if self.sampler is None:
            return gather_share(self.data, self.config, sequences, ranks)
        rows, owner = sequence_rows(sequences)
        cuttable = self._cuttable(sequences)
        dropped = rows < (sequences.first + cuttable)[owner]
        places = np.flatnonzero(dropped)
        times = np.asarray(self.data.store.timestamps[rows[places]]) if self.sampler.selection == "recency" else None
        dropped[places[self.sampler.positions(cuttable, kept, epoch, step, times)]] = False
        return gather_share(self.data, self.config, sequences, ranks, ~dropped)

    def savings(self, epoch: int, num_steps: int | None = None) -> dict[str, float]:
        """As of ``TrainBatches``."""
        if self.sampler is None:
            return {}
        plan = self._enter(epoch)
        stop = len(plan.lengths) if num_steps is None else plan.bounds[num_steps]
        return savings((plan.sequences.stop - plan.sequences.first)[:stop], plan.lengths[:stop])


class ProgressiveBatches:
    """One pass over all events in time order: step i holds the next ``ranking.batch_events`` of them.

    Events of one second stay in the order of the store. Each event is predicted once, from everything its user did
    before, whichever step that was in.
    """

    def __init__(self, data: RankingData, config: Config) -> None:
        alpha = config.run.stochastic_length.alpha
        if alpha is not None:
            raise UserError(f"run.stochastic_length.alpha={alpha}: expected null with ranking.mode=progressive")
        self.data, self.config = data, config
        store = data.store
        self.users = np.arange(store.num_users)
        self.num_skipped = 0
        self.order = np.argsort(np.asarray(store.timestamps), kind="stable")
        assert config.ranking is not None
        self.batch_events = config.ranking.batch_events
        if len(self.order) <= self.batch_events:
            raise UserError(
                f"ranking.batch_events={self.batch_events}: all {len(self.order)} events fit into one step, so nothing "
                "would be predicted by a trained model; take less"
            )

    def num_steps(self, epoch: int) -> int:
        """Batches of the pass."""
        return -(-len(self.order) // self.batch_events)

    def rows(self, step: int) -> np.ndarray:
        """Event rows of a step, int64, ascending."""
        return np.sort(self.order[step * self.batch_events : (step + 1) * self.batch_events])

    def batch(self, epoch: int, step: int) -> RankingBatch:
        """The whole batch."""
        return self.share(epoch, step, Ranks()).batch

    def share(self, epoch: int, step: int, ranks: Ranks) -> Share[RankingBatch]:
        """What one rank has of the batch: with one rank all of it."""
        return gather_share(self.data, self.config, target_sequences(self.data, self.config, self.rows(step)), ranks)

    def savings(self, epoch: int, num_steps: int | None = None) -> dict[str, float]:
        """As of ``TrainBatches``; nothing is cut here."""
        return {}


def take(sequences: Sequences, index: np.ndarray | slice) -> Sequences:
    """Some of the sequences, in the order of ``index``."""
    parts = sequences.users, sequences.first, sequences.split, sequences.stop
    return Sequences(*(part[index] for part in parts))


def target_sequences(data: RankingData, config: Config, rows: np.ndarray) -> Sequences:
    """Sequences that predict exactly the events ``rows`` (ascending), which follow each other within a user.

    Raises ValueError where a user's rows have gaps.
    """
    offsets = data.store.offsets
    owner = np.searchsorted(offsets, rows, side="right") - 1
    users, at, counts = np.unique(owner, return_index=True, return_counts=True)
    begins = rows[at]
    if np.any(rows[at + counts - 1] - begins + 1 != counts):
        raise ValueError("rows: expected events of each user that follow one another")
    return cut(config, users, offsets[users], begins, begins + counts)


def ranking_eval_batches(
    data: RankingData, config: Config, targets: Targets, world: World | None = None
) -> Iterator[RankingBatch]:
    """Batches that predict every target once, users in the order of ``targets``; of several ranks those of this one.

    All ranks get equally many, as a table that lies on several ranks needs them all; the last may be empty.
    """
    world = world or World()
    sequences = target_sequences(data, config, np.asarray(targets.rows))
    lengths = sequences.stop - sequences.first
    size = config.eval.batch_users
    bounds = cut_batches(lengths, size, size * 64)
    num_batches = len(bounds) - 1
    for index in range(world.rank, -(-num_batches // world.size) * world.size, world.size):
        start, stop = bounds[min(index, num_batches)], bounds[min(index + 1, num_batches)]
        yield gather(data, take(sequences, slice(start, min(stop, len(sequences)))))
