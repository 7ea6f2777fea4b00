"""The plan of what a step costs beside its batch: maps of ids, rows that wait, averages."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch

from hstu.config import LossConfig, from_dict
from hstu.config_embedding import EmbeddingConfig
from hstu.config_model import HSTUConfig
from hstu.distributed import World
from hstu.item_rows import ManagedRows
from hstu.model.retrieval import RetrievalModel
from hstu.optim import WeightAverage
from hstu.planning.config import BatchPlanConfig, ClusterConfig, PlanConfig, TablePlanConfig, UpdatePlanConfig
from hstu.planning.cost import plan_step
from hstu.planning.memory import plan_memory
from hstu.planning.updates import average_bytes, map_bytes, map_workspace, waiting_bytes
from hstu.planning.work import Workload
from tests.ranks import run_ranks
from tests.test_plan_memory import ITEMS, LENGTHS, MODELS, allocated_peak, kept_bytes, make_batch, planned, planned_kept

pytest.importorskip("torchrec")

MODEL = HSTUConfig(dim=32, num_heads=2, qk_dim=16, v_dim=16, max_len=150)
LOSS = LossConfig(name="shared_bank", num_negatives=256)
WORK = Workload.of_lengths(LENGTHS, MODEL)


def managed(policy: str, rows: int, evict_every: int = 1, gpus: int = 1, **options: Any) -> PlanConfig:
    table = TablePlanConfig(rows=rows, ids="managed", policy=policy, evict_every=evict_every, sharding="row_wise")
    return PlanConfig(table, ClusterConfig(gpu="cpu", gpus=gpus), BatchPlanConfig(mean_len=1.0), MODEL, LOSS, **options)


# Maps of ids


@pytest.mark.parametrize("ids", ["hash", "managed"])
def test_what_autograd_keeps_of_mapped_ids(ids: str) -> None:
    """1,000 rows, all of them taken, for 3,000 items; all that are asked for have one."""
    config = planned(MODELS["hstu published"]).with_table(rows=1000, ids=ids)
    embedding = EmbeddingConfig(ids=ids, rows=1000)
    model, batch = RetrievalModel(config.model, ITEMS, config.loss, embedding), make_batch(LENGTHS, ITEMS)
    rows = model.table.item_rows
    if isinstance(rows, ManagedRows):
        asked = batch.labels.unique()
        others = torch.arange(1, ITEMS + 1)[~torch.isin(torch.arange(1, ITEMS + 1), asked)]
        rows.take_in(torch.cat([asked, others[: 999 - len(asked)]]))
    measured = kept_bytes(model, batch, "float32")
    assert planned_kept(config) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("policy", ["lru", "lfu", "distance_lfu"])
def test_map_of_ids_is_as_large_as_planned(policy: str) -> None:
    """With 870 labels that wait for the second step's update."""
    rows = ManagedRows(10**6, 200_000, policy, 1.0, every=2)
    rows.take_in(torch.arange(1, 871))
    rows.take_in(torch.arange(1, 871))
    config = managed(policy, 200_000)
    measured = sum(buffer.numel() * buffer.element_size() for buffer in rows.buffers())
    assert map_bytes(config, WORK) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("policy", ["lru", "distance_lfu"])
def test_room_of_an_update_of_the_map(policy: str) -> None:
    rows, generator = ManagedRows(10**7, 50_000, policy, 1.0, 1), torch.Generator().manual_seed(0)
    for _ in range(3):
        rows.take_in(torch.randint(1, 10**7, (20_000,), generator=generator))
    ids = torch.randint(1, 10**7, (8_000,), generator=generator)
    work = replace(WORK, predicted=8_000.0)
    assert map_workspace(managed(policy, 50_000), work) == pytest.approx(
        allocated_peak(lambda: rows.take_in(ids)), rel=0.1
    )


def test_every_gpu_has_the_map() -> None:
    """24 bytes for each of 10^8 rows, whatever the number of GPUs; an update every tenth step costs a tenth."""
    small, large = (managed("lru", 10**8, gpus=gpus) for gpus in (8, 64))
    for config in (small, large):
        of_rows = plan_memory(config, WORK).of("map of ids") - 8 * WORK.predicted * config.cluster.gpus
        assert of_rows == 24 * 10**8
    often, seldom = (
        next(part.seconds for part in plan_step(config, WORK).parts if part.name == "map of ids")
        for config in (small, small.with_table(evict_every=10))
    )
    assert seldom == pytest.approx(often / 10, rel=0.01)


# Rows that wait, averages


def deferred_step(optim: dict[str, Any], ranks: int) -> dict[str, float]:
    """Bytes of the gradients that this rank keeps after two batches, and of its averages."""
    from hstu.sharded.tables import ShardedItemTable, shard

    world = World.current()
    embedding = {"kind": "sharded", "optimizer": "rowwise_adagrad", "sharding": "row_wise"}
    config = from_dict({"embedding": embedding, "model": asdict(MODEL), "optim": optim})
    torch.manual_seed(0)
    model = RetrievalModel(MODEL, ITEMS, LOSS)
    model.table = ShardedItemTable(ITEMS, MODEL.dim, l2_normalize=MODEL.l2_normalize)
    tables = shard(model, config, world)
    average = WeightAverage(model, 0.99, [tables])
    tables.zero_grad()
    kept = []
    for seed in range(2):
        batch = make_batch(LENGTHS, ITEMS, seed=10 * world.rank + seed)
        batch = replace(batch, random_rows=torch.arange(batch.num_events) + world.rank * batch.num_events)
        model.loss(batch, seed, world=world).backward()
        parts = [t for ours in tables.in_torch for part in ours.shards for pair in part._parts for t in pair]
        kept.append(sum(t.numel() * t.element_size() for t in parts))
    averaged = sum(t.numel() * t.element_size() for t in average.values.values())
    return {"first": kept[0], "both": kept[1], "averaged": averaged}


@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_that_wait_and_averages(ranks: int) -> None:
    """After one batch the gradients of all rows looked up; after two, as they are more than rows, one of each."""
    results = run_ranks(ranks, deferred_step, {"accumulate_steps": 3}, ranks)
    table = TablePlanConfig(rows=ITEMS, sharding="row_wise")
    config = PlanConfig(table, ClusterConfig(gpu="cpu", gpus=ranks), BatchPlanConfig(mean_len=1.0), MODEL, LOSS)
    for batches, name in ((2, "first"), (3, "both")):
        earlier, end = waiting_bytes(replace(config, optim=UpdatePlanConfig(accumulate_steps=batches)), WORK)
        assert earlier == pytest.approx(np.mean([r[name] for r in results]), rel=0.05)
        assert end > earlier
    dense = sum(p.numel() for p in RetrievalModel(MODEL, 1).encoder.parameters())
    averaged = replace(config, optim=UpdatePlanConfig(average_decay=0.99))
    assert average_bytes(averaged, dense, WORK) == max(r["averaged"] for r in results)


def test_rows_wait_only_where_something_comes_between() -> None:
    config = managed("lru", 1000)
    assert waiting_bytes(config, WORK) == (0.0, 0.0)
    earlier, end = waiting_bytes(replace(config, optim=UpdatePlanConfig(clip_norm=1.0)), WORK)
    assert earlier == 0.0 and end > 0.0
    on_gpu = replace(config, cluster=ClusterConfig(gpu="h200"))
    narrow = replace(on_gpu, embedding=replace(config.embedding, dtype="bfloat16"))
    assert waiting_bytes(on_gpu, WORK) == (0.0, 0.0)
    clipped = replace(on_gpu, optim=UpdatePlanConfig(clip_norm=1.0))
    assert waiting_bytes(narrow, WORK) == waiting_bytes(clipped, WORK), "fbgemm has no kernels for rows of bfloat16"
    embedding = {part.name: part.seconds for part in plan_step(on_gpu, WORK).parts}["embedding"]
    assert {part.name: part.seconds for part in plan_step(narrow, WORK).parts}["embedding"] > embedding


def test_a_step_of_several_batches() -> None:
    """Three times the work and the traffic of a batch, one update."""
    config = managed("lru", 10**6, gpus=8)
    one, three = (plan_step(replace(config, optim=UpdatePlanConfig(accumulate_steps=n)), WORK) for n in (1, 3))
    assert three.tokens == 3 * one.tokens
    times = [{part.name: part.seconds for part in step.parts} for step in (one, three)]
    assert times[1]["attention"] == pytest.approx(3 * times[0]["attention"])
    assert times[1]["dense optimizer"] == times[0]["dense optimizer"]
    sent = [{t.name: t.sent for t in step.transfers} for step in (one, three)]
    assert sent[1]["rows of events"] == 3 * sent[0]["rows of events"]
    assert sent[1]["gradients of dense weights"] == sent[0]["gradients of dense weights"]
