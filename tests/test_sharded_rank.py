"""Ranks and top-k over sharded tables: those of a local table to the last rank, ties and uneven users included."""

import pytest
import torch

from hstu.config import from_dict
from hstu.distributed import World
from hstu.embedding import LocalItemTable
from tests.ranks import run_ranks

pytest.importorskip("torchrec")

NUM_ITEMS, DIM, USERS = 301, 16, 40


def make_weight():
    """Every embedding up to 150 occurs again at 150 places later, so that equal items lie in different blocks."""
    weight = torch.randn(NUM_ITEMS + 1, DIM, generator=torch.Generator().manual_seed(3))
    weight[151:301] = weight[1:151]
    return weight


def make_users():
    generator = torch.Generator().manual_seed(4)
    queries = torch.randn(USERS, DIM, generator=generator)
    targets = torch.randint(1, NUM_ITEMS + 1, (USERS,), generator=generator)
    counts = torch.randint(0, 30, (USERS,), generator=generator)
    counts[3] = 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    seen = torch.randint(0, NUM_ITEMS + 1, (int(counts.sum()),), generator=generator)
    seen[offsets[1]] = targets[1]  # a seen target stays a candidate
    return queries, targets, seen, offsets


def evaluate(table, world, sizes, filtered, k, chunk_mib):
    queries, targets, seen, offsets = make_users()
    start = sum(sizes[: world.rank])
    stop = start + sizes[world.rank]
    own = offsets[start : stop + 1]
    history = (seen[own[0] : own[-1]], own - own[0]) if filtered else (None, None)
    with torch.inference_mode():
        ranks = table.rank(queries[start:stop], targets[start:stop], *history, chunk_mib=chunk_mib)
        scores, ids = table.topk(queries[start:stop], k, *history, chunk_mib=chunk_mib)
    return world.gather(ranks), world.gather(scores), world.gather(ids)


def evaluate_sharded(sharding, sizes, filtered, k, chunk_mib, normalize):
    from hstu.sharded.tables import ShardedItemTable, shard

    world = World.current()
    table = torch.nn.Module()
    table.table = ShardedItemTable(NUM_ITEMS, DIM, l2_normalize=normalize)
    embedding = {"kind": "sharded", "optimizer": "sgd", "sharding": sharding}
    shard(table, from_dict({"embedding": embedding, "model": {"dim": DIM}}), world)
    weight = make_weight()
    for part in table.table.state_dict()["weight"].local_shards():
        (row, column), (rows, columns) = part.metadata.shard_offsets, part.metadata.shard_sizes
        part.tensor.detach().copy_(weight[row : row + rows, column : column + columns])
    return evaluate(table.table, world, sizes, filtered, k, chunk_mib)


@pytest.mark.parametrize("filtered", [True, False], ids=["filtered", "all"])
@pytest.mark.parametrize(
    "sharding, sizes, chunk_mib, normalize",
    [
        ("row_wise", [40], 64, True),
        ("row_wise", [13, 27], 64, True),
        ("row_wise", [25, 0, 14, 1], 64, False),
        ("row_wise", [30, 10], 0.02, True),
        ("column_wise", [0, 40], 64, True),
        ("table_wise", [20, 20], 0.02, False),
    ],
    ids=["one", "two", "four", "small-pieces", "columns", "whole-table-pieces"],
)
def test_ranks_and_topk_of_a_local_table(sharding, sizes, chunk_mib, normalize, filtered):
    local = LocalItemTable(NUM_ITEMS, DIM, l2_normalize=normalize)
    with torch.no_grad():
        local.weight.copy_(make_weight())
    expected = evaluate(local, World(), [USERS], filtered, 10, 64)
    assert (expected[0] != expected[0].round()).sum() > USERS / 2  # most targets have an equal: half ranks
    for ranks, scores, ids in run_ranks(
        len(sizes), evaluate_sharded, sharding, sizes, filtered, 10, chunk_mib, normalize
    ):
        assert torch.equal(ranks, expected[0])
        torch.testing.assert_close(scores, expected[1], rtol=1e-6, atol=1e-6)
        same = ids == expected[2]
        shifted = (ids - expected[2]).abs() == 150  # its equal
        assert bool((same | shifted).all())


def test_fewer_candidates_than_k():
    for _, scores, ids in run_ranks(2, evaluate_sharded, "row_wise", [1, 39], False, 400, 64, True):
        assert (ids[:, :NUM_ITEMS].sort(dim=1)[0] == torch.arange(1, NUM_ITEMS + 1)).all()
        assert (ids[:, NUM_ITEMS:] == 0).all() and (scores[:, NUM_ITEMS:] == -torch.inf).all()
