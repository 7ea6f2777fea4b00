"""The command hstu-bench: options, records, comparison, plots."""

import copy
import json

import pytest
import torch

from benchmarks import bench, compare
from benchmarks.config import BenchConfig, from_arguments, from_options
from benchmarks.ops import BENCHES
from benchmarks.tables import number, rows_table, text_table
from hstu import report
from hstu.errors import UserError
from kernels._backend import get_backend
from tests.figures import rendered

QUICK = {"sizes": "toy", "device": "cpu", "dtype": "fp32", "time_ms": 0.1, "warmup_ms": 0.1}


@pytest.fixture(scope="module")
def record_file(tmp_path_factory):
    """A record of the toy points of attention."""
    folder = tmp_path_factory.mktemp("bench")
    bench.run(BenchConfig(op="attention", out=str(folder), **QUICK))
    (path,) = folder.glob("*.json")
    return path


def test_the_record_is_a_record_of_this_project(record_file):
    (file, record), *rest = report.read_records(record_file.parent)
    assert file == record_file.name and not rest
    assert (record.name, record.kind, record.model) == ("bench-attention-cpu-fp32", "kernel", "attention")
    assert set(record.metrics) == {"copy_gb_s", "product_tflop_s"}
    assert record.config["device"] == "cpu" and record.config["backend"] == "torch"
    keys = {"point", "pass", "implementation", "dtype", "device", "B", "H", "A", "V", "S", "lengths", "rab"}
    assert all(keys <= set(row) for row in record.timing["rows"])
    assert '": "/' not in json.dumps(record.config)
    pytest.importorskip("matplotlib")
    assert {p.name.rsplit("-", 1)[1] for p in record_file.parent.glob("*.png")} == {"roofline.png"}


def test_backend_and_tuning_are_as_before(record_file):
    assert get_backend() == "auto"


def test_plots_over_length(tmp_path, record_file):
    pytest.importorskip("matplotlib")
    from benchmarks.plots import plot_record

    record = report.Record(**json.loads(record_file.read_text()))
    template = next(row for row in record.timing["rows"] if row["implementation"] == "hstu" and row["rab"])
    rows = [
        {**template, "point": f"S{s}", "S": s, "pass": one, "implementation": name, "peak_mib": 2.0 * s}
        for s in (128, 256, 512)
        for one in ("forward", "both")
        for name in ("hstu", "torch")
    ]
    record.timing["rows"] = [*rows, {**rows[0], "point": "S1024", "S": 1024, "absent": "out of memory"}]
    del record.timing["rows"][-1]["ms"]
    with rendered():
        drawn = plot_record(record, tmp_path, "x")
    assert [p.name for p in drawn] == ["x-tflops.png", "x-memory.png", "x-roofline.png"]
    assert all(p.stat().st_size > 5000 for p in drawn)


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"op": "atention"}, "op=atention: expected one of attention"),
        ({"sizes": "large"}, "sizes=large: expected one of toy, quick, full"),
        ({"pass": "sideways"}, "pass=sideways: expected one of forward"),
        ({"dtype": "float32"}, "dtype=float32: expected one of bf16"),
        ({"device": "tpu"}, "device=tpu"),
        ({"time_ms": 0}, "time_ms=0"),
        ({"colour": "red"}, "unknown config key colour"),
        ({"seed": "x"}, "seed"),
    ],
    ids=["op", "sizes", "pass", "dtype", "device", "time", "unknown", "type"],
)
def test_wrong_options_are_one_line(options, message):
    with pytest.raises(UserError, match=message) as raised:
        from_options(BenchConfig, options)
    assert "\n" not in str(raised.value)


def test_pass_and_op_take_one_or_several():
    assert from_options(BenchConfig, {"pass": "all"}).passes == ["forward", "backward", "both"]
    assert from_options(BenchConfig, {"pass": ["both"], "op": ["attention", "layer"]}).ops() == ["attention", "layer"]
    assert BenchConfig(op="all").ops() == list(BENCHES)


def test_the_yaml_file_names_every_option():
    from hydra import compose, initialize_config_dir

    from hstu.cli import conf_dir

    with initialize_config_dir(str(conf_dir() / "commands"), version_base=None):
        composed = dict(compose("bench"))
    assert from_options(BenchConfig, composed) == BenchConfig()


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device=cuda: torch sees no CUDA device"):
        bench.run(BenchConfig(device="cuda"))


def test_a_name_needs_one_op_and_a_pattern_must_fit(tmp_path):
    with pytest.raises(UserError, match="several ops"):
        bench.run(BenchConfig(op="all", name="x", **QUICK))
    with pytest.raises(UserError, match="no point of attention in sizes=toy fits"):
        bench.run(BenchConfig(points="none-*", out=str(tmp_path), **QUICK))


def test_words_become_options():
    config = from_arguments(BenchConfig, ["op=attention", "sizes={B: 2, S: 8}", "points=*", "out=a/b", "threads=2"])
    assert (config.sizes, config.points, config.out, config.threads) == ({"B": 2, "S": 8}, "*", "a/b", 2)
    with pytest.raises(UserError, match="expected name=value"):
        from_arguments(BenchConfig, ["attention"])


# Comparing

BASE_MS = 4.0


def changed(record, factor, noise=0.0):
    """A copy whose first row is ``factor`` times as slow, with percentiles ``noise`` apart from the median."""
    copied = copy.deepcopy(record)
    row = next(r for r in copied["timing"]["rows"] if "ms" in r)
    for key, spread in (("ms", 1.0), ("ms_p20", 1 - noise), ("ms_p80", 1 + noise)):
        row[key] = BASE_MS * factor * spread
    return copied


@pytest.fixture
def record(record_file):
    return changed(json.loads(record_file.read_text()), 1.0)


@pytest.mark.parametrize(
    ("factor", "noise", "kind"),
    [(1.2, 0.01, "slower"), (0.8, 0.01, "faster"), (1.04, 0.0, "same"), (1.2, 0.3, "same")],
    ids=["slower", "faster", "below the threshold", "inside the noise"],
)
def test_what_counts_as_a_change(record, factor, noise, kind):
    result = compare.compare(record, changed(record, factor, noise), threshold=0.05)
    measured = sum("ms" in r for r in record["timing"]["rows"])
    assert (len(result.slower), len(result.faster)) == (int(kind == "slower"), int(kind == "faster"))
    assert result.same == measured - (kind != "same")


def write(folder, name, record):
    path = folder / f"2026-01-01-{name}.json"
    path.write_text(json.dumps({**record, "name": name}))
    return path


def test_the_exit_status_says_whether_something_got_slower(tmp_path, record, capsys):
    before, slower = write(tmp_path, "before", record), write(tmp_path, "slower", changed(record, 1.5))
    out = f"out={tmp_path}"
    assert compare.main([str(before), str(before)]) == 0
    assert compare.main(["before", "slower", out]) == 1
    assert "1 slower" in capsys.readouterr().out
    assert compare.main(["before", "slower", out, "threshold=0.6"]) == 0
    assert compare.main([str(slower), "before", out]) == 0
    assert "1 faster" in capsys.readouterr().out


def test_what_became_of_a_competitor_is_no_failure(tmp_path, record, capsys):
    write(tmp_path, "before", record)
    rows = record["timing"]["rows"]
    ours = [r for r in rows if r["implementation"] == "hstu"]
    others = [{**r, "ms": 9 * r["ms_p80"], "ms_p20": 9 * r["ms_p80"]} for r in rows if "ms" in r and r not in ours]
    write(tmp_path, "slower", {**record, "timing": {"rows": ours + others}})
    write(tmp_path, "without", {**record, "timing": {"rows": ours}})
    assert others and compare.main(["before", "slower", f"out={tmp_path}"]) == 0
    assert f"{len(others)} slower" in capsys.readouterr().out
    assert compare.main(["before", "without", f"out={tmp_path}"]) == 0


def test_a_row_that_is_gone_is_a_failure_and_another_machine_a_warning(tmp_path, record, capsys):
    write(tmp_path, "before", record)
    less = copy.deepcopy(record)
    less["timing"]["rows"] = [r for r in less["timing"]["rows"] if "ms" in r][1:]
    less["machine"]["gpu"] = "Other GPU"
    write(tmp_path, "after", less)
    assert compare.main(["before", "after", f"out={tmp_path}"]) == 1
    output = capsys.readouterr().out
    assert "gone: " in output and "warning: different gpu" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["a"], "expected two records"), (["a", "b"], "no such file"), (["a", "b", "x=1"], "unknown config key x")],
    ids=["one", "missing", "option"],
)
def test_wrong_comparisons_are_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        compare.main(arguments)


def test_records_of_different_ops_have_nothing_in_common(tmp_path, record):
    write(tmp_path, "a", record)
    write(tmp_path, "b", {**record, "model": "layer"})
    with pytest.raises(UserError, match="no row in common"):
        compare.main(["a", "b", f"out={tmp_path}"])


# Tables


def test_tables_are_markdown_that_lines_up():
    table = text_table(("a", "n"), [["x|y", "1"], ["z", "22"]])
    assert table.splitlines() == ["| a    |  n |", "| ---- | -: |", "| x\\|y |  1 |", "| z    | 22 |"]
    assert [number(v) for v in (None, 3, 12345, 0.00012345, 12345.6, True)] == [
        "-", "3", "12,345", "0.0001234", "12,346", "True",
    ]  # fmt: skip


def test_the_table_says_why_something_is_missing(record):
    text = rows_table(record["timing"]["rows"])
    assert "needs CUDA" in text and "hstu" in text
