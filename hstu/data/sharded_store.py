"""A store in shards: folders that are stores of their own, and one view of them all.

``SequenceStore.open`` on the top folder gives a :class:`ShardedStore`: the users of shard 0, then those of shard 1 and
so on, under one numbering of users and event rows, so that everything that reads a store reads it. Columns are gathered
from the shard that holds a row. numpy only; docs/data.md describes the format.

Legend: S shards, U users, E events.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np

from hstu.data.splits import make_split, resolve_split_time
from hstu.data.store import SCHEMA_VERSION, SequenceStore, StoreWriter, map_column, write_meta
from hstu.errors import UserError

HASH_RULE = "hstu.data.hashing.hash_ids modulo the number of shards"


class JoinedColumn:
    """One column of events or users over all shards, [E] or [U]. Takes integers, slices, and arrays of rows or of
    booleans as an index."""

    def __init__(self, parts: list[np.ndarray]) -> None:
        """parts: the column of each shard; all of one dtype, but for the width of texts."""
        self.parts = parts
        self.dtype = reduce(np.promote_types, {part.dtype for part in parts})
        self._ends = np.cumsum([len(p) for p in parts])
        self.shape = (int(self._ends[-1]),)
        self.nbytes = self.shape[0] * self.dtype.itemsize
        self.ndim = 1

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            found = self._between(start, stop) if step == 1 else self.take(np.arange(start, stop, step))
            return found
        rows = np.asarray(index)
        if rows.dtype == bool:
            rows = np.flatnonzero(rows)
        return self.take(np.where(rows < 0, rows + len(self), rows))[()]

    def _between(self, start: int, stop: int) -> np.ndarray:
        """Rows start .. stop; a mapped view where one shard holds them all."""
        pieces = []
        for part, end in zip(self.parts, self._ends.tolist(), strict=True):
            begin = end - len(part)
            if start < end and stop > begin:
                pieces.append(part[max(start - begin, 0) : min(stop, end) - begin])
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Values at ``rows``, integers 0..E-1 of any shape."""
        shards = np.searchsorted(self._ends, rows, side="right")
        found = np.empty(rows.shape, self.dtype)
        for s in np.unique(shards).tolist():
            if s >= len(self.parts):
                raise IndexError(f"row {int(np.max(rows))} of a column with {len(self)} rows")
            part = self.parts[s]
            here = shards == s
            found[here] = part[rows[here] - (self._ends[s] - len(part))]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All rows in memory."""
        found = self._between(0, len(self))
        return found if dtype is None else found.astype(dtype)


class ShardedStore(SequenceStore):
    """All shards as one store; see the head of this file.

    Attributes beyond those of a store:
        shards: the folders as stores, in order.
        first_users: [S+1] int64; shard s holds users first_users[s] .. first_users[s+1].
        first_rows: [S+1] int64; likewise of event rows.
    """

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path, self.meta = path, meta
        self.shards = [SequenceStore.open(path / entry["folder"]) for entry in meta["shards"]]
        for shard, entry in zip(self.shards, meta["shards"], strict=True):
            if shard.meta.get("split_hash") != entry["split_hash"]:
                raise UserError(
                    f"{shard.path} holds split {shard.meta.get('split_hash')}, {path / 'meta.json'} says "
                    f"{entry['split_hash']}: shards of two preparations are mixed; prepare again"
                )
        self.first_users = _starts([s.num_users for s in self.shards])
        self.first_rows = _starts([s.num_events for s in self.shards])
        self.num_users, self.num_events = int(self.first_users[-1]), int(self.first_rows[-1])
        self.num_items = int(meta["counts"]["items"])
        self.offsets = np.empty(self.num_users + 1, np.int64)
        self.offsets[-1] = self.num_events
        for s, shard in enumerate(self.shards):
            self.offsets[self.first_users[s] : self.first_users[s + 1]] = shard.offsets[:-1] + self.first_rows[s]
            shard.offsets = map_column(shard.path / "offsets.npy")  # not held twice
        self.item_ids: Any = JoinedColumn([s.item_ids for s in self.shards])
        self.timestamps: Any = JoinedColumn([s.timestamps for s in self.shards])
        actions = [s.actions for s in self.shards if s.actions is not None]
        self.actions: Any = JoinedColumn(actions) if actions else None
        names = self.shards[0].columns
        self.columns: Any = {name: JoinedColumn([s.columns[name] for s in self.shards]) for name in names}

    def user_attribute(self, name: str) -> Any:
        parts = [part for s in self.shards if (part := s.user_attribute(name)) is not None]
        return JoinedColumn(parts) if parts else None

    @cached_property
    def user_raw_ids(self) -> np.ndarray:
        """[U] int64 or unicode, in memory: of shard 0, then of shard 1 and so on; ascending within a shard."""
        return np.concatenate([s.user_raw_ids for s in self.shards])

    def rows_of_shard(self, shard: int) -> slice:
        """Event rows of one shard."""
        return slice(int(self.first_rows[shard]), int(self.first_rows[shard + 1]))


def _starts(counts: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def assign_shards(num_events: list[int], num_ranks: int) -> list[list[int]]:
    """Which shards each rank reads: all of them once, with about the same number of events.

    The largest shard first, each to the rank with the fewest events so far (ties: fewer shards, then the lower rank).
    Raises UserError where a rank would have none.
    """
    if len(num_events) < num_ranks:
        raise UserError(
            f"{num_ranks} ranks and {len(num_events)} shards: every rank needs one; prepare again with "
            f"data.shards={num_ranks} or more, or use fewer ranks"
        )
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    for shard in sorted(range(len(num_events)), key=lambda s: (-num_events[s], s)):
        rank = min(range(num_ranks), key=lambda r: (load[r], len(ranks[r]), r))
        ranks[rank].append(shard)
        load[rank] += num_events[shard]
    return [sorted(shards) for shards in ranks]


# Writing


def shard_folder(folder: Path, number: int) -> Path:
    return folder / "shards" / f"{number:05d}"


def share_folder(source: Path, target: Path) -> None:
    """The files of ``source`` in ``target`` too: links to the same bytes, copies where the disk has no links."""
    if not source.is_dir():
        return
    target.mkdir(parents=True)
    for file in source.iterdir():
        try:
            os.link(file, target / file.name)
        except OSError:
            shutil.copyfile(file, target / file.name)


def finish_shards(writer: StoreWriter, num_shards: int, meta: dict[str, Any]) -> None:
    """Writes the ``meta.json`` of every shard and of the whole.

    meta: as of :meth:`StoreWriter.finish`. A split time that is a quantile is resolved over all shards, because a shard
    has another one of its own.
    """
    folders = [shard_folder(writer.folder, n) for n in range(num_shards)]
    split = dict(meta["split"])
    if split["kind"] == "global-time":
        times = JoinedColumn([map_column(folder / "timestamps.npy") for folder in folders])
        split["time"] = resolve_split_time(split["time"], times)
    entries = []
    for number, folder in enumerate(folders):
        own: dict[str, Any] = {key: meta[key] for key in ("name", "source", "protocol", "protocol_seed") if key in meta}
        own |= {"split": split, "counts": {"items": meta["counts"]["items"]}}
        own["shard"] = {"number": number, "of": num_shards}
        done = StoreWriter(folder).finish(own)
        entries.append(
            {
                "folder": folder.relative_to(writer.folder).as_posix(),
                "users": done["counts"]["users"],
                "events": done["counts"]["events"],
                "split_hash": done["split_hash"],
            }
        )
    hashes = [entry["split_hash"] for entry in entries]
    whole = {
        "schema_version": SCHEMA_VERSION,
        **meta,
        "split": split,
        "split_asked": meta["split"],
        "shards": entries,
        "shard_rule": HASH_RULE,
        "split_hash": hashlib.sha256(json.dumps([split, hashes], sort_keys=True).encode()).hexdigest()[:16],
    }
    whole["counts"] = {
        **meta["counts"],
        "users": sum(e["users"] for e in entries),
        "events": sum(e["events"] for e in entries),
    }
    if split["kind"] == "global-time":
        make_split(ShardedStore(writer.folder, whole), "reference")  # raises where nobody is held out
    work = writer.work.rename(writer.folder / ".done")  # killed halfway through it, no mark is found without its files
    shutil.rmtree(work)
    write_meta(writer.folder, whole)
