"""Jagged batches, gathered from the store's columns without a loop over users.

Legend: U users, E events of the store, B users in the batch, L events in the batch.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from hstu.config import StochasticLengthConfig
from hstu.data.predicted import Predicted
from hstu.data.random_rows import rows_of
from hstu.data.sharded_store import JoinedColumn
from hstu.data.share import Ranks, Share
from hstu.data.splits import Split, Targets
from hstu.data.stochastic_length import make_sampler, savings
from hstu.data.store import SequenceStore
from hstu.distributed import same_gpu
from hstu.errors import UserError
from hstu.seeding import derive
from hstu.transfer import to_device

ORDER_SEED = 101
"""Purpose number of the seed that shuffles users."""
DEVICE_SHARE = 0.25
"""Columns move to the GPU when they take at most this share of its free memory."""
_CHUNK_ROWS = 1 << 22
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Input events of B users with the event that follows each.

    Attributes:
        offsets: [B+1] int64.
        item_ids: [L] int64, 1..num_items.
        timestamps: [L] int64, s.
        request_times: [L] int64, s. Time of the event to predict.
        labels: [L] int64. The next item.
        users: [B] int64. User rows of the store.
        max_len: longest user of the batch.
        weights: [L] float32 or None. Weight of each position in the loss.
        actions: [L] float32 or None. Action value of each input event.
        random_rows: [L] int64 or None. Where each event stands in the batch of all ranks, by which random numbers are
            drawn; None: 0..L-1.
        counted: [n] int64, ascending. Positions that the loss scores; None: all. The others are only read.
    """

    offsets: Tensor
    item_ids: Tensor
    timestamps: Tensor
    request_times: Tensor
    labels: Tensor
    users: Tensor
    max_len: int
    weights: Tensor | None = None
    actions: Tensor | None = None
    random_rows: Tensor | None = None
    counted: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``; a GPU is not waited for."""
        moved: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            moved[f.name] = to_device(value, device) if isinstance(value, Tensor) else value
        return Batch(**moved)

    @property
    def num_events(self) -> int:
        return int(self.item_ids.shape[0])

    @property
    def predicted_items(self) -> Tensor:
        """[n] int64. Labels of the positions that count."""
        return self.predicted().labels

    def predicted(self) -> Predicted:
        """What the loss scores."""
        every = Predicted(self.labels, self.labels, self.weights, self.random_rows)
        return every if self.counted is None else every.at(self.counted)


class JoinedRows:
    """A column of a sharded store; gives the rows that are asked for as a tensor."""

    def __init__(self, column: JoinedColumn) -> None:
        self.column = column

    def __getitem__(self, rows: Tensor) -> Tensor:
        return torch.from_numpy(self.column.take(rows.numpy()))


class EventColumns:
    """The store's event columns as tensors: mapped from disk on the CPU, resident on a GPU when they fit."""

    def __init__(self, store: SequenceStore, device: torch.device | None = None, event_weights: str = "none") -> None:
        target = torch.device(device or "cpu")
        self.output_device = target
        self.weight_scale, self.has_zero_weights = weighting(store, event_weights)
        columns = [store.item_ids, store.timestamps, store.actions]
        size = sum(c.nbytes for c in columns if c is not None)
        self.device = torch.device("cpu")
        if target.type == "cuda" and size <= DEVICE_SHARE * torch.cuda.mem_get_info(target)[0]:
            self.device = target
        self.item_ids, self.timestamps, self.actions = (self._tensor(c) for c in columns)

    def _tensor(self, column: Any) -> Any:
        if column is None:
            return None
        if self.device.type == "cpu" and isinstance(column, JoinedColumn):
            return JoinedRows(column)
        if self.device.type == "cpu":
            import warnings

            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*not writable.*")
                return torch.from_numpy(column)
        return torch.from_numpy(np.array(column)).to(self.device)

    def gather(self, users: np.ndarray, first_rows: np.ndarray, lengths: np.ndarray) -> Batch:
        """The batch whose user b has the input rows first_rows[b] .. + lengths[b] and one label after each.

        Args:
            users, first_rows, lengths: [B] int64.
        """
        shift = to_device(torch.from_numpy(first_rows - np.cumsum(lengths) + lengths), self.device)
        total = int(lengths.sum())
        rows = torch.arange(total, device=self.device)
        rows += torch.repeat_interleave(shift, to_device(torch.from_numpy(lengths), self.device), output_size=total)
        return self.gather_rows(users, rows, lengths)

    def gather_rows(self, users: np.ndarray, rows: Tensor, lengths: np.ndarray) -> Batch:
        """The batch whose users' input rows are joined in ``rows``; the label is the event after each in the log.

        Args:
            users, lengths: [B] int64. rows: [L] int64, absolute event rows of the store.
        """
        offsets_np = np.zeros(len(users) + 1, np.int64)
        np.cumsum(lengths, out=offsets_np[1:])
        offsets = to_device(torch.from_numpy(offsets_np), self.device)
        rows = to_device(rows, self.device)
        assert self.item_ids is not None and self.timestamps is not None
        items, times = self.item_ids, self.timestamps
        weights = actions = counted = None
        if self.actions is not None:
            actions = self.actions[rows]
            if self.weight_scale is not None:
                weights = self.actions[rows + 1] * self.weight_scale
                if self.has_zero_weights:  # only whoever makes batches waits for the device, where they are made on one
                    counted = weights.nonzero()[:, 0]
        batch = Batch(
            offsets=offsets,
            item_ids=items[rows].long(),
            timestamps=times[rows],
            request_times=times[rows + 1],
            labels=items[rows + 1].long(),
            users=to_device(torch.from_numpy(users), self.device),
            max_len=int(lengths.max()) if len(lengths) else 0,
            weights=weights,
            actions=actions,
            counted=counted,
        )
        return batch if self.output_device == self.device else batch.to(self.output_device)


def weighting(store: SequenceStore, event_weights: str) -> tuple[float | None, bool]:
    """What actions are multiplied with to have mean 1 as weights (None: events weigh alike), and whether some are 0."""
    if event_weights == "none":
        return None, False
    if store.actions is None:
        raise UserError(f"loss.event_weights=actions: the store {store.path} has no actions; use none")
    total, num_zero = 0.0, 0
    for start in range(0, store.num_events, _CHUNK_ROWS):
        actions = np.asarray(store.actions[start : start + _CHUNK_ROWS])
        total += float(np.sum(actions, dtype=np.float64))
        num_zero += len(actions) - int(np.count_nonzero(actions))
    mean = total / store.num_events if store.num_events else 1.0
    if not np.isfinite(mean) or mean <= 0:
        raise UserError(f"loss.event_weights=actions: the mean action is {mean}, expected > 0; use none")
    return 1.0 / mean, num_zero > 0


@dataclass(frozen=True)
class EpochPlan:
    """Who is in which batch of an epoch, and how long."""

    epoch: int
    order: np.ndarray
    """[U] int64. Indices of the training users, shuffled."""
    kept: np.ndarray
    """[U] int64. Input events of each training user (not shuffled)."""
    bounds: np.ndarray
    """[steps+1] int64. Batch s is order[bounds[s]:bounds[s+1]]."""


class TrainBatches:
    """Training batches; ``batch(epoch, step)`` is a pure function of (seed, epoch, step).

    A user's input is the last ``max_len`` training events but the very last, each labelled with the event
    after it. Users with fewer than two training events have nothing to predict and are left out
    (``num_skipped`` says how many).

    Args:
        columns: event columns of the store.
        store, split: what to train on.
        max_len: most recent input events per user.
        seed: of the shuffling.
        batch_users: users per batch, or
        batch_tokens: most input events per batch; a longer single user stands alone.
        stochastic_length: cuts long inputs to some of their events. A kept event is still labelled with the event
            that follows it in the log, dropped or not: evaluation asks for the very next event, so what is left of
            the input must not change what is asked. ``batch_tokens`` counts what is left.
    """

    def __init__(self, columns: EventColumns, store: SequenceStore, split: Split, max_len: int, seed: int,
                 batch_users: int, batch_tokens: int | None = None,
                 stochastic_length: StochasticLengthConfig | None = None) -> None:  # fmt: skip
        counts = split.train_end - store.offsets[:-1]
        self.users = np.flatnonzero(counts >= 2).astype(np.int64)
        self.num_skipped = int(store.num_users - len(self.users))
        if len(self.users) == 0:
            raise UserError(f"{store.path}: no user has two training events; loosen the filters or the split")
        self.columns, self.seed = columns, seed
        self.lengths = np.minimum(counts[self.users] - 1, max_len).astype(np.int64)
        self.first_rows = (split.train_end[self.users] - 1 - self.lengths).astype(np.int64)
        self.batch_users, self.batch_tokens = batch_users, batch_tokens
        self.sampler = make_sampler(stochastic_length, int(self.lengths.max()), seed)
        self._timestamps = store.timestamps
        self._epoch: EpochPlan | None = None
        self._lock = threading.Lock()

    def _enter(self, epoch: int) -> EpochPlan:
        with self._lock:
            if self._epoch is None or self._epoch.epoch != epoch:
                generator = np.random.Generator(np.random.PCG64(derive(self.seed, ORDER_SEED, epoch)))
                order = generator.permutation(len(self.users))
                kept = self.lengths if self.sampler is None else self.sampler.epoch_lengths(self.lengths, epoch)
                bounds = cut_batches(kept[order], self.batch_users, self.batch_tokens)
                self._epoch = EpochPlan(epoch, order, kept, bounds)
            return self._epoch

    def num_steps(self, epoch: int) -> int:
        """Batches in the epoch (with ``batch_tokens`` it can differ between epochs)."""
        return len(self._enter(epoch).bounds) - 1

    def batch(self, epoch: int, step: int) -> Batch:
        """The whole batch."""
        return self.share(epoch, step, Ranks()).batch

    def share(self, epoch: int, step: int, ranks: Ranks) -> Share[Batch]:
        """What one rank has of the batch: with one rank all of it."""
        plan = self._enter(epoch)
        chosen = plan.order[plan.bounds[step] : plan.bounds[step + 1]]
        users, first_rows, lengths, kept = (c[chosen] for c in (self.users, self.first_rows, self.lengths, plan.kept))
        mine, work = ranks.divide(kept)
        if self.sampler is None:
            batch = self.columns.gather(users[mine], first_rows[mine], lengths[mine])
        else:  # what stays is drawn for the batch of all ranks
            rows = np.arange(int(lengths.sum())) + np.repeat(first_rows - np.cumsum(lengths) + lengths, lengths)
            times = self._timestamps[rows] if self.sampler.selection == "recency" else None
            rows = rows[self.sampler.positions(lengths, kept, epoch, step, times)]
            own = torch.from_numpy(rows[rows_of(kept, mine)])
            batch = self.columns.gather_rows(users[mine], own, kept[mine])
        if ranks.size > 1:
            places = to_device(torch.from_numpy(rows_of(kept, mine)), batch.item_ids.device)
            batch = replace(batch, random_rows=places, max_len=int(kept.max()))
        return Share(batch, int(kept.sum()), work)

    def savings(self, epoch: int, num_steps: int | None = None) -> dict[str, float]:
        """``tokens_dropped`` and ``attention_work_saved`` by stochastic length in the epoch's first ``num_steps``
        batches (None: all), as shares; empty where it is off."""
        if self.sampler is None:
            return {}
        plan = self._enter(epoch)
        chosen = plan.order if num_steps is None else plan.order[: plan.bounds[num_steps]]
        return savings(self.lengths[chosen], plan.kept[chosen])


def cut_batches(lengths: np.ndarray, batch_users: int, batch_tokens: int | None) -> np.ndarray:
    """Bounds int64 [batches+1] of consecutive batches of ``batch_users`` sequences, or of at most ``batch_tokens``
    events (a longer single sequence stands alone). lengths: [sequences] int64."""
    if batch_tokens is None:
        return np.append(np.arange(0, len(lengths), batch_users), len(lengths))
    ends = np.cumsum(lengths)
    bounds = [0]
    while bounds[-1] < len(lengths):
        start = bounds[-1]
        used = ends[start - 1] if start else 0
        stop = int(np.searchsorted(ends, used + batch_tokens, side="right"))
        bounds.append(max(stop, start + 1))
    return np.array(bounds, np.int64)


def eval_batches(
    store: SequenceStore, targets: Targets, max_len: int, batch_users: int, columns: EventColumns | None = None,
    least: int = 0,
) -> Iterator[tuple[Batch, Tensor]]:  # fmt: skip
    """Batches of the last ``max_len`` events before each target, in the order of ``targets``.

    least: so many batches at least; those beyond the targets are empty.

    Yields:
        (batch, target items [B] int64); the last row of each user is labelled with the target and asked at its time.
    """
    columns = columns or EventColumns(store)
    for start in range(0, max(len(targets), least * batch_users), batch_users):
        users = targets.users[start : start + batch_users]
        rows = targets.rows[start : start + batch_users]
        lengths = np.minimum(rows - store.offsets[users], max_len).astype(np.int64)
        batch = columns.gather(users, rows - lengths, lengths)
        yield batch, batch.labels[batch.offsets[1:] - 1]


class Prefetcher(Generic[T]):
    """Makes items in a thread, a few ahead, in order; an error there is raised here. Use as a context manager.

    together: making one is an exchange between ranks. Those that leave early, all after the same item, then still make
    as many as any of them may have begun, so that none waits for a rank that has stopped.
    """

    def __init__(self, make: Callable[[int], T], start: int, stop: int, ahead: int = 2, together: bool = False) -> None:
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=ahead)
        self._stopping = threading.Event()
        self._range = range(start, stop)
        self._taken, self._beyond = 0, ahead + 1 if together else 0
        self._thread = threading.Thread(target=self._run, args=(make, same_gpu()), daemon=True)
        self._thread.start()

    def _run(self, make: Callable[[int], T], begin: Callable[[], None]) -> None:
        try:
            begin()
            for number, index in enumerate(self._range):
                if self._stopping.is_set() and number >= self._taken + self._beyond:
                    return
                self._put((make(index), None))
        except BaseException as error:
            self._put((None, error))

    def _put(self, entry: tuple[T | None, BaseException | None]) -> None:
        while not self._stopping.is_set():
            try:
                return self._queue.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[T]:
        for _ in self._range:
            item, error = self._queue.get()
            if error is not None:
                raise error
            self._taken += 1
            yield item  # type: ignore[misc]

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
