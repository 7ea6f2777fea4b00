"""What a row of a log must hold: how each field is read from text or native columns, and what makes a row bad."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from hstu.errors import UserError

MAX_TIME_S = 253_402_300_799
"""Last second of the year 9999."""
UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000}
UNIT_FLOORS = {"s": 0, "ms": 100_000_000_000, "us": 100_000_000_000_000}
"""Smallest number that is taken for the unit when it is found by magnitude: 1e11 is March 1973 in ms and the
year 5138 in s, 1e14 the same in us and ms."""
UNIT_CEILING = 100_000_000_000_000_000
BLANK = "blank"


@dataclass(frozen=True)
class Field:
    """One field of a row.

    role: name of the output column: user, item, time, action, ``value.NAME`` or ``feature.NAME``.
    kind: int (integer id), id (integer or string id), time, float, flag (0 or 1), name (of an event), feature (may
    be empty), or blank (must be empty).
    column: its name as the user knows it. position: 0-based place in a row of text.
    optional: a float or a name that may be empty.
    """

    role: str
    kind: str
    column: str
    position: int = -1
    optional: bool = False


@dataclass(frozen=True)
class TimeFormat:
    """How times are written: number or iso; ``unit`` of numbers; ``auto``: the unit was found by magnitude."""

    kind: str = "number"
    unit: str = "s"
    fractional: bool = False
    auto: bool = False

    @property
    def per_second(self) -> int:
        """Units per second of the output column ``time``."""
        return UNITS["us"] if self.fractional or self.kind == "iso" else UNITS[self.unit]


Check = tuple[pl.Expr, pl.Expr]
"""A condition that makes a row bad, and the reason in words."""


def read_field(field: Field, dtype: pl.DataType, time: TimeFormat) -> tuple[pl.Expr, list[Check]]:
    """The field's value and its checks, from a raw column called ``field.role`` of type ``dtype``."""
    raw = pl.col(field.role)
    if dtype == pl.String:
        raw = raw.str.strip_chars()
        missing = raw.is_null() | (raw == "")
    else:
        missing = raw.is_null()
    absent = (missing, pl.lit(f"{field.column} is missing"))
    if field.kind == BLANK:
        return raw, [(~missing, _quote("expected two separator characters, got {} between them", raw))]
    if field.kind == "time":
        value, checks = _read_time(field, raw, dtype, time)
        return value, [absent, *checks]
    if field.kind in ("float", "flag"):
        if not (dtype == pl.String or dtype == pl.Boolean or dtype.is_numeric()):
            raise UserError(f"column {field.column!r} has type {dtype}: expected numbers")
        return _read_float(field, raw, missing, absent)
    if field.kind == "name":
        text = raw.cast(pl.String)
        return pl.when(text != "").then(text), [] if field.optional else [absent]
    if field.kind == "feature":
        return (pl.when(raw != "").then(raw) if dtype == pl.String else raw), []
    return _read_id(field, raw, dtype, absent)


def _read_float(field: Field, raw: pl.Expr, missing: pl.Expr, absent: Check) -> tuple[pl.Expr, list[Check]]:
    value = raw.cast(pl.Float32, strict=False)
    checks = [
        (value.is_null() & ~missing, _quote(f"{field.column} {{}} is not a number", raw)),
        (~value.is_finite().fill_null(True), _quote(f"{field.column} {{}} is not finite", raw)),
    ]
    if field.kind == "flag":
        checks.append((~value.is_in([0.0, 1.0]).fill_null(True), _quote(f"{field.column} {{}} is not 0 or 1", raw)))
    return value, checks if field.optional else [absent, *checks]


def _read_id(field: Field, raw: pl.Expr, dtype: pl.DataType, absent: Check) -> tuple[pl.Expr, list[Check]]:
    if dtype == pl.String and field.kind == "id":
        return raw, [absent]
    if dtype == pl.Categorical or dtype == pl.Enum:
        return raw.cast(pl.String), [absent]
    if dtype == pl.String or dtype.is_integer():
        value = raw.cast(pl.Int64, strict=False)
        beyond = (value.is_null(), _quote(f"{field.column} {{}} is beyond the range of 64-bit integers", raw))
        if dtype.is_integer():
            return value, [absent, beyond]
        whole = raw.str.contains(r"^[+-]?\d+$")
        return value, [absent, (~whole, _quote(f"{field.column} {{}} is not an integer", raw)), beyond]
    if dtype.is_float():
        value = raw.cast(pl.Int64, strict=False)
        return value, [
            absent,
            (value.is_null() | (value != raw), _quote(f"{field.column} {{}} is not an integer or string id", raw)),
        ]
    raise UserError(f"column {field.column!r} has type {dtype}: an id is an integer or a string")


def _read_time(field: Field, raw: pl.Expr, dtype: pl.DataType, time: TimeFormat) -> tuple[pl.Expr, list[Check]]:
    name = field.column
    if dtype.is_temporal():
        if dtype == pl.Time or dtype == pl.Duration:
            raise UserError(f"column {name!r} has type {dtype}: a time is a number, an ISO text or a date-time")
        value = raw.cast(pl.Datetime("us")).cast(pl.Int64) if dtype == pl.Date else raw.dt.epoch("us")
        checks: list[Check] = []
    elif time.kind == "iso":
        value = _iso_to_us(raw.cast(pl.String))
        checks = [(value.is_null(), _quote(f"{name} {{}} is not an ISO 8601 time", raw))]
    elif time.fractional or dtype.is_float():
        number = raw.cast(pl.Float64, strict=False)
        scaled = (number * (time.per_second / UNITS[time.unit])).floor()
        value = scaled.cast(pl.Int64, strict=False)
        checks = [
            (number.is_null(), _quote(f"{name} {{}} is not a number", raw)),
            (~number.is_finite(), _quote(f"{name} {{}} is not finite", raw)),
        ]
    elif dtype == pl.String:
        number = raw.cast(pl.Float64, strict=False)
        value = pl.coalesce(raw.cast(pl.Int64, strict=False), number.floor().cast(pl.Int64, strict=False))
        checks = [
            (number.is_null(), _quote(f"{name} {{}} is not a number", raw)),
            (~number.is_finite(), _quote(f"{name} {{}} is not finite", raw)),
        ]
    elif dtype.is_integer():
        value, checks = raw.cast(pl.Int64, strict=False), []
    else:
        raise UserError(f"column {name!r} has type {dtype}: a time is a number, an ISO text or a date-time")
    limit = MAX_TIME_S * time.per_second
    checks += [
        (value < 0, _quote(f"{name} {{}} lies before 1970", raw)),
        (
            value.is_null() | (value > limit),
            _quote(f"{name} {{}} lies beyond the year 9999 (data.time_unit={time.unit})", raw),
        ),
    ]
    floor = UNIT_FLOORS[time.unit] * time.per_second // UNITS[time.unit]
    if time.kind == "number" and time.auto and floor > 0 and not dtype.is_temporal():
        text = f"{name} {{}} looks like another unit than the {time.unit} found by magnitude (set data.time_unit)"
        checks.append((value < floor, _quote(text, raw)))
    return value, checks


def _iso_to_us(text: pl.Expr) -> pl.Expr:
    """Microseconds since 1970 of ISO 8601 dates and date-times; UTC where no offset is given."""
    text = text.str.replace(r"^(\d{4}-\d\d-\d\d) ", "${1}T").str.replace(r"[Zz]$", "+00:00")
    text = text.str.replace(r"([+-]\d\d):?(\d\d)$", "${1}${2}")
    has_offset = text.str.contains(r"T.*[+-]\d{4}$")
    aware = text.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%z", strict=False, time_unit="us").dt.epoch("us")
    naive = text.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f", strict=False, time_unit="us").dt.epoch("us")
    minutes = text.str.to_datetime("%Y-%m-%dT%H:%M", strict=False, time_unit="us").dt.epoch("us")
    date = text.str.to_date("%Y-%m-%d", strict=False).cast(pl.Datetime("us")).dt.epoch("us")
    return pl.when(has_offset).then(aware).otherwise(pl.coalesce(naive, minutes, date))


def _quote(template: str, raw: pl.Expr) -> pl.Expr:
    return pl.format(template.replace("{}", "'{}'"), raw.cast(pl.String).str.slice(0, 80))


def find_time_format(name: str, sample: list[str], unit: str, where: str) -> TimeFormat:
    """Finds how times are written from the first values of a column.

    unit: ``data.time_unit``. Raises UserError where no value is a number or an ISO time.
    """
    if unit == "iso":
        return TimeFormat(kind="iso", unit="s")
    numbers: list[float] = []
    for text in sample:
        try:
            numbers.append(float(text))
        except ValueError:
            continue
    numbers = sorted(n for n in numbers if n == n and abs(n) != float("inf"))
    fractional = any(n != int(n) for n in numbers)
    if unit != "auto":
        return TimeFormat(unit=unit, fractional=fractional)
    if numbers:
        middle = numbers[len(numbers) // 2]
        if middle >= UNIT_CEILING:
            raise UserError(f"{where}: {name} {middle:.0f} is too large for s, ms or us since 1970: rescale the column")
        found = max((u for u in UNITS if middle >= UNIT_FLOORS[u]), key=lambda u: UNITS[u], default="s")
        return TimeFormat(unit=found, fractional=fractional, auto=True)
    iso = pl.Series(sample, dtype=pl.String).to_frame("t").select(_iso_to_us(pl.col("t"))).to_series()
    if iso.is_null().all() and sample:
        raise UserError(
            f"{where}: column {name!r} holds {sample[0]!r}, which is neither a number nor an ISO 8601 time: "
            "name another column in data.columns.time or convert it"
        )
    return TimeFormat(kind="iso", unit="s")
