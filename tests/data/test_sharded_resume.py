"""A sharded preparation that is killed anywhere and goes on: the same store, and nothing is done twice."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from hstu.data import sharded_build, sharded_store, stages, store
from hstu.data.sharded_store import ShardedStore
from hstu.data.stages import Marks
from hstu.data.store import SequenceStore
from tests.data import test_sharded_sources as sources
from tests.data.logs import prepare_log
from tests.data.test_sharded import COLUMNS, assert_same, write_files

FILTERS = {"dedup": "exact", "min_user_events": 17, "min_item_events": 15, "filter_mode": "iterative", "max_events": 9,
           "split": "global-time", "split_time": "0.7q"}  # fmt: skip
MARKS = ["spilled", "shard-00000", "shard-00001", "filtered", "written-00000", "written-00001"]
FINISH = "finish"
"""After the last mark: the shards have their ``meta.json``, the whole has none."""
NO_PROCESS = 2**22 + 1
"""Above the largest number of a process on Linux."""


class KilledError(BaseException):
    """Stands for SIGKILL: nothing cleans up."""


def kill_at(mark: str, patch: pytest.MonkeyPatch) -> None:
    """The process dies when all is on disk that belongs to ``mark``, before it is written."""
    write = Marks.write

    def write_or_die(marks: Marks, name: str, *rest: Any) -> None:
        if name == mark:
            raise KilledError
        write(marks, name, *rest)

    def die(*_: Any) -> None:
        raise KilledError

    patch.setattr(Marks, "write", write_or_die)
    if mark == FINISH:
        patch.setattr(sharded_store, "make_split", die)


def killed(root: Path, mark: str, run: Any) -> Path:
    """``run`` dies at ``mark``; returns its temporary folder below ``root``, as of a process that is no more."""
    removing = store.shutil.rmtree
    with pytest.MonkeyPatch.context() as patch:
        kill_at(mark, patch)
        patch.setattr(store.shutil, "rmtree", lambda p, **o: None if str(p).endswith(".tmp") else removing(p, **o))
        with pytest.raises(KilledError):
            run()
    (left,) = (root / "root" / "stores").glob(f".*.{os.getpid()}.tmp")
    return left.rename(left.with_name(left.name.replace(f".{os.getpid()}.", f".{NO_PROCESS}.")))


def preparation(tmp_path: Path, raw: Path, shards: int | None = 2) -> Any:
    return prepare_log(tmp_path, raw, COLUMNS, shards=shards, **FILTERS)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("files") / "raw")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, raw: Path) -> SequenceStore:
    return preparation(tmp_path_factory.mktemp("once"), raw, shards=None)


@pytest.mark.parametrize("mark", MARKS)
def test_killed_anywhere_it_goes_on(tmp_path: Path, raw: Path, expected: SequenceStore, mark: str) -> None:
    killed(tmp_path, mark, lambda: preparation(tmp_path, raw))
    done: list[str] = []
    write = Marks.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Marks, "write", lambda self, name, *rest: (done.append(name), write(self, name, *rest)))
        found = preparation(tmp_path, raw)
    assert done == MARKS[MARKS.index(mark) :], "what was marked is not done again"
    assert_same(found, expected)
    assert [p.name for p in (tmp_path / "root" / "stores").iterdir()] == [found.path.name]
    assert not (found.path / ".work").exists()


def test_a_process_of_the_same_number_goes_on(tmp_path: Path, raw: Path, expected: SequenceStore) -> None:
    """As in a container that is started again."""
    left = killed(tmp_path, "filtered", lambda: preparation(tmp_path, raw))
    left.rename(left.with_name(left.name.replace(str(NO_PROCESS), str(os.getpid()))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded_build, "_spill_rows", None)
        assert_same(preparation(tmp_path, raw), expected)


def test_killed_again_and_while_it_finishes(tmp_path: Path, raw: Path, expected: SequenceStore) -> None:
    for mark in ("shard-00001", "written-00000", FINISH):
        killed(tmp_path, mark, lambda: preparation(tmp_path, raw))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded_build, "_write_shard", None)  # all are written
        found = preparation(tmp_path, raw)
    assert_same(found, expected)
    assert isinstance(found, ShardedStore) and len(found.shards) == 2


def test_killed_while_the_work_is_removed_it_begins_anew(tmp_path: Path, raw: Path, expected: SequenceStore) -> None:
    """Else a shard whose mark is gone would be coded again from rows that are gone, too."""
    removing = sharded_store.shutil.rmtree

    def remove_a_part(folder: Path, **options: Any) -> None:
        if not any(folder.glob("written-00001*")):
            return removing(folder, **options)
        for mark in folder.glob("[wf]*"):
            mark.unlink()
        raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded_store.shutil, "rmtree", remove_a_part)
        killed(tmp_path, "none", lambda: preparation(tmp_path, raw))
    found = preparation(tmp_path, raw)
    assert_same(found, expected)
    assert not list(found.path.glob(".*"))


def test_what_another_version_left_is_not_gone_on_with(
    tmp_path: Path, raw: Path, expected: SequenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = killed(tmp_path, "filtered", lambda: preparation(tmp_path, raw))
    for module in (store, stages):
        monkeypatch.setattr(module, "MARK_ENDING", ".done-99.json")
    assert_same(preparation(tmp_path, raw), expected)
    assert not left.exists()


def test_rejects_catalogue_and_flags_are_kept(tmp_path: Path) -> None:
    raw = sources.write_movielens(tmp_path / "raw", "movielens-csv")
    settings = {"raw": str(raw), "on_bad_row": "skip"}
    killed(tmp_path, "shard-00001", lambda: sources.both(tmp_path, "movielens-csv", **settings))
    sharded, single = sources.both(tmp_path, "movielens-csv", **settings)
    sources.assert_alike(sharded, single, tmp_path / "joined")
    assert (sharded.path / "rejects.csv").read_text() == (single.path / "rejects.csv").read_text()


def test_nothing_marked_is_nothing_to_go_on_with(tmp_path: Path, raw: Path, expected: SequenceStore) -> None:
    left = killed(tmp_path, "spilled", lambda: preparation(tmp_path, raw))
    assert (left / ".work" / "spill").is_dir()
    other = left.with_name(left.name.replace(str(NO_PROCESS), str(os.getppid())))
    other.mkdir()  # of a process that lives
    found = preparation(tmp_path, raw)
    assert not left.exists() and other.exists()
    assert_same(found, expected)


def test_raw_files_that_changed_are_another_store(tmp_path: Path) -> None:
    raw = write_files(tmp_path / "raw")
    left = killed(tmp_path, "filtered", lambda: preparation(tmp_path, raw))
    write_files(raw, seed=1)
    found = preparation(tmp_path, raw)
    assert left.exists(), "it belongs to the files as they were"
    assert_same(found, preparation(tmp_path / "once", raw, shards=None))
