"""After training: the best checkpoint on test, the record of each run, and the table of all variants and seeds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hstu import checkpoint, metrics, report
from hstu.checkpoint_state import restore_model
from hstu.config import Config, from_dict, published_row
from hstu.data.stochastic_length import savings_text
from hstu.errors import UserError
from hstu.evaluate import ALL_USERS
from hstu.runs import run_folder

if TYPE_CHECKING:
    from rich.console import Console

    from hstu.train import Progress, Trainer


@dataclass(frozen=True)
class Planned:
    """One training of a command: a variant of the experiment and a seed."""

    variant: str
    """Name shown in the table; the model's name for the experiment itself."""
    config: Config
    folder: Path | None = None
    parent: Path | None = None
    """What ``run.dir`` must be to resume the whole command, where it trains several runs."""


def expand_runs(options: dict[str, Any]) -> list[Planned]:
    """All trainings that the composed ``options`` ask for: the experiment and its variants, each for every seed."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    base = from_dict(options)
    seeds = base.seeds or [base.seed]
    settings: dict[str, dict[str, Any]] = {base.model.name: options}
    for name, overrides in base.variants.items():
        try:
            changed = OmegaConf.create(options)
            OmegaConf.set_struct(changed, True)
            changed.merge_with_dotlist(list(overrides))
        except (OmegaConfBaseException, ValueError) as error:
            raise UserError(f"variants: {name}: {str(error).splitlines()[0]}") from None
        settings[name] = OmegaConf.to_container(changed)  # type: ignore[assignment]
    several = len(seeds) * len(settings) > 1
    parent = run_folder(base) if several else None
    if parent is not None and (parent / "config.yaml").exists():
        raise UserError(f"run.dir={parent} holds a single run; this command trains several: take another folder")
    planned = []
    for variant, values in settings.items():
        for seed in seeds:
            config = dataclasses.replace(from_dict(values), seed=seed, seeds=None, variants={})
            if variant != base.model.name:
                slug = "".join(c if c.isalnum() else "-" for c in variant)
                config = dataclasses.replace(config, experiment=f"{config.experiment}-{slug}")
            if parent is not None:
                part = parent / f"{config.experiment.replace('/', '-')}-seed{seed}"
                config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(part)))
            planned.append(Planned(variant, config, parent=parent))
    return planned


def evaluate_finished(trainer: Trainer, progress: Progress) -> None:
    """Evaluates the best checkpoint on test and writes ``evaluation.json`` and ``result.json``."""
    folder, world = trainer.folder, trainer.world

    def is_done() -> bool:
        if not (folder / "result.json").exists() or not (folder / "evaluation.json").exists():
            return False
        done = report.read_json(folder / "result.json", "delete it to evaluate again")
        return bool(done.get("epochs") == progress.epoch)

    if world.on_first(is_done):
        return
    world.at(progress.global_step, "test")
    restore_model(checkpoint.load(trainer.checkpoints / checkpoint.BEST, world), trainer.model, world)
    assess = trainer.problem.finish()
    world.on_first(lambda: _write_results(trainer, progress, *assess()))


def _write_results(
    trainer: Trainer, progress: Progress, evaluation: dict[str, Any], values: dict[str, float], num_users: int
) -> None:
    folder, config = trainer.folder, trainer.config
    report.write_json(folder / "evaluation.json", evaluation)
    timing = {
        "train_s": progress.seconds,
        "eval_s": progress.eval_seconds,
        "steps": progress.global_step,
        "s_per_step": progress.seconds / max(1, progress.global_step),
        "events_per_s": progress.num_events / max(1e-9, progress.seconds),
        **_mean_savings([trainer.data.savings(epoch) for epoch in range(progress.epoch)]),
    }
    part = trainer.problem.part
    report.write_json(
        folder / "result.json",
        {
            "experiment": config.experiment,
            "seed": config.seed,
            "epochs": progress.epoch,
            "best_epoch": progress.best_epoch,
            "selected_by": f"{config.run.select_metric} on {part}",
            "select_metric_value": progress.best,
            "test": values,
            "num_users": num_users,
            "parameters": trainer.model.num_parameters(),
            "timing": timing,
        },
    )


def _mean_savings(epochs: list[dict[str, float]]) -> dict[str, float]:
    """What stochastic length saved in the run (every epoch has the same events before the cut); empty where off."""
    return {name: sum(e[name] for e in epochs) / len(epochs) for name in (epochs[0] if epochs else {})}


def show_results(runs: list[Planned], console: Console) -> None:
    """Prints one table per group of users: variants (mean and deviation over seeds), baselines, published row."""
    first = runs[0]
    assert first.folder is not None
    evaluations: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        assert run.folder is not None
        read = report.read_json(run.folder / "evaluation.json", "train again")
        evaluations.setdefault(run.variant, []).append(read)
    if first.config.ranking is not None:
        _show_ranking(evaluations, console)
        _print_notes(runs, console)
        return
    main = evaluations[first.variant]
    names = metrics.metric_names(first.config.eval.ks)
    model = first.config.model.name
    for group in dict.fromkeys(row["group"] for row in main[0]["rows"]):
        columns: dict[str, dict[str, float | str]] = {}
        columns |= _baseline_columns(main[0], model, group, oracle=False)
        for variant, entries in evaluations.items():
            columns[variant] = _over_seeds(entries, entries[0]["model"], group, names)
        columns |= _baseline_columns(main[0], model, group, oracle=True)
        published = published_row(first.config)
        if published is not None:
            columns[f"published\n({published.source})"] = dict(published.metrics)
        users = next(r["count"] for r in main[0]["rows"] if r["group"] == group)
        title = f"{main[0]['dataset']}, protocol {main[0]['protocol']}, test, {users:,} users"
        console.print(report.metrics_table(title + ("" if group == ALL_USERS else f" ({group})"), columns, names))
    _print_notes(runs, console)


def _show_ranking(evaluations: dict[str, list[dict[str, Any]]], console: Console) -> None:
    """The variants, with an interval where there is one of one seed, and the baselines; what is not defined below."""
    from hstu.ranking_evaluate import interval_column, ranking_table, undefined_note

    main = next(iter(evaluations.values()))[0]
    columns: dict[str, Any] = {}
    for variant, entries in evaluations.items():
        rows = [entry["rows"][0] for entry in entries]
        columns[variant] = _mean_and_deviation([row["metrics"] for row in rows])
        if len(evaluations) == len(entries) == 1 and rows[0]["intervals"]:
            columns["95 % interval"] = interval_column(rows[0])
    columns |= {row["system"]: row["metrics"] for row in main["rows"][1:]}
    console.print(ranking_table(main, columns))
    if note := undefined_note(main):
        console.print(note, soft_wrap=True, highlight=False)


def _mean_and_deviation(seeds: list[dict[str, float | None]]) -> dict[str, float | str | None]:
    """Of each metric over seeds; None where a seed has none (JSON has no NaN)."""
    if len(seeds) == 1:
        return dict(seeds[0])
    found: dict[str, float | str | None] = dict.fromkeys(seeds[0])
    known = [{n: v for n, v in seed.items() if v is not None} for seed in seeds]
    for name, value in report.aggregate(known).items():
        found[name] = f"{value['mean']:.4f} ± {value['std']:.4f}"
    return found


def _baseline_columns(evaluation: dict[str, Any], model: str, group: str, oracle: bool) -> dict[str, Any]:
    rows = [r for r in evaluation["rows"] if r["group"] == group and r["system"] != model]
    return {r["system"]: r["metrics"] for r in rows if r["system"].startswith("oracle") == oracle}


def _over_seeds(entries: list[dict[str, Any]], model: str, group: str, names: list[str]) -> dict[str, float | str]:
    rows = [next(r for r in e["rows"] if r["system"] == model and r["group"] == group) for e in entries]
    values = report.aggregate([r["metrics"] for r in rows])
    if len(rows) == 1:
        return {n: values[n]["mean"] for n in names}
    return {n: f"{values[n]['mean']:.4f} ± {values[n]['std']:.4f}" for n in names}


def _print_notes(runs: list[Planned], console: Console) -> None:
    for run in runs:
        assert run.folder is not None
        result = report.read_json(run.folder / "result.json", "train again")
        timing = result["timing"]
        console.print(
            f"{run.variant}, seed {run.config.seed}: best epoch {result['best_epoch']} of {result['epochs']} by "
            f"{result['selected_by']}; {timing['train_s']:.0f} s training, {timing['s_per_step'] * 1e3:.0f} ms a step"
            f"{savings_text(timing, '; ')}; {run.folder}",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
    if runs[0].config.run.selection == "reference":
        console.print("run.selection=reference: the best epoch was chosen on test, as the published numbers were.")
    if runs[0].config.published.metrics and published_row(runs[0].config) is None:
        console.print("The published row was made in another way (data, protocol, model, filter or split): not shown.")
    elif runs[0].config.published.metrics and runs[0].config.run.selection == "validation":
        console.print("The published row had its best epoch chosen on test; this run had it chosen on validation.")
