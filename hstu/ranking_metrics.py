"""Metrics of predicted actions: normalised entropy, AUC, AUC per user, calibration, errors; intervals; streaming.

Kinds of task, and what :func:`evaluate` gives for each (in table order: ``METRICS``):

- ``binary``: labels 0 or 1, predictions [M] probabilities of 1.
- ``multiclass`` and ``ordinal``: labels are level indices 0..C-1, predictions [M, C] probabilities; ``levels`` [C]
  are the values the levels stand for.
- ``regression``: labels and predictions [M] in the task's own unit.

A NaN label is missing: its row is counted as missing and otherwise left out.

    log_loss = mean of -ln p(label), nats, probabilities clipped to at least EPSILON
    ne = log_loss / entropy of the labels' own distribution over the evaluated rows; 1 is the best constant
    auc = share of (positive, negative) pairs in which the positive scores higher, ties counted by half
    gauc = mean of the users' own AUC over users with both labels; gauc_weighted weighs them by their rows
    calibration = mean prediction / mean label

Read gauc with care where a system sees what its user did in earlier test events: of a user with one positive and one
negative row, the user's past rate is right in neither order (a positive first raises it for the negative after it),
so the better it follows the user's rate, the lower its gauc. A system whose user part stands still is not hit by that.

Source of ne: He et al., Practical Lessons from Predicting Clicks on Ads at Facebook (ADKDD 2014), section 3.

Legend: ``M`` predictions, ``U`` users, ``C`` levels, ``S`` sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from hstu.metrics import resampled_counts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

METRICS = {
    "binary": ("auc", "gauc", "gauc_weighted", "ne", "log_loss", "calibration", "rate"),
    "multiclass": ("ne", "log_loss", "accuracy", "mae", "rmse"),
    "ordinal": ("ne", "log_loss", "accuracy", "mae", "rmse"),
    "regression": ("mae", "rmse", "calibration"),
}
"""Metric names of each kind of task, in table order. ``rate`` (the mean label) describes the data, not a system."""
HIGHER_IS_BETTER = {
    "auc": True, "gauc": True, "gauc_weighted": True, "accuracy": True,
    "ne": False, "log_loss": False, "mae": False, "rmse": False,
}  # fmt: skip
EPSILON = 1e-7
"""Probabilities are clipped to [EPSILON, 1 - EPSILON] before a logarithm: about float32's distance from 1."""
PROBABILITY_SUM_TOLERANCE = 1e-3
"""How far the probabilities of one row may be from adding up to 1; half precision needs about this much."""
LOGIT_BINS = 2**16
"""Bins of the bounded AUC's histogram, equally wide in the logit between those of EPSILON and 1 - EPSILON: 0.0005."""
HISTOGRAM_BINS = 1000
"""Equally wide bins over [0, 1] of a reliability curve's histogram; a plot joins neighbours."""
WILSON_Z = 1.959964
"""Two-sided 95 % point of the normal distribution."""


class Evaluation(TypedDict):
    """What is known of one system on one task."""

    metrics: dict[str, float]
    """By name, in the order of ``METRICS``; NaN where it is not defined."""
    counts: dict[str, int]
    """``rows`` evaluated, ``missing`` labels; of a binary task also ``gauc_users``, the users with both labels."""
    reasons: dict[str, str]
    """Why a metric is NaN, for each that is."""


def higher_is_better(metric_name: str) -> bool:
    """Direction of a metric, ``METRIC`` or ``TASK/METRIC``; ValueError for one without a direction (calibration)."""
    name = metric_name.rpartition("/")[2]
    if name not in HIGHER_IS_BETTER:
        raise ValueError(f"metric {metric_name!r} has no direction: expected one of {', '.join(HIGHER_IS_BETTER)}")
    return HIGHER_IS_BETTER[name]


# Checked input and the sums that the metrics are made of


@dataclass(frozen=True)
class Rows:
    """Checked rows with a label."""

    labels: np.ndarray
    """[M] float64."""
    predictions: np.ndarray
    """[M] or [M, C] float64."""
    users: np.ndarray
    """[M] int64."""
    missing: int
    """Number of rows left out for their NaN label."""


def check_levels(kind: str, levels: Sequence[float] | np.ndarray | None) -> np.ndarray | None:
    """``levels`` as float64 [C], None for the kinds without levels; ValueError where kind and levels do not fit."""
    if kind not in METRICS:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(METRICS)}")
    if kind not in ("multiclass", "ordinal"):
        if levels is not None:
            raise ValueError(f"levels were given for a {kind} task: leave them out")
        return None
    values = np.asarray([] if levels is None else levels, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"levels={levels}: a {kind} task needs the finite values of two or more levels")
    return values


def check_rows(
    kind: str, labels: np.ndarray, predictions: np.ndarray, users: np.ndarray, levels: np.ndarray | None
) -> Rows:
    """The rows with a label, in float64. Raises ValueError for anything that would give a wrong number."""
    labels = np.asarray(labels, dtype=np.float64)
    predictions = np.asarray(predictions, dtype=np.float64)
    users = np.asarray(users)
    shape = labels.shape if levels is None else (*labels.shape, len(levels))
    if labels.ndim != 1 or predictions.shape != shape or users.shape != labels.shape:
        raise ValueError(
            f"labels {labels.shape}, predictions {predictions.shape}, users {users.shape} of a {kind} task: "
            f"expected [M], [M{'' if levels is None else f', {len(levels)}'}], [M]"
        )
    if users.dtype.kind not in "iu" and len(users):
        raise ValueError(f"users has dtype {users.dtype}: expected integers")
    _check_predictions(kind, predictions)
    known = ~np.isnan(labels)
    labels = labels[known]
    if kind == "regression":
        wrong = ~np.isfinite(labels)
    else:
        last = 1 if levels is None else len(levels) - 1
        wrong = (labels < 0) | (labels > last) | (labels != np.floor(labels))
    if wrong.any():
        expected = "finite values" if kind == "regression" else f"whole numbers 0..{last}"
        raise ValueError(f"labels contains {labels[wrong][0]}: expected {expected}, or NaN where it is missing")
    return Rows(labels, predictions[known], users[known].astype(np.int64), int(len(known) - known.sum()))


def _check_predictions(kind: str, predictions: np.ndarray) -> None:
    if kind == "regression":
        wrong, expected = ~np.isfinite(predictions), "finite values"
    else:
        wrong, expected = ~((predictions >= 0.0) & (predictions <= 1.0)), "probabilities in 0..1"
    if wrong.any():
        raise ValueError(f"predictions contains {predictions[wrong][0]}: expected {expected}")
    if predictions.ndim == 2:
        total = predictions.sum(axis=1)
        off = np.abs(total - 1.0) > PROBABILITY_SUM_TOLERANCE
        if off.any():
            raise ValueError(f"predictions has a row that adds up to {total[off][0]}: expected 1")


def _columns(kind: str, rows: Rows, levels: np.ndarray | None) -> np.ndarray:
    """What each row adds to the sums, float64 [M, S]; :func:`_from_sums` knows the order."""
    y, p = rows.labels, rows.predictions
    ones = np.ones(len(y))
    if kind == "binary":
        clipped = np.clip(p, EPSILON, 1.0 - EPSILON)
        return np.stack([ones, -np.where(y == 1, np.log(clipped), np.log1p(-clipped)), y, p], axis=1)
    if levels is None:
        error = p - y
        return np.stack([ones, np.abs(error), error * error, y, p], axis=1)
    index = y.astype(np.int64)
    nll = -np.log(np.clip(p[np.arange(len(y)), index], EPSILON, 1.0 - EPSILON))
    right = p.argmax(axis=1) == index  # of equally likely levels the lowest is the answer
    error = p @ levels - levels[index]
    one_hot = index[:, None] == np.arange(len(levels))  # [M, C]
    return np.column_stack([ones, nll, right, np.abs(error), error * error, one_hot])


def _from_sums(kind: str, sums: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric that sums over rows decide, [...] each, from sums [..., S]; NaN where it is not defined."""
    mean = _ratio(sums, sums[..., :1])
    if kind == "regression":
        calibration = _ratio(sums[..., 4], sums[..., 3])
        return {"mae": mean[..., 1], "rmse": np.sqrt(mean[..., 2]), "calibration": calibration}
    if kind == "binary":
        rate = mean[..., 2]
        entropy = _entropy(np.stack([rate, 1.0 - rate], axis=-1))
        calibration = _ratio(sums[..., 3], sums[..., 2])
        ne = _ratio(mean[..., 1], entropy)
        return {"ne": ne, "log_loss": mean[..., 1], "calibration": calibration, "rate": rate}
    return {
        "ne": _ratio(mean[..., 1], _entropy(mean[..., 5:])), "log_loss": mean[..., 1], "accuracy": mean[..., 2],
        "mae": mean[..., 3], "rmse": np.sqrt(mean[..., 4]),
    }  # fmt: skip


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """``above / below``, NaN where ``below`` is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below == 0, np.nan, above / below)


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    """In nats over the last axis, with 0 ln 0 = 0."""
    return -(probabilities * np.log(np.where(probabilities == 0, 1.0, probabilities))).sum(axis=-1)


# AUC


@dataclass(frozen=True)
class _Pairs:
    """Rows sorted once, so that the AUC of any weights needs no further sorting."""

    positives: np.ndarray
    """Rows of positives, by ascending prediction."""
    negatives: np.ndarray
    """Rows of negatives, by ascending prediction."""
    below: np.ndarray
    """For each of ``positives``: number of negatives that score lower."""
    upto: np.ndarray
    """For each of ``positives``: number of negatives that score lower or the same."""

    @classmethod
    def of(cls, labels: np.ndarray, predictions: np.ndarray) -> _Pairs:
        order = np.argsort(predictions, kind="stable")
        positives, negatives = order[labels[order] == 1], order[labels[order] == 0]
        sides = [np.searchsorted(predictions[negatives], predictions[positives], s) for s in ("left", "right")]  # type: ignore[call-overload]
        return cls(positives, negatives, *sides)

    def auc(self, weights: np.ndarray) -> float:
        """AUC with row weights [M] float64; NaN where one label has no weight."""
        above, total = weights[self.positives], np.zeros(len(self.negatives) + 1)
        np.cumsum(weights[self.negatives], out=total[1:])
        pairs = above.sum() * total[-1]
        return float(0.5 * (above @ (total[self.below] + total[self.upto])) / pairs) if pairs > 0 else np.nan


def auc(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Exact AUC of labels [M] in {0, 1}, ties by half; NaN where only one label occurs.

    predictions: [M], scores of any scale; NaN labels are left out.
    """
    labels, scores = np.asarray(labels, dtype=np.float64), np.asarray(predictions, dtype=np.float64)
    if np.isnan(scores).any():
        raise ValueError("predictions contains nan: expected numbers")
    known = ~np.isnan(labels)
    return _Pairs.of(labels[known], scores[known]).auc(np.ones(int(known.sum())))


def user_aucs(
    labels: np.ndarray, predictions: np.ndarray, users: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``(user, auc, rows)`` of the users with both labels, by ascending user: int64, float64, int64 [U] each.

    labels: [M] in {0, 1}; predictions, users: [M]. One sort over (user, prediction), no loop over users.
    """
    if len(labels) == 0:
        return np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64)
    order = np.lexsort((predictions, users))
    y, p, u = labels[order], predictions[order], users[order]
    first = np.ones(len(u), dtype=bool)
    first[1:] = u[1:] != u[:-1]
    tie_first = first.copy()
    tie_first[1:] |= p[1:] != p[:-1]
    starts, tie_starts = np.flatnonzero(first), np.flatnonzero(tie_first)
    negatives = np.concatenate([[0.0], np.cumsum(1.0 - y)])  # [M+1], before each row
    tie = np.cumsum(tie_first) - 1
    below, upto = negatives[tie_starts][tie], negatives[np.append(tie_starts[1:], len(u))][tie]
    won = y * (0.5 * (below + upto) - negatives[starts][np.cumsum(first) - 1])
    rows = np.diff(np.append(starts, len(u)))
    positive = np.add.reduceat(y, starts)
    pairs = positive * (rows - positive)
    both = pairs > 0
    return u[starts][both], np.add.reduceat(won, starts)[both] / pairs[both], rows[both]


def _user_sums(rows: Rows) -> np.ndarray:
    """Over the users with both labels: sums of 1, AUC, rows and rows x AUC, float64 [4]."""
    _, values, sizes = user_aucs(rows.labels, rows.predictions, rows.users)
    return np.array([len(values), values.sum(), sizes.sum(), sizes @ values])


# Evaluation


def evaluate(
    kind: str,
    labels: np.ndarray,
    predictions: np.ndarray,
    users: np.ndarray,
    levels: Sequence[float] | None = None,
) -> Evaluation:
    """Every metric of ``METRICS[kind]`` exactly.

    labels: [M], NaN where missing; predictions: [M] or [M, C]; users: [M] integers; levels: [C] values of the
    levels of a multiclass or ordinal task.

    Raises ValueError for labels that are none of the kind's, for probabilities outside of 0..1 or NaN.
    """
    values = check_levels(kind, levels)
    rows = check_rows(kind, labels, predictions, users, values)
    sums = _columns(kind, rows, values).sum(axis=0)
    if kind != "binary":
        return _evaluation(kind, sums, rows.missing)
    exact = _Pairs.of(rows.labels, rows.predictions).auc(np.ones(len(rows.labels)))
    return _evaluation(kind, sums, rows.missing, exact, _user_sums(rows))


def _evaluation(
    kind: str, sums: np.ndarray, missing: int, auc: float = np.nan, user_sums: np.ndarray | None = None
) -> Evaluation:
    """The metrics from the sums over all rows, and the reason for each that is NaN."""
    found = {name: float(value) for name, value in _from_sums(kind, sums).items()}
    counts = {"rows": int(sums[0]), "missing": missing}
    if user_sums is not None:
        gauc, gauc_weighted = _ratio(user_sums[[1, 3]], user_sums[[0, 2]]).tolist()
        found |= {"auc": auc, "gauc": gauc, "gauc_weighted": gauc_weighted}
        counts["gauc_users"] = int(user_sums[0])
    metrics = {name: found[name] for name in METRICS[kind]}
    rows = f"all {counts['rows']} rows have the same label"
    why = {"auc": rows, "ne": rows, "calibration": "the mean label is 0"}
    why |= dict.fromkeys(("gauc", "gauc_weighted"), "no user has rows of both labels")
    if counts["rows"] == 0:
        why = dict.fromkeys(metrics, "no row has a label")
    return {"metrics": metrics, "counts": counts, "reasons": {n: why[n] for n, v in metrics.items() if v != v}}


def bootstrap(
    kind: str,
    labels: np.ndarray,
    predictions: np.ndarray,
    users: np.ndarray,
    levels: Sequence[float] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    block_mib: int = 64,
) -> dict[str, tuple[float, float]]:
    """Percentile intervals over users: whole users are drawn, with all their rows.

    Arguments as in :func:`evaluate`; every metric of the kind but ``rate``. Resamples in which a metric is not
    defined (one label only) are left out of its interval; (NaN, NaN) where it is defined in none.
    resamples: number of draws of U users with replacement, U the users with a label; 0 gives an empty dict.
    block_mib: bound of the memory for the draws held at once.

    A user's own AUC does not change with how often the user is drawn, and the rows are sorted once, so a resample
    costs a few passes over the rows.
    """
    values = check_levels(kind, levels)
    rows = check_rows(kind, labels, predictions, users, values)
    if resamples == 0 or len(rows.labels) == 0:
        return {}
    names, code = np.unique(rows.users, return_inverse=True)
    sums = _group_sums(_columns(kind, rows, values), code, len(names))  # [U, S]
    pairs = own = None
    if kind == "binary":
        pairs = _Pairs.of(rows.labels, rows.predictions)
        found, aucs, sizes = user_aucs(rows.labels, rows.predictions, rows.users)
        own = np.zeros((len(names), 4))
        own[np.searchsorted(names, found)] = np.stack([np.ones(len(found)), aucs, sizes, sizes * aucs], axis=1)
    blocks: dict[str, list[np.ndarray]] = {}
    for times in resampled_counts(len(names), resamples, seed, block_mib):  # [rows, U]
        drawn = _from_sums(kind, times @ sums)
        if pairs is not None and own is not None:
            drawn["auc"] = np.array([pairs.auc(row[code]) for row in times])
            user_sums = times @ own
            drawn["gauc"] = _ratio(user_sums[:, 1], user_sums[:, 0])
            drawn["gauc_weighted"] = _ratio(user_sums[:, 3], user_sums[:, 2])
        for name, value in drawn.items():
            blocks.setdefault(name, []).append(value)
    tail = 100.0 * (1.0 - confidence) / 2.0
    return {n: _interval(np.concatenate(blocks[n]), tail) for n in METRICS[kind] if n != "rate"}


def _group_sums(columns: np.ndarray, code: np.ndarray, groups: int) -> np.ndarray:
    return np.stack([np.bincount(code, weights=column, minlength=groups) for column in columns.T], axis=1)


def _interval(values: np.ndarray, tail: float) -> tuple[float, float]:
    values = values[~np.isnan(values)]
    low, high = np.percentile(values, [tail, 100.0 - tail]) if len(values) else (np.nan, np.nan)
    return float(low), float(high)


# Reliability


@dataclass(frozen=True)
class Reliability:
    """A binary task's rows in bins of about equally many, by ascending prediction; arrays [bins]."""

    mean_prediction: np.ndarray
    mean_label: np.ndarray
    count: np.ndarray
    """int64."""
    low: np.ndarray
    """Lower end of the 95 % Wilson interval of ``mean_label``."""
    high: np.ndarray
    histogram: np.ndarray
    """int64 [HISTOGRAM_BINS], predictions in equally wide bins over [0, 1]."""


def reliability(labels: np.ndarray, predictions: np.ndarray, bins: int = 15) -> Reliability:
    """What was predicted against what happened, in ``bins`` bins of about equal mass.

    labels: [M] 0, 1 or NaN (left out); predictions: [M] probabilities. Equal predictions are never split over two
    bins, so there may be fewer bins than asked for; no row gives no bin.

    Source of the interval: Wilson, Probable inference, the law of succession, and statistical inference (1927).
    """
    if bins < 1:
        raise ValueError(f"bins={bins}: expected 1 or more")
    rows = check_rows("binary", labels, predictions, np.zeros(len(labels), np.int64), None)
    order = np.argsort(rows.predictions, kind="stable")
    p, y = rows.predictions[order], rows.labels[order]
    histogram = np.histogram(p, bins=HISTOGRAM_BINS, range=(0.0, 1.0))[0]
    if len(p) == 0:
        none = np.zeros(0)
        return Reliability(none, none, np.zeros(0, np.int64), none, none, histogram)
    cuts = np.arange(bins) * len(p) // bins
    starts = np.unique(np.searchsorted(p, p[cuts], side="left"))
    count = np.diff(np.append(starts, len(p)))
    share = np.add.reduceat(y, starts) / count
    z2 = WILSON_Z**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = WILSON_Z / (1 + z2 / count) * np.sqrt(share * (1 - share) / count + z2 / (4.0 * count * count))
    return Reliability(np.add.reduceat(p, starts) / count, share, count, centre - half, centre + half, histogram)


# Streaming


class MetricAccumulator:
    """Metrics of predictions that arrive in parts, over several processes if need be.

    exact=True keeps every row (24 bytes, more with levels) and gives what :func:`evaluate` gives for all of them.
    exact=False needs bounded memory (1 MiB):

    - metrics made of sums are the same to float64 rounding;
    - AUC comes from a histogram of the logit with LOGIT_BINS bins for each label, in which predictions of one bin
      are ties; it is off by at most :meth:`auc_error_bound`, half the share of pairs that fall into one bin;
    - GAUC is exact where all rows of a user come in one ``update``; a user split over several counts as several.

    kind, levels: as in :func:`evaluate`.
    """

    def __init__(self, kind: str, levels: Sequence[float] | None = None, exact: bool = True) -> None:
        self.kind, self.levels, self.exact = kind, check_levels(kind, levels), exact
        width = {"binary": 4, "regression": 5}.get(kind, 5 + len(levels or ()))
        self.missing = 0
        self._parts: list[Rows] = []
        self._sums = np.zeros(width)
        self._histogram = np.zeros((2, LOGIT_BINS if kind == "binary" and not exact else 0), dtype=np.int64)
        self._user_sums = np.zeros(4)

    def update(self, labels: np.ndarray, predictions: np.ndarray, users: np.ndarray) -> None:
        """Adds rows; arguments and errors as in :func:`evaluate`. Nothing is added when it raises."""
        rows = check_rows(self.kind, labels, predictions, users, self.levels)
        self.missing += rows.missing
        if self.exact:
            self._parts.append(rows)
            return
        self._sums += _columns(self.kind, rows, self.levels).sum(axis=0)
        if self.kind == "binary":
            key = _logit_bin(rows.predictions) + LOGIT_BINS * rows.labels.astype(np.int64)
            self._histogram += np.bincount(key, minlength=2 * LOGIT_BINS).reshape(2, LOGIT_BINS)
            self._user_sums += _user_sums(rows)

    def merge(self, other: MetricAccumulator) -> None:
        """Adds what ``other`` has seen; ValueError where it counts something else."""
        self._add(other._state())

    def state_dict(self) -> dict[str, Any]:
        """Everything seen so far, as plain values and tensors, so that a checkpoint can hold it."""
        import torch

        state = self._state()
        return {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a ``state_dict`` in place of what was seen; ValueError where it counts something else."""
        self._check_same(state)
        self.missing, self._parts = 0, []
        for total in (self._sums, self._histogram, self._user_sums):
            total[...] = 0
        self._add(state)

    def reduce(self, process_group: ProcessGroup | None = None) -> MetricAccumulator:
        """A new accumulator of what all processes of the group have seen, the same on each. Collective.

        process_group: default the world. This accumulator stays as it is, so calling twice counts nothing twice.
        """
        import torch.distributed as dist

        states: list[Any] = [None] * dist.get_world_size(process_group)
        dist.all_gather_object(states, self._state(), group=process_group)
        levels = None if self.levels is None else self.levels.tolist()
        total = MetricAccumulator(self.kind, levels, self.exact)
        for state in states:  # in the order of the ranks, so every rank adds up the same way
            total._add(state)
        return total

    def compute(self) -> Evaluation:
        """The metrics of everything seen so far."""
        if self.exact:
            rows = self._rows()
            levels = None if self.levels is None else self.levels.tolist()
            found = evaluate(self.kind, rows.labels, rows.predictions, rows.users, levels)
            found["counts"]["missing"] = self.missing
            return found
        if self.kind != "binary":
            return _evaluation(self.kind, self._sums, self.missing)
        negatives, positives = self._histogram.astype(np.float64)
        below = np.cumsum(negatives) - negatives
        pairs = positives.sum() * negatives.sum()
        auc = float(positives @ (below + 0.5 * negatives) / pairs) if pairs > 0 else np.nan
        return _evaluation(self.kind, self._sums, self.missing, auc, self._user_sums)

    def auc_error_bound(self) -> float:
        """How far the bounded AUC can be from the exact one; 0 with exact=True, NaN where AUC is not defined."""
        if self.exact or self.kind != "binary":
            return 0.0
        negatives, positives = self._histogram.astype(np.float64)
        pairs = positives.sum() * negatives.sum()
        return float(0.5 * (positives @ negatives) / pairs) if pairs > 0 else np.nan

    def _rows(self) -> Rows:
        empty = np.zeros((0,) if self.levels is None else (0, len(self.levels)))
        return Rows(
            np.concatenate([np.zeros(0), *[part.labels for part in self._parts]]),
            np.concatenate([empty, *[part.predictions for part in self._parts]]),
            np.concatenate([np.zeros(0, np.int64), *[part.users for part in self._parts]]),
            0,
        )

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"kind": self.kind, "exact": self.exact, "missing": self.missing}
        state["levels"] = None if self.levels is None else self.levels.tolist()
        if self.exact:
            rows = self._rows()
            return state | {"labels": rows.labels, "predictions": rows.predictions, "users": rows.users}
        return state | {"sums": self._sums, "histogram": self._histogram, "user_sums": self._user_sums}

    def _check_same(self, state: Mapping[str, Any]) -> None:
        mine = (self.kind, self.exact, None if self.levels is None else self.levels.tolist())
        theirs = (state["kind"], state["exact"], state["levels"])
        if mine != theirs:
            raise ValueError(f"the other accumulator has (kind, exact, levels)={theirs}: expected {mine}")

    def _add(self, state: Mapping[str, Any]) -> None:
        self._check_same(state)
        self.missing += state["missing"]
        if self.exact:
            labels, predictions, users = (np.asarray(state[n]) for n in ("labels", "predictions", "users"))
            self._parts.append(Rows(labels, predictions, users, 0))
            return
        self._sums += np.asarray(state["sums"])
        self._histogram += np.asarray(state["histogram"])
        self._user_sums += np.asarray(state["user_sums"])


def _logit_bin(probabilities: np.ndarray) -> np.ndarray:
    """Bin 0..LOGIT_BINS-1 of each probability, int64 [M]."""
    clipped = np.clip(probabilities, EPSILON, 1.0 - EPSILON)
    reach = np.log1p(-EPSILON) - np.log(EPSILON)
    place = (np.log(clipped) - np.log1p(-clipped) + reach) / (2.0 * reach)
    return np.clip((place * LOGIT_BINS).astype(np.int64), 0, LOGIT_BINS - 1)
