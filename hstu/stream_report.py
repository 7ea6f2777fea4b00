"""What is left of a stream: numbers of every day, their means, a plot, and for ranking a table by task."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hstu import metrics, ranking_metrics, report
from hstu.config import Config
from hstu.progress import Display
from hstu.stream_problem import DAY_BEFORE, SO_FAR

if TYPE_CHECKING:
    from rich.table import Table

RETRIEVAL_SHOWN = ("hr@10", "ndcg@10", "mrr")
NOT_SHOWN = ("gauc_weighted", "log_loss")
"""Metrics of ranking that the tables on the screen leave out."""
_HEADINGS = {"calibration": "calibra-\ntion"}
MAX_SHOWN_DAYS = 40
"""Of a longer stream the tables show the last days."""


def read_days(folder: Path) -> list[dict[str, Any]]:
    """One mapping a day, in order: ``day``, what was measured before it was trained on, and what training gave."""
    found: dict[str, dict[str, Any]] = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        if values.get("kind") in ("day", "next day"):
            rest = {k: v for k, v in values.items() if k not in ("kind", "step", "epoch", "day")}
            found.setdefault(values["day"], {"day": values["day"]}).update(rest)
    return list(found.values())


def late_files(folder: Path) -> dict[str, list[str]]:
    """By day, the files that came after it, by their paths below the watched folder."""
    if not (folder / "days").is_dir():
        return {}
    from hstu.data.watch import read_record

    return read_record(folder / "days")["late"]


def write_result(folder: Path, config: Config, display: Display, evaluation: dict[str, Any] | None = None) -> None:
    """``days.json``, ``result.json`` with the mean over all evaluated events, ``days.png``; the tables of a ranking.

    Of a watched folder with the files that came late: how many on each day, and their paths.
    evaluation: of all days together, for ``evaluation.json``; None: there is none.
    """
    days, late = read_days(folder), late_files(folder)
    for day in days:
        if day["day"] in late:
            day["late_files"] = len(late[day["day"]])
    names_late = {"late_files": late} if late else {}
    evaluated = [day for day in days if day.get("targets")]
    total = sum(day["targets"] for day in evaluated)
    result = {
        "experiment": config.experiment, "seed": config.seed, "days": len(days), "targets": total,
        "trained": sum(day.get("trained", 0) for day in days),
        "next_day": mean_of_days(evaluated, metric_names(config)),
    }  # fmt: skip
    if config.ranking is not None:
        result["baselines"] = _mean_baselines(evaluated)
    if evaluation is not None:
        result["all_days"] = evaluation["rows"][0]["metrics"]
        report.write_json(folder / "evaluation.json", evaluation)
    report.write_json(folder / "days.json", {"days": days, **names_late})
    report.write_json(folder / "result.json", result)
    plot_days(days, folder / "days.png", _panels(config))
    if config.ranking is not None:
        _show_ranking(config, evaluated, result, evaluation, display)
    shown = "  ".join(f"{n} {v:.4f}" for n, v in result["next_day"].items() if n in _headline(config))
    left_out = f"; {sum(map(len, late.values()))} late files left out" if late else ""
    display.say(f"{len(days)} days; next day, {total:,} events: {shown or 'none evaluated'}{left_out}; {folder}")


def metric_names(config: Config) -> list[str]:
    """Of what is measured on a day."""
    if config.ranking is None:
        return metrics.metric_names(config.eval.ks)
    return [f"{name}/{m}" for name, task in config.ranking.tasks.items() for m in ranking_metrics.METRICS[task.kind]]


def mean_of_days(days: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, float]:
    """Of each metric over the days on which it is defined, weighted by their evaluated events; left out where there is
    no such day."""
    found = {}
    for name in names:
        known = [(day[name], day["targets"]) for day in days if day.get(name) is not None and day[name] == day[name]]
        if known:
            values, weights = np.array(known, np.float64).T
            found[name] = float(values @ weights / weights.sum())
    return found


def _mean_baselines(days: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By system."""
    found = {}
    for system in (SO_FAR, DAY_BEFORE):
        of_system = [{**day["baselines"][system], "targets": day["targets"]} for day in days]
        names = dict.fromkeys(name for day in of_system for name in day if name != "targets")
        found[system] = mean_of_days(of_system, list(names))
    return found


def _headline(config: Config) -> tuple[str, ...]:
    if config.ranking is None:
        return RETRIEVAL_SHOWN
    return tuple(name for name in metric_names(config) if name.endswith(("/auc", "/ne", "/rmse")))


# Tables


def _show_ranking(
    config: Config, days: list[dict[str, Any]], result: dict[str, Any], evaluation: dict[str, Any] | None,
    display: Display,
) -> None:  # fmt: skip
    from hstu.ranking_evaluate import interval_column, ranking_table, undefined_note

    assert config.ranking is not None
    for name, task in config.ranking.tasks.items() if days else ():
        display.console.print(task_table(name, task.kind, days, result))
    if evaluation is None:
        return
    row = evaluation["rows"][0]
    columns: dict[str, Any] = {config.model.name: row["metrics"]}
    if row["intervals"]:
        columns["95 % interval"] = interval_column(row)
    display.console.print(ranking_table({**evaluation, "part": "all days together"}, columns))
    if note := undefined_note(evaluation):
        display.say(note)


def task_table(task: str, kind: str, days: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> Table:
    """One line a day and their mean: the model's metrics, and the main one of the constant rates."""
    from rich import box
    from rich.table import Table

    names = [name for name in ranking_metrics.METRICS[kind] if name not in NOT_SHOWN]
    main = "rmse" if kind == "regression" else "ne"
    title = f"{task}, each day before it is trained on; last, the {main} of constant rates"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("day", no_wrap=True)
    for heading in ("events", *(_HEADINGS.get(n, n) for n in names), "so far", "day\nbefore"):
        table.add_column(heading, justify="right", no_wrap=True)

    def add(label: str, events: int, values: Mapping[str, Any], baselines: Mapping[str, Mapping[str, Any]]) -> None:
        own = [values.get(f"{task}/{name}") for name in names]
        constant = [baselines[system].get(f"{task}/{main}") for system in (SO_FAR, DAY_BEFORE)]
        table.add_row(label, f"{events:,}", *["-" if v is None or v != v else f"{v:.4f}" for v in own + constant])

    for day in days[-MAX_SHOWN_DAYS:]:
        add(day["day"], day["targets"], day, day["baselines"])
    table.add_section()
    add("mean", result["targets"], result["next_day"], result["baselines"])
    return table


# Plot


Panel = tuple[str, tuple[str, ...]]


def _panels(config: Config) -> list[Panel]:
    """Titles and metrics of what is drawn beside the loss."""
    if config.ranking is None:
        return [("each day before it is trained on", RETRIEVAL_SHOWN)]
    wanted = ("auc", "ne", "rmse")
    by_metric = {m: tuple(n for n in metric_names(config) if n.endswith(f"/{m}")) for m in wanted}
    return [(f"{m} of each day before it is trained on", names) for m, names in by_metric.items() if names]


def plot_days(days: list[dict[str, Any]], path: Path, panels: Sequence[Panel]) -> None:
    """Next-day metrics (dashed: of the rate so far) and the training loss over days. Without matplotlib nothing is
    drawn."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    count = len(panels) + 1
    figure, axes = plt.subplots(count, 1, figsize=(8, 3 * count), layout="constrained", sharex=True)
    place = range(len(days))
    for axis, (title, names) in zip(axes[:-1], panels, strict=True):
        for name in names:
            if not any(name in day for day in days):
                continue
            (line,) = axis.plot(place, [day.get(name, np.nan) for day in days], label=name, linewidth=1.3)
            constant = [day.get("baselines", {}).get(SO_FAR, {}).get(name, np.nan) for day in days]
            if not np.isnan(constant).all():
                axis.plot(place, constant, color=line.get_color(), linewidth=1.0, linestyle="--")
            axis.legend(fontsize=8, frameon=False)
        axis.set(title=title)
        if "/" not in names[0]:
            axis.set_ylim(0, None)
    axes[-1].plot(place, [day.get("train_loss", np.nan) for day in days], color="tab:gray", linewidth=1.3)
    axes[-1].set(ylabel="training loss")
    every = max(1, -(-len(days) // 8))
    axes[-1].set_xticks(list(place)[::every], [day["day"] for day in days][::every], fontsize=7)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
