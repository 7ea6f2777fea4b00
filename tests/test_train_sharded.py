"""Training on sharded stores: as on one store, and from a rank's own shards."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu.config import ColumnsConfig, Config, DataConfig, LossConfig
from hstu.data.store import SequenceStore, write_store
from hstu.errors import UserError
from hstu.prepare import prepare
from hstu.train import Trainer, train
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


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def finished(root: Path) -> Path:
    return train(sharded_config(root, "stream", run_epochs=4))


def refusal(config: Config) -> str:
    """What training says on the ranks that are there, where it refuses to go on."""
    try:
        train(config)
    except UserError as error:
        return str(error)
    return ""


def test_streamed_loss_falls(finished: Path) -> None:
    losses = [line["epoch_loss"] for line in logged(finished) if "epoch_loss" in line]
    assert len(losses) == 4 and losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("stop", [3, 16], ids=["in the first epoch", "at the end of the second"])
def test_streamed_run_is_resumed_bit_identical(root: Path, finished: Path, tmp_path: Path, stop: int) -> None:
    config = sharded_config(root, "unused", run_epochs=4)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path / "stopped")))
    with stopped_at(stop - 1):
        train(config)
    assert final_state(tmp_path / "stopped").values["progress"]["global_step"] == stop
    refused = r"saved by 1 rank\(s\) within an epoch, .* 2 would train on some twice; take 1 until"
    assert all(re.search(refused, text) for text in run_ranks(2, refusal, config))
    assert_same_run(finished, train(config))


def test_drawing_from_shards_is_drawing_from_one_store(root: Path, tmp_path: Path) -> None:
    """The joined view against a single store with the same users in the same order: the same run, bit for bit."""
    config = sharded_config(tmp_path, "joined", run_reader="draw")
    store = prepare(config.data)
    folder = train(config)
    single = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path / "single")))
    copied = write_store(
        tmp_path / "copy", offsets=store.offsets, item_ids=np.asarray(store.item_ids),
        timestamps=np.asarray(store.timestamps), item_raw_ids=store.item_raw_ids, user_raw_ids=store.user_raw_ids,
        num_items=store.num_items, meta={"name": "log", "protocol": "reference"},
    )  # fmt: skip
    assert type(store) is not SequenceStore and type(copied) is SequenceStore
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hstu.train.open_store", lambda *_: copied)
        assert_same_run(folder, train(single))


def streamed_steps(config: Config) -> tuple[list[float], list[int], set[str]]:
    """Losses of an epoch, users of this rank and the shards it read."""
    from hstu.progress import Display

    store = prepare(config.data, quiet=True)
    trainer = Trainer(config, store, Path(str(config.run.dir)), Display(False))
    losses, users = [], []
    for step in range(trainer._num_steps(0)):
        made = trainer._make_input(0, step)
        losses.append(trainer._step(made))
        users += made.parts[0][0].batch.users.tolist()
    return losses, users, {s.path.name for s in trainer.data.source.shards}


def test_ranks_train_together_from_their_own_shards(root: Path) -> None:
    config = sharded_config(root, "ranks")
    store = prepare(config.data, quiet=True)
    (losses, first, files), (also, second, others) = run_ranks(2, streamed_steps, config)
    assert losses == also, "the loss is that of all ranks"
    assert losses[-1] < losses[0]
    assert not files & others and len(files | others) == 3
    assert sorted(first + second) == list(range(store.num_users))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_batch_tokens": 100}, "run.batch_tokens=100: expected null with run.reader=stream"),
        ({"loss": LossConfig(event_weights="actions")}, "loss.event_weights='actions': expected none with run.reader"),
        ({"run_reader": "fast"}, "run.reader='fast': expected one of draw, stream"),
        ({"run_buffer_users": 0}, "run.buffer_users=0: expected >= 1"),
    ],
    ids=["tokens", "weights", "reader", "buffer"],
)
def test_what_a_stream_cannot_do_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sharded_config(tmp_path, **changes)


def test_a_store_that_is_not_sharded_is_refused(tmp_path: Path) -> None:
    config = sharded_config(tmp_path)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, shards=None, columns=ColumnsConfig()))
    with pytest.raises(UserError, match="is one store; prepare it with data.shards=S"):
        train(config)
