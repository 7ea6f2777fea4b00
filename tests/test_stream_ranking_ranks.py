"""A ranking model day by day over ranks: the stream of one, of a finished log and of a folder in which files arrive."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from hstu.config import Config
from hstu.config_stream import StreamConfig
from tests.test_stream_ranking_watch import arrive, data_config, watch_config
from tests.test_stream_ranks import days_of, ended, losses, narrow
from tests.test_train import assert_same_run, final_state

METRICS = ("click/auc", "click/gauc", "click/ne", "click/calibration", "watch/rmse")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A finished log of three days, and its stream on two ranks."""
    root = tmp_path_factory.mktemp("log")
    for number in (1, 2, 3):
        arrive(root / "in", number)
    config = watch_config(root, calibrate=True, form="fused", targets=3)
    config = dataclasses.replace(config, data=data_config(root, raw=str(root / "in")))
    assert ended(2, narrow(config, root / "two"), StreamConfig()) == {""}
    return config, root


def assert_same_stream(one: Path, two: Path) -> None:
    """Losses and predictions to float noise, and what follows from them."""
    assert losses(two) == pytest.approx(losses(one), rel=3e-5) and len(losses(one)) >= 8
    for day, other in zip(days_of(one), days_of(two), strict=True):
        assert 0 <= other.pop("imbalance") < 1 and day.keys() == other.keys()
        for name in ("day", "events", "users", "trained", "targets", "labels", "cold", "baselines"):
            assert day.get(name) == other.get(name)
        for name in METRICS:
            assert other.get(name) == pytest.approx(day.get(name), abs=2e-3)


def test_two_ranks_stream_a_finished_log_as_one(log: tuple[Config, Path]) -> None:
    config, root = log
    assert ended(1, narrow(config, root / "one"), StreamConfig()) == {""}
    assert_same_stream(root / "one", root / "two")
    one, two = (np.load(root / name / "predictions.npy") for name in ("one", "two"))
    assert np.isfinite(one).all(axis=1).sum() == 320 and np.isnan(one).all(axis=1).sum() == 160
    np.testing.assert_allclose(two, one, rtol=1e-4)
    found = [json.loads((root / name / "evaluation.json").read_text())["rows"][0]["metrics"] for name in ("one", "two")]
    assert found[1]["click/auc"] == pytest.approx(found[0]["click/auc"], abs=1e-3)


def test_stopped_on_one_of_two_ranks_it_ends_bit_identical(log: tuple[Config, Path]) -> None:
    config, root = log
    stopped = narrow(config, root / "stopped")
    end = f"Interrupted: stopped by SIGTERM; saved. Resume with run.dir={root / 'stopped'}"
    assert ended(2, stopped, StreamConfig(), {1: 13}) == {end}
    assert 0 < final_state(root / "stopped").values["progress"]["step"]
    assert ended(2, stopped, StreamConfig()) == {""}
    assert_same_run(root / "two", root / "stopped")
    one, two = (np.load(root / name / "predictions.npy") for name in ("two", "stopped"))
    assert np.array_equal(one, two, equal_nan=True)


def test_two_ranks_watch_a_folder_as_one(log: tuple[Config, Path], tmp_path: Path) -> None:
    """With managed rows, on two ranks in parts, whose ids go ahead or not."""
    pytest.importorskip("torchrec")
    _, root = log
    config, rows = watch_config(tmp_path), {"ids": "managed", "rows": 8, "optimizer": "rowwise_adagrad"}
    stream = StreamConfig(watch=str(root / "in"), item_rows=200, settle_s=0, timeout_s=0)
    assert ended(1, narrow(config, tmp_path / "one", **rows), stream) == {""}
    parts = narrow(config, tmp_path / "two", kind="sharded", sharding="row_wise", **rows)
    assert ended(2, parts, stream) == {""}
    assert [day.get("oov_labels", 0) > 0 for day in days_of(tmp_path / "two")] == [False, True, True]
    assert_same_stream(tmp_path / "one", tmp_path / "two")
    ahead = narrow(config, tmp_path / "ahead", kind="sharded", sharding="row_wise", pipeline=True, **rows)
    assert ended(2, ahead, stream) == {""}
    assert_same_run(tmp_path / "two", tmp_path / "ahead")
