"""One importer per kind of raw data. Each finds its files (``files``) and says how they are read (``describe``)."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from hstu.config import DataConfig

_MODULES = {
    "movielens-100k": "movielens",
    "movielens-dat": "movielens",
    "movielens-csv": "movielens",
    "amazon-2014": "amazon",
    "kuairand": "kuairand",
    "log": "log",
}


def importer(config: DataConfig) -> ModuleType:
    """The module of ``data.source``: ``files(config, raw) -> list[Path]``, ``describe(config, files) -> RawFiles``."""
    return importlib.import_module(f"hstu.data.importers.{_MODULES[config.source]}")


def find_in_folder(raw: list[Path], name: str) -> Path | None:
    """``name`` in the folder ``raw`` or in one folder below it, or the file ``raw`` itself if it is so called."""
    for path in raw:
        if path.is_file() and path.name == name:
            return path
        found = [path / name, *sorted(path.glob(f"*/{name}"))] if path.is_dir() else []
        for candidate in found:
            if candidate.is_file():
                return candidate
    return None
