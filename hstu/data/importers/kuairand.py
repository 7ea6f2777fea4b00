"""KuaiRand (Pure, 1K, 27K) in its published layout: logs, user features, basic video features; CSV or Parquet.

Gao et al., CIKM 2022, https://kuairand.com. The statistic features of the videos are never read: they are averages
over the month that the logs cover, so they tell what happened after an event. ``visible_status`` is the state at
the time of publication and left out for the same reason.
"""

from __future__ import annotations

import csv
import itertools
import re
from pathlib import Path

import numpy as np
import polars as pl

from hstu.config import DataConfig
from hstu.data.attributes import read_attributes
from hstu.data.build import Attributes, RawFiles, RowColumn
from hstu.data.fields import Field, TimeFormat
from hstu.data.sources import unpacked
from hstu.data.tables import Layout, Rejects
from hstu.errors import UserError

FLAGS = ("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view", "is_profile_enter")
DURATIONS = ("play_time_ms", "duration_ms")
LOG_FIELDS = (
    ("user", "int", "user_id"),
    ("item", "int", "video_id"),
    ("time", "time", "time_ms"),
    *((f"value.{name}", "flag", name) for name in FLAGS),
    *((f"value.{name}", "float", name) for name in DURATIONS),
    ("feature.tab", "int", "tab"),
)
USER_CATEGORIES = (
    *("user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author"),
    *("follow_user_num_range", "fans_user_num_range", "friend_user_num_range", "register_days_range"),
    *(f"onehot_feat{i}" for i in range(18)),
)
USER_NUMBERS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
VIDEO_CATEGORIES = ("author_id", "video_type", "upload_type", "music_type", "tag", "upload_dt")
VIDEO_NUMBERS = ("video_duration",)

_ENDING = r"\.(csv|parquet|pq)(\.gz)?"
_LOG = re.compile(
    r"log_(?P<kind>standard|random)_(?P<from>\d+_\d\d)_to_(?P<to>\d+_\d\d)"
    rf"(_(?P<version>pure|1k|27k))?(_part(?P<part>\d+))?{_ENDING}"
)
_FEATURES = re.compile(rf"(?P<kind>user_features|video_features_basic)(_(?P<version>pure|1k|27k))?{_ENDING}")
_LAYOUT = "log_standard_4_22_to_5_08_pure.csv and the like (https://kuairand.com)"


def files(config: DataConfig, raw: list[Path]) -> list[Path]:
    """The logs in the order of time, then the files of user and video features that lie with them."""
    candidates = [p for path in raw for p in (path.rglob("*") if path.is_dir() else [path])]
    logs = sorted((p for p in candidates if _LOG.fullmatch(p.name)), key=_order)
    if not logs:
        raise UserError(f"no KuaiRand log in {raw[0]}: expected {_LAYOUT}")
    wanted = [p for p in logs if config.random_log or _match(p)["kind"] == "standard"]
    if not wanted:
        raise UserError(f"{logs[0]} is the log of random exposure: set data.random_log=true to take it")
    _check_overlap(wanted)
    beside = {p: None for folder in dict.fromkeys(p.parent for p in wanted) for p in sorted(folder.iterdir())}
    features = []
    for kind in ("user_features", "video_features_basic"):
        found = [p for p in dict.fromkeys([*beside, *candidates]) if _is_features(p, kind)]
        if len(found) > 1:
            raise UserError(f"{found[0]} and {found[1]} both hold {kind}: keep one")
        features += found
    _check_version([*wanted, *features])
    return [unpacked(p, config) for p in [*wanted, *features]]


def _match(path: Path) -> dict[str, str | None]:
    match = _LOG.fullmatch(path.name) or _FEATURES.fullmatch(path.name)
    assert match is not None
    return match.groupdict()


def _is_features(path: Path, kind: str) -> bool:
    match = _FEATURES.fullmatch(path.name)
    return match is not None and match["kind"] == kind


def _day(text: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in (text or "").split("_"))


def _order(path: Path) -> tuple[tuple[int, ...], bool, int, str]:
    """Sorts logs by their first day, standard before random, then by part."""
    found = _match(path)
    return _day(found["from"]), found["kind"] == "random", int(found["part"] or 0), path.name


def _check_overlap(logs: list[Path]) -> None:
    """Raises UserError where two logs hold the same days, as a file and a cut of it do."""
    for a, b in itertools.combinations(logs, 2):
        first, second = _match(a), _match(b)
        same_part = first["part"] is None or second["part"] is None or first["part"] == second["part"]
        apart = _day(first["to"]) < _day(second["from"]) or _day(second["to"]) < _day(first["from"])
        if first["kind"] == second["kind"] and same_part and not apart:
            raise UserError(f"{a} and {b} hold the same days, whose events would count twice: give one with data.raw")


def _check_version(paths: list[Path]) -> None:
    versions = {version: p for p in paths if (version := _match(p)["version"]) is not None}
    if len(versions) > 1:
        names = " and ".join(str(p) for p in versions.values())
        raise UserError(f"{names} belong to different versions of KuaiRand, whose ids differ: give one with data.raw")


def describe(config: DataConfig, paths: list[Path]) -> RawFiles:
    logs = [p for p in paths if _LOG.fullmatch(p.name)]
    users = next((p for p in paths if _is_features(p, "user_features")), None)
    videos = next((p for p in paths if _is_features(p, "video_features_basic")), None)

    def attributes(rejects: Rejects) -> Attributes:
        of_users = None if users is None else _read_features(users, "user_id", USER_CATEGORIES, USER_NUMBERS)
        if videos is None:
            return None, of_users
        of_videos = _read_features(videos, "video_id", VIDEO_CATEGORIES, VIDEO_NUMBERS)
        return of_videos.with_columns(pl.col("tag").str.replace_all(",", "|")), of_users

    def row_columns(first_rows: list[int], last_row: int) -> dict[str, RowColumn]:
        return {"is_rand": _random_rows(logs, first_rows)} if config.random_log else {}

    missing = [name for name, path in (("user_features", users), ("video_features_basic", videos)) if path is None]
    notes = [f"without attributes from {name}" for name in missing]
    return RawFiles(logs, [_layout(p) for p in logs], attributes, row_columns=row_columns, notes=notes)


def _random_rows(logs: list[Path], first_rows: list[int]) -> RowColumn:
    """int32. 1 where the row of the raw files is a random exposure."""
    flags = np.array([_match(p)["kind"] == "random" for p in logs], np.int32)
    return RowColumn(np.int32, lambda rows: flags[np.searchsorted(first_rows, rows, side="right") - 1])


def _layout(path: Path) -> Layout:
    names = _column_names(path)
    _require(path, names, [name for _, _, name in LOG_FIELDS])
    fields = tuple(Field(role, kind, name, names.index(name)) for role, kind, name in LOG_FIELDS)
    time = TimeFormat(unit="ms")
    if path.suffix == ".csv":
        return Layout("csv", fields, time, ",", len(names), header=True, quote=False)
    return Layout("parquet", fields, time)


def _column_names(path: Path) -> list[str]:
    if path.suffix == ".csv":
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            return [name.strip() for name in next(csv.reader(file), [])]
    try:
        return pl.scan_parquet(path).collect_schema().names()
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read as Parquet ({reason}): it may be truncated; fetch it again") from None


def _require(path: Path, names: list[str], wanted: list[str]) -> None:
    missing = [name for name in wanted if name not in names]
    if missing:
        raise UserError(f"{path}: no column {', '.join(missing)} among {', '.join(names)}: expected {_LAYOUT}")


def _read_features(path: Path, key: str, categories: tuple[str, ...], numbers: tuple[str, ...]) -> pl.DataFrame:
    """``raw_id``, the categories as text without ``.0`` (empty where missing), the numbers as float32."""
    found = read_attributes(path, key=key, columns=[*categories, *numbers], numeric=numbers)
    return found.with_columns(pl.col(name).str.replace(r"^(-?\d+)\.0+$", "${1}") for name in categories)
