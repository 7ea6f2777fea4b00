"""Memory of the plan against the bytes of real models on real batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from hstu.config import FuXiLinearConfig, HSTUConfig, LossConfig, OptimConfig, SASRecConfig, TransformerConfig
from hstu.config_model import ModelConfig
from hstu.config_ranking import RankingConfig, TaskConfig
from hstu.config_similarity import MixtureConfig
from hstu.data.batches import Batch
from hstu.distributed import World
from hstu.errors import UserError
from hstu.model.retrieval import RetrievalModel
from hstu.optim import make_optimizer
from hstu.planning.config import GIB, BatchPlanConfig, ClusterConfig, PlanConfig, TablePlanConfig
from hstu.planning.layers import layer_bytes
from hstu.planning.losses import distinct, rectangle_width
from hstu.planning.memory import plan_memory, saved_bytes
from hstu.planning.work import Workload, length_shares, visible_pairs

ITEMS = 3000
MODELS = {
    "hstu published": HSTUConfig(),
    "hstu, 3 layers, wide values": HSTUConfig(dim=64, num_blocks=3, num_heads=2, qk_dim=16, v_dim=48),
    "hstu, no l2": HSTUConfig(dim=96, num_heads=4, qk_dim=24, v_dim=24, l2_normalize=False),
    "sasrec published": SASRecConfig(),
    "sasrec, 4 heads": SASRecConfig(dim=96, num_blocks=3, num_heads=4, ffn_dim=200, l2_normalize=False),
    "transformer": TransformerConfig(dim=96, num_blocks=3, num_heads=4, ffn_dim=256),
    "fuxi published": FuXiLinearConfig(),
    "fuxi, one chunk": FuXiLinearConfig(dim=96, num_blocks=3, num_heads=4, qk_dim=24, num_periods=4, chunk_size=256),
}
LOSSES = {
    "sampled": LossConfig(),
    "bank": LossConfig(name="shared_bank", num_negatives=512),
    "in_batch": LossConfig(name="in_batch"),
    "full": LossConfig(name="full_softmax"),
}
LENGTHS = np.maximum(1, (150 * (np.arange(1, 17) / 16) ** 2).astype(np.int64))
"""Skewed: 1 .. 150 tokens."""


def make_batch(lengths: np.ndarray, num_items: int, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    total = int(lengths.sum())
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.from_numpy(lengths).cumsum(0)])
    times = torch.randint(0, 86_400, (total,), generator=generator).cumsum(0)
    items = torch.randint(1, num_items + 1, (2, total), generator=generator)
    return Batch(offsets, items[0], times, times + 60, items[1], torch.arange(len(lengths)), int(lengths.max()))


def kept_bytes(model: RetrievalModel, batch: Batch, precision: str, world: World | None = None) -> int:
    """Bytes of the distinct storages that the loss keeps for the backward pass, but for the parameters'."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor keeps its address from being used again
        return tensor

    plan = model.encoder.plan(batch)
    low = precision == "bfloat16"
    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=low):
        model.loss(batch, 1, plan, world)
    for column in (batch.item_ids, batch.labels, batch.timestamps, batch.request_times):
        kept[column.untyped_storage().data_ptr()] = (column.untyped_storage().nbytes(), column)
    return sum(size for size, _ in kept.values())


def planned(model: ModelConfig, loss: LossConfig = LOSSES["sampled"], precision: str = "float32") -> PlanConfig:
    table = TablePlanConfig(rows=ITEMS, kind="local", optimizer="adamw")
    cluster, batch = ClusterConfig(gpu="cpu", gpus=1), BatchPlanConfig(mean_len=1.0)
    return PlanConfig(table, cluster, batch, model, loss, precision)


def planned_kept(config: PlanConfig, lengths: np.ndarray = LENGTHS) -> float:
    return sum(part.bytes for part in saved_bytes(config, Workload.of_lengths(lengths, config.model)))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", MODELS)
def test_what_autograd_keeps(name: str, loss: str) -> None:
    config = planned(MODELS[name], LOSSES[loss])
    measured = kept_bytes(RetrievalModel(config.model, ITEMS, config.loss), make_batch(LENGTHS, ITEMS), "float32")
    assert planned_kept(config) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("name", ["hstu published", "sasrec, 4 heads", "transformer", "fuxi published"])
def test_what_autograd_keeps_under_autocast(name: str) -> None:
    """The plan leaves out the narrow copies of the weights, hence the wider bound."""
    config = planned(MODELS[name], precision="bfloat16")
    model = RetrievalModel(config.model, ITEMS, config.loss)
    measured = kept_bytes(model, make_batch(LENGTHS, ITEMS), "bfloat16")
    assert planned_kept(config) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("name", ["hstu published", "sasrec, 4 heads", "transformer", "fuxi published"])
def test_one_more_layer(name: str) -> None:
    shallow = planned(MODELS[name])
    deep = replace(shallow, model=replace(shallow.model, num_blocks=shallow.model.num_blocks + 1))
    batch = make_batch(LENGTHS, ITEMS)
    few, many = (kept_bytes(RetrievalModel(c.model, ITEMS, c.loss), batch, "float32") for c in (shallow, deep))
    assert layer_bytes(shallow, Workload.of_lengths(LENGTHS, shallow.model)) == pytest.approx(many - few, rel=0.01)


@pytest.mark.parametrize("name", ["sasrec published", "sasrec, 4 heads", "transformer"])
def test_padded_softmax_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs, here on the CPU; of the loss and the attention's layout only that of the CPU is there."""
    from hstu.model import sasrec, transformer
    from hstu.model.softmax_attention import causal_softmax_attention

    def padded(q, k, v, plan, *rest, **named):  # type: ignore[no-untyped-def]
        return causal_softmax_attention(q, k, v, replace(plan, schedule=None), *rest, **named)

    for module in (sasrec, transformer):
        monkeypatch.setattr(module, "causal_softmax_attention", padded)
    config = planned(MODELS[name])
    on_gpu = replace(config, cluster=replace(config.cluster, gpu="h200"))
    batch, work = make_batch(LENGTHS, ITEMS), Workload.of_lengths(LENGTHS, config.model)
    deep = replace(config, model=replace(config.model, num_blocks=config.model.num_blocks + 1))
    few, many = (kept_bytes(RetrievalModel(c.model, ITEMS, c.loss), batch, "float32") for c in (config, deep))
    assert layer_bytes(on_gpu, work) == pytest.approx(many - few, rel=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_weights_gradients_and_optimizer(name: str) -> None:
    config = planned(MODELS[name])
    model = RetrievalModel(config.model, ITEMS, config.loss)
    optimizer = make_optimizer(model, OptimConfig())
    model.loss(make_batch(LENGTHS, ITEMS), 1).backward()
    optimizer.step()
    parts = plan_memory(config, Workload.of_lengths(LENGTHS, config.model))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert parts.of("table") == 4 * (ITEMS + 1) * config.model.dim
    assert parts.of("table") + parts.of("dense weights") == size
    assert parts.of("gradients") == sum(p.grad.numel() * 4 for p in model.parameters() if p.grad is not None)
    moments = [v for s in optimizer.state.values() for v in s.values() if v.dim() > 0]
    states = parts.of("table optimizer") + parts.of("dense optimizer (AdamW)")
    assert states == sum(v.numel() * v.element_size() for v in moments)


PEAKS = {
    "hstu": (HSTUConfig(dim=128, num_heads=4, qk_dim=32, v_dim=32, num_blocks=3), "sampled"),
    "hstu, wide values": (HSTUConfig(dim=64, num_heads=4, qk_dim=16, v_dim=64, num_blocks=3), "bank"),
    "sasrec": (SASRecConfig(dim=128, num_blocks=3, num_heads=4, ffn_dim=256), "sampled"),
    "transformer": (TransformerConfig(dim=128, num_blocks=3, num_heads=4, ffn_dim=256), "full"),
    "fuxi": (FuXiLinearConfig(dim=128, qk_dim=16, num_blocks=2), "bank"),
    "fuxi, one layer": (FuXiLinearConfig(num_blocks=1), "sampled"),
}


@pytest.mark.parametrize("name", PEAKS)
def test_peak_of_a_step(name: str) -> None:
    """Of what torch allocates: kept, workspace and gradients."""
    model_config, loss = PEAKS[name]
    config, batch = planned(model_config, LOSSES[loss]), make_batch(np.tile(LENGTHS, 2), ITEMS)
    model = RetrievalModel(config.model, ITEMS, config.loss)
    plan = model.encoder.plan(batch)
    model.loss(batch, 1, plan).backward()  # buffers that live on are there
    for parameter in model.parameters():
        parameter.grad = None
    measured = allocated_peak(lambda: model.loss(batch, 1, plan).backward())
    work = Workload.of_lengths(np.tile(LENGTHS, 2), config.model)
    memory = plan_memory(config, work)
    kept = planned_kept(config, np.tile(LENGTHS, 2)) - memory.of("kept: batch and plan")
    assert kept + memory.of("workspace") + memory.of("gradients") == pytest.approx(measured, rel=0.1)


def allocated_peak(task: Callable[[], None]) -> int:
    """Most bytes that torch had allocated at a time beyond those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        task()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


# Arithmetic


@pytest.mark.parametrize("mean", [1.0, 3.5, 50.5, 80.0, 100.0])
def test_lengths_have_their_mean(mean: float) -> None:
    shares = length_shares(mean, 100)
    assert shares.sum() == pytest.approx(1.0)
    assert shares @ np.arange(1, 101) == pytest.approx(mean, rel=1e-9)


def test_lengths_with_the_mean_of_all_are_even() -> None:
    np.testing.assert_allclose(length_shares(50.5, 100), 0.01)


@pytest.mark.parametrize(("window", "full_rows"), [(0, 0), (3, 0), (3, 2), (50, 0)])
def test_visible_pairs_are_those_of_the_mask(window: int, full_rows: int) -> None:
    from kernels.attention import Mask
    from kernels.attention.reference import visible

    model = HSTUConfig(window=window, full_rows=full_rows)
    for n in (1, 2, 3, 4, 9):
        i, j = torch.arange(n)[:, None], torch.arange(n)
        mask = visible(i, j, torch.tensor(n), torch.tensor(n), Mask(window=window, full_rows=full_rows))
        assert visible_pairs(np.array([float(n)]), model)[0] == int(mask.sum())


def test_distinct_draws() -> None:
    assert distinct(2, 4) == pytest.approx(4 * (1 - 0.75**2))  # 1.75
    assert distinct(1e12, 1000) == pytest.approx(1000)


def test_widest_row_of_a_shard() -> None:
    """Negatives that one of 4 shards owns, of 32 each over 1,200 positions, against counting."""
    generator = np.random.default_rng(0)
    widest = [generator.binomial(32, 0.25, 1200).max() for _ in range(50)]
    assert abs(rectangle_width(1200, 32, 4) - np.median(widest)) <= 1
    assert rectangle_width(1200, 32, 1) == 32


def test_bytes_of_a_large_table_by_hand() -> None:
    """(10^9 + 1) rows of 256 bf16 numbers over 64 GPUs, one float32 a row."""
    table = TablePlanConfig(rows=10**9, dtype="bfloat16", sharding="row_wise")
    config = PlanConfig(table, ClusterConfig(gpus=64), BatchPlanConfig(), HSTUConfig(dim=256))
    memory = plan_memory(config, Workload.planned(config))
    rows = 15_625_001
    assert memory.of("table") == rows * 256 * 2
    assert memory.of("table optimizer") == rows * 4
    assert memory.limit == pytest.approx(139.8 * GIB * 0.9)


def test_host_memory_of_a_cached_table() -> None:
    table = TablePlanConfig(rows=999, placement="uvm_caching", cache_fraction=0.25, sharding="row_wise")
    config = PlanConfig(table, ClusterConfig(gpus=4), BatchPlanConfig(), HSTUConfig(dim=64))
    memory = plan_memory(config, Workload.planned(config))
    shard = 250 * (64 * 4 + 4)
    assert memory.host == 4 * shard
    cached = 0.25 * 250 * 64 * 4
    assert memory.of("table") == cached + 250 * (4 + 0.25 * 16)


MIXTURES = {
    "one block": MixtureConfig(),
    "several blocks": MixtureConfig(chunk_mib=8),
    "no dropout": MixtureConfig(softmax_dropout=0.0, item_dropout=0.0, user_dropout=0.0),
    "users": MixtureConfig(item_components=8, dim=32, gate_dim=64, gate_dropout=0.1, user_embeddings=100),
}


def mixed(name: str, precision: str = "float32") -> PlanConfig:
    model = HSTUConfig(similarity="mixture_of_logits", l2_normalize=False, mixture=MIXTURES[name])
    return planned(model, LossConfig(num_negatives=32, temperature=1.0), precision)


@pytest.mark.parametrize(("precision", "bound"), [("float32", 0.02), ("bfloat16", 0.05)])
@pytest.mark.parametrize("name", MIXTURES)
def test_what_a_mixture_of_logits_keeps(name: str, precision: str, bound: float) -> None:
    config, batch = mixed(name, precision), make_batch(LENGTHS, ITEMS)
    measured = kept_bytes(RetrievalModel(config.model, ITEMS, config.loss), batch, precision)
    assert planned_kept(config) == pytest.approx(measured, rel=bound)


@pytest.mark.parametrize("name", MIXTURES)
def test_peak_of_a_mixture_of_logits(name: str) -> None:
    config, batch = mixed(name), make_batch(LENGTHS, ITEMS)
    model = RetrievalModel(config.model, ITEMS, config.loss)
    plan = model.encoder.plan(batch)
    model.loss(batch, 1, plan).backward()
    for parameter in model.parameters():
        parameter.grad = None
    measured = allocated_peak(lambda: model.loss(batch, 1, plan).backward())
    memory = plan_memory(config, Workload.of_lengths(LENGTHS, config.model))
    assert memory.of("gradients") == 4 * sum(p.numel() for p in model.parameters())
    kept = planned_kept(config) - memory.of("kept: batch and plan")
    assert kept + memory.of("workspace") + memory.of("gradients") == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss": LossConfig(name="in_batch")}, "loss.name='in_batch': expected sampled_softmax with model.similarity"),
        ({"embedding": TablePlanConfig(rows=9)}, "embedding.kind='sharded': expected local with model.similarity"),
        ({"ranking": RankingConfig(tasks={"click": TaskConfig()})}, "expected none with model.similarity"),
    ],
)  # fmt: skip
def test_what_a_mixture_of_logits_does_not_go_with(changed: dict[str, Any], message: str) -> None:
    config = replace(mixed("one block"), **changed)
    with pytest.raises(UserError, match=message):
        plan_memory(config, Workload.planned(config))
