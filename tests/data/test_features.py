"""Features: codes, missing and rare values, several values in a cell, buckets, scales, hours and days."""

from __future__ import annotations

import tracemalloc
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest

from hstu.config_ranking import FeatureConfig
from hstu.data import features
from hstu.data.features import (
    Coded,
    Numbers,
    distinct,
    event_feature,
    item_feature,
    joined_moments,
    mean_and_scale,
    moments,
    quantiles,
    sorted_values,
    time_feature,
    user_feature,
)
from hstu.data.store import write_store
from hstu.errors import UserError

NAN = float("nan")


def make_store(path, users=None, items=None, events=None, coded=None):
    """Two users with two events each, four items; attributes and columns as given."""
    store = write_store(
        path, offsets=np.array([0, 2, 4]), item_ids=np.array([1, 2, 3, 4]), timestamps=np.array([1, 2, 1, 2]),
        meta={}, columns=events, user_attributes=users, item_attributes=items,
    )  # fmt: skip
    (path / "features").mkdir()
    for name, values in (coded or {}).items():
        np.save(path / "features" / f"{name}.npy", np.array(values))
    return store


def codes_of(feature, rows):
    """Codes of each row."""
    values, lengths = feature.take(np.asarray(rows))
    return [part.tolist() for part in np.split(values, np.cumsum(lengths)[:-1])]


def item_codes(tmp_path, cells, **config):
    feature = item_feature(make_store(tmp_path / "s", items={"x": np.array(cells)}), "x", FeatureConfig(**config))
    return codes_of(feature, range(len(cells) + 1)), feature


def test_text_codes_by_value_and_the_padding_item_has_none(tmp_path):
    codes, feature = item_codes(tmp_path, ["b", "", "a", "b"])
    assert codes == [[0], [2], [0], [1], [2]] and feature.num_codes == 3


def test_numbers_as_categories(tmp_path):
    codes, feature = item_codes(tmp_path, np.array([7, NAN, -1, 7], np.float32))
    assert codes == [[0], [2], [0], [1], [2]] and feature.num_codes == 3


def test_integers_as_categories(tmp_path):
    codes, feature = item_codes(tmp_path, np.array([2**60 + 1, 2**60, 0, 0]))
    assert codes == [[0], [3], [2], [1], [1]] and feature.num_codes == 4


def test_rare_values_share_code_1(tmp_path):
    codes, feature = item_codes(tmp_path, ["x", "rare", "", "x"], min_count=2)
    assert codes == [[0], [2], [1], [0], [2]] and feature.num_codes == 3


def test_the_padding_item_does_not_count_as_a_value(tmp_path):
    # Only one item lacks the value: with min_count=2 it is still missing, never rare.
    codes, _ = item_codes(tmp_path, ["x", "x", "", "y"], min_count=2)
    assert codes == [[0], [2], [2], [0], [1]]


def test_several_values_in_a_cell(tmp_path):
    codes, feature = item_codes(tmp_path, ["Drama|Comedy", "", "Comedy", "War|Comedy|Drama"], separator="|")
    assert codes == [[0], [2, 1], [0], [1], [3, 1, 2]] and feature.num_codes == 4
    assert codes_of(feature, [4, 0, 4]) == [[3, 1, 2], [0], [3, 1, 2]]


def test_several_values_and_rare_ones(tmp_path):
    codes, feature = item_codes(tmp_path, ["a|b", "|a", "c", ""], separator="|", min_count=2)
    assert codes == [[0], [2, 1], [2], [1], [0]] and feature.num_codes == 3


def test_buckets_hold_about_equally_many(tmp_path):
    codes, feature = item_codes(tmp_path, np.array([10, 40, NAN, 20], np.float32), kind="buckets", num_buckets=3)
    # Quantiles 1/3 and 2/3 of 10, 20, 40 are 16.7 and 26.7.
    assert codes == [[0], [1], [3], [0], [2]] and feature.num_codes == 4


def test_equal_quantiles_are_one_edge(tmp_path):
    codes, feature = item_codes(tmp_path, np.array([5, 5, 5, 9], np.float32), kind="buckets", num_buckets=4)
    assert feature.num_codes == 3 + 1 and max(c for row in codes for c in row) < feature.num_codes
    assert codes[1] == codes[2] == codes[3] != codes[4]


def test_numbers_are_standardised(tmp_path):
    store = make_store(tmp_path / "s", items={"x": np.array([1, 3, NAN, 5], np.float32)})
    feature = item_feature(store, "x", FeatureConfig(kind="numeric"))
    assert isinstance(feature, Numbers) and feature.values.dtype == np.float32
    deviation = (8 / 3) ** 0.5
    np.testing.assert_allclose(feature.values, [NAN, -2 / deviation, 0, NAN, 2 / deviation], rtol=1e-6)


def test_log1p_before_the_scale(tmp_path):
    store = make_store(tmp_path / "s", items={"x": np.array([0, np.e - 1, 0, np.e - 1])})
    feature = item_feature(store, "x", FeatureConfig(kind="numeric", transform="log1p"))
    np.testing.assert_allclose(feature.values, [NAN, -1, 1, -1, 1], rtol=1e-6)


def test_infinite_numbers_are_missing(tmp_path):
    store = make_store(tmp_path / "s", items={"x": np.array([1, np.inf, -np.inf, 3], np.float32)})
    feature = item_feature(store, "x", FeatureConfig(kind="numeric"))
    np.testing.assert_array_equal(feature.values, np.array([NAN, -1, NAN, NAN, 1], np.float32))


@pytest.mark.parametrize("values", [[3.0] * 7, [np.log1p(3.0)] * 7, [0.0] * 7], ids=["3", "log 4", "0"])
def test_a_constant_has_scale_1(values):
    assert mean_and_scale([moments(np.array(values))]) == (pytest.approx(values[0]), 1.0)


# Columns that are looked at in parts


def test_moments_of_parts():
    values = np.array([2.0, 4.0, 4.0, 5.0, 9.0, 12.0])
    found = joined_moments(moments(part) for part in (values[:0], values[:1], values[1:4], values[4:]))
    assert found == (6, 6.0, pytest.approx((70 / 6) ** 0.5, rel=1e-15))
    assert joined_moments([]) == joined_moments([moments(values[:0])]) == (0, 0.0, 0.0)
    assert mean_and_scale([(3, 5.0, 0.0), (1, 5.0, 0.0)]) == (5.0, 1.0), "a constant"


@pytest.mark.parametrize("part_bytes", [8, 64, 1 << 25])
def test_distinct_values_and_their_counts(monkeypatch, part_bytes):
    monkeypatch.setattr(features, "_PART_BYTES", part_bytes)
    values, counts = distinct(np.array([3, NAN, -1, 3, NAN, 7, NAN], np.float32))
    assert values[:3].tolist() == [-1, 3, 7] and np.isnan(values[3]) and counts.tolist() == [1, 2, 1, 3]
    values, counts = distinct(np.array(["b", "", "abc", "b"]))
    assert values.tolist() == ["", "abc", "b"] and counts.tolist() == [1, 1, 2]


def numbers_of_all_sizes():
    """Far from zero and near it, negative, both zeros, infinite, equal ones, missing ones."""
    rng = np.random.default_rng(0)
    wide = rng.normal(size=300) * 10.0 ** rng.integers(-300, 300, 300)
    return np.concatenate([wide, rng.integers(-3, 3, 200), [0.0, -0.0, np.inf, -np.inf, NAN, NAN]])


@pytest.mark.parametrize("part_bytes, few_places", [(400, 64), (1 << 25, 64), (400, 0)])
def test_sorted_values_by_their_bits(monkeypatch, part_bytes, few_places):
    monkeypatch.setattr(features, "_PART_BYTES", part_bytes)
    monkeypatch.setattr(features, "_FEW_PLACES", few_places)
    numbers = numbers_of_all_sizes()
    expected = np.sort(numbers[~np.isnan(numbers)])
    places = np.array([0, 1, 100, 250, 251, 252, 400, len(expected) - 1, 7, 7])
    assert sorted_values(numbers, places).tolist() == expected[places].tolist()


def test_many_quantiles_need_little_memory():
    numbers, shares = np.random.default_rng(0).normal(size=5000), np.arange(1, 500) / 500
    tracemalloc.start()
    try:
        found, peak = quantiles(numbers, shares), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50e6 and found.tolist() == np.quantile(numbers, shares).tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 10, 97, 98])
def test_quantiles_are_those_of_numpy(monkeypatch, size):
    monkeypatch.setattr(features, "_PART_BYTES", 80)
    numbers = np.random.default_rng(size).normal(size=size).round(1)
    shares = np.arange(1, 16) / 16
    assert quantiles(np.append(numbers, NAN), shares).tolist() == np.quantile(numbers, shares).tolist()
    assert len(quantiles(np.array([NAN, NAN]), shares)) == 0


@pytest.mark.parametrize("config", [{}, {"min_count": 2}, {"separator": "|", "min_count": 2}], ids=str)
def test_text_features_in_parts(tmp_path, monkeypatch, config):
    cells = ["a|b", "", "b", "a|b", "c", "b|a", "d", ""]
    expected = item_codes(tmp_path / "whole", cells, **config)
    monkeypatch.setattr(features, "_PART_BYTES", 30)
    found = item_codes(tmp_path / "parts", cells, **config)
    assert found[0] == expected[0] and found[1].num_codes == expected[1].num_codes >= 3


def test_all_missing(tmp_path):
    store = make_store(tmp_path / "s", users={"x": np.array([NAN, NAN], np.float32)})
    assert np.isnan(np.asarray(user_feature(store, "x", FeatureConfig(kind="numeric")).values)).all()
    for config in (FeatureConfig(), FeatureConfig(kind="buckets")):
        assert codes_of(user_feature(store, "x", config), [0, 1]) == [[0], [0]]


def test_event_columns(tmp_path):
    events = {"tab": np.array([0, 2, 1, 2], np.int32), "price": np.array([1, 2, 3, 2], np.float32)}
    store = make_store(tmp_path / "s", events=events, coded={"tab": ["home", "search"]})
    tab = event_feature(store, "tab", FeatureConfig())
    assert isinstance(tab, Coded) and tab.num_codes == 3 and tab.take(np.arange(4))[0].tolist() == [0, 2, 1, 2]
    rare = event_feature(store, "tab", FeatureConfig(min_count=2))
    assert rare.take(np.arange(4))[0].tolist() == [0, 2, 1, 2] and rare.num_codes == 3
    price = event_feature(store, "price", FeatureConfig(min_count=2))
    assert price.take(np.arange(4))[0].tolist() == [1, 2, 1, 2] and price.num_codes == 3


def test_a_coded_number_is_read_by_its_value_and_not_by_its_code(tmp_path):
    store = make_store(tmp_path / "s", events={"hour": np.array([1, 2, 0, 3], np.int32)}, coded={"hour": [30, 10, 20]})
    feature = event_feature(store, "hour", FeatureConfig(kind="numeric"))
    np.testing.assert_allclose(feature.values, [1.2247449, -1.2247449, NAN, 0], rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 8.0, -3.5])
def test_hour_and_day_against_datetime(offset):
    stamps = np.random.default_rng(0).integers(-(10**9), 2 * 10**9, 200)
    zone = timezone(timedelta(hours=offset))
    local = [datetime.fromtimestamp(int(s), UTC).astimezone(zone) for s in stamps]
    hours, num_hours = time_feature(stamps, "hour_of_day", offset)
    days, num_days = time_feature(stamps, "day_of_week", offset)
    assert hours.tolist() == [t.hour + 1 for t in local] and num_hours == 25
    assert days.tolist() == [t.weekday() + 1 for t in local] and num_days == 8


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda s: user_feature(s, "agee", FeatureConfig()), r"user_features\.agee: .* no such attribute .*found age"),
        (lambda s: item_feature(s, "x", FeatureConfig()), r"item_features\.x: .*no such attribute of items; found w"),
        (lambda s: event_feature(s, "x", FeatureConfig()), r"event_features\.x: .*it has tab, hour_of_day"),
        (lambda s: item_feature(s, "word", FeatureConfig(kind="numeric")), r"word\.kind=numeric: the column holds te"),
        (lambda s: event_feature(s, "tab", FeatureConfig(kind="buckets")), r"tab\.kind=buckets: the column holds te"),
        (lambda s: event_feature(s, "tab", FeatureConfig(separator="|")), r"tab\.separator='\|': an event has one"),
        (lambda s: user_feature(s, "age", FeatureConfig(kind="numeric", transform="log1p")), r"holds -1\.0; expected"),
    ],
    ids=["user", "item", "event", "text number", "text buckets", "separator of events", "log1p"],
)  # fmt: skip
def test_errors(tmp_path, make, message):
    store = make_store(
        tmp_path / "s", users={"age": np.array([3, -1], np.float32)}, items={"word": np.array(["a", "b", "c", "d"])},
        events={"tab": np.array([1, 1, 1, 1], np.int32)}, coded={"tab": ["a"]},
    )  # fmt: skip
    with pytest.raises(UserError, match=message):
        make(store)
