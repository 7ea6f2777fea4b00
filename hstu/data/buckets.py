"""Events on disk in buckets of whole users, so that sorting and filtering never need the whole log in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

BUCKET_EVENTS = 1 << 22

Events = dict[str, np.ndarray]
"""Columns of equal length: ``user`` and ``item`` int32 codes, ``time`` and ``row`` int64, further columns."""


class Buckets:
    """Bucket b holds the events of users edges[b] .. edges[b+1], in order of arrival."""

    def __init__(
        self, folder: Path, user_counts: np.ndarray, dtypes: dict[str, type], bucket_events: int = BUCKET_EVENTS
    ) -> None:
        """user_counts: [U] events of each user, an upper bound. dtypes: of every column. bucket_events: about so many
        events are held at once; a user with more is a bucket alone."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.dtypes = dtypes
        ends = np.cumsum(user_counts)
        total = int(ends[-1]) if len(ends) else 0
        cuts = np.searchsorted(ends, np.arange(bucket_events, total, bucket_events)) + 1
        self.edges = np.unique(np.concatenate([[0], cuts, [len(user_counts)]]))

    @classmethod
    def reopen(cls, folder: Path, edges: np.ndarray, dtypes: dict[str, type]) -> Buckets:
        """Those that another process has filled, with its ``edges``."""
        found = cls(folder, np.empty(0, np.int64), dtypes)
        found.edges = edges
        return found

    def __len__(self) -> int:
        return max(0, len(self.edges) - 1)

    def append(self, events: Events) -> None:
        if len(self) == 1:
            self._write(0, events, "ab")
            return
        bucket = (np.searchsorted(self.edges, events["user"], side="right") - 1).astype(np.uint16)
        order = np.argsort(bucket, kind="stable")
        bounds = np.searchsorted(bucket[order], np.arange(len(self) + 1))
        for b in np.flatnonzero(np.diff(bounds)):
            chosen = order[bounds[b] : bounds[b + 1]]
            self._write(int(b), {name: column[chosen] for name, column in events.items()}, "ab")

    def replace(self, b: int, events: Events) -> None:
        self._write(b, events, "wb")

    def _write(self, b: int, events: Events, mode: str) -> None:
        for name, dtype in self.dtypes.items():
            with open(self._path(b, name), mode) as file:
                column: np.ndarray = np.ascontiguousarray(events[name], dtype)
                file.write(column.view(np.uint8).data if column.size else b"")

    def _path(self, b: int, name: str) -> Path:
        return self.folder / f"{b:05d}.{name}"

    def read(self, b: int, names: tuple[str, ...] | None = None) -> Events:
        """The columns ``names`` (default: all) of bucket b."""
        found: Events = {}
        for name in names or tuple(self.dtypes):
            path = self._path(b, name)
            found[name] = np.fromfile(path, self.dtypes[name]) if path.exists() else np.zeros(0, self.dtypes[name])
        return found

    def remove(self, b: int) -> None:
        for name in self.dtypes:
            self._path(b, name).unlink(missing_ok=True)

    def scan(self, *names: str) -> Iterator[tuple[int, Events]]:
        for b in range(len(self)):
            yield b, self.read(b, names or None)
