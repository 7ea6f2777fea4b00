"""Users of one shard, or sequences of them, read from front to back; the sources of ``hstu/data/shard_stream.py``.

A shard is read in pieces, which come in an order of the epoch. Legend: n users or sequences.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from hstu.data.sharded_store import ShardedStore
from hstu.data.shuffle_buffer import Users, joined_ranges
from hstu.data.splits import training_ends
from hstu.errors import UserError
from hstu.seeding import derive

if TYPE_CHECKING:
    from hstu.data.store import SequenceStore

SHARD_SEED = 106
"""Purpose number of the seed that orders the pieces of a shard."""
PIECE_USERS = 1 << 14
"""Users of a shard that are read in sequence; pieces come in an order of the epoch."""
_PIECE_BITS = 40
"""A reference is the piece above the place among the piece's training users."""
_READ_BYTES = 1 << 25
"""Of a column, read at once; a longer single user is read whole."""


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
            piece = 0 if self._table is None else self._table[0]  # not another one in place of the one that is kept
            return self._fetch_from(self._load_table(piece), refs, places)
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
            self._table = piece, self._epoch, self.make_table(pieces(self.shard)[piece], piece, self._epoch)
        return self._table[2]


def training_lengths(shard: SequenceStore, selection: str, time: int | None) -> np.ndarray:
    """int32, training events of each user. selection, time: as of :func:`hstu.data.splits.training_ends`."""
    return (training_ends(shard, selection, time) - np.asarray(shard.offsets)[:-1]).astype(np.int32)


def pieces(shard: SequenceStore) -> list[slice]:
    """The users of each piece of a shard; of one without users an empty piece."""
    starts = range(0, max(1, shard.num_users), PIECE_USERS)
    return [slice(start, min(start + PIECE_USERS, shard.num_users)) for start in starts]


def count_by_piece(counts: np.ndarray) -> np.ndarray:
    """int64, the sum over each piece of what every user of a shard has; one empty piece of a shard without users."""
    if len(counts) == 0:
        return np.zeros(1, np.int64)
    return np.add.reduceat(counts, np.arange(0, len(counts), PIECE_USERS), dtype=np.int64)


def _read_in_sequence(column: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Rows of users that follow each other, through plain reads from front to back: nothing stays mapped."""
    ends, parts, first = starts + lengths, [], 0
    most = max(1, _READ_BYTES // column.dtype.itemsize)
    while first < len(starts):
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + most, side="right")))
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
    try:
        found = np.fromfile(column.filename, column.dtype, stop - start, offset=offset)
    except OSError as error:
        raise UserError(f"{column.filename} cannot be read ({error.strerror}): prepare the data again") from None
    if len(found) < stop - start:
        raise UserError(f"{column.filename} ends before row {stop}: it has been cut; prepare the data again")
    return found


def _read_by_row(column: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return np.asarray(column[joined_ranges(starts, lengths)])
