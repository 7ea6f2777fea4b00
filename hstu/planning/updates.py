"""What a step costs beside its batch: the map of ids to rows, gradients of rows that wait, averages of the weights.

Legend: R rows of the item table, W ids that the map takes in at once, E rows that a shard is asked for by a batch.
"""

from __future__ import annotations

import torch

from hstu.planning.config import FLOAT, INT64, PlanConfig
from hstu.planning.losses import distinct, scored_rows
from hstu.planning.tables import column_parts, is_replicated, lookups, num_shards, shard_shape
from hstu.planning.work import Workload
from hstu.sharded import plan

MAP_COLUMNS = {"lru": 3, "lfu": 3, "distance_lfu": 4}
"""int64 numbers of a row in torchrec's map: item, slot, and when or how often it was seen."""
UPDATE_ROW_BYTES = {"lru": 40.0, "lfu": 40.0, "distance_lfu": 52.0}
UPDATE_ID_BYTES = {"lru": 130.0, "lfu": 130.0, "distance_lfu": 150.0}
"""That an update of the map needs at once, for each of the R rows and W ids (measured)."""
UPDATE_MOVED_BYTES = {"torch": 4000.0, "triton": 1000.0}
"""That an update moves for each row and id: several sorts. On a CPU as measured, caches included; those of a GPU are
assumed to be radix sorts of eight passes."""
FOUND_BYTES = 32.0
"""Read from memory at every step of a search in the map."""
REMAPS = 4
"""Searches of an id in a step: of inputs and labels, and to count those without a row."""


def labels_of(config: PlanConfig, work: Workload) -> float:
    """Ids of all GPUs that the map takes in at a step."""
    return work.predicted * config.cluster.gpus * config.optim.accumulate_steps


def waiting_ids(config: PlanConfig, work: Workload) -> float:
    """W: ids since the last update, and those of this step."""
    return labels_of(config, work) * config.embedding.evict_every


def map_bytes(config: PlanConfig, work: Workload) -> float:
    """Of the map on every GPU, with the ids that wait for its update; a hash needs none."""
    if config.embedding.ids != "managed":
        return 0.0
    return INT64 * (config.embedding.rows * MAP_COLUMNS[config.embedding.policy] + waiting_ids(config, work))


def mapped_bytes(config: PlanConfig, work: Workload) -> float:
    """Rows of the ids of a batch, beside the ids."""
    if config.ranking is not None:
        return work.events * INT64
    return work.tokens * 2 * INT64


def map_workspace(config: PlanConfig, work: Workload) -> float:
    """Of an update of the map, before the step's first batch."""
    if config.embedding.ids != "managed":
        return 0.0
    policy = config.embedding.policy
    ids = UPDATE_ID_BYTES[policy] * waiting_ids(config, work)
    return config.embedding.rows * UPDATE_ROW_BYTES[policy] + ids


def map_moved_bytes(config: PlanConfig, work: Workload) -> float:
    """Moved in memory for the map in a step: searches, and the update's share."""
    if config.embedding.ids != "managed":
        return 0.0
    rows, path = config.embedding.rows, "torch" if config.torch_path else "triton"
    ids = (work.events + work.predicted) / 2 * REMAPS * config.optim.accumulate_steps
    searches = ids * FOUND_BYTES * rows.bit_length()
    return searches + UPDATE_MOVED_BYTES[path] * (rows + waiting_ids(config, work)) / config.embedding.evict_every


# Rows that wait, and averages


def shard_lookups(config: PlanConfig, work: Workload) -> list[tuple[PlanConfig, float]]:
    """Of each table that is spread: the config with it as the item table, and E, of an even share."""
    scored = scored_rows(config, work) if config.ranking is None else 0.0
    return [
        (x.config, (x.rows + (scored if x.of == "events" else 0.0)) * config.cluster.gpus
         * column_parts(x.config) / num_shards(x.config))
        for x in lookups(config, work) if not is_replicated(x.config)
    ]  # fmt: skip


def moves_in_torch(config: PlanConfig) -> bool:
    """Whether rows of sharded tables move in torch, at the end of the step, and not in fbgemm's backward pass."""
    if config.embedding.kind != "sharded":
        return False
    device = torch.device("cpu" if config.cluster.gpu == "cpu" else "cuda")
    return plan.moves_in_torch(config.embedding.of_run(), config.optim.of_run(), device, config.model.dim)


def waiting_bytes(config: PlanConfig, work: Workload) -> tuple[float, float]:
    """Gradients of looked-up rows with their ids: those of earlier batches of the step; and what its end needs.

    Those of two batches and more are summed, each row once, where they are more than rows; all are at the end.
    """
    if not moves_in_torch(config):
        return 0.0, 0.0
    earlier = end = 0.0
    before = config.optim.accumulate_steps - 1
    for own, asked in shard_lookups(config, work):
        rows, columns = shard_shape(own)
        each = columns * FLOAT + INT64
        kept = before * asked if before < 2 or before * asked <= rows else distinct(before * asked, rows)
        earlier += kept * each
        end += (kept + asked) * each + distinct(kept + asked, rows) * each
    return earlier, end


def average_bytes(config: PlanConfig, dense: float, work: Workload) -> float:
    """Of the moving average of all weights on this GPU, float32. dense: numbers outside the tables."""
    if config.optim.average_decay is None:
        return 0.0
    shapes = [shard_shape(lookup.config) for lookup in lookups(config, work)]
    return FLOAT * (dense + sum(float(rows) * columns for rows, columns in shapes))
