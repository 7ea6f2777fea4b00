"""Sharded tables whose rows wait for the end of the step (clipping, accumulation), and their averaged weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from hstu import checkpoint
from hstu.config import Config, HSTUConfig, OptimConfig
from hstu.config_embedding import EmbeddingConfig
from hstu.errors import UserError
from hstu.optim import WeightAverage
from hstu.progress import Display
from hstu.runs import check_same, open_store
from hstu.table_optim import Rule
from hstu.train import Trainer
from tests.ranks import run_ranks
from tests.test_ranking_train import planted_store
from tests.test_sharded_train import LOCAL, compare, configure, sharded
from tests.test_train import assert_same_run, final_state, logged, make_config
from tests.test_train_ranks import narrow, run_steps

pytest.importorskip("torchrec")

SGD = dataclasses.replace(LOCAL, optimizer="sgd", lr=0.5)
ADAM = dataclasses.replace(LOCAL, optimizer="adam", lr=0.01)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stores")
    return {"retrieval": open_store(make_config(root)).path, "ranking": planted_store(root / "planted").path}


# A shard by hand


def make_shard(num_rows: int = 4):
    from hstu.sharded.kernel import Shard

    return Shard(torch.zeros(num_rows, 2), Rule("sgd"), 2)


def test_gradients_of_equal_rows_are_summed_over_lookups():
    shard = make_shard()
    shard.begin()
    shard.keep(torch.tensor([2, 0, 2]), torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 1.0]]))
    shard.keep(torch.tensor([2, 3]), torch.tensor([[-1.0, 1.0], [0.0, 0.0]]))
    rows, total = shard.gradient()
    assert rows.tolist() == [0, 2, 3] and total.tolist() == [[0.0, 3.0], [2.0, 2.0], [0.0, 0.0]]
    assert shard.weight.abs().sum() == 0, "rows have not moved"
    shard.gradient()[1].mul_(0.5)  # as clipping does
    shard.move(0.1, 1)
    assert torch.allclose(shard.weight, torch.tensor([[0.0, -0.15], [0.0, 0.0], [-0.1, -0.1], [0.0, 0.0]]))
    assert len(shard.gradient()[0]) == 0, "each step begins without gradients"


def test_what_is_kept_is_no_more_than_the_rows_and_one_lookup():
    shard = make_shard(num_rows=4)
    kept = []
    for _ in range(5):
        shard.keep(torch.tensor([0, 1, 3]), torch.ones(3, 2))
        kept.append(sum(len(ids) for ids, _ in shard._parts))
    assert kept == [3, 3, 3, 3, 3], "3 + 3 rows are more than 4"
    assert shard.gradient()[1].tolist() == [[5.0, 5.0]] * 3
    wide = make_shard(num_rows=40)
    for _ in range(5):
        wide.keep(torch.tensor([0, 1, 3]), torch.ones(3, 2))
    assert sum(len(ids) for ids, _ in wide._parts) == 15, "summed at the end of the step"


# The run of local tables

DEFERRED: dict[str, dict[str, Any]] = {
    "clip": {"optim": OptimConfig(lr=3e-3, clip_norm=0.2), "embedding": SGD},
    "accumulate": {"optim": OptimConfig(lr=3e-3, accumulate_steps=3), "run_batch_users": 7},
    "both-adam": {
        "optim": OptimConfig(lr=3e-3, clip_norm=0.2, accumulate_steps=3, table_weight_decay=0.1),
        "run_batch_users": 7,
        "embedding": ADAM,
    },
}


@pytest.mark.parametrize("case", list(DEFERRED))
def test_same_loss_curve_as_local_tables(case, stores, tmp_path):
    """Of 22 batches of 7 users an epoch, the last of 3, those of a step are 3, and one at the end."""
    compare(tmp_path, stores["retrieval"], "retrieval", [(1, "auto"), (2, "row_wise")], **DEFERRED[case])


@pytest.mark.parametrize("dense", ["ddp", "fsdp"])
def test_clipped_columns_and_tables_on_one_rank(dense, stores, tmp_path):
    runs = [(2, "column_wise"), (2, "table_wise")] if dense == "ddp" else [(2, "row_wise")]
    compare(tmp_path, stores["retrieval"], "retrieval", runs, **DEFERRED["clip"], run_dense=dense)


@pytest.mark.parametrize("tables", [{}, {"item.parity": "data_parallel"}], ids=["sharded", "one-whole"])
def test_ranking_counts_every_table_once(tables, stores, tmp_path):
    optim = OptimConfig(lr=3e-3, clip_norm=0.3, accumulate_steps=2)
    compare(tmp_path, stores["ranking"], "ranking", [(2, "row_wise")], tables, optim=optim, embedding=SGD,
            run_batch_users=5, run_save_every_epochs=None)  # fmt: skip


# Stopped and resumed

ALL = OptimConfig(lr=3e-3, clip_norm=0.2, accumulate_steps=3, average_decay=0.9)
WHOLE = {"optim": ALL, "embedding": ADAM, "run_batch_users": 7, "run_epochs": 1}


def whole_run(root: Path, name: str, embedding: EmbeddingConfig, **changes: Any) -> Config:
    changes = WHOLE | {"run_save_every_epochs": None} | changes
    return narrow(root / name, make_config(root, **(changes | {"embedding": embedding})))


def test_a_run_stopped_in_the_middle_goes_on_bit_for_bit(stores, tmp_path):
    whole, stopped = (whole_run(tmp_path, name, sharded(ADAM, "row_wise")) for name in ("whole", "stopped"))
    assert run_ranks(2, run_steps, whole, stores["retrieval"]) == ["", ""]
    ended = run_ranks(2, run_steps, stopped, stores["retrieval"], None, {1: 3})
    assert all(text.startswith("Interrupted") for text in ended)
    assert final_state(tmp_path / "stopped").values["progress"]["global_step"] == 4
    assert run_ranks(2, run_steps, stopped, stores["retrieval"]) == ["", ""]
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert "average.table.weight" in final_state(tmp_path / "whole").sizes


def test_a_run_goes_on_with_tables_laid_otherwise(stores, tmp_path):
    """Local, by rows on two ranks, on one, by columns on two, local: losses, averages and validation of a local run.

    Rows of 6 columns are stored as 8, and cut into parts of 4 and 2.
    """
    model = HSTUConfig(dim=6, num_blocks=1, qk_dim=8, v_dim=8, max_len=20, dropout=0.1)
    whole = whole_run(tmp_path, "whole", ADAM, model=model)
    assert run_ranks(1, run_steps, whole, stores["retrieval"]) == [""]
    parts = [(1, ADAM, 1), (2, sharded(ADAM, "row_wise"), 3), (1, sharded(ADAM, "auto"), 4),
             (2, sharded(ADAM, "column_wise"), 6), (1, ADAM, None)]  # fmt: skip
    for number, embedding, end in parts:
        config = whole_run(tmp_path, "parts", embedding, run_save_every_steps=1, model=model)
        ended = "" if end is None else "Stop: "
        assert run_ranks(number, run_steps, config, stores["retrieval"], end) == [ended] * number
    expected, found = (logged(tmp_path / name) for name in ("whole", "parts"))
    assert [line["loss"] for line in found[:-1]] == pytest.approx([line["loss"] for line in expected[:-1]], rel=2e-5)
    assert len(found) == len(expected) == 8 + 1 and found[-1]["ndcg@10"] == pytest.approx(
        expected[-1]["ndcg@10"], abs=0.01
    )  # one user of 150 at a tie
    one, other = (final_state(tmp_path / name).tensors("average.") for name in ("whole", "parts"))
    assert one.keys() == other.keys() and "table.weight" in one
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=2e-4, atol=2e-4 * float(value.abs().max()), msg=name)


# Averaged weights


def test_the_average_of_sharded_tables_is_validated_and_kept_as_that_of_local_ones(stores, tmp_path):
    """With rows that move in the backward; the best checkpoint holds the average."""
    changes = {"optim": OptimConfig(lr=3e-3, average_decay=0.9), "run_batch_users": 16}
    for number, embedding in ((1, LOCAL), (2, sharded(LOCAL, "table_wise"))):
        config = whole_run(tmp_path, str(number), embedding, **changes)
        assert run_ranks(number, run_steps, config, stores["retrieval"]) == [""] * number
    one, two = (logged(tmp_path / name)[-1] for name in ("1", "2"))
    assert two["ndcg@10"] == pytest.approx(one["ndcg@10"], abs=0.01)
    states = [final_state(tmp_path / name) for name in ("1", "2")]
    best = checkpoint.load(tmp_path / "2" / "checkpoints" / checkpoint.BEST).tensors("model.")
    averages, others = (state.tensors("average.") for state in states)
    weights = states[1].tensors("model.")
    assert averages.keys() == others.keys() == best.keys()
    for name, value in averages.items():
        assert (value - others[name]).abs().max() <= 2e-4 * value.abs().max(), name
        assert torch.equal(best[name], others[name]) and not torch.equal(best[name], weights[name]), name


def test_narrow_rows_wait_and_are_averaged_in_float32(stores, tmp_path):
    for name, embedding in (
        ("local", ADAM),
        ("narrow", dataclasses.replace(sharded(ADAM, "row_wise"), dtype="float16")),
    ):
        config = whole_run(tmp_path, name, embedding)
        number = 1 if name == "local" else 2
        assert run_ranks(number, run_steps, config, stores["retrieval"]) == [""] * number
    wide, found = (logged(tmp_path / name) for name in ("local", "narrow"))
    assert [line["loss"] for line in found[:-1]] == pytest.approx([line["loss"] for line in wide[:-1]], rel=2e-3)
    state = final_state(tmp_path / "narrow")
    dtypes = [state.sizes[f"{part}.table.weight"][1] for part in ("model", "average")]
    assert dtypes == [torch.float16, torch.float32]
    best = checkpoint.load(tmp_path / "narrow" / "checkpoints" / checkpoint.BEST).tensors("model.table.")["weight"]
    assert torch.equal(best, state.tensors("average.table.")["weight"].half())


class NarrowTable(torch.optim.Optimizer):
    """Of a table in float16 of which this rank has two rows from the third."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__([{"params": []}], {})
        self.weight = weight

    def parts(self):
        return {("table.weight", (2, 0)): self.weight}

    def sharded(self, values):
        return {"table.weight": values["table.weight", (2, 0)]}


def test_the_average_of_narrow_rows_is_wide():
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float16)
    average = WeightAverage(torch.nn.Linear(1, 1), 0.5, [NarrowTable(weight)])
    weight[0, 0] = 1.0 + 2.0**-10  # the next number of float16; the decay is 2 / 11
    average.update()
    value = average.tensors()["table.weight"]
    assert value.dtype == torch.float32 and float(value[0, 0]) == pytest.approx(1.0 + 2.0**-10 * 9 / 11, abs=1e-7)
    before, kept = weight.clone(), value.clone()
    weight[1] = 5.0
    with average.applied():
        assert torch.equal(weight, kept.half())
    assert weight.tolist() == [before[0].tolist(), [5.0, 5.0]] and torch.equal(value, kept)


# Non-finite values


def test_a_gradient_of_rows_that_is_not_finite_stops_before_they_move(stores, tmp_path, monkeypatch):
    from hstu.sharded.tables import ShardedItemTable

    lookup = ShardedItemTable.lookup

    def overflowing(self: Any, ids: torch.Tensor) -> torch.Tensor:
        found = lookup(self, ids)
        if found.requires_grad:
            found.register_hook(lambda grad: grad * float("inf"))
        return found

    config = configure(tmp_path, "run", "retrieval", optim=OptimConfig(lr=3e-3, clip_norm=1.0),
                       embedding=sharded(SGD, "auto"))  # fmt: skip
    trainer = Trainer(config, open_store(make_config(tmp_path)), tmp_path / "run", Display(False, shown=False))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    monkeypatch.setattr(ShardedItemTable, "lookup", overflowing)
    with pytest.raises(UserError, match=r"non-finite values at step 0 .*: first in gradient of table\.weight;"):
        trainer._step(trainer._make_input(0, 0))
    trainer.world.on_first(trainer._lock.close)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_a_value_that_is_not_finite_on_one_rank_stops_all(stores, tmp_path):
    config = whole_run(tmp_path, "run", sharded(ADAM, "row_wise"), run_save_every_steps=2)
    ended = run_ranks(2, run_steps, config, stores["retrieval"], None, None, {1: 3})
    assert len(set(ended)) == 1 and ended[0].startswith("UserError: non-finite values at step 3")
    assert "step-000000002" in ended[0]


# Config


def test_a_pipelined_run_goes_on_with_local_tables():
    pipelined = EmbeddingConfig(kind="sharded", optimizer="sgd", pipeline=True)
    local = EmbeddingConfig(optimizer="sgd")
    old, new = (Config(model=HSTUConfig(dim=8), embedding=embedding) for embedding in (pipelined, local))
    check_same(old, new, Path("run"))
    with pytest.raises(UserError, match="embedding.optimizer='sgd', now 'adam'"):
        check_same(old, dataclasses.replace(new, embedding=EmbeddingConfig(optimizer="adam")), Path("run"))
