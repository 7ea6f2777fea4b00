"""Real MovieLens-1M, prepared once for the tests of this folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hstu.config import DataConfig
from hstu.data.store import SequenceStore
from hstu.prepare import prepare

COUNTS = {"users": 6040, "items": 3883, "items_with_events": 3706, "events": 1_000_209}


def _prepare_ml_1m(root: Path, protocol: str) -> SequenceStore:
    folder = Path(os.environ.get("HSTU_DATA_DIR", "")) / "ml-1m"
    if not os.environ.get("HSTU_DATA_DIR") or not folder.is_dir():
        pytest.skip("HSTU_DATA_DIR does not point to a folder with ml-1m")
    config = DataConfig(
        name="ml-1m", source="movielens-dat", raw=str(folder), root=str(root), protocol=protocol, expected=COUNTS
    )
    return prepare(config, quiet=True)


@pytest.fixture(scope="session")
def ml_1m(tmp_path_factory: pytest.TempPathFactory) -> SequenceStore:
    return _prepare_ml_1m(tmp_path_factory.mktemp("ml-1m"), "reference")


@pytest.fixture(scope="session")
def ml_1m_stable(tmp_path_factory: pytest.TempPathFactory) -> SequenceStore:
    return _prepare_ml_1m(tmp_path_factory.mktemp("ml-1m-stable"), "stable")
