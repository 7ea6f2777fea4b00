"""The user's own log: formats, columns, ids, times, shards, and every kind of bad input."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from hstu.config import ColumnsConfig, DataConfig
from hstu.data.batches import EventColumns
from hstu.errors import UserError
from tests.data.logs import nothing_left, prepare_log, random_log, sequences

EXPECTED = {"ann": [("x", 10), ("y", 20)], "bob": [("x", 5)]}
ROWS = [("ann", "y", 20), ("bob", "x", 5), ("ann", "x", 10)]


def write_rows(
    path: Path, rows: list[tuple[Any, ...]] = ROWS, names: tuple[str, ...] = ("user", "item", "timestamp")
) -> Path:
    """Writes rows in the format that the ending names."""
    if path.suffix == ".parquet":
        pl.DataFrame(rows, schema=list(names), orient="row").write_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    else:
        separator = {".tsv": "\t", ".txt": ";", ".dat": "|"}.get(path.suffix, ",")
        path.write_text("\n".join(separator.join(map(str, row)) for row in [names, *rows]) + "\n")
    return path


@pytest.mark.parametrize("ending", ["csv", "tsv", "txt", "dat", "jsonl", "parquet"])
def test_formats_and_separators(tmp_path: Path, ending: str) -> None:
    assert sequences(prepare_log(tmp_path, write_rows(tmp_path / f"log.{ending}"))) == EXPECTED


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_named_columns_actions_values_and_features(tmp_path: Path, ending: str) -> None:
    rows = [(7, 1, 20, 3.5, "web", 0.25), (7, 2, 10, 1.0, None, 0.5), (4, 1, 5, 2.0, "app", 1.0)]
    names = ("uid", "sku", "at", "stars", "device", "price")
    path = write_rows(tmp_path / f"log.{ending}", rows, names)
    if ending == "csv":
        path.write_text(path.read_text().replace("None", ""))
    columns = {
        "user": "uid",
        "item": "sku",
        "time": "at",
        "action": "stars",
        "values": ["price"],
        "features": ["device"],
    }
    store = prepare_log(tmp_path, path, columns)
    assert sequences(store) == {4: [(1, 5)], 7: [(2, 10), (1, 20)]}
    assert store.actions is not None and store.actions.tolist() == [2.0, 1.0, 3.5]
    assert store.columns["price"].tolist() == [1.0, 0.5, 0.25]
    assert store.columns["device"].tolist() == [1, 0, 2] and store.columns["device"].dtype == np.int32
    values = store.feature_values("device")
    assert values is not None and values.tolist() == ["app", "web"]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_event_names_as_actions_are_coded(tmp_path: Path, ending: str) -> None:
    rows = [(1, 1, 10, "view"), (1, 2, 20, "buy"), (1, 3, 30, "view")]
    path = write_rows(tmp_path / f"log.{ending}", rows, ("user", "item", "timestamp", "event"))
    store = prepare_log(tmp_path, path, {"action": "event"})
    assert store.actions is not None and store.actions.tolist() == [2.0, 1.0, 2.0]
    names = store.feature_values("action")
    assert names is not None and names.tolist() == ["buy", "view"]


def test_integer_ids_sort_as_numbers_and_others_as_text(tmp_path: Path) -> None:
    numbers = prepare_log(tmp_path, write_rows(tmp_path / "a.csv", [(10, 100, 1), (9, 20, 1)]))
    assert numbers.user_raw_ids.tolist() == [9, 10] and numbers.item_raw_ids.tolist() == [20, 100]
    mixed = prepare_log(tmp_path, write_rows(tmp_path / "b.csv", [("10", "100", 1), ("9", "a20", 1)]))
    assert mixed.user_raw_ids.dtype == np.int64 and mixed.item_raw_ids.tolist() == ["100", "a20"]


def test_leading_zeros_are_part_of_an_id(tmp_path: Path) -> None:
    store = prepare_log(tmp_path, write_rows(tmp_path / "a.csv", [("007", 1, 1), ("7", 2, 1)]))
    assert store.user_raw_ids.tolist() == ["007", "7"]


BASE_S = 1_500_000_000


@pytest.mark.parametrize(
    ("first", "second", "unit", "expected"),
    [
        (BASE_S, BASE_S + 60, "auto", [BASE_S, BASE_S + 60]),
        (BASE_S * 10**3, BASE_S * 10**3 + 999, "auto", [BASE_S, BASE_S]),
        (BASE_S * 10**6, BASE_S * 10**6 + 10**6, "auto", [BASE_S, BASE_S + 1]),
        (5000, 61_000, "ms", [5, 61]),
        (5000, 61_000, "s", [5000, 61_000]),
        (f"{BASE_S}.25", f"{BASE_S}.75", "auto", [BASE_S, BASE_S]),
        ("2017-07-14T02:40:00", "2017-07-14T02:40:01.5", "auto", [BASE_S, BASE_S + 1]),
        ("2017-07-14 02:40:00", "2017-07-14T04:40:01+02:00", "iso", [BASE_S, BASE_S + 1]),
        ("2017-07-14T02:40:00Z", "2017-07-14T02:40:01+00:00", "auto", [BASE_S, BASE_S + 1]),
        ("1970-01-02", "1970-01-02T00:01", "auto", [86_400, 86_460]),
    ],
)
def test_times(tmp_path: Path, first: Any, second: Any, unit: str, expected: list[int]) -> None:
    path = write_rows(tmp_path / "log.csv", [(1, "b", second), (1, "a", first)])
    store = prepare_log(tmp_path, path, time_unit=unit)
    assert sequences(store) == {1: [("a", expected[0]), ("b", expected[1])]}


@pytest.mark.parametrize(
    "times",
    [
        [datetime(2017, 7, 14, 2, 40, 1), datetime(2017, 7, 14, 2, 40, 0)],
        [datetime(2017, 7, 14, 2, 40, 1, tzinfo=UTC), datetime(2017, 7, 14, 2, 40, tzinfo=UTC)],
        [float(BASE_S + 1), float(BASE_S)],
    ],
    ids=["datetime", "datetime with zone", "float"],
)
def test_native_times_of_parquet(tmp_path: Path, times: list[Any]) -> None:
    path = tmp_path / "log.parquet"
    pl.DataFrame({"user": [1, 1], "item": ["b", "a"], "timestamp": times}).write_parquet(path)
    assert sequences(prepare_log(tmp_path, path)) == {1: [("a", BASE_S), ("b", BASE_S + 1)]}


def test_dates_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pl.DataFrame({"user": [1, 1], "item": [2, 3], "timestamp": [date(1970, 1, 3), date(1970, 1, 2)]}).write_parquet(
        path
    )
    assert sequences(prepare_log(tmp_path, path)) == {1: [(3, 86_400), (2, 172_800)]}


def test_found_unit_is_said(tmp_path: Path) -> None:
    store = prepare_log(tmp_path, write_rows(tmp_path / "log.csv", [(1, 1, BASE_S * 1000)]))
    assert store.meta["notes"] == ["log, times read as ms by their magnitude (data.time_unit=auto)"]


def test_log_without_header(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("1,a,20\n1,b,10\n")
    assert sequences(prepare_log(tmp_path, path, header=False)) == {1: [("b", 10), ("a", 20)]}
    swapped = prepare_log(tmp_path, path, {"user": "2", "item": "1"}, header=False)
    assert sequences(swapped) == {"a": [(1, 20)], "b": [(1, 10)]}
    with pytest.raises(UserError, match="set data.header=false"):
        path.write_text("1,5,20\n1,6,10\n")
        prepare_log(tmp_path, path)


def test_quoted_fields(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text('user,item,timestamp\n1,"a, ""b""",20\n1,c,\n')
    assert sequences(prepare_log(tmp_path, path, on_bad_row="skip")) == {1: [('a, "b"', 20)]}
    path.write_text('user,item,timestamp\n1,"a, ""b""",20\n1,c,30\n')
    assert sequences(prepare_log(tmp_path, path)) == {1: [('a, "b"', 20), ("c", 30)]}


def test_two_character_separator(tmp_path: Path) -> None:
    path = tmp_path / "log.dat"
    path.write_text("user::item::timestamp\nann::y::20\nbob::x::5\nann::x::10\n")
    assert sequences(prepare_log(tmp_path, path, separator="::")) == EXPECTED


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("given", ["folder", "glob"])
def test_users_that_recur_in_other_shards_are_merged(tmp_path: Path, ending: str, given: str) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    write_rows(folder / f"b.{ending}", [("ann", "z", 15), ("ann", "w", 10)])
    write_rows(folder / f"a.{ending}", ROWS)
    (folder / "_SUCCESS").write_text("")
    store = prepare_log(tmp_path, folder if given == "folder" else f"{folder}/*.{ending}")
    # The tie of ann at 10: "a" comes before "b".
    assert sequences(store) == {"ann": [("x", 10), ("w", 10), ("z", 15), ("y", 20)], "bob": [("x", 5)]}


def test_shards_with_other_column_orders(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "1.csv").write_text("user,item,timestamp\nann,y,20\n")
    (folder / "2.csv").write_text("timestamp;extra;item;user\n10;?;x;ann\n")
    assert sequences(prepare_log(tmp_path, folder)) == {"ann": [("x", 10), ("y", 20)]}


def test_gzipped_shards(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    plain = write_rows(tmp_path / "log.csv").read_bytes()
    (folder / "a.csv.gz").write_bytes(gzip.compress(plain))
    assert sequences(prepare_log(tmp_path, folder)) == EXPECTED
    (folder / "a.csv.gz").write_bytes(gzip.compress(plain)[:-9])
    with pytest.raises(UserError, match="a.csv.gz is truncated or corrupt"):
        prepare_log(tmp_path, folder)


def test_items_file_gives_titles(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text("sku,title,brand\ny,The Y,B1\nq,Unused,B2\n")
    store = prepare_log(tmp_path, write_rows(tmp_path / "log.csv"), items_file=str(tmp_path / "items.csv"))
    title, brand = store.item_attribute("title"), store.item_attribute("brand")
    assert title is not None and title.tolist() == ["", "The Y"]  # items x and y
    assert brand is not None and brand.tolist() == ["", "B1"]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_users_file_and_numeric_attributes(tmp_path: Path, ending: str) -> None:
    rows = [("bob", "pro", None, "7"), ("eve", "free", 3.5, "8")]
    path = write_rows(tmp_path / f"users.{ending}", rows, ("uid", "plan", "age", "region"))
    if ending == "csv":
        path.write_text(path.read_text().replace("None", ""))
    (tmp_path / "items.csv").write_text("sku,price\ny,2.5\n")
    store = prepare_log(
        tmp_path,
        write_rows(tmp_path / "log.csv"),
        {"numeric": ["age", "price"]},
        users_file=str(path),
        items_file=str(tmp_path / "items.csv"),
    )
    plan, region = store.user_attribute("plan"), store.user_attribute("region")
    age, price = store.user_attribute("age"), store.item_attribute("price")
    assert plan is not None and plan.tolist() == ["", "pro"]  # users ann and bob
    assert region is not None and region.tolist() == ["", "7"]
    assert age is not None and np.isnan(age).all() and age.dtype == np.float32
    assert price is not None and np.array_equal(price, np.array([np.nan, 2.5], np.float32), equal_nan=True)
    assert "users_file" in store.meta["settings"] and [r["file"] for r in store.meta["raw"]][-1] == path.name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uid,age\nann,1\nann,2\n", "uid 'ann' occurs twice"),
        ("uid,age\nann,old\n", "row 2: age 'old' is not a number"),
        ("uid,age\nann,inf\n", "row 2: age 'inf' is not a number"),
        ("uid,years\nann,1\n", "data.columns.numeric=age: expected columns of"),
        ("uid,age\nann,1\nbob", "the last row has 1 of 2 fields"),
    ],
)
def test_bad_users_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "users.csv").write_text(text)
    with pytest.raises(UserError) as caught:
        prepare_log(
            tmp_path, write_rows(tmp_path / "log.csv"), {"numeric": ["age"]}, users_file=str(tmp_path / "users.csv")
        )
    assert message in str(caught.value) and nothing_left(tmp_path)
    with pytest.raises(UserError, match="data.users_file=none.csv: no such file"):
        prepare_log(tmp_path, tmp_path / "log.csv", users_file="none.csv")
    with pytest.raises(UserError, match="data.users_file='u.csv': expected data=log"):
        DataConfig(source="amazon-2014", users_file="u.csv")


OPTIONAL_ROWS = [("ann", "y", 20, 4.0, None), ("bob", "x", 5, None, 0.5), ("ann", "x", 10, 1.0, 0.25)]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("bad_row", [False, True], ids=["quick", "line by line"])
def test_optional_actions_and_values_are_nan_where_empty(tmp_path: Path, ending: str, bad_row: bool) -> None:
    names = ("user", "item", "timestamp", "stars", "watched")
    rows = [*OPTIONAL_ROWS, ("ann", None, 1, 2.0, 1.0)] if bad_row else OPTIONAL_ROWS
    path = write_rows(tmp_path / f"log.{ending}", rows, names)
    if ending == "csv":
        path.write_text(path.read_text().replace("None", ""))
    columns = {"action": "stars", "values": ["watched"], "optional": ["stars", "watched"]}
    store = prepare_log(tmp_path, path, columns, on_bad_row="skip")
    assert sequences(store) == EXPECTED
    assert store.actions is not None
    assert np.array_equal(store.actions, np.array([1, 4, np.nan], np.float32), equal_nan=True)
    assert np.array_equal(store.columns["watched"], np.array([0.25, np.nan, 0.5], np.float32), equal_nan=True)
    for optional in (["stars"], ["watched"]):
        with pytest.raises(UserError, match=r"(stars|watched) is missing"):
            prepare_log(tmp_path, path, {**columns, "optional": optional})


def test_optional_names_of_actions(tmp_path: Path) -> None:
    rows = "ann,x,1,view\nann,y,2,\nann,x,3,buy\n"
    (tmp_path / "log.csv").write_text("user,item,timestamp,event\n" + rows)
    store = prepare_log(tmp_path, tmp_path / "log.csv", {"action": "event", "optional": ["event"]})
    names = store.feature_values("action")
    assert names is not None and names.tolist() == ["buy", "view"]
    assert store.actions is not None
    assert np.array_equal(store.actions, np.array([2, np.nan, 1], np.float32), equal_nan=True)


@pytest.mark.parametrize(
    ("row", "reason"), [("ann,y,2,nan", "stars 'nan' is not finite"), ("ann,y,2,much", "stars 'much' is not a number")]
)
def test_optional_values_are_still_checked(tmp_path: Path, row: str, reason: str) -> None:
    (tmp_path / "log.csv").write_text(f"user,item,timestamp,stars\nann,x,1,3\n{row}\n")
    with pytest.raises(UserError) as caught:
        prepare_log(tmp_path, tmp_path / "log.csv", {"action": "stars", "optional": ["stars"]})
    assert f"row 3: {reason}" in str(caught.value)


def test_optional_column_that_is_neither_action_nor_value() -> None:
    with pytest.raises(UserError, match=r"data.columns.optional='user': expected one of the action and values \(p\)"):
        ColumnsConfig(values=["p"], optional=["user"])


def test_equal_rows_without_an_action_are_duplicates(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,item,timestamp,stars\nann,x,1,\nann,x,1,\nann,x,1,3\n")
    store = prepare_log(tmp_path, tmp_path / "log.csv", {"action": "stars", "optional": ["stars"]}, dedup="exact")
    assert store.num_events == 2 and store.meta["removed"] == {"duplicates": 1}


def test_missing_actions_cannot_weigh_events(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,item,timestamp,stars\nann,x,1,\nann,y,2,3\n")
    store = prepare_log(tmp_path, tmp_path / "log.csv", {"action": "stars", "optional": ["stars"]})
    with pytest.raises(UserError, match="loss.event_weights=actions: .*nan.*use none"):
        EventColumns(store, None, "actions")


def test_quick_and_slow_reading_agree(tmp_path: Path) -> None:
    """One bad row sends the whole file down the slow path; everything else must come out the same."""
    random_log(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text((tmp_path / "a.csv").read_text() + "oops\n")
    quick = prepare_log(tmp_path, tmp_path / "a.csv", protocol="reference")
    slow = prepare_log(tmp_path, tmp_path / "b.csv", protocol="reference", on_bad_row="skip")
    assert slow.meta["split_hash"] == quick.meta["split_hash"]
    assert slow.meta["rejects"] == {"expected 3 fields, got 1": 1}


def test_result_does_not_depend_on_buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_log(tmp_path / "a.csv")
    whole = prepare_log(tmp_path / "1", tmp_path / "a.csv", protocol="reference")
    monkeypatch.setattr("hstu.data.buckets.BUCKET_EVENTS", 300)
    parts = prepare_log(tmp_path / "2", tmp_path / "a.csv", protocol="reference")
    assert parts.meta["split_hash"] == whole.meta["split_hash"]
    by_hand: dict[int, list[tuple[int, int]]] = {}
    for user, item, time in rows.tolist():
        by_hand.setdefault(user, []).append((item, time))
    found = sequences(whole)
    assert found.keys() == by_hand.keys()
    for user, events in by_hand.items():
        assert sorted(found[user]) == sorted(events)
        assert [t for _, t in found[user]] == sorted(t for _, t in events)


# Bad input


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("ann,x", "expected 3 fields separated by ',', got 2"),
        ("ann,x,10,extra", "expected 3 fields separated by ',', got 4"),
        (",x,10", "user is missing"),
        ("ann,,10", "item is missing"),
        ("ann,x,", "timestamp is missing"),
        ("ann,x,soon", "timestamp 'soon' is not a number"),
        ("ann,x,-5", "timestamp '-5' lies before 1970"),
        ("ann,x,nan", "timestamp 'nan' is not finite"),
        ("ann,x,inf", "timestamp 'inf' is not finite"),
        ("ann,x,99999999999999", "lies beyond the year 9999"),
        ('ann,"x,10', "a quoted field is not closed on its line"),
        ("ann,caf\xe9,10", "byte 0xE9 at place 8 is not utf-8 (convert the file, for example iconv"),
    ],
)
def test_bad_row_of_csv(tmp_path: Path, row: str, reason: str) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(f"user,item,timestamp\nann,y,20\n{row}\nbob,x,5\n".encode("latin-1"))
    with pytest.raises(UserError) as caught:
        prepare_log(tmp_path, path)
    message = str(caught.value)
    assert message.startswith(f"{path}, row 3: ") and reason in message and "\n" not in message
    assert "data.on_bad_row=skip" in message
    assert nothing_left(tmp_path)
    store = prepare_log(tmp_path, path, on_bad_row="skip")
    assert sequences(store) == {"ann": [("y", 20)], "bob": [("x", 5)]}
    header, rejected = (store.path / "rejects.csv").read_text(encoding="utf-8").splitlines()
    assert header == "file,row,reason,text"
    assert rejected.startswith(f"{path},3,")
    assert sum(store.meta["rejects"].values()) == 1 and store.meta["rows_read"] == 3


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"user": "ann", "item": "x"', "not valid JSON"),
        ("[1, 2, 3]", "expected one JSON object a line"),
        ('{"user": "ann", "item": null, "timestamp": 10}', "item is missing"),
        ('{"user": "ann", "timestamp": 10}', "item is missing"),
        ('{"user": "ann", "item": ["x"], "timestamp": 10}', "item is not a number or a string"),
        ('{"user": "ann", "item": "x", "timestamp": "soon"}', "timestamp 'soon' is not a number"),
        ('{"user": "ann", "item": "x", "timestamp": -1}', "timestamp '-1' lies before 1970"),
    ],
)
def test_bad_row_of_jsonl(tmp_path: Path, row: str, reason: str) -> None:
    path = write_rows(tmp_path / "log.jsonl")
    with open(path, "a") as file:
        file.write(row + "\n")
    with pytest.raises(UserError) as caught:
        prepare_log(tmp_path, path)
    assert str(caught.value).startswith(f"{path}, row 4: ") and reason in str(caught.value)
    store = prepare_log(tmp_path, path, on_bad_row="skip")
    assert sequences(store) == EXPECTED and sum(store.meta["rejects"].values()) == 1


@pytest.mark.parametrize(
    ("user", "item", "time", "reason"),
    [
        (None, "x", 10.0, "user is missing"),
        (1.0, None, 10.0, "item is missing"),
        (1.5, "x", 10.0, "user '1.5' is not an integer or string id"),
        (1.0, "x", None, "timestamp is missing"),
        (1.0, "x", float("nan"), "timestamp 'NaN' is not finite"),
        (1.0, "x", -3.0, "timestamp '-3.0' lies before 1970"),
    ],
)
def test_bad_row_of_parquet(tmp_path: Path, user: Any, item: Any, time: Any, reason: str) -> None:
    path = tmp_path / "log.parquet"
    data = {"user": [2.0, user, 3.0], "item": ["a", item, "b"], "timestamp": [5.0, time, 6.0]}
    pl.DataFrame(data, schema={"user": pl.Float64, "item": pl.String, "timestamp": pl.Float64}).write_parquet(path)
    with pytest.raises(UserError) as caught:
        prepare_log(tmp_path, path)
    assert str(caught.value).startswith(f"{path}, row 2: {reason}")
    store = prepare_log(tmp_path, path, on_bad_row="skip")
    assert sequences(store) == {2: [("a", 5)], 3: [("b", 6)]}
    assert sum(store.meta["rejects"].values()) == 1


def test_id_beyond_64_bits(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pl.DataFrame(
        {"user": [1, 2**63], "item": [1, 1], "timestamp": [1, 1]}, schema_overrides={"user": pl.UInt64}
    ).write_parquet(path)
    with pytest.raises(UserError, match="row 2: user '9223372036854775808' is beyond the range of 64-bit integers"):
        prepare_log(tmp_path, path)


@pytest.mark.parametrize("column", ["rating", "price"])
def test_non_finite_and_missing_values(tmp_path: Path, column: str) -> None:
    columns = {"action": "rating"} if column == "rating" else {"values": ["price"]}
    for cell, reason in (("nan", "is not finite"), ("", "is missing"), ("much", "is not a number")):
        path = write_rows(
            tmp_path / "log.csv", [(1, 1, 1, 2.5), (1, 2, 2, cell)], ("user", "item", "timestamp", column)
        )
        with pytest.raises(UserError) as caught:
            prepare_log(tmp_path, path, columns)
        assert "row 3: " in str(caught.value) and reason in str(caught.value)


def test_bad_row_of_a_later_shard_is_named_with_its_file(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    write_rows(folder / "a.csv")
    (folder / "b.csv").write_text("user,item,timestamp\nann,x,1\nann,x,?\n")
    with pytest.raises(UserError, match=r"b\.csv, row 3: timestamp '\?'"):
        prepare_log(tmp_path, folder)


def test_seconds_among_milliseconds(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "log.csv", [(1, i, BASE_S * 1000 + i) for i in range(5)] + [(1, 9, BASE_S)])
    with pytest.raises(UserError, match=r"row 7: timestamp '1500000000' looks like another unit than the ms"):
        prepare_log(tmp_path, path)
    assert prepare_log(tmp_path, path, time_unit="ms").num_events == 6


@pytest.mark.parametrize(
    ("header", "mend"),
    [
        ("user_id,item,timestamp", "did you mean data.columns.user=user_id?"),
        ("User,item,timestamp", "did you mean data.columns.user=User?"),
        ("user,itemid,timestamp", "did you mean data.columns.item=itemid?"),
        ("user,item,time", "did you mean data.columns.time=time?"),
        ("user,item,zzz", "set data.columns.time"),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_misnamed_column(tmp_path: Path, header: str, mend: str, ending: str) -> None:
    path = write_rows(tmp_path / f"log.{ending}", ROWS, tuple(header.split(",")))
    with pytest.raises(UserError) as caught:
        prepare_log(tmp_path, path)
    message = str(caught.value)
    assert str(path) in message and "no column" in message and message.endswith(mend)
    assert ", ".join(header.split(",")) in message
    assert ending != "csv" or "row 1" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "holds only blank lines"),
        (b"user item timestamp\n1 2 3\n", "separates 'user item timestamp': set data.separator"),
        (b"user,item,timestamp\n", "no usable row"),
        (b"user,item,timestamp\na,b,soon\n", "holds 'soon', which is neither a number nor an ISO 8601 time"),
        (b"user,item,timestamp\na,b,1500000000000000000\n", "too large for s, ms or us"),
        (b"user,user,item,timestamp\na,b,c,1\n", "column 'user' occurs twice"),
        ("user,item,timestamp\na,b,1\n".encode("utf-16"), "is not UTF-8 text"),
        (b"PAR1....", "looks like Parquet"),
    ],
)
def test_hopeless_csv(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        prepare_log(tmp_path, path)
    assert str(path) in str(caught.value) and message in str(caught.value)
    assert nothing_left(tmp_path)


def test_every_row_bad(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "log.csv", [("a", "", 1), ("", "b", 1)])
    with pytest.raises(UserError, match=r"no usable row in .*; the first bad one: .*row 2: item is missing"):
        prepare_log(tmp_path, path, on_bad_row="skip")


def test_truncated_parquet(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "log.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot be read as Parquet .*truncated; fetch it again"):
        prepare_log(tmp_path, path)


def test_shards_that_disagree_on_the_type_of_an_id(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    write_rows(folder / "a.parquet", [(1, 1, 1)])
    write_rows(folder / "b.parquet", [("x", 1, 1)])
    with pytest.raises(UserError, match=r"b\.parquet: column user has type String, but Int64 in .*a\.parquet"):
        prepare_log(tmp_path, folder)


def test_wrong_places(tmp_path: Path) -> None:
    write_rows(tmp_path / "log.csv")
    with pytest.raises(UserError, match=r"no such file or folder; did you mean .*log\.csv\?"):
        prepare_log(tmp_path, tmp_path / "logs.csv")
    with pytest.raises(UserError, match="no file matches"):
        prepare_log(tmp_path, f"{tmp_path}/*.json")
    with pytest.raises(UserError, match="data.raw is empty: expected a file"):
        prepare_log(tmp_path, "")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no log: expected files ending in .csv"):
        prepare_log(tmp_path, tmp_path / "empty")
    (tmp_path / "log.xyz").write_text("user,item,timestamp\n1,2,3\n")
    with pytest.raises(UserError, match="unknown ending '.xyz': set data.format"):
        prepare_log(tmp_path, tmp_path / "log.xyz")
    assert prepare_log(tmp_path, tmp_path / "log.xyz", format="csv").num_events == 1


def test_mixed_formats_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    write_rows(folder / "a.csv")
    write_rows(folder / "b.jsonl", [("zoe", "x", 1)])
    with pytest.raises(UserError, match="csv and jsonl files: say which with data.format"):
        prepare_log(tmp_path, folder)
    assert sequences(prepare_log(tmp_path, folder, format="csv")) == EXPECTED


def test_same_column_named_twice(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "log.csv")
    for columns in ({"values": ["x", "x"]}, {"values": ["x"], "features": ["x"]}):
        with pytest.raises(UserError, match="name 'x' twice"):
            prepare_log(tmp_path, path, columns)
    with pytest.raises(UserError, match="holds a slash"):
        prepare_log(tmp_path, path, {"values": ["a/b"]})
