"""Memory of one GPU in a training step, part by part, before anything is allocated.

Weights are counted on torch's meta device, what autograd keeps is written down per layer (tests count the same bytes on
real batches), the rest is arithmetic over sizes.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cache

import torch

from hstu.config import build
from hstu.config_model import MODELS, ModelConfig
from hstu.errors import UserError
from hstu.plan_config import FLOAT, GIB, INT64, PlanConfig
from hstu.plan_layers import early_workspace, input_bytes, layer_bytes, layer_workspace, output_bytes, shared_bytes
from hstu.plan_losses import loss_memory
from hstu.plan_tables import is_replicated, num_shards, row_width, shard_shape, table_bytes
from hstu.plan_work import Workload

CACHE_ROW_BYTES, CACHE_SLOT_BYTES = 4, 16
"""fbgemm's cache of rows in host memory: its map for each row, its state for each slot (torchrec's planner counts the
same)."""


def dense_parameters(model: ModelConfig) -> int:
    """Parameters of everything but the table, counted on the meta device."""
    return _dense_parameters(model.name, json.dumps(dataclasses.asdict(model)))


@cache
def _dense_parameters(name: str, text: str) -> int:
    from hstu.model.encoder import make_encoder

    model = build(MODELS[name], json.loads(text))
    with torch.device("meta"):
        return sum(p.numel() for p in make_encoder(model).parameters())


def check_model(model: ModelConfig) -> None:
    """Raises UserError for a model whose memory is not written down here."""
    if model.similarity != "dot":
        raise UserError(f"model.similarity={model.similarity}: hstu-plan knows dot only")


@dataclass(frozen=True)
class Part:
    """A named number of bytes."""

    name: str
    bytes: float


@dataclass(frozen=True)
class Memory:
    """Memory of the fullest GPU, bytes."""

    parts: tuple[Part, ...]
    limit: float
    """What there is, less the reserve."""
    host: float = 0.0
    """Of host memory, for all GPUs of a node."""
    host_limit: float = 0.0

    @property
    def total(self) -> float:
        return sum(part.bytes for part in self.parts)

    @property
    def fits(self) -> bool:
        return self.total <= self.limit and self.host <= self.host_limit

    def of(self, name: str) -> float:
        """Bytes of the part of this name."""
        return next(part.bytes for part in self.parts if part.name == name)


def saved_bytes(config: PlanConfig, work: Workload) -> list[Part]:
    """What autograd keeps between forward and backward, by layer."""
    parts = [Part("batch and plan", input_bytes(config, work))]
    if shared := shared_bytes(config, work):
        parts.append(Part("shared by layers", shared))
    each = layer_bytes(config, work)
    parts += [Part(f"layer {index + 1}", each) for index in range(config.model.num_blocks)]
    return [*parts, Part("output", output_bytes(config, work)), Part("loss", loss_memory(config, work).kept)]


def plan_memory(config: PlanConfig, work: Workload) -> Memory:
    """Memory of the fullest GPU by part."""
    check_model(config.model)
    sheet, table = config.cluster.sheet, config.embedding
    rows, state = table_bytes(config)
    host, extra = 0.0, 0.0
    if table.placement != "hbm":
        local = min(sheet.gpus_per_node, config.cluster.gpus, num_shards(config))
        host = (rows + state) * local
        cached = table.cache_fraction if table.placement == "uvm_caching" else 0.0
        slots = shard_shape(config)[0]
        extra = slots * (CACHE_ROW_BYTES + cached * CACHE_SLOT_BYTES) if cached else 0.0
        rows, state = rows * cached, state * cached
    dense = float(FLOAT * dense_parameters(config.model))
    whole = float(table.rows + 1) * config.model.dim * FLOAT if is_replicated(config) else 0.0
    loss, kept = loss_memory(config, work), saved_bytes(config, work)
    early = max(loss.draws, early_workspace(config, work)) - sum(part.bytes for part in kept)
    layer = layer_workspace(config, work) - loss.kept  # by then the loss has given back what it kept
    parts = [
        Part("table", rows + extra),
        Part("table optimizer", state),
        Part("dense weights", dense),
        Part("gradients", dense + whole),
        Part("dense optimizer (AdamW)", 2 * dense),
        *(Part(f"kept: {part.name}", part.bytes) for part in kept),
        Part("workspace", max(loss.workspace, layer, early)),
        Part("communication", communication_buffers(config, work, dense + whole)),
    ]
    hbm = sheet.hbm_gib * GIB
    return Memory(tuple(parts), hbm * (1 - config.cluster.reserve), host, sheet.ddr_gib * GIB)


def communication_buffers(config: PlanConfig, work: Workload, gradients: float) -> float:
    """Rows of the events and their ids on the way (sent and received at once), and DDP's buckets of gradients."""
    rows = 0.0 if is_replicated(config) else 2 * work.tokens * (FLOAT * row_width(config) + INT64)
    return rows + (gradients if config.cluster.gpus > 1 else 0.0)
