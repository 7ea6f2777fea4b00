"""Attributes of items and users: files with one row for each, read into a frame and written as columns of the store."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from hstu.errors import UserError

_TAIL_BYTES = 1 << 16
"""The last line of an attribute file is looked for in so many bytes."""


def read_attributes(
    path: Path,
    label: str = "",
    *,
    separator: str = ",",
    key: str | None = None,
    columns: Sequence[str] | None = None,
    numeric: Sequence[str] = (),
) -> pl.DataFrame:
    """``raw_id`` (unique) and the columns of a CSV or Parquet file: ``numeric`` ones as float32, the others as text.

    label: what messages put before the path, as in ``data.items_file=``. key: column of the id; None: the first.
    columns: those that are read; None: all. numeric: the ones of them that hold numbers; others are ignored.
    Raises UserError where a column is missing, a number is none, an id is empty or occurs twice (rows without an
    id are left out where ``key`` is None), and where the file is cut off.
    """
    is_parquet = path.suffix.lower() in (".parquet", ".pq")
    try:
        scan = pl.scan_parquet(path) if is_parquet else pl.scan_csv(path, separator=separator, infer_schema=False)
        names = scan.collect_schema().names()
        found_key = key if key is not None else names[0]
        wanted = [found_key, *(columns if columns is not None else [n for n in names if n != found_key])]
        missing = [name for name in wanted if name not in names]
        if missing:
            raise UserError(f"{label}{path}: no column {', '.join(missing)} among {', '.join(names)}")
        if not is_parquet:
            _check_end(path, separator, len(names), label)
        frame = scan.select(wanted).rename({found_key: "raw_id"}).collect()
    except pl.exceptions.PolarsError as error:
        raise UserError(f"{label}{path} cannot be read: {str(error).splitlines()[0]}") from None
    numeric = [name for name in numeric if name in frame.columns]
    first_row = 1 if is_parquet else 2
    if key is None:
        frame = frame.with_row_index("row", offset=first_row).filter(pl.col("raw_id").is_not_null())
    else:
        frame = frame.with_row_index("row", offset=first_row)
        _fail_at(frame, pl.col("raw_id").is_null(), f"{label}{path}", found_key, "raw_id", "is missing")
    for name in numeric:
        number = pl.col(name).cast(pl.Float32, strict=False)
        bad = (number.is_null() & pl.col(name).is_not_null()) | ~number.is_finite().fill_null(True)
        _fail_at(frame, bad, f"{label}{path}", name, name, "is not a number")
    twice = frame.filter(pl.col("raw_id").is_duplicated())
    if len(twice):
        raise UserError(f"{label}{path}: {found_key} {twice['raw_id'][0]!r} occurs twice: keep one row for each")
    others = [n for n in frame.columns if n not in ("row", "raw_id", *numeric)]
    return frame.select(
        "raw_id", *(pl.col(others).cast(pl.String),) if others else (), *(pl.col(n).cast(pl.Float32) for n in numeric)
    )


def _fail_at(frame: pl.DataFrame, bad: pl.Expr, where: str, name: str, column: str, what: str) -> None:
    rows = frame.filter(bad)
    if len(rows):
        value = "" if rows[column][0] is None else f" {rows[column][0]!r}"
        raise UserError(f"{where}, row {rows['row'][0]}: {name}{value} {what}: mend the row")


def _check_end(path: Path, separator: str, width: int, label: str) -> None:
    """Raises UserError where the last line has too few fields, as in a download that broke off."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - _TAIL_BYTES), os.SEEK_SET)
        lines = [line for line in file.read().decode("utf-8", errors="replace").splitlines() if line.strip()]
    last = next(csv.reader(lines[-1:], delimiter=separator), [])
    if len(last) < width:
        raise UserError(
            f"{label}{path}: the last row has {len(last)} of {width} fields: the file may be truncated, fetch it again"
        )


def attribute_columns(attributes: pl.DataFrame, raw_ids: np.ndarray) -> dict[str, np.ndarray]:
    """By name, [len(raw_ids)] the value of each id: float32 (missing: NaN) or unicode (missing: empty).

    attributes: ``raw_id`` and the columns; floating-point ones are numbers, the others text. Ids that they do not
    list are missing.
    """
    listed = attributes.select(pl.col("raw_id").cast(pl.String)).with_row_index("index")
    wanted = pl.DataFrame({"raw_id": _series(raw_ids).cast(pl.String)})
    rows = wanted.join(listed, on="raw_id", how="left", maintain_order="left")["index"]
    return {name: _array(attributes[name].gather(rows)) for name in attributes.columns[1:]}


def _series(raw_ids: np.ndarray) -> pl.Series:
    return pl.Series(raw_ids if raw_ids.dtype.kind == "i" else raw_ids.tolist())


def _array(values: pl.Series) -> np.ndarray:
    if values.dtype.is_float():
        return values.cast(pl.Float32).fill_null(float("nan")).to_numpy()
    return values.cast(pl.String).fill_null("").to_numpy().astype(np.str_)
