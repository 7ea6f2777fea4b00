"""Ranking runs on sharded stores: they learn from a rank's own shards, are resumed exactly, ranks train together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hstu.config import ColumnsConfig, Config, DataConfig
from hstu.prepare import prepare
from hstu.progress import Display
from hstu.train import Trainer, train
from tests.ranks import run_ranks
from tests.stopping import stopped_at
from tests.test_ranking_train import NUM_ITEMS, SPLIT_TIME, make_config, planted_store
from tests.test_train import assert_same_run, final_state, logged


def write_planted_log(folder: Path) -> DataConfig:
    """The log of :func:`planted_store` as files, in three shards."""
    store = planted_store(folder / "store")
    lines, columns = ["user,item,timestamp,click,watch_s"], [store.columns["click"], store.columns["watch_s"]]
    for user in range(store.num_users):
        for row in range(store.offsets[user], store.offsets[user + 1]):
            values = ",".join(str(column[row]) for column in columns)
            lines.append(f"{user},{store.item_ids[row]},{store.timestamps[row]},{values}")
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    items = [f"{i},{('even', 'odd')[i % 2]}" for i in range(1, NUM_ITEMS + 1)]
    (folder / "items.csv").write_text("\n".join(["item,parity", *items]) + "\n")
    return DataConfig(
        "planted", "log", raw=str(folder / "log.csv"), root=str(folder / "data"), shards=3, protocol="stable",
        items_file=str(folder / "items.csv"), columns=ColumnsConfig(values=["click", "watch_s"]), split="global-time",
        split_time=str(SPLIT_TIME),
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _without_plots() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hstu.report.plot_curves", lambda folder: None)
        patch.setattr("hstu.plots.plot_reliability", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("planted")


@pytest.fixture(scope="module")
def data(root: Path) -> DataConfig:
    return write_planted_log(root)


def stream_config(root: Path, data: DataConfig, name: str, form: str = "interleaved", **changes: Any) -> Config:
    run = {"run_reader": "stream", "run_buffer_users": 10, **changes}
    return dataclasses.replace(make_config(root, form, name, **run), data=data)


@pytest.fixture(scope="module")
def finished(root: Path, data: DataConfig) -> Path:
    return train(stream_config(root, data, "stream"))


def best_ne(folder: Path) -> float:
    return min(line["click/ne"] for line in logged(folder) if "click/ne" in line)


def test_a_streamed_run_learns_as_one_that_draws(root: Path, data: DataConfig, finished: Path) -> None:
    drawn = train(stream_config(root, data, "drawn", run_reader="draw"))
    steps = [logged(folder)[-1]["step"] for folder in (finished, drawn)]
    assert steps[0] == pytest.approx(steps[1], rel=0.1)
    assert best_ne(finished) < 0.8 > best_ne(drawn), "1 is what a constant gets"


@pytest.mark.parametrize("stop", [3, 10], ids=["in the first epoch", "in a later one"])
def test_a_streamed_run_is_resumed_bit_identical(
    root: Path, data: DataConfig, finished: Path, tmp_path: Path, stop: int
) -> None:
    config = stream_config(tmp_path, data, "stopped")
    with stopped_at(stop - 1):
        train(config)
    progress = final_state(tmp_path / "stopped").values["progress"]
    assert progress["global_step"] == stop and progress["step"] > 0
    assert_same_run(finished, train(config))


def streamed_steps(config: Config) -> tuple[list[float], list[float], list[int], list[int]]:
    """Of an epoch: losses, how uneven the ranks' work was, rows that this rank predicted; and the shards it read."""
    trainer = Trainer(config, prepare(config.data, quiet=True), Path(str(config.run.dir)), Display(False))
    losses, uneven, rows = [], [], []
    for step in range(trainer._num_steps(0)):
        made = trainer._make_input(0, step)
        losses.append(trainer._step(made))
        uneven.append(made.imbalance)
        rows += made.parts[0][0].batch.rows.tolist()
    return losses, uneven, rows, trainer.data.own


@pytest.mark.parametrize("form", ["interleaved", "fused"])
def test_ranks_train_as_one(root: Path, data: DataConfig, form: str) -> None:
    config = stream_config(root, data, f"ranks-{form}", form)
    (losses, uneven, first, shards), (also, uneven_too, second, others) = run_ranks(2, streamed_steps, config)
    assert losses == also, "the loss is that of all ranks"
    assert uneven == uneven_too and 0 < max(uneven) < 0.3
    assert sorted(shards + others) == [0, 1, 2]
    alone = streamed_steps(stream_config(root, data, f"alone-{form}", form))
    assert losses == pytest.approx(alone[0], rel=1e-5)
    assert sorted(first + second) == sorted(alone[2]) and len(set(alone[2])) == len(alone[2]) > 300
