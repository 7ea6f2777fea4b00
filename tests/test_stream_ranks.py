"""Training day by day over ranks: the stream of one rank, of a finished log and of a folder in which files arrive."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from hstu import launch
from hstu.config import Config, to_dict
from hstu.config_embedding import EmbeddingConfig
from hstu.config_stream import StreamConfig
from hstu.data.watch import StreamSource
from hstu.errors import UserError
from hstu.progress import Display
from hstu.runs import load_run
from hstu.stream_train import run_command, stream_train
from hstu.train import Interrupted, Trainer
from tests.data.test_watch import write_day
from tests.ranks import run_ranks
from tests.test_stream_train import settings, stream_config
from tests.test_train import assert_same_run, final_state, logged


def narrow(config: Config, folder: Path, **embedding: Any) -> Config:
    run = dataclasses.replace(config.run, dir=str(folder), threads=1)
    return dataclasses.replace(config, run=run, embedding=EmbeddingConfig(**embedding))


def stream_on_rank(
    config: Config, stream: StreamConfig, signal_at: dict[int, int] | None = None, wait_signal: int | None = None
) -> tuple[str, list[str]]:  # fmt: skip
    """Streams on the ranks that are there; "" or how it ended, and what this rank said.

    signal_at: rank -> step before which it gets a SIGTERM. wait_signal: the rank that gets one while it waits for what
    follows 2026-03-03.
    """
    rank, step, next_day = dist.get_rank(), Trainer._step, StreamSource.next_day
    display, said = Display(False, shown=False), []
    display.say = said.append  # type: ignore[method-assign]

    def watched(self: Trainer, step_input: Any) -> float:
        if (signal_at or {}).get(rank) == self.progress.global_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, step_input)

    def waited(self: StreamSource, after: str | None, *stopped: Any) -> Any:
        if rank == wait_signal and after == "2026-03-03":
            os.kill(os.getpid(), signal.SIGTERM)
        return next_day(self, after, *stopped)

    Trainer._step, StreamSource.next_day = watched, waited  # type: ignore[method-assign]
    try:
        stream_train(config, stream, display)
    except (UserError, Interrupted) as error:
        return f"{type(error).__name__}: {error}", said
    finally:
        Trainer._step, StreamSource.next_day = step, next_day  # type: ignore[method-assign]
    return "", said


def ended(num_ranks: int, *args: Any) -> set[str]:
    return {end for end, _ in run_ranks(num_ranks, stream_on_rank, *args)}


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in logged(folder) if "loss" in line]


def days_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "days.json").read_text())["days"]


def assert_same_stream(one: Path, two: Path) -> None:
    """Losses to float noise, day metrics but for a user at a tie."""
    assert losses(two) == pytest.approx(losses(one), rel=3e-5) and len(losses(one)) >= 8
    days, others = days_of(one), days_of(two)
    for day, other in zip(days, others, strict=True):
        assert 0 <= other.pop("imbalance") < 1
        assert day.keys() == other.keys()
        for name in ("day", "events", "users", "trained", "targets"):
            assert day.get(name) == other.get(name)
        for name in ("hr@10", "ndcg@10", "mrr"):
            assert other.get(name) == pytest.approx(day.get(name), abs=0.01)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, StreamConfig, Path]:
    """A finished log, and its stream on two ranks."""
    root = tmp_path_factory.mktemp("log")
    config = stream_config(root)
    stream = settings(config, lr_decay=0.5, table_lr_decay=0.9)
    assert ended(2, narrow(config, root / "two"), stream) == {""}
    return config, stream, root


def test_two_ranks_stream_a_finished_log_as_one(log: tuple[Config, StreamConfig, Path]) -> None:
    config, stream, root = log
    assert ended(1, narrow(config, root / "one"), stream) == {""}
    assert_same_stream(root / "one", root / "two")


def test_stopped_on_one_of_two_ranks_it_ends_bit_identical(log: tuple[Config, StreamConfig, Path]) -> None:
    config, stream, root = log
    stopped = narrow(config, root / "stopped")
    end = f"Interrupted: stopped by SIGTERM; saved. Resume with run.dir={root / 'stopped'}"
    assert ended(2, stopped, stream, {1: 13}) == {end}
    assert final_state(root / "stopped").values["progress"]["global_step"] == 14
    assert ended(2, stopped, stream) == {""}
    assert_same_run(root / "two", root / "stopped")


def test_sharded_managed_tables_stream_as_local_ones(log: tuple[Config, StreamConfig, Path]) -> None:
    pytest.importorskip("torchrec")
    config, stream, root = log
    rows = {"ids": "managed", "rows": 40, "optimizer": "rowwise_adagrad"}
    assert ended(1, narrow(config, root / "local", **rows), stream) == {""}
    sharded = narrow(config, root / "sharded", kind="sharded", sharding="row_wise", **rows)
    assert ended(2, sharded, stream) == {""}
    assert_same_stream(root / "local", root / "sharded")
    assert any(line.get("evictions", 0) > 0 for line in logged(root / "sharded"))
    pipelined = narrow(config, root / "pipelined", kind="sharded", sharding="row_wise", pipeline=True, **rows)
    assert ended(2, pipelined, stream) == {""}
    assert losses(root / "pipelined") == losses(root / "sharded")


def arrive(folder: Path, number: int) -> None:
    """A day of users who go round a ring of items, complete at once."""
    rng = np.random.default_rng(number)
    rows = []
    for user in range(30):
        start = int(rng.integers(12))
        rows += [(f"u{user}", f"item {(start + k) % 12}", 100 * k + user) for k in range(8)]
    write_day(folder, f"2026-03-0{number}", rows)
    (folder / f"dt=2026-03-0{number}" / "_SUCCESS").touch()


def test_two_ranks_watch_a_folder_as_one(tmp_path: Path) -> None:
    """The first three days; a signal to the second rank while the fourth is waited for; then it, and a late file."""
    config = stream_config(tmp_path)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, name="log", source="log"))
    stream = StreamConfig(watch=str(tmp_path / "in"), item_rows=500, settle_s=0, timeout_s=600)
    for number in (1, 2, 3):
        arrive(tmp_path / "in", number)
    two = narrow(config, tmp_path / "two")
    end = f"Interrupted: stopped by SIGTERM; saved. Resume with run.dir={tmp_path / 'two'}"
    assert ended(2, two, stream, None, 1) == {end}
    assert load_run(tmp_path / "two")[1].path.name == "2026-03-03" and len(days_of(tmp_path / "two")) == 3
    arrive(tmp_path / "in", 4)
    stream = dataclasses.replace(stream, timeout_s=0)
    assert ended(1, narrow(config, tmp_path / "one"), stream) == {""}
    late = tmp_path / "in/dt=2026-03-02/part-1.csv"
    late.write_text("user,item,timestamp\n")
    (first, said), (second, _) = run_ranks(2, stream_on_rank, two, stream)
    assert first == second == ""
    assert said.count(f"{late} came late and is left out: 2026-03-02 has passed") == 1
    assert "; 1 late files left out;" in said[-1]
    written = json.loads((tmp_path / "two/days.json").read_text())
    assert written["late_files"] == {"2026-03-02": ["dt=2026-03-02/part-1.csv"]}
    assert [day.pop("late_files", 0) for day in written["days"]] == [0, 1, 0, 0]
    (tmp_path / "two/days.json").write_text(json.dumps(written))
    assert_same_stream(tmp_path / "one", tmp_path / "two")
    for folder in ("one", "two"):
        assert load_run(tmp_path / folder)[1].path == tmp_path / folder / "days" / "2026-03-04", "the latest histories"


def test_the_command_starts_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    def elastic(launcher: Any, *_: Any) -> Any:
        def run(*args: str) -> None:
            passed = json.loads((Path(args[2]) / launch.OPTIONS).read_text())
            started.append((launcher.nproc_per_node, args, passed))

        return run

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", elastic)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    options = {**to_dict(stream_config(tmp_path, run_ranks=2)), "stream": {"day_s": 3600}}
    run_command(options)
    ((size, args, passed),) = started
    assert (size, args[:2], args[3]) == (2, ("-m", "hstu.launch"), "hstu.stream_train") and passed == options
    with pytest.raises(UserError, match="stream.day_s=0: expected >= 1"):
        run_command({**options, "stream": {"day_s": 0}})
