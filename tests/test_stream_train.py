"""Training day by day: each day is evaluated before it is trained on, rates fall, and any stop is continued."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

import hstu
from hstu import evaluate, recommend
from hstu import stream_train as module
from hstu.config import Config, DataConfig, OptimConfig
from hstu.config_stream import StreamConfig
from hstu.data.hashing import hash_ids
from hstu.data.watch import StreamSource
from hstu.errors import UserError
from hstu.prepare import prepare
from hstu.runs import load_run
from hstu.stream_train import StreamTrainer, stream_train
from hstu.train import Trainer
from hstu.two_stage import TwoStage
from tests.data.test_watch import at, write_day
from tests.figures import rendered
from tests.stopping import stopped_at
from tests.test_train import assert_same_run, final_state, logged, make_config

DAYS = 4


def stream_config(root: Path, name: str = "run", **changes: Any) -> Config:
    return make_config(root, name, **{"optim": OptimConfig(lr=1e-2), **changes})


def settings(config: Config, **changes: Any) -> StreamConfig:
    """About DAYS days over the synthetic log, which covers some years."""
    times = np.asarray(prepare(config.data, quiet=True).timestamps)
    length = int(times.max() - times.min()) // (DAYS - 1)
    return StreamConfig(**{"day_s": length, "eval_users": 0, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    config = stream_config(tmp_path_factory.mktemp("stream"))
    with rendered():
        return config, stream_train(config, settings(config, lr_decay=0.5, table_lr_decay=0.9))


def test_every_event_once_and_every_day_before_it_is_trained_on(finished: tuple[Config, Path]) -> None:
    config, folder = finished
    store = prepare(config.data, quiet=True)
    days = json.loads((folder / "days.json").read_text())["days"]
    assert len(days) in (DAYS, DAYS + 1)
    assert sum(day["trained"] for day in days) == store.num_events - store.num_users
    assert sum(day["events"] for day in days) == store.num_events
    assert "targets" not in days[0] and all(day["targets"] > 0 for day in days[1:])
    kinds = [line["kind"] for line in logged(folder) if "kind" in line]
    assert kinds == ["day"] + ["next day", "day"] * (len(days) - 1)
    result = json.loads((folder / "result.json").read_text())
    total = sum(day["targets"] for day in days[1:])
    mean = sum(day["hr@10"] * day["targets"] for day in days[1:]) / total
    assert result["targets"] == total and result["next_day"]["hr@10"] == pytest.approx(mean)
    assert (folder / "days.png").stat().st_size > 1000


def test_it_learns(finished: tuple[Config, Path]) -> None:
    days = json.loads((finished[1] / "days.json").read_text())["days"]
    assert days[-1]["train_loss"] < days[0]["train_loss"]
    assert days[-1]["hr@10"] > 10 / 60, "better than chance"


def test_rates_of_the_dense_part_and_of_tables(finished: tuple[Config, Path], tmp_path: Path) -> None:
    config = stream_config(tmp_path)
    stream = settings(config, lr_decay=0.5, table_lr_decay=0.9, min_lr_fraction=0.2)
    rates: list[dict[bool, float]] = []
    step = Trainer._step

    def watched(self: Trainer, step_input: Any) -> float:
        loss = step(self, step_input)
        if self.progress.step == 0:
            rates.append({g["is_table"]: g["lr"] for o in self.optimizers for g in o.param_groups})
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", watched)
        stream_train(config, stream)
    dense, table = [r[False] for r in rates[:4]], [r[True] for r in rates[:4]]
    assert dense == pytest.approx([1e-2, 5e-3, 2.5e-3, 2e-3]), "halved a day, not below a fifth"
    assert table == pytest.approx([1e-2, 9e-3, 8.1e-3, 7.29e-3])


@pytest.mark.parametrize("stop", [2, 14], ids=["first day", "later day"])
def test_stopped_and_resumed_it_ends_bit_identical(finished: tuple[Config, Path], tmp_path: Path, stop: int) -> None:
    config, folder = finished
    stopped = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path / "stopped")))
    stream = settings(config, lr_decay=0.5, table_lr_decay=0.9)
    with stopped_at(stop - 1):
        stream_train(stopped, stream)
    assert final_state(tmp_path / "stopped").values["progress"]["global_step"] == stop
    assert_same_run(folder, stream_train(stopped, stream))


def test_more_days_continue_a_finished_stream(finished: tuple[Config, Path], tmp_path: Path) -> None:
    config, folder = finished
    other = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path / "part")))
    stream = settings(config, lr_decay=0.5, table_lr_decay=0.9)
    stream_train(other, dataclasses.replace(stream, days=2))
    assert len(json.loads((tmp_path / "part/days.json").read_text())["days"]) == 2
    assert_same_run(folder, stream_train(other, stream))
    settled = json.loads((tmp_path / "part/stream.json").read_text())
    del settled["utc_offset_hours"]  # as of a run from before the option
    (tmp_path / "part/stream.json").write_text(json.dumps(settled))
    stream_train(other, stream)
    with pytest.raises(UserError, match="holds a run with stream.lr_decay=0.5, now 0.6: take another run.dir"):
        stream_train(other, dataclasses.replace(stream, lr_decay=0.6))


def test_a_finished_stream_repeated_stays_as_it_is(finished: tuple[Config, Path]) -> None:
    config, folder = finished
    before = {name: (folder / name).read_text() for name in ("days.json", "result.json", "metrics.jsonl")}
    assert stream_train(config, settings(config, lr_decay=0.5, table_lr_decay=0.9)) == folder
    assert {name: (folder / name).read_text() for name in before} == before


def test_the_last_model_is_the_one_that_is_loaded(finished: tuple[Config, Path]) -> None:
    _, _, model = load_run(finished[1])
    last = final_state(finished[1]).tensors()
    assert all(np.array_equal(value.numpy(), last[f"model.{name}"]) for name, value in model.state_dict().items())


def test_a_sample_of_users_is_evaluated(tmp_path: Path) -> None:
    config = stream_config(tmp_path)
    folder = stream_train(config, settings(config, eval_users=7, days=2))
    days = json.loads((folder / "days.json").read_text())["days"]
    assert [day.get("targets") for day in days] == [None, 7]


def item_row(raw: str) -> int:
    return int(hash_ids(np.array([raw]))[0] % np.uint64(500)) + 1


def test_a_watched_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """Three days of users who go round a ring of items; the second command finds a fourth day."""
    rng = np.random.default_rng(0)

    def arrive(number: int) -> None:
        rows = []
        for user in range(30):
            start = int(rng.integers(12))
            rows += [(f"u{user}", f"item {(start + k) % 12}", 100 * k + user) for k in range(8)]
        write_day(tmp_path / "in", f"2026-03-0{number}", rows)

    for number in (1, 2, 3):
        arrive(number)
    config = make_config(tmp_path, optim=OptimConfig(lr=1e-2))
    data = dataclasses.replace(config.data, name="log", source="log")
    config = dataclasses.replace(config, data=data)
    stream = StreamConfig(watch=str(tmp_path / "in"), item_rows=500, settle_s=0, timeout_s=0)
    folder = stream_train(config, stream)
    days = json.loads((folder / "days.json").read_text())["days"]
    assert [(d["day"], d["events"], d["trained"]) for d in days] == [
        ("2026-03-01", 240, 210), ("2026-03-02", 240, 240), ("2026-03-03", 240, 240),
    ]  # fmt: skip
    assert [day.get("targets") for day in days] == [None, 30, 30]
    arrive(4)
    monkeypatch.setattr(StreamSource, "sleep", lambda *_: pytest.fail("nothing to wait for"))
    days = json.loads((stream_train(config, stream) / "days.json").read_text())["days"]
    assert [day["day"] for day in days] == [f"2026-03-0{n}" for n in (1, 2, 3, 4)]
    assert len(final_state(folder).tensors()["model.table.weight"]) == 501
    capsys.readouterr()
    recommender = hstu.load(folder)
    asked = recommender.recommend(history=["item 3", "item 4"], k=1)
    assert [event.item for event in asked.history] == [item_row("item 3"), item_row("item 4")]
    with pytest.raises(UserError, match="retrieval: .*2026-03-04 holds items by a hash of their raw ids"):
        TwoStage(recommender, Mock())
    assert recommender.recommend("u1").history[-1].time // 86_400 == at("2026-03-04", 0) // 86_400
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["hstu-recommend", f"run={folder}", "user=u1"])
        recommend.main()
        patch.setattr("sys.argv", ["hstu-evaluate", f"run={folder}", "eval.bootstrap=0"])
        evaluate.main()
    shown = capsys.readouterr().out
    assert "histories up to 2026-03-04; an item is shown as the row of 500 that its raw id is hashed to" in shown
    assert f"a stream: all of {folder}/days/2026-03-04 was trained on, these events too" in shown


@pytest.mark.parametrize(
    ("changes", "stream", "message"),
    [
        ({"optim": OptimConfig(schedule="cosine")}, {}, "optim.schedule='cosine': expected constant with hstu-stream"),
        ({"run_reader": "stream"}, {}, "run.reader='stream': expected draw with hstu-stream"),
        ({}, {"watch": "folder"}, "stream.watch='folder': expected null, or data=log"),
        ({"data": DataConfig(source="log", dedup="last")}, {"watch": "x"}, "data.dedup='last': expected 'none' with"),
        ({"data": DataConfig(source="log", items_file="x")}, {"watch": "x"}, "data.items_file='x': expected None with"),
    ],
    ids=["schedule", "reader", "watch", "dedup", "items"],
)
def test_what_a_stream_does_not_take(
    tmp_path: Path, changes: dict[str, Any], stream: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        stream_train(stream_config(tmp_path, **changes), StreamConfig(**stream))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"day_s": 0}, "stream.day_s=0: expected >= 1"),
        ({"lr_decay": 1.5}, r"stream.lr_decay=1.5: expected in \(0, 1\]"),
        ({"watch": "x", "day_s": 3600}, "stream.day_s=3600: expected 86400 with stream.watch"),
        ({"days": 0}, "stream.days=0: expected >= 1 or null"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StreamConfig(**values)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {}
    monkeypatch.setattr(module, "stream_train", lambda config, stream, **_: given.update(config=config, stream=stream))
    monkeypatch.setattr("sys.argv", ["hstu-stream", "experiment=ml-1m/hstu", "stream.day_s=3600", "seed=3"])
    assert module.main() == 0
    assert given["stream"].day_s == 3600 and given["config"].seed == 3 and given["config"].data.name == "ml-1m"
    monkeypatch.setattr("sys.argv", ["hstu-stream", "stream.day_s=0"])
    with pytest.raises(SystemExit):
        module.main()
    assert capsys.readouterr().err == "error: stream.day_s=0: expected >= 1\n"


def test_trainer_hooks_are_the_trainers_own() -> None:
    """What the stream overrides exists in the trainer, so that a renamed method cannot be missed."""
    for name in ("_make_problem", "_make_optimizers", "_rate", "_epoch", "_end_epoch", "_validate_weights"):
        assert name in vars(Trainer) and name in vars(StreamTrainer)
