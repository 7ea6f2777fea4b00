"""Ranking data: labels, masks, action bits, sequences that predict every event once, batches, progressive order."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from hstu.config_ranking import ActionConfig, FeatureConfig, RankingConfig, TaskConfig
from hstu.data.ranking import RankingData, cut_fused, cut_interleaved
from hstu.data.ranking_batches import ProgressiveBatches, RankingBatches, ranking_eval_batches, target_sequences
from hstu.data.splits import make_event_split, make_split
from hstu.data.store import write_store
from hstu.errors import UserError
from tests.ranking import config_of, ranking_config, rich_store

NAN = float("nan")
LENGTHS = (5, 1, 9, 0, 3, 23, 14)


def column_data(path, tasks=None, actions=None, **columns):
    """Data of one user with one event for each value."""
    size = len(next(iter(columns.values())))
    store = write_store(
        path / "s", offsets=np.array([0, size]), item_ids=np.ones(size, int), timestamps=np.arange(size), meta={},
        columns={n: np.asarray(c, np.float32) for n, c in columns.items()},
    )  # fmt: skip
    return RankingData(store, RankingConfig(tasks=tasks or {"t": TaskConfig("x", threshold=0)}, actions=actions or {}))


# Labels and actions


@pytest.mark.parametrize(
    "task, values, expected",
    [
        (TaskConfig("x"), [0, 1, NAN], [0, 1, NAN]),
        (TaskConfig("x", threshold=0.7), [0.69, 0.7, NAN, 3], [0, 1, NAN, 1]),
        (TaskConfig("x", kind="multiclass", levels=[-1, 0.1, 5]), [5, -1, NAN, 0.1], [2, 0, NAN, 1]),
        (TaskConfig("x", kind="ordinal", levels=[1, 2]), [2, 1], [1, 0]),
        (TaskConfig("x", kind="regression"), [-3.5, NAN, 1e6], [-3.5, NAN, 1e6]),
        (TaskConfig("x", kind="regression", transform="log1p"), [0, 9], [0, 9]),
    ],
    ids=["binary", "threshold", "multiclass", "ordinal", "regression", "log1p"],
)
def test_labels(tmp_path, task, values, expected):
    data = column_data(tmp_path, {"t": task}, x=values)
    label = data.label("t", np.arange(len(values)))
    assert label.dtype == np.float32
    np.testing.assert_array_equal(label, np.array(expected, np.float32))
    np.testing.assert_array_equal(data.labels["t"], label)
    np.testing.assert_array_equal(data.label("t", np.array([1])), label[1:2])


def test_a_mask_hides_labels_and_what_they_hold(tmp_path):
    # Where the mask is 0 or missing the value may be anything, such as -1 for "not asked".
    tasks = {"t": TaskConfig("x", mask_column="asked"), "u": TaskConfig("y", mask_column="asked")}
    data = column_data(tmp_path, tasks, x=[1, 0, -1, -1], y=[1, 1, 1, 1], asked=[1, 1, 0, NAN])
    np.testing.assert_array_equal(data.labels["t"], np.array([1, 0, NAN, NAN], np.float32))
    np.testing.assert_array_equal(data.labels["u"], np.array([1, 1, NAN, NAN], np.float32))
    assert data.store.columns["x"][2] == -1


@pytest.mark.parametrize(
    "task, values, message",
    [
        (TaskConfig("x"), [0, 1, 4], r"tasks\.t: event 2 has the value 4, expected one of 0, 1; set its threshold"),
        (
            TaskConfig("x", kind="ordinal", levels=[1, 2]),
            [1, 3],
            r"event 1 has the value 3, expected one of 1, 2; na",
        ),
        (TaskConfig("x", kind="regression"), [1, np.inf], r"event 1 has the value inf, expected a finite value$"),
        (TaskConfig("x", kind="regression", transform="log1p"), [1, -1], r"event 1 has the value -1, .*above -1 for"),
        (TaskConfig("z"), [1], r"tasks\.t\.column=z: .* has no such column; it has x"),
        (TaskConfig("x", mask_column="z"), [1], r"tasks\.t\.mask_column=z: .* has no such column"),
    ],
    ids=["binary", "ordinal", "infinite", "log1p", "no column", "no mask"],
)
def test_wrong_labels_name_the_event(tmp_path, task, values, message):
    with pytest.raises(UserError, match=message):
        column_data(tmp_path, {"t": task}, x=values)


def test_action_bits(tmp_path):
    actions = {
        "click": ActionConfig(),
        "rating": ActionConfig("levels", levels=[1, 2, 5]),
        "watch": ActionConfig("thresholds", thresholds=[3, 7]),
    }
    data = column_data(tmp_path, actions=actions, x=[0] * 4, click=[0, 1, NAN, 1], rating=[5, NAN, 1, 2],
                       watch=[2.9, 3, 7, NAN])  # fmt: skip
    bits = data.action_bits(np.arange(4))
    assert data.num_action_bits == bits.shape[1] == 3 + 4 + 4
    # no yes missing | 1 2 5 missing | present >=3 >=7 missing
    assert bits.astype(int).tolist() == [
        [1, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0],
        [0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1],
    ]
    assert column_data(tmp_path / "none", x=[0]).action_bits(np.arange(1)).shape == (1, 0)


@pytest.mark.parametrize(
    "action, values, message",
    [
        (ActionConfig(), [1, 2], r"actions\.x: event 1 has the value 2, expected one of 0, 1; use kind=levels"),
        (
            ActionConfig("levels", levels=[1, 2]),
            [7],
            r"actions\.x: event 0 has the value 7, expected one of 1, 2; na",
        ),
    ],
    ids=["binary", "levels"],
)
def test_unknown_actions_name_the_event(tmp_path, action, values, message):
    with pytest.raises(UserError, match=message):
        column_data(tmp_path, {"t": TaskConfig("x", threshold=1)}, {"x": action}, x=values)


def test_a_coded_column_is_no_label(tmp_path):
    store = rich_store(tmp_path / "s")
    with pytest.raises(UserError, match=r"tasks\.t\.column=tab: .*holds codes of a feature"):
        RankingData(store, RankingConfig(tasks={"t": TaskConfig("tab", threshold=1)}))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TaskConfig("x", levels=[1, 2]), r"tasks\.\*\.levels=\[1, 2\]: expected none with kind=binary"),
        (lambda: TaskConfig("x", kind="ordinal", levels=[2, 1]), "levels"),
        (lambda: TaskConfig("x", kind="regression", threshold=1), "threshold"),
        (lambda: TaskConfig("x", transform="log1p"), "transform"),
        (lambda: ActionConfig(levels=[1]), r"actions\.\*\.levels=\[1\]: expected none with kind=binary"),
        (lambda: RankingConfig(), "at least one task"),
        (lambda: RankingConfig(tasks={"a/b": TaskConfig("x")}), "a/b"),
        (
            lambda: RankingConfig(tasks={"t": TaskConfig("x")}, event_features={"x": FeatureConfig()}),
            "known after",
        ),
        (lambda: RankingConfig(tasks={"t": TaskConfig("x")}, utc_offset_hours=480), "utc_offset_hours=480"),
    ],
    ids=["levels", "order", "threshold", "transform", "action levels", "no task", "name", "label as feature", "offset"],
)
def test_options_that_do_nothing_or_harm_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_switches_of_ablations(tmp_path):
    store = rich_store(tmp_path / "s")
    data = RankingData(store, ranking_config(use_actions=False))
    assert data.num_action_bits == 0 and data.num_prefix == 2 and len(data.token_feature_sizes) == 4
    data = RankingData(store, ranking_config(use_features=False))
    assert data.num_action_bits == 11 and data.num_prefix == 0 and data.token_feature_sizes == {}


def test_priors(tmp_path):
    tasks = {
        "b": TaskConfig("x", threshold=2),
        "o": TaskConfig("x", kind="ordinal", levels=[0, 1, 2, 3]),
        "r": TaskConfig("y", kind="regression", transform="log1p"),
    }
    data = column_data(tmp_path, tasks, x=[0, 2, 3, 3, NAN, 1], y=[0, np.e - 1, NAN, NAN, 7, 100])
    found = data.priors(np.arange(5))
    assert found["b"] == [0.75] and found["o"] == [0.25, 0, 0.25, 0.5]
    values = np.log1p([0, np.e - 1, 7])
    assert found["r"] == pytest.approx([values.mean(), values.std()])
    with pytest.raises(UserError, match=r"tasks\.b: none of 1 training events has a label"):
        data.priors(np.array([4]))
    assert list(data.priors(np.array([4]), need_all=False)) == ["r"]


def test_nobody_has_every_feature_missing(tmp_path):
    store = rich_store(tmp_path / "s", user_attributes={"likes": np.array(["a|b|c", "a", "", "b", "c"]),
                                                        "age": np.arange(5, dtype=np.float32)})  # fmt: skip
    features = {"likes": FeatureConfig(separator="|"), "age": FeatureConfig(kind="numeric")}
    data = RankingData(store, ranking_config(user_features=features))
    coded, numbers = data.prefix_features(np.array([-1, 0, -1, 1]))
    assert [c.tolist() for c in coded["likes"]] == [[0, 1, 2, 3, 0, 1], [1, 3, 1, 1]]
    assert np.isnan(numbers[:, 0]).tolist() == [True, False, True, False]


# Sequences


def random_users(rng):
    counts = rng.integers(1, 60, 40)
    starts = np.cumsum(counts) - counts
    begins = starts + np.floor(rng.random(40) * counts).astype(np.int64)
    return np.arange(40), starts, begins, starts + counts


def predicted_rows(sequences):
    return np.concatenate([np.arange(a, b) for a, b in zip(sequences.split, sequences.stop, strict=True)])


@pytest.mark.parametrize("with_phases", [False, True], ids=["no phase", "phases"])
@pytest.mark.parametrize("form", ["interleaved", "fused"])
def test_every_event_is_predicted_once_within_the_limits(form, with_phases):
    rng = np.random.default_rng(3)
    for _ in range(60):
        users, starts, begins, ends = random_users(rng)
        max_len = int(rng.integers(1, 30))
        step = int(rng.integers(1, max_len + 1))
        phases = rng.integers(0, step, 40) if with_phases else None
        cut = cut_fused if form == "fused" else cut_interleaved
        found = cut(users, starts, begins, ends, max_len, step, phases)
        expected = np.concatenate([np.arange(a, b) for a, b in zip(begins, ends, strict=True)])
        np.testing.assert_array_equal(np.sort(predicted_rows(found)), expected)
        assert (found.split < found.stop).all() and (found.first <= found.split).all()
        assert (found.first >= starts[found.users]).all() and (found.stop <= ends[found.users]).all()
        if form == "fused":
            assert (found.stop - found.split <= step).all()
            longest = np.minimum(found.split - starts[found.users], max_len)  # history reaches back as far as it may
            np.testing.assert_array_equal(found.split - found.first, longest)
        else:
            length = found.stop - found.first
            assert (length <= max_len).all()
            full = (found.first == starts[found.users]) | (length == max_len)
            assert full.all()  # the context is as long as fits


def test_cuts_by_hand():
    one = (np.array([7]), np.array([10]), np.array([10]), np.array([20]))  # events 10 .. 19 of user 7
    whole = cut_interleaved(*one, 10, 5)
    assert (whole.users.tolist(), whole.first.tolist(), whole.split.tolist(), whole.stop.tolist()) == (
        [7], [10], [10], [20])  # fmt: skip
    parts = cut_interleaved(*one, 4, 2)
    assert list(zip(parts.first.tolist(), parts.split.tolist(), parts.stop.tolist(), strict=True)) == [
        (10, 10, 14), (12, 14, 16), (14, 16, 18), (16, 18, 20)]  # fmt: skip
    moved = cut_interleaved(*one, 4, 2, np.array([1]))
    assert list(zip(moved.first.tolist(), moved.split.tolist(), moved.stop.tolist(), strict=True)) == [
        (10, 10, 13), (11, 13, 15), (13, 15, 17), (15, 17, 19), (16, 19, 20)]  # fmt: skip
    late = (np.array([7]), np.array([10]), np.array([17]), np.array([20]))  # only 17, 18, 19 are predicted
    fused = cut_fused(*late, 4, 2)
    assert list(zip(fused.first.tolist(), fused.split.tolist(), fused.stop.tolist(), strict=True)) == [
        (13, 17, 19), (15, 19, 20)]  # fmt: skip
    context = cut_interleaved(*late, 4, 2)
    assert list(zip(context.first.tolist(), context.split.tolist(), context.stop.tolist(), strict=True)) == [
        (15, 17, 19), (16, 19, 20)]  # fmt: skip


# Batches


def train_batches(store, form, max_len=6, **changes):
    config = config_of(ranking_config(form), max_len, run_batch_users=4, **changes)
    return RankingBatches(RankingData(store, config.ranking), make_split(store, "reference"), config)


def equal_batches(a, b):
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else True
        for x, y in ((getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    )


@pytest.mark.parametrize("form", ["interleaved", "fused"])
def test_an_epoch_predicts_every_training_event_once_and_cuts_move(tmp_path, form):
    store = rich_store(tmp_path / "s", LENGTHS)
    data = train_batches(store, form)
    training = [np.arange(store.offsets[u], e) for u, e in zip(data.users, data.ends, strict=True)]
    cuts = []
    for epoch in range(3):
        batches = [data.batch(epoch, step) for step in range(data.num_steps(epoch))]
        rows = torch.cat([b.rows for b in batches])
        np.testing.assert_array_equal(np.sort(rows.numpy()), np.concatenate(training))
        cuts.append(sorted(tuple(b.offsets.diff().tolist()) for b in batches))
        for b in batches:
            assert len(b.users) <= 4 and b.max_len == int(b.offsets.diff().max())
            assert b.max_targets == int(b.num_targets.max()) and b.num_events == len(b.targets) == len(b.rows)
    assert cuts[0] != cuts[1]


@pytest.mark.parametrize("form", ["interleaved", "fused"])
def test_a_batch_is_a_function_of_seed_epoch_and_step(tmp_path, form):
    store = rich_store(tmp_path / "s", LENGTHS)
    first, second = train_batches(store, form), train_batches(store, form)
    everything = {(e, s): first.batch(e, s) for e in range(3) for s in range(first.num_steps(e))}
    for key in reversed(everything):  # in another order
        assert equal_batches(second.batch(*key), everything[key])
    other = train_batches(store, form, seed=1)
    assert not equal_batches(other.batch(0, 0), everything[0, 0])
    assert not equal_batches(first.batch(1, 0), everything[0, 0])


def test_a_batch_holds_the_columns_of_its_events(tmp_path):
    store = rich_store(tmp_path / "s", LENGTHS)
    data = train_batches(store, "interleaved")
    batch = data.batch(0, 1)
    for s, user in enumerate(batch.users.tolist()):
        at = slice(int(batch.offsets[s]), int(batch.offsets[s + 1]))
        mine = (batch.targets >= at.start) & (batch.targets < at.stop)
        last = int(batch.rows[mine][-1])
        rows = np.arange(last + 1 - (at.stop - at.start), last + 1)  # contiguous, up to the last predicted event
        assert rows[0] >= store.offsets[user]
        assert batch.item_ids[at].tolist() == store.item_ids[rows].tolist()
        assert batch.timestamps[at].tolist() == store.timestamps[rows].tolist()
        np.testing.assert_array_equal(batch.action_bits[at].numpy(), data.data.action_bits(rows))
        np.testing.assert_array_equal(batch.labels["rating"][mine], data.data.label("rating", batch.rows[mine].numpy()))
    tab = batch.item_features.keys.index("event.tab")
    start = sum(batch.item_features.counts[:tab])
    values = batch.item_features.values[start : start + batch.item_features.counts[tab]]
    everything = np.concatenate([np.arange(b - n, b) for n, b in zip(
        batch.offsets.diff().tolist(),
        [int(batch.rows[batch.targets < int(e)][-1]) + 1 for e in batch.offsets[1:]], strict=True)])  # fmt: skip
    assert values.tolist() == store.columns["tab"][everything].tolist()


@pytest.mark.parametrize("form", ["interleaved", "fused"])
def test_evaluation_asks_every_target_once_cold_users_too(tmp_path, form):
    offsets = np.cumsum([0, *LENGTHS])
    times = np.concatenate([np.arange(n) * 10 + u for u, n in enumerate(LENGTHS)])
    store = rich_store(tmp_path / "s", LENGTHS, timestamps=times,
                       meta={"split": {"kind": "global-time", "time": "25"}})  # fmt: skip
    config = config_of(ranking_config(form), eval_batch_users=2)
    split = make_event_split(store, "reference")
    assert set(np.flatnonzero(split.train_end == offsets[:-1])) == {3}
    batches = list(ranking_eval_batches(RankingData(store, config.ranking), config, split.test))
    rows = torch.cat([b.rows for b in batches]).numpy()
    np.testing.assert_array_equal(np.sort(rows), split.test.rows)
    assert len(batches) > 0


def test_targets_with_gaps_are_refused(tmp_path):
    store = rich_store(tmp_path / "s", LENGTHS)
    config = config_of(ranking_config())
    with pytest.raises(ValueError, match="follow one another"):
        target_sequences(RankingData(store, config.ranking), config, np.array([0, 2]))


@pytest.mark.parametrize("form", ["interleaved", "fused"])
def test_progressive_batches_go_through_time_and_never_see_the_future(tmp_path, form):
    store = rich_store(tmp_path / "s", LENGTHS)
    config = config_of(ranking_config(form, mode="progressive", batch_events=7))
    data = ProgressiveBatches(RankingData(store, config.ranking), config)
    times = np.asarray(store.timestamps)
    seen, latest = [], -1
    assert data.num_steps(0) == -(-store.num_events // 7)
    for step in range(data.num_steps(0)):
        batch = data.batch(0, step)
        rows = batch.rows.numpy()
        assert times[rows].min() >= latest
        latest = times[rows].max()
        np.testing.assert_array_equal(np.sort(rows), data.rows(step))
        assert batch.timestamps.max() <= latest  # no event later than those predicted, as context or else
        for s, user in enumerate(batch.users.tolist()):
            at = slice(int(batch.offsets[s]), int(batch.offsets[s + 1]))
            last = batch.rows[(batch.targets >= at.start) & (batch.targets < at.stop)].max()
            expected = store.item_ids[int(last) + 1 - (at.stop - at.start) : int(last) + 1]
            assert batch.item_ids[at].tolist() == expected.tolist() and last < store.offsets[user + 1]
        seen.append(rows)
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(store.num_events))


def test_progressive_steps_must_be_smaller_than_the_log(tmp_path):
    store = rich_store(tmp_path / "s", LENGTHS)
    config = config_of(ranking_config(mode="progressive", batch_events=store.num_events))
    with pytest.raises(UserError, match=f"batch_events={store.num_events}: all .* fit into one step"):
        ProgressiveBatches(RankingData(store, config.ranking), config)


def test_no_training_event_is_an_error(tmp_path):
    store = rich_store(tmp_path / "s", (2, 3))
    config = config_of(ranking_config())
    split = dataclasses.replace(make_split(store, "reference"), train_end=np.asarray(store.offsets[:-1]))
    with pytest.raises(UserError, match="no event lies in the training part"):
        RankingBatches(RankingData(store, config.ranking), split, config)
