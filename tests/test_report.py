"""Records, README tables and plots; the committed README agrees with the committed records."""

import json
import math
import re

import numpy as np
import pytest
import yaml

from hstu import readme, report
from hstu.errors import UserError
from tests.figures import rendered

FIELDS = {
    "name", "kind", "dataset", "protocol", "split_hash", "model", "seeds", "metrics", "published", "timing",
    "machine", "versions", "commit", "config",
}  # fmt: skip
MACHINE = {"cpu": "Some CPU", "cores": 2, "memory_gib": 15.6, "gpu": None, "driver": None}


def make_record(name="small-hstu", **more):
    values = {
        "name": name, "kind": "training", "dataset": "small", "protocol": "reference", "split_hash": "abc",
        "model": "hstu", "seeds": [0, 1],
        "metrics": report.aggregate([{"hr@10": 0.25, "ndcg@10": 0.125}, {"hr@10": 0.75, "ndcg@10": 0.125}]),
        "timing": {"s_per_step": 0.5}, "machine": MACHINE, "versions": {"python": "3.11.1", "torch": "2.13.0"},
        "commit": "0123456789abcdef", "config": {"experiment": "small/hstu", "run": {"selection": "validation"}},
    }  # fmt: skip
    return report.Record(**{**values, **more})


# The committed results


def test_readme_tables_agree_with_the_records():
    readme = report.ROOT / "README.md"
    if not readme.exists():
        pytest.skip("this checkout has no README")
    assert report.main(["readme", "--check"]) == 0


def test_committed_records_have_exactly_the_fields():
    for file, _ in report.read_records():
        values = json.loads((report.RESULTS / file).read_text(encoding="utf-8"))
        assert set(values) | {"published"} == FIELDS, file
        assert re.fullmatch(r"\d{4}-\d\d-\d\d-.+\.json", file)
        assert '": "/' not in json.dumps(values["config"]), f"{file} holds a path of the machine it was made on"


# Records


def test_aggregate_by_hand():
    got = report.aggregate([{"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 2.0}, {"a": 6.0, "b": 2.0, "c": 1.0}])
    # Mean 9/3; sample variance (4 + 1 + 9) / 2 = 7.
    assert got == {
        "a": {"mean": 3.0, "std": pytest.approx(math.sqrt(7)), "values": [1.0, 2.0, 6.0]},
        "b": {"mean": 2.0, "std": 0.0, "values": [2.0, 2.0, 2.0]},
    }
    assert report.aggregate([{"a": 0.5}])["a"] == {"mean": 0.5, "std": 0.0, "values": [0.5]}


def test_record_is_written_and_read_back(tmp_path):
    record = make_record(published={"source": "a paper", "protocol": "reference", "metrics": {"hr@10": 0.5}})
    path = report.write_record(record, tmp_path, date="2026-01-31")
    assert path.name == "2026-01-31-small-hstu.json"
    assert set(json.loads(path.read_text())) == FIELDS
    assert report.read_records(tmp_path) == [(path.name, record)]


def test_record_without_published_row_has_no_such_field(tmp_path):
    path = report.write_record(make_record(), tmp_path)
    assert set(json.loads(path.read_text())) == FIELDS - {"published"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "speed"}, "record kind='speed': expected one of training"),
        ({"name": "Bad Name"}, "record name='Bad Name'"),
        ({"metrics": {"hr@10": 0.5}}, "expected mean, std and values"),
        ({"metrics": {"hr@10": {"mean": 1.0}}}, "expected mean, std and values"),
    ],
    ids=["kind", "name", "bare-metric", "metric-parts"],
)
def test_wrong_record_is_refused(change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make_record(**change)


def test_wrong_record_files_are_refused(tmp_path):
    path = report.write_record(make_record(), tmp_path, date="2026-01-31")
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "extra": 1}))
    with pytest.raises(UserError, match="missing or unknown fields extra"):
        report.read_records(tmp_path)
    path.write_text(json.dumps({k: v for k, v in values.items() if k != "timing"}))
    with pytest.raises(UserError, match="missing or unknown fields timing"):
        report.read_records(tmp_path)
    path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        report.read_records(tmp_path)
    path.unlink()
    (tmp_path / "results.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="expected the file name"):
        report.read_records(tmp_path)


def test_json_is_strict_and_atomic(tmp_path):
    path = tmp_path / "x.json"
    report.write_json(path, {"a": math.nan, "b": [np.float32(0.5), np.int64(3)], "c": (1, math.inf), 4: "ü"})
    assert json.loads(path.read_text()) == {"a": None, "b": [0.5, 3], "c": [1, None], "4": "ü"}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_machine_versions_and_commit():
    machine = report.machine()
    assert set(machine) == {"cpu", "cores", "memory_gib", "gpu", "driver"}
    assert machine["cpu"] and machine["cores"] >= 1 and machine["memory_gib"] > 0
    versions = report.versions()
    assert re.match(r"3\.\d+", versions["python"]) and versions["torch"][0].isdigit()
    commit = report.commit()
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", commit)


# Records from runs


def make_run(folder, seed, hr=0.25, **more):
    folder.mkdir()
    config = {"experiment": "small/hstu", "seed": seed, "model": {"name": "hstu"}, "data": {"root": "/home/me/data"},
              "run": {"selection": "validation", "dir": str(folder)}}  # fmt: skip
    evaluation = {
        "dataset": "small", "protocol": "reference", "split_hash": "abc", "model": "hstu", "selection": "validation",
        "part": "test", "filter_history": "truncated",
        "published": {"source": "a paper", "protocol": "reference", "metrics": {"hr@10": 0.5}},
        "rows": [
            {"system": "hstu", "group": "all users", "metrics": {"hr@10": hr}},
            {"system": "hstu", "group": "some users", "metrics": {"hr@10": hr / 2}},
            {"system": "most popular", "group": "all users", "metrics": {"hr@10": 0.01}},
        ],
    }  # fmt: skip
    environment = {"machine": MACHINE, "versions": {"python": "3.11"}, "commit": "0" * 40}
    parts = {"evaluation": evaluation, "environment": environment, "config": config}
    for key, value in more.items():
        part = next(p for p in parts.values() if key in p)
        part[key] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "result.json").write_text(json.dumps({"timing": {"s_per_step": 0.5 + seed, "steps": 10}}))
    return folder


def test_record_of_two_seeds(tmp_path):
    runs = [make_run(tmp_path / "a", 0), make_run(tmp_path / "b", 1, hr=0.75)]
    record = report.run_record("small-hstu", runs)
    assert record.seeds == [0, 1]
    assert record.metrics["hr@10"] == {"mean": 0.5, "std": pytest.approx(math.sqrt(0.125)), "values": [0.25, 0.75]}
    assert record.metrics["hr@10 | some users"]["values"] == [0.125, 0.375]
    assert record.timing == {"s_per_step": 1.0, "steps": 10.0}
    assert record.published["metrics"] == {"hr@10": 0.5}
    assert record.config["data"]["root"] == "data" and record.config["run"]["dir"] == "a"
    assert record.commit == "0" * 40


def test_record_of_a_baseline_has_no_published_row(tmp_path):
    record = report.run_record("small-popular", [make_run(tmp_path / "a", 0)], system="most popular")
    assert (record.model, record.published, record.timing) == ("most popular", None, {})
    assert record.metrics == {"hr@10": {"mean": 0.01, "std": 0.0, "values": [0.01]}}
    with pytest.raises(UserError, match="system='best' was not evaluated: expected one of hstu, most popular"):
        report.run_record("x", [tmp_path / "a"], system="best")


def test_published_row_of_the_other_protocol_is_left_out(tmp_path):
    assert report.run_record("x", [make_run(tmp_path / "a", 0, protocol="stable")]).published is None


@pytest.mark.parametrize(
    "change",
    [{"split_hash": "other"}, {"selection": "reference"}, {"model": {"name": "hstu", "dim": 3}},
     {"machine": {**MACHINE, "cores": 64}}],
    ids=["split", "selection", "config", "machine"],
)  # fmt: skip
def test_unlike_runs_make_no_record(tmp_path, change):
    runs = [make_run(tmp_path / "a", 0), make_run(tmp_path / "b", 1, **change)]
    with pytest.raises(UserError):
        report.run_record("x", runs)


def test_record_command(tmp_path, capsys):
    run = make_run(tmp_path / "a", 0)
    arguments = ["record", "small-hstu", str(run), "--results", str(tmp_path / "out"), "--date", "2026-01-31"]
    assert report.main(arguments) == 0
    assert report.read_records(tmp_path / "out")[0][0] == "2026-01-31-small-hstu.json"
    assert report.main(["record", "x", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


# README


README = "# Title\n\n<!-- results:accuracy -->\nold\n<!-- /results:accuracy -->\n\ntext | with pipes\n"


def test_readme_is_filled_and_checked(tmp_path, capsys):
    results, readme = tmp_path / "results", tmp_path / "README.md"
    report.write_record(make_record(), results)
    readme.write_text(README)
    options = ["--readme", str(readme), "--results", str(results)]
    assert report.main(["readme", "--check", *options]) == 1
    assert readme.read_text() == README
    assert report.main(["readme", *options]) == 0
    text = readme.read_text()
    assert "| small/hstu | validation | all users | 0.5000 ± 0.3536 | 0.1250 ± 0.0000 |" in text
    assert "old" not in text and text.startswith("# Title\n\n") and text.endswith("\n\ntext | with pipes\n")
    assert report.main(["readme", "--check", *options]) == 0
    report.write_record(make_record(metrics=report.aggregate([{"hr@10": 0.26}])), results)  # a number changes
    assert report.main(["readme", "--check", *options]) == 1
    assert "does not agree" in capsys.readouterr().err


def test_no_table_mixes_protocols_or_data_sets():
    records = [("a.json", make_record()), ("b.json", make_record(protocol="stable")),
               ("c.json", make_record(dataset="other"))]  # fmt: skip
    text = readme.readme_block("accuracy", records)
    assert re.findall(r"\*\*(\w+)\*\*, protocol `(\w+)`", text) == [
        ("small", "reference"), ("small", "stable"), ("other", "reference"),
    ]  # fmt: skip


def test_published_row_stands_below_ours_once():
    published = {"source": "a paper", "protocol": "reference", "metrics": {"hr@10": 0.3097}}
    metrics = report.aggregate([{"hr@10": 0.31, "hr@10 | users without estimated timestamps": 0.32}])
    records = [(f"{n}.json", make_record(n, metrics=metrics, published=published)) for n in "ab"]
    lines = readme.readme_block("accuracy", records).splitlines()[4:]
    assert [line.split("|")[1:5] for line in lines] == [
        [" small/hstu ", " validation ", " all users ", " 0.3100 "],
        [" small/hstu ", " validation ", " users without estimated timestamps ", " 0.3200 "],
        [" *published: a paper* ", "  ", "  ", " 0.3097 "],
        [" small/hstu ", " validation ", " all users ", " 0.3100 "],
        [" small/hstu ", " validation ", " users without estimated timestamps ", " 0.3200 "],
    ]


def test_a_baseline_is_named_in_the_table():
    config = {"experiment": "small/hstu", "model": {"name": "hstu"}}
    record = make_record("small-popular", model="most popular", config=config)
    assert "| most popular (small/hstu) |" in readme.readme_block("accuracy", [("x.json", record)])


def test_timing_and_provenance_blocks():
    rows = [{"size": "B=32", "ms": 1.5}, {"size": "B=64", "ms": 12345.678}]
    scoring = make_record("attention", kind="preparation", metrics={}, timing={"rows": rows}, seeds=[])
    records = [("2026-01-31-small-hstu.json", make_record()), ("2026-01-31-attention.json", scoring)]
    timing = readme.readme_block("timing", records)
    assert "| small-hstu | training | 0.5 |" in timing
    assert "| attention | preparation | B=64 | 12,346 |" in timing
    provenance = readme.readme_block("provenance", records)
    assert "| [attention](benchmarks/results/2026-01-31-attention.json) | Some CPU, 2 cores, 16 GiB |" in provenance
    assert "| 3.11.1, 2.13.0 | 0123456789 | abc |" in provenance
    gpu = make_record(machine={**MACHINE, "gpu": "H200", "driver": "570.1"}, commit="a" * 40 + "-dirty")
    text = readme.readme_block("provenance", [("x.json", gpu)])
    assert "H200 (driver 570.1)" in text and "aaaaaaaaaa-dirty" in text
    assert readme.readme_block("accuracy", []) == "No records yet."


@pytest.mark.parametrize(
    "text",
    ["no blocks", "<!-- results:timing -->\n", "<!-- /results:timing -->\n<!-- results:timing -->\n", README + README],
    ids=["none", "unclosed", "reversed", "twice"],
)
def test_broken_readme_is_refused(text):
    with pytest.raises(UserError, match="README"):
        readme.fill_readme(text, [])


def test_backslashes_and_pipes_survive():
    record = make_record(dataset=r"a\1 data set", config={"experiment": "a|b"})
    text = readme.fill_readme(README, [("x.json", record)])
    assert r"**a\1 data set**" in text and r"a\|b" in text


# Terminal tables and plots


def test_metrics_table():
    from rich.console import Console

    table = report.metrics_table("title", {"ours": {"hr@10": 0.12345, "mrr": math.nan}, "ci": {"hr@10": "0.1 .. 0.2"}},
                                 ["hr@10", "mrr"])  # fmt: skip
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    console.print(table)
    lines = [re.split(r"\s*│\s*", line.strip("│ ")) for line in console.export_text().splitlines() if "│" in line]
    assert lines == [["hr@10", "0.1235", "0.1 .. 0.2"], ["mrr", "-", "-"]]


def write_metrics(folder):
    folder.mkdir()
    rng = np.random.default_rng(0)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, 201):
            value = {"step": step, "epoch": step // 20, "loss": 8 * math.exp(-step / 80) + rng.random(), "lr": 1e-3}
            file.write(json.dumps(value) + "\n")
            if step % 20 == 0:
                hr = 0.3 * (1 - math.exp(-step / 60))
                values = {"step": step, "kind": "validation", "epoch_loss": 8 * math.exp(-step / 80), "hr@10": hr,
                          "ndcg@10": hr / 2, "hr@1": hr / 9, "hr@200": hr * 2}  # fmt: skip
                file.write(json.dumps(values) + "\n")


def test_curves_are_read_and_drawn(tmp_path):
    run = tmp_path / "run"
    write_metrics(run)
    losses, curves = report._read_curves(run / "metrics.jsonl")
    assert {n: len(p) for n, p in losses.items()} == {"loss": 200, "epoch_loss": 10}
    assert list(curves) == ["hr@10 (validation)", "ndcg@10 (validation)", "hr@200 (validation)"]
    assert curves["hr@10 (validation)"][0] == (20.0, pytest.approx(0.3 * (1 - math.exp(-1 / 3))))
    from matplotlib import image

    with rendered():
        pixels = image.imread(report.plot_curves(run))
    assert pixels.shape[0] > 300 and pixels.shape[1] > 900
    blue = np.all(np.abs(pixels[..., :3] - np.array([0x1F, 0x77, 0xB4]) / 255) < 0.02, axis=-1)
    assert blue[:, : pixels.shape[1] // 2].sum() > 100  # the loss is drawn, on the left


def test_curves_of_a_ranking_run(tmp_path):
    values = '"click/auc": 0.7, "click/gauc": 0.6, "click/ne": 0.9, "click/rate": 0.3, "watch/rmse": 40.0'
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "validation", "epoch_loss": 1.0, ' + values + "}\n")
    curves = report._read_curves(tmp_path / "metrics.jsonl")[1]
    assert curves == {"click/auc (validation)": [(1.0, 0.7)], "click/ne (validation)": [(1.0, 0.9)]}


@pytest.mark.parametrize("text", ["", '{"step": 1, "loss": 2.0}\n', '{"step": 1, "hr@7": 0.5}\n'])
def test_short_curves_are_drawn(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    with rendered():
        assert report.plot_curves(tmp_path).stat().st_size > 5000


def test_curve_errors(tmp_path, capsys):
    assert report.main(["curves", str(tmp_path)]) == 1
    assert "is " + str(tmp_path) + " a run folder?" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(UserError, match="line 2: expected a JSON object with step"):
        report.plot_curves(tmp_path)


def test_no_matplotlib_is_said_and_no_error(tmp_path, monkeypatch, caplog):
    import sys

    write_metrics(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.plot_curves(tmp_path / "run") is None
    assert "matplotlib is not installed" in caplog.text
