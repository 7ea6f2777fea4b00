"""The features of a planned ranking model: tables beside the item table, prefix tokens, numbers.

Which there are is what ``ranking`` says; how many rows their tables have only the log knows, so it is an option.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hstu.config import build
from hstu.config_embedding import SHARDINGS
from hstu.config_ranking import FeatureConfig, RankingConfig
from hstu.data.features import DERIVED, time_feature
from hstu.errors import UserError, check, one_of

ASSUMED_ROWS = 1000
"""Of a categorical feature of which nothing is said; the screen names those."""
OWNERS = ("item", "user")


@dataclass
class FeaturePlanConfig:
    """The table of one feature; a row is as wide as one of the item table."""

    rows: int | None = None
    """Values that the feature has; ``1e8`` is understood. null: what ``ranking`` says of it, or 1,000."""
    values: float = 1.0
    """Values of one item, event or user, on average: those of text with a separator are summed."""
    of: str | None = None
    """item (or event) or user, for a feature that ``ranking`` does not name. null: item."""
    sharding: str | None = None
    """As embedding.sharding; data_parallel: whole on every GPU. null: embedding.sharding."""

    def __post_init__(self) -> None:
        check(self.rows is None or self.rows >= 1, "features.*.rows", self.rows, ">= 1 or null")
        check(self.values > 0, "features.*.values", self.values, "> 0")
        if self.of is not None:
            one_of("features.*.of", self.of, OWNERS)
        if self.sharding is not None:
            one_of("features.*.sharding", self.sharding, SHARDINGS)


@dataclass(frozen=True)
class FeatureTable:
    """A table of codes.

    Attributes:
        of: item (of the event or its item) or user.
        rows: codes, that of a missing value included.
        values: of one row, on average.
        sharding: null: that of the item table.
        assumed: nothing was said of the rows.
    """

    name: str
    of: str
    rows: int
    values: float = 1.0
    sharding: str | None = None
    assumed: bool = False


@dataclass(frozen=True)
class Features:
    """All of them. numbers: numeric features of the item token; user_numbers: those of users, a prefix token each."""

    tables: tuple[FeatureTable, ...] = ()
    numbers: int = 0
    user_numbers: int = 0

    def of(self, owner: str) -> list[FeatureTable]:
        """The tables of item or user."""
        return [table for table in self.tables if table.of == owner]

    @property
    def num_prefix(self) -> int:
        """Prefix tokens of a sequence, one for each feature of users."""
        return len(self.of("user")) + self.user_numbers


def plan_features(ranking: RankingConfig, given: Mapping[str, FeaturePlanConfig]) -> Features:
    """The features that ``ranking`` names and those that are only given. A name that items have already is that of an
    event with ``event_`` before it, that of a user with ``user_``.

    Raises UserError for a name that is nearly one of ranking's, and for what a number cannot have.
    """
    if not ranking.use_features:
        return Features()
    named: dict[str, tuple[str, FeatureConfig]] = {}
    groups = {"item": ranking.item_features, "event": ranking.event_features, "user": ranking.user_features}
    for group, features in groups.items():
        for name, config in features.items():
            named[f"{group}_{name}" if name in named else name] = ("user" if group == "user" else "item"), config
    tables, numbers = [], {"item": 0, "user": 0}
    for name, (owner, config) in named.items():
        if config.kind != "numeric":
            tables.append(_named_table(name, owner, config, given.get(name)))
            continue
        if name in given:
            raise UserError(f"features.{name}: ranking has it as a number, which has no table; leave it out")
        numbers[owner] += 1
    for name in given.keys() - named.keys():
        if near := difflib.get_close_matches(name, named, n=1, cutoff=0.7):
            raise UserError(f"features.{name}: ranking has no such feature; did you mean {near[0]}?")
    tables += [_table(name, extra.of or "item", extra) for name, extra in given.items() if name not in named]
    return Features(tuple(tables), numbers["item"], numbers["user"])


def _named_table(name: str, owner: str, config: FeatureConfig, given: FeaturePlanConfig | None) -> FeatureTable:
    given = given or FeaturePlanConfig()
    if given.of not in (None, owner):
        raise UserError(f"features.{name}.of={given.of}: ranking has it as a feature of the {owner}; leave that out")
    known = config.hash_rows
    if config.kind == "buckets":
        known = config.num_buckets
    elif name.removeprefix("event_") in DERIVED:
        known = time_feature(np.zeros(1), name.removeprefix("event_"), 0)[1] - 1
    return _table(name, owner, given, known)


def _table(name: str, owner: str, given: FeaturePlanConfig, known: int | None = None) -> FeatureTable:
    rows = known if given.rows is None else given.rows
    return FeatureTable(
        name, owner, 1 + (ASSUMED_ROWS if rows is None else rows), given.values, given.sharding, rows is None
    )  # fmt: skip


def from_options(values: Mapping[str, Any]) -> dict[str, FeaturePlanConfig]:
    """``{name: rows}`` or ``{name: {rows: .., values: ..}}`` as configs."""
    found = {}
    for name, value in values.items():
        options = dict(value) if isinstance(value, Mapping) else {"rows": value}
        found[str(name)] = build(FeaturePlanConfig, options, f"features.{name}.")
    return found
