"""Amazon 2014 ratings: ``ratings_<category>.csv`` with user, item, rating, time (s) and no header."""

from __future__ import annotations

from pathlib import Path

from hstu.config import DataConfig
from hstu.data.build import RawFiles
from hstu.data.fields import Field, TimeFormat
from hstu.data.importers import find_in_folder
from hstu.data.tables import Layout
from hstu.errors import UserError

EXPORT = "interactions.csv"
"""A log of the same category without ratings, with the header user,item,timestamp, is read too."""
EXPORT_HEADER = b"user,item,timestamp"


def files(config: DataConfig, raw: list[Path]) -> list[Path]:
    if len(raw) == 1 and raw[0].is_file():
        return raw
    name = f"ratings_{config.category}.csv"
    for candidate in (name, EXPORT):
        found = find_in_folder(raw, candidate)
        if found is not None:
            return [found]
    raise UserError(f"no {name} in {raw[0]}: fetch it from {config.url}, or give data.raw=PATH/{name}")


def describe(config: DataConfig, paths: list[Path]) -> RawFiles:
    user, item = Field("user", "id", "user", 0), Field("item", "id", "item", 1)
    with open(paths[0], "rb") as file:
        export = file.readline().strip() == EXPORT_HEADER
    if export:
        fields: tuple[Field, ...] = (user, item, Field("time", "time", "timestamp", 2))
    else:
        fields = (user, item, Field("action", "float", "rating", 2), Field("time", "time", "timestamp", 3))
    layout = Layout("csv", fields, TimeFormat(), ",", len(fields), header=export, quote=False)
    return RawFiles(paths, [layout])
