"""The README's result tables, made from the records of benchmarks/results.

`python -m hstu.report readme` writes them, a test checks that they agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hstu.errors import UserError
from hstu.report import GROUP_SEPARATOR, OURS, RESULTS, Record, markdown_table

README_METRICS = ("hr@10", "ndcg@10", "hr@50", "ndcg@50", "hr@200", "ndcg@200")
RANKING_METRICS = ("auc", "gauc", "ne", "calibration", "accuracy", "mae", "rmse")
BLOCKS = ("accuracy", "ranking", "timing", "scoring", "kernels", "provenance")
"""README blocks, each between ``<!-- results:NAME -->`` and ``<!-- /results:NAME -->``."""


def readme_block(block: str, records: Sequence[tuple[str, Record]], results: Path = RESULTS) -> str:
    """Markdown of one README block; ``results`` is the folder of the records and their plots."""
    if block == "kernels":
        on_gpu = [(file, r) for file, r in records if r.kind == "kernel" and _is_gpu_record(r)]
        return _kernels([r for _, r in on_gpu]) + _plots([file for file, _ in on_gpu], results)
    if not records:
        return "No records yet."
    if block == "accuracy":
        return _accuracy([r for _, r in records if any(m in r.metrics for m in README_METRICS)])
    if block == "ranking":
        return _ranking([r for _, r in records if r.kind == "ranking"])
    if block == "timing":
        return _timing([r for _, r in records if r.kind not in ("kernel", "scoring")])
    if block == "scoring":
        scored = [(file, r) for file, r in records if r.kind == "scoring" and not r.config.get("toy")]
        return _scoring([r for _, r in scored]) + _plots([file for file, _ in scored], results)
    return _provenance(records)


def _accuracy(records: Sequence[Record]) -> str:
    """One table per data set and protocol; the published row stands below the rows it is compared with."""
    tables: dict[tuple[str, str | None], list[Record]] = {}
    for record in records:
        tables.setdefault((record.dataset, record.protocol), []).append(record)
    parts = []
    for (dataset, protocol), members in tables.items():
        rows = []
        for record in members:
            groups = [""] + sorted({m.split(GROUP_SEPARATOR)[1] for m in record.metrics if GROUP_SEPARATOR in m})
            selection = record.config.get("run", {}).get("selection", "")
            for group in groups:
                suffix = GROUP_SEPARATOR + group if group else ""
                cells = [_mean_std(record.metrics.get(m + suffix)) for m in README_METRICS]
                seeds = ", ".join(map(str, record.seeds))
                rows.append([_system(record), selection, group or "all users", *cells, seeds])
            if record.published:
                values = record.published["metrics"]
                cells = [f"{values[m]:.4f}" if m in values else "" for m in README_METRICS]
                source = f"*published: {record.published.get('source', '')}*"
                if [source, *cells] not in [[r[0], *r[3:-1]] for r in rows]:
                    rows.append([source, "", "", *cells, ""])
        head = ["Experiment", "Selection", "Users", *[m.upper() for m in README_METRICS], "Seeds"]
        parts.append(f"**{dataset}**, protocol `{protocol}`\n\n" + markdown_table(head, rows))
    return "\n\n".join(parts) if parts else "No records yet."


def _ranking(records: Sequence[Record]) -> str:
    """One table per data set, split and task: AUC, AUC per user, normalised entropy, calibration, or errors."""
    tables: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        data = record.config.get("data", {})
        split = f"{data.get('split')} {data.get('split_time') or ''}".strip()
        if record.config.get("ranking", {}).get("mode") == "progressive":
            split = "progressive"
        for task in dict.fromkeys(metric.partition("/")[0] for metric in record.metrics):
            tables.setdefault((record.dataset, split, task), []).append(record)
    parts = []
    for (dataset, split, task), members in tables.items():
        names = [n for n in RANKING_METRICS if any(f"{task}/{n}" in r.metrics for r in members)]
        rows = [
            [_system(r), *[_mean_std(r.metrics.get(f"{task}/{n}")) for n in names], ", ".join(map(str, r.seeds))]
            for r in members
        ]
        table = markdown_table(["System", *[n.upper() for n in names], "Seeds"], rows)
        parts.append(f"**{dataset}**, split `{split}`, task **{task}**\n\n{table}")
    return "\n\n".join(parts) if parts else "No records yet."


def _system(record: Record) -> str:
    """The experiment; of a baseline's record the baseline and the experiment whose run it was ranked with."""
    experiment = record.config.get("experiment") or record.model
    model = record.config.get("model", {}).get("name", record.model)
    return str(experiment) if record.model == model else f"{record.model} ({experiment})"


def _timing(records: Sequence[Record]) -> str:
    """One table per set of columns, values that are parts of others left out; every record with a timing appears."""
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for record in records:
        rows = record.timing.get("rows", [record.timing] if record.timing else [])
        for row in rows:
            values = {name: value for name, value in row.items() if not isinstance(value, dict)}
            cells = [record.name, record.kind, *[_number(v) for v in values.values()]]
            tables.setdefault(tuple(values), []).append(cells)
    parts = [markdown_table(["Record", "Kind", *columns], rows) for columns, rows in tables.items()]
    return "\n\n".join(parts) if parts else "No records yet."


def _is_gpu_record(record: Record) -> bool:
    """Whether it was measured on a GPU, at sizes that mean something."""
    return bool(record.machine.get("gpu")) and record.config.get("device") == "cuda" and not record.config.get("toy")


def _plots(files: Sequence[str], results: Path) -> str:
    """The plots that lie beside the records ``files`` in ``results``, as Markdown images."""
    kinds = ("tflops", "memory", "roofline", "latency")
    names = [f"{file.removesuffix('.json')}-{plot}" for file in files for plot in kinds]
    found = [name for name in names if (results / f"{name}.png").exists()]
    return "".join(f"\n\n![{name[11:]}](benchmarks/results/{name}.png)" for name in found)  # 11: without the date


def _scoring(records: Sequence[Record]) -> str:
    """A line per point: the time against a cache, and how many times as long the other ways take."""
    lines = []
    for record in records:
        rows = [row for row in record.timing["rows"] if "ms" in row]
        machine = record.machine["gpu"] or f"{record.machine['cpu']}, {record.config.get('threads')} threads"
        for row in (row for row in rows if row["implementation"] == OURS):
            others = {r["implementation"]: f"{r['ms'] / row['ms']:.1f}x" for r in rows if r["point"] == row["point"]}
            model = f"D={row['D']}, {row['H']} heads, {row['layers']} layers, {row['dtype']}"
            spread = f"{_number(row['ms_p20'])} .. {_number(row['ms_p80'])}"
            sizes = [f"{row[size]:,}" for size in ("S", "C", "M")]
            beside = [others.get(name, "") for name in ("cold", "plain", "separate")]
            lines.append([model, *sizes, _number(row["ms"]), spread, f"{row['tokens_per_s']:,.0f}", *beside, machine])
    if not lines:
        return "No records yet."
    names, measured = ("History", "Candidates", "Micro-batch"), ("ms", "20 .. 80 %", "Candidates/s")
    return markdown_table(["Model", *names, *measured, "Cold", "Plain", "Separate", "Machine"], lines)


def _kernels(records: Sequence[Record]) -> str:
    """Ops on a GPU, ours beside what a user would pick instead.

    Of an op that has points with a competitor only those are shown, so that the table stays short.
    """
    shown: dict[tuple[str, str, str, str], tuple[Record, Mapping[str, Any], dict[str, float]]] = {}
    for record in records:
        rows = [row for row in record.timing.get("rows", []) if "ms" in row and row["pass"] != "backward"]
        for row in rows:
            key = record.model, str(row["point"]), str(row["pass"]), str(row["dtype"])
            if row["implementation"] == OURS:  # others of the same run only
                others = {
                    r["implementation"]: r["ms"]
                    for r in rows
                    if r["implementation"] != OURS and (r["point"], r["pass"], r["dtype"]) == key[1:]
                }
                if others or key not in shown or not shown[key][2]:
                    shown[key] = record, row, others
    compared = {key[0] for key, (_, _, others) in shown.items() if others}
    lines = []
    for place, (record, row, others) in shown.items():
        if place[0] in compared and not others:
            continue
        beside = ", ".join(f"{name} {ms / row['ms']:.1f}x" for name, ms in others.items())
        share = f"{100 * row['share_of_ceiling']:.0f} % ({row['ceiling']})"
        figures = [_number(float(row[k])) for k in ("ms", "tflop_s", "gb_s")]
        peak = "" if row.get("peak_mib") is None else _number(float(row["peak_mib"]))
        lines.append([*place, *figures, share, peak, beside, str(record.machine["gpu"])])
    if not lines:
        return "On a GPU: not measured."
    measured = ("ms", "TFLOP/s", "GB/s", "Of the ceiling", "Peak MiB", "Time of others")
    return markdown_table(["Op", "Point", "Pass", "Dtype", *measured, "GPU"], lines)


def _provenance(records: Sequence[tuple[str, Record]]) -> str:
    head = ["Record", "Machine", "Python, torch", "Commit", "Split hash", "Seeds"]
    rows = []
    for file, r in records:
        m = r.machine
        memory = f", {m['memory_gib']:.0f} GiB" if m.get("memory_gib") else ""
        gpu = f", {m['gpu']} (driver {m['driver']})" if m.get("gpu") else ""
        rows.append([
            f"[{r.name}](benchmarks/results/{file})", f"{m['cpu']}, {m['cores']} cores{memory}{gpu}",
            f"{r.versions.get('python', '')}, {r.versions.get('torch', '')}", _short(r.commit), r.split_hash or "",
            ", ".join(map(str, r.seeds)),
        ])  # fmt: skip
    return markdown_table(head, rows)


def _short(sha: str | None) -> str:
    parts = [] if sha is None else sha.split(", ")
    return ", ".join(part[:10] + ("-dirty" if part.endswith("-dirty") else "") for part in parts)


def _mean_std(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    return f"{value['mean']:.4f}" + (f" ± {value['std']:.4f}" if len(value["values"]) > 1 else "")


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def fill_readme(text: str, records: Sequence[tuple[str, Record]], results: Path = RESULTS) -> str:
    """``text`` with every results block rewritten. UserError where it has no block at all or an unclosed one."""
    found = False
    for block in BLOCKS:
        start, end = f"<!-- results:{block} -->", f"<!-- /results:{block} -->"
        if start not in text and end not in text:
            continue
        if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
            raise UserError(f"README block {block}: expected one {start} followed by one {end}")
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n{readme_block(block, records, results)}\n{end}{rest.partition(end)[2]}"
        found = True
    if not found:
        raise UserError(
            f"README has no results block: add <!-- results:{BLOCKS[0]} --> and <!-- /results:{BLOCKS[0]} -->"
        )
    return text
