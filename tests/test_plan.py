"""``hstu-plan``: costs by hand, the search, what torchrec's planner says, the command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hstu.config import HSTUConfig, LossConfig
from hstu.config_model import FuXiLinearConfig
from hstu.errors import UserError
from hstu.feature_tables import BAGS
from hstu.planning.config import GIB, GPUS, BatchPlanConfig, ClusterConfig, PlanConfig, TablePlanConfig, from_options
from hstu.planning.cost import Network, TimePart, compute_parts, loss_transfers, plan_step, row_transfers, transfers
from hstu.planning.memory import plan_memory
from hstu.planning.search import Plan, mends, smallest_cluster
from hstu.planning.tables import shard_shape
from hstu.planning.work import Workload

ROOT = Path(__file__).resolve().parent.parent
MODEL = HSTUConfig(dim=256, num_blocks=4, num_heads=4, qk_dim=64, v_dim=64, max_len=1000)
LARGE = TablePlanConfig(rows=10**9, dtype="bfloat16", sharding="row_wise")


def planned(table: TablePlanConfig = LARGE, loss: LossConfig | None = None, **cluster: Any) -> PlanConfig:
    batch = BatchPlanConfig(tokens_per_gpu=20_000, mean_len=500)
    return PlanConfig(table, ClusterConfig(**cluster), batch, MODEL, loss or LossConfig())


# Communication


def network(**cluster: Any) -> Network:
    """NVLink 100 and network 10 GB/s, all of which is reached, nothing to start."""
    options = {"nvlink_gbps": 100, "network_gbps": 10, "network_fraction": 1.0, "collective_us": 0.0}
    return Network(planned(**{**options, **cluster}))


def test_exchange_in_one_node_by_hand() -> None:
    """4 GPUs, 8 GB each: three quarters go to the others at 100 GB/s."""
    sent = network(gpus=4, gpus_per_node=8).all_to_all("x", 8e9)
    assert (sent.sent, sent.outside, sent.seconds) == (6e9, 0.0, pytest.approx(0.06))


def test_exchange_over_nodes_by_hand() -> None:
    """16 GPUs in nodes of 4: three quarters leave the node at 10 GB/s; the 3/16 that stay are done before."""
    sent = network(gpus=16, gpus_per_node=4).all_to_all("x", 16e9)
    assert (sent.sent, sent.outside, sent.seconds) == (15e9, 12e9, pytest.approx(1.2))


def test_gather_over_nodes_by_hand() -> None:
    """16 GPUs in nodes of 4, 16 GB in all: 12 GB enter a node over 4 cards, 0.3 s; by NVLink 15 GB take 0.15 s."""
    sent = network(gpus=16, gpus_per_node=4).all_gather("x", 16e9)
    assert (sent.sent, sent.outside, sent.seconds) == (15e9, 3e9, pytest.approx(0.3))


def test_starting_counts_for_every_call() -> None:
    assert network(gpus=4, collective_us=50.0).all_to_all("x", 0.0, calls=2).seconds == pytest.approx(1e-4)


def test_one_gpu_sends_nothing() -> None:
    config = planned(gpus=1)
    assert transfers(config, Workload.planned(config)) == []


def test_queries_travel_or_rows() -> None:
    """Fresh negatives are 128 rows a position, queries one from each GPU; a bank of 4,096 rows is cheaper to fetch."""
    for loss, cheaper in ((LossConfig(), "queries"), (LossConfig(name="shared_bank", num_negatives=4096), "rows")):
        config = planned(loss=loss, gpus=256)
        work = Workload.planned(config)
        queries, rows = (sum(t.seconds for t in way(config, work)) for way in (loss_transfers, row_transfers))
        assert ("queries" if queries < rows else "rows") == cheaper


def test_narrow_rows_between_gpus() -> None:
    def bytes_of(comm_dtype: str) -> dict[str, float]:
        config = planned(replace(LARGE, comm_dtype=comm_dtype), gpus=8)
        return {t.name: t.sent for t in transfers(config, Workload.planned(config))}

    wide, narrow = bytes_of("float32"), bytes_of("bfloat16")
    assert wide["rows of events"] == 20_000 * 7 / 8 * 256 * 4
    for name in ("rows of events", "gradients of events"):
        assert wide[name] == 2 * narrow[name]
    assert wide["queries"] == narrow["queries"]


# Time


def parts_of(config: PlanConfig) -> dict[str, TimePart]:
    return {part.name: part for part in compute_parts(config, Workload.planned(config))}


FULL = {"linear_fraction": 1.0, "attention_fraction": 1.0, "hbm_fraction": 1.0}
"""All of the peaks."""


def test_linear_layers_and_attention_by_hand() -> None:
    """All of the peak of 100 TFLOP/s, memory without cost. 20 users of 1,000 tokens, D = H A = H V = 256, 4 layers."""
    batch = BatchPlanConfig(tokens_per_gpu=20_000, mean_len=1000)
    config = replace(planned(gpus=1, peak_tflops=100, hbm_gbps=1e9, **FULL), batch=batch)
    parts = parts_of(config)
    linear = 4 * 20_000 * (8 * 256 * 1024 + 6 * 256 * 256)
    pairs = 20 * 1000 * 1001 / 2
    attention = 4 * 9 * 2 * pairs * 256  # two products forward, seven backward
    assert parts["linear layers"].flops == linear
    assert parts["linear layers"].seconds == pytest.approx(linear / 1e14)
    assert parts["attention"].flops == pytest.approx(attention)
    assert (parts["attention"].resource, parts["attention"].seconds) == ("compute", pytest.approx(attention / 1e14))


@pytest.mark.parametrize(("gpu", "each"), [("h200", 5 * 64 + 4 * 16), ("cpu", 3.5 * (64 + 16))])
def test_products_of_attention_go_with_both_widths(gpu: str, each: float) -> None:
    """A = 64, V = 16. The Triton kernels' backward pass: A, V, V and A for k and v, then A, V and A for q."""
    model = replace(MODEL, v_dim=16)
    config = replace(planned(gpu=gpu, gpus=1), model=model, batch=BatchPlanConfig(tokens_per_gpu=2000, mean_len=1000))
    assert parts_of(config)["attention"].flops == pytest.approx(4 * 2 * (2 * 1000 * 1001 / 2) * 4 * each)


@pytest.mark.parametrize(
    ("model", "part", "share"),
    [(MODEL, "attention", 0.25), (FuXiLinearConfig(max_len=1000), "mixers", 0.5)],
    ids=["attention-kernels", "torchs-own-products"],
)
def test_which_share_of_the_peak_counts(model: HSTUConfig | FuXiLinearConfig, part: str, share: float) -> None:
    """Of 100 TFLOP/s; FuXi-Linear's mixers are batched products."""
    config = replace(planned(gpus=1, peak_tflops=100, linear_fraction=0.5, attention_fraction=0.25), model=model)
    found = parts_of(config)[part]
    assert found.seconds == pytest.approx(found.flops / (1e14 * share))


def test_attention_of_short_users_waits_for_memory() -> None:
    """2,000 users of one token, 4 layers: 15 passes over 256 numbers of 2 bytes, and 9 products of one pair a user."""
    model = replace(MODEL, max_len=1)
    config = replace(planned(gpus=1, hbm_gbps=1, **FULL), model=model, batch=BatchPlanConfig(tokens_per_gpu=2000))
    part = parts_of(config)["attention"]
    assert (part.resource, part.seconds) == ("HBM bandwidth", pytest.approx(4 * 2000 * 15 * 256 * 2 / 1e9))
    assert part.flops == pytest.approx(4 * 2 * 2000 * 9 * 256)


def test_element_wise_work_waits_for_the_products() -> None:
    """Six times what a layer keeps, its input of 4 D bytes and 5 D numbers of 2, at 1 GB/s; beside the products."""
    config = planned(gpus=1, hbm_gbps=1, **FULL)
    parts = parts_of(config)
    moved = 4 * 6 * 20_000 * 14 * 256
    assert parts["element-wise"].seconds == pytest.approx(moved / 1e9)
    assert parts["linear layers"].bytes == 0.0 and parts["linear layers"].seconds > 0
    step = plan_step(config, Workload.planned(config))
    assert step.seconds == pytest.approx(sum(part.seconds for part in step.parts))


@pytest.mark.parametrize(
    ("cluster", "resource"),
    [
        ({"hbm_gbps": 10}, "HBM bandwidth"),
        ({"peak_tflops": 0.1}, "compute"),
        ({"network_gbps": 0.1, "gpus_per_node": 2}, "network"),
        ({"nvlink_gbps": 0.1}, "NVLink"),
    ],
)
def test_what_is_slow_limits(cluster: dict[str, Any], resource: str) -> None:
    config = planned(gpus=8, **cluster)
    assert plan_step(config, Workload.planned(config)).limited_by == resource


def test_rows_in_host_memory_cost_time() -> None:
    near, far = (Plan.of(planned(replace(LARGE, placement=p), gpus=8)) for p in ("hbm", "uvm_caching"))
    assert far.step.seconds > near.step.seconds
    assert far.memory.total < near.memory.total
    assert any(part.resource == "PCIe" for part in far.step.parts)


def test_recorded_step_times_are_predicted_within_a_factor_of_two_and_a_half() -> None:
    """Of the record made on a CPU; the shares of the peaks are the defaults, none is fitted to it."""
    torch = pytest.importorskip("torch")
    from benchmarks.measure import Ceilings
    from benchmarks.plan_check import POINTS, RANKING_POINTS, predict

    path = max((ROOT / "benchmarks" / "results").glob("*-plan-check-cpu.json"))
    record = json.loads(path.read_text(encoding="utf-8"))
    known = {name: record["metrics"][name]["mean"] for name in ("copy_gb_s", "product_tflop_s")}
    measured = {row["point"]: row["measured_ms"] for row in record["timing"]["rows"]}
    points = {point.name: point for point in (*POINTS, *RANKING_POINTS)}
    assert set(measured) == set(points)
    for point in points.values():
        step = predict(point, torch.device("cpu"), Ceilings(**known, dtype="float32"))
        assert 0.4 < 1e3 * step.seconds / measured[point.name] < 2.5, point.name


# The smallest cluster


@pytest.mark.parametrize("tokens", [2000, 20_000, 60_000])
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_smallest_cluster_is_the_first_that_fits(optimizer: str, tokens: int) -> None:
    table = replace(LARGE, optimizer=optimizer)
    config = replace(planned(table, gpus=8), batch=BatchPlanConfig(tokens_per_gpu=tokens, mean_len=500))
    work = Workload.planned(config)
    sizes = [*range(1, 8), *range(8, 400, 8)]
    fitting = [gpus for gpus in sizes if plan_memory(config.with_gpus(gpus), work).fits]
    assert smallest_cluster(config) == (fitting[0] if fitting else None)


def test_no_cluster_fits_where_more_gpus_need_more() -> None:
    """Every GPU gets the queries of all: a small memory is full before the table has become small."""
    config = planned(gpus=8, hbm_gib=12)
    assert smallest_cluster(config) is None
    small = Plan.of(config).memory.total
    assert Plan.of(config.with_gpus(4096)).memory.total > small


def test_mends_are_named_with_what_they_need() -> None:
    config = planned(replace(LARGE, dtype="float32", optimizer="adam"), gpus=16)
    plan = Plan.of(config)
    assert not plan.memory.fits
    found = {mend.option: mend for mend in mends(config)}
    assert found["embedding.optimizer=rowwise_adagrad"].fits
    assert found[f"cluster.gpus={smallest_cluster(config)}"].fits
    assert not found["embedding.dtype=float16"].fits
    state = plan.memory.of("table optimizer") / GIB
    assert found["embedding.optimizer=rowwise_adagrad"].plan.memory.total / GIB < plan.memory.total / GIB - 0.9 * state


def test_mends_leave_out_what_a_width_does_not_allow() -> None:
    """Rows of 50 are stored with 52 columns, which two GPUs cannot cut into multiples of 4; those of 30 with 32."""
    config = planned(TablePlanConfig(rows=10**10, sharding="table_wise"), gpus=2)
    for dim, cut in ((50, False), (30, True)):
        narrow = replace(config, model=HSTUConfig(dim=dim), batch=BatchPlanConfig())
        assert any("column_wise" in mend.option for mend in mends(narrow)) is cut, dim


# torchrec


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
def test_our_arithmetic_is_that_of_torchrecs_planner(optimizer: str) -> None:
    pytest.importorskip("torchrec")
    from hstu.planning.sharding import plan_sharding

    config = planned(TablePlanConfig(rows=10**8, optimizer=optimizer), gpus=16)
    rows = config.with_table(sharding="row_wise")
    work = Workload.planned(config)
    found = plan_sharding(config, work, plan_memory(rows, work))
    assert found is not None and found.found
    assert (found.sharding, found.shards) == ("row_wise", 16)
    assert found.ours_bytes == pytest.approx(found.hbm_bytes, rel=1e-6)


@pytest.mark.parametrize(("gpus", "columns"), [(16, 128), (8, 256)], ids=["two-nodes", "one-node"])
def test_a_grid_is_cut_by_columns_over_nodes_and_by_rows_in_them(gpus: int, columns: int) -> None:
    """torchrec's planner counts as much memory."""
    pytest.importorskip("torchrec")
    from hstu.planning.sharding import plan_sharding

    config = planned(TablePlanConfig(rows=10**8, optimizer="adagrad", sharding="grid"), gpus=gpus, gpus_per_node=8)
    assert shard_shape(config) == (12_500_001, columns)  # of 10^8 and the padding, for each of 8 GPUs
    work = Workload.planned(config)
    found = plan_sharding(config, work, plan_memory(config, work))
    assert found is not None and (found.sharding, found.shards) == ("grid", gpus)
    assert found.ours_bytes == pytest.approx(found.hbm_bytes, rel=1e-6)


def test_what_a_grid_sends() -> None:
    """As much of the rows as row_wise, the ids to both nodes; and the scored rows, which row_wise has at home."""
    rows, grid = (
        {t.name: t.sent for t in transfers(config, Workload.planned(config))}
        for config in (planned(replace(LARGE, sharding=name), gpus=16) for name in ("row_wise", "grid"))
    )
    lengths = 16 * 2 * BAGS * 8 * 15 / 16
    assert grid["rows of events"] == rows["rows of events"]
    assert grid["ids of events"] - lengths == 2 * (rows["ids of events"] - lengths)
    assert grid.keys() - rows.keys() == {"ids of scored items", "rows of scored items", "gradients of scored items"}


def test_a_table_that_stays_whole() -> None:
    """Rows, a gradient as large and the state of all rows on each GPU, by either name; torchrec is not asked."""
    local, whole = (
        planned(TablePlanConfig(rows=999, optimizer="sgd", **options), gpus=16)
        for options in ({"kind": "local"}, {"sharding": "data_parallel"})
    )
    memory = plan_memory(whole, Workload.planned(whole))
    assert memory == plan_memory(local, Workload.planned(local))
    assert memory.of("table") == 1000 * 256 * 4
    options = [mend.option for mend in mends(replace(whole, embedding=replace(whole.embedding, rows=10**9)))]
    assert "embedding.kind=sharded embedding.optimizer=rowwise_adagrad embedding.sharding=row_wise" in options


def test_torchrec_counts_narrow_state_for_narrow_rows() -> None:
    """fbgemm keeps float32: 4 bytes a row more than torchrec's planner thinks for row-wise Adagrad, less 2."""
    pytest.importorskip("torchrec")
    from hstu.planning.sharding import plan_sharding

    config = planned(TablePlanConfig(rows=10**8, dtype="bfloat16", sharding="row_wise"), gpus=16)
    work = Workload.planned(config)
    found = plan_sharding(config, work, plan_memory(config, work))
    assert found is not None
    assert found.ours_bytes - found.hbm_bytes == pytest.approx(2 * 10**8 / 16, rel=1e-3)


def test_a_table_that_torchrec_cannot_place() -> None:
    pytest.importorskip("torchrec")
    from hstu.planning.sharding import plan_sharding

    config = planned(replace(LARGE, sharding="table_wise"), gpus=16)
    work = Workload.planned(config)
    found = plan_sharding(config, work, plan_memory(config.with_table(sharding="row_wise"), work))
    assert found is not None and not found.found
    assert "no plan in" in str(found.note)


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cluster": {"gpu": "h20"}}, "cluster.gpu='h20': did you mean h200"),
        ({"cluster": {"gpus": 0}}, "cluster.gpus=0: expected >= 1"),
        ({"cluster": {"hbm_gib": -1}}, "cluster.hbm_gib=-1.0: expected > 0"),
        ({"cluster": {"linear_fraction": 1.5}}, "cluster.linear_fraction=1.5: expected in (0, 1]"),
        ({"embedding": {"rows": 0}}, "embedding.rows=0: expected >= 1"),
        ({"embedding": {"rows": 10, "optimizer": "adamw"}}, "with embedding.kind=sharded"),
        ({"embedding": {"rows": 10, "optimizer": "adagard"}}, "embedding.optimizer='adagard'"),
        ({"embedding": {"rows": 10, "row": 3}}, "unknown config key embedding.row"),
        (
            {"embedding": {"rows": 10}, "batch": {"mean_len": 500}},
            "batch.mean_len=500.0: expected <= batch.max_len=200",
        ),
        ({"embedding": {"rows": 10}, "batch": {"tokens_per_gpu": 10}}, "at least one user's tokens"),
        ({"embedding": {"rows": 10}, "batch": {"mean_len": 50, "mean_square_len": 9}}, "from mean_len^2=2500"),
        ({"embedding": {"rows": 10}, "precision": "fp8"}, "precision='fp8': expected one of"),
        (
            {"embedding": {"rows": 10, "sharding": "data_parallel", "placement": "uvm"}},
            "embedding.placement='uvm': expected hbm with embedding.sharding=data_parallel",
        ),
        ({"embeding": {"rows": 10}}, "unknown option embeding: expected one of batch, cluster, embedding"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        from_options({"embedding": {"rows": 10}, **options})


def test_numbers_as_people_write_them() -> None:
    config = from_options({"embedding": {"rows": 1e9, "dim": 256.0}, "batch": {"max_len": 1e3}})
    assert (config.embedding.rows, config.model.dim, config.model.max_len) == (10**9, 256, 1000)


def test_two_names_of_one_size() -> None:
    values = {"embedding": {"rows": 10, "dim": 32}, "model": {"name": "hstu", "dim": 64}}
    assert from_options(values).model.dim == 32  # 64 is only the file's
    with pytest.raises(UserError, match="embedding.dim=32 and model.dim=64: two names"):
        from_options(values, ("model.dim=64", "embedding.dim=32"))


def test_data_sheets_can_be_overridden() -> None:
    table = {"rows": 10, "dim": 64}
    config = from_options({"embedding": table, "cluster": {"gpu": "a100", "hbm_gib": 40, "peak_tflops": 1}})
    assert (config.cluster.sheet.hbm_gib, config.cluster.sheet.hbm_gbps, config.peak_tflops) == (40, 2039, 1)
    exact = from_options({"embedding": table, "cluster": {"gpu": "a100"}, "precision": "float32"})
    assert exact.peak_tflops == 19.5
    assert all(gpu.source for gpu in GPUS.values())


# The command


def run(*options: str, columns: int = 120) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": str(columns), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "hstu.plan", *options], capture_output=True, text=True, cwd=ROOT, env=env
    )


def test_command_prints_and_writes(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    done = run("embedding.rows=1e9", "embedding.dim=256", "embedding.dtype=bfloat16", "cluster.gpus=64", "model=sasrec",
               f"out={out}", columns=80)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "not validated on a GPU" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines() if not line.startswith("written to")) <= 80
    values = json.loads(out.read_text(encoding="utf-8"))
    assert values["fits"] and values["config"]["cluster"]["gpus"] == 64
    assert sum(values["memory"]["parts_bytes"].values()) == pytest.approx(values["memory"]["total_bytes"])
    assert values["step_seconds"] == pytest.approx(sum(values["seconds_by_resource"].values()))
    assert values["config"]["model"]["name"] == "sasrec"


def test_plan_that_does_not_fit_is_refused_with_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    from hstu import plan

    table = TablePlanConfig(rows=10**10)
    assert plan.run(replace(planned(table, gpus=8), out=None)) == 1
    printed = capsys.readouterr()
    expected = r"error: does not fit: [\d,.]+ GiB on each of 8 GPUs, 125.8 GiB can be used of 139.8"
    assert re.search(expected, printed.err)
    assert "cluster.gpus=" in printed.out and "embedding.dtype=float16" in printed.out


# Predicted against measured


def test_a_record_is_predicted_anew_from_its_own_measurements(tmp_path: Path) -> None:
    """Times and ceilings as recorded, predictions of today; another record is refused."""
    pytest.importorskip("torch")
    from benchmarks.plan_check import check_again

    path = max((ROOT / "benchmarks" / "results").glob("*-plan-check-cpu.json"))
    values = json.loads(path.read_text(encoding="utf-8"))
    values["timing"]["rows"] = [{**values["timing"]["rows"][0], "measured_ms": 100.0, "predicted_ms": 1.0}]
    (tmp_path / "old.json").write_text(json.dumps(values))
    (row,) = check_again(tmp_path / "old.json").timing["rows"]
    assert (row["point"], row["measured_ms"]) == ("hstu-ml-1m", pytest.approx(100.0))
    assert row["predicted_ms"] > 10 and row["ratio"] == pytest.approx(row["predicted_ms"] / 100)
    (tmp_path / "other.json").write_text(json.dumps({**values, "name": "step-ml-1m-hstu"}))
    with pytest.raises(UserError, match="a record of step-ml-1m-hstu, expected one of plan-check-cpu"):
        check_again(tmp_path / "other.json")
