"""The optional loggers: what they hand to Weights & Biases and MLflow, resuming, and the lines where they do not start.

Stand-ins for both packages run everywhere; the packages themselves where they are installed.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from hstu.errors import UserError
from hstu.loggers import make_loggers

CONFIG = {"experiment": "tiny", "seed": 0}


class UsageError(Exception):
    """As wandb raises it."""


class MlflowException(Exception):
    """As mlflow raises it."""


class FakeWandb(SimpleNamespace):
    """Remembers what it was called with."""

    def __init__(self) -> None:
        super().__init__(inits=[], points=[], finished=0)

    def init(self, **options):
        self.inits.append(options)
        return SimpleNamespace(log=lambda values, step: self.points.append((step, values)), finish=self._finish)

    def _finish(self) -> None:
        self.finished += 1


class FakeMlflow(SimpleNamespace):
    """One tracking store in memory; metric names with an @ are refused, as by MLflow."""

    def __init__(self) -> None:
        super().__init__(
            runs={}, active=None, artifacts=[], exceptions=SimpleNamespace(MlflowException=MlflowException)
        )

    def get_tracking_uri(self) -> str:
        return "memory"

    def set_experiment(self, name: str) -> None:
        self.experiment = name

    def start_run(self, run_id: str | None = None, run_name: str | None = None):
        if run_id is not None and run_id not in self.runs:
            raise MlflowException(f"Run with id={run_id} not found")
        self.active = run_id or f"id{len(self.runs)}"
        self.runs.setdefault(self.active, [])
        return SimpleNamespace(info=SimpleNamespace(run_id=self.active))

    def log_dict(self, values, name: str) -> None:
        self.artifacts.append(name)

    def log_metrics(self, values, step: int) -> None:
        assert not any("@" in name for name in values)
        self.runs[self.active].append((step, values))

    def end_run(self) -> None:
        self.active = None


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def mlflow(monkeypatch):
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    return fake


def log_and_close(name: str, folder, step: int, values: dict[str, float]) -> None:
    (logger,) = make_loggers([name], folder, CONFIG, step)
    logger.log(step, values)
    logger.close()


def test_wandb_gets_the_points_and_resumes_the_same_run(wandb, tmp_path):
    log_and_close("wandb", tmp_path, 1, {"hr@10": 0.5})
    log_and_close("wandb", tmp_path, 2, {"hr@10": 0.6})
    assert wandb.points == [(1, {"hr@10": 0.5}), (2, {"hr@10": 0.6})] and wandb.finished == 2
    first, second = wandb.inits
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert (first["name"], first["dir"], first["config"]) == (tmp_path.name, str(tmp_path), CONFIG)


def test_mlflow_gets_the_points_and_resumes_the_same_run(mlflow, tmp_path):
    log_and_close("mlflow", tmp_path, 1, {"hr@10": 0.5})
    log_and_close("mlflow", tmp_path, 2, {"hr@10": 0.6})
    assert mlflow.runs == {"id0": [(1, {"hr_at_10": 0.5}), (2, {"hr_at_10": 0.6})]}
    assert (mlflow.experiment, mlflow.artifacts, mlflow.active) == ("tiny", ["config.yaml"], None)


def test_mlflow_resumed_beside_another_tracking_store(mlflow, tmp_path):
    log_and_close("mlflow", tmp_path, 1, {"loss": 1.0})
    mlflow.runs.clear()
    line = r"mlflow has no run id0 at memory: set MLFLOW_TRACKING_URI .* or delete .*mlflow_run_id to begin another"
    with pytest.raises(UserError, match=line):
        make_loggers(["mlflow"], tmp_path, CONFIG, 1)


def test_a_logger_that_does_not_start_is_one_line(wandb, tmp_path):
    def refuse(**options):
        raise UsageError("No API key configured.\nmore")

    wandb.init = refuse
    with pytest.raises(UserError) as caught:
        make_loggers(["wandb"], tmp_path, CONFIG, 0)
    assert str(caught.value) == (
        "run.loggers: wandb does not start (No API key configured.): run `wandb login` or set WANDB_MODE=offline, "
        "or leave it out with run.loggers=[]"
    )


def test_a_full_disk_stays_one(wandb, tmp_path):
    def full(**options):
        raise OSError(28, "No space left on device")

    wandb.init = full
    with pytest.raises(OSError, match="No space left"):
        make_loggers(["wandb"], tmp_path, CONFIG, 0)


def test_a_package_that_is_absent(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match=r"mlflow is not installed: pip install mlflow, .* run.loggers=\[tensorboard\]"):
        make_loggers(["mlflow", "tensorboard"], tmp_path, CONFIG, 0)


def test_the_real_wandb_offline(monkeypatch, tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for step in (1, 2):
        log_and_close("wandb", tmp_path, step, {"hr@10": 0.5})
    assert len(list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))) == 2


def test_the_real_mlflow(monkeypatch, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.chdir(tmp_path)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/tracking.db")
    try:
        for step in (1, 2):
            log_and_close("mlflow", tmp_path, step, {"hr@10": step / 10})
        run_id = (tmp_path / "mlflow_run_id").read_text(encoding="utf-8")
        history = mlflow.MlflowClient().get_metric_history(run_id, "hr_at_10")
        assert [(point.step, point.value) for point in history] == [(1, 0.1), (2, 0.2)]
    finally:
        mlflow.set_tracking_uri(before)
