"""Ranking on files that arrive: what of their columns is kept, how features are coded, and the stream over them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from hstu import stream_problem
from hstu.config import ColumnsConfig, Config, DataConfig
from hstu.config_ranking import ActionConfig, FeatureConfig, RankingConfig, TaskConfig
from hstu.config_stream import StreamConfig
from hstu.data.days import RankingDayBatches, StoreDays
from hstu.data.hashing import hash_codes
from hstu.data.ranking import RankingData
from hstu.data.share import Ranks
from hstu.data.store import SequenceStore
from hstu.data.watch import WatchedDays
from hstu.errors import UserError
from hstu.prepare import prepare
from hstu.runs import load_run
from hstu.scoring import Scorer
from hstu.stream_train import stream_train
from hstu.two_stage import TwoStage
from tests.data.test_watch import Clock, at, put, source
from tests.ranking import config_of, ranking_config, rich_store

HEAD = "user,item,timestamp,click,watch_s,price,tab\n"
TAB_ROWS = 50
RANKING = RankingConfig(
    tasks={"click": TaskConfig("actions"), "watch": TaskConfig("watch_s", "regression", transform="log1p")},
    actions={"actions": ActionConfig(), "watch_s": ActionConfig("thresholds", thresholds=[10])},
    event_features={
        "tab": FeatureConfig(hash_rows=TAB_ROWS),
        "price": FeatureConfig(kind="numeric"),
        "hour_of_day": FeatureConfig(),
    },
)


def write(folder: Path, day: str, rows: list[tuple[Any, ...]]) -> None:
    """rows: user, item, seconds into the day, click, watch_s, price, tab."""
    text = "".join(f"{u},{i},{at(day, s)},{','.join(map(str, rest))}\n" for u, i, s, *rest in rows)
    put(folder / f"dt={day}" / "part-0.csv", text=HEAD + text)


def data_config(root: Path, **changes: Any) -> DataConfig:
    columns = ColumnsConfig(
        action="click", values=["watch_s", "price"], features=["tab"], optional=["watch_s", "price"]
    )
    return DataConfig(name="log", source="log", root=str(root / "root"), columns=columns, **changes)


@pytest.fixture
def two_days(tmp_path: Path) -> Path:
    first = [("ann", "a", 5, 1, 30, 2, "home"), ("ann", "b", 7, 0, "", 4, ""), ("bob", "a", 9, 0, 3, 6, 7)]
    second = [("ann", "c", 3, 1, 12, 10, "new"), ("bob", "b", 1, 0, 5, "", "home"), ("cid", "a", 2, 1, 50, 4, 7)]
    write(tmp_path / "in", "2026-03-01", first)
    write(tmp_path / "in", "2026-03-02", second)
    return tmp_path


def watched(root: Path) -> WatchedDays:
    return WatchedDays(source(root / "in", Clock()), data_config(root), root / "days", 4, 1000, RANKING)


def test_columns_go_into_the_store_of_the_day_with_the_history(two_days: Path) -> None:
    day = watched(two_days).open(1)
    assert day is not None
    store = day.store
    assert store.user_raw_ids.tolist() == ["ann", "bob", "cid"] and store.offsets.tolist() == [0, 3, 5, 6]
    assert sorted(store.columns) == ["price", "tab", "watch_s"] and store.actions is not None
    assert store.actions.tolist() == [1, 0, 1, 0, 0, 1]
    np.testing.assert_array_equal(store.columns["watch_s"], np.array([30, np.nan, 12, 3, 5, 50], np.float32))
    home, seven, new = hash_codes(np.array(["home", "7", "new"]), TAB_ROWS).tolist()
    assert store.columns["tab"].tolist() == [home, 0, new, seven, home, seven] and len({home, seven, new}) == 3
    assert day.first.tolist() == [2, 4, 5]


def test_scales_of_numbers_are_those_of_the_first_day(two_days: Path) -> None:
    """Prices 2, 4, 6 on the first day: mean 4, deviation sqrt(8 / 3)."""
    days = watched(two_days)
    for index, prices in ((0, [2, 4, 6]), (1, [2, 4, 10, 6, np.nan, 4])):
        day = days.open(index)
        assert day is not None
        data = RankingData(day.store, RANKING)
        found = data.event_values(np.arange(day.store.num_events))["price"]
        np.testing.assert_allclose(found, (np.array(prices) - 4) / np.sqrt(8 / 3), rtol=1e-6)
        assert data.token_feature_sizes == {"event.tab": TAB_ROWS + 1, "event.hour_of_day": 25}


def test_buckets_are_those_of_the_first_day(two_days: Path) -> None:
    buckets = {"price": FeatureConfig(kind="buckets", num_buckets=2)}
    ranking = dataclasses.replace(RANKING, event_features=buckets)
    days = WatchedDays(source(two_days / "in", Clock()), data_config(two_days), two_days / "days", 4, 1000, ranking)
    day = days.open(1)
    assert day is not None
    found = RankingData(day.store, ranking).event_values(np.arange(6))["price"]
    assert found.tolist() == [1, 2, 2, 2, 0, 2], "below 4; from 4 on; missing"


def test_a_prepared_store_codes_the_same(two_days: Path) -> None:
    """But for the scales, which are those of its whole log."""
    store = prepare(data_config(two_days, raw=str(two_days / "in"), protocol="stable"), quiet=True)
    day = watched(two_days).open(1)
    assert day is not None
    assert store.timestamps.tolist() == day.store.timestamps.tolist(), "all events are in the histories"
    rows = np.arange(6)
    one, two = RankingData(store, RANKING), RankingData(day.store, RANKING)
    assert np.array_equal(one.action_bits(rows), two.action_bits(rows))
    assert np.array_equal(one.event_values(rows)["tab"], two.event_values(rows)["tab"])
    for task in RANKING.tasks:
        assert np.array_equal(one.label(task, rows), two.label(task, rows), equal_nan=True)


def test_actions_that_are_names_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "in/dt=2026-03-01/part-0.csv", text=HEAD + f"ann,a,{at('2026-03-01', 1)},view,1,1,x\n")
    with pytest.raises(UserError, match="data.columns.action=click: 2026-03-01 holds names"):
        watched(tmp_path)


def test_columns_named_as_what_every_event_has(tmp_path: Path) -> None:
    for day, rows in (("2026-03-01", "ann,a,{},2.5,home\n"), ("2026-03-02", "ann,b,{},7,home\n")):
        text = "who,what,at,time,row\n" + rows.format(at(day, 5))
        put(tmp_path / "in" / f"dt={day}" / "part-0.csv", text=text)
    columns = ColumnsConfig(user="who", item="what", time="at", values=["time"], features=["row"])
    features = {"row": FeatureConfig(hash_rows=9)}
    ranking = RankingConfig(tasks={"watched": TaskConfig("time", "regression")}, actions={}, event_features=features)
    config = dataclasses.replace(data_config(tmp_path), columns=columns)
    day = WatchedDays(source(tmp_path / "in", Clock()), config, tmp_path / "days", 4, 1000, ranking).open(1)
    assert day is not None and day.store.columns["time"].tolist() == [2.5, 7]
    assert day.store.timestamps.tolist() == [at("2026-03-01", 5), at("2026-03-02", 5)]


# The stream


def arrive(folder: Path, number: int) -> None:
    """Half of 20 users click on what has an even price, the others on the rest; ids of tabs are new every day."""
    rng = np.random.default_rng(number)
    rows = []
    for user in range(20):
        for k in range(8):
            item, price = int(rng.integers(12)), int(rng.integers(4))
            click = int((user + price) % 2 == 0)
            rows.append((f"u{user}", f"i{item}", 100 * k + user, click, 20 * click, price, f"tab {number}"))
    write(folder, f"2026-03-0{number}", rows)


def watch_config(root: Path, **ranking: Any) -> Config:
    values = {"run_dir": str(root / "run"), "run_select_metric": "click/ne", "run_batch_users": 8}
    return config_of(dataclasses.replace(RANKING, **ranking), data=data_config(root), max_len=12, **values)


def test_a_watched_folder(tmp_path: Path) -> None:
    """Three days; the second command finds a fourth. What is left is a model that scores."""
    for number in (1, 2, 3):
        arrive(tmp_path / "in", number)
    config = watch_config(tmp_path, calibrate=True)
    stream = StreamConfig(watch=str(tmp_path / "in"), item_rows=200, settle_s=0, timeout_s=0)
    folder = stream_train(config, stream)
    arrive(tmp_path / "in", 4)
    stream_train(config, stream)
    days = json.loads((folder / "days.json").read_text())["days"]
    found = [(d["day"], d["trained"], d.get("targets"), d.get("cold")) for d in days]
    assert found == [("2026-03-01", 160, None, None), *((f"2026-03-0{n}", 160, 160, 0.0) for n in (2, 3, 4))]
    assert all(0 < day["click/ne"] < 3 and "click/ne" in day["baselines"]["rate so far"] for day in days[1:])
    assert all(sum(day["labels"]["click"]) == day["labels"]["watch"][0] == 160 for day in days)
    result = json.loads((folder / "result.json").read_text())
    assert result["targets"] == 480 and "all_days" not in result
    assert not (folder / "evaluation.json").exists() and not (folder / "predictions.npy").exists()
    _, store, _ = load_run(folder)
    assert store.path == folder / "days" / "2026-03-04"
    scorer = Scorer.load(folder)
    scores = scorer.score(scorer.encode(scorer.history(user=0)), np.arange(1, 4))
    assert scores["click"].shape == (3,)


def test_days_of_a_start_that_failed_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose codes, columns and histories may be of other options."""
    arrive(tmp_path / "in", 1)
    stream = StreamConfig(watch=str(tmp_path / "in"), item_rows=200, settle_s=0, timeout_s=0)
    with monkeypatch.context() as patch:
        patch.setattr(stream_problem, "RankingDayBatches", Mock(side_effect=UserError("wrong")))
        with pytest.raises(UserError, match="wrong"):
            stream_train(watch_config(tmp_path), stream)
    features = {"tab": FeatureConfig(hash_rows=9)}
    config = watch_config(tmp_path, event_features=features)
    run = dataclasses.replace(config.run, select_metric="ndcg@10")  # nothing is selected
    folder = stream_train(dataclasses.replace(config, run=run), dataclasses.replace(stream, item_rows=300))
    store = SequenceStore.open(folder / "days" / "2026-03-01")
    assert store.meta["hashed"] == {"tab": 9} and store.num_items == 300 and sorted(store.columns) == ["tab", "watch_s"]


def test_a_day_whose_events_lie_on_others_is_passed_over(tmp_path: Path) -> None:
    for number in (1, 2, 4):
        arrive(tmp_path / "in", number)
    write(tmp_path / "in", "2026-03-03", [("u1", "i1", 90_000, 1, 20, 3, "tab")])
    stream = StreamConfig(watch=str(tmp_path / "in"), item_rows=200, settle_s=0, timeout_s=0)
    folder = stream_train(watch_config(tmp_path), stream)
    days = json.loads((folder / "days.json").read_text())["days"]
    assert [(day["trained"], day.get("targets")) for day in days] == [(160, None), (160, 160), (0, None), (160, 160)]


def test_two_stages_refuse_hashed_items(two_days: Path) -> None:
    day = watched(two_days).open(1)
    assert day is not None
    retrieval, ranking = Mock(), Mock()
    ranking.data.store, retrieval.store.meta = day.store, {}
    with pytest.raises(UserError, match="ranking: .*2026-03-02 holds items by a hash of their raw ids"):
        TwoStage(retrieval, ranking)


@pytest.mark.parametrize("form", ["interleaved", "fused"])
def test_a_sharded_log_is_trained_on_once_day_by_day(tmp_path: Path, form: str) -> None:
    for number in (1, 2):
        arrive(tmp_path / "in", number)
    store = prepare(data_config(tmp_path, raw=str(tmp_path / "in"), shards=3), quiet=True)
    data = RankingDayBatches(StoreDays(store, 86_400), watch_config(tmp_path, form=form))
    steps = [(epoch, step) for epoch in (0, 1) for step in range(data.num_steps(epoch))]
    rows = np.concatenate([data.share(epoch, step, Ranks()).batch.rows for epoch, step in steps])
    assert np.array_equal(np.sort(rows), np.arange(320))


@pytest.mark.parametrize(
    ("ranking", "data", "message"),
    [
        ({"user_features": {"age": FeatureConfig()}}, {}, "ranking.user_features=.'age'.: expected none with stream.w"),
        ({"item_features": {"genre": FeatureConfig()}}, {}, "ranking.item_features=.'genre'.: expected none"),
        ({"event_features": {"tab": FeatureConfig()}}, {}, "event_features.tab.hash_rows=None: expected a number with"),
        ({}, {"features": []}, r"data.columns.features=\[\]: expected tab among them"),
        ({}, {"values": ["price"], "optional": []}, r"data.columns.values=\['price'\]: expected watch_s among them"),
        ({}, {"action": None}, "data.columns.action=None: expected a column"),
    ],
    ids=["user attributes", "item attributes", "no hash", "not read", "label not read", "no action"],
)
def test_what_arriving_files_cannot_tell(
    tmp_path: Path, ranking: dict[str, Any], data: dict[str, Any], message: str
) -> None:  # fmt: skip
    config = watch_config(tmp_path, **ranking)
    columns = dataclasses.replace(config.data.columns, **data)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, columns=columns))
    with pytest.raises(UserError, match=message):
        stream_train(config, StreamConfig(watch=str(tmp_path)))


# Features by a hash, in any store


def hashed(**changes: Any) -> FeatureConfig:
    return FeatureConfig(hash_rows=1000, **changes)


def test_features_by_a_hash(tmp_path: Path) -> None:
    store = rich_store(tmp_path / "store")
    features = {"item_features": {"genres": hashed(separator="|")}, "event_features": {"tab": hashed()}}
    data = RankingData(store, ranking_config(user_features={"gender": hashed()}, **features))
    coded, _ = data.prefix_features(np.arange(5))
    assert np.array_equal(coded["gender"][0], hash_codes(np.asarray(store.user_attribute("gender")), 1000))
    rows = np.arange(store.num_events)
    tabs = np.array(["", "a", "b", "c"])[store.columns["tab"]]
    assert np.array_equal(data.event_values(rows)["tab"], hash_codes(tabs, 1000))
    (values, lengths), *_ = data.token_features(np.arange(1, 21), np.zeros(20, int), {})[0].values()
    cells = [cell.split("|") for cell in np.asarray(store.item_attribute("genres")).tolist()]
    assert lengths.tolist() == [len(cell) for cell in cells]
    assert np.array_equal(values, hash_codes(np.array([part for cell in cells for part in cell]), 1000))
    assert set(data.token_feature_sizes.values()) | set(data.user_feature_sizes.values()) == {1001}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hash_rows": 0}, "hash_rows=0: expected >= 1"),
        ({"hash_rows": 9, "kind": "numeric"}, "hash_rows=9: expected null with kind=numeric"),
        ({"hash_rows": 9, "min_count": 2}, "min_count=2: expected 1 with hash_rows"),
    ],
    ids=["none", "numbers", "rare"],
)
def test_hash_options(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FeatureConfig(**values)


def test_floating_point_numbers_have_no_hash(tmp_path: Path) -> None:
    store: SequenceStore = rich_store(tmp_path / "store")
    with pytest.raises(UserError, match=r"user_features.age.hash_rows=1000: values of type float32 cannot be hashed"):
        RankingData(store, ranking_config(user_features={"age": hashed()}))
