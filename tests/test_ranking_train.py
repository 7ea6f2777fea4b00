"""Ranking runs from end to end: they learn, resume bit-identical, validate progressively, and say what is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from hstu.config import Config, DataConfig, HSTUConfig, OptimConfig, to_dict
from hstu.config_ranking import ActionConfig, FeatureConfig, HeadConfig, RankingConfig, TaskConfig
from hstu.data.store import write_store
from hstu.errors import UserError
from hstu.evaluate import evaluate_run
from hstu.recommend import load
from hstu.train import run_command, train
from tests.ranking import config_of
from tests.stopping import stopped_at
from tests.test_train import assert_same_run, logged

NUM_USERS, NUM_ITEMS, SPLIT_TIME = 40, 12, 800
STEP_EVENTS = 96


def planted_store(path: Path, seed: int = 0, **columns):
    """Every other user likes nearly everything, the others nearly nothing; a like is a click and a long watch. hate
    never happens. What a user is like is in no feature: it has to be read from the earlier actions.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(10, 22, NUM_USERS)
    owner = np.repeat(np.arange(NUM_USERS), lengths)
    items = rng.integers(1, NUM_ITEMS + 1, len(owner))
    likes = (owner % 2 == 0) == (rng.random(len(owner)) < 0.9)
    values = {"click": likes.astype(np.float32), "hate": np.zeros(len(owner), np.float32)}
    values["watch_s"] = np.where(likes, 60, 2) + rng.integers(0, 3, len(owner)).astype(np.float32)
    times = np.concatenate([np.sort(rng.integers(0, 1000, n)) for n in lengths])
    return write_store(
        path, offsets=np.concatenate([[0], np.cumsum(lengths)]), item_ids=items, timestamps=times, num_items=NUM_ITEMS,
        meta={"name": "planted", "split": {"kind": "global-time", "time": str(SPLIT_TIME)}},
        columns={n: np.asarray(c, np.float32) for n, c in (values | columns).items()},
        item_attributes={"parity": np.array(["odd", "even"] * (NUM_ITEMS // 2))},
    )  # fmt: skip


def make_config(folder, form="interleaved", name="run", tasks=None, ranking=None, **changes) -> Config:
    watch = TaskConfig("watch_s", "regression", transform="log1p")
    settings = {
        "tasks": tasks or {"click": TaskConfig("click"), "watch": watch},
        "actions": {"click": ActionConfig(), "watch_s": ActionConfig("thresholds", thresholds=[10, 30])},
        "item_features": {"parity": FeatureConfig()},
        "event_features": {"hour_of_day": FeatureConfig()},
        "targets": 4,
        "head": HeadConfig([16]),
        "batch_events": STEP_EVENTS,
    }  # fmt: skip
    config = RankingConfig(form, **(settings | (ranking or {})))
    model = HSTUConfig(dim=16, num_blocks=1, num_heads=2, qk_dim=8, v_dim=8, max_len=16, dropout=0.1)
    run = {"run_epochs": 7, "run_batch_users": 8, "run_select_metric": "click/ne", "run_dir": str(folder / name)}
    data = DataConfig(name="planted", source="log", split="global-time", split_time=str(SPLIT_TIME))
    return config_of(config, model=model, data=data, **(run | changes))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return planted_store(tmp_path_factory.mktemp("planted") / "store")


@pytest.fixture(autouse=True)
def planted(monkeypatch, stored):
    """Runs find the planted log instead of preparing one, and draw no curves."""
    monkeypatch.setattr("hstu.report.plot_curves", lambda folder: None)
    monkeypatch.setattr("hstu.train.open_store", lambda config, world=None: stored)
    monkeypatch.setattr("hstu.runs.open_store", lambda config, world=None: stored)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, stored):
    """One uninterrupted run of each form."""
    patch = pytest.MonkeyPatch()
    patch.setattr("hstu.train.open_store", lambda config, world=None: stored)
    patch.setattr("hstu.report.plot_curves", lambda folder: None)
    runs = {}
    for form in ("interleaved", "fused"):
        config = make_config(tmp_path_factory.mktemp(form), form)
        runs[form] = config, train(config)
    patch.undo()
    return runs


def first_row(folder):
    return json.loads((folder / "evaluation.json").read_text())["rows"][0]


@pytest.mark.parametrize("form", ["interleaved", "fused"])
def test_the_loss_falls_and_the_planted_taste_is_found(trained, form):
    _, folder = trained[form]
    losses = [line["epoch_loss"] for line in logged(folder) if "epoch_loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    row = first_row(folder)
    assert row["metrics"]["click/auc"] > 0.75 and row["metrics"]["click/ne"] < 0.9
    result = json.loads((folder / "result.json").read_text())
    assert result["selected_by"] == "click/ne on validation" and result["test"] == row["metrics"]


def moved(config: Config, folder: Path) -> Config:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder)))


@pytest.mark.parametrize("form", ["interleaved", "fused"])
def test_a_stopped_run_resumes_bit_identical(trained, tmp_path, form):
    config, whole = trained[form]
    stopped = moved(config, tmp_path / "stopped")
    with stopped_at(13):
        train(stopped)
    folder = train(stopped)
    assert_same_run(whole, folder)
    assert first_row(whole) == first_row(folder)


def progressive_config(folder, form="interleaved", **changes):
    return make_config(folder, form, ranking={"mode": "progressive"}, **({"run_epochs": 1} | changes))


@pytest.mark.parametrize("form", ["interleaved", "fused"])
def test_progressive_validation_and_its_resume(stored, tmp_path, form):
    whole = train(progressive_config(tmp_path / "whole", form))
    predictions = np.load(whole / "predictions.npy")
    assert predictions.shape == (stored.num_events, 2) and np.isfinite(predictions).all()
    stopped = progressive_config(tmp_path / "stopped", form)
    with stopped_at(4):
        train(stopped)
    part = np.load(Path(stopped.run.dir) / "predictions.npy")
    late = np.argsort(np.asarray(stored.timestamps), kind="stable")[5 * STEP_EVENTS :]
    assert np.isnan(part[late]).all() and np.isfinite(part).sum() == 2 * 5 * STEP_EVENTS  # nothing later was touched
    folder = train(stopped)
    assert_same_run(whole, folder)
    np.testing.assert_array_equal(np.load(folder / "predictions.npy"), predictions)
    row = first_row(whole)
    assert row["events"] == stored.num_events - STEP_EVENTS  # the first step sets the priors and is not scored
    result = json.loads((whole / "result.json").read_text())
    assert result["selected_by"] == "click/ne on progressive" and result["test"] == row["metrics"]


def test_progressive_validation_learns_on_the_way(tmp_path):
    config = progressive_config(tmp_path, "fused")
    quick = {"ranking": dataclasses.replace(config.ranking, batch_events=16), "optim": OptimConfig(lr=2e-2)}
    assert first_row(train(dataclasses.replace(config, **quick)))["metrics"]["click/auc"] > 0.65


def test_a_task_of_one_class(stored, tmp_path):
    tasks = {"click": TaskConfig("click"), "hate": TaskConfig("hate")}
    folder = train(make_config(tmp_path, tasks=tasks, run_epochs=1, eval_bootstrap=5))
    row = first_row(folder)
    assert row["metrics"]["hate/auc"] is None and row["metrics"]["hate/ne"] is None
    assert row["reasons"]["hate/auc"] == f"all {row['events']} rows have the same label"
    assert row["metrics"]["hate/log_loss"] < 1e-3 and row["metrics"]["click/auc"] is not None
    assert json.loads((folder / "result.json").read_text())["test"]["hate/auc"] is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"run_select_metric": "hate/auc"}, r"hate/auc is not defined on validation: all \d+ rows have the same label"),
        ({"run_select_metric": "click/calibration"}, r"select_metric: metric 'click/calibration' has no direction"),
        ({"run_select_metric": "auc"}, r"select_metric=auc: expected one of click/auc, "),
        ({"ranking": {"mode": "progressive"}, "run_epochs": 2}, r"run\.epochs=2: expected 1 with ranking\.mode"),
        ({"ranking": {"mode": "progressive", "batch_events": 9999}, "run_epochs": 1}, r"batch_events=9999: all"),
        ({"tasks": {"type": TaskConfig("click")}, "run_select_metric": "type/ne"}, r"tasks\.type: torch takes that"),
    ],
    ids=["one class", "no direction", "unknown", "two passes", "one step", "name"],
)  # fmt: skip
def test_wrong_settings_are_one_clear_line_before_training(tmp_path, changes, message):
    tasks = {"click": TaskConfig("click"), "hate": TaskConfig("hate")}
    with pytest.raises(UserError, match=message):
        train(make_config(tmp_path, **({"tasks": tasks} | changes)))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_task_without_training_labels_is_an_error(stored, tmp_path, monkeypatch):
    store = planted_store(tmp_path / "s", watch_s=np.full(stored.num_events, np.nan))
    monkeypatch.setattr("hstu.train.open_store", lambda config, world=None: store)
    with pytest.raises(UserError, match=r"tasks\.watch: none of \d+ training events has a label"):
        train(make_config(tmp_path))


# Tables and commands


def test_the_table_groups_metrics_by_task(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    tasks = {"click": TaskConfig("click"), "hate": TaskConfig("hate")}
    options = to_dict(make_config(tmp_path, tasks=tasks, run_epochs=1, eval_bootstrap=10))
    run_command(options)
    shown = capsys.readouterr().out
    lines = [line.replace("│", " ").split() for line in shown.splitlines()]
    assert ["click,", "rate"] in [line[:2] for line in lines] and "95 % interval" in shown
    auc = next(line for line in lines if line[:1] == ["auc"])
    assert len(auc) == 5 and auc[3] == "to"  # auc, the model's, its interval
    assert "not defined, all" in shown and "hate/auc, hate/ne" in shown.replace("\n", " ")
    row = first_row(Path(options["run"]["dir"]))
    assert f"planted, test: {row['events']:,} events of {row['count']:,} users" in shown
    again = to_dict(make_config(tmp_path, name="seeds", tasks=tasks, run_epochs=1)) | {"seeds": [0, 1]}
    run_command(again)
    shown = capsys.readouterr().out
    assert shown.count("±") >= 5 and "95 % interval" not in shown


def evaluate_options(run, **changes):
    values = dict.fromkeys(("ks", "batch_users", "filter_history", "bootstrap", "chunk_mib", "baselines"))
    options = {"run": str(run), "which": "best", "split": "test", "device": "auto", "eval": values}
    return options | {k: v for k, v in changes.items() if k != "eval"} | {"eval": values | changes.get("eval", {})}


def test_evaluating_a_ranking_run_again(trained, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    _, folder = trained["interleaved"]
    before = first_row(folder)
    found = evaluate_run(evaluate_options(folder))
    assert first_row(folder) == before
    assert found["rows"][0]["metrics"]["click/auc"] == before["metrics"]["click/auc"]
    assert "planted, test: " in capsys.readouterr().out
    other = evaluate_run(evaluate_options(folder, split="validation", which="last", eval={"bootstrap": 10}))
    shown = capsys.readouterr().out
    assert "95 % interval" in shown and "planted, validation: " in shown
    written = json.loads((folder / "evaluation-validation-last.json").read_text())
    assert written["part"] == "validation" and written["checkpoint"] == "last"
    assert written["rows"][0]["metrics"] == other["rows"][0]["metrics"] != before["metrics"]
    pytest.importorskip("matplotlib")
    assert {"reliability-click.png", "reliability-click-validation-last.png"} <= {p.name for p in folder.iterdir()}


def test_what_a_ranking_run_cannot_do_is_one_clear_line(trained, tmp_path):
    _, folder = trained["interleaved"]
    with pytest.raises(UserError, match=r"eval\.ks=\[10\]: .* is a ranking run"):
        evaluate_run(evaluate_options(folder, eval={"ks": [10]}))
    with pytest.raises(UserError, match="is a ranking run: it predicts actions on given items"):
        load(folder)
    progressive = train(progressive_config(tmp_path))
    with pytest.raises(UserError, match=r"is a progressive run: .*evaluation\.json"):
        evaluate_run(evaluate_options(progressive))


# Calibration


def test_calibration_is_fitted_on_validation_and_kept_in_the_checkpoint(trained, tmp_path):
    _, plain = trained["interleaved"]
    folder = train(make_config(tmp_path, ranking={"calibrate": True}, eval_baselines=True))
    losses = [[line["epoch_loss"] for line in logged(run) if "epoch_loss" in line] for run in (plain, folder)]
    assert losses[0] == losses[1]  # training does not see it
    on_validation = evaluate_run(evaluate_options(folder, split="validation"))
    systems = {row["system"]: row["metrics"] for row in on_validation["rows"]}
    assert systems["hstu"]["click/calibration"] == pytest.approx(1.0, abs=1e-4)
    assert systems["logistic regression"]["click/calibration"] == pytest.approx(1.0, abs=1e-4)
    assert systems["item rate"]["click/calibration"] != pytest.approx(1.0, abs=1e-3)
    before, after = first_row(plain)["metrics"], first_row(folder)["metrics"]
    assert after["click/calibration"] != before["click/calibration"]
    assert after["watch/rmse"] == before["watch/rmse"]
    again = evaluate_run(evaluate_options(folder))
    assert again["rows"][0]["metrics"] == after


def test_calibration_without_validation_events_is_refused(tmp_path):
    config = make_config(tmp_path, ranking={"calibrate": True}, run_selection="reference")
    with pytest.raises(UserError, match="ranking.calibrate with run.selection=reference: expected validation"):
        train(config)
