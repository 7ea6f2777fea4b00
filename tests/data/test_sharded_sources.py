"""Every source in shards: user by user what one store of the same files holds, attributes and further columns too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu.config import DataConfig
from hstu.data.sharded_store import ShardedStore
from hstu.data.splits import split_hash
from hstu.data.store import SequenceStore, write_store
from hstu.errors import UserError
from hstu.prepare import prepare
from tests.data import test_kuairand as kuairand
from tests.data.test_sharded import assert_same

BY_TIME = {"split": "global-time", "split_time": "2022-05-06T00:00:00+08:00"}
USERS, ITEMS = 40, 25


def write_kuairand(folder: Path) -> Path:
    """Two logs of standard exposure and one of random, users and videos without attributes, ties of a second."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    for name in (kuairand.EARLY, kuairand.LATE, kuairand.RANDOM):
        lines = [",".join(kuairand.LOG_COLUMNS)]
        for _ in range(150):
            row = kuairand.event(
                int(rng.integers(USERS)), int(rng.integers(1, ITEMS)), int(rng.integers(1_651_000, 1_652_000)) * 10**6,
                is_click=int(rng.integers(2)), long_view=int(rng.integers(2)), play_time_ms=int(rng.integers(9000)),
                tab=int(rng.integers(5)), is_rand=int(name == kuairand.RANDOM),
            )  # fmt: skip
            lines.append(",".join(str(row[column]) for column in kuairand.LOG_COLUMNS))
        (folder / name).write_text("\n".join(lines) + "\n")
    user = kuairand.USER_LINES.splitlines()[2].partition(",")[2]
    users = [f"{u},{user.replace('514', str(u))}" for u in range(0, USERS, 2)]
    (folder / kuairand.USERS).write_text("\n".join([kuairand.USER_HEADER, *users]) + "\n")
    (folder / kuairand.VIDEOS).write_text(kuairand.VIDEO_LINES)
    return folder


def write_movielens(folder: Path, source: str) -> Path:
    """Ratings with ties, films that nobody rated, one that is not listed, users, and flags of estimated times."""
    folder.mkdir()
    rng = np.random.default_rng(2)
    csv, tabs = source == "movielens-csv", source == "movielens-100k"
    separator = "," if csv else "\t" if tabs else "::"
    columns = (
        rng.integers(1, USERS, 300),
        rng.integers(1, ITEMS, 300),
        rng.integers(1, 6, 300),
        rng.integers(1, 60, 300),
    )
    ratings = [separator.join(map(str, row)) for row in zip(*(c.tolist() for c in columns), strict=True)]
    films, users = range(1, ITEMS + 3), range(1, USERS)
    if csv:
        ratings = ["userId,movieId,rating,timestamp", *ratings, "3,999,5,7"]
        (folder / "movies.csv").write_text("movieId,title,genres\n" + "".join(f"{i},Film {i},Drama\n" for i in films))
        np.save(folder / "timestamp_estimated.npy", np.arange(302) % 3 == 0)
    elif tabs:
        flags = "|".join("1" if g == 5 else "0" for g in range(19))
        (folder / "u.item").write_text("".join(f"{i}|Film {i}|01-Jan-1995||http://x|{flags}\n" for i in films))
        (folder / "u.user").write_text("".join(f"{u}|{u % 7 + 20}|M|artist|9{u}\n" for u in users))
    else:
        (folder / "movies.dat").write_text("".join(f"{i}::Film {i}::Drama|War\n" for i in films))
        (folder / "users.dat").write_text("".join(f"{u}::{'FM'[u % 2]}::25::{u % 4}::9{u}\n" for u in users))
    name = "ratings.csv" if csv else "u.data" if tabs else "ratings.dat"
    (folder / name).write_text("\n".join(ratings) + "\n")
    return folder


def write_amazon(folder: Path) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(3)
    rows = [
        f"A{rng.integers(USERS)},B00{rng.integers(ITEMS)},{rng.integers(1, 6)}.0,{rng.integers(9)}" for _ in range(400)
    ]
    (folder / "ratings_Toys.csv").write_text("\n".join(rows) + "\n")
    return folder


def both(folder: Path, source: str, **values: Any) -> list[SequenceStore]:
    """In three shards, and as one store."""
    return [
        prepare(DataConfig(source, source, root=str(folder / "root"), shards=shards, **values), quiet=True)
        for shards in (3, None)
    ]


def one_store(sharded: SequenceStore, path: Path) -> SequenceStore:
    """The users of all shards in the order of one store."""
    order = np.argsort(sharded.user_raw_ids)
    lengths = np.diff(sharded.offsets)[order]
    rows = np.concatenate([np.arange(sharded.offsets[u], sharded.offsets[u + 1]) for u in order])
    return write_store(
        path, offsets=np.concatenate([[0], np.cumsum(lengths)]), item_ids=sharded.item_ids[rows],
        timestamps=sharded.timestamps[rows], num_items=sharded.num_items, meta={"split": sharded.meta["split_asked"]},
    )  # fmt: skip


def assert_alike(sharded: SequenceStore, single: SequenceStore, path: Path) -> None:
    """Events, counts, rejects, items, users, notes; the split hash where the users are put in one order."""
    assert_same(sharded, single)
    assert isinstance(sharded, ShardedStore) and len(sharded.shards) == 3
    assert one_store(sharded, path).meta["split_hash"] == single.meta["split_hash"] == split_hash(single)
    assert sharded.meta["notes"] == single.meta["notes"]
    order = np.argsort(sharded.user_raw_ids)
    for folder, of in (("items", "item_attribute"), ("users", "user_attribute")):
        names = sorted(p.stem for p in (single.path / folder).glob("*.npy"))
        assert names == sorted(p.stem for p in (sharded.shards[0].path / folder).glob("*.npy"))
        for name in names:
            found, expected = (np.asarray(getattr(store, of)(name)) for store in (sharded, single))
            np.testing.assert_array_equal(found[order] if folder == "users" else found, expected, name)
    for name in single.columns:
        codes, expected_codes = sharded.feature_values(name), single.feature_values(name)
        assert (codes is None) == (expected_codes is None)
        assert codes is None or codes.tolist() == expected_codes.tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize("settings", [{}, {"random_log": True, "min_item_events": 12}], ids=["plain", "random"])
def test_kuairand(tmp_path: Path, settings: dict[str, Any]) -> None:
    raw = write_kuairand(tmp_path / "raw")
    sharded, single = both(tmp_path, "kuairand", raw=str(raw), **BY_TIME, **settings)
    assert_alike(sharded, single, tmp_path / "joined")
    assert sharded.user_attribute("follow_user_num") is not None and sharded.feature_values("tab") is not None
    if settings:
        flags = np.asarray(sharded.columns["is_rand"])
        assert flags.dtype == np.int32 and 0 < flags.sum() < len(flags)


@pytest.mark.parametrize("source", ["movielens-100k", "movielens-dat", "movielens-csv"])
@pytest.mark.parametrize("settings", [{}, {"min_item_events": 9, "max_events": 5}], ids=["plain", "filtered"])
def test_movielens(tmp_path: Path, source: str, settings: dict[str, Any]) -> None:
    raw = write_movielens(tmp_path / "raw", source)
    sharded, single = both(tmp_path, source, raw=str(raw), on_bad_row="skip", **settings)
    assert_alike(sharded, single, tmp_path / "joined")
    if not settings:
        assert sharded.num_items == ITEMS + 2 > sharded.meta["counts"]["items_with_events"], "films without ratings"
    if source == "movielens-csv":
        assert sharded.meta["rejects"] == {"item is not in movies.csv": 1} and sharded.meta["rows_read"] == 301
        assert "timestamp_estimated" in sharded.columns
        assert (sharded.path / "rejects.csv").read_text() == (single.path / "rejects.csv").read_text()


def test_amazon(tmp_path: Path) -> None:
    raw = write_amazon(tmp_path / "raw")
    filters = {"min_user_events": 5, "min_item_events": 5, "filter_mode": "iterative"}
    assert_alike(*both(tmp_path, "amazon-2014", raw=str(raw), category="Toys", **filters), tmp_path / "joined")


def test_flags_for_fewer_rows(tmp_path: Path) -> None:
    raw = write_movielens(tmp_path / "raw", "movielens-csv")
    np.save(raw / "timestamp_estimated.npy", np.zeros(301, bool))
    with pytest.raises(UserError, match=r"has shape \(301,\), expected one flag for each of 302 ratings"):
        both(tmp_path, "movielens-csv", raw=str(raw), on_bad_row="skip")


def test_what_is_made_in_memory_has_no_shards() -> None:
    with pytest.raises(UserError, match="data.shards=2: expected null with data=synthetic, which is made in memory"):
        DataConfig(shards=2)
