"""Predictions of actions without a sequence model, for the same table: rates, a linear model, boosted trees.

Everything is counted and fitted on training events only. What was known when an event happened is the same as for
the models: of its own user every earlier event (also earlier test events, with what was done in them), of items and
their features the training events that happened strictly before it. The three rates take the items' whole training
part. Nothing looks at the label of the row itself or of a later one, so training rows get the features they would
have had at the time.

Legend: ``E`` events of the store, ``L`` rows at hand, ``M`` target rows, ``C`` levels (binary: 2; regression: 1 value).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hstu.data.features import Coded, Feature, Numbers, time_feature
from hstu.errors import UserError
from hstu.ranking_metrics import EPSILON

if TYPE_CHECKING:
    from hstu.data.ranking import RankingData

log = logging.getLogger(__name__)

RATES = ("constant rate", "item rate", "user x item rates")
LEARNED = ("logistic regression", "boosted trees")
NAMES = (*RATES, *LEARNED)
"""Systems in table order. For a regression task a rate is a mean, and logistic regression is ridge regression."""
MAX_FIT_ROWS = 500_000
"""The learned baselines are fitted on at most so many training events, the latest."""
RECENT = 10
"""Events of the user's recent rate."""
MAX_CATEGORIES = 255
"""Codes that boosted trees take as categories; a feature with more enters by the past rate of its code alone."""
MIN_STRENGTH, MAX_STRENGTH = 1.0, 1e6
"""Least and most events that the global rate counts for: never none, so that a few equal labels are not certainty."""
LINEAR_C = (0.01, 0.1, 1.0)
"""Inverse L2 penalties tried; the best on the latest tenth of the last MAX_CHOICE_ROWS training events is taken."""
HOLDOUT, MAX_CHOICE_ROWS = 0.1, 250_000
SAME = 1e-9
"""Relative spread of a number below which it is constant but for rounding."""
MAX_SCALED = 10.0
"""Standardised numbers are clipped here, so that a linear model does not run away with an outlier."""
LINEAR_STEPS, LINEAR_TOLERANCE = 100, 1e-4
"""Newton steps at most (it takes about seven), and the largest gradient of the mean loss at which they end."""
TREES = {"learning_rate": 0.05, "max_iter": 400, "max_leaf_nodes": 31, "min_samples_leaf": 50, "l2_regularization": 1.0}
"""Of HistGradientBoosting, which stops early by a random tenth of the training rows."""


def rank_baselines(
    data: RankingData,
    train_rows: np.ndarray,
    target_rows: np.ndarray,
    names: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, dict[str, np.ndarray]]:
    """System -> task -> predictions of the target rows, float64: [M] probability (binary) or value (regression) or
    [M, C] probabilities (multiclass, ordinal), as ``hstu.ranking_metrics`` takes them.

    train_rows, target_rows: int64, event rows of the store; no row in both.
    names: some of ``NAMES``; None: all. Without scikit-learn those of ``LEARNED`` are left out, which is said.
    seed: of boosted trees; everything else has no randomness.

    Raises UserError where a task has no label among the training rows, or a named baseline needs scikit-learn.
    """
    train_rows, target_rows = np.asarray(train_rows, np.int64), np.asarray(target_rows, np.int64)
    wanted = NAMES if names is None else tuple(names)
    unknown = [name for name in wanted if name not in NAMES]
    if unknown:
        raise ValueError(f"names has {unknown[0]!r}: expected some of {', '.join(NAMES)}")
    both = np.intersect1d(train_rows, target_rows)
    if len(both):
        raise ValueError(f"row {both[0]} is in train_rows and in target_rows: a baseline would know its label")
    for task, label in data.labels.items():
        if np.isnan(label[train_rows]).all():
            raise UserError(f"ranking.tasks.{task}: none of the {len(train_rows)} training events has a label")
    found: dict[str, dict[str, np.ndarray]] = {name: {} for name in wanted}
    for task in data.labels:
        for name, values in _rates(data, task, train_rows, target_rows).items():
            if name in found:
                found[name][task] = values
    learned = [name for name in wanted if name in LEARNED]
    if learned and not _have_scikit_learn():
        if names is not None:
            raise UserError(f"the baseline {learned[0]!r} needs scikit-learn: pip install scikit-learn")
        log.warning("without %s: scikit-learn is not installed (pip install scikit-learn)", " and ".join(learned))
        return {name: values for name, values in found.items() if name not in LEARNED}
    if learned:
        _learned(data, train_rows, target_rows, found, seed)
    return found


def _have_scikit_learn() -> bool:
    try:
        import scipy.sparse  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError:
        return False
    return True


# Counting


def credibility(values: np.ndarray, groups: np.ndarray) -> float:
    """How many events the global mean should count for in a group's smoothed mean: within / between variance.

    values: [L]; groups: [L] integer >= 0. Between MIN_STRENGTH and MAX_STRENGTH (groups that do not differ).

    Source: Buehlmann and Straub (1970), Glaubwuerdigkeit fuer Schadensaetze; moments of a one-way layout.
    """
    counts = np.bincount(groups)
    sums = np.bincount(groups, weights=values)[counts > 0]
    counts = counts[counts > 0]
    total, num_groups = len(values), len(counts)
    if total <= num_groups or num_groups < 2:
        return MAX_STRENGTH
    means = sums / counts
    within = float(np.square(values).sum() - (counts * means**2).sum()) / (total - num_groups)
    between = float((counts * (means - values.mean()) ** 2).sum()) / (num_groups - 1)
    size = (total - float((counts.astype(np.float64) ** 2).sum()) / total) / (num_groups - 1)
    spread = (between - within) / size
    return MAX_STRENGTH if spread <= 0 else min(max(within / spread, MIN_STRENGTH), MAX_STRENGTH)


class UserHistory:
    """Sums over the events of the same user before each row, of any per-event values."""

    def __init__(self, data: RankingData, rows: np.ndarray) -> None:
        """rows: [L], in any order."""
        offsets = np.asarray(data.store.offsets)
        self.rows = rows
        self.users = np.searchsorted(offsets, rows, side="right") - 1
        self.starts = offsets[self.users]  # [L]

    def sums(self, values: np.ndarray, recent: int | None = None) -> np.ndarray:
        """float64 [L]: sum of ``values`` [E] over the user's earlier events, or over the ``recent`` last of them."""
        total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
        starts = self.starts if recent is None else np.maximum(self.starts, self.rows - recent)
        return total[self.rows] - total[starts]

    def gap_s(self, timestamps: np.ndarray) -> np.ndarray:
        """float64 [L]: seconds since the user's last event, NaN without one."""
        times = np.asarray(timestamps)
        gap = (times[self.rows] - times[np.maximum(self.rows - 1, 0)]).astype(np.float64)
        return np.where(self.rows > self.starts, gap, np.nan)


class PastOf:
    """Sums over the training events with the same code that happened strictly before each row."""

    def __init__(
        self, codes: np.ndarray, timestamps: np.ndarray, train: np.ndarray, query: np.ndarray, query_codes: np.ndarray
    ) -> None:
        """codes: [training rows]; timestamps: [E]; train, query: event rows; query_codes: [L]."""
        times, place = np.unique(np.asarray(timestamps), return_inverse=True)
        key = codes.astype(np.int64) * len(times) + place[train]
        self.order = np.argsort(key, kind="stable")
        key = key[self.order]
        self.first = np.searchsorted(key, query_codes.astype(np.int64) * len(times))
        self.end = np.searchsorted(key, query_codes.astype(np.int64) * len(times) + place[query])

    @property
    def counts(self) -> np.ndarray:
        return self.end - self.first

    def sums(self, values: np.ndarray) -> np.ndarray:
        """float64 [L]: sums of ``values`` [training rows]."""
        total = np.concatenate([[0.0], np.cumsum(values[self.order], dtype=np.float64)])
        return total[self.end] - total[self.first]


# Rates


def _outcomes(data: RankingData, task: str) -> list[np.ndarray]:
    """What is averaged, float32 [E] each and 0 where the label is missing: is it level c, or the value."""
    config, label = data.config.tasks[task], data.labels[task]
    if config.kind == "regression":
        return [np.nan_to_num(label)]
    return [(label == c).astype(np.float32) for c in range(len(_levels(data, task)))]


def _levels(data: RankingData, task: str) -> list[float]:
    config = data.config.tasks[task]
    return [0.0, 1.0] if config.kind == "binary" else list(config.levels)


def _value(data: RankingData, task: str) -> np.ndarray:
    """float64 [E]: the label as a number, NaN where missing."""
    label = data.labels[task].astype(np.float64)
    if data.config.tasks[task].kind == "regression":
        return label
    known = np.where(np.isnan(label), 0, label).astype(np.int64)
    return np.where(np.isnan(label), np.nan, np.asarray(_levels(data, task))[known])


def _rates(data: RankingData, task: str, train: np.ndarray, target: np.ndarray) -> dict[str, np.ndarray]:
    """Predictions of ``RATES``. Items: all training events. Users: every event of theirs before the target."""
    kind = data.config.tasks[task].kind
    items, value = np.asarray(data.store.item_ids), _value(data, task)
    train = train[~np.isnan(value[train])]
    history = UserHistory(data, target)
    known_before = history.sums(~np.isnan(value))
    item_count = np.bincount(items[train], minlength=data.store.num_items + 1)[items[target]]
    item_strength = credibility(value[train], items[train])
    user_strength = credibility(value[train], UserHistory(data, train).users)
    constant, item, user = [], [], []
    for outcome in _outcomes(data, task):
        mean = outcome[train].mean(dtype=np.float64)
        item_sum = np.bincount(items[train], weights=outcome[train], minlength=data.store.num_items + 1)[items[target]]
        constant.append(np.full(len(target), mean))
        item.append(_smoothed(item_sum, item_count, mean, item_strength))
        user.append(_smoothed(history.sums(outcome), known_before, mean, user_strength))
    parts = [np.stack(columns, axis=1) for columns in (constant, item, user)]  # [M, C] each
    if kind == "regression":
        joined = parts[1] + parts[2] - parts[0]
    else:
        logits = [np.log(np.maximum(part, EPSILON)) for part in parts]
        joined = np.exp(logits[1] + logits[2] - logits[0])
        joined /= joined.sum(axis=1, keepdims=True)
    return dict(zip(RATES, (_of_kind(kind, part) for part in (parts[0], parts[1], joined)), strict=True))


def _smoothed(sums: np.ndarray, counts: np.ndarray, mean: float, strength: float) -> np.ndarray:
    """Means of groups as if each had ``strength`` more events of the global mean; that mean for a group of none."""
    return (sums + strength * mean) / (counts + strength)


def _of_kind(kind: str, outcome: np.ndarray) -> np.ndarray:
    """[M, C] -> the shape of the kind: the positive's column, the value, or all levels."""
    return outcome[:, -1] if kind in ("binary", "regression") else outcome


# What the learned baselines see


class _Table:
    """Features of rows: codes by name (values, lengths, number of codes), and numbers, NaN where missing."""

    def __init__(self, data: RankingData, train: np.ndarray, rows: np.ndarray) -> None:
        """train: the training rows that the past of items is counted from; rows: [L]."""
        self.codes: dict[str, tuple[np.ndarray, np.ndarray, int]] = {}
        self.numbers: dict[str, np.ndarray] = {}
        store, history = data.store, UserHistory(data, rows)
        items, times = np.asarray(store.item_ids), np.asarray(store.timestamps)
        ids = Coded(np.arange(store.num_items + 1), store.num_items + 1)
        owners: dict[str, tuple[Mapping[str, Feature], np.ndarray, np.ndarray]] = {
            "item": ({"id": ids, **data.item_features}, items[train], items[rows]),
            "user": (data.user_features, UserHistory(data, train).users, history.users),
            "event": (data.event_features, train, rows),
        }
        past = {}
        for owner, (features, of_train, of_rows) in owners.items():
            for name, feature in ((f"{owner}.{n}", f) for n, f in features.items()):
                if isinstance(feature, Numbers):
                    self.numbers[name] = feature.values[of_rows].astype(np.float64)
                    continue
                values, lengths = feature.take(of_rows)
                self.codes[name] = values, lengths, feature.num_codes
                if name == "item.id" or feature.num_codes > MAX_CATEGORIES:
                    codes = _first(*feature.take(of_train))
                    past[name] = PastOf(codes, times, train, rows, _first(values, lengths)), codes
                    self.numbers[f"{name} events"] = np.log1p(past[name][0].counts)
        for name in dict.fromkeys([*data.time_features, "hour_of_day"]):
            codes, num_codes = time_feature(times[rows], name, data.config.utc_offset_hours)
            self.codes[f"event.{name}"] = codes, np.ones(len(rows), np.int64), num_codes
        self.numbers["user gap"] = np.log1p(history.gap_s(times))
        self.numbers["user events"] = np.log1p(rows - history.starts)
        for task in data.labels:
            self._add_rates(data, task, train, history, past)

    def _add_rates(
        self, data: RankingData, task: str, train: np.ndarray, history: UserHistory,
        past: Mapping[str, tuple[PastOf, np.ndarray]],
    ) -> None:  # fmt: skip
        """Smoothed means of the task's label before each row: of the user, of the user lately, of items."""
        value = _value(data, task)
        known, filled = ~np.isnan(value), np.nan_to_num(value)
        labelled = train[known[train]]
        mean = float(value[labelled].mean())
        link = _logit if data.config.tasks[task].kind == "binary" else np.asarray
        strength = credibility(value[labelled], UserHistory(data, labelled).users)
        for name, recent in (("user", None), ("user recent", RECENT)):
            sums, counts = history.sums(filled, recent), history.sums(known, recent)
            self.numbers[f"{name} {task}"] = link(_smoothed(sums, counts, mean, strength))
        for name, (before, codes) in past.items():
            strength = credibility(value[labelled], codes[known[train]])
            sums, counts = before.sums(filled[train]), before.sums(known[train])
            self.numbers[f"{name} {task}"] = link(_smoothed(sums, counts, mean, strength))

    def sparse(self, fit: np.ndarray) -> Any:
        """scipy CSR float32 [L, columns]: every code one-hot, numbers standardised by the rows ``fit``, missing 0.

        A number that does not vary there is left out: it can teach nothing, and later values would be out of scale.
        """
        from scipy import sparse

        blocks = []
        for values, lengths, num_codes in self.codes.values():
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            ones = np.ones(len(values), np.float32)
            blocks.append(sparse.csr_matrix((ones, values, offsets), shape=(len(lengths), num_codes)))
        numbers = np.stack(list(self.numbers.values()), axis=1)  # [L, numbers]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a number that is missing in every row: NaN, left out
            mean, std = np.nanmean(numbers[fit], axis=0), np.nanstd(numbers[fit], axis=0)
        varies = std > SAME * (1.0 + np.abs(mean))
        scaled = np.nan_to_num((numbers[:, varies] - mean[varies]) / std[varies]).clip(-MAX_SCALED, MAX_SCALED)
        scaled = scaled.astype(np.float32)
        return sparse.hstack([*blocks, sparse.csr_matrix(scaled)], format="csr")

    def dense(self) -> tuple[np.ndarray, np.ndarray]:
        """float32 [L, columns] and which columns are categories: the codes of features with few, and all numbers."""
        few = [_first(v, n) for v, n, num_codes in self.codes.values() if num_codes <= MAX_CATEGORIES]
        columns = np.stack([*few, *self.numbers.values()], axis=1).astype(np.float32)
        return columns, np.arange(columns.shape[1]) < len(few)


def _first(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The first value of each row; every row has one."""
    return values[np.cumsum(lengths) - lengths]


def _logit(rate: np.ndarray) -> np.ndarray:
    clipped = np.clip(rate, EPSILON, 1.0 - EPSILON)
    return np.log(clipped) - np.log1p(-clipped)


# Fitting


def _learned(
    data: RankingData, train: np.ndarray, target: np.ndarray, found: dict[str, dict[str, np.ndarray]], seed: int
) -> None:
    """Writes the predictions of the ``LEARNED`` systems that ``found`` has into it."""
    times = np.asarray(data.store.timestamps)
    fit = train[np.argsort(times[train], kind="stable")]  # by time: the end of it is the holdout
    if len(fit) > MAX_FIT_ROWS:
        log.warning("learned baselines are fitted on the latest %s of %s training events", MAX_FIT_ROWS, len(fit))
        fit = fit[-MAX_FIT_ROWS:]
    table = _Table(data, train, np.concatenate([fit, target]))
    sparse = table.sparse(np.arange(len(fit))) if LEARNED[0] in found else None
    dense = table.dense() if LEARNED[1] in found else None
    for task, label in data.labels.items():
        kind = data.config.tasks[task].kind
        rows = np.flatnonzero(~np.isnan(label[fit]))
        y = label[fit][rows]
        if y.min() == y.max():  # nothing to learn: that label is certain
            y = y[:1] if kind == "regression" else np.arange(len(_levels(data, task))) == y[0]
            only = _of_kind(kind, np.tile(y.astype(np.float64), (len(target), 1)))
            found |= {name: found[name] | {task: only} for name in LEARNED if name in found}
            continue
        outcomes = {}
        if sparse is not None:
            outcomes[LEARNED[0]] = _linear(kind, sparse[rows], y, sparse[len(fit) :], seed)
        if dense is not None:
            columns, categories = dense
            outcomes[LEARNED[1]] = _trees(kind, columns[rows], y, columns[len(fit) :], categories, seed)
        for name, outcome in outcomes.items():
            if kind != "regression":
                outcome = _all_levels(outcome, np.unique(y), len(_levels(data, task)))
            found[name][task] = _of_kind(kind, outcome)


def _linear(kind: str, x: Any, y: np.ndarray, x_target: Any, seed: int) -> np.ndarray:
    """[M, classes] probabilities or [M, 1] values of a linear model; the penalty is chosen on the latest rows.

    A penalty adds to the sum of the losses, so the best one changes little with the number of rows.
    """
    from sklearn.linear_model import LogisticRegression, Ridge

    def fitted(c: float, rows: slice) -> Any:
        if kind == "regression":
            return Ridge(alpha=1.0 / c, solver="lsqr", random_state=seed).fit(x[rows], y[rows])
        model = LogisticRegression(C=c, solver="newton-cg", max_iter=LINEAR_STEPS, tol=LINEAR_TOLERANCE)
        return model.fit(x[rows], y[rows])

    start = max(0, len(y) - MAX_CHOICE_ROWS)
    early = slice(start, start + int((len(y) - start) * (1.0 - HOLDOUT)))
    late = slice(early.stop, len(y))
    best = LINEAR_C[1]
    if kind == "regression" or len(np.unique(y[early])) == len(np.unique(y)):
        errors = [_error(kind, fitted(c, early), x[late], y[late]) for c in LINEAR_C]
        best = LINEAR_C[int(np.argmin(errors))]
    return _predict(kind, fitted(best, slice(None)), x_target)


def _trees(
    kind: str, x: np.ndarray, y: np.ndarray, x_target: np.ndarray, categories: np.ndarray, seed: int
) -> np.ndarray:
    """As :func:`_linear`, by boosted trees."""
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    maker = HistGradientBoostingRegressor if kind == "regression" else HistGradientBoostingClassifier
    # Too few of a class to be in both parts: no early stopping.
    rare = kind != "regression" and np.unique(y, return_counts=True)[1].min() < 2 / HOLDOUT
    model = maker(
        categorical_features=categories,
        early_stopping=not rare,
        validation_fraction=HOLDOUT,
        random_state=seed,
        **TREES,
    )
    return _predict(kind, model.fit(x, y), x_target)


def _predict(kind: str, model: Any, x: Any) -> np.ndarray:
    if x.shape[0] == 0:  # scikit-learn refuses it
        return np.zeros((0, 1 if kind == "regression" else len(model.classes_)))
    found = model.predict(x)[:, None] if kind == "regression" else model.predict_proba(x)
    return np.asarray(found, np.float64)


def _error(kind: str, model: Any, x: Any, y: np.ndarray) -> float:
    """Mean squared error, or log-loss."""
    found = _predict(kind, model, x)
    if kind == "regression":
        return float(np.square(found[:, 0] - y).mean())
    chosen = found[np.arange(len(y)), np.searchsorted(model.classes_, y)]
    return float(-np.log(np.maximum(chosen, EPSILON)).mean())


def _all_levels(outcome: np.ndarray, classes: np.ndarray, num_levels: int) -> np.ndarray:
    """[M, classes seen] -> [M, C]: 0 for a level that was never seen."""
    full = np.zeros((len(outcome), num_levels))
    full[:, classes.astype(np.int64)] = outcome
    return full
