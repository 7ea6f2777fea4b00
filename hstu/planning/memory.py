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
from hstu.config_model import MODELS
from hstu.errors import check, one_of
from hstu.planning.config import FLOAT, GIB, INT64, PlanConfig
from hstu.planning.layers import (
    batch_bytes,
    early_workspace,
    layer_bytes,
    layer_workspace,
    layout_bytes,
    output_bytes,
    shared_bytes,
)
from hstu.planning.losses import loss_memory
from hstu.planning.mixture import is_mixture, mixture_parameters
from hstu.planning.ranking import batch_bytes as ranking_batch
from hstu.planning.ranking import ranking_parameters, token_bytes
from hstu.planning.tables import (
    busiest,
    is_replicated,
    lookups,
    num_shards,
    row_width,
    shard_shape,
    table_bytes,
    whole_gradients,
)
from hstu.planning.updates import average_bytes, map_bytes, map_workspace, mapped_bytes, waiting_bytes
from hstu.planning.work import Workload

PLANNED_MODELS = ("hstu", "sasrec", "transformer", "fuxi_linear")
"""Encoders of which ``planning/layers.py`` and ``planning/cost.py`` know what they keep and cost."""
CACHE_ROW_BYTES, CACHE_SLOT_BYTES = 4, 16
"""fbgemm's cache of rows in host memory: its map for each row, its state for each slot (torchrec's planner counts the
same)."""


def dense_parameters(config: PlanConfig) -> int:
    """Parameters of everything but the tables, counted on the meta device."""
    around = mixture_parameters(config) if config.ranking is None else ranking_parameters(config)
    return around + _encoder_parameters(config.encoder.name, json.dumps(dataclasses.asdict(config.encoder)))


@cache
def _encoder_parameters(name: str, text: str) -> int:
    from hstu.model.encoder import make_encoder

    model = build(MODELS[name], json.loads(text))
    with torch.device("meta"):
        return sum(p.numel() for p in make_encoder(model).parameters())


def check_model(config: PlanConfig) -> None:
    """Raises UserError for an encoder whose memory is not written down, and for what training refuses beside a
    similarity."""
    one_of("model.name", config.model.name, PLANNED_MODELS)
    if not is_mixture(config):
        return
    beside = "with model.similarity=mixture_of_logits"
    check(config.ranking is None, "ranking", "a ranking model", f"none {beside}, which retrieves items")
    check(config.embedding.ids == "exact", "embedding.ids", config.embedding.ids, f"exact {beside}")
    check(config.loss.name == "sampled_softmax", "loss.name", config.loss.name, f"sampled_softmax {beside}")
    check(config.embedding.kind == "local", "embedding.kind", config.embedding.kind,
          f"local {beside} (and embedding.optimizer=adamw)")  # fmt: skip


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
    ranking = config.ranking is not None
    columns = ranking_batch(config, work) if ranking else batch_bytes(config, work)
    batches = config.optim.accumulate_steps  # all of a step's lie there
    parts = [Part("batch and plan", batches * (columns + layout_bytes(config, work)))]
    if config.embedding.ids != "exact":
        parts.append(Part("rows of the ids", mapped_bytes(config, work)))
    if ranking:
        parts.append(Part("features", token_bytes(config, work)))
    if shared := shared_bytes(config, work):
        parts.append(Part("shared by layers", shared))
    each = layer_bytes(config, work)
    parts += [Part(f"layer {index + 1}", each) for index in range(config.model.num_blocks)]
    loss = Part("heads" if ranking else "loss", loss_memory(config, work).kept)
    return [*parts, Part("output", output_bytes(config, work)), loss]


def plan_memory(config: PlanConfig, work: Workload) -> Memory:
    """Memory of the fullest GPU by part."""
    check_model(config)
    tables = lookups(config, work)
    placed = [place_table(lookup.config) for lookup in tables]
    dense, whole = float(FLOAT * dense_parameters(config)), whole_gradients(config, work)
    loss, kept = loss_memory(config, work), saved_bytes(config, work)
    earlier, end = waiting_bytes(config, work)
    apart = max(loss.draws, early_workspace(config, work), map_workspace(config, work), end - earlier)
    apart -= sum(part.bytes for part in kept)  # before they are kept, or when they are given back
    # By then loss and output have given back what they kept; gradients of item tokens wait for the first layer's.
    waiting = work.events * FLOAT * config.model.dim if config.ranking is not None else 0.0
    layer = layer_workspace(config, work) + waiting - loss.kept - output_bytes(config, work)
    parts = [Part("table", placed[0].rows), Part("table optimizer", placed[0].state)]
    if placed[1:]:
        of_features = [(lookup.config, own) for lookup, own in zip(tables[1:], placed[1:], strict=True)]
        parts.append(Part("feature tables", busiest([(own, table.rows) for own, table in of_features])))
        parts.append(Part("their optimizer", busiest([(own, table.state) for own, table in of_features])))
    average = average_bytes(config, dense / FLOAT, work)
    for name, size in (("map of ids", map_bytes(config, work)), ("average", average), ("rows that wait", earlier)):
        if size:
            parts.append(Part(name, size))
    parts += [
        Part("dense weights", dense),
        Part("gradients", dense + whole),
        Part("dense optimizer (AdamW)", 2 * dense),
        *(Part(f"kept: {part.name}", part.bytes) for part in kept),
        Part("workspace", max(loss.workspace, layer, apart)),
        Part("communication", communication_buffers(config, work, dense + whole)),
    ]
    sheet, host = config.cluster.sheet, sum(table.host for table in placed)
    limit = sheet.hbm_gib * GIB * (1 - config.cluster.reserve)
    return Memory(tuple(parts), limit, host, sheet.ddr_gib * GIB)


@dataclass(frozen=True)
class Placed:
    """Bytes of the largest shard of a table on a GPU: rows, state; and of all shards of a node in host memory."""

    rows: float
    state: float
    host: float = 0.0


def place_table(config: PlanConfig) -> Placed:
    """The item table of ``config``, in GPU or host memory."""
    table, sheet = config.embedding, config.cluster.sheet
    rows, state = table_bytes(config)
    if table.placement == "hbm":
        return Placed(rows, state)
    local = min(sheet.gpus_per_node, config.cluster.gpus, num_shards(config))
    cached = table.cache_fraction if table.placement == "uvm_caching" else 0.0
    extra = shard_shape(config)[0] * (CACHE_ROW_BYTES + cached * CACHE_SLOT_BYTES) if cached else 0.0
    return Placed(rows * cached + extra, state * cached, (rows + state) * local)


def communication_buffers(config: PlanConfig, work: Workload, gradients: float) -> float:
    """Rows of the events and their ids on the way (sent and received at once), and DDP's buckets of gradients."""
    spread = [lookup for lookup in lookups(config, work) if not is_replicated(lookup.config)]
    rows = sum(2 * lookup.rows * (FLOAT * row_width(config) + INT64) for lookup in spread)
    return rows + (gradients if config.cluster.gpus > 1 else 0.0)
