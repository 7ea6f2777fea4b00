"""hstu-prepare: what is redone, what the command prints, and one clear line for every failure."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hstu.cli import conf_dir
from hstu.config import ColumnsConfig, DataConfig
from hstu.errors import UserError
from hstu.prepare import main, prepare, print_summary

REPOSITORY = Path(__file__).resolve().parents[1]
LOG = "user,item,timestamp\nann,y,20\nbob,x,5\nann,x,10\nann,z,10\n"


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    (tmp_path / "log.csv").write_text(LOG)
    return DataConfig(name="log", source="log", raw=str(tmp_path / "log.csv"), root=str(tmp_path / "root"))


def run_command(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    env.pop("HSTU_DATA_DIR", None)
    return subprocess.run(
        [sys.executable, "-m", "hstu.prepare", *arguments],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture
def error_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command in this process, expects status 1 and one ``error:`` line, and returns that line."""
    monkeypatch.delenv("HSTU_DATA_DIR", raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["hstu-prepare", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        lines = capsys.readouterr().err.strip().splitlines()
        assert caught.value.code == 1 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0].removeprefix("error: ")

    return run


def test_finished_store_is_not_redone(config: DataConfig) -> None:
    first = prepare(config)
    before = (first.path / "meta.json").stat().st_mtime_ns
    assert prepare(config).path == first.path
    assert (first.path / "meta.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "change",
    [
        {"protocol": "stable"},
        {"protocol_seed": 1},
        {"min_item_events": 2},
        {"dedup": "exact"},
        {"max_events": 2},
        {"max_items": 2},
        {"split": "global-time", "split_time": "20"},
        {"time_unit": "s"},
        {"on_bad_row": "skip"},
        {"columns": ColumnsConfig(action="timestamp")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_that_changes_the_content_makes_another_store(config: DataConfig, change: dict[str, Any]) -> None:
    first = prepare(config).path
    assert prepare(replace(config, **change)).path != first


def test_settings_of_other_sources_do_not(config: DataConfig) -> None:
    assert prepare(replace(config, num_users=7, checksum="md5:0")).path == prepare(config).path


def test_changed_raw_file_makes_another_store(config: DataConfig) -> None:
    first = prepare(config)
    assert config.raw is not None
    Path(config.raw).write_text(LOG + "bob,z,9\n")
    second = prepare(config)
    assert second.path != first.path and second.num_events == first.num_events + 1


def test_meta_tells_where_it_comes_from(config: DataConfig) -> None:
    meta = prepare(config).meta
    assert meta["raw"][0]["file"] == "log.csv" and meta["raw"][0]["bytes"] == len(LOG)
    assert len(meta["checksum"].removeprefix("sha256:")) == 64
    assert meta["protocol"] == "reference" and meta["source"] == "log" and len(meta["split_hash"]) == 16
    assert meta["rows_read"] == 4 and meta["rejects"] == {} and meta["removed"] == {}
    assert meta["settings"]["columns"]["user"] == "user"


def test_same_content_same_hash_wherever_it_is_prepared(config: DataConfig, tmp_path: Path) -> None:
    other = replace(config, root=str(tmp_path / "elsewhere"))
    assert prepare(config).meta["split_hash"] == prepare(other).meta["split_hash"]


def test_published_counts_are_compared(config: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    store = prepare(replace(config, expected={"users": 2, "events": 5}))
    assert store.meta["published"] == {
        "users": {"expected": 2, "found": 2, "agrees": True},
        "events": {"expected": 5, "found": 4, "agrees": False},
    }
    print_summary(store, 0.0)
    assert "COUNTS DIFFER" in capsys.readouterr().out
    with pytest.raises(UserError, match="data.expected.films: expected one of"):
        prepare(replace(config, protocol="stable", expected={"films": 2}))


def test_full_disk_leaves_nothing(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, array: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hstu.data.store.ColumnFile.append", full)
    with pytest.raises(OSError, match="No space left") as caught:
        prepare(config)
    assert caught.value.errno == errno.ENOSPC
    assert not any((Path(config.root) / "stores").iterdir())


def test_full_disk_in_polars_is_a_full_disk_too(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import polars as pl

    def full(*args: object, **kwargs: object) -> None:
        raise pl.exceptions.ComputeError("No space left on device (os error 28)")

    monkeypatch.setattr("polars.LazyFrame.sink_ipc", full)
    with pytest.raises(OSError) as caught:
        prepare(config)
    assert caught.value.errno == errno.ENOSPC


def test_command_prints_counts_hash_and_rejects(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(LOG + "ann,x,never\n")
    done = run_command(tmp_path, "data=log", "data.raw=log.csv", "data.on_bad_row=skip", "+data.expected.users=3")
    assert done.returncode == 0, done.stderr
    store = next((tmp_path / "data" / "stores").iterdir())
    meta = prepare(
        DataConfig(
            name="log", source="log", raw=str(tmp_path / "log.csv"), root=str(tmp_path / "data"), on_bad_row="skip"
        )
    ).meta
    for part in ("COUNTS DIFFER", meta["split_hash"], "rejected rows: 1", "1 x timestamp is not a number", store.name):
        assert part in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "log.csv"], "no outputs/ folder, no log file"


def test_failure_of_the_command_is_one_line_and_status_1(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(LOG + "ann,x,never\n")
    done = run_command(tmp_path, "data=log", "data.raw=log.csv")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: log.csv, row 6: timestamp 'never' is not a number")


def test_unknown_data_set_lists_the_known_ones(error_of: Callable[..., str]) -> None:
    line = error_of("data=ml-1")
    for name in ("ml-100k", "ml-1m", "ml-20m", "ml-25m", "ml-32m", "ml-latest-small", "amazon-books", "log"):
        assert name in line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.protcol=stable", "did you mean protocol?"),
        ("data.protocol=random", "expected one of reference, stable"),
        ("data.min_user_events=many", "could not be converted to Integer"),
        ("data.min_user_events=-1", "expected >= 0"),
        ("data.split=global-time", "expected a time when data.split=global-time"),
        ("data.raw=nowhere.csv", "no such file or folder"),
        ("data.raw=[", "cannot be read: expected name=value"),
    ],
)
def test_bad_override_is_one_line(error_of: Callable[..., str], override: str, message: str) -> None:
    assert message in error_of("data=log", override)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a.npy"), "the disk is full (a.npy)"),
        (PermissionError(errno.EACCES, "Permission denied", "a.npy"), "no permission for a.npy"),
    ],
)
def test_system_errors_are_one_line(
    error_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch, error: OSError, message: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("hstu.prepare.prepare", fail)
    assert message in error_of("data=log")


def test_interrupt_is_status_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hstu.prepare.prepare", interrupt)
    monkeypatch.setattr(sys, "argv", ["hstu-prepare", "data=log"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130 and capsys.readouterr().err == "error: interrupted\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("hstu.prepare.prepare", fail)
    monkeypatch.setattr(sys, "argv", ["hstu-prepare", "data=log"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError):
        main()


def test_amazon_needs_a_category(error_of: Callable[..., str]) -> None:
    assert "data.category is not set" in error_of("data=amazon")


def test_every_data_config_is_valid() -> None:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from hstu.cli import register_schemas
    from hstu.config import build

    register_schemas()
    names = sorted(p.stem for p in (conf_dir() / "data").glob("*.yaml"))
    assert {"ml-100k", "ml-1m", "ml-20m", "ml-25m", "ml-32m", "ml-latest-small", "amazon-books", "log"} <= set(names)
    with initialize_config_dir(str(conf_dir()), version_base=None):
        for name in names:
            overrides = [f"data={name}"] + (["data.category=Toys"] if name == "amazon" else [])
            cfg = compose("prepare", overrides)
            config = build(DataConfig, OmegaConf.to_container(cfg.data, resolve=True))  # type: ignore[arg-type]
            assert config.name == ("amazon-Toys" if name == "amazon" else name)
            assert config.source != "synthetic" or name.startswith("synthetic")
            assert config.url is None or config.url.startswith("http")
            assert name in ("log", "synthetic") or config.url is not None


def test_reading_a_store_needs_no_polars(config: DataConfig) -> None:
    path = prepare(config).path
    code = (
        "import sys; sys.modules['polars'] = None\n"
        "from hstu.data.store import SequenceStore\nfrom hstu.data.splits import make_split\n"
        f"store = SequenceStore.open({str(path)!r}); print(store.num_events, len(make_split(store).test))\n"
        f"from hstu.config import DataConfig\nfrom hstu.prepare import prepare\n"
        f"print(prepare(DataConfig(name='log', source='log', root={config.root!r})).num_events)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    env.pop("HSTU_DATA_DIR", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["4", "1", "4"], done.stderr
