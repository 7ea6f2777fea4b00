"""Users in random order from a source that is read in sequence, through a buffer of bounded size. What is said of users
here holds for whatever a source gives, such as sequences of ranking.

The buffer holds ``K`` users. In each round it is filled from the source, shuffled, and half of it leaves; when the
source is at its end, all of it. Everybody leaves once an epoch. Random numbers are functions of (seed, epoch, round),
so who is in the buffer at a place of the epoch follows without a saved state: :meth:`ShuffleBuffer.seek` goes through
the rounds with *references* of users, and reads the events of those who are in it then.

Legend: n users, K users in the buffer, L events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from hstu.seeding import derive

BUFFER_SEED = 107
"""Purpose number of the seed that shuffles the buffer."""


@dataclass(frozen=True)
class Users:
    """Users with their events.

    refs: [n] int64, what the source knows them by. rows: [n] int64, what the batch calls them. lengths: [n] int64
    events. columns: [L] by name, joined. values: [n] by name, further numbers of each.
    """

    refs: np.ndarray
    rows: np.ndarray
    lengths: np.ndarray
    columns: dict[str, np.ndarray]
    values: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.refs)

    def take(self, chosen: np.ndarray) -> Users:
        """The users at the places ``chosen``, in that order."""
        starts = np.cumsum(self.lengths) - self.lengths
        events = joined_ranges(starts[chosen], self.lengths[chosen])
        columns = {name: column[events] for name, column in self.columns.items()}
        values = {name: value[chosen] for name, value in self.values.items()}
        return Users(self.refs[chosen], self.rows[chosen], self.lengths[chosen], columns, values)

    @staticmethod
    def concatenate(parts: Sequence[Users]) -> Users:
        if len(parts) == 1:
            return parts[0]
        columns = {name: np.concatenate([p.columns[name] for p in parts]) for name in parts[0].columns}
        values = {name: np.concatenate([p.values[name] for p in parts]) for name in parts[0].values}
        refs, rows, lengths = (np.concatenate([getattr(p, n) for p in parts]) for n in ("refs", "rows", "lengths"))
        return Users(refs, rows, lengths, columns, values)


def joined_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[sum of lengths] int64: starts[i] .. starts[i] + lengths[i], joined."""
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


def places_within(lengths: np.ndarray) -> np.ndarray:
    """[sum of lengths] int64: 0 .. lengths[i] of each, joined."""
    return joined_ranges(np.zeros_like(lengths), lengths)


class Source(Protocol):
    """Users in the sequence of an epoch."""

    def begin(self, epoch: int) -> int:
        """Starts an epoch; how many users it has."""

    def refs(self, start: int, stop: int) -> np.ndarray:
        """[n] int64 references of the users start .. stop of the sequence; reads nothing."""

    def fetch(self, refs: np.ndarray) -> Users:
        """Users by reference, in the order given; fast where they follow each other in the sequence."""


class ShuffleBuffer:
    """See the head of this file."""

    def __init__(self, source: Source, buffer_users: int, seed: int) -> None:
        """buffer_users: K."""
        self.source, self.buffer_users, self.seed = source, buffer_users, seed
        self.start(0)

    def start(self, epoch: int) -> None:
        """Goes to the beginning of an epoch."""
        self.epoch, self.round = epoch, -1
        self.num_users = self.source.begin(epoch)
        self._read = 0  # users of the sequence that have entered
        self._refs = np.empty(0, np.int64)  # in the buffer at the beginning of the round
        self._order = np.empty(0, np.int64)  # the round's permutation of them
        self._at = self._leaving = 0  # places of the permutation that have left, and that leave in this round
        self._users: Users | None = None

    def take(self, count: int) -> Users:
        """The next ``count`` users, fewer at the end of the epoch."""
        parts = []
        while count > 0:
            if self._at == self._leaving and not self._next_round(with_events=True):
                break
            places = self._order[self._at : min(self._at + count, self._leaving)]
            assert self._users is not None
            parts.append(self._users.take(places))
            self._at += len(places)
            count -= len(places)
        return Users.concatenate(parts) if parts else self.source.fetch(np.empty(0, np.int64))

    def seek(self, epoch: int, position: int) -> None:
        """Goes to the place where ``position`` users of the epoch have left. Reads the events of one buffer only."""
        self.start(epoch)
        while position > self._leaving - self._at:
            position -= self._leaving - self._at
            self._at = self._leaving
            if not self._next_round(with_events=False):
                return
        self._at += position
        self._users = self.source.fetch(self._refs)

    def _next_round(self, with_events: bool) -> bool:
        """Fills and shuffles the buffer; False at the end of the epoch."""
        staying = self._order[self._leaving :]
        stop = min(self.num_users, self._read + self.buffer_users - len(staying))
        if stop == self._read and len(staying) == 0:
            return False
        entering = self.source.refs(self._read, stop)
        if with_events:
            entered = [] if len(entering) == 0 else [self.source.fetch(entering)]
            kept = [] if self._users is None or len(staying) == 0 else [self._users.take(staying)]
            self._users = Users.concatenate([*kept, *entered])
        self._refs = np.concatenate([self._refs[staying], entering])
        self._read = stop
        self.round += 1
        self._shuffle()
        return True

    def _shuffle(self) -> None:
        seed = derive(self.seed, BUFFER_SEED, self.epoch, max(self.round, 0))
        self._order = np.random.Generator(np.random.PCG64(seed)).permutation(len(self._refs))
        at_end = self._read == self.num_users
        self._at, self._leaving = 0, len(self._refs) if at_end else -(-len(self._refs) // 2)
