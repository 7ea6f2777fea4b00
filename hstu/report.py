"""Tables, records and plots: what a person sees of a run, and what is kept of a measurement.

    python -m hstu.report [readme] [--check]      write (or compare) the README's tables from the records
    python -m hstu.report record NAME RUN [RUN..] make the record of one or more evaluated runs (one per seed)
    python -m hstu.report curves RUN              plot loss and metrics of a run into RUN/curves.png

A record is one JSON file ``benchmarks/results/<date>-<name>.json`` with the fields of :class:`Record`, the same
for every kind of measurement. ``timing`` is a flat mapping of numbers and strings, or ``{"rows": [mapping, ...]}``
with one mapping per measured size.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hstu.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KINDS = ("training", "ranking", "kernel", "scoring", "preparation")
GROUP_SEPARATOR = " | "
"""In a record's metric names: ``hr@10`` is over all users, ``hr@10 | GROUP`` over that group of users."""
OURS = "hstu"
"""Name of this project's implementation in the rows of kernel records."""


# Where and with what a number was made


def machine() -> dict[str, Any]:
    """CPU, cores usable by this process, memory, GPUs and their driver (None where there is none)."""
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        memory = None
    names, driver = _gpus()
    return {"cpu": cpu, "cores": cores, "memory_gib": memory, "gpu": names, "driver": driver}


def _gpus() -> tuple[str | None, str | None]:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None, None
    lines = [line.rsplit(",", 1) for line in out.strip().splitlines() if "," in line]
    if not lines:
        return None, None
    names = [name.strip() for name, _ in lines]
    return (names[0] if len(names) == 1 else f"{len(names)} x {names[0]}"), lines[0][1].strip()


def versions() -> dict[str, str]:
    """Python and the installed packages that can change a number; what is not installed is left out."""
    found = {"python": platform.python_version()}
    packages = ("torch", "triton", "numpy", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchrec", "hydra-core", "polars")
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of this checkout, ``-dirty`` appended where tracked files differ; None outside of git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        return f"{head}-dirty" if git("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.SubprocessError):
        return None


# Records


@dataclass
class Record:
    """One committed measurement."""

    name: str
    kind: str
    """One of ``KINDS``."""
    dataset: str
    protocol: str | None
    split_hash: str | None
    model: str
    seeds: list[int]
    metrics: dict[str, dict[str, Any]]
    """By metric: ``mean``, ``std`` (sample standard deviation; 0 for one value) and ``values``, one per seed."""
    timing: dict[str, Any]
    published: dict[str, Any] | None = None
    """``source``, ``protocol`` and ``metrics`` of the published row; absent where there is none."""
    machine: dict[str, Any] = field(default_factory=machine)
    versions: dict[str, str] = field(default_factory=versions)
    commit: str | None = field(default_factory=commit)
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"record kind={self.kind!r}: expected one of {', '.join(KINDS)}")
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", self.name):
            raise UserError(f"record name={self.name!r}: expected lower-case letters, digits and . _ -")
        for metric, value in self.metrics.items():
            if not isinstance(value, Mapping) or set(value) != {"mean", "std", "values"}:
                raise UserError(f"record metric {metric!r} is {value!r}: expected mean, std and values")

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        if self.published is None:
            del values["published"]
        return values


def aggregate(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Mean, sample standard deviation and values of each metric over ``runs``, one mapping per seed.

    Only metrics that every run has are kept.
    """
    names = [name for name in runs[0] if all(name in run for run in runs)]
    out = {}
    for name in names:
        values = [float(run[name]) for run in runs]
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        out[name] = {"mean": statistics.fmean(values), "std": std, "values": values}
    return out


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes strict JSON (NaN becomes null) through a temporary file, so that a reader never sees half of it."""
    text = json.dumps(_plain(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()  # a numpy number
    return None if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))) else value


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Reads a JSON object; UserError where it is missing or broken. ``what``: how to get such a file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {what}") from None
    except ValueError:
        raise UserError(f"{path} is not valid JSON: {what}") from None


def write_record(record: Record, folder: Path = RESULTS, date: str | None = None) -> Path:
    """Writes ``<folder>/<date>-<name>.json`` (date: today in UTC, ``YYYY-MM-DD``) and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{date or datetime.now(UTC).date().isoformat()}-{record.name}.json"
    write_json(path, record.to_dict())
    return path


def read_records(folder: Path = RESULTS) -> list[tuple[str, Record]]:
    """All records of ``folder`` with their file names, in the order of the names; a wrong file raises UserError."""
    records = []
    for path in sorted(folder.glob("*.json")):
        values = read_json(path, "mend or delete the record")
        known = {f.name for f in dataclasses.fields(Record)}
        wrong = sorted((known ^ set(values)) - {"published"})
        if wrong:
            raise UserError(
                f"{path} has missing or unknown fields {', '.join(wrong)}: expected {', '.join(sorted(known))}"
            )
        if not re.fullmatch(r"\d{4}-\d\d-\d\d-" + re.escape(str(values["name"])), path.stem):
            raise UserError(f"{path}: expected the file name <YYYY-MM-DD>-{values['name']}.json")
        records.append((path.name, Record(**values)))
    return records


def run_record(name: str, runs: Sequence[Path], system: str | None = None) -> Record:
    """The training record of evaluated runs that differ in their seed only.

    system: which row of ``evaluation.json`` to record, default the model; ``most popular`` records that baseline.
    """
    import yaml

    evaluations, configs, timings, places = [], [], [], []
    for run in runs:
        places.append(read_json(run / "environment.json", f"{run} is no run folder of hstu-train"))
        evaluations.append(read_json(run / "evaluation.json", f"run hstu-evaluate run={run} first"))
        configs.append(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
        timings.append(read_json(run / "result.json", f"finish the training of {run} first").get("timing", {}))
    first = evaluations[0]
    for run, evaluation in zip(runs, evaluations, strict=True):
        if evaluation.get("checkpoint", "best") != "best":
            raise UserError(f"{run} was evaluated at its last checkpoint: evaluate the best one")
    for run, evaluation, config in zip(runs, evaluations, configs, strict=True):
        for key in ("dataset", "protocol", "split_hash", "model", "selection", "part", "filter_history"):
            if evaluation.get(key) != first.get(key):
                raise UserError(
                    f"{run} has {key}={evaluation.get(key)!r}, {runs[0]} has {first.get(key)!r}: not one record"
                )
        if _without_seed(config) != _without_seed(configs[0]):
            raise UserError(
                f"{run} and {runs[0]} have different configs: one record holds runs that differ in seed only"
            )
    for key in ("machine", "versions"):
        if any(place[key] != places[0][key] for place in places):
            raise UserError(f"the runs were trained with different {key}: make one record of each")
    commits = list(dict.fromkeys(str(place["commit"]) for place in places if place["commit"]))
    system = system or first["model"]
    metrics = []
    for evaluation in evaluations:
        values: dict[str, float] = {}
        for row in evaluation["rows"]:
            if row["system"] == system:
                group = "" if row["group"] == "all users" else GROUP_SEPARATOR + row["group"]
                values |= {f"{metric}{group}": value for metric, value in row["metrics"].items()}
        if not values:
            known = sorted({row["system"] for row in evaluation["rows"]})
            raise UserError(f"system={system!r} was not evaluated: expected one of {', '.join(known)}")
        metrics.append(values)
    numbers = [{k: v for k, v in t.items() if isinstance(v, int | float)} for t in timings]
    timing = {k: v["mean"] for k, v in aggregate(numbers).items()} if system == first["model"] else {}
    published = first.get("published", {})
    kind = "ranking" if configs[0].get("ranking") else "training"
    comparable = bool(published.get("metrics")) and published.get("protocol") == first["protocol"]
    published = published if comparable and system == first["model"] else None
    return Record(
        name, kind, first["dataset"], first["protocol"], first["split_hash"], system,
        [c["seed"] for c in configs], aggregate(metrics), timing, published,
        places[0]["machine"], places[0]["versions"], ", ".join(commits) or None, without_paths(configs[0]),
    )  # fmt: skip


def _without_seed(config: Mapping[str, Any]) -> dict[str, Any]:
    run = {k: v for k, v in config.get("run", {}).items() if k not in ("dir", "progress", "loggers", "threads")}
    return {**{k: v for k, v in config.items() if k not in ("seed", "seeds")}, "run": run}


def without_paths(value: Any) -> Any:
    """The config without the folders of the machine it ran on: an absolute path keeps its last part."""
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


# Tables


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; ``|`` inside a cell is escaped."""
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines)


def metrics_table(title: str, columns: Mapping[str, Mapping[str, float | str]], names: Sequence[str]) -> Table:
    """Rows are metrics, columns are systems; a number is shown with four decimals, a missing value as ``-``."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("metric")
    for column in columns:
        table.add_column(column, justify="right")
    for name in names:
        cells = [values.get(name, "-") for values in columns.values()]
        table.add_row(name, *[c if isinstance(c, str) else "-" if c != c else f"{c:.4f}" for c in cells])
    return table


def groups_table(title: str, kind: str, groups: Sequence[Any], names: Sequence[str]) -> Table:
    """A breakdown by ``kind`` (``hstu.metrics.Group`` list): one row per group."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(kind)
    for column in ("users", *names):
        table.add_column(column, justify="right")
    for group in groups:
        table.add_row(group.name, f"{group.count:,}", *[f"{group.metrics[n]:.4f}" for n in names])
    return table


# Plot


def plot_curves(run: Path) -> Path | None:
    """Plots the training loss and the evaluation metrics of ``RUN/metrics.jsonl`` into ``RUN/curves.png``.

    Lines of the file are objects with ``step``: a training line has ``loss``, an evaluation line ``epoch_loss`` and
    ``NAME@K`` or ``TASK/METRIC`` keys. Without matplotlib (an optional package) nothing is drawn, said once, and None
    returned.
    """
    file = run / "metrics.jsonl"
    if not file.exists():
        raise UserError(f"{file} does not exist: is {run} a run folder?")
    try:
        import matplotlib
    except ImportError:
        logging.getLogger(__name__).warning("no curves.png: matplotlib is not installed (pip install matplotlib)")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    losses, curves = _read_curves(file)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, style in (("loss", {"alpha": 0.35, "label": "step"}), ("epoch_loss", {"label": "mean of the epoch"})):
        if losses[name]:
            x, y = zip(*losses[name], strict=True)
            left.plot(x, y, color="tab:blue", linewidth=1.2, **style)
    left.set(title="Training loss", xlabel="step", ylabel="loss")
    colours = ("tab:orange", "tab:green", "tab:purple", "tab:red", "tab:brown", "tab:blue")
    for place, (name, points) in enumerate(curves.items()):
        x, y = zip(*points, strict=True)
        marker = "o" if len(x) < 30 else None
        right.plot(x, y, label=name, color=colours[place % 6], linewidth=1.2, marker=marker, markersize=3)
    right.set(title="Evaluation", xlabel="step", ylabel="metric")
    for panel in (left, right):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        if panel.lines:
            panel.legend(fontsize=8, frameon=False)
    figure.suptitle(f"{run.resolve().parent.name} / {run.resolve().name}", fontsize=10)
    path = run / "curves.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


Points = list[tuple[float, float]]


SHOWN_CURVES = ("@10", "@200", "/auc", "/ne")
"""Metrics that share one axis in ``curves.png``, by the end of their names; all where a run has none of these."""


def _read_curves(file: Path) -> tuple[dict[str, Points], dict[str, Points]]:
    """(step, value) points of ``loss`` and ``epoch_loss``, and of each metric that is shown."""
    losses: dict[str, Points] = {"loss": [], "epoch_loss": []}
    curves: dict[str, Points] = {}
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            step = float(line["step"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file} line {number}: expected a JSON object with step") from None
        for name, value in line.items():
            if not isinstance(value, int | float):
                continue
            if name in losses:
                losses[name].append((step, float(value)))
            elif "@" in name or "/" in name:
                part = f" ({line['kind']})" if line.get("kind") else ""
                curves.setdefault(name + part, []).append((step, float(value)))
    shown = [n for n in curves if n.split(" ")[0].endswith(SHOWN_CURVES)] or list(curves)
    return losses, {name: curves[name] for name in shown}


# The command


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m hstu.report``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m hstu.report", description="README tables, records, curves.")
    commands = parser.add_subparsers(dest="command", required=True)
    readme = commands.add_parser("readme", help="write the README's tables from the records")
    readme.add_argument("--check", action="store_true", help="write nothing; exit 1 if the README differs")
    readme.add_argument("--readme", type=Path, default=ROOT / "README.md")
    readme.add_argument("--results", type=Path, default=RESULTS)
    record = commands.add_parser("record", help="make one record from evaluated runs, one run per seed")
    record.add_argument("name")
    record.add_argument("runs", nargs="+", type=Path)
    record.add_argument("--system", help="row of evaluation.json to record (default: the model)")
    record.add_argument("--date", help="YYYY-MM-DD (default: today)")
    record.add_argument("--results", type=Path, default=RESULTS)
    curves = commands.add_parser("curves", help="plot loss and metrics of a run")
    curves.add_argument("run", type=Path)
    given = list(sys.argv[1:] if arguments is None else arguments)
    bare = not given or given[0] == "--check"
    options = parser.parse_args(["readme", *given] if bare else given)
    try:
        if options.command == "readme":
            return _readme_command(options.readme, options.results, options.check)
        if options.command == "record":
            made = run_record(options.name, options.runs, options.system)
            print(write_record(made, options.results, options.date))
        else:
            print(plot_curves(options.run) or "")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _readme_command(readme: Path, results: Path, check: bool) -> int:
    if not readme.exists():
        raise UserError(f"{readme} does not exist")
    from hstu.readme import fill_readme

    old = readme.read_text(encoding="utf-8")
    new = fill_readme(old, read_records(results), results)
    if not check:
        readme.write_text(new, encoding="utf-8")
        print(f"{readme}: {'unchanged' if new == old else 'tables rewritten'}")
        return 0
    if new != old:
        print(f"{readme} does not agree with {results}: run python -m hstu.report readme", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
