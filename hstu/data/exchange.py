"""Users of a step from the ranks that read them to those that train on them.

Every rank reads users of its own shards. First all ranks learn who is in the step: row, length and further numbers of
each, not the events. Then every rank knows who goes where, and the events travel in one exchange.

Legend: S shards, G users of a batch of all ranks, n of them read by this rank, R ranks, L events.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from hstu.data.shuffle_buffer import Users

if TYPE_CHECKING:
    from hstu.distributed import World


class Exchange:
    """Between the ranks of ``world``, which call its methods in the same order: on the CPU, in a group of its own, so
    that the thread which makes batches may while another trains."""

    def __init__(self, owners: np.ndarray, columns: dict[str, np.dtype], world: World, timeout_s: float) -> None:
        """owners: [S] int64, the rank that reads each shard. columns: of an event, with their types on all ranks."""
        self.owners, self.columns, self.world = owners, columns, world
        if world.size > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def close(self) -> None:
        """Frees the group, of which every training of a process has one."""
        if self.world.size > 1:
            dist.destroy_process_group(self.group)

    def everyone(self, own: Users, counts: np.ndarray) -> Users:
        """The G users of all shards, shard by shard, without their events.

        own: [n] the users that this rank has read, shard by shard. counts: [S] how many each shard gives.
        """
        if self.world.size == 1:
            return own
        self.world.load()
        readers = np.repeat(self.owners, counts)
        table = np.stack([own.rows, own.lengths, *own.values.values()])
        longest = int(np.bincount(readers, minlength=self.world.size).max())
        padded = torch.zeros(len(table), longest, dtype=torch.int64)
        padded[:, : len(own)] = torch.from_numpy(table)
        parts = [torch.empty_like(padded) for _ in range(self.world.size)]
        dist.all_gather(parts, padded, group=self.group)
        found = np.empty((len(table), len(readers)), np.int64)
        for rank, part in enumerate(parts):
            here = np.flatnonzero(readers == rank)
            found[:, here] = part[:, : len(here)].numpy()
        rows, lengths, *values = found
        return Users(rows, rows, lengths, {}, dict(zip(own.values, values, strict=True)))

    def deliver(self, own: Users, users: Users, counts: np.ndarray, owners: np.ndarray) -> Users:
        """Of the G ``users`` that :meth:`everyone` gave for ``own`` and ``counts``, those with this rank as owner, with
        their events. owners: [G] the rank that trains on each.
        """
        if self.world.size == 1:
            return own
        readers, rank = np.repeat(self.owners, counts), self.world.rank
        event_bytes = sum(dtype.itemsize for dtype in self.columns.values())
        events = np.zeros((2, self.world.size), np.int64)  # that go to every rank, that come from it
        np.add.at(events[0], owners[readers == rank], users.lengths[readers == rank])
        np.add.at(events[1], readers[owners == rank], users.lengths[owners == rank])
        leaving, coming = (events * event_bytes).tolist()
        sent = torch.from_numpy(np.concatenate([np.empty(0, np.uint8), *self._pack(own, owners[readers == rank])]))
        received = torch.empty(sum(coming), dtype=torch.uint8)
        dist.all_to_all_single(received, sent, coming, leaving, group=self.group)
        mine = np.flatnonzero(owners == rank)
        arrived = mine[np.argsort(readers[mine], kind="stable")]  # rank by rank, of each as it has read them
        columns = self._unpack(received.numpy(), events[1])
        values = {name: value[arrived] for name, value in users.values.items()}
        there = Users(arrived, users.rows[arrived], users.lengths[arrived], columns, values)
        return there.take(np.argsort(arrived))

    def _pack(self, own: Users, owners: np.ndarray) -> list[np.ndarray]:
        """Bytes of the columns of ``own``, rank by rank; owners: [n]."""
        goes = [own.take(np.flatnonzero(owners == rank)).columns for rank in range(self.world.size)]
        return [
            np.ascontiguousarray(columns[name], dtype).view(np.uint8)
            for columns in goes
            for name, dtype in self.columns.items()
        ]

    def _unpack(self, received: np.ndarray, events: np.ndarray) -> dict[str, np.ndarray]:
        """Columns of the events that came from every rank; events: [R]."""
        parts: dict[str, list[np.ndarray]] = {name: [] for name in self.columns}
        start = 0
        for count in events.tolist():
            for name, dtype in self.columns.items():
                stop = start + count * dtype.itemsize
                parts[name].append(received[start:stop].copy().view(dtype))
                start = stop
        return {name: np.concatenate(column) for name, column in parts.items()}
