"""Baselines of predicted actions: rates by hand, history against a loop, no leak of labels, learned ones, real data."""

import logging
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from hstu import ranking_baselines as rb
from hstu import ranking_metrics as rm
from hstu.baselines import training_rows
from hstu.config_ranking import FeatureConfig, RankingConfig, TaskConfig
from hstu.data.ranking import RankingData
from hstu.data.splits import make_event_split
from hstu.data.store import write_store
from hstu.errors import UserError

CLICK = {"click": TaskConfig("click")}
FEATURES = {
    "user_features": {"age": FeatureConfig(kind="numeric")},
    "item_features": {"genres": FeatureConfig(separator="|"), "maker": FeatureConfig()},
    "event_features": {"tab": FeatureConfig()},
}


def make_data(folder, offsets, items, columns, tasks=CLICK, times=None, attributes=None, **config):
    store = write_store(
        folder, offsets=np.array(offsets), item_ids=np.array(items), meta={},
        timestamps=np.arange(len(items)) if times is None else times,
        columns={name: np.asarray(c) for name, c in columns.items()}, **(attributes or {}),
    )  # fmt: skip
    return RankingData(store, RankingConfig(tasks=dict(tasks), **config))


@pytest.fixture
def tiny(tmp_path):
    """user 0: items 1 2 1 | 2      user 1: 1 2 | 1      user 2: | 2 1, the targets behind the bar.
    clicks          1 0 1 | 1              0 1 | 0              | 1 0
    Training clicks: 3 of 5; item 1: 2 of 3; item 2: 1 of 2.
    """
    click = np.array([1, 0, 1, 1, 0, 1, 0, 1, 0], np.float32)
    return make_data(tmp_path / "s", [0, 4, 7, 9], [1, 2, 1, 2, 1, 2, 1, 2, 1], {"click": click})


TINY_TRAIN, TINY_TARGETS = [0, 1, 2, 4, 5], [3, 6, 7, 8]


def odds(rate):
    return rate / (1 - rate)


def test_rates_by_hand(tiny, monkeypatch):
    monkeypatch.setattr(rb, "credibility", lambda values, groups: 2.0)  # the global rate, 3/5, counts as two events
    got = rb.rank_baselines(tiny, TINY_TRAIN, TINY_TARGETS, rb.RATES)
    assert list(got) == ["constant rate", "item rate", "user x item rates"]
    assert got["constant rate"]["click"] == pytest.approx([3 / 5] * 4)
    one, two = (2 + 6 / 5) / 5, (1 + 6 / 5) / 4
    assert got["item rate"]["click"] == pytest.approx([two, one, two, one])
    # Before their targets: user 0 clicked 2 of 3, user 1 1 of 2, user 2 nothing yet, then 1 of 1.
    users = [(2 + 6 / 5) / 5, (1 + 6 / 5) / 4, 3 / 5, (1 + 6 / 5) / 3]
    joint = [odds(i) * odds(u) / odds(3 / 5) for i, u in zip([two, one, two, one], users, strict=True)]
    assert got["user x item rates"]["click"] == pytest.approx([o / (1 + o) for o in joint])


def test_missing_training_labels_are_not_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(rb, "credibility", lambda values, groups: 2.0)
    click = np.array([1, math.nan, 0, 1], np.float32)
    data = make_data(tmp_path / "s", [0, 3, 4], [1, 1, 2, 1], {"click": click})
    got = rb.rank_baselines(data, [0, 1, 2], [3], rb.RATES)
    assert got["constant rate"]["click"] == pytest.approx([1 / 2])
    assert got["item rate"]["click"] == pytest.approx([(1 + 1) / 3])


def test_levels_and_values_by_hand(tmp_path, monkeypatch):
    """Two stars twice and five stars once on item 1, one star on item 2; watched 10, 20, 30 and 60 s."""
    monkeypatch.setattr(rb, "credibility", lambda values, groups: 1.0)
    columns = {"stars": np.array([2, 5, 2, 1, 5], np.float32), "watch": np.array([10, 20, 30, 60, 0], np.float32)}
    tasks = {"stars": TaskConfig("stars", "ordinal", levels=[1, 2, 5]), "watch": TaskConfig("watch", "regression")}
    data = make_data(tmp_path / "s", [0, 2, 5], [1, 1, 1, 2, 1], columns, tasks)
    got = rb.rank_baselines(data, [0, 1, 2, 3], [4], rb.RATES)
    assert got["constant rate"]["stars"] == pytest.approx(np.array([[1 / 4, 2 / 4, 1 / 4]]))
    item = [(0 + 1 / 4) / 4, (2 + 2 / 4) / 4, (1 + 1 / 4) / 4]
    assert got["item rate"]["stars"] == pytest.approx(np.array([item]))
    user = [(1 + 1 / 4) / 3, (1 + 2 / 4) / 3, (0 + 1 / 4) / 3]
    joint = np.array([i * u / c for i, u, c in zip(item, user, [1 / 4, 2 / 4, 1 / 4], strict=True)])
    assert got["user x item rates"]["stars"] == pytest.approx(joint[None] / joint.sum())
    assert got["constant rate"]["watch"] == pytest.approx([30])
    assert got["item rate"]["watch"] == pytest.approx([(60 + 30) / 4])
    assert got["user x item rates"]["watch"] == pytest.approx([(60 + 30) / 4 + (90 + 30) / 3 - 30])


def test_credibility_by_hand(monkeypatch):
    """Groups (3 1), (0 0), (3 2): within (2 + 0 + 1/2) / 3 = 5/6, between, round 3/2, 2 (1/4 + 9/4 + 1) / 2 = 7/2;
    two events a group: spread (7/2 - 5/6) / 2 = 4/3; below one event, so one."""
    assert rb.credibility(np.array([3.0, 1, 0, 0, 3, 2]), np.array([0, 0, 5, 5, 7, 7])) == 1
    monkeypatch.setattr(rb, "MIN_STRENGTH", 0.0)
    assert rb.credibility(np.array([3.0, 1, 0, 0, 3, 2]), np.array([0, 0, 5, 5, 7, 7])) == pytest.approx(5 / 8)


def test_credibility_of_equal_groups_leaves_only_the_global_rate():
    assert rb.credibility(np.tile([0.0, 1], 10), np.repeat(np.arange(10), 2)) == rb.MAX_STRENGTH
    assert rb.credibility(np.array([1.0, 0, 1]), np.arange(3)) == rb.MAX_STRENGTH  # one event each: nothing to tell
    assert rb.credibility(np.array([1.0, 1, 0, 0]), np.array([0, 0, 1, 1])) == rb.MIN_STRENGTH  # the group decides


def test_credibility_recovers_the_ratio_of_variances():
    """Group means of variance 1/4 under noise of variance 1: the global mean is worth 4 events."""
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 3000, 60_000)
    values = 0.5 * rng.normal(size=3000)[groups] + rng.normal(size=60_000)
    assert rb.credibility(values, groups) == pytest.approx(4, rel=0.1)


# A random log with effects of users, items, genres and tabs; ties in time, missing labels


def random_log(folder, users=60, items=300, seed=0, clicks=None):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 40, users)
    events = int(lengths.sum())
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    user = np.repeat(np.arange(users), lengths)
    item = 1 + (items * rng.random(events) ** 2).astype(np.int64)
    times = np.sort(rng.integers(0, 300, events))[np.argsort(np.argsort(rng.random(events), kind="stable"))]
    times = times[np.lexsort((times, user))] * 600
    tab = rng.integers(1, 4, events).astype(np.int32)
    logit = 1.5 * rng.normal(size=users)[user] + 1.5 * rng.normal(size=items + 1)[item] + 1.0 * (tab == 2) - 0.5
    click = (rng.random(events) < 1 / (1 + np.exp(-logit))).astype(np.float32)
    click[rng.random(events) < 0.1] = math.nan
    stars = np.clip(np.round(2 + logit), 1, 4).astype(np.float32)
    watch = (10 + 5 * logit + rng.normal(size=events)).astype(np.float32)
    genres = np.array(["drama|war", "", "comedy", "war"])[rng.integers(0, 4, items)]
    makers = np.array([f"m{i}" for i in range(items)])
    if clicks is not None:
        click = clicks
    tasks = CLICK | {
        "stars": TaskConfig("stars", "ordinal", levels=[1, 2, 3, 4, 5]),
        "watch": TaskConfig("watch", "regression"),
    }
    data = make_data(
        folder, offsets, item, {"click": click, "stars": stars, "watch": watch, "tab": tab}, tasks, times,
        {"item_attributes": {"genres": genres, "maker": makers}, "num_items": items,
         "user_attributes": {"age": rng.normal(size=users).astype(np.float32)}}, **FEATURES,
    )  # fmt: skip
    late = times >= np.quantile(times, 0.75)
    return data, np.flatnonzero(~late), np.flatnonzero(late)


def test_history_equals_a_loop_over_earlier_events(tmp_path):
    data, train, target = random_log(tmp_path / "s", users=25)
    rows = np.concatenate([train[::-1], target])
    got = rb._Table(data, train, rows).numbers
    store, label = data.store, data.labels["click"]
    user_of = np.repeat(np.arange(store.num_users), np.diff(store.offsets))
    value, known = np.nan_to_num(label), ~np.isnan(label)
    mean = label[train][known[train]].mean(dtype=np.float64)
    labelled = train[known[train]]
    strengths = {"user": rb.credibility(value[labelled], user_of[labelled]),
                 "item": rb.credibility(value[labelled], store.item_ids[labelled])}  # fmt: skip
    strengths["user recent"] = strengths["user"]
    for at, row in enumerate(rows):
        mine = np.arange(store.offsets[user_of[row]], row)
        same_item = train[(store.item_ids[train] == store.item_ids[row])]
        same_item = same_item[store.timestamps[same_item] < store.timestamps[row]]  # strictly before
        assert got["user events"][at] == pytest.approx(np.log1p(len(mine)))
        assert got["item.id events"][at] == pytest.approx(np.log1p(len(same_item)))
        gap = store.timestamps[row] - store.timestamps[row - 1] if len(mine) else math.nan
        assert got["user gap"][at] == pytest.approx(np.log1p(gap), nan_ok=True)
        before = {"user": mine, "user recent": mine[-rb.RECENT :], "item": same_item}
        for name, earlier in before.items():
            sums, count = value[earlier].sum(dtype=np.float64), known[earlier].sum()
            rate = (sums + strengths[name] * mean) / (count + strengths[name])
            column = got["item.id click" if name == "item" else f"{name} click"]
            assert column[at] == pytest.approx(math.log(rate / (1 - rate)), rel=1e-6), name
    # Makers are one to an item, and more than trees take as categories: their past is the item's.
    assert np.array_equal(got["item.maker click"], got["item.id click"])
    assert "item.genres click" not in got


@pytest.mark.parametrize("shift", ["target", "training"])
def test_a_label_changes_no_prediction_of_its_own_or_of_an_earlier_row(tmp_path, shift):
    """Changed test labels of a user reach the later test rows of that user and nothing else. A changed training
    label reaches the history of no row before it."""
    pytest.importorskip("sklearn")
    data, train, target = random_log(tmp_path / "a")
    offsets = data.store.offsets
    user = lambda rows: np.searchsorted(offsets, rows, side="right") - 1  # noqa: E731
    pool = target if shift == "target" else train
    row = next(r for r in pool if not np.isnan(data.labels["click"][r]) and (user(pool) == user(r)).sum() > 3)
    clicks = data.labels["click"].copy()
    changed = pool[user(pool) == user(row)] if shift == "target" else row
    clicks[changed] = 1 - clicks[changed]
    other, _, _ = random_log(tmp_path / "b", clicks=clicks)
    if shift == "target":
        later = (user(target) == user(row)) & (target > changed[0])
        one, two = (rb.rank_baselines(d, train, target) for d in (data, other))
        for system in rb.NAMES:
            for task in data.labels:
                assert np.array_equal(one[system][task][~later], two[system][task][~later]), (system, task)
        moved = [s for s in rb.NAMES if not np.array_equal(one[s]["click"], two[s]["click"])]
        assert moved == ["user x item rates", "logistic regression", "boosted trees"]
    else:
        time = data.store.timestamps
        earlier = (time[train] <= time[row]) & ((user(train) != user(row)) | (train <= row))
        one, two = (rb.PastOf(items := d.store.item_ids[train], time, train, train, items) for d in (data, other))
        values = [np.nan_to_num(d.labels["click"]) for d in (data, other)]
        past = [p.sums(v[train]) for p, v in zip((one, two), values, strict=True)]
        mine = [rb.UserHistory(data, train).sums(v) for v in values]
        for first, second in (past, mine):
            assert np.array_equal(first[earlier], second[earlier]) and not np.array_equal(first, second)


def test_learned_baselines_beat_the_rates_that_do_not_see_the_tab(tmp_path):
    pytest.importorskip("sklearn")
    data, train, target = random_log(tmp_path / "s", users=250, items=100)
    found = rb.rank_baselines(data, train, target)
    users = np.zeros(len(target), np.int64)
    labels = {task: data.labels[task][target] for task in data.labels}
    click = {s: rm.evaluate("binary", labels["click"], p["click"], users)["metrics"] for s, p in found.items()}
    stars = {s: rm.evaluate("ordinal", labels["stars"], p["stars"], users, [1, 2, 3, 4, 5])["metrics"]
             for s, p in found.items()}  # fmt: skip
    watch = {s: rm.evaluate("regression", labels["watch"], p["watch"], users)["metrics"] for s, p in found.items()}
    for metrics, name in ((click, "ne"), (stars, "ne"), (watch, "rmse")):
        order = [metrics[s][name] for s in rb.RATES]
        assert order == sorted(order, reverse=True) and order[2] < 0.95 * order[0]
        assert all(metrics[s][name] < order[2] for s in rb.LEARNED), (name, metrics)
    assert click["constant rate"]["auc"] == 0.5


def test_level_and_class_that_training_never_saw(tmp_path):
    """No five stars anywhere; no click in the training part: certain for the learned ones, and still a number."""
    pytest.importorskip("sklearn")
    data, train, target = random_log(tmp_path / "a")
    clicks = data.labels["click"].copy()
    clicks[train] = 0
    data, train, target = random_log(tmp_path / "b", clicks=clicks)
    found = rb.rank_baselines(data, train, target)
    for system in rb.NAMES:
        stars = found[system]["stars"]
        assert stars.shape == (len(target), 5) and stars.sum(axis=1) == pytest.approx(1)
        assert stars[:, 4].max() < 1e-6 < stars[:, 3].min()
    for system in ("constant rate", "item rate", *rb.LEARNED):
        assert found[system]["click"].max() == 0, system
    got = rm.evaluate("binary", data.labels["click"][target], found["boosted trees"]["click"], target)
    assert math.isfinite(got["metrics"]["log_loss"])


def test_without_scikit_learn_the_rates_stay(tiny, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with caplog.at_level(logging.WARNING):
        assert tuple(rb.rank_baselines(tiny, TINY_TRAIN, TINY_TARGETS)) == rb.RATES
    (line,) = [r.getMessage() for r in caplog.records]
    assert line.startswith("without logistic regression and boosted trees: scikit-learn is not installed")
    with pytest.raises(UserError, match="'boosted trees' needs scikit-learn"):
        rb.rank_baselines(tiny, TINY_TRAIN, TINY_TARGETS, ["item rate", "boosted trees"])


def test_tiny_data_fits(tiny):
    pytest.importorskip("sklearn")
    found = rb.rank_baselines(tiny, TINY_TRAIN, TINY_TARGETS)
    assert all(((p["click"] >= 0) & (p["click"] <= 1)).all() for p in found.values())


def test_no_target_is_no_prediction(tiny):
    pytest.importorskip("sklearn")
    assert {len(p["click"]) for p in rb.rank_baselines(tiny, TINY_TRAIN, []).values()} == {0}


@pytest.mark.parametrize(
    ("train", "target", "names", "error", "message"),
    [
        ([0, 1], [1, 2], None, ValueError, "row 1 is in train_rows and in target_rows"),
        ([0, 1], [2], ["popularity"], ValueError, "names has 'popularity': expected some of constant rate"),
        ([], [2], None, UserError, "ranking.tasks.click: none of the 0 training events has a label"),
    ],
    ids=["a row in both", "unknown name", "no training event"],
)
def test_bad_arguments(tiny, train, target, names, error, message):
    with pytest.raises(error, match=message):
        rb.rank_baselines(tiny, train, target, names)


@pytest.mark.slow
def test_real_kuairand(tmp_path):
    """Three last days of KuaiRand-Pure: who watched what before tells a click far better than the rate does."""
    pytest.importorskip("sklearn")
    folder = Path(os.environ.get("HSTU_DATA_DIR", "")) / "kuairand-pure"
    if not os.environ.get("HSTU_DATA_DIR") or not folder.is_dir():
        pytest.skip("HSTU_DATA_DIR does not point to a folder with kuairand-pure")
    from hstu.config import DataConfig
    from hstu.prepare import prepare

    config = DataConfig(name="kuairand-pure", source="kuairand", raw=str(folder), root=str(tmp_path),
                        split="global-time", split_time="2022-05-06T00:00:00+08:00")  # fmt: skip
    store = prepare(config, quiet=True)
    config = RankingConfig(
        tasks={"click": TaskConfig("is_click")}, utc_offset_hours=8, event_features={"tab": FeatureConfig()},
        item_features={"author_id": FeatureConfig(min_count=2), "tag": FeatureConfig(separator="|")},
    )  # fmt: skip
    data, split = RankingData(store, config), make_event_split(store, "reference")
    train, _ = training_rows(store, split.train_end)
    found = rb.rank_baselines(data, train, split.test.rows, [*rb.RATES, "logistic regression"])
    label = data.labels["click"][split.test.rows]
    got = {s: rm.evaluate("binary", label, p["click"], split.test.users)["metrics"] for s, p in found.items()}
    assert got["constant rate"]["ne"] == pytest.approx(1, abs=0.02) and got["constant rate"]["auc"] == 0.5
    auc = [got[s]["auc"] for s in found]
    assert auc == sorted(auc) and auc[-1] > 0.72
    assert got["logistic regression"]["ne"] < 0.88
