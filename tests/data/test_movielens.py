"""The MovieLens importers, on small files of the three formats and on the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu.config import DataConfig
from hstu.data.store import SequenceStore
from hstu.errors import UserError
from hstu.prepare import prepare
from tests.data.logs import sequences, write_ml_1m, write_ml_100k, write_ml_csv


def prepare_ml(tmp_path: Path, source: str, raw: Path, **values: Any) -> SequenceStore:
    values = {"protocol": "stable", **values}
    return prepare(
        DataConfig(name="ml", source=source, raw=str(raw), root=str(tmp_path / "root"), **values), quiet=True
    )


def test_1m_format(tmp_path: Path) -> None:
    store = prepare_ml(tmp_path, "movielens-dat", write_ml_1m(tmp_path / "raw"))
    assert sequences(store) == {
        1: [(7, 50), (10, 100), (30, 100)],  # the tie keeps its file order
        2: [(30, 7), (10, 8)],
        5: [(7, 1)],
    }
    assert store.item_raw_ids.tolist() == [7, 10, 30, 99]  # all listed films, ordered by raw id
    assert store.item_ids.tolist() == [1, 2, 3, 3, 2, 1]
    assert store.actions is not None and store.actions.tolist() == [4, 5, 3, 1, 2, 5]
    title, genres = store.item_attribute("title"), store.item_attribute("genres")
    assert title is not None and title.tolist() == ["Heat (1995)", "Big (1988)", "Amélie: Part 2 (2001)", "None"]
    assert genres is not None and genres[2] == "Comedy|Romance"
    assert store.meta["counts"] == {"users": 3, "items": 4, "items_with_events": 3, "events": 6}


def test_100k_format(tmp_path: Path) -> None:
    store = prepare_ml(tmp_path, "movielens-100k", write_ml_100k(tmp_path / "raw"))
    assert sequences(store) == {1: [(2, 10), (1, 30)], 2: [(1, 20)]}
    title, genres = store.item_attribute("title"), store.item_attribute("genres")
    assert title is not None and title.tolist() == ["Café (1995)", "Heat (1995)"]
    assert genres is not None and genres.tolist() == ["Action|Comedy", "unknown"]


def test_csv_format(tmp_path: Path) -> None:
    store = prepare_ml(tmp_path, "movielens-csv", write_ml_csv(tmp_path / "raw"))
    assert sequences(store) == {1: [(2, 10), (3, 20)], 9: [(2, 5), (3, 6)]}
    assert store.num_items == 3
    title = store.item_attribute("title")
    assert title is not None and title.tolist() == ['Big, The "Best" (1988)', "Œuvre (2000)", "Heat"]
    assert store.actions is not None and store.actions.tolist() == [0.5, 4.5, 3.0, 3.0]


def test_folder_below_and_ratings_file_as_raw(tmp_path: Path) -> None:
    raw = write_ml_1m(tmp_path / "raw" / "ml-1m")
    below = prepare_ml(tmp_path, "movielens-dat", raw.parent)
    direct = prepare_ml(tmp_path, "movielens-dat", raw / "ratings.dat")
    assert below.path == direct.path


def test_estimated_timestamps_become_a_column_and_a_note(tmp_path: Path) -> None:
    raw = write_ml_1m(tmp_path / "raw")
    np.save(raw / "timestamp_estimated.npy", np.array([1, 0, 1, 0, 0, 0], bool))
    store = prepare_ml(tmp_path, "movielens-dat", raw)
    assert store.columns["timestamp_estimated"].tolist() == [1, 1, 0, 0, 0, 0]  # user 1: rows 3, 1, 2 of the file
    assert store.columns["timestamp_estimated"].dtype == np.int32
    assert store.meta["notes"] == ["ml, 33.3 % of the timestamps estimated"]


def test_estimated_timestamps_of_another_length(tmp_path: Path) -> None:
    raw = write_ml_1m(tmp_path / "raw")
    np.save(raw / "timestamp_estimated.npy", np.zeros(5, bool))
    with pytest.raises(UserError, match="one flag for each of 6 ratings"):
        prepare_ml(tmp_path, "movielens-dat", raw)


def test_users_file_of_1m_becomes_attributes_and_changes_nothing_else(tmp_path: Path) -> None:
    without = prepare_ml(tmp_path, "movielens-dat", write_ml_1m(tmp_path / "without"))
    raw = write_ml_1m(tmp_path / "with")
    (raw / "users.dat").write_text("2::F::1::10::48067\n1::M::56::16::70072\n9::F::25::0::1-2\n")
    store = prepare_ml(tmp_path, "movielens-dat", raw)
    expected = {"gender": ["M", "F", ""], "age": ["56", "1", ""], "occupation": ["16", "10", ""]}  # users 1, 2, 5
    for name, values in expected.items():
        found = store.user_attribute(name)
        assert found is not None and found.tolist() == values and without.user_attribute(name) is None, name
    assert not list((store.path / "users").glob("zip*"))
    assert store.meta["split_hash"] == without.meta["split_hash"] and store.path != without.path
    files = {p.relative_to(without.path) for p in without.path.rglob("*.npy")}
    assert files == {p.relative_to(store.path) for p in store.path.rglob("*.npy")} - {
        Path("users") / f"{name}.npy" for name in expected
    }
    for name in files:
        assert (store.path / name).read_bytes() == (without.path / name).read_bytes(), name


def test_users_file_of_100k(tmp_path: Path) -> None:
    raw = write_ml_100k(tmp_path / "raw")
    (raw / "u.user").write_text("1|24|M|technician|85711\n2|53|F|other|T8H1N\n")
    store = prepare_ml(tmp_path, "movielens-100k", raw)
    age, job = store.user_attribute("age"), store.user_attribute("occupation")
    assert age is not None and age.tolist() == [24, 53] and age.dtype == np.float32
    assert job is not None and job.tolist() == ["technician", "other"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("5::M::25::3", "expected 5 fields separated by '::', got 4"),
        ("u5::M::25::3::1", "userId 'u5' is not an integer"),
        ("1::M::25::3::1", "userId '1' occurs twice"),
        ("5::M::young::3::1", "age 'young' is not an integer"),
    ],
)
def test_bad_row_of_a_users_file(tmp_path: Path, row: str, reason: str) -> None:
    raw = write_ml_1m(tmp_path / "raw")
    (raw / "users.dat").write_text(f"1::F::1::10::48067\n{row}\n2::M::35::1::2\n")
    with pytest.raises(UserError) as caught:
        prepare_ml(tmp_path, "movielens-dat", raw)
    assert f"users.dat, row 2: {reason}" in str(caught.value)
    gender = prepare_ml(tmp_path, "movielens-dat", raw, on_bad_row="skip").user_attribute("gender")
    assert gender is not None and gender.tolist() == ["F", "M", ""]


def test_item_beyond_the_catalogue(tmp_path: Path) -> None:
    raw = write_ml_1m(tmp_path / "raw")
    with open(raw / "ratings.dat", "a") as file:
        file.write("5::4000000000::5::2\n5::8::5::3\n")
    with pytest.raises(UserError, match=r"ratings.dat, row 7: item '4000000000' is not in movies.dat"):
        prepare_ml(tmp_path, "movielens-dat", raw)
    store = prepare_ml(tmp_path, "movielens-dat", raw, on_bad_row="skip")
    assert store.num_events == 6
    rejects = (store.path / "rejects.csv").read_text().splitlines()
    assert rejects[1].endswith("ratings.dat,7,item '4000000000' is not in movies.dat,5::4000000000::5::2")
    assert len(rejects) == 3


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("1::10::5", "expected 4 fields separated by '::', got 3"),
        ("1::10::5::100::1", "expected 4 fields separated by '::', got 5"),
        ("1:10:5:100", "expected 4 fields separated by '::', got 1"),
        ("x::10::5::100", "userId 'x' is not an integer"),
        ("1::10.5::5::100", "movieId '10.5' is not an integer"),
        ("99999999999999999999::10::5::100", "is beyond the range of 64-bit integers"),
        ("1::10::::100", "rating is missing"),
        ("1::10::five::100", "rating 'five' is not a number"),
        ("1::10::inf::100", "rating 'inf' is not finite"),
        ("1::10::5::-100", "timestamp '-100' lies before 1970"),
        ("1::10::5::978300760000", "lies beyond the year 9999 (data.time_unit=s)"),
        ("1::10::5::nan", "timestamp 'nan' is not finite"),
    ],
)
def test_bad_row_of_a_ratings_file(tmp_path: Path, row: str, reason: str) -> None:
    raw = write_ml_1m(tmp_path / "raw")
    with open(raw / "ratings.dat", "a") as file:
        file.write(f"{row}\n5::10::5::2\n")
    with pytest.raises(UserError) as caught:
        prepare_ml(tmp_path, "movielens-dat", raw)
    assert "ratings.dat, row 7: " in str(caught.value) and reason in str(caught.value)
    assert "\n" not in str(caught.value)
    store = prepare_ml(tmp_path, "movielens-dat", raw, on_bad_row="skip")
    assert store.num_events == 7
    assert sum(store.meta["rejects"].values()) == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("12::Two fields", "expected 3 fields separated by '::', got 2"),
        ("x::Title::Drama", "movieId 'x' is not an integer"),
        ("7::Again::Drama", "movieId '7' occurs twice"),
    ],
)
def test_bad_row_of_a_movies_file(tmp_path: Path, row: str, reason: str) -> None:
    raw = write_ml_1m(tmp_path / "raw")
    with open(raw / "movies.dat", "a") as file:
        file.write(row + "\n")
    with pytest.raises(UserError) as caught:
        prepare_ml(tmp_path, "movielens-dat", raw)
    assert "movies.dat, row 5: " in str(caught.value) and reason in str(caught.value)


def test_missing_file_and_wrong_header(tmp_path: Path) -> None:
    raw = write_ml_csv(tmp_path / "raw")
    with pytest.raises(UserError, match=r"no ratings.dat in .*: data=ml needs ratings.dat and movies.dat"):
        prepare_ml(tmp_path, "movielens-dat", raw)
    (raw / "ratings.csv").write_text("user,movie,rating,time\n1,2,3,4\n")
    with pytest.raises(UserError, match="row 1: expected the header userId,movieId,rating,timestamp"):
        prepare_ml(tmp_path, "movielens-csv", raw)


def test_order_of_the_real_ml_1m(ml_1m: SequenceStore) -> None:
    """docs/data.md: how many ties there are, and that the permutation is one."""
    user = np.repeat(np.arange(ml_1m.num_users), np.diff(ml_1m.offsets))
    times = np.asarray(ml_1m.timestamps)
    neighbours = user[1:] == user[:-1]
    tied = neighbours & (times[1:] == times[:-1])
    assert (np.diff(times)[neighbours] >= 0).all()
    assert abs(tied.sum() / neighbours.sum() - 0.54) < 0.005
    last = ml_1m.offsets[1:] - 1
    assert abs((times[last] == times[last - 1]).mean() - 0.42) < 0.005
    assert ml_1m.meta["counts"] == {"users": 6040, "items": 3883, "items_with_events": 3706, "events": 1_000_209}
    assert all(entry["agrees"] for entry in ml_1m.meta["published"].values())
    assert ml_1m.meta["notes"] == ["ML-1M, 5.3 % of the timestamps estimated"]
    assert int(ml_1m.columns["timestamp_estimated"].sum()) == 52_837
    gender = ml_1m.user_attribute("gender")
    assert gender is not None and (gender == "F").sum() == 1_709 and (gender == "M").sum() == 4_331


def test_stable_and_reference_differ_on_the_real_ml_1m(ml_1m: SequenceStore, ml_1m_stable: SequenceStore) -> None:
    """docs/data.md: another held-out item for 26 % of the users, half of the tied pairs in file order."""
    last = ml_1m.offsets[1:] - 1
    held_out, held_out_stable = ml_1m.item_ids[last], ml_1m_stable.item_ids[last]
    assert abs((held_out != held_out_stable).mean() - 0.26) < 0.015
    assert np.array_equal(ml_1m.timestamps, ml_1m_stable.timestamps)
    for a, b in zip(ml_1m.offsets[:200], ml_1m.offsets[1:201], strict=True):
        assert np.array_equal(np.sort(ml_1m.item_ids[a:b]), np.sort(ml_1m_stable.item_ids[a:b]))
