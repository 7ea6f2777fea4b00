"""The sequence store: one prepared log as a folder of ``.npy`` columns. docs/data.md describes the format.

Reading needs numpy only. Writing is atomic: everything goes to a temporary folder beside the target, is
flushed to disk, and is renamed into place, so that an interrupted prepare leaves nothing half-made.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hstu.errors import UserError

SCHEMA_VERSION = 1
_WORK = ".work"
"""Scratch space of a store in the making."""
MARK_ENDING = ".done-1.json"
"""Ending of the files in ``_WORK`` that say what of a store is done (:class:`hstu.data.stages.Marks`). The number
goes up when a mark stands for something else than before: what an older version has left is not gone on with."""
RARE_ITEM = "<rare>"
"""Raw id of the rare-item bucket where raw ids are strings; -1 where they are integers."""


class SequenceStore:
    """A prepared log; event columns are mapped, not loaded.

    offsets: [U+1] int64; item_ids: [E] int32, 1..num_items; timestamps: [E] int64, s; actions: [E] float32 | None.
    """

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path = path
        self.meta = meta
        self.offsets: np.ndarray = np.load(path / "offsets.npy")
        self.item_ids = map_column(path / "item_ids.npy")
        self.timestamps = map_column(path / "timestamps.npy")
        actions = path / "actions.npy"
        self.actions: np.ndarray | None = map_column(actions) if actions.exists() else None
        self.columns: dict[str, np.ndarray] = _load_folder(path / "columns")
        self.num_users: int = len(self.offsets) - 1
        self.num_items: int = int(meta["counts"]["items"])
        self.num_events: int = len(self.item_ids)

    @classmethod
    def open(cls, path: str | Path) -> SequenceStore:
        """Opens the finished store at ``path``.

        Raises UserError where there is none, where it was written under another schema version, or where a
        column is missing or disagrees with the counts.
        """
        path = Path(path)
        meta_path = path / "meta.json"
        if not meta_path.exists():
            raise UserError(f"no sequence store at {path}: run hstu-prepare data=NAME first")
        try:
            meta = json.loads(meta_path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{meta_path} is not valid JSON: delete {path} and run hstu-prepare again") from None
        version = meta.get("schema_version")
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{path} has store schema version {version!r}, this release reads {SCHEMA_VERSION}: "
                "delete the folder and run hstu-prepare again"
            )
        try:
            store = _sharded(path, meta) if "shards" in meta else cls(path, meta)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} is damaged ({error}): delete it and run hstu-prepare again") from None
        store._check()
        return store

    def _check(self) -> None:
        events = {"item_ids": self.item_ids, "timestamps": self.timestamps, **self.columns}
        if self.actions is not None:
            events["actions"] = self.actions
        expected = int(self.offsets[-1])
        for name, column in events.items():
            if len(column) != expected:
                raise UserError(
                    f"{self.path} is damaged ({name} has {len(column)} rows, offsets say {expected}): "
                    "delete it and run hstu-prepare again"
                )

    def item_attribute(self, name: str) -> np.ndarray | None:
        """[num_items] attribute of item i+1 (``title``, ``genres``, ...), or None where the source has none.

        Unicode (missing: empty) or, where it is a number, float32 (missing: NaN).
        """
        path = self.path / "items" / f"{name}.npy"
        return map_column(path) if path.exists() else None

    def user_attribute(self, name: str) -> np.ndarray | None:
        """[U] attribute of user u (``gender``, ``age``, ...), or None where the source has none; types as above."""
        path = self.path / "users" / f"{name}.npy"
        return map_column(path) if path.exists() else None

    def feature_values(self, name: str) -> np.ndarray | None:
        """[codes] raw value of code i+1 of feature column ``name``, or None where it is not coded."""
        path = self.path / "features" / f"{name}.npy"
        return map_column(path) if path.exists() else None

    @cached_property
    def user_raw_ids(self) -> np.ndarray:
        """[U] int64 or unicode."""
        return map_column(self.path / "users" / "raw_id.npy")

    @cached_property
    def item_raw_ids(self) -> np.ndarray:
        """[num_items] int64 or unicode. Raw id of item i+1."""
        return map_column(self.path / "items" / "raw_id.npy")


def _sharded(path: Path, meta: dict[str, Any]) -> SequenceStore:
    from hstu.data.sharded_store import ShardedStore

    return ShardedStore(path, meta)


def map_column(path: Path) -> np.ndarray:
    """The array of a ``.npy`` file, mapped from disk."""
    if path.stat().st_size > 256:
        return np.load(path, mmap_mode="r")
    return np.load(path)  # an empty array cannot be mapped


def _load_folder(folder: Path) -> dict[str, np.ndarray]:
    return {p.stem: map_column(p) for p in sorted(folder.glob("*.npy"))} if folder.is_dir() else {}


@contextlib.contextmanager
def new_store(path: str | Path) -> Iterator[StoreWriter]:
    """Yields a writer to a temporary folder beside ``path`` and renames it to ``path`` when the block ends well.

    On an exception or an interrupt the temporary folder is removed. What a killed process left behind is taken over by
    the next one where something in it is marked as done, else removed. If another process finished the same store
    meanwhile, that one is kept.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp"
    _take_over([temporary, *_leftovers(path)], temporary)
    temporary.mkdir(exist_ok=True)
    try:
        yield StoreWriter(temporary)
        if not (temporary / "meta.json").exists():
            raise RuntimeError("finish() was not called")
        for part in [*temporary.rglob("*"), temporary]:
            sync(part)
        try:
            os.rename(temporary, path)
        except OSError:
            if not (path / "meta.json").exists():
                raise
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _leftovers(path: Path) -> list[Path]:
    """Temporary folders of processes of this machine that are no more, the latest first."""
    found = []
    for leftover in path.parent.glob(f".{path.name}.{socket.gethostname()}.*.tmp"):
        pid = leftover.name.split(".")[-2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            found.append(leftover)
    return sorted(found, key=_changed, reverse=True)


def _changed(folder: Path) -> float:
    """When; 0 where another process has just removed or taken over the folder."""
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _take_over(leftovers: list[Path], temporary: Path) -> None:
    """Renames the first folder with a mark to ``temporary``, which may be one of them, and removes the others."""
    taken = False
    for leftover in leftovers:
        if not taken and any(leftover.glob(f"{_WORK}/*{MARK_ENDING}")):
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                os.rename(leftover, temporary)
                taken = True
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until the file or the folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class StoreWriter:
    """Writes the columns of a new store. ``work`` is scratch space that never reaches the finished store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def work(self) -> Path:
        work = self.folder / _WORK
        work.mkdir(exist_ok=True)
        return work

    def save(self, name: str, array: np.ndarray) -> None:
        """Writes ``array`` as ``<name>.npy``; ``name`` may hold a folder, as in ``items/title``."""
        with self.column(name, array.dtype, len(array)) as column:
            column.append(array)

    @contextlib.contextmanager
    def column(self, name: str, dtype: Any, num_rows: int) -> Iterator[ColumnFile]:
        """Writes ``<name>.npy`` of ``num_rows`` rows piece by piece, in order.

        A plain file and not a mapped one: a full disk then raises OSError where a mapped page would kill the process.
        """
        path = self.folder / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            column = ColumnFile(file, np.dtype(dtype), num_rows)
            yield column
        if column.written != num_rows:
            raise RuntimeError(f"{name}: {column.written} of {num_rows} rows written")

    def finish(self, meta: dict[str, Any]) -> dict[str, Any]:
        """Completes the counts and the split hash of ``meta`` from the columns, writes ``meta.json`` and returns it.

        meta: at least ``protocol``, ``split`` (``{"kind": ..., "time": ...}``) and ``counts["items"]``.
        """
        from hstu.data.splits import split_hash

        shutil.rmtree(self.folder / _WORK, ignore_errors=True)
        meta = {"schema_version": SCHEMA_VERSION, **meta}
        store = SequenceStore(self.folder, meta)
        store._check()
        meta["counts"] = {**meta["counts"], "users": store.num_users, "events": store.num_events}
        meta["split_hash"] = split_hash(store)
        write_meta(self.folder, meta)
        return meta


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    with open(folder / "meta.json", "w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1, ensure_ascii=False, sort_keys=True)
        file.write("\n")


class ColumnFile:
    """One ``.npy`` file in the making."""

    def __init__(self, file: BinaryIO, dtype: np.dtype, num_rows: int) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (num_rows,)}
        np.lib.format.write_array_header_1_0(file, header)
        self.file, self.dtype, self.written = file, dtype, 0

    def append(self, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array, self.dtype)
        self.file.write(array.view(np.uint8).data if array.size else b"")
        self.written += len(array)


def write_store(
    path: str | Path,
    *,
    offsets: np.ndarray,
    item_ids: np.ndarray,
    timestamps: np.ndarray,
    meta: dict[str, Any],
    actions: np.ndarray | None = None,
    columns: dict[str, np.ndarray] | None = None,
    user_raw_ids: np.ndarray | None = None,
    item_raw_ids: np.ndarray | None = None,
    item_attributes: dict[str, np.ndarray] | None = None,
    user_attributes: dict[str, np.ndarray] | None = None,
    num_items: int | None = None,
) -> SequenceStore:
    """Writes a store from arrays in memory (synthetic logs, tests) and opens it.

    offsets: [U+1]; item_ids: [E], 1..num_items; timestamps: [E], s, ascending within a user.
    num_items: default the largest item id. Raw ids default to 0..U-1 and 1..num_items.
    """
    num_items = int(num_items if num_items is not None else item_ids.max())
    users = np.arange(len(offsets) - 1, dtype=np.int64) if user_raw_ids is None else user_raw_ids
    items = np.arange(1, num_items + 1, dtype=np.int64) if item_raw_ids is None else item_raw_ids
    meta = {"name": "arrays", "protocol": "stable", "split": {"kind": "leave-last-out", "time": None}, **meta}
    meta["counts"] = {**meta.get("counts", {}), "items": num_items}
    with new_store(path) as writer:
        writer.save("offsets", np.asarray(offsets, np.int64))
        writer.save("item_ids", np.asarray(item_ids, np.int32))
        writer.save("timestamps", np.asarray(timestamps, np.int64))
        if actions is not None:
            writer.save("actions", np.asarray(actions, np.float32))
        for name, column in (columns or {}).items():
            writer.save(f"columns/{name}", column)
        writer.save("users/raw_id", users)
        writer.save("items/raw_id", items)
        for name, column in (item_attributes or {}).items():
            writer.save(f"items/{name}", column)
        for name, column in (user_attributes or {}).items():
            writer.save(f"users/{name}", column)
        writer.finish(meta)
    return SequenceStore.open(path)
