"""Predicted against measured time of training steps on this machine.

    python -m benchmarks.plan_check [device=cpu] [threads=1] [points=hstu-*] [record=true]
    python -m benchmarks.plan_check again=RECORD.json [record=true]   predicted anew, measured times as recorded

The machine's ceilings (copy, matrix product) are measured in the same run and given to ``hstu-plan`` as its data sheet;
then whole steps (forward, backward, AdamW, one local table) of several models are timed on random batches. With
``record=true`` a record is written.

On a GPU the same command validates the shares of the peaks that ``hstu-plan`` assumes.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.config import asked, find_device
from benchmarks.measure import Ceilings, measure_ceilings, synchronize
from hstu import report
from hstu.allocator import keep_freed_memory
from hstu.cli import command
from hstu.config import LossConfig, OptimConfig
from hstu.config_model import FuXiLinearConfig, HSTUConfig, ModelConfig, SASRecConfig, TransformerConfig
from hstu.config_ranking import ActionConfig, FeatureConfig, HeadConfig, RankingConfig, TaskConfig
from hstu.data.batches import Batch
from hstu.data.ranking_batches import RankingBatch, make_features
from hstu.errors import UserError, one_of
from hstu.model.ranking import RankingModel
from hstu.model.retrieval import RetrievalModel
from hstu.optim import make_optimizer
from hstu.planning.config import BatchPlanConfig, ClusterConfig, PlanConfig, TablePlanConfig
from hstu.planning.cost import Step, plan_step
from hstu.planning.ranking import action_bits
from hstu.planning.work import Workload

WARM_UP_STEPS = 2
LEAST_STEPS = 5


@dataclass(frozen=True)
class Point:
    """A model, its loss, and a batch; or a ranking model."""

    name: str
    model: ModelConfig
    loss: LossConfig
    items: int
    users: int
    ranking: RankingConfig | None = None


def _hstu(dim: int, heads: int, max_len: int, blocks: int = 2) -> HSTUConfig:
    return HSTUConfig(dim=dim, num_heads=heads, qk_dim=dim // heads, v_dim=dim // heads, num_blocks=blocks,
                      max_len=max_len)  # fmt: skip


POINTS = (
    Point("hstu-ml-1m", _hstu(50, 1, 200), LossConfig(), 3883, 64),
    Point("hstu-wide", _hstu(256, 4, 200), LossConfig(), 3883, 16),
    Point("hstu-deep", _hstu(128, 4, 200, blocks=6), LossConfig(), 3883, 16),
    Point("hstu-long", _hstu(64, 2, 1600), LossConfig(num_negatives=16), 3883, 4),
    Point("hstu-bank", _hstu(64, 2, 200), LossConfig(name="shared_bank", num_negatives=4096), 26744, 32),
    Point("hstu-full", _hstu(64, 2, 200), LossConfig(name="full_softmax"), 26744, 16),
    Point("hstu-negatives", _hstu(64, 2, 200), LossConfig(num_negatives=512), 26744, 16),
    Point("hstu-large-table", _hstu(64, 2, 100), LossConfig(), 400_000, 32),
    Point("sasrec-ml-1m", SASRecConfig(), LossConfig(), 3883, 64),
    Point("transformer-wide", TransformerConfig(dim=256, num_heads=4, ffn_dim=512), LossConfig(), 3883, 16),
    Point(
        "hstu-mixture",
        HSTUConfig(similarity="mixture_of_logits", l2_normalize=False),
        LossConfig(num_negatives=32, temperature=1.0),
        3883,
        8,
    ),
    Point("fuxi-ml-20m", FuXiLinearConfig(), LossConfig(), 26744, 32),
    Point("fuxi-wide", FuXiLinearConfig(dim=256, num_heads=4, ffn_dim=256), LossConfig(), 3883, 8),
    Point("fuxi-long", FuXiLinearConfig(max_len=1600), LossConfig(num_negatives=16), 3883, 4),
)


def _ranking(name: str, model: ModelConfig, users: int, **options: Any) -> Point:
    features = {"author": FeatureConfig(), "kind": FeatureConfig()}
    actions = {"seconds": ActionConfig(kind="thresholds", thresholds=[1.0, 3.0, 7.0, 18.0, 60.0])}
    tasks = {"click": TaskConfig(), "like": TaskConfig()}
    ranking = RankingConfig(tasks=tasks, actions=actions, item_features=features,
                            user_features={"country": FeatureConfig()}, **options)  # fmt: skip
    return Point(name, model, LossConfig(), 7583, users, ranking)


RANKING_POINTS = (
    _ranking("ranking-interleaved", _hstu(64, 2, 100), 128),
    _ranking("ranking-fused", _hstu(64, 2, 200), 64, form="fused", targets=16),
    _ranking("ranking-wide", _hstu(256, 4, 100), 16, head=HeadConfig(hidden=[256], shared_experts=2, task_experts=1)),
    _ranking("ranking-transformer", TransformerConfig(dim=128, num_heads=4, ffn_dim=256, max_len=100), 32),
)


@dataclass
class Options:
    """Options of the command."""

    device: str = "auto"
    points: str = "*"
    seconds: float = 4.0
    threads: int | None = None
    record: bool = False
    again: str | None = None


def lengths_of(point: Point) -> torch.Tensor:
    """Skewed lengths, int64 [users]."""
    quantiles = torch.arange(1, point.users + 1, dtype=torch.float64) / point.users
    return (point.model.max_len * quantiles.square()).ceil().to(torch.int64)


def make_batch(point: Point, device: torch.device) -> Batch:
    """Users of skewed lengths, random items."""
    generator, lengths = torch.Generator().manual_seed(0), lengths_of(point)
    total = int(lengths.sum())
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    items = torch.randint(1, point.items + 1, (2, total), generator=generator)
    times = torch.randint(0, 86_400, (total,), generator=generator).cumsum(0)
    users = torch.arange(point.users)
    return Batch(offsets, items[0], times, times + 60, items[1], users, int(lengths.max())).to(device)


def targets_of(point: Point) -> torch.Tensor:
    """Predicted events of each sequence, the last ones, int64 [users]."""
    assert point.ranking is not None
    lengths = lengths_of(point)
    return lengths.clamp(max=point.ranking.targets) if point.ranking.form == "fused" else lengths


def make_ranking_batch(point: Point, config: PlanConfig, device: torch.device) -> RankingBatch:
    """The same with random actions, features and labels."""
    generator, batch, num_targets = np.random.default_rng(0), make_batch(point, torch.device("cpu")), targets_of(point)
    owner = torch.repeat_interleave(batch.offsets.diff())
    targets = (torch.arange(batch.num_events) >= (batch.offsets[1:] - num_targets)[owner]).nonzero()[:, 0]
    features = config.all_features
    coded = {
        owner: {
            f"item.{table.name}" if owner == "item" else table.name:
                (generator.integers(0, table.rows, rows), np.ones(rows, np.int64))
            for table in features.of(owner)
        }
        for owner, rows in (("item", batch.num_events), ("user", point.users))
    }  # fmt: skip
    assert point.ranking is not None
    bits = torch.from_numpy(generator.integers(0, 2, (batch.num_events, action_bits(point.ranking)))).float()
    labels = {task: torch.from_numpy(generator.integers(0, 2, len(targets))).float() for task in point.ranking.tasks}
    return RankingBatch(
        batch.offsets, batch.item_ids, batch.timestamps, bits, num_targets, targets, labels, targets, batch.users,
        make_features(coded["item"], np.empty((batch.num_events, 0))),
        make_features(coded["user"], np.empty((point.users, 0))), batch.max_len, int(num_targets.max()),
    ).to(device)  # fmt: skip


def make_ranking_model(point: Point, config: PlanConfig) -> RankingModel:
    """With what it asks of a store taken from the plan."""
    assert point.ranking is not None
    features = config.all_features
    data = SimpleNamespace(
        store=SimpleNamespace(num_items=point.items), num_prefix=features.num_prefix,
        token_feature_sizes={f"item.{table.name}": table.rows for table in features.of("item")},
        user_feature_sizes={table.name: table.rows for table in features.of("user")}, token_number_names=[],
        user_number_names=[], num_action_bits=action_bits(point.ranking),
    )  # fmt: skip
    return RankingModel(point.model, point.ranking, data)  # type: ignore[arg-type]


def time_step(point: Point, device: torch.device, seconds: float) -> float:
    """Median seconds of a step; on the CPU the time that the process computed."""
    torch.manual_seed(0)
    config = plan_of(point, device)
    batch: Batch | RankingBatch
    model: RetrievalModel | RankingModel
    if point.ranking is None:
        model, batch = RetrievalModel(point.model, point.items, point.loss).to(device), make_batch(point, device)
    else:
        model, batch = make_ranking_model(point, config).to(device), make_ranking_batch(point, config, device)
    optimizer = make_optimizer(model, OptimConfig())
    low = device.type == "cuda"
    clock = time.perf_counter if low else time.process_time
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < WARM_UP_STEPS + LEAST_STEPS or time.perf_counter() - begun < seconds:
        synchronize(device)
        start = clock()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            loss = model.loss(batch, len(times))  # type: ignore[arg-type]
        loss.backward()
        optimizer.step()
        synchronize(device)
        times.append(clock() - start)
    return float(np.median(times[WARM_UP_STEPS:]))


def plan_of(point: Point, device: torch.device, **cluster: float) -> PlanConfig:
    """One local table on one device. cluster: what is known of it."""
    gpu, precision = ("h200", "bfloat16") if device.type == "cuda" else ("cpu", "float32")
    table = TablePlanConfig(rows=point.items, kind="local", optimizer="adamw")
    return PlanConfig(table, ClusterConfig(gpu=gpu, gpus=1, **cluster), BatchPlanConfig(mean_len=1.0), point.model,  # type: ignore[arg-type]
                      point.loss, precision, ranking=point.ranking)  # fmt: skip


def predict(point: Point, device: torch.device, ceilings: Ceilings) -> Step:
    """What ``hstu-plan`` says of the same step on a machine with these ceilings."""
    config = plan_of(point, device, peak_tflops=ceilings.product_tflop_s, hbm_gbps=ceilings.copy_gb_s)
    targets = 0 if point.ranking is None else targets_of(point).numpy()
    return plan_step(config, Workload.of_lengths(lengths_of(point).numpy(), point.model, config.form, targets))


def row_of(point: Point, step: Step, measured: float) -> dict[str, Any]:
    """Predicted beside measured seconds, for a record; printed too."""
    parts = {part.name: round(1e3 * part.seconds, 2) for part in step.parts}
    print(f"{point.name:18} measured {1e3 * measured:8.1f} ms  predicted {1e3 * step.seconds:8.1f} ms  "
          f"ratio {step.seconds / measured:.2f}  {parts}")  # fmt: skip
    return {"point": point.name, "measured_ms": 1e3 * measured, "predicted_ms": 1e3 * step.seconds,
            "ratio": step.seconds / measured, "tokens": step.tokens, "parts_ms": parts}  # fmt: skip


def check_again(path: Path) -> report.Record:
    """The record with today's predictions of what it measured.

    Raises UserError where there is no record of this command, or where it names a model that is not one of ours now.
    """
    values = report.read_json(path, "give the path of a record of this command")
    if not str(values.get("name")).startswith("plan-check-"):
        raise UserError(f"again={path}: a record of {values.get('name')}, expected one of plan-check-cpu or -cuda")
    device = torch.device(values["config"]["device"])
    known = {name: values["metrics"][name]["mean"] for name in ("copy_gb_s", "product_tflop_s")}
    ceilings = Ceilings(**known, dtype="float32" if device.type == "cpu" else "bfloat16")
    points = {point.name: point for point in (*POINTS, *RANKING_POINTS)}
    rows = []
    for row in values["timing"]["rows"]:
        one_of(f"{path}: point", row["point"], tuple(points))
        point = points[row["point"]]
        rows.append(row_of(point, predict(point, device, ceilings), 1e-3 * row["measured_ms"]))
    values["metrics"] |= report.aggregate([{"predicted_over_measured": row["ratio"]} for row in rows])
    values["timing"] = {"rows": rows}
    values["config"]["predicted_at"] = report.commit()
    return report.Record(**values)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, records."""
    options = asked(Options, arguments, __doc__)
    if options is None:
        return 0
    record = measure(options) if options.again is None else check_again(Path(options.again))
    if options.record:
        print(f"written to {report.write_record(record)}")
    return 0


def measure(options: Options) -> report.Record:
    """Ceilings and steps of this machine, with what is predicted of them."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    device = find_device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ceilings = measure_ceilings(device, dtype, cpu_time=True)
    print(f"ceilings: copy {ceilings.copy_gb_s:,.1f} GB/s, product {ceilings.product_tflop_s:,.3g} TFLOP/s")
    rows = [
        row_of(point, predict(point, device, ceilings), time_step(point, device, options.seconds))
        for point in (*POINTS, *RANKING_POINTS)
        if fnmatch.fnmatch(point.name, options.points)
    ]
    metrics = report.aggregate([{"copy_gb_s": ceilings.copy_gb_s, "product_tflop_s": ceilings.product_tflop_s}])
    metrics |= report.aggregate([{"predicted_over_measured": row["ratio"]} for row in rows])
    return report.Record(
        name=f"plan-check-{device.type}", kind="training", dataset="random", protocol=None, split_hash=None,
        model="all", seeds=[0], metrics=metrics, timing={"rows": rows},
        config={"device": device.type, "threads": torch.get_num_threads()},
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
