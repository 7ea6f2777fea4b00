"""What a stream trains and evaluates: retrieval or ranking, an epoch being a day.

Legend: M evaluated events, C levels of a task.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hstu import metrics, ranking_metrics
from hstu.config import Config
from hstu.config_stream import ALL_USERS, StreamConfig
from hstu.data.days import SAMPLE_SEED, Day, DayBatches, Days, RankingDayBatches, StoreDays
from hstu.data.splits import Split, Targets
from hstu.distributed import World
from hstu.evaluate import evaluate, with_history
from hstu.problem import ActionProblem, Problem, build_model
from hstu.ranking_evaluate import (
    Predictions,
    ProgressivePredictions,
    assess_ranking,
    calibrated,
    intercepts,
    levels,
    predict,
    summarize,
)
from hstu.seeding import derive
from hstu.vocabulary import unknown_shares, unknown_shares_of_events

if TYPE_CHECKING:
    from hstu.data.ranking import RankingData
    from hstu.data.share import Share

SO_FAR, DAY_BEFORE = "rate so far", "rate of the day before"
"""Constant predictions of a day: the mean label of all days before it, and of the last of them."""
NOT_OF_CONSTANTS = ("auc", "gauc", "gauc_weighted", "rate")
"""Metrics that say nothing of a constant prediction, or only of the labels."""


class DayProblem(Problem):
    """A problem whose epochs are days; :meth:`validate` is about the day that was opened last."""

    days: Days
    stream: StreamConfig
    day: tuple[int, Day] | None = None

    @property
    def part(self) -> str:
        return "next day"

    def open(self, index: int, stopped: Callable[[], bool]) -> Day | None:
        """The day at place ``index``, as of :meth:`Days.open`; from now on :meth:`validate` is about it."""
        found = self.days.open(index, stopped)
        if found is not None:
            self.day = index, found
        return found

    def recall(self, days: Iterable[Mapping[str, Any]]) -> None:  # noqa: B027 (retrieval needs no memory)
        """What is known of the days that were trained on before the run went on, as of ``read_days``, in order."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Metrics of the model as it is on the day, and ``targets``, how many events they are about; {} where there
        are none."""

    def beside(self) -> dict[str, Any]:
        """What is written beside the metrics of the last :meth:`validate`, no plain numbers."""
        return {}

    def end_day(self) -> dict[str, Any]:
        """What is written of the day that was trained on."""
        return {}

    def assess(self) -> dict[str, Any] | None:
        """Content of ``evaluation.json``, about all days together, on the first rank; None where it is not known."""
        return None

    def finish(self) -> Callable[[], tuple[dict[str, Any], dict[str, float], int]]:
        raise RuntimeError("a stream holds nothing out at its end: its numbers are those of the days")


def _no_split(days: Days) -> Split:
    nothing = Targets(np.empty(0, np.int64), np.empty(0, np.int64))
    return Split(np.asarray(days.store.offsets[1:]), None, nothing)


class StreamRetrieval(DayProblem):
    """The next item at every event."""

    def __init__(self, config: Config, stream: StreamConfig, days: Days, world: World, folder: Path) -> None:
        super().__init__(config, days.store, world, folder)
        self.days, self.stream, self.split = days, stream, _no_split(days)
        self.data = DayBatches(
            days, config.model.max_len, config.seed, config.run.batch_users, config.run.batch_tokens,
            config.loss.event_weights, self.device,
        )  # fmt: skip
        self.model = build_model(config, days.store).to(self.device)
        self.metric_names = metrics.metric_names(config.eval.ks)
        self.shown = ["hr@10", "ndcg@10", "mrr"]

    def input(self, epoch: int, step: int) -> tuple[Share[Any], Any]:
        share = self.data.share(epoch, step, self.ranks)
        return share, self.model.encoder.plan(share.batch)

    def validate(self) -> dict[str, float]:
        assert self.day is not None
        index, day = self.day
        targets = day.targets(self.stream.eval_users or ALL_USERS, derive(self.config.seed, SAMPLE_SEED, index))
        kept, _ = with_history(day.store, targets)
        if len(kept) == 0:
            return {}
        result = evaluate(self.model, day.store, kept, self.config, self.device, self.world)

        def summarized() -> dict[str, float]:
            unknown = unknown_shares(self.model, day.store, kept, self.config.model.max_len)
            return {**metrics.summarize(result.ranks, self.config.eval.ks), **unknown, "targets": len(result)}

        return self.world.on_first(summarized)


class StreamRanking(DayProblem, ActionProblem):
    """The actions on every item; a day's events are predicted by the model that has trained on the days before.

    The first day is predicted by nobody: it gives the initial rates. With ``ranking.calibrate`` a day's predictions are
    shifted by what those of the day before, made before it was trained on, would have needed.

    Of a finished log all predictions are kept in ``predictions.npy`` of the run folder, one row an event.
    """

    def __init__(self, config: Config, stream: StreamConfig, days: Days, world: World, folder: Path) -> None:
        super().__init__(config, days.store, world, folder)
        self.days, self.stream, self.split = days, stream, _no_split(days)
        self.data = RankingDayBatches(days, config)
        plan = self.data.plan(0)
        priors = plan.data.priors(plan.day.events(0, 0).rows, need_all=False)
        self.model = build_model(config, days.store, plan.data, priors).to(self.device)
        self.predictions: ProgressivePredictions | None = None
        if world.is_first and isinstance(days, StoreDays):
            nothing = np.empty(0, np.int64)
            self.predictions = ProgressivePredictions(plan.data, folder / "predictions.npy", nothing)
        self.labels: list[dict[str, list[float]]] = []
        """Of each day before this one, by task: see :func:`label_counts`."""
        self.baselines: dict[str, dict[str, float]] = {}

    def recall(self, days: Iterable[Mapping[str, Any]]) -> None:
        self.labels = [day["labels"] for day in days if "labels" in day]

    def validate(self) -> dict[str, float]:
        assert self.day is not None
        index = self.day[0]
        plan = self.data.plan(index)
        targets = plan.day.events(self.stream.eval_users or ALL_USERS, derive(self.config.seed, SAMPLE_SEED, index))
        if len(targets) == 0:
            self.baselines = {}
            return {}
        shifts: dict[str, float] = {}
        if self.calibrate:
            shifts = dict(zip(self.tasks, self.model.heads.calibration.tolist(), strict=True))
            self._set_calibration({})
        raw = predict(self.model, plan.data, self.config, targets, self.device, self.world)
        if self.calibrate:
            self._set_calibration(self.world.on_first(lambda: intercepts(plan.data, raw)))

        def summarized() -> tuple[dict[str, float], dict[str, dict[str, float]]]:
            found = calibrated(raw, shifts)
            if self.predictions is not None:
                self.predictions.put(found.rows, {n: torch.from_numpy(v) for n, v in found.values.items()})
            cold = float(plan.day.is_cold[found.users].mean())
            unknown = unknown_shares_of_events(self.model, plan.data, self.config, targets)
            values = {**summarize(plan.data, found), **unknown, "cold": cold, "targets": len(found.rows)}
            return values, constant_rates(plan.data, found, self.labels)

        values, self.baselines = self.world.on_first(summarized)
        return values

    def beside(self) -> dict[str, Any]:
        return {"baselines": self.baselines}

    def end_day(self) -> dict[str, Any]:
        assert self.day is not None
        plan = self.data.plan(self.day[0])
        self.labels.append(label_counts(plan.data, plan.day.events(0, 0).rows))
        return {"labels": self.labels[-1]}

    def assess(self) -> dict[str, Any] | None:
        if self.predictions is None:
            return None
        found, data = self.predictions.result(), self.data.plan(0).data
        if len(found.rows) == 0:
            return None
        config = replace(self.config, eval=replace(self.config.eval, baselines=False))  # which learn from the past
        return assess_ranking(config, data, self.split, found, self.part, "last", self.folder)


# What is known of labels before a day


def label_counts(data: RankingData, rows: np.ndarray) -> dict[str, list[float]]:
    """By task, of the labels of the events ``rows``: how many have each level (binary: 0, 1), or how many there are and
    their sum (regression)."""
    found = {}
    for name, task in data.config.tasks.items():
        label = data.label(name, rows)
        label = label[~np.isnan(label)]
        if task.kind == "regression":
            found[name] = [float(len(label)), float(label.sum(dtype=np.float64))]
        else:
            counts = np.bincount(label.astype(np.int64), minlength=len(levels(task) or (0, 1)))
            found[name] = counts.astype(float).tolist()
    return found


def constant_rates(
    data: RankingData, events: Predictions, labels: list[dict[str, list[float]]]
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Metrics on ``events`` of what predicts for all the same, by system: ``SO_FAR`` and ``DAY_BEFORE``.

    labels: as of :func:`label_counts`, of each day before, at least one. A task without a label there is left out.
    """
    found: dict[str, dict[str, float]] = {}
    for system, days in ((SO_FAR, labels), (DAY_BEFORE, labels[-1:])):
        values = found.setdefault(system, {})
        for name, task in data.config.tasks.items():
            counts = np.sum([day[name] for day in days], axis=0)
            total = counts[0] if task.kind == "regression" else counts.sum()
            if total == 0:
                continue
            shares = counts / total
            constant = shares if levels(task) else shares[1]
            predictions = np.broadcast_to(constant, (len(events.rows), *np.shape(constant)))
            label = data.label(name, events.rows)
            of_task = ranking_metrics.evaluate(task.kind, label, predictions, events.users, levels(task))["metrics"]
            values |= {f"{name}/{m}": v for m, v in of_task.items() if m not in NOT_OF_CONSTANTS}
    return found


def make_stream_problem(config: Config, stream: StreamConfig, days: Days, world: World, folder: Path) -> DayProblem:
    """What a stream of ``config`` trains on the ranks of ``world``. folder: of the run."""
    cls = StreamRetrieval if config.ranking is None else StreamRanking
    return cls(config, stream, days, world, folder)
