"""What a step over ranks keeps and sends, against the plan."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from hstu.config import LossConfig, from_dict
from hstu.config_model import HSTUConfig
from hstu.distributed import World
from hstu.model.retrieval import RetrievalModel
from hstu.planning.config import BatchPlanConfig, ClusterConfig, PlanConfig, TablePlanConfig
from hstu.planning.cost import transfers
from hstu.planning.memory import plan_memory, saved_bytes
from hstu.planning.tables import table_bytes
from hstu.planning.work import Workload
from tests.ranks import run_ranks
from tests.test_plan_memory import kept_bytes, make_batch

pytest.importorskip("torchrec")

ITEMS = 2000
MODEL = HSTUConfig(dim=32, num_heads=2, qk_dim=16, v_dim=16, max_len=60)
LOSSES = {
    "sampled": {"name": "sampled_softmax", "num_negatives": 32},
    "bank": {"name": "shared_bank", "num_negatives": 256},
    "in_batch": {"name": "in_batch"},
    "full": {"name": "full_softmax"},
}
LENGTHS = (12, 24, 36, 48, 60, 60, 24, 36)
COLLECTIVES = ("all_gather", "all_reduce", "reduce_scatter", "all_to_all_single")


def step(loss_options: dict[str, Any], optimizer: str, sharding: str) -> dict[str, Any]:
    """Of one step of equal shares: bytes that this rank sends, by collective; bytes kept; bytes of table and state."""
    from hstu.sharded.tables import ShardedItemTable, shard

    world = World.current()
    embedding = {"kind": "sharded", "optimizer": optimizer, "sharding": sharding}
    config = from_dict({"embedding": embedding, "model": {"dim": MODEL.dim}})
    torch.manual_seed(0)
    model = RetrievalModel(MODEL, ITEMS, LossConfig(**loss_options))
    model.table = ShardedItemTable(ITEMS, MODEL.dim, l2_normalize=MODEL.l2_normalize)
    tables = shard(model, config, world)
    batch = make_batch(np.array(LENGTHS), ITEMS, seed=world.rank)
    batch = replace(batch, random_rows=torch.arange(batch.num_events) + world.rank * batch.num_events)
    tables.zero_grad()
    kept = kept_bytes(model, batch, "float32", world)
    tables.zero_grad()
    sent = count_sent(world, lambda: model.loss(batch, 1, world=world).backward())
    fields = [value for values in tables.states().values() for value in values.values()]
    state = sum(num_bytes(s.tensor) for f in fields if hasattr(f, "local_shards") for s in f.local_shards())
    return {"sent": sent, "kept": kept, "state": state, "rows": sum(map(num_bytes, model.table.parameters()))}


def num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def count_sent(world: World, task: Any) -> dict[str, float]:
    """Bytes that this rank sends to the others while ``task`` runs, by kind of collective."""
    sent: Counter[str] = Counter()
    usual = {name: getattr(torch.distributed, name) for name in COLLECTIVES}
    others = (world.size - 1) / world.size

    def counting(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "all_to_all_single":
            given, splits = kwargs["input"], kwargs.get("input_split_sizes")
            own = num_bytes(given) / world.size
            if splits:
                own = splits[world.rank] * num_bytes(given) / max(1, given.shape[0])
            sent[name] += num_bytes(given) - own
        elif name == "all_reduce":
            sent[name] += 2 * others * num_bytes(args[0])
        else:
            sent[name] += others * sum(map(num_bytes, args[1] if name == "reduce_scatter" else args[0]))
        return usual[name](*args, **kwargs)

    for name in COLLECTIVES:
        setattr(torch.distributed, name, partial(counting, name))
    try:
        task()
    finally:
        for name, function in usual.items():
            setattr(torch.distributed, name, function)
    return dict(sent)


def planned(ranks: int, loss: str, optimizer: str = "rowwise_adagrad", sharding: str = "row_wise") -> PlanConfig:
    return PlanConfig(
        TablePlanConfig(rows=ITEMS, sharding=sharding, optimizer=optimizer),
        ClusterConfig(gpu="cpu", gpus=ranks, gpus_per_node=8), BatchPlanConfig(mean_len=1.0), MODEL,
        LossConfig(**LOSSES[loss]), "float32",
    )  # fmt: skip


WORK = Workload.of_lengths(LENGTHS, MODEL)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("loss", LOSSES)
def test_step_over_ranks_keeps_and_sends_what_is_planned(loss: str, ranks: int) -> None:
    results = run_ranks(ranks, step, LOSSES[loss], "rowwise_adagrad", "row_wise")
    config = planned(ranks, loss)
    parts = saved_bytes(config, WORK)
    mean_kept = np.mean([result["kept"] for result in results])
    assert sum(part.bytes for part in parts) == pytest.approx(mean_kept, rel=0.05)
    sent = {name: np.mean([r["sent"].get(name, 0.0) for r in results]) for name in COLLECTIVES}
    plan = Counter[str]()
    for part in transfers(config, WORK):
        plan[KIND[part.name]] += part.sent
    del plan["dense"]  # the model of this test is not wrapped in DDP
    for name in COLLECTIVES:
        assert plan[name] == pytest.approx(sent[name], rel=0.03, abs=SMALL), name


KIND = {
    "ids of events": "all_to_all_single", "rows of events": "all_to_all_single",
    "gradients of events": "all_to_all_single", "labels": "all_gather", "queries": "all_gather",
    "losses of the parts": "all_reduce", "gradients of the losses": "all_gather",
    "gradients of queries": "reduce_scatter", "gradients of dense weights": "dense",
}  # fmt: skip
SMALL = 200
"""Bytes: counts and lengths that the plan leaves out."""


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad", "adam", "rowwise_adam"])
def test_shards_and_their_state_are_as_large_as_planned(optimizer: str) -> None:
    results = run_ranks(2, step, LOSSES["bank"], optimizer, "row_wise")
    assert (max(r["rows"] for r in results), max(r["state"] for r in results)) == table_bytes(
        planned(2, "bank", optimizer)
    )


def test_column_shards_keep_a_number_for_each_part_of_a_row() -> None:
    result = run_ranks(2, step, LOSSES["bank"], "rowwise_adagrad", "column_wise")[0]
    assert (result["rows"], result["state"]) == table_bytes(planned(2, "bank", sharding="column_wise"))
    assert result["state"] == 4 * (ITEMS + 1)


# Ranking


def ranking_step(case: str, ranks: int) -> dict[str, Any]:
    """Of one step of a ranking model with sharded tables: bytes sent and kept by this rank, and those of its shards."""
    from hstu.sharded.tables import shard
    from tests import test_plan_ranking as ranking

    world, config = World.current(), ranking_plan(case, ranks)
    torch.manual_seed(0)
    model = ranking.make_model(config)
    options = {"kind": "sharded", "optimizer": "rowwise_adagrad", "sharding": "row_wise"}
    tables = shard(model, from_dict({"embedding": options, "model": asdict(config.model)}), world)
    batch = ranking.make_batch(config, ranking.LENGTHS, seed=world.rank)
    tables.zero_grad()
    kept = ranking.kept_bytes(model, batch, "float32", world)
    tables.zero_grad()
    sent = count_sent(world, lambda: model.loss(batch, 1, world=world).backward())
    rows = [sum(num_bytes(p) for p in module.parameters()) for module in model.tables()]
    return {"sent": sent, "kept": kept, "rows": rows}


def ranking_plan(case: str, ranks: int) -> PlanConfig:
    from tests import test_plan_ranking as ranking

    return ranking.planned(*ranking.CASES[case], ranks=ranks, kind="sharded", sharding="row_wise")


@pytest.mark.parametrize("case", ["interleaved", "fused"])
def test_ranking_step_over_ranks_keeps_and_sends_what_is_planned(case: str) -> None:
    from tests import test_plan_ranking as ranking

    results, config = run_ranks(2, ranking_step, case, 2), ranking_plan(case, 2)
    work = ranking.work_of(config, ranking.LENGTHS)
    kept = sum(part.bytes for part in saved_bytes(config, work))
    assert kept == pytest.approx(np.mean([r["kept"] for r in results]), rel=0.05)
    sent = {name: np.mean([r["sent"].get(name, 0.0) for r in results]) for name in COLLECTIVES}
    plan = Counter[str]()
    for part in transfers(config, work):
        plan["dense" if "dense" in part.name else "all_to_all_single"] += part.sent
    for name in COLLECTIVES:
        assert plan[name] == pytest.approx(sent[name], rel=0.03, abs=SMALL), name
    memory = plan_memory(config, work)
    item, *features = (max(r["rows"][index] for r in results) for index in range(3))
    assert (memory.of("table"), memory.of("feature tables")) == (item, sum(features))
