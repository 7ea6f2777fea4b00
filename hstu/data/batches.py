"""Jagged batches, gathered from the store's columns without a loop over users.

Legend: U users, E events of the store, B users in the batch, L events in the batch.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from hstu.data.splits import Split, Targets
from hstu.data.store import SequenceStore
from hstu.errors import UserError
from hstu.seeding import derive

ORDER_SEED = 101
"""Purpose number of the seed that shuffles users."""
DEVICE_SHARE = 0.25
"""Columns move to the GPU when they take at most this share of its free memory."""
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

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``; the copy does not block where the memory is pinned."""
        moved: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            moved[f.name] = value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        return Batch(**moved)

    @property
    def num_events(self) -> int:
        return int(self.item_ids.shape[0])


class EventColumns:
    """The store's event columns as tensors: mapped from disk on the CPU, resident on a GPU when they fit."""

    def __init__(self, store: SequenceStore, device: torch.device | None = None, event_weights: str = "none") -> None:
        target = torch.device(device or "cpu")
        self.output_device = target
        if event_weights == "actions" and store.actions is None:
            raise UserError(f"loss.event_weights=actions: the store {store.path} has no actions; use none")
        self.weight_scale: float | None = None
        if event_weights == "actions":
            assert store.actions is not None
            mean = float(np.mean(store.actions, dtype=np.float64)) if len(store.actions) else 1.0
            if not np.isfinite(mean) or mean <= 0:
                raise UserError(f"loss.event_weights=actions: the mean action is {mean}, expected > 0; use none")
            self.weight_scale = 1.0 / mean
        columns = [store.item_ids, store.timestamps, store.actions]
        size = sum(c.nbytes for c in columns if c is not None)
        self.device = torch.device("cpu")
        if target.type == "cuda" and size <= DEVICE_SHARE * torch.cuda.mem_get_info(target)[0]:
            self.device = target
        self.item_ids, self.timestamps, self.actions = (self._tensor(c) for c in columns)

    def _tensor(self, column: np.ndarray | None) -> Tensor | None:
        if column is None:
            return None
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
        offsets_np = np.zeros(len(users) + 1, np.int64)
        np.cumsum(lengths, out=offsets_np[1:])
        offsets = torch.from_numpy(offsets_np).to(self.device)
        total = int(offsets_np[-1])
        shift = torch.from_numpy(first_rows - offsets_np[:-1]).to(self.device)
        counts = torch.from_numpy(lengths).to(self.device)
        rows = torch.arange(total, device=self.device)
        rows += torch.repeat_interleave(shift, counts, output_size=total)
        assert self.item_ids is not None and self.timestamps is not None
        items, times = self.item_ids, self.timestamps
        weights = actions = None
        if self.actions is not None:
            actions = self.actions[rows]
            if self.weight_scale is not None:
                weights = self.actions[rows + 1] * self.weight_scale
        batch = Batch(
            offsets=offsets,
            item_ids=items[rows].long(),
            timestamps=times[rows],
            request_times=times[rows + 1],
            labels=items[rows + 1].long(),
            users=torch.from_numpy(users).to(self.device),
            max_len=int(lengths.max()) if len(lengths) else 0,
            weights=weights,
            actions=actions,
        )
        return batch if self.output_device == self.device else batch.to(self.output_device)


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
    """

    def __init__(self, columns: EventColumns, store: SequenceStore, split: Split, max_len: int, seed: int,
                 batch_users: int, batch_tokens: int | None = None) -> None:  # fmt: skip
        counts = split.train_end - store.offsets[:-1]
        self.users = np.flatnonzero(counts >= 2).astype(np.int64)
        self.num_skipped = int(store.num_users - len(self.users))
        if len(self.users) == 0:
            raise UserError(f"{store.path}: no user has two training events; loosen the filters or the split")
        self.columns, self.seed = columns, seed
        self.lengths = np.minimum(counts[self.users] - 1, max_len).astype(np.int64)
        self.first_rows = (split.train_end[self.users] - 1 - self.lengths).astype(np.int64)
        self.batch_users, self.batch_tokens = batch_users, batch_tokens
        self._epoch: int | None = None
        self._order: np.ndarray = np.empty(0, np.int64)
        self._bounds: np.ndarray = np.empty(0, np.int64)
        self._lock = threading.Lock()

    def _enter(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            if self._epoch != epoch:
                generator = np.random.Generator(np.random.PCG64(derive(self.seed, ORDER_SEED, epoch)))
                self._order = generator.permutation(len(self.users))
                self._bounds = cut_batches(self.lengths[self._order], self.batch_users, self.batch_tokens)
                self._epoch = epoch
            return self._order, self._bounds

    def num_steps(self, epoch: int) -> int:
        """Batches in the epoch (with ``batch_tokens`` it can differ between epochs)."""
        return len(self._enter(epoch)[1]) - 1

    def batch(self, epoch: int, step: int) -> Batch:
        order, bounds = self._enter(epoch)
        chosen = order[bounds[step] : bounds[step + 1]]
        return self.columns.gather(self.users[chosen], self.first_rows[chosen], self.lengths[chosen])


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
    store: SequenceStore, targets: Targets, max_len: int, batch_users: int, columns: EventColumns | None = None
) -> Iterator[tuple[Batch, Tensor]]:
    """Batches of the last ``max_len`` events before each target, in the order of ``targets``.

    Yields:
        (batch, target items [B] int64); the last row of each user is labelled with the target and asked at its time.
    """
    columns = columns or EventColumns(store)
    for start in range(0, len(targets), batch_users):
        users = targets.users[start : start + batch_users]
        rows = targets.rows[start : start + batch_users]
        lengths = np.minimum(rows - store.offsets[users], max_len).astype(np.int64)
        batch = columns.gather(users, rows - lengths, lengths)
        yield batch, batch.labels[batch.offsets[1:] - 1]


class Prefetcher(Generic[T]):
    """Makes items in a thread, a few ahead, in order; an error there is raised here. Use as a context manager."""

    def __init__(self, make: Callable[[int], T], start: int, stop: int, ahead: int = 2) -> None:
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=ahead)
        self._stopping = threading.Event()
        self._range = range(start, stop)
        self._thread = threading.Thread(target=self._run, args=(make,), daemon=True)
        self._thread.start()

    def _run(self, make: Callable[[int], T]) -> None:
        try:
            for index in self._range:
                if self._stopping.is_set() or not self._put((make(index), None)):
                    return
        except BaseException as error:
            self._put((None, error))

    def _put(self, entry: tuple[T | None, BaseException | None]) -> bool:
        while not self._stopping.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[T]:
        for _ in self._range:
            item, error = self._queue.get()
            if error is not None:
                raise error
            yield item  # type: ignore[misc]

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
