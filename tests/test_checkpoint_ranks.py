"""Checkpoints on several ranks: written by N and read by M, sharded tensors too; one rank's failure is told on all."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Shard as Rows

from hstu import checkpoint
from hstu.checkpoint import Saver, State, writers
from hstu.checkpoint_state import restore_run, run_state
from hstu.config import Config, OptimConfig
from hstu.data.store import SequenceStore
from hstu.distributed import World
from hstu.errors import UserError
from hstu.optim import make_optimizer
from hstu.progress import Display
from hstu.runs import open_store
from hstu.train import Trainer
from tests.ranks import run_ranks
from tests.test_train import make_config

TABLE = torch.arange(33.0).reshape(11, 3)
"""Rows of a prime number, so that no number of ranks divides them."""
WIDE = torch.arange(20.0).reshape(2, 10)


def sharded(table: torch.Tensor) -> ShardedTensor:
    """``table`` with columns split over ranks, as torchrec's state dicts hold a column-wise table."""
    world = World.current()
    edges = [round(i * table.shape[1] / world.size) for i in range(world.size + 1)]
    first, last = edges[world.rank], edges[world.rank + 1]
    block = table[:, first:last].contiguous()
    shard = Shard.from_tensor_and_offsets(block, [0, first], world.rank)
    return ShardedTensor._init_from_local_shards([shard], table.shape)


def rows(table: torch.Tensor) -> DTensor:
    """``table`` with rows split over ranks."""
    return distribute_tensor(table, init_device_mesh("cpu", (dist.get_world_size(),)), [Rows(0)])


def state(fill: float) -> State:
    rank = dist.get_rank()
    tensors = {
        "rows": rows(TABLE + fill), "columns": sharded(WIDE + fill), "whole": TABLE - fill,
        f"own.{rank}": torch.full((2,), 10.0 * rank + fill),
    }  # fmt: skip
    return State(tensors, {"of rank": rank})


def save(folder: Path, *fills: float) -> None:
    saver = Saver(folder, keep_last=9)
    for step, fill in enumerate(fills):
        saver.save(state(fill), step)
    saver.wait()
    saver.close()


def read(folder: Path, fill: float) -> tuple[int, int]:
    """Reads the last one into tensors sharded as they are here, and compares; gives its step and number of ranks."""
    world = World.current()
    found = checkpoint.load_last(folder, world)
    assert found is not None and found.values == {"of rank": 0}
    targets = {"rows": rows(torch.zeros(11, 3)), "columns": sharded(torch.zeros(2, 10)), "whole": torch.zeros(11, 3)}
    found.read(targets, world)
    assert torch.equal(targets["rows"].full_tensor(), TABLE + fill)
    edges = [round(i * 10 / world.size) for i in range(world.size + 1)]
    (local,) = targets["columns"].local_shards()
    assert torch.equal(local.tensor, (WIDE + fill)[:, edges[world.rank] : edges[world.rank + 1]])
    assert torch.equal(targets["whole"], TABLE - fill)
    return checkpoint.step_of(found.path), found.ranks


@pytest.mark.parametrize("saving, reading", [(1, 2), (2, 1), (4, 2), (2, 4), (2, 2)])
def test_written_by_n_ranks_and_read_by_m(tmp_path, saving, reading):
    run_ranks(saving, save, tmp_path, 1.0, 2.0)
    assert run_ranks(reading, read, tmp_path, 2.0) == [(1, saving)] * reading
    found = checkpoint.load_last(tmp_path)  # without a process group
    assert found is not None
    tensors = found.tensors()
    assert torch.equal(tensors["rows"], TABLE + 2) and torch.equal(tensors["columns"], WIDE + 2)
    assert torch.cat([tensors[f"own.{rank}"] for rank in range(saving)])[::2].tolist() == [
        10.0 * rank + 2 for rank in range(saving)
    ]
    assert len(list(found.path.glob("*.distcp"))) == saving


def test_what_is_whole_on_every_rank_is_written_once(tmp_path):
    run_ranks(1, save, tmp_path / "one", 1.0)
    run_ranks(4, save, tmp_path / "four", 1.0)
    one, four = (sum(f.stat().st_size for f in (tmp_path / n / "step-000000000").iterdir()) for n in ("one", "four"))
    assert four < one + 20_000  # headers of torch.save, not four times the tensors


def test_writers_by_hand():
    a, b, c, own = ("a", (0,)), ("b", (0,)), ("c", (0,)), ("own", (0,))
    both = {a: 8, b: 5, c: 4}
    # own's 6 lie on rank 1; then 8 -> rank 0, 5 -> 1 (11), 4 -> 0 (12).
    assert writers([both, {**both, own: 6}]) == {own: 1, a: 0, b: 1, c: 0}
    # b stays on rank 1, a cannot stay on 2; then 8 -> rank 0, 4 -> 1 (9).
    assert writers([both, both], {a: 2, b: 1, own: 1}) == {b: 1, a: 0, c: 1}


def host_copies(folder: Path) -> tuple[list[int], int]:
    """Bytes of this rank's copies after each pair of saves, and how often the ranks told each other their blocks."""
    saver, sizes = Saver(folder, keep_last=9), []
    with mock.patch.object(checkpoint, "writers", wraps=writers) as asked:
        for step in range(3):
            everything = state(step - 0.5).tensors
            saver.save_best(State({name: everything[name] for name in ("rows", "whole")}))
            saver.save(state(step), step)
            sizes.append(sum(copy.nbytes for copy in saver._copies.values()))
        saver.wait()
    saver.close()
    return sizes, asked.call_count


def test_the_host_holds_one_copy_over_all_ranks_steps_and_best(tmp_path):
    found = run_ranks(3, host_copies, tmp_path)
    whole = 4 * (TABLE.numel() + WIDE.numel() + TABLE.numel() + 3 * 2)
    assert [sum(sizes[step] for sizes, _ in found) for step in range(3)] == [whole] * 3
    assert [asked for _, asked in found] == [2, 2, 2]  # once for each kind
    assert torch.equal(checkpoint.load(tmp_path / "best").tensors()["whole"], TABLE - 1.5)
    assert torch.equal(checkpoint.load(tmp_path / "step-000000002").tensors()["whole"], TABLE - 2)
    assert torch.equal(checkpoint.load(tmp_path / "best").tensors()["rows"], TABLE + 1.5)


def groups_after_savers(folder: Path) -> list[int]:
    """Number of process groups of this rank before, and after each of three runs."""
    counts = [len(dist.distributed_c10d._world.pg_map)]
    for _ in range(3):
        save(folder, 1.0)
        counts.append(len(dist.distributed_c10d._world.pg_map))
    saver = Saver(folder, keep_last=1)
    counts.append(len(dist.distributed_c10d._world.pg_map))
    saver.close()
    saver.close()
    return counts


def test_a_closed_saver_leaves_no_group(tmp_path):
    for before, *after, meanwhile in run_ranks(2, groups_after_savers, tmp_path):
        # The mesh of the sharded state is made once, with a group of its own or none.
        assert after == [after[0]] * 3 and meanwhile == after[0] + 1 and before <= after[0]


@pytest.mark.parametrize("file", ["__0_0.distcp", "__1_0.distcp"])
def test_all_ranks_pass_over_what_one_of_them_found_damaged(tmp_path, file):
    run_ranks(2, save, tmp_path, 1.0, 2.0)
    path = tmp_path / "step-000000001" / file
    os.truncate(path, path.stat().st_size - 1)
    assert run_ranks(2, read, tmp_path, 1.0) == [(0, 2)] * 2


def save_where_the_disk_of_one_rank_is_full(folder: Path, full: int) -> str:
    saver = Saver(folder, keep_last=9)
    saver.save(state(1.0), 1)
    saver.wait()
    if dist.get_rank() == full:
        (folder / "step-000000002.partial").mkdir()
        (folder / "step-000000002.partial" / f"__{full}_0.distcp").symlink_to("/dev/full")
    dist.barrier()
    saver.save(state(2.0), 2)
    try:
        saver.wait()
    except OSError as error:
        return str(error.strerror)
    finally:
        saver.close()
    return "nothing"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("full", [0, 1])
def test_a_full_disk_of_one_rank_is_told_on_all(tmp_path, full):
    assert run_ranks(2, save_where_the_disk_of_one_rank_is_full, tmp_path, full) == ["No space left on device"] * 2
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]


def save_into_folders_of_their_own(folder: Path) -> str:
    saver = Saver(folder / str(dist.get_rank()), keep_last=1)
    saver.save(state(1.0), 1)
    with pytest.raises(UserError) as raised:
        saver.wait()
    saver.close()
    return str(raised.value)


def test_ranks_that_share_no_folder_are_told(tmp_path):
    told = run_ranks(2, save_into_folders_of_their_own, tmp_path)
    assert len(set(told)) == 1 and "__1_0.distcp of another rank is not there" in told[0] and "run.dir" in told[0]
    assert list((tmp_path / "0").iterdir()) == []


def read_another_size(folder: Path) -> str:
    found = checkpoint.load_last(folder, World.current())
    assert found is not None
    with pytest.raises(UserError) as raised:
        found.read({"whole": torch.zeros(11, 3 + dist.get_rank())}, World.current())
    return str(raised.value)


def test_a_tensor_that_does_not_fit_on_one_rank_is_told_on_all(tmp_path):
    run_ranks(2, save, tmp_path, 1.0)
    told = run_ranks(2, read_another_size, tmp_path)
    assert told[0] == told[1] and "whole is of shape (11, 3), expected shape (11, 4)" in told[0]


# A run


def train(folder: Path, begin: int, end: int) -> tuple[list[list[float]], list[float]]:
    """Steps ``begin`` to ``end`` of a model whose table is split by rows over ranks; resumes where begin > 0.

    Gives the table and what torch's generator draws next.
    """
    world = World.current()
    torch.manual_seed(100 + world.rank)
    model = torch.nn.Module()
    model.table = torch.nn.Parameter(rows(TABLE / 33))
    model.scale = torch.nn.Parameter(torch.ones(()))
    optimizer = make_optimizer(model, OptimConfig(lr=0.1))
    if begin:
        found = checkpoint.load_last(folder, world)
        assert found is not None
        assert restore_run(found, model, [optimizer], None, world) == {"global_step": begin}
    for step in range(begin, end):
        optimizer.zero_grad()
        weights = torch.randn(11, 3, generator=torch.Generator().manual_seed(step))
        loss = (model.table * rows(weights)).sum().full_tensor().square() * model.scale
        loss.backward()
        optimizer.step()
    saver = Saver(folder, keep_last=1)
    saver.save(run_state(model, [optimizer], None, {"global_step": end}, world), end)
    saver.wait()
    saver.close()
    return model.table.full_tensor().tolist(), torch.rand(2).tolist()


@pytest.mark.parametrize("saving, reading", [(1, 2), (2, 1), (4, 2)])
def test_a_run_goes_on_alike_on_another_number_of_ranks(tmp_path, saving, reading):
    whole, _ = run_ranks(1, train, tmp_path / "whole", 0, 4)[0]
    before = run_ranks(saving, train, tmp_path / "parts", 0, 2)
    after = run_ranks(reading, train, tmp_path / "parts", 2, 4)
    for table, _ in after:
        torch.testing.assert_close(torch.tensor(table), torch.tensor(whole))
    assert [drawn for _, drawn in after] == [before[rank % saving][1] for rank in range(reading)]


# hstu-train


class Stop(Exception):
    """Ends a training."""


def train_until(config: Config, store_path: Path, end: int) -> None:
    """Trains on the ranks that are there until step ``end``, saving every other step."""
    trainer, step = Trainer(config, SequenceStore.open(store_path), Path(str(config.run.dir)), quiet()), Trainer._step

    def watched(self, step_input):
        if self.progress.global_step == end:
            raise Stop
        return step(self, step_input)

    Trainer._step = watched
    try:
        trainer.run()
    except Stop:
        pass
    finally:
        Trainer._step = step


def quiet() -> Display:
    return Display(False, shown=False)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("saving, reading", [(1, 2), (2, 1), (4, 2)])
def test_training_goes_on_alike_on_another_number_of_ranks(tmp_path, saving, reading):
    optim = OptimConfig(lr=3e-3, clip_norm=0.5, average_decay=0.9)
    config = make_config(tmp_path, optim=optim, run_save_every_steps=2, run_save_every_epochs=None, run_threads=1)
    store = open_store(config).path
    folders = {name: tmp_path / name for name in ("whole", "parts")}
    runs = [dataclasses.replace(config.run, dir=str(folder)) for folder in folders.values()]
    whole, parts = (dataclasses.replace(config, run=run) for run in runs)
    train_until(whole, store, 8)
    run_ranks(saving, train_until, parts, store, 5)  # the last one saved is that of step 4
    run_ranks(reading, train_until, parts, store, 8)
    assert len(losses(folders["parts"])) == 8
    assert losses(folders["parts"]) == pytest.approx(losses(folders["whole"]), rel=3e-6)
    one, two = (checkpoint.load_last(folder / "checkpoints") for folder in folders.values())
    assert one is not None and two is not None
    tensors, others = one.tensors(), two.tensors()
    names = [name for name in tensors if not name.startswith("rng.")]
    assert {name.split(".")[0] for name in names} == {"model", "optimizer", "average"}
    for name in names:
        assert (tensors[name] - others[name]).abs().max() <= 2e-4 * tensors[name].abs().max(), name
