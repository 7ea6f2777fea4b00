"""The benchmark of scoring: its ways agree, its record is of its own kind, its table and plot."""

import dataclasses

import pytest
import torch

from benchmarks import bench
from benchmarks.config import BenchConfig
from benchmarks.ops import Absent
from benchmarks.ops import scoring as ops
from benchmarks.plots import plot_record
from hstu import readme, report
from tests.figures import rendered

TOY = {**ops.DEFAULTS, **ops.SIZES["toy"][0], "lengths": "full"}


def problem(dtype=torch.float32, **sizes):
    torch.manual_seed(0)
    return ops.make({**TOY, **sizes}, torch.device("cpu"), dtype, torch.Generator().manual_seed(0))


def test_every_way_gives_the_same_scores():
    one = problem()
    scores = one.ours.forward()
    assert scores.shape == (TOY["C"],) and one.tokens == TOY["C"]
    for way in ("cold", "plain", "separate"):
        torch.testing.assert_close(one.competitors[way]().forward(), scores)


def test_the_least_work():
    """C=5 rows against S=12 events, 2 layers, D=8, 2 heads of 4: 5*8*8 products in the maps of a row, 16 a pair."""
    one = problem()
    assert one.forward.flops == 2 * 2 * 5 * (5 * 8 * 8 + 2 * 8 * 13)
    assert one.forward.bytes == 4 * (2 * (2 * 8 * 12 + 5 * 8 * 8) + 2 * 8 * 5)


def test_it_runs_in_bfloat16():
    assert torch.isfinite(problem(torch.bfloat16).ours.forward()).all()


def test_ways_that_would_take_too_long_are_absent(monkeypatch):
    monkeypatch.setattr(ops, "MAX_SEPARATE_ROWS", 64)
    monkeypatch.setattr(ops, "MAX_PASSES", 2)
    for way, message in (("separate", "more than 64 rows in all"), ("plain", "more than 2 passes")):
        with pytest.raises(Absent, match=message):
            problem().competitors[way]()


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    options = {"device": "cpu", "dtype": "fp32", "time_ms": 0.1, "warmup_ms": 0.1, "plots": False}
    sizes = [{**ops.SIZES["toy"][0], "name": f"c{c}", "C": c} for c in (3, 5)]
    folder = str(tmp_path_factory.mktemp("scoring"))
    (found,) = bench.run(BenchConfig(op="scoring", sizes=sizes, out=folder, cpu_time=True, **options))
    return found


def test_the_record_is_of_its_own_kind(record):
    assert (record.kind, record.model, record.name) == ("scoring", "scoring", "bench-scoring-cpu-fp32")
    assert record.config["cpu_time"] is True and len(record.config["load_average"]) == 3
    assert {row["implementation"] for row in record.timing["rows"]} == {"hstu", "cold", "plain", "separate"}
    assert {row["pass"] for row in record.timing["rows"]} == {"forward"}


def test_the_table_of_the_readme(record, tmp_path):
    rows = [
        {"point": "p", "implementation": name, "ms": ms, "ms_p20": ms - 0.5, "ms_p80": ms + 0.5, "D": 8, "H": 2,
         "layers": 3, "dtype": "fp32", "S": 1_024, "C": 16_384, "M": 256, "tokens_per_s": 4_096.0}
        for name, ms in (("hstu", 4.0), ("plain", 10.0), ("cold", 6.0))
    ]  # fmt: skip
    rows.append({"point": "p", "implementation": "separate", "absent": "more than 16,384 rows in all"})
    machine = {"cpu": "Some CPU", "cores": 2, "gpu": None}
    made = dataclasses.replace(record, timing={"rows": rows}, machine=machine, config={"threads": 1})
    (tmp_path / "x-latency.png").touch()
    text = readme.readme_block("scoring", [("x.json", made)], tmp_path)
    line = text.splitlines()[2]
    assert line == (
        "| D=8, 2 heads, 3 layers, fp32 | 1,024 | 16,384 | 256 | 4 | 3.5 .. 4.5 | 4,096 | 1.5x | 2.5x |  "
        "| Some CPU, 1 threads |"
    )
    assert text.endswith("(benchmarks/results/x-latency.png)")
    assert readme.readme_block("timing", [("x.json", made)]) == "No records yet."
    toy = dataclasses.replace(made, config={"toy": True})
    assert readme.readme_block("scoring", [("x.json", toy)]) == "No records yet."


def test_the_plot(record, tmp_path):
    pytest.importorskip("matplotlib")
    with rendered():
        drawn = plot_record(record, tmp_path, "x")
    assert [p.name for p in drawn] == ["x-latency.png"] and drawn[0].stat().st_size > 5_000


def test_the_gpu_report_has_it():
    from benchmarks.report_parts import PARTS

    assert "bench-scoring" in PARTS


def test_it_can_be_written_and_read(record, tmp_path):
    path = report.write_record(record, tmp_path)
    ((file, read),) = report.read_records(tmp_path)
    assert file == path.name and read.timing == record.timing
