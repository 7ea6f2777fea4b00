"""From raw files to the shards of a store, in one pass over the files and with bounded memory.

Four stages. Spill: the rows go to disk, into one part per shard by the hash of their user; items are counted. Code:
shard by shard, ids become numbers and the rows go into buckets of users, where duplicates are dropped. Filter: counts
over all shards. Write: shard by shard the ordered events. A preparation that was killed goes on with what is marked as
done: the spilled rows, coded shards, the filters, written shards.

In memory stay the item vocabulary with its counts and ids, the values of coded features, the attributes of items and
users, and the users of one shard. The rest is bounded by ``data.memory_mib``.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from hstu.config import DataConfig
from hstu.data import filters
from hstu.data.buckets import Buckets
from hstu.data.build import (
    Attributes,
    Built,
    Coder,
    RawFiles,
    RowColumn,
    are_plain_integers,
    check_left,
    coded_roles,
    feature_file,
    listed_items,
    reject_unlisted,
    to_numpy,
    vocabulary,
    write_events,
    write_items,
    write_users,
)
from hstu.data.sharded_store import shard_folder, share_folder
from hstu.data.spill import Spill, Tally, part_frames
from hstu.data.stages import Marks, Stages
from hstu.data.store import StoreWriter
from hstu.data.tables import Rejects, check_usable, read_parts

SPILL_SHARE = 0.25
"""Share of the working memory for rows on their way to disk."""
EVENT_BYTES = 400
"""Working memory of one event while buckets are ordered: the columns of three buckets, their sort keys and copies."""
_MIN_BUCKET_EVENTS = 1 << 16
SPILLED, FILTERED = "spilled", "filtered"
"""Marks of stages; shards have their own."""
_LARGEST_TABLE = 1 << 22
"""Largest integer id coded by a lookup table (16 MiB)."""


@dataclass
class ShardWork:
    """One shard in the making: its buckets, and arrays over its users on disk (``raw_id``, ``coded``, the number of
    events, and in the filters ``count``, of those that are left, and ``alive``)."""

    number: int
    folder: Path
    buckets: Buckets
    extra: dict[str, str] = field(default_factory=dict)
    num_duplicates: int = 0

    def save(self, name: str, values: np.ndarray) -> None:
        np.save(self.folder / f"{name}.npy", values)

    def load(self, name: str) -> np.ndarray:
        found: np.ndarray = np.load(self.folder / f"{name}.npy")
        return found


@dataclass
class Spilled:
    """What the pass over the files found."""

    spill: Spill
    schema: pl.Schema
    items: pl.DataFrame
    """``key``, ``count``."""
    known: dict[str, pl.Series]
    """Values of each coded column, ascending."""
    plain: dict[str, bool]
    """Whether the ids of users and items are all plain integers."""
    num_rows: int
    first_rows: list[int]
    last_row: int
    row_columns: dict[str, RowColumn]


@dataclass
class Filtered:
    """What the filters have left."""

    alive_items: np.ndarray
    """[items] bool."""
    ids: np.ndarray
    """[items] int32 final id of each, 0: none."""
    num_left: int
    """Events."""
    built: Built


def build_shards(raw: RawFiles, config: DataConfig, writer: StoreWriter, rejects: Rejects, stages: Stages) -> Built:
    """Writes the columns of every shard, and the items and features that all share; ``meta.json`` is not written."""
    marks, work, num_shards = Marks(writer.work), writer.work, config.shards or 1
    found, attributes = _spilled(raw, config, work, rejects, stages, marks)
    if raw.catalogue:
        items = listed_items(found.items, attributes[0])
    else:
        items = vocabulary(found.items, "item", found.plain["item"])
    for role, values in found.known.items():
        writer.save(feature_file(role), to_numpy(values))
    written = {number: marks.read(f"written-{number:05d}") for number in range(num_shards)}
    missing = [number for number, done in written.items() if done is None]
    shards = [
        _code_shard(number, found, items, config, work, marks) for number in stages.track(missing, "sorting users")
    ]
    if marks.read(FILTERED) is None:
        _filter(shards, raw, attributes, items, config, writer, marks, found.num_rows)
    filtered = _load_filtered(work, marks)
    for shard in stages.track(shards, "writing shards"):
        counts = _write_shard(shard, raw, attributes, config, writer.folder, filtered)
        marks.write(f"written-{shard.number:05d}", counts, shard_folder(writer.folder, shard.number))
        written[shard.number] = counts
        shutil.rmtree(shard.folder)
    built = filtered.built
    built.num_users = sum(counts["users"] for counts in written.values())
    built.num_events = sum(counts["events"] for counts in written.values())
    built.removed["maximum length"] = filtered.num_left - built.num_events
    return built


# Spill


def _spilled(
    raw: RawFiles, config: DataConfig, work: Path, rejects: Rejects, stages: Stages, marks: Marks
) -> tuple[Spilled, Attributes]:
    """The rows on disk, spread now or by a process that was killed, and the attributes."""
    done = marks.read(SPILLED)
    if done is not None:
        stages.say("a preparation that was killed had read the files: going on from there")
        rejects.reasons, rejects.first = done["reasons"], done["first"]
        known_rejects = Rejects(work / "known-rejects.csv", "skip")
        return _load_spilled(raw, config, work, done), raw.attributes(known_rejects)
    attributes = raw.attributes(rejects)
    found = _spill_rows(raw, attributes[0], config, work, rejects, stages)
    frames = {"schema": pl.DataFrame(schema=found.schema), "items": found.items}
    frames |= {f"known-{n}": values.to_frame() for n, values in enumerate(found.known.values())}
    for name, frame in frames.items():
        frame.write_ipc(work / f"{name}.arrow")
    paths = [work / f"{name}.arrow" for name in frames]
    state = {"plain": found.plain, "num_rows": found.num_rows, "known": len(found.known)}
    state |= {"first_rows": found.first_rows, "last_row": found.last_row}
    state |= {"reasons": rejects.reasons, "first": rejects.first}
    marks.write(SPILLED, state, work / "spill", *paths, *([rejects.path] if rejects.path.exists() else []))
    return found, attributes


def _load_spilled(raw: RawFiles, config: DataConfig, work: Path, done: dict[str, Any]) -> Spilled:
    names = ("schema", "items", *(f"known-{n}" for n in range(done["known"])))
    schema, items, *known = (pl.read_ipc((work / f"{name}.arrow").read_bytes()) for name in names)
    first_rows, last_row = done["first_rows"], done["last_row"]
    values = {frame.columns[0]: frame.to_series() for frame in known}
    return Spilled(
        Spill(work / "spill", config.shards or 1, 0), schema.schema, items, values, done["plain"], done["num_rows"],
        first_rows, last_row, raw.row_columns(first_rows, last_row),
    )  # fmt: skip


def _spill_rows(
    raw: RawFiles, catalogue: pl.DataFrame | None, config: DataConfig, work: Path, rejects: Rejects, stages: Stages
) -> Spilled:
    """catalogue: attributes of the items, which are the only ones where ``raw.catalogue`` says so."""
    assert config.shards is not None
    spill = Spill(work / "spill", config.shards, int(SPILL_SHARE * config.memory_mib * 2**20))
    schema: pl.Schema | None = None
    tallies: dict[str, Tally] = {}
    plain = {"user": True, "item": True}
    num_rows = last_row = 0
    first_rows: list[int] = []
    files = read_parts(raw.logs, raw.layouts, work / "spill", rejects)
    for file in stages.track(raw.logs, "reading files"):
        parts, last = next(files)
        first_rows.append(last_row)
        last_row += last
        for part in parts:
            for frame in part_frames(part):
                rows = frame.drop("bad")
                if schema is None:
                    schema = rows.schema
                    tallies = {role: Tally(schema[role]) for role in ("item", *coded_roles(schema))}
                if raw.catalogue:
                    assert catalogue is not None
                    unlisted = rows.join(catalogue, left_on="item", right_on="raw_id", how="anti")
                    if len(unlisted):
                        reject_unlisted(file, first_rows[-1], unlisted, raw.catalogue, rejects)
                        rows = rows.join(unlisted, on="row", how="anti", maintain_order="left")
                spill.append(rows)
                for role, tally in tallies.items():
                    tally.add(rows[role])
                for role in plain:
                    plain[role] = plain[role] and are_plain_integers(rows[role])
                num_rows += len(rows)
            part.unlink()
    spill.flush()
    check_usable(num_rows, raw.logs, rejects)
    assert schema is not None
    items = tallies.pop("item").result()
    known = {role: tally.result()["key"].alias(role).sort() for role, tally in tallies.items()}
    row_columns = raw.row_columns(first_rows, last_row)
    return Spilled(spill, schema, items, known, plain, num_rows, first_rows, last_row, row_columns)


# Code


def _code_shard(
    number: int, found: Spilled, items: pl.DataFrame, config: DataConfig, work: Path, marks: Marks
) -> ShardWork:
    folder = work / f"shard-{number:05d}"
    done = marks.read(folder.name)
    if done is not None:
        dtypes = {name: np.dtype(dtype).type for name, dtype in done["dtypes"].items()}
        buckets = Buckets.reopen(folder / "events", np.load(folder / "edges.npy"), dtypes)
        found.spill.remove(number)
        return ShardWork(number, folder, buckets, done["extra"], done["num_duplicates"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tally = Tally(found.schema["user"])
    for rows in found.spill.frames(number):
        tally.add(rows["user"])
    users = vocabulary(tally.result(), "user", found.plain["user"])
    coder = Coder(found.schema, users, items, found.known, found.row_columns, _LARGEST_TABLE)
    bucket_events = max(_MIN_BUCKET_EVENTS, config.memory_mib * 2**20 // EVENT_BYTES)
    buckets = Buckets(folder / "events", users["count"].to_numpy(), coder.dtypes, bucket_events)
    for rows in found.spill.frames(number):
        buckets.append(coder.events(coder.coded(rows.lazy()).collect()))
    shard = ShardWork(number, folder, buckets, coder.extra)
    if config.dedup != "none":
        shard.num_duplicates = filters.dedup(buckets, config.dedup)
    shard.save("raw_id", to_numpy(users["raw_id"]))
    shard.save("coded", users["count"].to_numpy())
    shard.save("edges", buckets.edges)
    dtypes = {name: np.dtype(dtype).name for name, dtype in coder.dtypes.items()}
    marks.write(folder.name, {"dtypes": dtypes, "extra": coder.extra, "num_duplicates": shard.num_duplicates}, folder)
    found.spill.remove(number)
    return shard


# Filters


def _filter(
    shards: list[ShardWork], raw: RawFiles, attributes: Attributes, items: pl.DataFrame, config: DataConfig,
    writer: StoreWriter, marks: Marks, num_rows: int,
) -> None:  # fmt: skip
    """Applies the filters over all shards, writes the items that are left, and leaves a :class:`Filtered` on disk."""
    built, item_counts = Built(num_rows), items["count"].to_numpy()
    for shard in shards:
        shard.save("count", shard.load("coded"))
        shard.save("alive", np.ones(len(shard.load("coded")), bool))
    if config.dedup != "none":
        built.removed["duplicates"] = sum(shard.num_duplicates for shard in shards)
        item_counts = _recount(shards, np.ones(len(items), bool))
    total = int(item_counts.sum())
    alive_items, members, item_counts = _minimum_counts(shards, item_counts, config)
    num_left = int(item_counts.sum())
    built.removed["minimum counts"] = total - num_left
    check_left(num_left, total, config)
    if raw.catalogue and config.min_item_events <= 1 and config.filter_mode == "one-pass":
        members = np.ones(len(items), bool)  # films that nobody rated are candidates too
    ids, built.num_items = filters.cap_vocabulary(item_counts, members, config.max_items)
    built.num_rated = len(np.unique(ids[item_counts > 0]))
    write_items(attributes[0], items, ids, built.num_items, writer)
    np.save(writer.work / "alive_items.npy", alive_items)
    np.save(writer.work / "ids.npy", ids)
    paths = [writer.folder / "items", writer.work / "alive_items.npy", writer.work / "ids.npy"]
    paths += [shard.folder / f"{name}.npy" for shard in shards for name in ("count", "alive")]
    marks.write(FILTERED, {"num_left": num_left, "built": asdict(built)}, *paths)


def _load_filtered(work: Path, marks: Marks) -> Filtered:
    done = marks.read(FILTERED)
    alive_items, ids = (np.load(work / f"{name}.npy") for name in ("alive_items", "ids"))
    return Filtered(alive_items, ids, done["num_left"], Built(**done["built"]))


def _recount(shards: list[ShardWork], alive_items: np.ndarray) -> np.ndarray:
    """Counts the events of alive users and items: returns those of each item, leaves those of each user on disk."""
    item_counts = np.zeros(len(alive_items), np.int64)
    for shard in shards:
        user_counts, found = filters.count(shard.buckets, shard.load("alive"), alive_items)
        shard.save("count", user_counts)
        item_counts += found
    return item_counts


def _minimum_counts(
    shards: list[ShardWork], item_counts: np.ndarray, config: DataConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """:func:`hstu.data.filters.minimum_counts` over all shards: which items stay, which are in the vocabulary, and the
    events of each item that are left. Leaves ``alive`` and ``count`` of the users on disk."""
    min_user, min_item = max(config.min_user_events, 1), max(config.min_item_events, 1)
    items = item_counts >= min_item
    _mark_users(shards, min_user)
    if min_user == 1 and min_item == 1:
        return items, items.copy(), item_counts
    item_counts = _recount(shards, items)
    if config.filter_mode == "one-pass":
        members = item_counts > 0
        _mark_users(shards, min_user)
        return items, members, _recount(shards, items)
    while True:
        new_items = item_counts >= min_item
        changed = not np.array_equal(new_items, items)
        if not (_mark_users(shards, min_user) or changed):
            return items, items.copy(), item_counts
        items = new_items
        item_counts = _recount(shards, items)


def _mark_users(shards: list[ShardWork], min_user: int) -> bool:
    """``alive``: the users with enough events; returns whether that changed."""
    changed = False
    for shard in shards:
        alive = shard.load("count") >= min_user
        changed = changed or not np.array_equal(alive, shard.load("alive"))
        shard.save("alive", alive)
    return changed


# Write


def _write_shard(
    shard: ShardWork, raw: RawFiles, attributes: Attributes, config: DataConfig, folder: Path, filtered: Filtered
) -> dict[str, int]:
    """Returns its numbers of ``users`` and ``events``."""
    writer = StoreWriter(shard_folder(folder, shard.number))
    shutil.rmtree(writer.folder, ignore_errors=True)
    writer.folder.mkdir(parents=True)
    counts = shard.load("count")
    stored = counts if config.max_events is None else np.minimum(counts, config.max_events)
    chosen = np.flatnonzero(counts > 0)
    writer.save("offsets", np.concatenate([[0], np.cumsum(stored[chosen])]).astype(np.int64))
    write_events(
        shard.buckets, shard.extra, shard.load("alive"), filtered.alive_items, filtered.ids, stored, raw.per_second,
        config, writer, True,
    )  # fmt: skip
    write_users(attributes[1], shard.load("raw_id")[chosen], writer)
    for name in ("items", "features"):
        share_folder(folder / name, writer.folder / name)
    return {"users": len(chosen), "events": int(stored.sum())}
