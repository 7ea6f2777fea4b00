"""Losses over sharded tables: those of a local table, with every gradient, on any number of ranks."""

import pytest
import torch

from hstu.config import LossConfig, from_dict
from hstu.distributed import World
from hstu.embedding import LocalItemTable
from hstu.optim import set_learning_rate
from tests.ranks import run_ranks

pytest.importorskip("torchrec")

NUM_ITEMS, DIM = 37, 8
LOSSES = {
    "sampled": {"name": "sampled_softmax", "num_negatives": 16},
    "bank": {"name": "shared_bank", "num_negatives": 20, "logq_correction": True},
    "in-batch": {"name": "in_batch", "logq_correction": True},
    "in-batch-plain": {"name": "in_batch"},
    "full": {"name": "full_softmax"},
}


class Model(torch.nn.Module):
    """Queries are projections of the events' own embeddings, so that both uses of the table have a gradient."""

    def __init__(self, table):
        super().__init__()
        self.table, self.map = table, torch.nn.Linear(DIM, DIM)

    def forward(self, events, labels, rows, loss, seed):
        self.table.expect(labels, loss, seed, rows)
        queries = self.map(self.table.lookup(events))
        options = {"rows": rows} if loss.name == "sampled_softmax" else {}
        if loss.name == "sampled_softmax":
            return self.table.sampled_softmax(queries, labels, None, loss.num_negatives, seed, 0.1, **options)
        if loss.name == "full_softmax":
            return self.table.full_softmax(queries, labels, 0.1)
        ids, log_q, label_log_q = bank(labels, loss, seed, self.table.num_items)
        return self.table.bank_softmax(queries, labels, ids, log_q, label_log_q, 0.1)


def bank(labels, loss, seed, num_items):
    from hstu.model.losses.shared_bank import draw_bank

    world = World.current()
    if loss.name == "shared_bank":
        ids = draw_bank(num_items, loss.num_negatives, seed, labels.device)
        return ids, torch.full((len(ids),), -0.5), None
    everyone = world.gather(labels)
    ids, counts = everyone.unique(return_counts=True)
    log_q = -counts.float().log()
    if not loss.logq_correction:
        return ids, log_q, None
    frequency = (counts / len(everyone)).log()
    return ids, frequency + log_q, frequency[torch.searchsorted(ids, labels)]


def train(loss, kind, optimizer, sharding, sizes, normalize=True, steps=3, lr=0.1):
    """Losses [P] of each step, then the table and the map, as rank 0 gathers them. sizes: positions of the ranks."""
    from hstu.sharded.tables import ShardedItemTable, shard
    from hstu.table_optim import Rule, TableOptimizer

    world, loss = World.current(), LossConfig(**loss)
    config = from_dict({
        "embedding": {"kind": kind, "optimizer": optimizer, "sharding": sharding, "lr": lr}, "model": {"dim": DIM},
    })  # fmt: skip
    torch.manual_seed(5)
    cls = LocalItemTable if kind == "local" else ShardedItemTable
    model = Model(cls(NUM_ITEMS, DIM, l2_normalize=normalize))
    if kind == "local":
        rule = Rule(optimizer, config.optim.eps, tuple(config.optim.betas))
        tables = TableOptimizer(model.table.parameters(), rule, lr, lr / config.optim.lr)
    else:
        tables = shard(model, config, world)
    dense = torch.optim.SGD(model.map.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    found = []
    bounds = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    own = slice(bounds[world.rank], bounds[world.rank + 1])
    for step in range(steps):
        events, labels = torch.randint(1, NUM_ITEMS + 1, (2, bounds[-1]), generator=generator)
        rows = torch.randperm(bounds[-1], generator=generator)
        weights = torch.rand(bounds[-1], generator=generator)
        set_learning_rate(tables, config.optim.lr)
        tables.zero_grad()
        dense.zero_grad()
        losses = model(events[own], labels[own], rows[own], loss, 100 + step)
        (losses @ weights[own] / weights.sum() * world.size).backward()
        for parameter in model.map.parameters():
            parameter.grad = world.sum(parameter.grad) / world.size
        dense.step()
        tables.step()
        found.append(world.gather(losses))
    return found, whole_table(model.table, world), model.map.weight.detach()


def whole_table(table, world):
    if isinstance(table, LocalItemTable):
        return table.weight.detach()
    found = torch.zeros(NUM_ITEMS + 1, DIM)
    for part in table.state_dict()["weight"].local_shards():
        (row, column), (rows, columns) = part.metadata.shard_offsets, part.metadata.shard_sizes
        found[row : row + rows, column : column + columns] = part.tensor.detach()
    return world.sum(found)


SIZES = {1: [60], 2: [35, 25], 4: [20, 0, 33, 7]}


def train_in_pieces(*args):
    """With the negatives of seven positions drawn at a time."""
    from hstu.sharded import losses as sharded_losses

    usual, sharded_losses.MAX_DRAWS = sharded_losses.MAX_DRAWS, 7 * LOSSES["sampled"]["num_negatives"]
    try:
        return train(*args)
    finally:
        sharded_losses.MAX_DRAWS = usual


def check(loss, optimizer, sharding, num_ranks, normalize=True, steps=3, train_on_ranks=train):
    expected = train(LOSSES[loss], "local", optimizer, "auto", [60], normalize, steps)
    results = run_ranks(
        num_ranks, train_on_ranks, LOSSES[loss], "sharded", optimizer, sharding, SIZES[num_ranks], normalize, steps
    )
    for losses, table, linear in results:
        for ours, theirs in zip(losses, expected[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(table, expected[1], rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(linear, expected[2], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("num_ranks", [1, 2, 4], ids="ranks{}".format)
@pytest.mark.parametrize("loss", list(LOSSES))
def test_losses_and_gradients_of_one_rank(loss, num_ranks):
    check(loss, "sgd", "row_wise", num_ranks)


@pytest.mark.parametrize(
    "optimizer, sharding",
    [
        ("adagrad", "column_wise"),
        ("rowwise_adagrad", "row_wise"),
        ("rowwise_adagrad", "auto"),
        ("adam", "row_wise"),
        ("adam", "column_wise"),
        ("adam", "table_wise"),
        ("rowwise_adam", "row_wise"),
    ],
)  # with column_wise, the row-wise optimizers keep a number for each part of a row
def test_optimizers_under_every_sharding(optimizer, sharding):
    check("sampled", optimizer, sharding, 2)


def test_negatives_drawn_in_pieces():
    check("sampled", "sgd", "row_wise", 2, train_on_ranks=train_in_pieces)


def test_ten_steps_of_rowwise_adagrad_on_four_ranks():
    check("bank", "rowwise_adagrad", "row_wise", 4, steps=10)


@pytest.mark.parametrize("loss", ["sampled", "full"])
def test_without_normalisation(loss):
    check(loss, "sgd", "row_wise", 2, normalize=False)


@pytest.mark.parametrize(
    "count, stop", [(400, 30), (40, 100), (5, 10_000)], ids=["whole-block", "marked", "sorted"]
)  # fmt: skip
def test_places_of_ids_in_a_block(count, stop):
    from hstu.sharded.losses import FIRST, Block, find_places

    block = Block(10, stop)
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randint(10, stop, (n,), generator=generator, dtype=torch.int32) for n in (count, 3, 0)]
    ids, places = find_places(block, parts)
    assert bool((ids.diff() > 0).all())
    if count == 400:
        assert ids.tolist() == list(range(10, 30))
    else:
        assert ids.tolist() == torch.cat(parts).unique().tolist()
    for part, place in zip(parts, places, strict=True):
        assert torch.equal(ids[place - FIRST], part.long())


def test_negatives_of_a_block():
    """Two positions; ids 4..7 are this rank's; a negative that is the label does not count."""
    from hstu.sharded.losses import OTHERS, Block, Positions, scored_negatives

    labels, negatives = torch.tensor([5, 1]), torch.tensor([[5, 7, 2, 4], [4, 3, 2, 1]])
    for pieces in ([negatives], [negatives[:1], negatives[1:]]):
        scored = scored_negatives(Positions(World(1, 2), (1, 1)), labels, pieces, Block(4, 8))
        assert scored.ids.tolist() == [4, 5, 7]
        assert scored.labels.tolist() == [3, OTHERS]
        assert scored.candidates.tolist() == [[4, 2], [2, OTHERS]]  # filled up with the label


def test_blocks_cover_the_table_once():
    from hstu.sharded.losses import Block

    blocks = [Block.of(5, rank, 4) for rank in range(4)]
    assert [(b.first, b.stop) for b in blocks] == [(0, 2), (2, 4), (4, 5), (5, 5)]
    assert [b.items(torch.device("cpu")).tolist() for b in blocks] == [[1], [2, 3], [4], []]
