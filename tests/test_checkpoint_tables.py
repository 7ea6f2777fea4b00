"""Checkpoints of tables with the state of their optimizers: local to sharded and back, and from one plan to another."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import polars
import pytest
import torch

from hstu import checkpoint
from hstu.checkpoint import Saver
from hstu.checkpoint_state import restore_model, restore_run, run_state
from hstu.config import Config, LossConfig, from_dict
from hstu.config_embedding import EmbeddingConfig
from hstu.distributed import World
from hstu.embedding import LocalItemTable
from hstu.errors import UserError
from hstu.export import as_scored, export_run
from hstu.optim import set_learning_rate
from hstu.runs import load_run, open_store
from hstu.train import train as train_run
from tests.ranks import run_ranks
from tests.test_sharded_losses import DIM, NUM_ITEMS, Model, whole_table
from tests.test_train import logged, make_config
from tests.test_train_ranks import narrow, run_steps

pytest.importorskip("torchrec")

POSITIONS = 40
STEPS = 3
"""Before the checkpoint, and again after it."""


def make(kind: str, optimizer: str, sharding: str):
    """Model and optimizers, of its table and of the rest."""
    from hstu.sharded.tables import ShardedItemTable, shard
    from hstu.table_optim import Rule, TableOptimizer

    config = from_dict({
        "embedding": {"kind": kind, "optimizer": optimizer, "sharding": sharding, "lr": 0.1}, "model": {"dim": DIM},
    })  # fmt: skip
    torch.manual_seed(5)
    if kind == "sharded":
        model = Model(ShardedItemTable(NUM_ITEMS, DIM))
        tables = shard(model, config, World.current())
    else:
        model = Model(LocalItemTable(NUM_ITEMS, DIM))
        rule = Rule(optimizer, config.optim.eps, tuple(config.optim.betas))
        tables = TableOptimizer(model.table.parameters(), rule, 0.1, 0.1 / config.optim.lr)
    return model, [torch.optim.AdamW(model.map.parameters(), lr=0.01, fused=True), tables], config.optim.lr


def train(folder: Path, begin: int, end: int, kind: str, optimizer: str, sharding: str = "auto"):
    """Steps ``begin`` to ``end`` of one global batch, resumed where begin > 0; then the table and the map, whole."""
    world, loss = World.current(), LossConfig(num_negatives=16)
    model, optimizers, lr = make(kind, optimizer, sharding)
    if begin:
        found = checkpoint.load_last(folder, world)
        assert found is not None
        assert restore_run(found, model, optimizers, None, world) == {"global_step": begin}
    own = slice(world.rank * POSITIONS // world.size, (world.rank + 1) * POSITIONS // world.size)
    for step in range(begin, end):
        generator = torch.Generator().manual_seed(step)
        events, labels = torch.randint(1, NUM_ITEMS + 1, (2, POSITIONS), generator=generator)
        set_learning_rate(optimizers[1], lr)
        for one in optimizers:
            one.zero_grad()
        losses = model(events[own], labels[own], torch.arange(POSITIONS)[own], loss, 100 + step)
        (losses.sum() / POSITIONS * world.size).backward()
        for parameter in model.map.parameters():
            parameter.grad = world.sum(parameter.grad) / world.size
        for one in optimizers:
            one.step()
    saver = Saver(folder, keep_last=1, world=world)
    saver.save(run_state(model, optimizers, None, {"global_step": end}, world), end)
    saver.wait()
    saver.close()
    return whole_table(model.table, world), model.map.weight.detach()


LOCAL = (1, "local", "auto")
CASES = {
    "local to 2 by rows": (LOCAL, (2, "sharded", "row_wise")),
    "2 by rows to local": ((2, "sharded", "row_wise"), LOCAL),
    "4 by rows to 2 by rows": ((4, "sharded", "row_wise"), (2, "sharded", "row_wise")),
    "2 whole to 4 by rows": ((2, "sharded", "table_wise"), (4, "sharded", "row_wise")),
    "1 sharded to 2 by rows": ((1, "sharded", "auto"), (2, "sharded", "row_wise")),
}


def check(tmp_path: Path, before, after, optimizer: str) -> None:
    whole = train(tmp_path / "whole", 0, 2 * STEPS, "local", optimizer)
    run_ranks(before[0], train, tmp_path / "run", 0, STEPS, before[1], optimizer, before[2])
    results = run_ranks(after[0], train, tmp_path / "run", STEPS, 2 * STEPS, after[1], optimizer, after[2])
    for tensors in results:
        for ours, expected in zip(tensors, whole, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-6)
    one, two = (checkpoint.load_last(tmp_path / name) for name in ("whole", "run"))
    assert one is not None and two is not None
    ours, expected = two.tensors("optimizer.table."), one.tensors("optimizer.table.")
    assert ours.keys() == expected.keys() and int(ours["weight.step"]) == 2 * STEPS
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rowwise_adagrad_goes_on_alike(tmp_path, case):
    check(tmp_path, *case, "rowwise_adagrad")


@pytest.mark.parametrize(
    "optimizer, case",
    [("rowwise_adam", "local to 2 by rows"), ("adam", "2 by rows to local"), ("sgd", "4 by rows to 2 by rows")],
)
def test_other_optimizers_go_on_alike(tmp_path, optimizer, case):
    check(tmp_path, *CASES[case], optimizer)


def test_columns_to_local_and_to_rows(tmp_path):
    check(tmp_path / "a", (2, "sharded", "column_wise"), LOCAL, "adagrad")
    check(tmp_path / "b", (2, "sharded", "column_wise"), (2, "sharded", "row_wise"), "adam")


def test_a_number_for_each_part_of_a_row_needs_the_same_parts(tmp_path):
    run_ranks(2, train, tmp_path, 0, STEPS, "sharded", "rowwise_adagrad", "column_wise")
    with pytest.raises(UserError, match=r"optimizer\.table\.weight\.momentum1 is of shape \(76,\), expected .*\(38,\)"):
        train(tmp_path, STEPS, STEPS + 1, "local", "rowwise_adagrad")


def test_a_sharded_run_is_evaluated_on_one_process(tmp_path):
    ((table, linear), _) = run_ranks(2, train, tmp_path, 0, STEPS, "sharded", "rowwise_adagrad", "row_wise")
    found = checkpoint.load_last(tmp_path)
    assert found is not None
    model = Model(LocalItemTable(NUM_ITEMS, DIM))
    restore_model(found, model)
    assert torch.equal(model.table.weight, table) and torch.equal(model.map.weight, linear)


# hstu-train


def table_config(root: Path, name: str, kind: str, **embedding: str) -> Config:
    config = make_config(root, run_save_every_steps=2, run_save_every_epochs=None, run_epochs=1)
    tables = EmbeddingConfig(kind=kind, **{"optimizer": "rowwise_adagrad", **embedding}, lr=0.05)
    return narrow(root / name, dataclasses.replace(config, embedding=tables))


def test_training_goes_on_with_tables_of_the_other_kind(tmp_path):
    """Local, then sharded over two ranks by rows, then over one, then local: the losses of a local run."""
    whole = table_config(tmp_path, "whole", "local")
    store = open_store(whole).path
    run_ranks(1, run_steps, whole, store, 9)
    parts = [("local", "auto", 1, 3), ("sharded", "row_wise", 2, 5), ("sharded", "auto", 1, 7), ("local", "auto", 1, 9)]
    for kind, sharding, num_ranks, end in parts:  # ended after an odd step: goes on from the even one before
        config = table_config(tmp_path, "parts", kind, sharding=sharding)
        assert run_ranks(num_ranks, run_steps, config, store, end) == ["Stop: "] * num_ranks
    expected, found = ([line["loss"] for line in logged(tmp_path / n) if "loss" in line] for n in ("whole", "parts"))
    assert len(expected) == 9 and found == pytest.approx(expected, rel=2e-5)
    with pytest.raises(UserError, match=r"embedding\.optimizer='rowwise_adagrad', now 'adagrad'"):
        train_run(table_config(tmp_path, "parts", "local", optimizer="adagrad"))


def test_a_sharded_run_is_evaluated_and_exported_on_one_process(tmp_path):
    config = table_config(tmp_path, "run", "sharded", sharding="row_wise")
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, average_decay=0.9))
    store = open_store(config).path
    assert run_ranks(2, run_steps, config, store) == ["", ""]
    tables = {}
    for which in ("best", "last"):
        tables[which] = load_run(tmp_path / "run", which)[2].table
        files = export_run({"run": tmp_path / "run", "out": tmp_path / which, "which": which, "format": ["parquet"]})
        vectors = torch.from_numpy(polars.read_parquet(files[1])["vector"].to_numpy())
        assert vectors.shape == (60, 8) and torch.equal(vectors, as_scored(tables[which], tables[which].weight[1:]))
    saved = checkpoint.load(tmp_path / "run" / "checkpoints" / checkpoint.BEST)
    assert saved.ranks == 2 and isinstance(tables["best"], LocalItemTable)
    assert torch.equal(tables["best"].weight, saved.tensors("model.table.")["weight"])
    assert tables["best"].weight[0].abs().sum() == 0 and not torch.equal(tables["best"].weight, tables["last"].weight)
