"""Times and memory that ``hstu-plan`` predicts for trainings that others have measured on GPUs, beside theirs.

    python -m benchmarks.plan_published [record=true] [save=results]

Needs no GPU: what was measured is in ``benchmarks/published.py``, and the plan is the command's own, from the same
options. The kernels measured are not ours, so three predictions stand beside each measurement:

    predicted   what ``hstu-plan`` says of our kernels at that size
    same work   scaled by the work that they count over the work that ours does, where they count it
    their share the same with attention at the share of the peak that theirs reached when it was measured alone

With ``record=true`` a record is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from benchmarks import published
from benchmarks.config import asked
from benchmarks.published import Measured, Share
from hstu import report
from hstu.cli import command, conf_dir, register_schemas
from hstu.planning.config import FLOAT, ClusterConfig, PlanConfig, from_options
from hstu.planning.cost import Step, TimePart, plan_step
from hstu.planning.layers import layer_bytes, layer_workspace
from hstu.planning.work import Workload

GROUPS = {
    "linear layers": ("linear layers",),
    "attention": ("attention",),
    "element-wise": ("element-wise", "tokens, heads: rest", "dense optimizer"),
    "heads": ("heads",),
    "embedding": ("embedding", "rows in host memory"),
}
"""Parts of a plan by the names under which they were measured; all transfers are ``communication``."""
LAYER_GROUPS = {name: (name,) for name in ("linear layers", "attention", "element-wise")}
"""Of a layer alone, which nothing updates."""
GRADIENTS = ("gradients of dense weights",)
"""Transfers whose size goes with the model's width, not the tables'."""
FIVE_OF_SEVEN = 7 / 9
"""Products for a pair of an attention with five in its backward pass, over ours with seven; two forward in both."""


@cache
def plan_of(options: tuple[str, ...]) -> PlanConfig:
    """What ``hstu-plan`` would plan with these options.

    Raises UserError where it would refuse them.
    """
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    register_schemas()
    with initialize_config_dir(config_dir=str(conf_dir()), version_base=None):
        composed = compose("commands/plan", overrides=list(options))
    return from_options(cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True)), options)


def step_of(options: tuple[str, ...]) -> Step:
    """Its step."""
    config = plan_of(options)
    return plan_step(config, Workload.planned(config))


def _seconds(parts: Sequence[TimePart], names: Sequence[str]) -> float:
    return sum(part.seconds for part in parts if part.name in names)


def predict_ms(measured: Measured) -> dict[str, float]:
    """Milliseconds by the names of :data:`GROUPS`, and ``communication``; tables by their own options."""
    step = step_of(measured.options)
    if not measured.is_step:
        return {group: 1e3 * _seconds(step.parts, names) for group, names in LAYER_GROUPS.items()}
    found = {group: _seconds(step.parts, names) for group, names in GROUPS.items()}
    sent = [t for t in step.transfers if measured.table_options is None or t.name in GRADIENTS]
    if measured.table_options is not None:
        tables = step_of(measured.table_options)
        found["embedding"] = _seconds(tables.parts, GROUPS["embedding"])
        sent += [t for t in tables.transfers if t.name not in GRADIENTS]
    found["communication"] = sum(t.seconds for t in sent)
    return {group: 1e3 * seconds for group, seconds in found.items()}


def same_work(measured: Measured, predicted: Mapping[str, float]) -> dict[str, float]:
    """The prediction for the work that they count, where they do."""
    parts = {part.name: part for part in step_of(measured.options).parts}
    ours = {group: sum(parts[name].flops for name in GROUPS[group] if name in parts) / 1e12 for group in measured.tflop}
    return {group: ms * (measured.tflop[group] / ours[group] if group in ours else 1.0)
            for group, ms in predicted.items()}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table; times in ms. their_share: None where their attention was not measured alone."""

    what: str
    part: str
    kernels: str
    predicted: float
    same_work: float
    their_share: float | None
    measured: float

    def ratios(self) -> dict[str, float | None]:
        """Predicted over measured, by kind of prediction."""
        known = {"predicted": self.predicted, "same_work": self.same_work, "their_share": self.their_share}
        return {name: None if value is None else value / self.measured for name, value in known.items()}

    def to_dict(self) -> dict[str, Any]:
        """For a record."""
        ratios = {f"{name}_ratio": value for name, value in self.ratios().items()}
        return {"point": self.what, "part": self.part, "kernels": self.kernels, "measured_ms": self.measured,
                "predicted_ms": self.predicted, **ratios}  # fmt: skip


def rows_of(measured: Measured) -> list[Row]:
    """Its parts, where they were measured, and the sum."""
    predicted = predict_ms(measured)
    scaled = same_work(measured, predicted)
    theirs: dict[str, float | None] = dict.fromkeys([*scaled, "all"])
    if measured.attention_share is not None:
        share = ClusterConfig().attention_fraction / measured.attention_share
        own = {**scaled, "attention": scaled["attention"] * share}
        theirs = {**own, "all": sum(own.values())}
    rows = [
        Row(measured.name, group, measured.kernels, predicted[group], scaled[group], theirs[group], ms)
        for group, ms in measured.parts_ms.items()
    ]
    if measured.other_ms:
        rows.append(Row(measured.name, "idle and others", measured.kernels, 0.0, 0.0, None, measured.other_ms))
    part = "step" if measured.is_step else "layer"
    return [*rows, Row(measured.name, part, measured.kernels, sum(predicted.values()), sum(scaled.values()),
                       theirs["all"], measured.total_ms)]  # fmt: skip


def attention_rows() -> list[Row]:
    """CUTLASS attention alone, by width and length."""
    rows = []
    for width, times in published.HEATMAP_MS.items():
        for length, measured in zip(published.HEATMAP_LENGTHS, times, strict=True):
            config = plan_of(published.heatmap_options(width, length))
            (part,) = (p for p in plan_step(config, Workload.planned(config)).parts if p.name == "attention")
            products = part.flops / (config.peak_tflops * 1e12 * config.cluster.attention_fraction)
            # Where it waits for memory fewer products save nothing.
            same = products * FIVE_OF_SEVEN if part.resource == "compute" else part.seconds
            rows.append(Row(f"4 heads of {width}, {length:,} tokens", "attention", "CUTLASS", 1e3 * part.seconds,
                            1e3 * same, None, measured))  # fmt: skip
    return rows


def memory_row() -> dict[str, Any]:
    """Peak of layers alone: what they keep, what the last one's backward pass needs, the gradient that it gets."""
    length = published.SNAPSHOT_LENGTH
    (layer,) = (m for m in published.layers() if m.kernels == "Triton" and f" {length:,} " in m.name)
    config = plan_of(layer.options)
    work = Workload.planned(config)
    gradient = work.tokens * config.model.dim * FLOAT
    peak = published.SNAPSHOT_LAYERS * layer_bytes(config, work) + layer_workspace(config, work) + gradient
    measured = published.SNAPSHOT_GB["fused, recomputed"]
    return {"point": f"peak of {published.SNAPSHOT_LAYERS} layers, {length:,} tokens", "part": "memory",
            "kernels": "CUTLASS, fused, recomputed", "predicted_gb": peak / 1e9, "measured_gb": measured,
            "ratio": peak / 1e9 / measured}  # fmt: skip


def all_rows() -> list[Row]:
    """Whole steps, layers, attention."""
    rows = [row for step in (published.FULL_STEP, *published.ZIPF_STEPS) for row in rows_of(step)]
    rows += [row for layer in published.layers() for row in rows_of(layer)]
    return rows + attention_rows()


def share_dict(share: Share) -> dict[str, Any]:
    """A share of a peak beside the default that stands for it."""
    return {"point": share.what, "part": share.option, "kernels": share.kernels, "reached": share.reached,
            "peak": share.peak, "share": share.share,
            "default": getattr(ClusterConfig(), share.option), "source": share.source.place}  # fmt: skip


def _print(rows: Sequence[Row], memory: Mapping[str, Any], shares: Sequence[Mapping[str, Any]]) -> None:
    columns = ("measured", "predicted", "ratio", "same work", "their share")
    print(f"{'what':30} {'part':15} {'kernels':26} " + " ".join(f"{name:>11}" for name in columns))
    for row in rows:
        ratios = " ".join(" " * 11 if value is None else f"{value:11.2f}" for value in row.ratios().values())
        print(f"{row.what:30} {row.part:15} {row.kernels:26} {row.measured:8.2f} ms {row.predicted:8.2f} ms {ratios}")
    print(f"{memory['point']:30} {'memory':15} {memory['kernels']:26} {memory['measured_gb']:8.1f} GB "
          f"{memory['predicted_gb']:8.1f} GB {memory['ratio']:11.2f}")  # fmt: skip
    print(f"\n{'share of the peak':20} {'of':58} {'kernels':10} {'reached':>8} {'default':>8}")
    for share in shares:
        print(f"{share['part']:20} {share['point']:58} {share['kernels']:10} {share['share']:8.2f} "
              f"{share['default']:8.2f}")  # fmt: skip


@dataclass
class Options:
    """Options of the command."""

    record: bool = False
    save: str | None = None


def make_record(rows: Sequence[Row], memory: Mapping[str, Any], shares: Sequence[Mapping[str, Any]]) -> report.Record:
    """Steps, their parts and the layers with Triton attention as rows; the rest and what it was made from beside."""
    whole = [row for row in rows if row.part == "step" or (row.part, row.kernels) == ("layer", "Triton")]
    metrics = report.aggregate([
        {"predicted_over_measured": row.predicted / row.measured,
         "same_work_over_measured": row.same_work / row.measured} for row in whole
    ])  # fmt: skip
    shown = [row for row in rows if row.part not in ("layer", "attention") or row.kernels == "Triton"
             or row.what == published.FULL_STEP.name]  # fmt: skip
    steps = (published.FULL_STEP, *published.ZIPF_STEPS, *published.layers())
    sources = {s.place: f"{s.version}; {s.hardware}"
               for s in (*(step.source for step in steps), published.SNAPSHOT, published.HEATMAP,
                         *(share.source for share in published.shares()))}  # fmt: skip
    return report.Record(
        name="plan-published", kind="training", dataset="published measurements", protocol=None, split_hash=None,
        model="hstu", seeds=[0], metrics=metrics, timing={"rows": [row.to_dict() for row in shown]},
        config={
            "sources": sources, "differences": list(published.FULL_STEP.differences),
            "options": {f"{s.name} | {s.kernels}": " ".join(s.options) for s in steps},
            "more": [row.to_dict() for row in rows if row not in shown], "memory": dict(memory),
            "shares": [dict(share) for share in shares],
        },
    )  # fmt: skip


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Predicts, prints, records."""
    options = asked(Options, arguments, __doc__)
    if options is None:
        return 0
    rows, memory, shares = all_rows(), memory_row(), [share_dict(share) for share in published.shares()]
    _print(rows, memory, shares)
    if options.record:
        folder = report.RESULTS if options.save is None else Path(options.save)
        print(f"written to {report.write_record(make_record(rows, memory, shares), folder)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
