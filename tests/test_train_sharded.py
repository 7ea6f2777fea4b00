"""Training on sharded stores: as on one store, and from each rank's own shards with the result of one rank."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from hstu.config import ColumnsConfig, Config, DataConfig
from hstu.data.store import SequenceStore, write_store
from hstu.errors import UserError
from hstu.prepare import prepare
from hstu.train import train
from tests.ranks import run_ranks
from tests.stopping import stopped_at
from tests.test_train import assert_same_run, final_state, logged, make_config


def write_log(folder: Path) -> Path:
    """120 users, 40 items; the next item is mostly the last one plus one."""
    rng = np.random.default_rng(0)
    lines = ["user,item,timestamp"]
    for user in range(120):
        item = int(rng.integers(40))
        for place in range(int(rng.integers(4, 14))):
            lines.append(f"{user},{item},{10**9 + 100 * place + user}")
            item = (item + 1) % 40 if rng.random() < 0.8 else int(rng.integers(40))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    return folder / "log.csv"


def sharded_config(root: Path, name: str = "run", **changes: Any) -> Config:
    data = DataConfig(name="log", source="log", raw=str(write_log(root / "raw")), root=str(root / "data"), shards=3)
    return make_config(root, name, data=data, **{"run_reader": "stream", "run_buffer_users": 30, **changes})


def at(config: Config, folder: Path) -> Config:
    """The run in another folder."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder)))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def finished(root: Path) -> Path:
    return train(sharded_config(root, "stream", run_epochs=4))


def test_streamed_loss_falls(finished: Path) -> None:
    losses = [line["epoch_loss"] for line in logged(finished) if "epoch_loss" in line]
    assert len(losses) == 4 and losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("stop", [3, 16], ids=["in the first epoch", "at the end of the second"])
def test_streamed_run_is_resumed_bit_identical(root: Path, finished: Path, tmp_path: Path, stop: int) -> None:
    config = sharded_config(root, "unused", run_epochs=4)
    config = at(config, tmp_path / "stopped")
    with stopped_at(stop - 1):
        train(config)
    assert final_state(tmp_path / "stopped").values["progress"]["global_step"] == stop
    assert_same_run(finished, train(config))


def test_drawing_from_shards_is_drawing_from_one_store(root: Path, tmp_path: Path) -> None:
    """The joined view against a single store with the same users in the same order: the same run, bit for bit."""
    config = sharded_config(tmp_path, "joined", run_reader="draw")
    store = prepare(config.data)
    folder = train(config)
    single = at(config, tmp_path / "single")
    copied = write_store(
        tmp_path / "copy", offsets=store.offsets, item_ids=np.asarray(store.item_ids),
        timestamps=np.asarray(store.timestamps), item_raw_ids=store.item_raw_ids, user_raw_ids=store.user_raw_ids,
        num_items=store.num_items, meta={"name": "log", "protocol": "reference"},
    )  # fmt: skip
    assert type(store) is not SequenceStore and type(copied) is SequenceStore
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hstu.train.open_store", lambda *_: copied)
        assert_same_run(folder, train(single))


def losses_of(folder: Path) -> list[float]:
    return [line["loss"] for line in logged(folder) if "loss" in line]


def stopped_and_continued(config: Config, stop: int | None) -> int:
    """Trains on the ranks that are there, up to a stop where one is given. Process groups that are left."""
    with contextlib.nullcontext() if stop is None else stopped_at(stop - 1):
        train(config)
    return len(dist.distributed_c10d._world.pg_map)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_train_as_one(root: Path, finished: Path, tmp_path: Path, size: int) -> None:
    config = at(sharded_config(root, "unused", run_epochs=4), tmp_path / "ranks")
    assert run_ranks(size, stopped_and_continued, config, None) == [1] * size, "that of the loaders is freed"
    assert losses_of(tmp_path / "ranks") == pytest.approx(losses_of(finished), rel=1e-5)
    assert 0 < max(line["imbalance"] for line in logged(tmp_path / "ranks") if "loss" in line) < 0.1


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (3, 2)])
def test_stopped_within_an_epoch_and_continued_on_other_ranks(
    root: Path, finished: Path, tmp_path: Path, before: int, after: int
) -> None:
    config = at(sharded_config(root, "unused", run_epochs=4), tmp_path / "stopped")
    assert run_ranks(before, stopped_and_continued, config, 11) == [1] * before
    progress = final_state(tmp_path / "stopped").values["progress"]
    assert progress["global_step"] == 11 and progress["step"] > 0
    run_ranks(after, stopped_and_continued, config, None)
    assert losses_of(tmp_path / "stopped") == pytest.approx(losses_of(finished), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_batch_tokens": 100}, "run.batch_tokens=100: expected null with run.reader=stream"),
        ({"run_reader": "fast"}, "run.reader='fast': expected one of draw, stream"),
        ({"run_buffer_users": 0}, "run.buffer_users=0: expected >= 1"),
    ],
    ids=["tokens", "reader", "buffer"],
)
def test_what_a_stream_cannot_do_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sharded_config(tmp_path, **changes)


def test_a_store_that_is_not_sharded_is_refused(tmp_path: Path) -> None:
    config = sharded_config(tmp_path)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, shards=None, columns=ColumnsConfig()))
    with pytest.raises(UserError, match="is one store; prepare it with data.shards=S"):
        train(config)
