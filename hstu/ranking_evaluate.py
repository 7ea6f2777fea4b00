"""Evaluation of ranking models: predictions of the held-out events, metrics, baselines, reliability.

Legend: M predicted events, C levels of a task, E events of the store.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hstu import calibration, ranking_metrics, report
from hstu.baselines import training_rows
from hstu.config import Config
from hstu.data.ranking import RankingData
from hstu.data.ranking_batches import ranking_eval_batches
from hstu.data.splits import Split, Targets, make_event_split
from hstu.distributed import World
from hstu.errors import UserError
from hstu.evaluate import (
    ALL_USERS,
    dataset_label,
    is_stream,
    override_eval,
    run_device,
    split_targets,
    stream_note,
    what_was_evaluated,
)
from hstu.runs import agree_on_run

if TYPE_CHECKING:
    from rich.table import Table

    from hstu.data.store import SequenceStore
    from hstu.model.ranking import RankingModel

DATA_METRIC = "rate"
"""A metric that describes the labels, the same for every system."""
RETRIEVAL_OPTIONS = ("ks", "filter_history", "chunk_mib")
"""Options of ``eval`` that mean nothing for ranking."""


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
    model: RankingModel, data: RankingData, config: Config, targets: Targets, device: torch.device | str = "cpu",
    world: World | None = None,
) -> Predictions:  # fmt: skip
    """Predictions of every target, each once, from what its user did before (form ``fused``: before its group of at
    most ``ranking.targets`` events). The ranks of ``world`` take the batches in turns and all return the same."""
    world = world or World()
    was_training = model.training
    model.eval()
    rows = [np.empty(0, np.int64)]
    parts = [{name: np.empty((0, *_width(task)), np.float32) for name, task in data.config.tasks.items()}]
    for batch in ranking_eval_batches(data, config, targets, world):
        batch = batch.to(torch.device(device))
        rows.append(batch.rows.cpu().numpy())
        parts.append({name: value.float().cpu().numpy() for name, value in model.predict(batch).items()})
    model.train(was_training)
    joined = world.gather_arrays(np.concatenate(rows))
    order = np.argsort(joined)
    values = {n: world.gather_arrays(np.concatenate([p[n] for p in parts]))[order] for n in data.config.tasks}
    return Predictions(joined[order], owners(data, joined[order]), values)


def _width(task: Any) -> tuple[int, ...]:
    """Shape of the prediction of one event."""
    return (len(task.levels),) if levels(task) else ()


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


def undefined_metrics(data: RankingData, rows: np.ndarray) -> dict[str, str]:
    """Why, by ``TASK/METRIC``, a metric of the events ``rows`` is not defined whatever is predicted for them."""
    found: dict[str, str] = {}
    for name, task in data.config.tasks.items():
        shape = (len(rows), len(task.levels)) if task.levels else (len(rows),)
        constant = np.full(shape, 1.0 / len(task.levels) if task.levels else 0.5)
        users = owners(data, rows)
        reasons = ranking_metrics.evaluate(task.kind, data.label(name, rows), constant, users, levels(task))["reasons"]
        found |= {f"{name}/{metric}": reason for metric, reason in reasons.items()}
    return found


class ProgressivePredictions:
    """Predictions of one pass over the log, progressive or day by day, by event row: [E, outputs of all tasks] float32
    in a file of the run folder.

    A run that is resumed overwrites what it predicts again, with the same numbers.

    Args:
        data: of the run.
        path: of the file; NaN where nothing is predicted yet.
        not_scored: event rows that :meth:`result` leaves out.

    Raises UserError where the file belongs to other data.
    """

    def __init__(self, data: RankingData, path: Path, not_scored: np.ndarray) -> None:
        self.data, self.not_scored = data, not_scored
        self.widths = {name: len(levels(task) or [0]) for name, task in data.config.tasks.items()}
        shape = (data.store.num_events, sum(self.widths.values()))
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial.npy")
            np.save(partial, np.full(shape, np.nan, np.float32))  # written, not mapped: a full disk then raises
            partial.replace(path)
        self.values = np.load(path, mmap_mode="r+")
        if self.values.shape != shape:
            raise UserError(f"{path} has the shape {self.values.shape}, expected {shape}: take another run.dir")

    def put(self, rows: np.ndarray, predictions: Mapping[str, Tensor]) -> None:
        """Stores the predictions of the events ``rows``."""
        parts = [predictions[name].float().cpu().numpy().reshape(len(rows), -1) for name in self.widths]
        self.values[rows] = np.concatenate(parts, axis=1)

    def result(self) -> Predictions:
        """Of the events predicted so far, but those that are not scored."""
        scored = ~np.isnan(self.values[:, 0])
        scored[self.not_scored] = False
        rows = np.flatnonzero(scored)
        found, at = {}, 0
        for name, width in self.widths.items():
            part = np.asarray(self.values[rows, at : at + width])
            single = self.data.config.tasks[name].kind in ("binary", "regression")
            found[name] = part[:, 0] if single else part
            at += width
        return Predictions(rows, owners(self.data, rows), found)


def assess_ranking(
    config: Config, data: RankingData, split: Split, predictions: Predictions, part: str, which: str,
    folder: Path | None = None, suffix: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Content of ``evaluation.json``: metrics and intervals of the model and of the baselines, reliability.

    part: ``test``, ``validation`` or ``progressive``; which: the checkpoint.
    folder: where the plots ``reliability-<task><suffix>.png`` go, one a binary task; None: nowhere.
    """
    systems = {config.model.name: predictions}
    if config.eval.baselines and part != "progressive":
        systems |= _baselines(config, data, split, predictions)
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
                plot_reliability(folder / f"reliability-{name}{suffix}.png", chosen, f"{data_label(data)}: {name}")
    return {
        "dataset": data_label(data),
        "split": data.store.meta.get("split"),
        **what_was_evaluated(config, data.store, part, which),
        "rows": rows,
        "reliability": curves,
    }


def _baselines(config: Config, data: RankingData, split: Split, model: Predictions) -> dict[str, Predictions]:
    """Of the events that ``model`` predicts; calibrated like it where the config asks for that."""
    from hstu.ranking_baselines import LEARNED, rank_baselines

    trains = training_rows(data.store, split.train_end)[0]
    fit = split.validation.rows if data.config.calibrate and split.validation is not None else model.rows[:0]
    rows = np.union1d(fit, model.rows)
    found = {}
    for system, values in rank_baselines(data, trains, rows, seed=config.seed).items():
        predictions = Predictions(rows, owners(data, rows), values)
        shifts = intercepts(data, _at(predictions, fit)) if len(fit) and system in LEARNED else {}
        found[system] = calibrated(_at(predictions, model.rows), shifts)
    return found


def _at(predictions: Predictions, rows: np.ndarray) -> Predictions:
    """The predictions of some of the events, rows ascending."""
    at = np.searchsorted(predictions.rows, rows)
    return Predictions(rows, predictions.users[at], {task: v[at] for task, v in predictions.values.items()})


def intercepts(data: RankingData, predictions: Predictions) -> dict[str, float]:
    """Binary task -> :func:`hstu.calibration.intercept` of the predictions against the labels."""
    binary = [name for name, task in data.config.tasks.items() if task.kind == "binary"]
    return {n: calibration.intercept(predictions.values[n], data.label(n, predictions.rows)) for n in binary}


def calibrated(predictions: Predictions, shifts: Mapping[str, float]) -> Predictions:
    """The predictions with the shift of each task added to its logits."""
    values = {n: calibration.shifted(v, shifts.get(n, 0.0)) for n, v in predictions.values.items()}
    return dataclasses.replace(predictions, values=values)


def data_label(data: RankingData) -> str:
    """Name of the data set for titles."""
    return dataset_label(data.store)


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


# Tables


def ranking_table(evaluation: dict[str, Any], columns: Mapping[str, Mapping[str, float | str | None]]) -> Table:
    """Metrics of each system, grouped by task. columns: heading -> ``TASK/METRIC`` -> number or text; None or NaN
    where it is not defined."""
    from rich.table import Table

    first = evaluation["rows"][0]
    title = f"{evaluation['dataset']}, {evaluation['part']}: {first['events']:,} events of {first['count']:,} users"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("metric")
    for column in columns:
        table.add_column(column, justify="right")
    tasks: dict[str, list[str]] = {}
    for name in first["metrics"]:
        tasks.setdefault(name.partition("/")[0], []).append(name)
    for task, names in tasks.items():
        rate = first["metrics"].get(f"{task}/{DATA_METRIC}")
        table.add_section()
        table.add_row(f"[bold]{task}[/bold]" + ("" if rate is None else f", rate {rate:.4f}"))
        for name in names:
            metric = name.partition("/")[2]
            if metric != DATA_METRIC:
                table.add_row(f"  {metric}", *[_cell(values.get(name)) for values in columns.values()])
    return table


def _cell(value: float | str | None) -> str:
    if value is None or value != value:
        return "-"
    return value if isinstance(value, str) else f"{value:.4f}"


def interval_column(row: Mapping[str, Any]) -> dict[str, str | None]:
    """Text of each interval of a row of ``evaluation.json``."""
    found = row["intervals"].items()
    return {name: None if low is None or low != low else f"{low:.4f} to {high:.4f}" for name, (low, high) in found}


def undefined_note(evaluation: dict[str, Any]) -> str:
    """Why metrics of the first system are not defined; empty where all are."""
    reasons = evaluation["rows"][0]["reasons"]
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    return "\n".join(f"not defined, {reason}: {', '.join(names)}" for reason, names in by_reason.items())


# hstu-evaluate


def evaluate_ranking_run(
    run: Path, config: Config, store: SequenceStore, model: RankingModel, options: dict[str, Any],
    world: World | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What ``hstu-evaluate`` does with a ranking run: predicts, prints, writes ``evaluation.json`` and the plots.

    Raises UserError for a progressive run, whose predictions were made while it trained, and for options of retrieval.
    """
    from hstu.vocabulary import unknown_shares_of_events, unknown_text

    assert config.ranking is not None
    world = world or World(device=run_device(options["device"]))
    if config.ranking.mode == "progressive":
        raise UserError(f"run={run} is a progressive run: its predictions were made before each step, with the model "
                        f"as it was then; see {run / 'evaluation.json'}")  # fmt: skip
    for name in RETRIEVAL_OPTIONS:
        if options["eval"].get(name) is not None:
            raise UserError(f"eval.{name}={options['eval'][name]}: {run} is a ranking run, which ranks no catalogue")
    started = time.perf_counter()
    data = RankingData(store, config.ranking)
    trained_eval, config = config.eval, override_eval(config, options["eval"])
    agree_on_run(world, config, store)
    which, part = options["which"], options["split"]
    split = make_event_split(store, config.run.selection)
    targets = split_targets(split, part)
    predictions = predict(model.to(world.device), data, config, targets, world.device, world)

    def assessed() -> dict[str, Any]:
        from rich.console import Console

        usual = part == "test" and which == "best" and config.eval == trained_eval and not is_stream(run)
        suffix = "" if usual else f"-{part}-{which}"
        evaluation = assess_ranking(config, data, split, predictions, part, which, run, suffix)
        unknown = unknown_shares_of_events(model, data, config, targets)
        evaluation |= unknown | {"seconds": time.perf_counter() - started}
        model_row, *others = evaluation["rows"]
        columns: dict[str, Any] = {config.model.name: model_row["metrics"]}
        if model_row["intervals"]:
            columns["95 % interval"] = interval_column(model_row)
        columns |= {row["system"]: row["metrics"] for row in others}
        console = Console()
        console.print(ranking_table(evaluation, columns))
        if note := undefined_note(evaluation):
            console.print(note, soft_wrap=True, highlight=False)
        if unknown:
            console.print(unknown_text(unknown))
        if is_stream(run):
            console.print(stream_note(run, store), soft_wrap=True, highlight=False, markup=False)
        path = run / f"evaluation{suffix}.json"
        report.write_json(path, evaluation)
        seconds = f"{evaluation['seconds']:.1f} s"
        console.print(f"{seconds}; written to {path}", soft_wrap=True, highlight=False, markup=False)
        return evaluation

    return world.on_first(assessed)
