"""The GPU report at toy size on the CPU: the whole of it, resuming, parts that fail or die."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_report
from benchmarks.config import GpuReportConfig
from benchmarks.report_parts import PARTS, junit_counts, run_process
from hstu import report
from hstu.errors import UserError


def state(folder: Path, part: str) -> dict:
    return json.loads((folder / "report" / "parts" / f"{part}.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a whole report, the command's exit status and what it said; the measuring is a process anyway."""
    folder, said = tmp_path_factory.mktemp("whole"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(sys, "argv", ["gpu_report", f"out={folder / 'report'}", "toy=true", "device=cpu"])
        status = gpu_report.main()
    return folder, status, said.getvalue()


@pytest.mark.slow
def test_the_whole_report_runs(whole):
    folder, status, said = whole
    assert status == 0, said
    statuses = {part: state(folder, part)["status"] for part in PARTS}
    assert {part: s for part, s in statuses.items() if s != "done"} == {}
    assert said.rstrip().endswith((folder / "report" / "summary.md").read_text().rstrip())
    assert "not measured" in said


@pytest.mark.slow
def test_its_records_are_records_of_this_project(whole):
    folder, *_ = whole
    records = {record.name: record for _, record in report.read_records(folder / "report")}
    expected = {"device", "correctness", "train-synthetic", "tests", "memory"} | {
        part.replace("_", "-") for part in PARTS if part.startswith(("bench-", "versus-"))
    }
    assert set(records) == {f"toy-{name}" for name in expected}
    assert records["toy-train-synthetic"].timing["wall_s"] > 0
    assert records["toy-correctness"].metrics["failed"]["values"] == [0.0]
    checks = records["toy-correctness"].timing["rows"]
    assert {c["dtype"] for c in checks} == {"float32", "bfloat16"} and all(c["share"] <= 1 for c in checks)
    pytest.importorskip("matplotlib")
    assert list((folder / "report").glob("*-toy-bench-attention-roofline.png"))


@pytest.mark.slow
def test_a_rerun_does_nothing_again_and_refresh_does(whole):
    folder, *_ = whole
    parts = folder / "report" / "parts"
    times = {part: (parts / f"{part}.json").stat().st_mtime_ns for part in PARTS}
    config = GpuReportConfig(out=str(folder / "report"), toy=True, device="cpu")
    assert gpu_report.run_report(config) == 0
    assert {part: (parts / f"{part}.json").stat().st_mtime_ns for part in PARTS} == times
    assert gpu_report.run_report(dataclasses.replace(config, parts=["device"], refresh=True)) == 0
    changed = {part for part in PARTS if (parts / f"{part}.json").stat().st_mtime_ns != times[part]}
    assert changed == {"device"}


def test_a_part_that_fails_is_recorded_and_the_rest_goes_on(tmp_path, capsys):
    config = GpuReportConfig(
        out=str(tmp_path / "report"),
        toy=True,
        device="cpu",
        data=str(tmp_path / "nowhere"),
        parts=["training", "device"],
    )
    assert gpu_report.run_report(config) == 1
    assert "failed:\n- training: UserError: data=nowhere: no such folder" in capsys.readouterr().out
    assert "Traceback" in state(tmp_path, "training")["traceback"]
    assert state(tmp_path, "device")["status"] == "done"


@pytest.mark.parametrize(
    ("data", "status", "text"),
    [(None, "skipped", "data is not set"), (".", "failed", "no stores/ml-1m-*/meta.json in it")],
    ids=["no data", "nothing prepared"],
)
def test_training_needs_the_prepared_data(tmp_path, data, status, text):
    (tmp_path / "parts").mkdir()
    config = GpuReportConfig(out=str(tmp_path), device="cpu", data=data and str(tmp_path))
    gpu_report.run_part("training", config, deadline=1e18)
    found = gpu_report.read_part(tmp_path, "training")
    assert found["status"] == status and text in found["text"]


# Without running anything


def stub(tmp_path: Path, body: str) -> str:
    """An executable that stands for the python that measures; ``parts`` is the folder of states in it."""
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\nimport json, pathlib, sys\noptions = json.loads(sys.argv[-1])\n"
                    "parts = pathlib.Path(options['config']['out']) / 'parts'\n" + body)  # fmt: skip
    path.chmod(0o755)
    return str(path)


def watched(tmp_path: Path, body: str, monkeypatch: pytest.MonkeyPatch, seconds: float = 60.0) -> list[str]:
    import time

    (tmp_path / "parts").mkdir(exist_ok=True)
    monkeypatch.setattr(sys, "executable", stub(tmp_path, body))
    config = GpuReportConfig(out=str(tmp_path), device="cpu")
    return gpu_report._watch(config, ["device", "correctness", "memory"], time.monotonic() + seconds)


def test_a_process_that_dies_fails_its_part_and_the_next_ones_are_left(tmp_path, monkeypatch):
    body = "(parts / 'device.json').write_text('{\"status\": \"running\"}')\nsys.exit(9)\n"
    assert watched(tmp_path, body, monkeypatch) == ["correctness", "memory"]
    found = gpu_report.read_part(tmp_path, "device")
    assert (found["status"], found["text"]) == ("failed", "its process ended with status 9")


def test_after_a_broken_device_a_new_process_goes_on(tmp_path, monkeypatch):
    body = (
        "(parts / 'device.json').write_text('{\"status\": \"done\"}')\n"
        "(parts / 'correctness.json').write_text('{\"status\": \"failed\"}')\n"
        f"sys.exit({gpu_report.DEVICE_BROKEN})\n"
    )
    assert watched(tmp_path, body, monkeypatch) == ["memory"]


def test_a_part_that_hangs_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "GRACE_S", 0.5)
    body = "import time\n(parts / 'device.json').write_text('{\"status\": \"running\"}')\ntime.sleep(60)\n"
    assert watched(tmp_path, body, monkeypatch, seconds=0.0) == ["correctness", "memory"]
    assert gpu_report.read_part(tmp_path, "device")["text"] == "took too long and was stopped"


def test_a_process_that_never_begins_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="before its first part"):
        watched(tmp_path, "sys.exit(3)\n", monkeypatch)


def test_what_does_not_fit_is_left_for_the_next_call(tmp_path):
    (tmp_path / "parts").mkdir()
    config = GpuReportConfig(out=str(tmp_path), device="cpu", toy=True)
    gpu_report.run_part("bench-attention", config, deadline=0.0)
    first = gpu_report.read_part(tmp_path, "bench-attention")
    assert first["status"] == "partial" and "9 left for the next call" in first["text"]
    assert "not finished: bench-attention" in gpu_report.summary(tmp_path, ["bench-attention"])
    gpu_report.run_part("bench-attention", config, deadline=1e18)
    assert gpu_report.read_part(tmp_path, "bench-attention")["status"] == "done"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": ""}, "out is not set"),
        ({"out": "x", "minutes": 0.0}, "minutes=0.0"),
        ({"out": "x", "device": "tpu"}, "tpu"),
    ],
    ids=["no folder", "no time", "device"],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        GpuReportConfig(**options)


def test_an_unknown_part_is_refused(tmp_path):
    with pytest.raises(UserError, match="unknown devices: expected device, correctness"):
        gpu_report.run_report(GpuReportConfig(out=str(tmp_path), device="cpu", parts=["devices"]))


def test_junit_counts_by_hand(tmp_path):
    path = tmp_path / "x.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="a" name="b"/><testcase classname="a" name="c"><failure/>'
        '</testcase><testcase classname="a" name="d"><skipped/></testcase>'
        '<testcase classname="a" name="e"><error/></testcase></testsuite></testsuites>'
    )
    assert junit_counts(path) == ({"passed": 1, "failed": 2, "skipped": 1}, ["a.c", "a.e"])


def test_a_process_out_of_time_is_stopped():
    assert run_process(["sleep", "30"], seconds=0.1) is None
    done = run_process([sys.executable, "-c", "print('x'); raise SystemExit(4)"], seconds=30)
    assert done is not None and (done.returncode, done.stdout) == (4, "x\n")
