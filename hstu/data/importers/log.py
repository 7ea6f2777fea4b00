"""The user's own log: CSV, JSONL or Parquet, one file, a glob or a folder of shards, columns named in config."""

from __future__ import annotations

import csv
import dataclasses
import difflib
import itertools
import json
from pathlib import Path
from typing import Any

import polars as pl

from hstu.config import DataConfig
from hstu.data.attributes import read_attributes
from hstu.data.build import RawFiles
from hstu.data.fields import Field, TimeFormat, find_time_format
from hstu.data.sources import unpacked
from hstu.data.tables import Layout, json_text
from hstu.errors import UserError

FORMATS = {
    ".csv": "csv", ".tsv": "csv", ".txt": "csv", ".dat": "csv", ".inter": "csv",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".pq": "parquet",
}  # fmt: skip
SEPARATORS = (",", "\t", ";", "|")
_SAMPLE_ROWS = 1000


def files(config: DataConfig, raw: list[Path]) -> list[Path]:
    """The shards in the order of their paths, then the files of item and user attributes."""
    shards: list[Path] = []
    for path in raw:
        shards += _in_folder(path, config) if path.is_dir() else [path]
    shards = [unpacked(shard, config) for shard in shards]
    attributes = [_existing(key, path) for key, path in _attribute_files(config).items()]
    shards = [s for s in shards if s.resolve() not in [a.resolve() for a in attributes]]
    if not shards:
        raise UserError(f"{raw[0]} holds no log: expected files ending in {', '.join(FORMATS)}")
    return [*shards, *attributes]


def _attribute_files(config: DataConfig) -> dict[str, str]:
    given = {"items_file": config.items_file, "users_file": config.users_file}
    return {key: path for key, path in given.items() if path}


def _existing(key: str, given: str) -> Path:
    path = Path(given).expanduser()
    if not path.is_file():
        raise UserError(f"data.{key}={given}: no such file")
    return path


def _in_folder(folder: Path, config: DataConfig) -> list[Path]:
    """Files of the format, below ``folder``; hidden files and those named ``_SUCCESS`` and the like are none."""
    found = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith((".", "_"))]
    kind = {p: FORMATS.get(Path(p.name.removesuffix(".gz")).suffix.lower()) for p in sorted(found)}
    found = [
        p for p in kind if kind[p] is not None and kind[p] == (config.format if config.format != "auto" else kind[p])
    ]
    kinds = {str(kind[p]) for p in found}
    if len(kinds) > 1:
        raise UserError(f"{folder} holds {' and '.join(sorted(kinds))} files: say which with data.format")
    return found


def describe(config: DataConfig, paths: list[Path]) -> RawFiles:
    shards, layouts, notes = plan(config, paths)
    return RawFiles(shards, layouts, lambda rejects: attribute_frames(config, paths), notes=notes)


def plan(config: DataConfig, paths: list[Path]) -> tuple[list[Path], list[Layout], list[str]]:
    """The shards among ``paths``, how each is written, and what to tell the reader about it."""
    shards = paths[: len(paths) - len(_attribute_files(config))]
    layouts: list[Layout] = []
    time: TimeFormat | None = None
    for shard in shards:
        layout = _layout(shard, config, time)
        time = layout.time
        layouts.append(layout)
    assert time is not None
    notes = [f"times read as {time.unit} by their magnitude (data.time_unit=auto)"] if time.auto else []
    return shards, _same_types(layouts), notes


def attribute_frames(config: DataConfig, paths: list[Path]) -> tuple[pl.DataFrame | None, pl.DataFrame | None]:
    """Attributes of items and of users: the last of ``paths``, where the config names such files."""
    given = _attribute_files(config)
    frames = {
        key: _read_attributes(key, path, config)
        for key, path in zip(given, paths[len(paths) - len(given) :], strict=True)
    }
    _check_numeric(frames, config)
    return frames.get("items_file"), frames.get("users_file")


def _layout(path: Path, config: DataConfig, time: TimeFormat | None) -> Layout:
    """How ``path`` is written. time: as found in the first shard."""
    kind = config.format if config.format != "auto" else FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path}: unknown ending {path.suffix!r}: set data.format to csv, jsonl or parquet")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    if kind == "csv":
        return _csv_layout(path, config, time)
    if kind == "jsonl":
        return _jsonl_layout(path, config, time)
    return _parquet_layout(path, config, time)


def _wanted(config: DataConfig) -> list[tuple[str, str, str, str]]:
    """(role, kind, column, config key) of every field that is read."""
    columns = config.columns
    wanted = [
        ("user", "id", columns.user, "data.columns.user"),
        ("item", "id", columns.item, "data.columns.item"),
        ("time", "time", columns.time, "data.columns.time"),
    ]
    if columns.action is not None:
        wanted.append(("action", "float", columns.action, "data.columns.action"))
    wanted += [(f"value.{c}", "float", c, "data.columns.values") for c in columns.values]
    wanted += [(f"feature.{c}", "feature", c, "data.columns.features") for c in columns.features]
    names = [*columns.values, *columns.features]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"data.columns.values and data.columns.features name {name!r} twice")
        if "/" in name:
            raise UserError(f"data.columns: {name!r} holds a slash and cannot name a file of the store: rename it")
    return wanted


def _fields(path: Path, config: DataConfig, names: list[str], place: str) -> tuple[Field, ...]:
    """The wanted fields among the columns ``names`` of ``path``; raises UserError for one that is missing."""
    fields = []
    for role, kind, column, key in _wanted(config):
        if names.count(column) > 1:
            raise UserError(f"{path}{place}: column {column!r} occurs twice: rename one")
        if column not in names:
            raise UserError(
                f"{path}{place}: no column {column!r} ({key}) among {', '.join(names)}{_near(column, names, key)}"
            )
        optional = kind == "float" and column in config.columns.optional
        fields.append(Field(role, kind, column, names.index(column), optional))
    return tuple(fields)


def _near(column: str, names: list[str], key: str) -> str:
    lowered = {n.lower().strip(): n for n in names}
    near = difflib.get_close_matches(column.lower(), list(lowered), n=1, cutoff=0.5)
    near = near or [n for n in lowered if column.lower() in n or n in column.lower()][:1]
    return f"; did you mean {key}={lowered[near[0]]}?" if near else f"; set {key}"


# CSV


def _csv_layout(path: Path, config: DataConfig, time: TimeFormat | None) -> Layout:
    sample = _first_lines(path)
    separator = config.separator or _find_separator(path, sample[0], config)
    if len(set(separator)) != 1 or len(separator) > 2:
        raise UserError(f"data.separator={separator!r}: expected one character, or the same twice as in ::")
    rows = [_split(line, separator) for line in sample]
    rows = [row for row in rows if row]
    if config.header:
        names = [n.strip() for n in rows[0]]
        if all(_is_number(n) for n in names):
            raise UserError(f"{path}, row 1: {sample[0]!r} holds numbers, not column names: set data.header=false")
        rows = rows[1:]
        fields = _fields(path, config, names, ", row 1")
    else:
        names = [str(i + 1) for i in range(len(rows[0]))]
        fields = _fields(path, _numbered(config), names, " (data.header=false: columns are numbered from 1)")
    if time is None:
        place = next(f.position for f in fields if f.role == "time")
        values = [row[place].strip() for row in rows if len(row) == len(names) and row[place].strip()]
        time = find_time_format(config.columns.time, values, config.time_unit, str(path))
    fields = _with_action_kind(fields, rows, len(names))
    return Layout("csv", fields, time, separator, len(names), config.header, quote=len(separator) == 1)


def _first_lines(path: Path) -> list[str]:
    with open(path, "rb") as file:
        raw = list(itertools.islice(file, _SAMPLE_ROWS))
    if b"\x00" in raw[0]:
        raise UserError(f"{path} is not UTF-8 text (it holds zero bytes): convert it, for example with iconv -t utf-8")
    if raw[0].startswith((b"PAR1", b"\x1f\x8b", b"PK\x03\x04")):
        raise UserError(f"{path} is not text: it looks like Parquet or an archive; give it its usual ending")
    lines = [line.decode("utf-8-sig", errors="replace").rstrip("\r\n") for line in raw if line.strip()]
    if not lines:
        raise UserError(f"{path} holds only blank lines")
    return lines


def _find_separator(path: Path, line: str, config: DataConfig) -> str:
    scores = {s: line.count(s) + 1000 * (config.columns.user in line.split(s)) for s in SEPARATORS if s in line}
    if not scores:
        raise UserError(
            f"{path}, row 1: none of comma, semicolon, tab and | separates {line[:80]!r}: set data.separator"
        )
    return max(scores, key=lambda s: scores[s])


def _split(line: str, separator: str) -> list[str]:
    if len(separator) == 1 and '"' in line:
        return next(csv.reader([line], delimiter=separator), [])
    return line.split(separator)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _numbered(config: DataConfig) -> DataConfig:
    """Without a header the default names stand for the first three columns."""
    columns = config.columns
    defaults = {"user": ("user", "1"), "item": ("item", "2"), "time": ("timestamp", "3")}
    changed: dict[str, Any] = {k: number for k, (name, number) in defaults.items() if getattr(columns, k) == name}
    return dataclasses.replace(config, columns=dataclasses.replace(columns, **changed))


def _with_action_kind(fields: tuple[Field, ...], rows: list[list[Any]], width: int) -> tuple[Field, ...]:
    """An action column without any number in the sample holds event names: it is coded like a feature."""
    found = []
    for f in fields:
        if f.role == "action":
            values = [row[f.position] for row in rows if len(row) == width and row[f.position] not in ("", None)]
            if values and not any(_is_number(str(json_text(v))) for v in values):
                f = dataclasses.replace(f, kind="name")
        found.append(f)
    return tuple(found)


# JSONL


def _jsonl_layout(path: Path, config: DataConfig, time: TimeFormat | None) -> Layout:
    records: list[dict[str, Any]] = []
    for line in _first_lines(path):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # reported with its row when the file is read
        if isinstance(record, dict):
            records.append(record)
    if not records:
        raise UserError(
            f"{path}: none of the first {_SAMPLE_ROWS} lines is a JSON object: one object a line is expected"
        )
    names = list(dict.fromkeys(itertools.chain.from_iterable(records)))
    fields = _fields(path, config, names, "")
    rows = [[record.get(name) for name in names] for record in records]
    if time is None:
        values = [str(json_text(r.get(config.columns.time))) for r in records if r.get(config.columns.time) is not None]
        time = find_time_format(config.columns.time, values, config.time_unit, str(path))
    return Layout("jsonl", _with_action_kind(fields, rows, len(names)), time)


# Parquet


def _parquet_layout(path: Path, config: DataConfig, time: TimeFormat | None) -> Layout:
    try:
        schema = pl.scan_parquet(path).collect_schema()
        fields = _fields(path, config, schema.names(), "")
        if time is None:
            column = config.columns.time
            if schema[column].is_temporal():
                time = TimeFormat(kind="iso", unit="s")
            else:
                values = pl.scan_parquet(path).select(pl.col(column).drop_nulls()).head(_SAMPLE_ROWS).collect()
                time = find_time_format(
                    column, [str(v) for v in values.to_series().to_list()], config.time_unit, str(path)
                )
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read as Parquet ({reason}): it may be truncated; fetch it again") from None
    named = (pl.String, pl.Categorical, pl.Enum)
    fields = tuple(
        dataclasses.replace(f, kind="name") if f.role == "action" and schema[f.column] in named else f for f in fields
    )
    return Layout("parquet", fields, time)


def _same_types(layouts: list[Layout]) -> list[Layout]:
    """Shards must agree on what is a number: one with event names makes the action a name in all."""
    if not any(f.kind == "name" for layout in layouts for f in layout.fields):
        return layouts
    return [
        dataclasses.replace(
            layout,
            fields=tuple(dataclasses.replace(f, kind="name") if f.role == "action" else f for f in layout.fields),
        )
        for layout in layouts
    ]


# Attributes


def _read_attributes(key: str, path: Path, config: DataConfig) -> pl.DataFrame:
    """``raw_id`` (the file's first column) and every other column of ``data.items_file`` or ``data.users_file``."""
    separator = ","
    if path.suffix.lower() not in (".parquet", ".pq"):
        separator = next((s for s in SEPARATORS if s in _first_lines(path)[0]), ",")
    return read_attributes(path, f"data.{key}=", separator=separator, numeric=config.columns.numeric)


def _check_numeric(frames: dict[str, pl.DataFrame], config: DataConfig) -> None:
    known = [name for frame in frames.values() for name in frame.columns[1:]]
    for name in config.columns.numeric:
        if name not in known:
            raise UserError(
                f"data.columns.numeric={name}: expected columns of data.items_file and data.users_file"
                f" ({', '.join(known) or 'none given'})"
            )
