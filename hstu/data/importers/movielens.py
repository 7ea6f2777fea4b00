"""MovieLens in its three formats: 100K (tab, ``u.data``), 1M (``::``, ``ratings.dat``), 20M and later (CSV)."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from hstu.config import DataConfig
from hstu.data.build import Attributes, RawFiles, RowColumn
from hstu.data.fields import Field, TimeFormat
from hstu.data.importers import find_in_folder
from hstu.data.store import map_column
from hstu.data.tables import Layout, Rejects
from hstu.errors import UserError

ESTIMATED = "timestamp_estimated.npy"
"""Optional flags beside the ratings: one bool per row, true where the timestamp is an estimate."""


@dataclass(frozen=True)
class Format:
    ratings: str
    movies: str
    separator: str
    header: bool
    encoding: str
    movies_separator: str
    users: str | None = None
    """Optional file of user attributes, written with the separator of the movies file."""
    user_fields: tuple[str, ...] = ()
    """Its fields between the id and the zip code."""


USERS_100K = ("age", "gender", "occupation")
USERS_1M = ("gender", "age", "occupation")
FORMATS = {
    "movielens-100k": Format("u.data", "u.item", "\t", False, "latin-1", "|", "u.user", USERS_100K),
    "movielens-dat": Format("ratings.dat", "movies.dat", "::", False, "latin-1", "::", "users.dat", USERS_1M),
    "movielens-csv": Format("ratings.csv", "movies.csv", ",", True, "utf-8", ","),
}
COLUMNS = ("userId", "movieId", "rating", "timestamp")
GENRES_100K = (
    "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy "
    "Film-Noir Horror Musical Mystery Romance Sci-Fi Thriller War Western"
).split()


def files(config: DataConfig, raw: list[Path]) -> list[Path]:
    """Ratings, movies and, where they lie beside them, the flags of estimated timestamps and the users."""
    form = FORMATS[config.source]
    found: list[Path] = []
    for name in (form.ratings, form.movies):
        path = find_in_folder(raw, name)
        if path is None and found and (found[0].parent / name).is_file():
            path = found[0].parent / name
        if path is None:
            raise UserError(f"no {name} in {raw[0]}: data={config.name} needs {form.ratings} and {form.movies} there")
        found.append(path)
    optional = [found[0].parent / name for name in (ESTIMATED, form.users) if name is not None]
    return [*found, *(path for path in optional if path.is_file())]


def describe(config: DataConfig, paths: list[Path]) -> RawFiles:
    form = FORMATS[config.source]
    if form.header:
        _check_header(paths[0], COLUMNS)
    kinds = (("user", "int"), ("item", "int"), ("action", "float"), ("time", "time"))
    fields = tuple(
        Field(role, kind, name, i) for i, ((role, kind), name) in enumerate(zip(kinds, COLUMNS, strict=True))
    )
    layout = Layout("csv", fields, TimeFormat(), form.separator, len(COLUMNS), form.header, quote=False)
    movies, *others = paths[1:]
    users = next((p for p in others if p.name != ESTIMATED), None)
    estimated = next((p for p in others if p.name == ESTIMATED), None)
    flags = None if estimated is None else _read_flags(estimated)

    def attributes(rejects: Rejects) -> Attributes:
        return _read_movies(movies, form, rejects), None if users is None else _read_users(users, form, rejects)

    def row_columns(first_rows: list[int], last_row: int) -> dict[str, RowColumn]:
        if flags is None:
            return {}
        if flags.ndim != 1 or len(flags) < last_row:
            raise UserError(f"{estimated} has shape {flags.shape}, expected one flag for each of {last_row} ratings")
        return {"timestamp_estimated": RowColumn(np.int32, flags.__getitem__)}

    notes = [] if flags is None else [f"{100 * flags.mean():.1f} % of the timestamps estimated"]
    return RawFiles(paths[:1], [layout], attributes, movies.name, row_columns, notes)


def _read_flags(path: Path) -> np.ndarray:
    try:
        return map_column(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): mend or remove it") from None


def _check_header(path: Path, names: tuple[str, ...]) -> None:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        header = file.readline().strip()
    if tuple(header.split(",")) != names:
        raise UserError(f"{path}, row 1: expected the header {','.join(names)}, got {header[:80]!r}")


def _cells(path: Path, form: Format) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of every line of a movies or users file that is not blank."""
    with open(path, encoding=form.encoding, newline="") as file:
        lines = csv.reader(file) if form.header else (line.rstrip("\r\n").split(form.movies_separator) for line in file)
        try:
            for number, cells in enumerate(lines, start=1):
                if cells and cells != [""] and not (form.header and number == 1):
                    yield number, cells
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: {error.reason}, expected {form.encoding} text: fetch the file again") from None


def _read_movies(path: Path, form: Format, rejects: Rejects) -> pl.DataFrame:
    """raw_id, title, genres of every film, ascending by id."""
    rows: dict[int, tuple[str, ...]] = {}
    for number, cells in _cells(path, form):
        expected = 24 if form.movies_separator == "|" else 3
        problem = _problem(cells, form, expected, "movieId", rows)
        if problem:
            rejects.add(path, number, problem, form.movies_separator.join(cells))
            continue
        genres = cells[2]
        if form.movies_separator == "|":
            genres = "|".join(g for g, flag in zip(GENRES_100K, cells[-19:], strict=True) if flag == "1")
        rows[int(cells[0])] = (cells[1], genres)
    if not rows:
        raise UserError(f"{path} lists no film: fetch the file again")
    return _frame(rows, ("title", "genres"))


def _read_users(path: Path, form: Format, rejects: Rejects) -> pl.DataFrame:
    """raw_id, age, gender, occupation of every user, ascending by id. The zip code is left out.

    The age of 100K is a number; that of 1M is the lower end of a range and so a text.
    """
    rows: dict[int, tuple[str, ...]] = {}
    for number, cells in _cells(path, form):
        problem = _problem(cells, form, len(form.user_fields) + 2, "userId", rows)
        age = cells[1 + form.user_fields.index("age")] if problem is None else ""
        if problem is None and not age.isdigit():
            problem = f"age '{age}' is not an integer"
        if problem:
            rejects.add(path, number, problem, form.movies_separator.join(cells))
            continue
        rows[int(cells[0])] = tuple(cells[1:-1])
    found = _frame(rows, form.user_fields)
    return found.with_columns(pl.col("age").cast(pl.Float32)) if form.users == "u.user" else found


def _frame(rows: dict[int, tuple[str, ...]], names: tuple[str, ...]) -> pl.DataFrame:
    ids = sorted(rows)
    columns = {name: pl.Series([rows[i][place] for i in ids], dtype=pl.String) for place, name in enumerate(names)}
    return pl.DataFrame({"raw_id": pl.Series(ids, dtype=pl.Int64), **columns})


def _problem(cells: list[str], form: Format, expected: int, key: str, rows: dict[int, Any]) -> str | None:
    if len(cells) != expected:
        return f"expected {expected} fields separated by {form.movies_separator!r}, got {len(cells)}"
    if not cells[0].strip().isdigit():
        return f"{key} '{cells[0]}' is not an integer"
    return f"{key} '{cells[0]}' occurs twice" if int(cells[0]) in rows else None
