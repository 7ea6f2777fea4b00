"""Ranking day by day: every event is predicted once by what lies before it, then trained on once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from hstu import ranking_metrics
from hstu.calibration import intercept, shifted
from hstu.config import Config, OptimConfig
from hstu.config_ranking import TaskConfig
from hstu.config_stream import StreamConfig
from hstu.data.days import RankingDayBatches, StoreDays
from hstu.data.ranking import RankingData
from hstu.data.share import Ranks
from hstu.data.store import SequenceStore
from hstu.errors import UserError
from hstu.evaluate import evaluate_run
from hstu.progress import Display
from hstu.ranking_evaluate import Predictions
from hstu.stream_problem import DAY_BEFORE, SO_FAR, constant_rates, label_counts
from hstu.stream_report import task_table
from hstu.stream_train import stream_train
from tests.figures import rendered
from tests.ranking import rich_store
from tests.stopping import stopped_at
from tests.test_ranking_train import evaluate_options, make_config, planted_store
from tests.test_train import assert_same_run, final_state, logged

DAY_S = 200
FORMS = ("interleaved", "fused")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> SequenceStore:
    """40 users with 10 to 21 events in 1000 s."""
    return planted_store(tmp_path_factory.mktemp("planted") / "store")


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch, stored: SequenceStore) -> None:
    """Runs find the planted log instead of preparing one, and draw nothing."""
    monkeypatch.setattr("hstu.stream_train.open_store", lambda config, world=None: stored)
    monkeypatch.setattr("hstu.stream_report.plot_days", lambda *_: None)
    monkeypatch.setattr("hstu.plots.plot_reliability", lambda *_: None)


def day_config(folder: Path, form: str = "interleaved", name: str = "run", **changes: Any) -> Config:
    return make_config(folder, form, name, **{"optim": OptimConfig(lr=1e-2), "run_batch_users": 3, **changes})


def stream(**changes: Any) -> StreamConfig:
    return StreamConfig(**{"day_s": DAY_S, **changes})


def moved(config: Config, folder: Path) -> Config:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder)))


def days_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "days.json").read_text())["days"]


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory, stored: SequenceStore) -> dict[str, tuple[Config, Path]]:
    """One uninterrupted stream of each form, over five days."""
    patch = pytest.MonkeyPatch()
    patch.setattr("hstu.stream_train.open_store", lambda config, world=None: stored)
    runs = {}
    for form in FORMS:
        config = day_config(tmp_path_factory.mktemp(form), form)
        with rendered():
            runs[form] = config, stream_train(config, stream())
    patch.undo()
    return runs


# Batches of a day


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("max_len", [1, 3, 16])
def test_every_label_is_trained_on_once_on_its_day(
    tmp_path: Path, stored: SequenceStore, form: str, max_len: int
) -> None:  # fmt: skip
    config = day_config(tmp_path, form)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, max_len=max_len))
    days = StoreDays(stored, DAY_S)
    data = RankingDayBatches(days, config)
    seen: list[int] = []
    for index, number in enumerate(days.numbers):
        for step in range(data.num_steps(index)):
            batch = data.share(index, step, Ranks()).batch
            rows, targets, offsets = batch.rows.numpy(), batch.targets.numpy(), batch.offsets.numpy()
            assert set(stored.timestamps[rows] // DAY_S) == {number}
            owner = np.searchsorted(offsets, targets, side="right") - 1
            first = rows - (targets - offsets[owner])  # the row of the sequence's first event
            start = stored.offsets[batch.users.numpy()[owner]]
            lengths, counts = np.diff(offsets)[owner], batch.num_targets.numpy()[owner]
            full = (lengths - counts if form == "fused" else lengths) == max_len
            assert np.where(full, first >= start, first == start).all(), "all before it, as far as it fits"
            assert np.array_equal(batch.item_ids.numpy()[targets], stored.item_ids[rows])
            assert np.array_equal(batch.labels["click"].numpy(), stored.columns["click"][rows])
            seen += rows.tolist()
    assert sorted(seen) == list(range(stored.num_events))


# Streams of a finished log


@pytest.mark.parametrize("form", FORMS)
def test_every_event_after_the_first_day_is_predicted_once(
    streamed: dict[str, tuple[Config, Path]], stored: SequenceStore, form: str
) -> None:  # fmt: skip
    config, folder = streamed[form]
    days, number = days_of(folder), stored.timestamps // DAY_S
    predictions = np.load(folder / "predictions.npy")
    assert np.array_equal(np.isnan(predictions).all(axis=1), number == 0)
    assert sum(day["trained"] for day in days) == stored.num_events
    assert [day.get("targets", 0) for day in days] == [0, *(int((number == n).sum()) for n in range(1, 5))]
    assert config.ranking is not None
    data, owner = RankingData(stored, config.ranking), np.repeat(np.arange(40), np.diff(stored.offsets))
    first_day = np.minimum.reduceat(number, stored.offsets[:-1])
    for index, day in enumerate(days[1:], 1):
        rows = np.flatnonzero(number == index)
        labels = data.label("click", rows)
        expected = ranking_metrics.evaluate("binary", labels, predictions[rows, 0], owner[rows])["metrics"]
        assert {n: day[f"click/{n}"] for n in expected} == pytest.approx(expected, nan_ok=True)
        assert day["cold"] == pytest.approx(float((first_day[owner[rows]] == index).mean()))
    result, evaluation = (json.loads((folder / f"{n}.json").read_text()) for n in ("result", "evaluation"))
    weights = np.array([day["targets"] for day in days[1:]])
    mean = np.array([day["click/ne"] for day in days[1:]]) @ weights / weights.sum()
    assert result["next_day"]["click/ne"] == pytest.approx(mean)
    scored = np.flatnonzero(number > 0)
    together = ranking_metrics.auc(data.label("click", scored), predictions[scored, 0])
    assert result["all_days"]["click/auc"] == evaluation["rows"][0]["metrics"]["click/auc"] == pytest.approx(together)
    assert evaluation["part"] == "next day" and [row["system"] for row in evaluation["rows"]] == ["hstu"]
    assert (folder / "days.png").stat().st_size > 1000


@pytest.mark.parametrize("form", FORMS)
def test_it_learns(streamed: dict[str, tuple[Config, Path]], form: str) -> None:
    last = days_of(streamed[form][1])[-1]
    assert last["click/auc"] > 0.75 and last["click/ne"] < 0.9 * last["baselines"][SO_FAR]["click/ne"]


@pytest.mark.parametrize("form", FORMS)
def test_what_comes_later_changes_no_prediction(
    streamed: dict[str, tuple[Config, Path]], stored: SequenceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    form: str,
) -> None:  # fmt: skip
    """From the middle of the third day on, everything is done to other items and everything is liked."""
    later = stored.timestamps >= 500
    item_ids = np.array(stored.item_ids)
    other = planted_store(
        tmp_path / "other", click=np.where(later, 1, stored.columns["click"]),
        watch_s=np.where(later, 60, stored.columns["watch_s"]),
    )  # fmt: skip
    np.save(other.path / "item_ids.npy", np.where(later, 1 + item_ids % 12, item_ids).astype(np.int32))
    changed = SequenceStore.open(other.path)
    assert (changed.item_ids[later] != item_ids[later]).all()
    config, folder = streamed[form]
    monkeypatch.setattr("hstu.stream_train.open_store", lambda config, world=None: changed)
    again = stream_train(moved(config, tmp_path / "run"), stream(days=4))
    one, two = np.load(folder / "predictions.npy"), np.load(again / "predictions.npy")
    known = ~later & (stored.timestamps >= DAY_S)
    assert np.array_equal(one[known], two[known])
    assert (one[later & (stored.timestamps < 800)] != two[later & (stored.timestamps < 800)]).any(axis=1).all()


@pytest.mark.parametrize("stop", [7, 33], ids=["first day", "later day"])
def test_stopped_within_a_day_it_ends_bit_identical(
    streamed: dict[str, tuple[Config, Path]], stored: SequenceStore, tmp_path: Path, stop: int
) -> None:  # fmt: skip
    config, folder = streamed["fused"]
    config = moved(config, tmp_path / "run")
    with stopped_at(stop):
        stream_train(config, stream())
    progress = final_state(tmp_path / "run").values["progress"]
    assert progress["global_step"] == stop + 1 and progress["step"] > 0
    assert_same_run(folder, stream_train(config, stream()))
    assert days_of(folder) == days_of(tmp_path / "run")
    one, two = (np.load(run / "predictions.npy") for run in (folder, tmp_path / "run"))
    assert np.array_equal(one, two, equal_nan=True)


def test_calibrated_by_what_the_day_before_would_have_needed(
    streamed: dict[str, tuple[Config, Path]], stored: SequenceStore, tmp_path: Path
) -> None:  # fmt: skip
    config, plain = streamed["interleaved"]
    config = day_config(tmp_path, ranking={"calibrate": True})
    with stopped_at(20):
        stream_train(config, stream())
    folder = stream_train(config, stream())
    losses = [[line["loss"] for line in logged(run) if "loss" in line] for run in (plain, folder)]
    assert losses[0] == losses[1], "training does not see it"
    raw, predictions = np.load(plain / "predictions.npy"), np.load(folder / "predictions.npy")
    number, click = stored.timestamps // DAY_S, stored.columns["click"]
    shift = 0.0
    for index in range(1, 5):
        rows = np.flatnonzero(number == index)
        np.testing.assert_allclose(predictions[rows, 0], shifted(raw[rows, 0], shift), rtol=1e-5)
        assert np.array_equal(predictions[rows, 1], raw[rows, 1]), "minutes watched are no rate"
        shift = intercept(raw[rows, 0], click[rows])
    assert final_state(folder).tensors()["model.heads.calibration"].tolist() == pytest.approx([shift, 0.0])


def test_some_users_are_evaluated(stored: SequenceStore, tmp_path: Path) -> None:
    folder = stream_train(day_config(tmp_path), stream(eval_users=6, days=3))
    predicted = ~np.isnan(np.load(folder / "predictions.npy")[:, 0])
    owner = np.repeat(np.arange(40), np.diff(stored.offsets))
    for index, day in enumerate(days_of(folder)[1:], 1):
        today = stored.timestamps // DAY_S == index
        chosen = np.unique(owner[predicted & today])
        assert len(chosen) == 6 and np.array_equal(np.isin(owner, chosen)[today], predicted[today]), "all their events"
        assert day["targets"] == (predicted & today).sum() and day["trained"] == today.sum()


def test_evaluated_again_it_says_that_it_was_trained_on(
    streamed: dict[str, tuple[Config, Path]], stored: SequenceStore, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("hstu.runs.open_store", lambda config, world=None: stored)
    folder = streamed["interleaved"][1]
    before = (folder / "evaluation.json").read_text()
    evaluate_run(evaluate_options(folder))
    shown = capsys.readouterr().out
    assert f"a stream: all of {stored.path} was trained on, these events too" in shown
    assert (folder / "evaluation.json").read_text() == before and (folder / "evaluation-test-best.json").exists()


# Constant rates


def test_rates_of_the_days_before(tmp_path: Path) -> None:
    """Click 1 of 4 and 3 of 4 on two days, so 1/2 so far; the third day has 1 of 4."""
    click = np.array([1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1], np.float32)
    rating = np.array([1, 1, 2, 3, 1, np.nan, 3, 3, 1, 1, 2, 3], np.float32)
    columns = {"click": click, "rating": rating, "watch_s": np.arange(12, dtype=np.float32), "tab": np.ones(12, int)}
    store = rich_store(tmp_path / "store", lengths=(12,), columns=columns)
    tasks = {
        "click": TaskConfig("click"),
        "rating": TaskConfig("rating", kind="ordinal", levels=[1, 2, 3]),
        "watch": TaskConfig("watch_s", kind="regression"),
        "never": TaskConfig("click", mask_column="watch_s"),
    }
    config = make_config(tmp_path, tasks=tasks).ranking
    assert config is not None
    data = RankingData(store, dataclasses.replace(config, item_features={}, event_features={}, actions={}))
    labels = [label_counts(data, np.arange(start, start + 4)) for start in (0, 4)]
    assert labels[0]["click"] == [3, 1] and labels[0]["rating"] == [2, 1, 1] and labels[0]["watch"] == [4, 6]
    assert labels[1]["click"] == [1, 3] and labels[1]["rating"] == [1, 0, 2] and labels[1]["watch"] == [4, 22]
    assert labels[0]["never"] == [3, 0], "the first event has watch_s 0, so no label"
    rows = np.arange(8, 12)
    found = constant_rates(data, Predictions(rows, np.zeros(4, np.int64), {}), labels)
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    assert found[SO_FAR]["click/ne"] == pytest.approx(np.log(2) / entropy)
    assert found[DAY_BEFORE]["click/ne"] == pytest.approx(-(0.25 * np.log(0.75) + 0.75 * np.log(0.25)) / entropy)
    assert found[DAY_BEFORE]["click/calibration"] == pytest.approx(3) and found[SO_FAR]["click/calibration"] == 2
    nll = -(2 * np.log(3 / 7) + np.log(1 / 7) + np.log(3 / 7)) / 4
    assert found[SO_FAR]["rating/log_loss"] == pytest.approx(nll)
    assert found[SO_FAR]["watch/rmse"] == pytest.approx(np.sqrt(np.mean((np.arange(8, 12) - 3.5) ** 2)))
    assert not {"click/auc", "click/rate"} & found[SO_FAR].keys()


def test_a_table_by_task(streamed: dict[str, tuple[Config, Path]]) -> None:
    folder = streamed["interleaved"][1]
    days, result = days_of(folder)[1:], json.loads((folder / "result.json").read_text())
    console = Console(width=100)
    with console.capture() as capture:
        console.print(task_table("click", "binary", days, result))
    lines = [line.split() for line in capture.get().splitlines()]
    found = {line[0]: line for line in lines if line}
    assert {day["day"] for day in days} <= found.keys()
    last = found[days[-1]["day"]]
    shown = [days[-1][f"click/{n}"] for n in ("auc", "gauc", "ne", "calibration", "rate")]
    shown += [days[-1]["baselines"][system]["click/ne"] for system in (SO_FAR, DAY_BEFORE)]
    assert last[2:] == [f"{value:.4f}" for value in shown]


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranking": {"mode": "progressive"}}, "ranking.mode='progressive': expected epochs with hstu-stream"),
        ({"optim": OptimConfig(schedule="cosine")}, "optim.schedule='cosine': expected constant with hstu-stream"),
    ],
    ids=["progressive", "schedule"],
)
def test_what_a_ranking_stream_does_not_take(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        stream_train(day_config(tmp_path, **changes), stream(), Display(False, shown=False))
