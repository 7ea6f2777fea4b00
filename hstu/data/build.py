"""From checked rows to a sequence store: code the ids, filter, order, write."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from hstu.config import DataConfig
from hstu.data import filters
from hstu.data.attributes import attribute_columns
from hstu.data.buckets import Buckets, Events
from hstu.data.order import sort_events
from hstu.data.store import RARE_ITEM, StoreWriter
from hstu.data.tables import Layout, Rejects, Table, read_tables, row_texts
from hstu.errors import UserError

_CHUNK_ROWS = 1 << 19
_SORT_THREADS = 2
_MAX_CODES = 2**31 - 2
_MAX_TABLE = 1 << 26
"""Largest raw id that is coded by a lookup table (256 MiB)."""


@dataclass(frozen=True)
class RowColumn:
    """A column that follows from where a row stands in the raw files (``timestamp_estimated``).

    dtype: float32 or int32. take: its values at int64 global row numbers minus 1.
    """

    dtype: type
    take: Callable[[np.ndarray], np.ndarray]


Attributes = tuple[pl.DataFrame | None, pl.DataFrame | None]
"""Of items and of users, one row each; first column ``raw_id``, unique; floating-point columns are numbers."""


def _no_attributes(rejects: Rejects) -> Attributes:
    return None, None


def _no_columns(first_rows: list[int], last_row: int) -> dict[str, RowColumn]:
    return {}


@dataclass(frozen=True)
class RawFiles:
    """What an importer hands over: which files hold the log, and how they and what lies beside them are read."""

    logs: list[Path]
    layouts: list[Layout]
    """Of each log."""
    attributes: Callable[[Rejects], Attributes] = _no_attributes
    """Reads the attributes."""
    catalogue: str = ""
    """File whose items are the catalogue (MovieLens): every one gets an id, rated or not, and no others do."""
    row_columns: Callable[[list[int], int], dict[str, RowColumn]] = _no_columns
    """Further columns, from the global number that precedes each log's first row, and that of the last row."""
    notes: list[str] = field(default_factory=list)

    @property
    def per_second(self) -> int:
        """Units of the column ``time`` in a second."""
        return self.layouts[0].time.per_second


@dataclass
class Built:
    """Counts of :func:`build_store` for meta.json and the table."""

    num_rows: int = 0
    """Good rows read."""
    num_users: int = 0
    num_items: int = 0
    num_rated: int = 0
    num_events: int = 0
    removed: dict[str, int] = field(default_factory=dict)


def build_store(raw: RawFiles, config: DataConfig, writer: StoreWriter, rejects: Rejects) -> Built:
    """Writes every column of the store but ``meta.json``."""
    table = read_tables(raw.logs, raw.layouts, writer.work, rejects)
    item_attributes, user_attributes = raw.attributes(rejects)
    frame = table.scan()
    users = _vocabulary(frame, "user")
    items = _vocabulary(frame, "item")
    built = Built(table.num_rows)
    if raw.catalogue:
        built.num_rows -= _reject_unlisted(table, items, item_attributes, raw, rejects)
        items = listed_items(items, item_attributes)
    row_columns = raw.row_columns(table.first_rows, table.last_row)
    buckets, extra = _bucket_events(frame, users, items, row_columns, writer)
    if config.dedup != "none":
        built.removed["duplicates"] = filters.dedup(buckets, config.dedup)

    counts = users["count"].to_numpy(), items["count"].to_numpy()
    if built.removed or rejects.count:  # rows went after the ids were counted
        counts = filters.count(buckets, np.ones(len(users), bool), np.ones(len(items), bool))
    total = int(counts[0].sum())
    alive_users, alive_items, vocabulary = filters.minimum_counts(
        buckets, counts, config.min_user_events, config.min_item_events, config.filter_mode
    )
    user_counts, item_counts = counts
    if max(config.min_user_events, config.min_item_events) > 1:
        user_counts, item_counts = filters.count(buckets, alive_users, alive_items)
    built.removed["minimum counts"] = total - int(user_counts.sum())
    check_left(int(user_counts.sum()), total, config)
    if raw.catalogue and config.min_item_events <= 1 and config.filter_mode == "one-pass":
        vocabulary = np.ones(len(items), bool)  # films that nobody rated are candidates too
    ids, built.num_items = filters.cap_vocabulary(item_counts, vocabulary, config.max_items)
    built.num_rated = len(np.unique(ids[item_counts > 0]))

    stored = user_counts if config.max_events is None else np.minimum(user_counts, config.max_events)
    built.removed["maximum length"] = int(user_counts.sum() - stored.sum())
    chosen = np.flatnonzero(user_counts > 0)
    built.num_users, built.num_events = len(chosen), int(stored.sum())
    offsets = np.concatenate([[0], np.cumsum(stored[chosen])])
    writer.save("offsets", offsets.astype(np.int64))
    write_events(buckets, extra, alive_users, alive_items, ids, stored, raw.per_second, config, writer)
    write_users(user_attributes, to_numpy(users["raw_id"])[chosen], writer)
    write_items(item_attributes, items, ids, built.num_items, writer)
    return built


def check_left(num_left: int, total: int, config: DataConfig) -> None:
    """Raises UserError where the filters leave nothing of ``total`` events."""
    if num_left == 0:
        raise UserError(
            f"no event is left of {total} after the filters (data.min_user_events={config.min_user_events}, "
            f"data.min_item_events={config.min_item_events}, data.filter_mode={config.filter_mode}): lower them"
        )


# Ids


def _vocabulary(frame: pl.LazyFrame, name: str) -> pl.DataFrame:
    found = (
        frame.group_by(pl.col(name).alias("key"))
        .agg(pl.len().cast(pl.Int64).alias("count"))
        .collect(engine="streaming")
    )
    return vocabulary(found, name, are_plain_integers(found["key"]))


def vocabulary(found: pl.DataFrame, name: str, as_integers: bool) -> pl.DataFrame:
    """``raw_id`` ascending, its ``key`` in the table, ``count``.

    found: ``key`` and ``count`` of each id. as_integers: the raw ids of strings that are all plain integers are int64.
    """
    if len(found) > _MAX_CODES:
        raise UserError(f"{len(found)} distinct {name} ids: at most {_MAX_CODES} fit 32 bits")
    raw = found["key"]
    if raw.dtype == pl.String and as_integers:
        raw = raw.cast(pl.Int64)
    return found.with_columns(raw.alias("raw_id")).sort("raw_id")


def are_plain_integers(raw: pl.Series) -> bool:
    """Whether every id is an integer, or a string such as ``-12`` that an integer would be written as."""
    if raw.dtype != pl.String:
        return True
    numbers = raw.cast(pl.Int64, strict=False)
    return numbers.null_count() == 0 and bool((numbers.cast(pl.String) == raw).all())


def listed_items(found: pl.DataFrame, catalogue: pl.DataFrame | None) -> pl.DataFrame:
    """As :func:`vocabulary`, of all items of the catalogue. found: ``key`` and ``count`` of those that occur."""
    assert catalogue is not None
    listed = catalogue.select(pl.col("raw_id").alias("key"), "raw_id").sort("raw_id")
    return listed.join(found.select("key", "count"), on="key", how="left").with_columns(pl.col("count").fill_null(0))


def _reject_unlisted(
    table: Table, items: pl.DataFrame, catalogue: pl.DataFrame | None, raw: RawFiles, rejects: Rejects
) -> int:
    """Rejects the rows whose item is not in the catalogue; returns how many."""
    assert catalogue is not None
    unknown = items.join(catalogue, left_on="key", right_on="raw_id", how="anti").select(pl.col("key").alias("item"))
    if len(unknown) == 0:
        return 0
    rows = table.scan().join(unknown.lazy(), on="item", how="semi").select("row", "item").collect(engine="streaming")
    reject_unlisted(table.files[0], 0, rows, raw.catalogue, rejects)
    return len(rows)


def reject_unlisted(file: Path, before: int, rows: pl.DataFrame, catalogue: str, rejects: Rejects) -> None:
    """Rejects ``rows`` (``row`` and ``item``) of ``file``. before: rows of the files before it."""
    found = [(row - before, item) for row, item in rows.select("row", "item").sort("row").iter_rows()]
    texts = row_texts(file, {line for line, _ in found})
    for line, item in found:
        rejects.add(file, line, f"item '{item}' is not in {catalogue}", texts.get(line, ""))


def _codes(vocabulary: pl.DataFrame, name: str) -> pl.LazyFrame:
    code = pl.int_range(pl.len(), dtype=pl.Int32).alias(f"{name} code")
    return vocabulary.lazy().select(pl.col("key").alias(name), code)


def _lookup_table(vocabulary: pl.DataFrame, largest: int) -> np.ndarray | None:
    """Code by raw id, -1 where there is none and in the last slot; None unless the ids are integers 0..largest."""
    keys = vocabulary["key"]
    if not keys.dtype.is_integer() or len(keys) == 0 or keys.min() < 0 or keys.max() > largest:  # type: ignore[operator]
        return None
    table = np.full(int(keys.max()) + 2, -1, np.int32)  # type: ignore[arg-type]
    table[keys.to_numpy()] = np.arange(len(keys), dtype=np.int32)
    return table


def to_numpy(raw: pl.Series) -> np.ndarray:
    if raw.dtype != pl.String:
        return raw.cast(pl.Int64).to_numpy()
    return raw.to_numpy().astype(np.str_)


# Events


class Coder:
    """Codes the columns of checked rows to numbers.

    Attributes:
        dtypes: of the columns of coded events. extra: name in the store of each column beyond user, item, time, row.
    """

    def __init__(
        self, schema: pl.Schema, users: pl.DataFrame, items: pl.DataFrame, known: dict[str, pl.Series],
        row_columns: dict[str, RowColumn] | None = None, largest_table: int = _MAX_TABLE,
    ) -> None:  # fmt: skip
        """known: the values of each role that is coded (:func:`coded_roles`). row_columns: further columns.
        largest_table: largest integer id that is coded by a lookup table, which takes 4 bytes for each below it."""
        self.dtypes: dict[str, type] = {"user": np.int32, "item": np.int32, "time": np.int64, "row": np.int64}
        self.extra: dict[str, str] = {}
        self.row_columns = row_columns or {}
        self._columns = [pl.col("time"), pl.col("row")]
        self._joins: list[tuple[str, pl.LazyFrame]] = []
        self._tables: dict[str, np.ndarray] = {}
        for name, ids in (("user", users), ("item", items)):
            table = _lookup_table(ids, largest_table)
            if table is not None:
                self._tables[name] = table
                self._columns.append(pl.col(name))
            else:
                self._joins.append((name, _codes(ids, name)))
                self._columns.append(pl.col(f"{name} code").fill_null(-1).alias(name))
        for role in _further_roles(schema):
            self._add(role, known.get(role))
        for name, column in self.row_columns.items():
            self.extra[name] = f"columns/{name}"
            self.dtypes[name] = column.dtype

    def _add(self, role: str, known: pl.Series | None) -> None:
        self.extra[role] = "actions" if role == "action" else f"columns/{role.partition('.')[2]}"
        self.dtypes[role] = np.float32
        if known is None:
            self._columns.append(pl.col(role).cast(pl.Float32).fill_null(float("nan")))
            return
        codes = pl.LazyFrame({role: known, f"{role} code": pl.Series(range(1, len(known) + 1), dtype=pl.Int32)})
        self._joins.append((role, codes))
        code = pl.col(f"{role} code")
        if role == "action":
            self._columns.append(code.cast(pl.Float32).fill_null(float("nan")).alias(role))
        else:
            self._columns.append(code.fill_null(0).alias(role))
            self.dtypes[role] = np.int32

    def coded(self, rows: pl.LazyFrame) -> pl.LazyFrame:
        """The rows with their codes; ids with a lookup table are coded by :meth:`events`."""
        for name, codes in self._joins:
            rows = rows.join(codes, on=name, how="left")
        return rows.select(self._columns)

    def events(self, batch: pl.DataFrame) -> Events:
        """Coded rows as columns of a bucket."""
        events: Events = {n: batch[n].to_numpy() for n in batch.columns}
        for name, table in self._tables.items():
            events[name] = table[np.minimum(events[name], len(table) - 1)]
        for name, column in self.row_columns.items():
            events[name] = column.take(events["row"] - 1)
        if events["item"].min(initial=0) < 0:  # an item outside the catalogue, already among the rejects
            listed = events["item"] >= 0
            events = {name: column[listed] for name, column in events.items()}
        return events


def _further_roles(schema: pl.Schema) -> list[str]:
    return [role for role in schema if role not in ("user", "item", "time", "row", "bad")]


def coded_roles(schema: pl.Schema) -> list[str]:
    """Columns whose values become codes: features, and actions that are names."""
    named = [role for role in _further_roles(schema) if role == "action" and not schema[role].is_numeric()]
    return [role for role in _further_roles(schema) if role.startswith("feature.")] + named


def _bucket_events(
    frame: pl.LazyFrame, users: pl.DataFrame, items: pl.DataFrame, row_columns: dict[str, RowColumn],
    writer: StoreWriter,
) -> tuple[Buckets, dict[str, str]]:  # fmt: skip
    """Codes every column to numbers and sorts the rows into buckets of users.

    Returns the buckets and, for each further column of them, its name in the store.
    """
    schema = frame.collect_schema()
    known = {}
    for role in coded_roles(schema):
        known[role] = frame.select(pl.col(role).drop_nulls().unique()).collect(engine="streaming")[role].sort()
        writer.save(feature_file(role), to_numpy(known[role]))
    coder = Coder(schema, users, items, known, row_columns)
    buckets = Buckets(writer.work / "events", users["count"].to_numpy(), coder.dtypes)
    for batch in coder.coded(frame).collect_batches(chunk_size=_CHUNK_ROWS, maintain_order=False, engine="streaming"):
        buckets.append(coder.events(batch))
    return buckets, coder.extra


def feature_file(role: str) -> str:
    """Where the store keeps the raw values of a coded column."""
    return f"features/{role.partition('.')[2] or 'action'}"


def write_events(
    buckets: Buckets,
    extra: dict[str, str],
    alive_users: np.ndarray,
    alive_items: np.ndarray,
    ids: np.ndarray,
    stored: np.ndarray,
    per_second: int,
    config: DataConfig,
    writer: StoreWriter,
    keep: bool = False,
) -> None:
    """Orders each bucket and appends it to the event columns. stored: [users] events of each user in the store. keep:
    the buckets stay."""
    num_events = int(stored.sum())
    with contextlib.ExitStack() as stack:
        item_ids = stack.enter_context(writer.column("item_ids", np.int32, num_events))
        timestamps = stack.enter_context(writer.column("timestamps", np.int64, num_events))
        others = {
            role: stack.enter_context(writer.column(name, buckets.dtypes[role], num_events))
            for role, name in extra.items()
        }
        for events in _ordered(buckets, alive_users, alive_items, config, keep):
            item_ids.append(ids[events["item"]])
            timestamps.append(events["time"] // per_second)
            for role, column in others.items():
                column.append(events[role])


def _ordered(
    buckets: Buckets, alive_users: np.ndarray, alive_items: np.ndarray, config: DataConfig, keep: bool
) -> Iterator[Events]:
    """The events that stay, bucket by bucket, in the order of the store. Two buckets are sorted ahead in threads."""

    def order_bucket(b: int) -> Events:
        events = buckets.read(b)
        if not keep:
            buckets.remove(b)
        alive = alive_users[events["user"]] & alive_items[events["item"]]
        if not alive.all():
            events = {name: column[alive] for name, column in events.items()}
        users, protocol, seed = events["user"], config.protocol, config.protocol_seed
        order = sort_events(users, events["time"], events["row"], protocol, seed)
        if config.max_events is not None:
            order = _latest(order, users[order], config.max_events)
        return {name: column[order] for name, column in events.items() if name not in ("user", "row")}

    with ThreadPoolExecutor(_SORT_THREADS) as pool:
        ahead = deque(pool.submit(order_bucket, b) for b in range(min(_SORT_THREADS, len(buckets))))
        for b in range(len(buckets)):
            events = ahead.popleft().result()
            if b + _SORT_THREADS < len(buckets):
                ahead.append(pool.submit(order_bucket, b + _SORT_THREADS))
            yield events


def _latest(order: np.ndarray, users: np.ndarray, limit: int) -> np.ndarray:
    """The rows of ``order`` that are among the last ``limit`` of their user; ``users`` ascending."""
    ends = np.searchsorted(users, users, side="right")
    return order[ends - np.arange(len(users)) <= limit]


# Users and items


def write_users(users: pl.DataFrame | None, raw_ids: np.ndarray, writer: StoreWriter) -> None:
    """Raw ids [U] and the attributes that ``users`` has for them."""
    writer.save("users/raw_id", raw_ids)
    if users is not None:
        for name, values in attribute_columns(users, raw_ids).items():
            writer.save(f"users/{name}", values)


def write_items(
    attributes: pl.DataFrame | None, items: pl.DataFrame, ids: np.ndarray, num_items: int, writer: StoreWriter
) -> None:
    """Raw id and attributes of every item id. items: vocabulary of the log; ids: final id of each of its rows."""
    first = np.full(num_items, -1, np.int64)  # item row of each id; the rare-item bucket belongs to none
    members = np.flatnonzero(ids)
    owners = np.bincount(ids[members], minlength=num_items + 1)
    own = members[owners[ids[members]] == 1]
    first[ids[own] - 1] = own
    raw = to_numpy(items["raw_id"])
    rare: Any = -1 if raw.dtype.kind == "i" else RARE_ITEM
    raw_ids = raw[np.maximum(first, 0)]
    if (first < 0).any():
        raw_ids = raw_ids.astype(np.result_type(raw_ids.dtype, np.array(rare).dtype))
        raw_ids[first < 0] = rare
    writer.save("items/raw_id", raw_ids)
    if attributes is None:
        return
    for name, values in attribute_columns(attributes, raw_ids).items():
        if name == "title":
            values = np.where(first < 0, RARE_ITEM, values)
        writer.save(f"items/{name}", values)
