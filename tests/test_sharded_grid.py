"""Tables cut by columns over nodes and by rows over the ranks of a node, on two nodes of two ranks and on one node."""

import dataclasses
import os
from unittest import mock

import pytest
import torch

from hstu import checkpoint
from hstu.config import OptimConfig
from hstu.config_embedding import EmbeddingConfig
from hstu.distributed import World
from hstu.embedding import LocalItemTable
from hstu.errors import UserError
from hstu.runs import load_run, open_store
from hstu.sharded.plan import TableShape, allowed_shardings
from tests import test_checkpoint_tables as checkpoints
from tests import test_sharded_losses as losses
from tests import test_sharded_plan as plans
from tests import test_sharded_rank as ranks
from tests.ranks import run_ranks
from tests.test_ranking_train import make_config as make_ranking_config
from tests.test_ranking_train import planted_store
from tests.test_sharded_width import of_width
from tests.test_train import logged, make_config
from tests.test_train_ranks import narrow, run_steps

pytest.importorskip("torchrec")

ONE_NODE, TWO_NODES = (2, 2), (4, 2)
"""Ranks, and those of a node."""


def on_node(size, function, *args):
    with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=str(size)):
        return function(*args)


def run_nodes(nodes, function, *args):
    """As :func:`tests.ranks.run_ranks`, on ranks that believe to be on nodes."""
    return run_ranks(nodes[0], on_node, nodes[1], function, *args)


def parts_and_rows():
    """What this rank holds, and ids with their rows: none on the first rank, on each five more than on the last."""
    world = World.current()
    model, _ = plans.make_sharded(world, sharding="grid")
    ids = torch.randint(1, plans.NUM_ITEMS + 1, (5 * world.rank,), generator=torch.Generator().manual_seed(world.rank))
    with torch.no_grad():
        return plans.parts_of(model.table), ids, model.table.lookup(ids)


@pytest.mark.parametrize(
    "nodes, expected",
    [
        (ONE_NODE, [(0, 0, 26, 8), (26, 0, 25, 8)]),
        (TWO_NODES, [(0, 0, 26, 4), (26, 0, 25, 4), (0, 4, 26, 4), (26, 4, 25, 4)]),
        ((2, 1), [(0, 0, 51, 4), (0, 4, 51, 4)]),
    ],
    ids=["one-node", "two-nodes", "two-nodes-of-one"],
)
def test_columns_lie_on_nodes_and_rows_on_their_ranks(nodes, expected):
    torch.manual_seed(7)
    weight = LocalItemTable(plans.NUM_ITEMS, plans.DIM).weight.detach()
    for (parts, ids, rows), (row, column, height, width) in zip(
        run_nodes(nodes, parts_and_rows), expected, strict=True
    ):
        ((first_row, first_column, values),) = parts
        assert (first_row, first_column) == (row, column)
        assert torch.equal(values, weight[row : row + height, column : column + width])
        assert torch.equal(rows, weight[ids])


def test_parts_on_nodes_in_another_order():
    """torchrec may put the left columns on the second node."""
    for _, ids, rows in run_nodes(TWO_NODES, parts_on_swapped_nodes):
        torch.manual_seed(7)
        assert torch.equal(rows, LocalItemTable(plans.NUM_ITEMS, plans.DIM).weight.detach()[ids])


def parts_on_swapped_nodes():
    from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner

    hosts = GreedyPerfPartitioner._get_host_level_devices

    def swapped(topology, devices):
        return hosts(topology, devices)[::-1]

    with mock.patch.object(GreedyPerfPartitioner, "_get_host_level_devices", staticmethod(swapped)):
        parts, *rest = parts_and_rows()
    assert parts[0][1] == (4 if World.current().rank < 2 else 0)
    return parts, *rest


@pytest.mark.parametrize(
    "loss, optimizer, nodes",
    [
        ("sampled", "rowwise_adagrad", ONE_NODE),
        ("sampled", "adagrad", TWO_NODES),
        ("full", "sgd", TWO_NODES),
        ("in-batch", "adam", TWO_NODES),
    ],
)
def test_losses_and_gradients_of_a_local_table(loss, optimizer, nodes):
    loss, sizes = losses.LOSSES[loss], losses.SIZES[nodes[0]]
    expected = losses.train(loss, "local", optimizer, "auto", [60])
    for found, table, linear in run_nodes(nodes, losses.train, loss, "sharded", optimizer, "grid", sizes):
        for ours, theirs in zip(found, expected[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(table, expected[1], rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(linear, expected[2], rtol=1e-4, atol=2e-6)


def test_padded_columns_on_the_second_node():
    """30 columns, stored as 32: 16 and 14."""
    loss = losses.LOSSES["sampled"]
    expected = of_width(30, losses.train, loss, "local", "adagrad", "auto", [60])
    options = (30, losses.train, loss, "sharded", "adagrad", "grid", losses.SIZES[4])
    for found, table, _ in run_nodes(TWO_NODES, of_width, *options):
        torch.testing.assert_close(found, expected[0], rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(table, expected[1], rtol=1e-4, atol=2e-6)


def test_ranks_and_topk_of_a_local_table():
    local = LocalItemTable(ranks.NUM_ITEMS, ranks.DIM)
    with torch.no_grad():
        local.weight.copy_(ranks.make_weight())
    expected = ranks.evaluate(local, World(), [ranks.USERS], True, 10, 64)
    for places, scores, _ in run_nodes(TWO_NODES, ranks.evaluate_sharded, "grid", [25, 0, 14, 1], True, 10, 64, True):
        assert torch.equal(places, expected[0])
        torch.testing.assert_close(scores, expected[1], rtol=1e-6, atol=1e-6)


# Checkpoints


@pytest.mark.parametrize("optimizer", ["adagrad", "adam"])
def test_a_grid_goes_on_as_a_local_table_and_by_rows(tmp_path, optimizer):
    whole = checkpoints.train(tmp_path / "whole", 0, 6, "local", optimizer)
    legs = [
        (TWO_NODES, 0, 2, "sharded", optimizer, "grid"),
        ((1, 1), 2, 3, "local", optimizer, "auto"),
        (ONE_NODE, 3, 4, "sharded", optimizer, "row_wise"),
        (TWO_NODES, 4, 6, "sharded", optimizer, "grid"),
    ]
    for nodes, *leg in legs:
        results = run_nodes(nodes, checkpoints.train, tmp_path / "run", *leg)
    for ours, expected in zip(results[0], whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-6)
    one, two = (checkpoint.load_last(tmp_path / name).tensors("optimizer.table.") for name in ("whole", "run"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("optimizer, field", [("rowwise_adagrad", "momentum1"), ("rowwise_adam", "exp_avg_sq")])
def test_a_number_for_each_part_of_a_row(tmp_path, optimizer, field):
    """Goes on in the same grid as if it had not stopped, and nowhere else."""
    known = ("sharded", optimizer, "grid")
    straight = run_nodes(TWO_NODES, checkpoints.train, tmp_path / "straight", 0, 3, *known)
    run_nodes(TWO_NODES, checkpoints.train, tmp_path / "run", 0, 2, *known)
    message = rf"optimizer\.table\.weight\.{field} is of shape \(76,\), expected .*\(38,\)"
    with pytest.raises(UserError, match=message):
        checkpoints.train(tmp_path / "run", 2, 3, "local", optimizer)
    resumed = run_nodes(TWO_NODES, checkpoints.train, tmp_path / "run", 2, 3, *known)
    for ours, expected in zip(resumed[0], straight[0], strict=True):
        assert torch.equal(ours, expected)


# hstu-train

TABLES = EmbeddingConfig(optimizer="adagrad", lr=0.05)
STEPS = 6


def shown_losses(folder):
    return [line["loss"] for line in logged(folder) if "loss" in line]


@pytest.mark.parametrize(
    "optim",
    [OptimConfig(lr=3e-3), OptimConfig(lr=3e-3, clip_norm=0.3, accumulate_steps=2, average_decay=0.9)],
    ids=["in-the-backward", "at-the-end"],
)
def test_a_ranking_model_with_tables_of_every_kind(optim, tmp_path):
    store = planted_store(tmp_path / "planted").path
    made = make_ranking_config(tmp_path, run_batch_users=5, run_save_every_epochs=None, optim=optim)
    tables = {"item": "grid", "item.parity": "grid", "event.hour_of_day": "column_wise"}
    for name, embedding in {
        "local": TABLES,
        "grid": dataclasses.replace(TABLES, kind="sharded", tables=tables),
        "ahead": dataclasses.replace(TABLES, kind="sharded", tables=tables, pipeline=True),
    }.items():
        config = narrow(tmp_path / name, dataclasses.replace(made, embedding=embedding))
        nodes = (1, 1) if name == "local" else TWO_NODES
        assert run_nodes(nodes, run_steps, config, store, STEPS) == ["Stop: "] * nodes[0]
    expected = shown_losses(tmp_path / "local")
    assert len(set(expected)) == STEPS
    assert shown_losses(tmp_path / "grid") == pytest.approx(expected, rel=2e-5)
    assert shown_losses(tmp_path / "ahead") == shown_losses(tmp_path / "grid")


def test_ids_that_go_ahead_in_torchrecs_pipeline(tmp_path):
    changes = {"optim": OptimConfig(lr=3e-3), "run_epochs": 1, "run_batch_users": 40}
    runs = []
    for pipeline in (False, True):
        embedding = dataclasses.replace(TABLES, kind="sharded", sharding="grid", pipeline=pipeline)
        config = narrow(tmp_path / f"{pipeline}", make_config(tmp_path, embedding=embedding, **changes))
        store = open_store(config).path
        assert run_nodes((2, 1), run_steps, config, store) == ["", ""]
        runs.append(logged(tmp_path / f"{pipeline}"))
    assert runs[0] == runs[1] and len(runs[0]) == 4 + 1


def ranks_of_users(folder):
    """Of three users by the run in ``folder``; and the rows and columns of the table on this rank."""
    _, _, model = load_run(folder, "last", World.current())
    queries = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    held = [] if isinstance(model.table, LocalItemTable) else [part[2].shape for part in plans.parts_of(model.table)]
    with torch.inference_mode():
        return model.table.rank(queries, torch.tensor([3, 9, 27])), held


def test_a_run_is_evaluated_in_its_parts(tmp_path):
    embedding = dataclasses.replace(TABLES, kind="sharded", sharding="grid", optimizer="rowwise_adagrad")
    config = narrow(tmp_path / "run", make_config(tmp_path, embedding=embedding, run_epochs=1, run_batch_users=40))
    store = open_store(config).path
    assert run_nodes(TWO_NODES, run_steps, config, store) == [""] * 4
    expected, _ = ranks_of_users(tmp_path / "run")  # one process, its table whole
    results = run_nodes(TWO_NODES, ranks_of_users, tmp_path / "run")
    assert [held for _, held in results] == [[(31, 4)], [(30, 4)]] * 2
    for found, _ in results:
        assert torch.equal(found, expected)


def test_managed_rows_come_and_go_in_a_grid(tmp_path):
    managed = dataclasses.replace(TABLES, ids="managed", rows=20, evict_every=2, optimizer="adam")
    runs = {}
    for name, embedding in {
        "local": managed,
        "grid": dataclasses.replace(managed, kind="sharded", sharding="grid"),
    }.items():
        config = narrow(tmp_path / name, make_config(tmp_path, embedding=embedding, run_save_every_epochs=None))
        nodes = (1, 1) if name == "local" else TWO_NODES
        assert run_nodes(nodes, run_steps, config, open_store(config).path, 9) == ["Stop: "] * nodes[0]
        runs[name] = [{k: v for k, v in line.items() if k != "imbalance"} for line in logged(tmp_path / name)]
    assert len(runs["local"]) == 9 and runs["local"][8]["evictions"] > 0
    for line, expected in zip(runs["grid"], runs["local"], strict=True):
        assert line == pytest.approx(expected, rel=2e-5)


# Refusals


def test_a_table_of_few_rows_lies_on_one_rank():
    config = EmbeddingConfig("sharded", "sgd", sharding="grid")
    for num_rows, expected in ((4, "grid"), (3, "table_wise")):  # on four ranks of a node a row each, or none for one
        table = TableShape("item", num_rows, 8, (1.0, 1.0))
        assert allowed_shardings(config, table, 8, 4) == [expected], num_rows


def refusal():
    """Of a grid where the first rank says that nodes have two ranks, and the others that they have three."""
    size = "2" if World.current().rank == 0 else "3"
    with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=size), pytest.raises(UserError) as error:
        plans.make_sharded(World.current(), sharding="grid")
    return str(error.value)


def test_nodes_of_different_sizes_are_refused():
    message = (
        "embedding: grid on 3 ranks with LOCAL_WORLD_SIZE=2, 3: expected as many ranks on each node; take row_wise"
    )
    assert run_ranks(3, refusal) == [message] * 3
