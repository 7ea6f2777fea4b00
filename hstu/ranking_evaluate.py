"""Evaluation of ranking models: predictions of the held-out events, metrics, baselines, reliability.

Legend: M predicted events, C levels of a task, E events of the store.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hstu import ranking_metrics, report
from hstu.config import Config
from hstu.data.ranking import RankingData
from hstu.data.ranking_batches import ranking_eval_batches
from hstu.data.splits import Split, Targets
from hstu.evaluate import ALL_USERS, dataset_label

if TYPE_CHECKING:
    from hstu.model.ranking import RankingModel


@dataclass
class Predictions:
    """Predictions of held-out events, in the order of their rows."""

    rows: np.ndarray
    """[M] int64, ascending."""
    users: np.ndarray
    """[M] int64."""
    values: dict[str, np.ndarray]
    """Task -> [M] or [M, C] float32, see :meth:`hstu.model.heads.RankingHeads.predict`."""


@torch.inference_mode()
def predict(
    model: RankingModel, data: RankingData, config: Config, targets: Targets, device: torch.device | str = "cpu"
) -> Predictions:
    """Predictions of every target, each once, from what its user did before (form ``fused``: before its group of at
    most ``ranking.targets`` events)."""
    was_training = model.training
    model.eval()
    rows, parts = [], []
    for batch in ranking_eval_batches(data, config, targets):
        batch = batch.to(torch.device(device))
        rows.append(batch.rows.cpu().numpy())
        parts.append({name: value.float().cpu().numpy() for name, value in model.predict(batch).items()})
    model.train(was_training)
    joined = np.concatenate(rows)
    order = np.argsort(joined)
    values = {name: np.concatenate([p[name] for p in parts])[order] for name in data.config.tasks}
    return Predictions(joined[order], owners(data, joined[order]), values)


def owners(data: RankingData, rows: np.ndarray) -> np.ndarray:
    """[M] int64: the user of each event."""
    return np.searchsorted(data.store.offsets, rows, side="right") - 1


def evaluate_tasks(data: RankingData, predictions: Predictions) -> dict[str, ranking_metrics.Evaluation]:
    """Every metric of every task."""
    return {
        name: ranking_metrics.evaluate(
            task.kind, data.label(name, predictions.rows), predictions.values[name], predictions.users, levels(task)
        )
        for name, task in data.config.tasks.items()
    }


def levels(task: Any) -> list[float] | None:
    """Values of the levels, None for the kinds without."""
    return task.levels if task.kind in ("multiclass", "ordinal") else None


def summarize(data: RankingData, predictions: Predictions) -> dict[str, float]:
    """``TASK/METRIC`` of every task and metric; NaN where one is not defined."""
    found = evaluate_tasks(data, predictions)
    return {f"{task}/{name}": value for task, e in found.items() for name, value in e["metrics"].items()}


class ProgressivePredictions:
    """Predictions of a progressive run by event row, in a file of the run folder."""

    def __init__(self, data: RankingData, path: Path) -> None:
        tasks = data.config.tasks.items()
        self.data = data
        self.widths = {name: len(levels(task) or [0]) for name, task in tasks}
        shape = (data.store.num_events, sum(self.widths.values()))
        if path.exists():
            self.values = np.lib.format.open_memmap(path, mode="r+")
        else:
            self.values = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
            self.values[:] = np.nan

    def put(self, rows: np.ndarray, predictions: Mapping[str, Tensor]) -> None:
        """Stores the predictions of the events ``rows``."""
        parts = [predictions[name].float().cpu().numpy().reshape(len(rows), -1) for name in self.widths]
        self.values[rows] = np.concatenate(parts, axis=1)

    def result(self) -> Predictions:
        """Of the events predicted so far."""
        rows = np.flatnonzero(~np.isnan(self.values[:, 0]))
        found, at = {}, 0
        for name, width in self.widths.items():
            part = np.asarray(self.values[rows, at : at + width])
            single = self.data.config.tasks[name].kind in ("binary", "regression")
            found[name] = part[:, 0] if single else part
            at += width
        return Predictions(rows, owners(self.data, rows), found)


def assess_ranking(
    config: Config, data: RankingData, split: Split, predictions: Predictions, part: str, folder: Path | None = None
) -> dict[str, Any]:
    """Content of ``evaluation.json``: metrics and intervals of the model and of the baselines, reliability.

    folder: where the reliability plots go, one a binary task; None: nowhere.
    """
    systems = {config.model.name: predictions}
    if config.eval.baselines and part != "progressive":
        from hstu.ranking_baselines import rank_baselines

        trains = train_rows(data, split)
        for system, values in rank_baselines(data, trains, predictions.rows, seed=config.seed).items():
            systems[system] = Predictions(predictions.rows, predictions.users, values)
    rows = [_row(config, data, system, found) for system, found in systems.items()]
    curves = {}
    for name, task in data.config.tasks.items():
        if task.kind == "binary":
            labels = data.label(name, predictions.rows)
            by_system = {s: ranking_metrics.reliability(labels, f.values[name]) for s, f in systems.items()}
            curves[name] = {s: {k: v.tolist() for k, v in dataclasses.asdict(c).items()} for s, c in by_system.items()}
            if folder is not None:
                from hstu.plots import plot_reliability

                chosen = {s: c for s, c in by_system.items() if s == config.model.name or s == list(by_system)[-1]}
                plot_reliability(folder / f"reliability-{name}.png", chosen, f"{data_label(data)}: {name}")
    return {
        "dataset": data_label(data),
        "protocol": data.store.meta.get("protocol"),
        "split": data.store.meta.get("split"),
        "split_hash": data.store.meta.get("split_hash"),
        "model": config.model.name,
        "experiment": config.experiment,
        "seed": config.seed,
        "selection": config.run.selection,
        "part": part,
        "machine": report.machine(),
        "versions": report.versions(),
        "commit": report.commit(),
        "rows": rows,
        "reliability": curves,
    }


def data_label(data: RankingData) -> str:
    """Name of the data set for titles."""
    return dataset_label(data.store)


def train_rows(data: RankingData, split: Split) -> np.ndarray:
    """int64: rows of all training events, ascending."""
    change = np.zeros(data.store.num_events + 1, np.int64)
    np.add.at(change, np.asarray(data.store.offsets[:-1]), 1)
    np.add.at(change, split.train_end, -1)
    return np.flatnonzero(np.cumsum(change[:-1]) > 0)


def _row(config: Config, data: RankingData, system: str, predictions: Predictions) -> dict[str, Any]:
    metrics: dict[str, float] = {}
    intervals: dict[str, list[float]] = {}
    reasons: dict[str, str] = {}
    evaluated = evaluate_tasks(data, predictions)
    for name, task in data.config.tasks.items():
        metrics |= {f"{name}/{m}": v for m, v in evaluated[name]["metrics"].items()}
        reasons |= {f"{name}/{m}": v for m, v in evaluated[name]["reasons"].items()}
        found = ranking_metrics.bootstrap(
            task.kind, data.label(name, predictions.rows), predictions.values[name], predictions.users, levels(task),
            config.eval.bootstrap, config.seed,
        )  # fmt: skip
        intervals |= {f"{name}/{m}": list(v) for m, v in found.items()}
    return {
        "system": system, "group": ALL_USERS, "count": len(np.unique(predictions.users)),
        "events": len(predictions.rows), "metrics": metrics, "intervals": intervals, "reasons": reasons,
    }  # fmt: skip
