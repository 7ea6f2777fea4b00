"""Plots of benchmark records: TFLOP/s over length, roofline, memory over length; latency of scoring."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.run import OURS, Row
from hstu.report import Record

COLOURS = {
    OURS: "tab:blue", "torch": "tab:gray", "sdpa": "tab:orange", "flex": "tab:green", "reference-triton": "tab:red",
    "cutlass": "tab:purple", "cold": "tab:green", "plain": "tab:gray", "separate": "tab:orange",
}  # fmt: skip
LENGTH = "S"
"""Size that lengths are plotted over."""
NO_SIZES = {"point", "pass", "implementation", "dtype", "device", "ms", "ms_p20", "ms_p80", "wall_ms", "calls",
            "peak_mib", "tflop_s", "gb_s", "share_of_ceiling", "ceiling", "flops", "bytes", "tokens_per_s"}  # fmt: skip
"""What a row holds beside the sizes of its point."""
DPI = 120


def _pyplot() -> Any:
    """matplotlib's pyplot, or None with a word in the log where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        logging.getLogger(__name__).warning("no plots: matplotlib is not installed (pip install matplotlib)")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_record(record: Record, folder: Path, stem: str, roofline: bool = True) -> list[Path]:
    """Plots a record of hstu-bench into ``folder/<stem>-*.png``; returns what was drawn. roofline: that one too."""
    plt = _pyplot()
    if plt is None:
        return []
    rows = [row for row in record.timing["rows"] if "ms" in row]
    ceilings = {name: value["mean"] for name, value in record.metrics.items()}
    title = f"{record.model}, {record.config.get('dtype')}, {record.machine['gpu'] or record.machine['cpu']}"
    drawn = []
    plots: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("tflops", lambda: _over_length(plt, rows, "tflop_s", "TFLOP/s", ceilings.get("product_tflop_s"))),
        ("memory", lambda: _over_length(plt, rows, "peak_mib", "peak memory, MiB", None)),
        ("roofline", lambda: _roofline(plt, rows, ceilings) if roofline else None),
    )
    if record.kind == "scoring":
        plots = (("latency", lambda: _latency(plt, rows)),)
    for name, draw in plots:
        figure = draw()
        if figure is None:
            continue
        figure.suptitle(title, fontsize=10)
        drawn.append(folder / f"{stem}-{name}.png")
        figure.savefig(drawn[-1], dpi=DPI)
        plt.close(figure)
    return drawn


def _series(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Rows that differ in length, pass and implementation only, grouped; the key names the sizes they share."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        sizes = [k for k in row if k not in NO_SIZES and k != LENGTH and row[k] is not None]
        groups.setdefault(tuple(f"{k}={row[k]}" for k in sizes), []).append(row)
    return groups


def _over_length(plt: Any, rows: Sequence[Row], value: str, label: str, ceiling: float | None) -> Any:
    """One panel per group of sizes with several lengths; None where there is none."""
    panels = {}
    for key, members in _series(rows).items():
        for one in ("forward", "both"):
            chosen = [r for r in members if r["pass"] == one and r.get(value) is not None and r.get(LENGTH)]
            if len({r[LENGTH] for r in chosen}) > 1:
                panels[(*key, one)] = chosen
    if not panels:
        return None
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4 * columns, 3.2 * lines), layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (key, chosen) in zip(axes.flat, panels.items(), strict=False):
        for name in dict.fromkeys(r["implementation"] for r in chosen):
            points = sorted((r[LENGTH], r[value]) for r in chosen if r["implementation"] == name)
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, color=COLOURS.get(name))
        if ceiling:
            axis.axhline(ceiling, color="black", linewidth=0.8, linestyle="--", label="measured product")
        _tidy(axis, key, label)
    return figure


def _tidy(axis: Any, key: Sequence[str], label: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set(xlabel="longest user, events", ylabel=label)
    axis.set_title(" ".join(key), fontsize=8)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False)
    axis.set_ylim(bottom=0)


def _latency(plt: Any, rows: Sequence[Row]) -> Any:
    """Time of scoring over the number of candidates, a panel for each model and history, at its usual micro-batch."""
    usual = Counter(row["M"] for row in rows).most_common(1)
    panels: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        if row["M"] == usual[0][0]:
            panels.setdefault((row["D"], row["S"]), []).append(row)
    if not panels:
        return None
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4 * columns, 3.2 * lines), layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, ((dim, length), members) in zip(axes.flat, sorted(panels.items()), strict=False):
        for name in dict.fromkeys(r["implementation"] for r in members):
            points = sorted((r["C"], r["ms"]) for r in members if r["implementation"] == name)
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, color=COLOURS.get(name))
        axis.set(xscale="log", yscale="log", xlabel="candidates", ylabel="ms")
        axis.set_title(f"D={dim}, history of {length:,} events", fontsize=8)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False)
    return figure


def _intensity(row: Row) -> float:
    return float(row["flops"]) / float(row["bytes"])


def _roofline(plt: Any, rows: Sequence[Row], ceilings: dict[str, float]) -> Any:
    """Our rows under the two measured ceilings: TFLOP/s over operations per byte of the least work."""
    ours = [r for r in rows if r["implementation"] == OURS and r["flops"] > 0 and r["bytes"] > 0]
    if not ours or len(ceilings) < 2:
        return None
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    ridge = 1e3 * ceilings["product_tflop_s"] / ceilings["copy_gb_s"]
    low, high = min(0.5 * ridge, *(_intensity(r) for r in ours)) / 2, max(2 * ridge, *(_intensity(r) for r in ours)) * 2
    axis.plot([low, ridge, high], [1e-3 * ceilings["copy_gb_s"] * low, *[ceilings["product_tflop_s"]] * 2], "k--",
              linewidth=0.8, label="measured ceilings")  # fmt: skip
    for one, marker in (("forward", "o"), ("backward", "s"), ("both", "^")):
        chosen = [r for r in ours if r["pass"] == one]
        if chosen:
            axis.scatter(
                [_intensity(r) for r in chosen], [r["tflop_s"] for r in chosen], s=14, marker=marker, label=one
            )
    axis.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, frameon=False)
    return figure
