"""Reads raw tables (CSV, JSONL, Parquet) into checked, typed Arrow parts on disk.

The quick way lets polars parse a file as a stream. Where that finds anything amiss, the file is read again line
by line, which is slower and says which row is bad, and why.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from hstu.data.fields import Field, TimeFormat, read_field
from hstu.errors import UserError

ROW = "row"
_BATCH_LINES = 200_000
_TEXT_LIMIT = 500
"""Characters of a rejected row that the rejects file keeps."""


@dataclass(frozen=True)
class Layout:
    """How a file is written. separator: one character, or two equal ones as in ``::``; None for JSONL, Parquet."""

    format: str
    fields: tuple[Field, ...]
    time: TimeFormat
    separator: str | None = None
    num_columns: int = 0
    header: bool = False
    quote: bool = True
    encoding: str = "utf-8"


@dataclass
class Rejects:
    """Rows that were left out; ``on_bad_row=fail`` raises at the first one instead."""

    path: Path
    on_bad_row: str
    reasons: dict[str, int] = field(default_factory=dict)
    first: str | None = None

    def add(self, file: Path, row: int, reason: str, text: str) -> None:
        """Counts a bad row of ``file`` (row 1 is the first line) or raises UserError."""
        message = f"{file}, row {row}: {reason}"
        if self.on_bad_row == "fail":
            raise UserError(f"{message}; mend the row, or leave such rows out with data.on_bad_row=skip")
        new = not self.reasons
        self.first = self.first or message
        kind = re.sub(r" \(.*\)$|( separated by)? '[^']*'", "", reason)
        self.reasons[kind] = self.reasons.get(kind, 0) + 1
        with open(self.path, "a", encoding="utf-8", newline="") as out:
            writer = csv.writer(out)
            if new:
                writer.writerow(["file", "row", "reason", "text"])
            writer.writerow([str(file), row, reason, text[:_TEXT_LIMIT]])

    @property
    def count(self) -> int:
        return sum(self.reasons.values())


@dataclass
class Table:
    """Checked rows: Arrow ``parts`` with the fields' columns and ``row``, the global row number."""

    parts: list[Path]
    files: list[Path]
    first_rows: list[int]
    """Global number that precedes the first row of each file."""
    num_rows: int
    per_second: int
    """Units of the column ``time`` in a second."""
    last_row: int
    """Global number of the last row."""

    def scan(self) -> pl.LazyFrame:
        return pl.scan_ipc(self.parts)

    def locate(self, row: int) -> tuple[Path, int]:
        """File and its row (1 is the first line) of a global row number."""
        index = max(i for i, first in enumerate(self.first_rows) if first < row)
        return self.files[index], row - self.first_rows[index]


def read_tables(files: list[Path], layouts: list[Layout], work: Path, rejects: Rejects) -> Table:
    """Reads every file with its layout. All layouts share roles, kinds and the time format."""
    parts: list[Path] = []
    first_rows: list[int] = []
    rows = 0
    for found, last in read_parts(files, layouts, work, rejects):
        first_rows.append(rows)
        parts += found
        rows += last
    num_rows = sum(num_part_rows(p) for p in parts)
    check_usable(num_rows, files, rejects)
    return Table(parts, files, first_rows, num_rows, layouts[0].time.per_second, rows)


def read_parts(
    files: list[Path], layouts: list[Layout], work: Path, rejects: Rejects
) -> Iterator[tuple[list[Path], int]]:
    """Reads the files one after the other; yields the Arrow parts of each and its number of rows, bad ones included."""
    rows = 0
    types: dict[str, tuple[pl.DataType, Path]] = {}
    for number, (file, layout) in enumerate(zip(files, layouts, strict=True)):
        parts, last = _read_file(file, layout, rows, work / f"part-{number:06d}", rejects)
        _check_types(parts, file, types)
        yield parts, last
        rows += last


def num_part_rows(part: Path) -> int:
    return int(pl.scan_ipc(part).select(pl.len()).collect().item())


def check_usable(num_rows: int, files: list[Path], rejects: Rejects) -> None:
    """Raises UserError where no good row is left."""
    if num_rows == 0:
        detail = f"; the first bad one: {rejects.first}" if rejects.first else ""
        raise UserError(f"no usable row in {files[0]}{' and the other files' if len(files) > 1 else ''}{detail}")


def _check_types(parts: list[Path], file: Path, first: dict[str, tuple[pl.DataType, Path]]) -> None:
    """Shards of the same log must agree on the type of an id. first: types and files so far; completed here."""
    for part in parts:
        for name, dtype in pl.read_ipc_schema(part).items():
            before = first.setdefault(name, (dtype, file))
            if before[0] != dtype:
                column = name.partition(".")[2] or name
                raise UserError(
                    f"{file}: column {column} has type {dtype}, but {before[0]} in {before[1]}: convert one of them"
                )


def row_texts(file: Path, rows: set[int]) -> dict[int, str]:
    """The text of some rows of a text file, for the rejects."""
    texts: dict[int, str] = {}
    with open(file, encoding="utf-8", errors="replace") as source:
        for number, line in enumerate(source, start=1):
            if number in rows:
                texts[number] = line.rstrip("\r\n")
                if len(texts) == len(rows):
                    break
    return texts


def _read_file(file: Path, layout: Layout, before: int, stem: Path, rejects: Rejects) -> tuple[list[Path], int]:
    """Parts of one file and its number of lines. before: rows of the files before it."""
    part = stem.with_suffix(".arrow")
    if layout.format == "parquet":
        return [part], _read_parquet(file, layout, before, part, rejects)
    try:
        frame = _scan_text(file, layout)
        _sink(_checked(frame, layout, before, int(layout.header)), part)
        bad, last = pl.scan_ipc(part).select(pl.col("bad").any(), pl.col(ROW).max()).collect().row(0)
        if not bad:
            return [part], (last - before) if last is not None else 0
    except pl.exceptions.PolarsError as error:
        raise_if_disk_full(error)
    part.unlink(missing_ok=True)
    return _read_slowly(file, layout, before, stem, rejects)


def _scan_text(file: Path, layout: Layout) -> pl.LazyFrame:
    if layout.format == "jsonl":
        types = {f.column: _native_type(f, layout.time) for f in layout.fields}
        return pl.scan_ndjson(file, schema=types).select(pl.col(f.column).alias(f.role) for f in layout.fields)
    assert layout.separator is not None
    step = len(layout.separator)
    names = [f"c{i}" for i in range((layout.num_columns - 1) * step + 1)]
    schema: dict[str, Any] = dict.fromkeys(names, pl.String)
    blanks = [n for i, n in enumerate(names) if i % step]
    for f in layout.fields:
        schema[names[f.position * step]] = _native_type(f, layout.time)
    frame = pl.scan_csv(
        file,
        separator=layout.separator[0],
        has_header=False,
        skip_lines=int(layout.header),
        schema=schema,
        quote_char='"' if layout.quote else None,
    )
    columns = [pl.col(names[f.position * step]).alias(f.role) for f in layout.fields]
    return frame.select(*columns, *[pl.col(b).alias(f"blank.{b}") for b in blanks])


def _native_type(f: Field, time: TimeFormat) -> Any:
    if f.kind == "time":
        return pl.String if time.kind == "iso" else pl.Float64 if time.fractional else pl.Int64
    return {"int": pl.Int64, "float": pl.Float32, "flag": pl.Float32}.get(f.kind, pl.String)


def _checked(frame: pl.LazyFrame, layout: Layout, before: int, header_lines: int) -> pl.LazyFrame:
    """Values, ``row`` and ``bad`` of a frame whose rows are the lines of a file in order."""
    schema = frame.collect_schema()
    values, bad = [], []
    for f in _all_fields(layout, schema):
        value, checks = read_field(f, schema[f.role], layout.time)
        if f.kind != "blank":
            values.append(value.alias(f.role))
        bad += [condition for condition, _ in checks]
        if layout.format == "jsonl" and schema[f.role] == pl.String:  # polars writes a nested value as its text
            bad.append(pl.col(f.role).str.contains(r"^[\[{]"))
    frame = frame.with_row_index(ROW, offset=0)
    row = (pl.col(ROW).cast(pl.Int64) + (before + header_lines + 1)).alias(ROW)
    return frame.select(*values, row, pl.any_horizontal(bad).fill_null(True).alias("bad"))


def _all_fields(layout: Layout, schema: pl.Schema) -> list[Field]:
    return [*layout.fields, *(Field(n, "blank", n) for n in schema if n.startswith("blank."))]


def _sink(frame: pl.LazyFrame, part: Path) -> None:
    frame.sink_ipc(part, compression="uncompressed", engine="streaming")


def raise_if_disk_full(error: Exception) -> None:
    """polars has no error class for a full disk."""
    if "os error 28" in str(error) or "No space left" in str(error):
        raise OSError(28, "No space left on device") from error


# Line by line


def _read_slowly(file: Path, layout: Layout, before: int, stem: Path, rejects: Rejects) -> tuple[list[Path], int]:
    parts: list[Path] = []
    last = 0
    lines = _json_lines(file, layout, rejects) if layout.format == "jsonl" else _csv_lines(file, layout, rejects)
    for batch in _batched(lines, _BATCH_LINES):
        last = max(last, batch[-1][0])
        frame = _rows_to_frame(batch, layout)
        good = _reject_bad(frame, layout, file, rejects, {n: text for n, _, text in batch})
        good = good.with_columns(pl.col(ROW) + before)
        parts.append(stem.with_name(f"{stem.name}-{len(parts):06d}.arrow"))
        _sink(good.lazy(), parts[-1])
    return parts, last


Line = tuple[int, list[str | None], str]
"""Row number, one text per field of the layout, the whole line."""


def _batched(lines: Iterator[Line], size: int) -> Iterator[list[Line]]:
    while batch := list(itertools.islice(lines, size)):
        yield batch


def _decoded_lines(file: Path, layout: Layout, rejects: Rejects) -> Iterator[tuple[int, str]]:
    with open(file, "rb") as source:
        for number, raw in enumerate(source, start=1):
            raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if (number == 1 and layout.header) or not raw.strip():
                continue  # a blank line holds nothing that could be lost
            try:
                yield number, raw.decode(layout.encoding).rstrip("\r\n")
            except UnicodeDecodeError as error:
                mend = f"convert the file, for example iconv -f latin1 -t {layout.encoding}"
                reason = f"byte 0x{raw[error.start]:02X} at place {error.start + 1} is not {layout.encoding} ({mend})"
                rejects.add(file, number, reason, raw.decode("latin-1").rstrip("\r\n"))


def _csv_lines(file: Path, layout: Layout, rejects: Rejects) -> Iterator[Line]:
    separator, width = layout.separator or ",", layout.num_columns
    positions = [f.position for f in layout.fields]
    for number, text in _decoded_lines(file, layout, rejects):
        if layout.quote and '"' in text:
            try:
                cells = next(csv.reader([text], delimiter=separator, strict=True))
            except csv.Error:
                rejects.add(file, number, "a quoted field is not closed on its line", text)
                continue
        else:
            cells = text.split(separator)
        if len(cells) != width:
            reason = f"expected {width} fields separated by {separator!r}, got {len(cells)}"
            rejects.add(file, number, reason, text)
            continue
        yield number, [cells[p] for p in positions], text


def _json_lines(file: Path, layout: Layout, rejects: Rejects) -> Iterator[Line]:
    for number, text in _decoded_lines(file, layout, rejects):
        try:
            record = json.loads(text)
        except ValueError as error:
            rejects.add(file, number, f"not valid JSON ({str(error).split(':')[0]})", text)
            continue
        if not isinstance(record, dict):
            rejects.add(file, number, "expected one JSON object a line", text)
            continue
        cells = [record.get(f.column) for f in layout.fields]
        nested = [f.column for f, cell in zip(layout.fields, cells, strict=True) if isinstance(cell, dict | list)]
        if nested:
            rejects.add(file, number, f"{nested[0]} is not a number or a string", text)
            continue
        yield number, [json_text(cell) for cell in cells], text


def json_text(cell: Any) -> str | None:
    """A JSON scalar as CSV would write it."""
    if isinstance(cell, bool):
        return str(int(cell))
    return None if cell is None else str(cell)


def _rows_to_frame(batch: list[Line], layout: Layout) -> pl.DataFrame:
    columns = zip(*(cells for _, cells, _ in batch), strict=True)
    data = {f.role: pl.Series(cells, dtype=pl.String) for f, cells in zip(layout.fields, columns, strict=True)}
    return pl.DataFrame({**data, ROW: pl.Series([n for n, _, _ in batch], dtype=pl.Int64)})


def _reject_bad(
    frame: pl.DataFrame, layout: Layout, file: Path, rejects: Rejects, texts: dict[int, str]
) -> pl.DataFrame:
    """The good rows of ``frame``, typed; the others go to ``rejects`` with their reason."""
    values, reasons = [], []
    for f in layout.fields:
        value, checks = read_field(f, frame.schema[f.role], layout.time)
        values.append(value.alias(f.role))
        reasons += [pl.when(condition).then(reason) for condition, reason in checks]
    typed = frame.select(*values, ROW, pl.coalesce(reasons).alias("reason"), pl.lit(False).alias("bad"))
    for row, reason in typed.filter(pl.col("reason").is_not_null()).select(ROW, "reason").iter_rows():
        rejects.add(file, row, reason, texts.get(row, ""))
    return typed.filter(pl.col("reason").is_null()).drop("reason")


# Parquet


def _read_parquet(file: Path, layout: Layout, before: int, part: Path, rejects: Rejects) -> int:
    try:
        scan = pl.scan_parquet(file)
        total = scan.select(pl.len()).collect().item()
        raw = scan.select(pl.col(f.column).alias(f.role) for f in layout.fields)
        checked = _checked(raw, layout, before, 0)
        _sink(checked.filter(~pl.col("bad")), part)
        good = pl.scan_ipc(part).select(pl.len()).collect().item()
        if good < total:
            rows = raw.with_row_index("index").with_columns((pl.col("index").cast(pl.Int64) + 1).alias(ROW))
            positions = checked.filter(pl.col("bad")).select(pl.col(ROW) - before)
            bad = rows.join(positions, on=ROW, how="semi").drop("index").sort(ROW).collect(engine="streaming")
            texts = {r[ROW]: json.dumps({k: v for k, v in r.items() if k != ROW}, default=str) for r in bad.to_dicts()}
            _reject_bad(bad, layout, file, rejects, texts)
        return total
    except pl.exceptions.PolarsError as error:
        raise_if_disk_full(error)
        reason = str(error).splitlines()[0]
        raise UserError(f"{file} cannot be read as Parquet ({reason}): it may be truncated; fetch it again") from None
