"""Rules of the table optimizers: by hand, against torch, and against fbgemm's fused kernels."""

import copy
import math

import pytest
import torch

from hstu.config_embedding import TABLE_OPTIMIZERS
from hstu.table_optim import ReplicatedTables, Rule, TableOptimizer, touched

FBGEMM_ON_CPU = {"sgd": "EXACT_SGD", "adagrad": "EXACT_ADAGRAD", "rowwise_adagrad": "EXACT_ROWWISE_ADAGRAD"}


def make_table(values):
    return torch.nn.Parameter(torch.tensor(values))


@pytest.mark.parametrize(
    "name, first, second",
    [
        # Gradient (3, 4) twice, rate 0.1. Squares 9 and 16, mean 12.5.
        ("sgd", [-0.3, -0.4], [-0.6, -0.8]),
        ("adagrad", [-0.1, -0.1], [-0.1 - 0.1 / math.sqrt(2)] * 2),
        ("rowwise_adagrad", [-0.3 / math.sqrt(12.5), -0.4 / math.sqrt(12.5)],
         [-0.3 / math.sqrt(12.5) - 0.3 / 5, -0.4 / math.sqrt(12.5) - 0.4 / 5]),
        ("adam", [-0.1, -0.1], [-0.2, -0.2]),
        ("rowwise_adam", [-0.3 / math.sqrt(12.5), -0.4 / math.sqrt(12.5)],
         [-0.6 / math.sqrt(12.5), -0.8 / math.sqrt(12.5)]),
    ],
)  # fmt: skip
def test_two_steps_by_hand(name, first, second):
    table = make_table([[1.0, 1.0], [0.0, 0.0]])
    optimizer = TableOptimizer([table], Rule(name, eps=0.0), lr=0.1)
    for expected in (first, second):
        table.grad = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
        optimizer.step()
        assert table[1].tolist() == pytest.approx(expected, rel=1e-5)
        assert table[0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", TABLE_OPTIMIZERS)
def test_untouched_rows_and_their_state_stay(name):
    generator = torch.Generator().manual_seed(0)
    table = torch.nn.Parameter(torch.randn(5, 4, generator=generator))
    optimizer = TableOptimizer([table], Rule(name, weight_decay=0.1), lr=0.1)
    table.grad = torch.randn(5, 4, generator=generator)
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[table].items()} | {"table": table.detach().clone()}
    table.grad = torch.zeros(5, 4)
    table.grad[2] = 1.0
    optimizer.step()
    after = optimizer.state[table] | {"table": table.detach()}
    others = torch.tensor([0, 1, 3, 4])
    for key, value in after.items():
        if key != "step":
            assert torch.equal(value[others], before[key][others]), key
            assert not torch.equal(value[2], before[key][2]), key
    assert int(after["step"]) == 2


def test_adam_is_torchs_where_every_row_is_touched():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 4, generator=generator)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizer = TableOptimizer([ours], Rule("adam", 1e-8, (0.9, 0.98)), lr=0.01)
    reference = torch.optim.Adam([theirs], lr=0.01, betas=(0.9, 0.98), eps=1e-8)
    for _ in range(5):
        ours.grad = torch.randn(6, 4, generator=generator)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-7)


def test_decay_of_adam_is_decoupled():
    table = make_table([[2.0]])
    table.grad = torch.tensor([[5.0]])
    TableOptimizer([table], Rule("adam", eps=0.0, weight_decay=0.5), lr=0.1).step()
    assert table.item() == pytest.approx(2.0 - 0.1 * (1.0 + 0.5 * 2.0))


@pytest.mark.parametrize("name", list(FBGEMM_ON_CPU))
def test_same_as_fbgemms_fused_kernel(name):
    pytest.importorskip("fbgemm_gpu")
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    generator = torch.Generator().manual_seed(0)
    fused = SplitTableBatchedEmbeddingBagsCodegen(
        [(12, 8, EmbeddingLocation.HOST, ComputeDevice.CPU)], optimizer=getattr(EmbOptimType, FBGEMM_ON_CPU[name]),
        pooling_mode=PoolingMode.NONE, learning_rate=0.3, eps=1e-6,
    )  # fmt: skip
    weight = fused.split_embedding_weights()[0]
    weight.copy_(torch.randn(12, 8, generator=generator))
    table = torch.nn.Parameter(weight.clone())
    optimizer = TableOptimizer([table], Rule(name, eps=1e-6), lr=0.3)
    for _ in range(4):
        ids = torch.randint(0, 9, (20,), generator=generator)
        upstream = torch.randn(20, 8, generator=generator)
        fused(ids, torch.tensor([0, 20])).backward(upstream)
        table.grad = None
        torch.nn.functional.embedding(ids, table).backward(upstream)
        optimizer.step()
    torch.testing.assert_close(table.detach(), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TABLE_OPTIMIZERS)
def test_sparse_gradients_give_the_same(name):
    generator = torch.Generator().manual_seed(0)
    start, ids = torch.randn(9, 3, generator=generator), torch.tensor([1, 4, 4, 7])
    results = []
    for sparse in (False, True):
        table = torch.nn.Parameter(start.clone())
        torch.nn.functional.embedding(ids, table, sparse=sparse).square().sum().backward()
        TableOptimizer([table], Rule(name), lr=0.1).step()
        results.append(table.detach())
    torch.testing.assert_close(*results)


def test_touched_rows():
    rows, grad = touched(torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, 0.0], [1.0, -1.0]]))
    assert rows.tolist() == [1, 3] and grad.tolist() == [[0.0, 2.0], [1.0, -1.0]]


def test_state_is_restored():
    tables = [make_table([[1.0, 2.0], [3.0, 4.0]]) for _ in range(2)]
    optimizers = [TableOptimizer([table], Rule("rowwise_adam"), lr=0.1) for table in tables]
    for _ in range(2):
        tables[0].grad = torch.ones(2, 2)
        optimizers[0].step()
    tables[1].data.copy_(tables[0].data)
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for table, optimizer in zip(tables, optimizers, strict=True):
        table.grad = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        optimizer.step()
    assert torch.equal(tables[0], tables[1])


def test_replicated_tables_have_their_state_by_name():
    table = make_table([[1.0, 2.0]])
    optimizer = ReplicatedTables({"tables.collection.embeddings.genre.weight": table}, Rule("adagrad"), lr=0.1)
    states = optimizer.states()
    table.grad = torch.tensor([[2.0, 3.0]])
    optimizer.step()
    state = states["tables.collection.embeddings.genre.weight"]  # shares its memory
    assert state["momentum1"].tolist() == [[4.0, 9.0]] and int(state["step"]) == 1
