"""Ranking data: labels, action bits and features of events, and the sequences that predict them. numpy only.

Legend: U users, E events of the store, L events at hand, S sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from hstu.config_ranking import ActionConfig, RankingConfig, TaskConfig
from hstu.data.features import (
    DERIVED,
    MISSING,
    Coded,
    Encoded,
    Moments,
    event_feature,
    item_feature,
    joined_moments,
    mean_and_scale,
    moments,
    time_feature,
    user_feature,
)
from hstu.errors import UserError

if TYPE_CHECKING:
    from hstu.data.store import SequenceStore

_CHUNK_ROWS = 1 << 22

RawColumns = Mapping[str, np.ndarray]
"""Raw columns of the events at hand [L] by name, ``actions`` among them; where they were read before."""


class RankingData:
    """What a ranking model knows of a store: labels, actions and features, checked once. Columns of users and events
    stay on disk.

    Raises UserError for a column that is not there, a label or an action outside the values that the config names.
    """

    def __init__(self, store: SequenceStore, config: RankingConfig) -> None:
        if not config.use_actions:
            config = replace(config, actions={})
        if not config.use_features:
            config = replace(config, user_features={}, item_features={}, event_features={})
        self.store, self.config = store, config
        self.user_features = {n: user_feature(store, n, c) for n, c in config.user_features.items()}
        self.item_features = {n: item_feature(store, n, c) for n, c in config.item_features.items()}
        stored = {n: c for n, c in config.event_features.items() if n not in DERIVED}
        self.event_features = {n: event_feature(store, n, c) for n, c in stored.items()}
        self.time_features = [n for n in config.event_features if n in DERIVED]
        self._check_values()

    def _check_values(self) -> None:
        """Every label and action of the store, in parts that fit into memory."""
        store, config = self.store, self.config
        columns = {f"tasks.{n}.column": t.column for n, t in config.tasks.items()} | {
            f"actions.{n}": n for n in config.actions
        }
        for where, column in columns.items():
            if store.feature_values(column) is not None:
                raise UserError(
                    f"ranking.{where}={column}: that column of {store.path} holds codes of a feature; import it as a "
                    "value (data.columns.values)"
                )
        for start in range(0, store.num_events, _CHUNK_ROWS):
            rows = np.arange(start, min(start + _CHUNK_ROWS, store.num_events))
            found = {name: column[start : start + _CHUNK_ROWS] for name, column in self.columns.items()}
            for name in config.tasks:
                self.label(name, rows, found)
            self.action_bits(rows, found)

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """The store's event columns, raw, that labels, action bits and :meth:`event_values` are made of."""
        store, tasks = self.store, self.config.tasks
        wanted = [(f"ranking.tasks.{n}.column", t.column) for n, t in tasks.items()]
        wanted += [(f"ranking.tasks.{n}.mask_column", t.mask_column) for n, t in tasks.items() if t.mask_column]
        wanted += [(f"ranking.actions.{n}", n) for n in self.config.actions]
        wanted += [(f"ranking.event_features.{n}", n) for n in self.event_features]
        found = {}
        for where, name in wanted:
            column = store.actions if name == "actions" else store.columns.get(name)
            if column is None:
                names = [*(["actions"] if store.actions is not None else []), *sorted(store.columns)]
                raise UserError(f"{where}={name}: {store.path} has no such column; it has {', '.join(names) or 'none'}")
            found[name] = column
        return found

    def _values(self, column: str, rows: np.ndarray, events: RawColumns | None) -> np.ndarray:
        """float32 [L], a copy."""
        return np.array(self.columns[column][rows] if events is None else events[column], np.float32)

    # Labels

    @cached_property
    def labels(self) -> dict[str, np.ndarray]:
        """float32 [E] by task, NaN where missing; of all events."""
        rows = np.arange(self.store.num_events)
        return {name: self.label(name, rows) for name in self.config.tasks}

    def label(self, task: str, rows: np.ndarray, events: RawColumns | None = None) -> np.ndarray:
        """float32 [L] label of the events ``rows``, NaN where it is missing or masked.

        binary: 0 or 1; multiclass and ordinal: the index of the level; regression: the raw value.
        """
        config = self.config.tasks[task]
        values = self._values(config.column, rows, events)
        if config.mask_column is not None:
            values[np.nan_to_num(self._values(config.mask_column, rows, events)) == 0] = np.nan
        return _label(values, config, f"ranking.tasks.{task}", rows)

    def priors(self, rows: np.ndarray | Iterable[np.ndarray], need_all: bool = True) -> dict[str, list[float]]:
        """What the labels of the events ``rows``, perhaps in parts, are like, by task: the rate [1] (binary), the share
        of each level [C] (multiclass, ordinal), the mean and standard deviation [2] after the transform (regression).

        need_all: raises UserError for a task without any label there; else it is left out.
        """
        tasks, num_rows = self.config.tasks, 0
        levels = {name: np.zeros(len(task.levels), np.int64) for name, task in tasks.items()}
        values: dict[str, list[Moments]] = {name: [] for name in tasks}
        for part in [rows] if isinstance(rows, np.ndarray) else rows:
            num_rows += len(part)
            for name, task in tasks.items():
                label = self.label(name, part)
                label = label[~np.isnan(label)].astype(np.float64)
                values[name].append(moments(np.log1p(label) if task.transform == "log1p" else label))
                if task.levels:
                    levels[name] += np.bincount(label.astype(np.int64), minlength=len(task.levels))
        found = {}
        for name, task in tasks.items():
            count, mean, _ = joined_moments(values[name])
            if count > 0:
                of_value = [mean] if task.kind == "binary" else list(mean_and_scale(values[name]))
                found[name] = (levels[name] / count).tolist() if task.levels else of_value
            elif need_all:
                raise UserError(f"ranking.tasks.{name}: none of {num_rows} training events has a label")
        return found

    # Actions

    @cached_property
    def num_action_bits(self) -> int:
        """Width of :meth:`action_bits`."""
        return sum(num_bits(c) for c in self.config.actions.values())

    def action_bits(self, rows: np.ndarray, events: RawColumns | None = None) -> np.ndarray:
        """bool [L, bits]: what was done in the events ``rows``; the last bit of each column says that it is missing."""
        parts = [np.empty((len(rows), 0), bool)]
        for column, config in self.config.actions.items():
            values = self._values(column, rows, events)
            parts.append(_bits(values, config, f"ranking.actions.{column}", rows))
        return np.concatenate(parts, axis=1)

    # Features of the item token

    @property
    def token_feature_sizes(self) -> dict[str, int]:
        """Codes of each categorical feature of the item token."""
        found = {f"item.{n}": f.num_codes for n, f in self.item_features.items() if isinstance(f, Coded)}
        found |= {f"event.{n}": f.num_codes for n, f in self.event_features.items() if isinstance(f, Coded)}
        return found | {f"event.{n}": time_feature(np.zeros(1), n, 0)[1] for n in self.time_features}

    @property
    def token_number_names(self) -> list[str]:
        """Numeric features of the item token."""
        items = [f"item.{n}" for n, f in self.item_features.items() if not isinstance(f, Coded)]
        return items + [f"event.{n}" for n, f in self.event_features.items() if not isinstance(f, Coded)]

    def token_features(
        self, item_ids: np.ndarray, timestamps: np.ndarray, event_values: dict[str, np.ndarray]
    ) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], np.ndarray]:
        """Features of item tokens: by name (values, lengths) of the categorical ones, and the numbers float32 [L, F].

        item_ids: [L], 0..num_items; timestamps: [L] s; event_values: [L] of each stored event feature (its codes or
        standardised numbers, :meth:`event_values`); one that is left out counts as missing.
        """
        coded, numbers, size = {}, [], len(item_ids)
        for name, feature in self.item_features.items():
            if isinstance(feature, Coded):
                coded[f"item.{name}"] = feature.take(item_ids)
            else:
                numbers.append(feature.values[item_ids])
        for name, feature in self.event_features.items():
            if isinstance(feature, Coded):
                values = event_values.get(name, np.zeros(size, np.int64)).astype(np.int64)
                coded[f"event.{name}"] = values, np.ones(size, np.int64)
            else:
                numbers.append(event_values.get(name, np.full(size, np.nan, np.float32)))
        for name in self.time_features:
            values = time_feature(timestamps, name, self.config.utc_offset_hours)[0]
            coded[f"event.{name}"] = values, np.ones(size, np.int64)
        stacked = np.stack(numbers, axis=1) if numbers else np.empty((size, 0))
        return coded, stacked.astype(np.float32)

    def event_values(self, rows: np.ndarray, events: RawColumns | None = None) -> dict[str, np.ndarray]:
        """Codes or numbers [L] of each stored event feature in the events ``rows``."""
        if events is None:
            return {name: feature.values[rows] for name, feature in self.event_features.items()}
        columns = {name: feature.values for name, feature in self.event_features.items()}
        return {n: c.encode(events[n]) if isinstance(c, Encoded) else events[n] for n, c in columns.items()}

    # Features of the prefix

    @property
    def user_feature_sizes(self) -> dict[str, int]:
        """Codes of each categorical user feature."""
        return {n: f.num_codes for n, f in self.user_features.items() if isinstance(f, Coded)}

    @property
    def user_number_names(self) -> list[str]:
        """Numeric user features."""
        return [n for n, f in self.user_features.items() if not isinstance(f, Coded)]

    def prefix_features(self, users: np.ndarray) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], np.ndarray]:
        """As :meth:`token_features`, of the store's users ``users``; user -1 is nobody: everything missing."""
        known = np.asarray(users) >= 0
        rows = np.where(known, users, 0)
        coded, numbers = {}, []
        for name, feature in self.user_features.items():
            if isinstance(feature, Coded):
                values, lengths = feature.take(rows)
                own = np.repeat(known, lengths)
                own[np.cumsum(lengths) - lengths] = True  # nobody has one value, the missing one
                values = np.where(np.repeat(known, lengths), values, MISSING)[own]
                coded[name] = values, np.where(known, lengths, 1)
            else:
                numbers.append(np.where(known, feature.values[rows], np.nan))
        stacked = np.stack(numbers, axis=1) if numbers else np.empty((len(rows), 0))
        return coded, stacked.astype(np.float32)

    @property
    def num_prefix(self) -> int:
        """Prefix tokens of every user: one a user feature."""
        return len(self.user_features)


def _label(values: np.ndarray, config: TaskConfig, where: str, rows: np.ndarray) -> np.ndarray:
    if config.kind == "regression":
        least = -1.0 if config.transform == "log1p" else -np.inf
        bad = (values <= least) | (values == np.inf)
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            expected = "a finite value" + (" above -1 for transform=log1p" if config.transform == "log1p" else "")
            raise UserError(f"{where}: event {int(rows[at])} has the value {values[at]:g}, expected {expected}")
        return values
    if config.kind == "binary" and config.threshold is not None:
        return np.where(np.isnan(values), np.nan, values >= config.threshold).astype(np.float32)
    levels = [0.0, 1.0] if config.kind == "binary" else config.levels
    hint = "set its threshold" if config.kind == "binary" else "name every level"
    return _level_index(values, levels, where, rows, hint)


def _level_index(values: np.ndarray, levels: list[float], where: str, rows: np.ndarray, hint: str) -> np.ndarray:
    """float32 [L]: index of each value in ``levels``, NaN for NaN."""
    known = np.asarray(levels, np.float32)
    index = np.searchsorted(known, values).clip(max=len(known) - 1)
    bad = ~np.isnan(values) & (known[index] != values)
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        listed = ", ".join(f"{level:g}" for level in levels)
        raise UserError(
            f"{where}: event {int(rows[at])} has the value {values[at]:g}, expected one of {listed}; {hint}"
        )
    return np.where(np.isnan(values), np.nan, index).astype(np.float32)


def num_bits(config: ActionConfig) -> int:
    """Bits of one column's part of the action token."""
    return {"binary": 2, "levels": len(config.levels), "thresholds": 1 + len(config.thresholds)}[config.kind] + 1


def _bits(values: np.ndarray, config: ActionConfig, where: str, rows: np.ndarray) -> np.ndarray:
    """bool [L, bits]; thresholds begin with one that every present value reaches."""
    missing = np.isnan(values)
    if config.kind == "thresholds":
        reached = values[:, None] >= np.asarray(config.thresholds, np.float32)
        present = np.concatenate([~missing[:, None], reached], axis=1)
    else:
        levels = [0.0, 1.0] if config.kind == "binary" else config.levels
        hint = "use kind=levels or thresholds" if config.kind == "binary" else "name every level"
        index = _level_index(values, levels, where, rows, hint)
        present = index[:, None] == np.arange(len(levels))
    return np.concatenate([present, missing[:, None]], axis=1)


# Sequences


@dataclass(frozen=True)
class Sequences:
    """Which events predict which. Of sequence s the rows first[s] .. split[s] are context, split[s] .. stop[s] are
    predicted, each from all before it that the form of the model lets it see."""

    users: np.ndarray
    """[S] int64."""
    first: np.ndarray
    """[S] int64, absolute event row."""
    split: np.ndarray
    stop: np.ndarray

    def __len__(self) -> int:
        return len(self.users)


def cut_interleaved(
    users: np.ndarray, starts: np.ndarray, begins: np.ndarray, ends: np.ndarray, max_len: int, stride: int,
    phases: np.ndarray | None = None,
) -> Sequences:  # fmt: skip
    """Sequences of at most ``max_len`` events in which every event of begins[u] .. ends[u] is predicted once.

    A user whose events from starts[u] to ends[u] fit is one sequence. Of others the first sequence takes what fits,
    the following ones predict ``stride`` events each after as much context as fits.

    users: [U] int64, with at least one event to predict; starts: [U] their first rows; phases: [U] int in
    0 .. stride - 1, by how much the first sequence is shortened (so that cuts fall elsewhere every epoch).
    """
    lead = _lead_interleaved(starts, begins, ends, max_len, stride, phases)
    return _cut(users, starts, begins, ends, lead, stride, lambda split, stop: stop - max_len)


def _lead_interleaved(starts, begins, ends, max_len, stride, phases):  # type: ignore[no-untyped-def]
    """[U] int64: events that the first sequence predicts."""
    fits = ends - starts <= max_len
    room = np.maximum(max_len - (begins - starts), stride)
    if phases is not None:
        room = np.maximum(room - phases, 1)
    return np.where(fits, ends - begins, np.minimum(room, ends - begins))


def cut_fused(
    users: np.ndarray, starts: np.ndarray, begins: np.ndarray, ends: np.ndarray, max_len: int, targets: int,
    phases: np.ndarray | None = None,
) -> Sequences:  # fmt: skip
    """Sequences of at most ``targets`` predicted events after at most ``max_len`` of history; as
    :func:`cut_interleaved`, phases in 0 .. targets - 1."""
    lead = _lead_fused(begins, ends, targets, phases)
    return _cut(users, starts, begins, ends, lead, targets, lambda split, stop: split - max_len)


def _lead_fused(begins, ends, targets, phases):  # type: ignore[no-untyped-def]
    return np.minimum(targets if phases is None else targets - phases, ends - begins)


def count_interleaved(lengths: np.ndarray, max_len: int, stride: int, phases: np.ndarray | None = None) -> int:
    """How many sequences :func:`cut_interleaved` makes of users whose events are all predicted. lengths: [U] int64."""
    lead = _lead_interleaved(0, 0, lengths, max_len, stride, phases)
    return int(_counts(lengths - lead, stride).sum())


def count_fused(lengths: np.ndarray, max_len: int, targets: int, phases: np.ndarray | None = None) -> int:
    """As :func:`count_interleaved`, of :func:`cut_fused`."""
    return int(_counts(lengths - _lead_fused(0, lengths, targets, phases), targets).sum())


def _counts(rest, step):  # type: ignore[no-untyped-def]
    """Sequences of users of whose events ``rest`` follow the first sequence."""
    return 1 + -(-rest // step)


def _cut(users, starts, begins, ends, lead, step, earliest):  # type: ignore[no-untyped-def]
    counts = _counts(ends - begins - lead, step)
    owner = np.repeat(np.arange(len(users)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    split = begins[owner] + np.where(number == 0, 0, lead[owner] + (number - 1) * step)
    stop = np.minimum(begins[owner] + lead[owner] + number * step, ends[owner])
    first = np.maximum(starts[owner], earliest(split, stop))
    return Sequences(users[owner], first, split, stop)
