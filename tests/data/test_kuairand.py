"""The KuaiRand importer, on small files in the published layout and on the real ones."""

from __future__ import annotations

import gzip
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from hstu.config import DataConfig
from hstu.data.importers.kuairand import DURATIONS, FLAGS
from hstu.data.splits import make_event_split
from hstu.data.store import SequenceStore
from hstu.errors import UserError
from hstu.prepare import prepare
from tests.data.logs import nothing_left, sequences

MAY_6 = 1_651_766_400
"""Midnight of 6 May 2022 in Beijing, s."""
LOG_COLUMNS = (
    *("user_id", "video_id", "date", "hourmin", "time_ms", "is_click", "is_like", "is_follow", "is_comment"),
    *("is_forward", "is_hate", "long_view", "play_time_ms", "duration_ms", "profile_stay_time"),
    *("comment_stay_time", "is_profile_enter", "is_rand", "tab"),
)
EARLY, LATE = "log_standard_4_08_to_4_21_pure.csv", "log_standard_4_22_to_5_08_pure.csv"
RANDOM = "log_random_4_22_to_5_08_pure.csv"
USERS, VIDEOS = "user_features_pure.csv", "video_features_basic_pure.csv"


def event(user: int, video: int, time_ms: int, **values: Any) -> dict[str, Any]:
    row = dict.fromkeys(LOG_COLUMNS, 0)
    return {**row, "user_id": user, "video_id": video, "time_ms": time_ms, "tab": 1, **values}


EVENTS = {
    EARLY: [event(7, 30, 1_650_000_000_900, is_click=1, play_time_ms=8001, duration_ms=9000)],
    LATE: [
        event(7, 12, 1_650_700_000_800, tab=10),  # the same second as the next, and later in it
        event(7, 11, 1_650_700_000_100, is_click=1, long_view=1, is_like=1, tab=2),
        event(9, 30, 1_651_800_000_000, is_profile_enter=1, is_hate=1),
        event(7, 40, 1_651_900_000_000, is_follow=1, is_comment=1, is_forward=1),  # not among the videos
    ],
    RANDOM: [event(9, 13, 1_650_800_000_000, is_rand=1)],
}
VIDEO_LINES = """\
video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,music_id,music_type,tag
11,500,NORMAL,2022-04-10,LongImport,0.0,87433.0,720.0,1280.0,9155697141,9.0,39
12,501,AD,2022-04-10,Kmovie,0.0,,720.0,1280.0,6355810746,4.0,"20,67"
13,501,NORMAL,2022-04-09,Web,0.0,5000.0,720.0,1280.0,1,8.0,1
30,500,NORMAL,2022-04-11,Web,0.0,9233.0,720.0,1280.0,0,,
"""
USER_HEADER = (
    "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,follow_user_num,"
    "follow_user_num_range,fans_user_num,fans_user_num_range,friend_user_num,friend_user_num_range,register_days,"
    "register_days_range," + ",".join(f"onehot_feat{i}" for i in range(18))
)
USER_LINES = (
    f"{USER_HEADER}\n"
    '3,UNKNOWN,0,-124,0,1,"(0,10]",2,"[1,10)",0,0,31,31-60,0,0,0,0,,0,0,0,0,0,0,0,0.0,0.0,0.0,0.0,0.0,0.0\n'
    '7,full_active,0,1,1,514,500+,150,"[100,1k)",34,"[30,60)",799,730+,'
    "1,1,29,949,1.0,0,0,14,135,6,3,0,,1.0,0.0,0.0,0.0,0.0\n"
)


def write_kuairand(folder: Path, names: tuple[str, ...] = (EARLY, LATE, RANDOM), features: bool = True) -> Path:
    """The logs ``names`` and the features, in the published layout; a name that ends in .parquet is written so."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        frame = pl.DataFrame(EVENTS[str(Path(name).with_suffix(".csv"))])
        frame.write_csv(folder / name) if name.endswith(".csv") else frame.write_parquet(folder / name)
    if features:
        (folder / USERS).write_text(USER_LINES)
        (folder / VIDEOS).write_text(VIDEO_LINES)
        (folder / "video_features_statistic_pure.csv").write_text("video_id,counts,show_cnt\n11,66,75.2\n")
    return folder


def prepare_kuairand(tmp_path: Path, raw: Path | str, **values: Any) -> SequenceStore:
    defaults = {"protocol": "stable", "split": "global-time", "split_time": "2022-05-06T00:00:00+08:00"}
    config = DataConfig(
        name="kuairand", source="kuairand", raw=str(raw), root=str(tmp_path / "root"), **{**defaults, **values}
    )
    return prepare(config, quiet=True)


def test_published_layout(tmp_path: Path) -> None:
    raw = write_kuairand(tmp_path / "raw" / "KuaiRand-Pure" / "data").parents[1]
    store = prepare_kuairand(tmp_path, raw)
    assert sequences(store) == {
        7: [(30, 1_650_000_000), (11, 1_650_700_000), (12, 1_650_700_000), (40, 1_651_900_000)],  # by ms
        9: [(30, 1_651_800_000)],
    }
    assert store.actions is None
    assert set(store.columns) == {*FLAGS, *DURATIONS, "tab"}
    assert store.columns["is_click"].tolist() == [1, 1, 0, 0, 0]
    assert store.columns["is_like"].tolist() == store.columns["long_view"].tolist() == [0, 1, 0, 0, 0]
    assert store.columns["is_profile_enter"].tolist() == store.columns["is_hate"].tolist() == [0, 0, 0, 0, 1]
    assert store.columns["is_follow"].tolist() == store.columns["is_forward"].tolist() == [0, 0, 0, 1, 0]
    assert store.columns["play_time_ms"].tolist() == [8001, 0, 0, 0, 0]
    assert store.columns["duration_ms"].tolist() == [9000, 0, 0, 0, 0]
    assert {store.columns[name].dtype for name in (*FLAGS, *DURATIONS)} == {np.dtype(np.float32)}
    tabs = store.feature_values("tab")
    assert tabs is not None and tabs.tolist() == [1, 2, 10]  # as numbers, not as texts
    assert store.columns["tab"].tolist() == [1, 2, 3, 1, 1] and store.columns["tab"].dtype == np.int32
    assert store.meta["notes"] == []


def test_video_and_user_attributes(tmp_path: Path) -> None:
    store = prepare_kuairand(tmp_path, write_kuairand(tmp_path / "raw"))
    assert store.item_raw_ids.tolist() == [11, 12, 30, 40]  # videos of the log; 40 has no features
    expected = {
        "author_id": ["500", "501", "500", ""],
        "video_type": ["NORMAL", "AD", "NORMAL", ""],
        "upload_type": ["LongImport", "Kmovie", "Web", ""],
        "upload_dt": ["2022-04-10", "2022-04-10", "2022-04-11", ""],
        "music_type": ["9", "4", "", ""],
        "tag": ["39", "20|67", "", ""],
    }
    for name, values in expected.items():
        found = store.item_attribute(name)
        assert found is not None and found.tolist() == values, name
    duration = store.item_attribute("video_duration")
    assert duration is not None and duration.dtype == np.float32
    assert np.array_equal(duration, np.array([87433, np.nan, 9233, np.nan], np.float32), equal_nan=True)
    assert store.item_attribute("show_cnt") is None and store.item_attribute("visible_status") is None
    assert store.user_raw_ids.tolist() == [7, 9]  # 9 has no features
    users = {"user_active_degree": ["full_active", ""], "fans_user_num_range": ["[100,1k)", ""]}
    users |= {"onehot_feat3": ["949", ""], "onehot_feat4": ["1", ""], "onehot_feat12": ["", ""]}
    for name, values in users.items():
        found = store.user_attribute(name)
        assert found is not None and found.tolist() == values, name
    follows = store.user_attribute("follow_user_num")
    assert follows is not None and follows.dtype == np.float32
    assert np.array_equal(follows, np.array([514, np.nan], np.float32), equal_nan=True)
    assert store.user_attribute("zip_code") is None


@pytest.mark.parametrize("names", [(LATE,), (EARLY,), (LATE.replace(".csv", ".parquet"), EARLY)])
def test_any_subset_of_the_logs_as_csv_or_parquet(tmp_path: Path, names: tuple[str, ...]) -> None:
    whole = prepare_kuairand(tmp_path, write_kuairand(tmp_path / "whole"), split="leave-last-out", split_time=None)
    part = prepare_kuairand(tmp_path, write_kuairand(tmp_path / "part", names), split="leave-last-out", split_time=None)
    times = {e["time_ms"] // 1000 for name in names for e in EVENTS[str(Path(name).with_suffix(".csv"))]}
    expected = {user: [e for e in found if e[1] in times] for user, found in sequences(whole).items()}
    assert sequences(part) == {user: found for user, found in expected.items() if found}


def test_a_file_or_a_glob_as_raw_finds_the_features_beside_it(tmp_path: Path) -> None:
    raw = write_kuairand(tmp_path / "raw")
    folder = prepare_kuairand(tmp_path, raw)
    for pattern in ("log_standard_*.csv", "*.csv"):
        assert prepare_kuairand(tmp_path, str(raw / pattern)).path == folder.path
    one = prepare_kuairand(tmp_path, raw / LATE)
    assert one.num_events == 4 and one.user_attribute("onehot_feat3") is not None


def test_features_as_parquet_and_gzip(tmp_path: Path) -> None:
    plain = prepare_kuairand(tmp_path, write_kuairand(tmp_path / "plain"))
    raw = write_kuairand(tmp_path / "raw")
    pl.read_csv(raw / VIDEOS).write_parquet((raw / VIDEOS).with_suffix(".parquet"))  # music_type as float, id as int
    for name in (USERS, LATE):
        (raw / f"{name}.gz").write_bytes(gzip.compress((raw / name).read_bytes()))
    for name in (USERS, VIDEOS, LATE):
        (raw / name).unlink()
    store = prepare_kuairand(tmp_path, raw)
    assert sequences(store) == sequences(plain)
    files = [*(plain.path / "items").glob("*.npy"), *(plain.path / "users").glob("*.npy")]
    assert len(files) == 1 + 7 + 1 + 30
    for file in files:
        assert file.read_bytes() == (store.path / file.relative_to(plain.path)).read_bytes(), file.name


def test_random_exposures_on_request(tmp_path: Path) -> None:
    raw = write_kuairand(tmp_path / "raw")
    store = prepare_kuairand(tmp_path, raw, random_log=True)
    assert sequences(store)[9] == [(13, 1_650_800_000), (30, 1_651_800_000)]
    assert store.columns["is_rand"].tolist() == [0, 0, 0, 0, 1, 0]
    assert "is_rand" not in prepare_kuairand(tmp_path, raw).columns
    with pytest.raises(UserError, match="is the log of random exposure: set data.random_log=true"):
        prepare_kuairand(tmp_path, raw / RANDOM)
    with pytest.raises(UserError, match="data.random_log=True: expected a data.source of kuairand"):
        DataConfig(source="movielens-dat", random_log=True)


def test_parts_of_one_log_and_another_version(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for part, event_row in enumerate(EVENTS[LATE], start=1):
        pl.DataFrame([event_row]).write_csv(raw / f"log_standard_4_22_to_5_08_27k_part{part}.csv")
    store = prepare_kuairand(tmp_path, raw, split="leave-last-out", split_time=None)
    assert store.num_events == len(EVENTS[LATE])
    (raw / "user_features_1k.csv").write_text(USER_LINES)
    with pytest.raises(UserError, match="belong to different versions of KuaiRand"):
        prepare_kuairand(tmp_path, raw)


def test_protocols_order_ties_of_the_same_millisecond(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    tied = [event(1, video, 1_650_700_000_123) for video in range(50)]
    pl.DataFrame(tied).write_csv(raw / LATE)
    stores = {
        p: prepare_kuairand(tmp_path, raw, protocol=p, split="leave-last-out", split_time=None)
        for p in ("stable", "reference")
    }
    assert stores["stable"].item_ids.tolist() == list(range(1, 51))
    assert stores["reference"].item_ids.tolist() != list(range(1, 51))
    assert sorted(stores["reference"].item_ids.tolist()) == list(range(1, 51))


def test_log_without_features_is_noted(tmp_path: Path) -> None:
    store = prepare_kuairand(tmp_path, write_kuairand(tmp_path / "raw", features=False))
    assert store.user_attribute("user_active_degree") is None and store.item_attribute("tag") is None
    assert store.meta["notes"] == [
        "kuairand, without attributes from user_features",
        "kuairand, without attributes from video_features_basic",
    ]


def edited(tmp_path: Path, name: str, old: str, new: str) -> Path:
    raw = write_kuairand(tmp_path / "raw")
    text = (raw / name).read_text()
    assert old in text
    (raw / name).write_text(text.replace(old, new, 1))
    return raw


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (LATE, "is_like", "liked", f"{LATE}: no column is_like among user_id, video_id, date"),
        (USERS, "onehot_feat7", "feature7", f"{USERS}: no column onehot_feat7 among user_id"),
        (VIDEOS, "tag", "tags", f"{VIDEOS}: no column tag among video_id"),
        (LATE, "1650700000100,1,1,", "1650700000100,1,2,", f"{LATE}, row 3: is_like '2' is not 0 or 1"),
        (LATE, "1650700000100,1,", "1650700000100,yes,", f"{LATE}, row 3: is_click 'yes' is not a number"),
        (LATE, "1650700000100,1,", "1650700000100,,", f"{LATE}, row 3: is_click is missing"),
        (LATE, ",1650700000100,", ",,", f"{LATE}, row 3: time_ms is missing"),
        (LATE, "7,12,", "7,twelve,", f"{LATE}, row 2: video_id 'twelve' is not an integer"),
        (VIDEOS, "87433.0", "long", f"{VIDEOS}, row 2: video_duration 'long' is not a number"),
        (VIDEOS, "12,501", "11,501", f"{VIDEOS}: video_id '11' occurs twice"),
        (USERS, "\n3,", "\n,", f"{USERS}, row 2: user_id is missing"),
    ],
    ids=[
        *("no label column", "no user column", "no video column", "flag 2", "flag yes", "no flag", "no time"),
        *("video id", "duration", "video twice", "no user id"),
    ],
)
def test_bad_input(tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        prepare_kuairand(tmp_path, edited(tmp_path, name, old, new))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert nothing_left(tmp_path)


def test_bad_rows_can_be_left_out(tmp_path: Path) -> None:
    raw = edited(tmp_path, LATE, "1650700000100,1,1,", "1650700000100,1,2,")
    store = prepare_kuairand(tmp_path, raw, on_bad_row="skip")
    assert store.num_events == 4
    assert store.meta["rejects"] == {"is_like is not 0 or 1": 1}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (LATE, "row 5: expected 19 fields separated by ',', got 7"),
        (USERS, "the last row has 7 of 31 fields: the file may be truncated"),
        (VIDEOS, "the last row has 7 of 12 fields: the file may be truncated"),
    ],
)
def test_truncated_csv(tmp_path: Path, name: str, message: str) -> None:
    raw = write_kuairand(tmp_path / "raw")
    lines = (raw / name).read_text().splitlines()
    lines[-1] = ",".join(lines[-1].split(",")[:7])
    (raw / name).write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        prepare_kuairand(tmp_path, raw)
    assert f"{name}" in str(caught.value) and message in str(caught.value)


def test_truncated_parquet(tmp_path: Path) -> None:
    raw = write_kuairand(tmp_path / "raw", (LATE.replace(".csv", ".parquet"),))
    path = raw / LATE.replace(".csv", ".parquet")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read as Parquet .*fetch it again"):
        prepare_kuairand(tmp_path, raw)


def test_logs_that_overlap(tmp_path: Path) -> None:
    raw = write_kuairand(tmp_path / "raw")
    pl.DataFrame(EVENTS[LATE]).write_parquet(raw / "log_standard_4_25_to_5_08.parquet")
    with pytest.raises(UserError, match="hold the same days, whose events would count twice"):
        prepare_kuairand(tmp_path, raw)


def test_folder_without_a_log(tmp_path: Path) -> None:
    raw = write_kuairand(tmp_path / "raw", ())
    with pytest.raises(UserError, match=r"no KuaiRand log in .*: expected log_standard_4_22_to_5_08_pure.csv"):
        prepare_kuairand(tmp_path, raw)


def test_published_archive(tmp_path: Path) -> None:
    data = write_kuairand(tmp_path / "KuaiRand-Pure" / "data")
    archive = tmp_path / "KuaiRand-Pure.tar.gz"
    with tarfile.open(archive, "w:gz") as out:
        out.add(data.parent, "KuaiRand-Pure")
    assert sequences(prepare_kuairand(tmp_path, archive)) == sequences(prepare_kuairand(tmp_path, data))


def test_real_kuairand_pure(tmp_path: Path) -> None:
    folder = Path(os.environ.get("HSTU_DATA_DIR", "")) / "kuairand-pure"
    if not os.environ.get("HSTU_DATA_DIR") or not folder.is_dir():
        pytest.skip("HSTU_DATA_DIR does not point to a folder with kuairand-pure")
    if not (folder / "log_standard_4_25_to_5_08.parquet").is_file():
        pytest.skip(f"{folder} holds other logs than log_standard_4_25_to_5_08.parquet")
    store = prepare_kuairand(tmp_path, folder)
    counts = {"users": 25_156, "items": 6_361, "items_with_events": 6_361, "events": 222_444}
    assert store.meta["counts"] == counts
    raw = pl.read_parquet(folder / "log_standard_4_25_to_5_08.parquet")
    for name in (*FLAGS, *DURATIONS):
        assert store.columns[name].sum(dtype=np.float64) == raw[name].sum(), name
    tabs = store.feature_values("tab")
    assert tabs is not None
    assert np.bincount(tabs[store.columns["tab"] - 1]).tolist() == np.bincount(raw["tab"].to_numpy()).tolist()
    split = make_event_split(store)
    assert split.validation is not None
    assert len(split.test) == raw.filter(pl.col("time_ms") >= MAY_6 * 1000).height == 42_315
    assert len(split.validation) >= 42_315
