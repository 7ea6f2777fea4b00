"""The local item table: initial values, lookup, and that it needs neither torchrec nor fbgemm."""

import subprocess
import sys

import pytest
import torch

from hstu.embedding import INIT_STD, ItemTable, LocalItemTable


def test_initial_values():
    weight = LocalItemTable(5_000, 16, generator=torch.Generator().manual_seed(0)).weight.detach()
    assert weight.shape == (5_001, 16) and weight.dtype == torch.float32
    assert weight[0].abs().max() == 0
    values = weight[1:]
    assert values.abs().max() <= 2 * INIT_STD
    # A standard normal cut at two has standard deviation 0.8796.
    assert values.std().item() == pytest.approx(0.8796 * INIT_STD, rel=0.01)
    assert values.mean().abs() < 3 * INIT_STD / 80_000**0.5


def test_generator_decides_the_values():
    tables = [LocalItemTable(9, 4, generator=torch.Generator().manual_seed(s)).weight for s in (1, 1, 2)]
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_lookup(dtype):
    table = LocalItemTable(9, 4)
    ids = torch.tensor([[0, 3], [9, 3]], dtype=dtype)
    out = table.lookup(ids)
    assert out.shape == (2, 2, 4)
    assert torch.equal(out.detach(), table.weight.detach()[ids.long()])
    out.sum().backward()
    assert table.weight.grad[:, 0].tolist() == [0, 0, 0, 2, 0, 0, 0, 0, 0, 1]


def test_lookup_gradient_is_the_same_every_time_and_for_any_number_of_threads():
    g = torch.Generator().manual_seed(0)
    table, ids = LocalItemTable(50, 33), torch.randint(1, 51, (20_000,), generator=g)
    upstream = torch.randn(20_000, 33, generator=g)
    threads, gradients = torch.get_num_threads(), []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            gradients += torch.autograd.grad(table.lookup(ids), table.weight, upstream)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[1], gradients[2])


def test_rank_and_topk_ask_the_table():
    table = LocalItemTable(3, 2, l2_normalize=False)
    with torch.no_grad():
        table.weight.copy_(torch.tensor([[9.0, 9.0], [1.0, 0.0], [3.0, 0.0], [2.0, 0.0]]))
    query = torch.tensor([[1.0, 0.0]])
    assert table.rank(query, torch.tensor([1])).tolist() == [3.0]
    assert table.rank(query, torch.tensor([1]), torch.tensor([2]), torch.tensor([0, 1])).tolist() == [2.0]
    scores, ids = table.topk(query, 2)
    assert ids.tolist() == [[2, 3]] and scores.tolist() == [[3.0, 2.0]]


def test_normalisation_is_the_tables():
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.1], [30.0, 30.0]])
    query = torch.tensor([[1.0, 0.0]])
    for normalize, best in ((True, 1), (False, 2)):
        table = LocalItemTable(2, 2, l2_normalize=normalize)
        with torch.no_grad():
            table.weight.copy_(weight)
        assert table.topk(query, 1)[1].item() == best


def test_interface_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        ItemTable()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_items": 0, "dim": 3}, "num_items=0: expected >= 1"),
        ({"num_items": 3, "dim": 0}, "dim=0: expected >= 1"),
        ({"num_items": 3, "dim": 3, "eps": 0.0}, "eps=0.0: expected > 0"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        LocalItemTable(**arguments)


def test_works_where_torchrec_and_fbgemm_cannot_be_imported():
    code = """
import sys
for name in ("torchrec", "fbgemm_gpu"):
    sys.modules[name] = None
import torch
from hstu.config import LossConfig
from hstu.embedding import LocalItemTable
from hstu.model.losses import LOSSES, make_loss
table = LocalItemTable(200, 4)
queries, labels = torch.randn(5, 4, requires_grad=True), torch.arange(1, 6)
for name in LOSSES:
    make_loss(LossConfig(name=name, num_negatives=3))(queries, labels, None, table, 0).backward()
assert table.rank(queries, labels).shape == (5,)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
