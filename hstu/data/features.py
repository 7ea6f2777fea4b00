"""Features of users, items and events as codes and standardised numbers. numpy only.

Legend: n rows (users, items or events), V values of all rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hstu.config_ranking import FeatureConfig
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


@dataclass(frozen=True)
class Coded:
    """A categorical feature. Every row has at least one value; code 0 stands for none."""

    values: np.ndarray
    """[V] integer, 0 .. num_codes - 1."""
    num_codes: int
    offsets: np.ndarray | None = None
    """[n+1] int64; row r owns values offsets[r] .. offsets[r+1]. None: one value a row."""

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values int64 of ``rows``, joined, and how many each row has."""
        if self.offsets is None:
            return self.values[rows].astype(np.int64), np.ones(len(rows), np.int64)
        starts, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        ends = np.cumsum(lengths)
        at = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
        return self.values[at].astype(np.int64), lengths


@dataclass(frozen=True)
class Numbers:
    """A numeric feature, standardised; NaN where it is missing."""

    values: np.ndarray
    """[n] float32."""


Feature = Coded | Numbers


def user_feature(store: SequenceStore, name: str, config: FeatureConfig) -> Feature:
    """Attribute ``name`` of every user. Codes, buckets and scales are those of all users, whatever they did."""
    return _encode(_attribute(store, "user", name), f"ranking.user_features.{name}", config)


def item_feature(store: SequenceStore, name: str, config: FeatureConfig) -> Feature:
    """Attribute ``name`` by item id 0..num_items; id 0, the padding, has it missing."""
    feature = _encode(_attribute(store, "item", name), f"ranking.item_features.{name}", config)
    if isinstance(feature, Numbers):
        return Numbers(np.concatenate([[np.float32(np.nan)], feature.values]))
    values = np.concatenate([np.array([MISSING], feature.values.dtype), feature.values])
    offsets = None if feature.offsets is None else np.concatenate([[0], feature.offsets + 1])
    return Coded(values, feature.num_codes, offsets)


def event_feature(store: SequenceStore, name: str, config: FeatureConfig) -> Feature:
    """Column ``name`` of every event. Coded columns of the store keep their codes where none is rare.

    The store holds one number a row and event, so ``separator`` is refused.
    """
    where, column = f"ranking.event_features.{name}", store.columns.get(name)
    if column is None:
        found = ", ".join([*sorted(store.columns), *DERIVED])
        raise UserError(f"{where}: {store.path} has no such column; it has {found}")
    if config.separator is not None:
        raise UserError(f"{where}.separator={config.separator!r}: an event has one value; leave it out")
    known = store.feature_values(name)
    if known is None:
        return _encode(np.asarray(column), where, config)
    if config.kind == "categorical":
        return _merge_rare(column, len(known) + 1, config.min_count)
    _check_numbers(known, where, config)
    values = np.concatenate([[np.nan], known.astype(np.float64)])
    return _encode(values[column], where, config)


def time_feature(timestamps: np.ndarray, name: str, utc_offset_hours: float) -> tuple[np.ndarray, int]:
    """Codes int64 of ``hour_of_day`` (1..24) or ``day_of_week`` (1..7, Monday first) and their number, 0 included.

    timestamps: integer, s.
    """
    local = np.asarray(timestamps, np.int64) + round(utc_offset_hours * HOUR_S)
    if name == "hour_of_day":
        return local % DAY_S // HOUR_S + 1, 25
    return (local // DAY_S + EPOCH_WEEKDAY) % 7 + 1, 8


def _attribute(store: SequenceStore, owner: str, name: str) -> np.ndarray:
    values = store.user_attribute(name) if owner == "user" else store.item_attribute(name)
    if values is None:
        folder = store.path / f"{owner}s"
        found = ", ".join(sorted(p.stem for p in folder.glob("*.npy") if p.stem != "raw_id")) or "none"
        raise UserError(
            f"ranking.{owner}_features.{name}: {store.path} has no such attribute of {owner}s; found {found}"
        )
    return np.asarray(values)


def _encode(raw: np.ndarray, name: str, config: FeatureConfig) -> Feature:
    if config.kind == "categorical":
        return _codes(raw, config)
    _check_numbers(raw, name, config)
    numbers = raw.astype(np.float64)
    numbers[~np.isfinite(numbers)] = np.nan
    if config.kind == "buckets":
        return _buckets(numbers, config.num_buckets)
    if config.transform == "log1p":
        if np.nanmin(numbers, initial=0) <= -1:
            raise UserError(f"{name}.transform=log1p: the column holds {np.nanmin(numbers)}; expected values > -1")
        numbers = np.log1p(numbers)
    known = numbers[~np.isnan(numbers)]
    mean, std = mean_and_scale(known) if len(known) else (0.0, 1.0)
    return Numbers(((numbers - mean) / std).astype(np.float32))


def mean_and_scale(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of ``values`` [n] float64, n > 0; the deviation is 1 where they are all the same
    but for rounding."""
    mean, std = float(values.mean()), float(values.std())
    return mean, std if std > LEAST_SPREAD * abs(mean) else 1.0


def _check_numbers(raw: np.ndarray, name: str, config: FeatureConfig) -> None:
    if raw.dtype.kind not in "fiub":
        raise UserError(f"{name}.kind={config.kind}: the column holds text; expected numbers, or kind=categorical")


def _codes(raw: np.ndarray, config: FeatureConfig) -> Coded:
    """Codes by ascending value: 0 missing (empty text, NaN), 1 rare where ``min_count`` asks for it."""
    cells, cell = np.unique(raw, return_inverse=True)
    cell = cell.reshape(-1)
    offsets = None
    if config.separator is not None and cells.dtype.kind == "U":
        parts = [[p for p in c.split(config.separator) if p] or [""] for c in cells.tolist()]
        split = Coded(np.arange(sum(map(len, parts))), 0, np.cumsum([0, *map(len, parts)]))
        at, lengths = split.take(cell)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        cells, inverse = np.unique(np.array([p for part in parts for p in part]), return_inverse=True)
        cell = inverse.reshape(-1)[at]
    absent = np.isnan(cells) if cells.dtype.kind == "f" else cells == "" if cells.dtype.kind == "U" else cells != cells
    code = np.where(absent, MISSING, np.cumsum(~absent))
    found = _merge_rare(code[cell].astype(np.int32), 1 + int((~absent).sum()), config.min_count)
    return Coded(found.values, found.num_codes, offsets)


def _merge_rare(values: np.ndarray, num_codes: int, min_count: int) -> Coded:
    """Codes 0 (missing) .. num_codes - 1 renumbered so that those that occur less than ``min_count`` times share
    ``RARE``; 1: as they are."""
    if min_count == 1:
        return Coded(values, num_codes)
    kept = np.bincount(values, minlength=num_codes) >= min_count
    kept[MISSING] = False
    code = np.full(num_codes, RARE)
    code[MISSING] = MISSING
    code[kept] = RARE + 1 + np.arange(kept.sum())
    return Coded(code[values].astype(np.int32), RARE + 1 + int(kept.sum()))


def _buckets(numbers: np.ndarray, num_buckets: int) -> Coded:
    """Equal-mass buckets 1..num_buckets of the finite values."""
    finite = np.isfinite(numbers)
    shares = np.arange(1, num_buckets) / num_buckets
    edges = np.unique(np.quantile(numbers[finite], shares)) if finite.any() else np.empty(0)
    code = np.where(finite, 1 + np.searchsorted(edges, numbers, side="right"), MISSING)
    return Coded(code.astype(np.int32), 2 + len(edges))
