"""Features of users, items and events as codes and standardised numbers. numpy only.

What a feature is like (its values, buckets, scale) is found in one pass or a few over its column, part by part. Users
and events are then encoded as they are read: their columns stay on disk. Items are encoded once.

Legend: n rows (users, items or events), V values of all rows, C distinct values of a column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hstu.config_ranking import FeatureConfig
from hstu.data.hashing import hash_codes
from hstu.errors import UserError

if TYPE_CHECKING:
    from hstu.data.store import SequenceStore

MISSING, RARE = 0, 1
"""Code of an absent value, and of the rare values that share one."""
DAY_S, HOUR_S = 86_400, 3_600
EPOCH_WEEKDAY = 3
"""1970-01-01 was a Thursday; Monday is 0."""
LEAST_SPREAD = 1e-6
"""Numbers whose deviation is below this share of their mean count as constant: about the rounding of float32."""
DERIVED = ("hour_of_day", "day_of_week")
"""Event features that follow from the time."""
HASHED, FIRST_DAY = "hashed", "first_day"
"""In ``meta.json`` of the store of a day of arriving files: how many codes each categorical column is hashed to; the
folder, beside it, of the first day, whose numbers give edges and scales."""
_PART_BYTES = 1 << 24
"""So much of a column, as float64 or text, is looked at at once."""
_FEW_PLACES = 64
"""Up to so many are looked for 16 bits of a number at a time, 0.5 MiB for each; more of them 8 bits at a time."""


@dataclass(frozen=True)
class Encoded:
    """A column [n] that is encoded where it is read."""

    raw: Any
    """[n]. Takes slices and arrays of rows: an array, mapped perhaps, or a column of shards."""
    encode: Callable[[np.ndarray], np.ndarray]
    """Of raw values."""

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self.encode(np.asarray(self.raw[rows]))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)

    def then(self, encode: Callable[[np.ndarray], np.ndarray]) -> Encoded:
        """The column with another step."""
        return Encoded(self.raw, lambda raw: encode(self.encode(raw)))


Column = np.ndarray | Encoded


def encoded(column: Any, encode: Callable[[np.ndarray], np.ndarray]) -> Encoded:
    """``column`` with a step of encoding."""
    return column.then(encode) if isinstance(column, Encoded) else Encoded(column, encode)


@dataclass(frozen=True)
class Coded:
    """A categorical feature. Every row has at least one value; code 0 stands for none."""

    values: Column
    """[V] integer, 0 .. num_codes - 1."""
    num_codes: int
    offsets: np.ndarray | None = None
    """[cells+1] int64; cell c holds the values offsets[c] .. offsets[c+1]. None: one value a row."""
    cells: Column | None = None
    """[n] integer: the cell of each row. None: row r is cell r."""

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values int64 of ``rows``, joined, and how many each row has."""
        if self.offsets is None:
            return self.values[rows].astype(np.int64), np.ones(len(rows), np.int64)
        cells = rows if self.cells is None else self.cells[rows]
        starts, lengths = self.offsets[cells], self.offsets[cells + 1] - self.offsets[cells]
        ends = np.cumsum(lengths)
        at = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
        return self.values[at].astype(np.int64), lengths


@dataclass(frozen=True)
class Numbers:
    """A numeric feature, standardised; NaN where it is missing."""

    values: Column
    """[n] float32."""


Feature = Coded | Numbers


def user_feature(store: SequenceStore, name: str, config: FeatureConfig) -> Feature:
    """Attribute ``name`` of every user. Codes, buckets and scales are those of all users, whatever they did."""
    return _encode(_attribute(store, "user", name), f"ranking.user_features.{name}", config)


def item_feature(store: SequenceStore, name: str, config: FeatureConfig) -> Feature:
    """Attribute ``name`` by item id 0..num_items; id 0, the padding, has it missing."""
    feature = _encode(_attribute(store, "item", name), f"ranking.item_features.{name}", config)
    if isinstance(feature, Numbers):
        return Numbers(np.concatenate([[np.float32(np.nan)], np.asarray(feature.values)]))
    if feature.offsets is None:
        values = np.asarray(feature.values)
        return Coded(np.concatenate([np.array([MISSING], values.dtype), values]), feature.num_codes)
    values = np.concatenate([np.array([MISSING], feature.values.dtype), feature.values])  # type: ignore[union-attr]
    cells = np.concatenate([[0], np.asarray(feature.cells) + 1])
    return Coded(values, feature.num_codes, np.concatenate([[0], feature.offsets + 1]), cells)


def event_feature(store: SequenceStore, name: str, config: FeatureConfig) -> Feature:
    """Column ``name`` of every event. Coded columns of the store keep their codes where none is rare.

    The store holds one number a row and event, so ``separator`` is refused. In the store of a day of arriving files
    categories are hashed already, and edges and scales of numbers are those of the first day.
    """
    where, column = f"ranking.event_features.{name}", store.columns.get(name)
    if column is None:
        found = ", ".join([*sorted(store.columns), *DERIVED])
        raise UserError(f"{where}: {store.path} has no such column; it has {found}")
    if config.separator is not None:
        raise UserError(f"{where}.separator={config.separator!r}: an event has one value; leave it out")
    if name in store.meta.get(HASHED, {}):
        return Coded(column, 1 + int(store.meta[HASHED][name]))
    known = store.feature_values(name)
    if known is None:
        return _encode(column, where, config, _on_first_day(store, name))
    num_codes = len(known) + 1
    if config.hash_rows is not None:
        code = np.concatenate([[MISSING], _hashed(known, where, config.hash_rows)])
        return Coded(encoded(column, code.__getitem__), 1 + config.hash_rows)
    if config.kind == "categorical" and config.min_count == 1:
        return Coded(column, num_codes)
    if config.kind == "categorical":
        counts = sum(np.bincount(part, minlength=num_codes) for part in parts(column))
        code, num_codes = _merge_rare(np.asarray(counts), config.min_count)
        return Coded(encoded(column, code.__getitem__), num_codes)
    _check_numbers(known, where, config)
    values = np.concatenate([[np.nan], known.astype(np.float64)])
    return _encode(encoded(column, values.__getitem__), where, config)


def _on_first_day(store: SequenceStore, name: str) -> np.ndarray | None:
    """The event column ``name`` on the first of the days of arriving files; None where the store is none of them."""
    folder = store.meta.get(FIRST_DAY)
    return None if folder is None else np.load(store.path.parent / folder / "columns" / f"{name}.npy", mmap_mode="r")


def time_feature(timestamps: np.ndarray, name: str, utc_offset_hours: float) -> tuple[np.ndarray, int]:
    """Codes int64 of ``hour_of_day`` (1..24) or ``day_of_week`` (1..7, Monday first) and their number, 0 included.

    timestamps: integer, s.
    """
    local = np.asarray(timestamps, np.int64) + round(utc_offset_hours * HOUR_S)
    if name == "hour_of_day":
        return local % DAY_S // HOUR_S + 1, 25
    return (local // DAY_S + EPOCH_WEEKDAY) % 7 + 1, 8


def _attribute(store: SequenceStore, owner: str, name: str) -> Any:
    values = store.user_attribute(name) if owner == "user" else store.item_attribute(name)
    if values is None:
        folder = store.path / f"{owner}s"
        found = ", ".join(sorted(p.stem for p in folder.glob("*.npy") if p.stem != "raw_id")) or "none"
        raise UserError(
            f"ranking.{owner}_features.{name}: {store.path} has no such attribute of {owner}s; found {found}"
        )
    return values


def parts(column: Any) -> Iterator[np.ndarray]:
    """``column`` from front to back, in arrays that fit into memory; at least one."""
    rows = max(1, _PART_BYTES // max(8, column[:0].dtype.itemsize))
    for start in range(0, max(1, len(column)), rows):
        yield np.asarray(column[start : start + rows])


def _encode(raw: Any, name: str, config: FeatureConfig, first: Any = None) -> Feature:
    """first: the column that edges and scales of numbers are taken from; None: ``raw``."""
    if config.kind == "categorical":
        return _codes(raw, name, config)
    _check_numbers(raw[:0], name, config)
    numbers, scale = encoded(raw, _finite), encoded(raw if first is None else first, _finite)
    if config.kind == "buckets":
        return _buckets(numbers, scale, config.num_buckets)
    if config.transform == "log1p":
        least = min(np.nanmin(part, initial=0) for part in parts(numbers))
        if least <= -1:
            raise UserError(f"{name}.transform=log1p: the column holds {least}; expected values > -1")
        numbers, scale = numbers.then(np.log1p), scale.then(np.log1p)
    mean, std = mean_and_scale(moments(_known(part)) for part in parts(scale))
    return Numbers(numbers.then(lambda values: ((values - mean) / std).astype(np.float32)))


def _finite(raw: np.ndarray) -> np.ndarray:
    """float64, NaN where it is no finite number."""
    numbers = raw.astype(np.float64)
    numbers[~np.isfinite(numbers)] = np.nan
    return numbers


def _known(numbers: np.ndarray) -> np.ndarray:
    return numbers[~np.isnan(numbers)]


Moments = tuple[int, float, float]
"""How many values, their mean and their standard deviation; 0 where there is none."""


def moments(values: np.ndarray) -> Moments:
    """Of float64 values."""
    return (len(values), float(values.mean()), float(values.std())) if len(values) else (0, 0.0, 0.0)


def joined_moments(found: Iterable[Moments]) -> Moments:
    """Of all values of the parts."""
    parts = [part for part in found if part[0] > 0]
    if len(parts) < 2:
        return parts[0] if parts else (0, 0.0, 0.0)
    counts, means, stds = np.array(parts).T
    mean = counts @ means / counts.sum()
    variance = counts @ (stds**2 + (means - mean) ** 2) / counts.sum()
    return int(counts.sum()), float(mean), float(np.sqrt(variance))


def mean_and_scale(found: Iterable[Moments]) -> tuple[float, float]:
    """Mean and standard deviation of all values of the parts; the deviation is 1 where they are all the same but for
    rounding."""
    _, mean, std = joined_moments(found)
    return mean, std if std > LEAST_SPREAD * abs(mean) else 1.0


def _check_numbers(raw: np.ndarray, name: str, config: FeatureConfig) -> None:
    if raw.dtype.kind not in "fiub":
        raise UserError(f"{name}.kind={config.kind}: the column holds text; expected numbers, or kind=categorical")


def _codes(raw: Any, name: str, config: FeatureConfig) -> Coded:
    """Codes by ascending value, 0 missing (empty text, NaN), 1 rare where ``min_count`` asks for it; or by hash."""
    cells, counts = distinct(raw)
    offsets, known, at = None, cells, np.arange(len(cells))
    if config.separator is not None and cells.dtype.kind == "U":
        split = [[p for p in c.split(config.separator) if p] or [""] for c in cells.tolist()]
        lengths = np.array([len(part) for part in split], np.int64)
        offsets, counts = np.concatenate([[0], np.cumsum(lengths)]), np.repeat(counts, lengths)
        known, at = np.unique(np.array([p for part in split for p in part], np.str_), return_inverse=True)
    absent = np.isnan(known) if known.dtype.kind == "f" else known == "" if known.dtype.kind == "U" else known != known
    codes = np.where(absent, MISSING, np.cumsum(~absent))[at.reshape(-1)]
    occurs = np.bincount(codes, counts, 1 + int((~absent).sum()))
    renumbered, num_codes = _merge_rare(occurs, config.min_count)
    values = renumbered[codes]
    if config.hash_rows is not None:
        values, num_codes = _hashed(known, name, config.hash_rows)[at.reshape(-1)], 1 + config.hash_rows
    if offsets is None:
        return Coded(encoded(raw, lambda found: values[np.searchsorted(cells, found)]), num_codes)
    return Coded(values, num_codes, offsets, encoded(raw, lambda found: np.searchsorted(cells, found)))


def _hashed(values: np.ndarray, where: str, rows: int) -> np.ndarray:
    try:
        return hash_codes(values, rows)
    except ValueError as error:
        raise UserError(f"{where}.hash_rows={rows}: {error}") from None


def distinct(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """[C] the values that occur in ``column``, ascending (NaN last), and [C] int64 how often."""
    cells, counts = np.empty(0, column[:0].dtype), np.empty(0, np.int64)
    for part in parts(column):
        found, occurs = np.unique(part, return_counts=True)
        cells, place = np.unique(np.concatenate([cells, found]), return_inverse=True)
        counts = np.bincount(place.reshape(-1), np.concatenate([counts, occurs]), len(cells)).astype(np.int64)
    return cells, counts


def _merge_rare(counts: np.ndarray, min_count: int) -> tuple[np.ndarray, int]:
    """int32 new code of each code 0 (missing) .. C-1 such that those that occur less than ``min_count`` times share
    ``RARE``, and the number of codes; 1: as they are. counts: [C]."""
    if min_count == 1:
        return np.arange(len(counts), dtype=np.int32), len(counts)
    kept = counts >= min_count
    kept[MISSING] = False
    code = np.full(len(counts), RARE, np.int32)
    code[MISSING] = MISSING
    code[kept] = RARE + 1 + np.arange(kept.sum())
    return code, RARE + 1 + int(kept.sum())


def _buckets(numbers: Encoded, scale: Encoded, num_buckets: int) -> Coded:
    """Buckets 1..num_buckets of the numbers that are there, of equal mass among those of ``scale``."""
    edges = np.unique(quantiles(scale, np.arange(1, num_buckets) / num_buckets))

    def code(values: np.ndarray) -> np.ndarray:
        missing = np.isnan(values)
        return np.where(missing, MISSING, 1 + np.searchsorted(edges, values, side="right")).astype(np.int32)

    return Coded(numbers.then(code), 2 + len(edges))


def quantiles(numbers: Any, shares: np.ndarray) -> np.ndarray:
    """``np.quantile`` of the column [n] float64 without its NaNs, without a copy of it; empty where all are NaN."""
    count = sum(len(_known(part)) for part in parts(numbers))
    if count == 0:
        return np.empty(0)
    place = (count - 1) * shares
    low = np.floor(place).astype(np.int64)
    share = place - low
    lower, upper = np.split(sorted_values(numbers, np.concatenate([low, np.minimum(low + 1, count - 1)])), 2)
    step = upper - lower
    return np.where(share < 0.5, lower + step * share, upper - step * (1 - share))


def sorted_values(numbers: Any, places: np.ndarray) -> np.ndarray:
    """[k] float64. What stands at ``places`` [k] of the sorted column [n] float64 without its NaNs.

    Digit by digit: each pass counts the next bits of the numbers that agree with a result as far as it is known.
    """
    bits = 16 if len(places) <= _FEW_PLACES else 8
    known, rest = np.zeros(len(places), np.uint64), places.copy()
    for shift in range(64 - bits, -1, -bits):
        wanted, row = np.unique(known, return_inverse=True)
        flat = np.zeros(len(wanted) << bits, np.int64)
        for part in parts(numbers):
            keys = _ascending_bits(_known(part)) >> np.uint64(shift)
            above = keys >> np.uint64(bits)
            place = np.minimum(np.searchsorted(wanted, above), len(wanted) - 1)
            agrees = wanted[place] == above
            digit = (keys[agrees] & np.uint64((1 << bits) - 1)).astype(np.int64)
            flat += np.bincount((place[agrees] << bits) + digit, minlength=len(flat))
        counts = flat.reshape(len(wanted), -1)
        ends = counts.cumsum(axis=1)
        digits = np.array([np.searchsorted(ends[r], k, side="right") for r, k in zip(row, rest, strict=True)])
        rest -= ends[row, digits] - counts[row, digits]
        known = (known << np.uint64(bits)) | digits.astype(np.uint64)
    top = np.uint64(1 << 63)
    return np.where(known >= top, known ^ top, ~known).view(np.float64)


def _ascending_bits(numbers: np.ndarray) -> np.ndarray:
    """uint64 in the order of the float64 ``numbers``: the bits of positive ones ascend with them, of others descend."""
    bits = (numbers + 0.0).view(np.uint64)  # -0 becomes 0
    top = np.uint64(1 << 63)
    return np.where(bits >= top, ~bits, bits | top)
