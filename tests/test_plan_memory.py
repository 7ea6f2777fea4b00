"""Memory of the plan against the bytes of real models on real batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from hstu.config import HSTUConfig, LossConfig, SASRecConfig, TransformerConfig
from hstu.config_model import ModelConfig
from hstu.data.batches import Batch
from hstu.distributed import World
from hstu.model.retrieval import RetrievalModel
from hstu.plan_config import BatchPlanConfig, ClusterConfig, PlanConfig, TablePlanConfig
from hstu.plan_memory import Workload, saved_bytes

ITEMS = 3000


def make_batch(lengths: np.ndarray, num_items: int, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    total = int(lengths.sum())
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.from_numpy(lengths).cumsum(0)])
    times = torch.randint(0, 86_400, (total,), generator=generator).cumsum(0)
    items = torch.randint(1, num_items + 1, (2, total), generator=generator)
    users = torch.arange(len(lengths))
    return Batch(offsets, items[0], times, times + 60, items[1], users, int(lengths.max()))


def make_lengths(kind: str, users: int, longest: int) -> np.ndarray:
    if kind == "full":
        return np.full(users, longest)
    return np.maximum(1, (longest * (np.arange(1, users + 1) / users) ** 2).astype(np.int64))


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


def planned(model: ModelConfig, loss: LossConfig, precision: str = "float32") -> PlanConfig:
    table = TablePlanConfig(rows=ITEMS, kind="local", optimizer="adamw")
    cluster, batch = ClusterConfig(gpu="cpu", gpus=1), BatchPlanConfig(mean_len=1.0)
    return PlanConfig(table, cluster, batch, model, loss, precision)


MODELS = {
    "hstu published": HSTUConfig(),
    "hstu, 3 layers, wide values": HSTUConfig(dim=64, num_blocks=3, num_heads=2, qk_dim=16, v_dim=48),
    "hstu, no bias, no l2": HSTUConfig(dim=96, num_heads=4, qk_dim=24, v_dim=24, l2_normalize=False),
    "sasrec published": SASRecConfig(),
    "sasrec, 4 heads": SASRecConfig(dim=96, num_blocks=3, num_heads=4, ffn_dim=200, l2_normalize=False),
    "transformer": TransformerConfig(),
    "transformer, 3 layers": TransformerConfig(dim=96, num_blocks=3, num_heads=4, ffn_dim=256),
}
LOSSES = {
    "sampled": LossConfig(),
    "bank": LossConfig(name="shared_bank", num_negatives=512),
    "in_batch": LossConfig(name="in_batch"),
    "full": LossConfig(name="full_softmax"),
}


@pytest.mark.parametrize("kind", ["full", "skewed"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", MODELS)
def test_kept_activations_are_within_a_tenth(name: str, loss: str, kind: str) -> None:
    config = planned(MODELS[name], LOSSES[loss])
    lengths = make_lengths(kind, 24, 150)
    model = RetrievalModel(config.model, ITEMS, config.loss)
    measured = kept_bytes(model, make_batch(lengths, ITEMS), "float32")
    parts = saved_bytes(config, Workload.of_lengths(lengths, config.model))
    assert sum(part.bytes for part in parts) == pytest.approx(measured, rel=0.1)
