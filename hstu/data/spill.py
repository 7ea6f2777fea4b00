"""Checked rows on disk in parts by the hash of their user, and counts of ids gathered piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from hstu.data.hashing import hash_texts, shards_of
from hstu.data.tables import num_part_rows, raise_if_disk_full

CHUNK_ROWS = 1 << 18
"""Rows that are worked on at once."""
_MIN_COMPACTION = 1 << 20


class Spill:
    """Rows collected in memory up to a limit and then written, one Arrow file for each part that has any."""

    def __init__(self, folder: Path, num_parts: int, memory_bytes: int) -> None:
        """memory_bytes: of the rows that are held."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.num_parts, self.memory_bytes = folder, num_parts, memory_bytes
        self._held: list[list[pl.DataFrame]] = [[] for _ in range(num_parts)]
        self._held_bytes = self._flushes = 0

    def append(self, rows: pl.DataFrame) -> None:
        """Takes rows in; they stay in the order of arrival. rows: with a column ``user``."""
        part = shards_of(id_hashes(rows["user"]), self.num_parts)
        order = np.argsort(part, kind="stable")
        bounds = np.searchsorted(part[order], np.arange(self.num_parts + 1))
        ordered = rows[order]
        for p in np.flatnonzero(np.diff(bounds)):
            self._held[p].append(ordered[bounds[p] : bounds[p + 1]])
        self._held_bytes += int(ordered.estimated_size())
        if self._held_bytes >= self.memory_bytes:
            self.flush()

    def flush(self) -> None:
        """Writes what is held."""
        for p, frames in enumerate(self._held):
            if frames:
                path = self.folder / f"{p:05d}-{self._flushes:06d}.arrow"
                try:
                    # The old layout of strings: the new one would keep the bytes of rows that were left out.
                    pl.concat(frames).write_ipc(path, compat_level=pl.CompatLevel.oldest())
                except pl.exceptions.PolarsError as error:
                    raise_if_disk_full(error)
                    raise
                frames.clear()
        self._held_bytes = 0
        self._flushes += 1

    def frames(self, part: int) -> Iterator[pl.DataFrame]:
        """The rows of one part in the order of arrival, at most ``CHUNK_ROWS`` at once."""
        for path in self._files(part):
            yield from pl.read_ipc(path.read_bytes()).iter_slices(CHUNK_ROWS)

    def remove(self, part: int) -> None:
        for path in self._files(part):
            path.unlink()

    def _files(self, part: int) -> list[Path]:
        return sorted(self.folder.glob(f"{part:05d}-*.arrow"))


def id_hashes(ids: pl.Series) -> np.ndarray:
    """[n] uint64 hash of raw ids, integers or strings, as of :func:`hstu.data.hashing.hash_ids`."""
    texts = ids.cast(pl.String)
    return hash_texts(texts.str.join("").item().encode(), texts.str.len_bytes().to_numpy())


class Tally:
    """How often each value occurs. Memory grows with the number of values, not of rows: about three times 16 bytes
    a value, more for strings."""

    def __init__(self, dtype: pl.DataType) -> None:
        self._frames: list[pl.DataFrame] = [pl.DataFrame(schema={"key": dtype, "count": pl.Int64})]
        self._pending = self._known = 0

    def add(self, values: pl.Series) -> None:
        """Counts the values; missing ones are left out."""
        found = values.alias("key").drop_nulls().to_frame().group_by("key").agg(pl.len().cast(pl.Int64).alias("count"))
        self._frames.append(found)
        self._pending += len(found)
        if self._pending >= max(_MIN_COMPACTION, self._known):
            self._compact()

    def _compact(self) -> None:
        joined = pl.concat(self._frames).group_by("key").agg(pl.col("count").sum())
        self._frames, self._pending, self._known = [joined], 0, len(joined)

    def result(self) -> pl.DataFrame:
        """``key`` and ``count`` int64, in no order."""
        self._compact()
        return self._frames[0]


def part_frames(part: Path) -> Iterator[pl.DataFrame]:
    """The rows of an Arrow part, at most ``CHUNK_ROWS`` at once. No more than that stays mapped."""
    for start in range(0, num_part_rows(part), CHUNK_ROWS):
        yield pl.scan_ipc(part).slice(start, CHUNK_ROWS).collect()
