"""What the losses keep, need and draw: on a table that is whole on this GPU, and over shards.

Legend: T tokens of a GPU, D model width, R negatives per position, K items of a bank, N GPUs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hstu.feature_tables import BAGS
from hstu.planning.config import FLOAT, INT32, INT64, PlanConfig
from hstu.planning.mixture import is_mixture, mixture_memory
from hstu.planning.ranking import head_bytes, head_workspace
from hstu.planning.tables import is_replicated, row_width
from hstu.planning.work import Workload
from hstu.sharded.losses import MAX_DRAWS
from kernels._common import CACHE_MIB, MIN_ROWS

DRAW_BYTES = INT32 + 2 + INT64
"""Of one negative while its owner is found: the id, two masks, a running count."""


def distinct(draws: float, items: float) -> float:
    """Expected number of different items among uniform draws."""
    return items * -math.expm1(draws * math.log1p(-1.0 / items)) if items > 1 else min(draws, items)


def scored_rows(config: PlanConfig, work: Workload) -> float:
    """Different rows that one GPU scores in the loss: labels and candidates of its block of the catalogue.

    Labels count as if they were uniform, which no log is: a little too many.
    """
    gpus, items = config.cluster.gpus, float(config.embedding.rows)
    positions, count = work.tokens * gpus, config.loss.num_negatives
    if config.loss.name == "full_softmax":
        return items / gpus
    if config.loss.name == "sampled_softmax":
        return distinct(positions * (count + 1) / gpus, items / gpus)
    return distinct(positions + (count if config.loss.name == "shared_bank" else 0), items) / gpus


def bank_items(config: PlanConfig, work: Workload) -> float:
    """Items of the bank that one GPU scores; those of a sampled softmax are no bank."""
    gpus, items = config.cluster.gpus, float(config.embedding.rows)
    banks = {"full_softmax": items, "shared_bank": float(config.loss.num_negatives)}
    return banks.get(config.loss.name, distinct(work.tokens * gpus, items)) / gpus


def rectangle_width(positions: float, negatives: int, gpus: int) -> int:
    """Most of a position's negatives that one of N GPUs owns, over all positions: the largest of binomial counts.

    The largest count that at least one position is expected to reach.
    """
    if gpus == 1:
        return negatives
    share, tail = 1.0 / gpus, 0.0
    for count in range(negatives, 0, -1):
        log_ways = math.lgamma(negatives + 1) - math.lgamma(count + 1) - math.lgamma(negatives - count + 1)
        tail += math.exp(log_ways + count * math.log(share) + (negatives - count) * math.log1p(-share))
        if positions * tail >= 1.0:
            return count
    return 1


@dataclass(frozen=True)
class LossMemory:
    """Bytes of the loss."""

    kept: float
    """For the backward pass."""
    workspace: float
    """Only while it runs."""
    draws: float = 0.0
    """Before the forward pass, while nothing else is kept."""


def loss_memory(config: PlanConfig, work: Workload) -> LossMemory:
    """Of the loss on the table as it lies: whole on this GPU, or in shards; of ranking those of its heads."""
    if config.ranking is not None:
        return LossMemory(head_bytes(config, work), head_workspace(config, work))
    if is_mixture(config):
        return LossMemory(*mixture_memory(config, work))
    if not is_replicated(config):
        return _sharded_loss(config, work)
    return _torch_loss(config, work) if config.torch_path else _triton_loss(config, work)


def _torch_loss(config: PlanConfig, work: Workload) -> LossMemory:
    """The torch path keeps normalised copies of what it multiplies, the whole table among them."""
    tokens, row = work.tokens, FLOAT * config.model.dim
    rows, count, name = config.embedding.rows + 1, config.loss.num_negatives, config.loss.name
    l2 = config.model.l2_normalize
    stats = tokens * 2 * FLOAT if l2 else 0.0
    table = rows * (row + 2 * FLOAT) if l2 else 0.0
    queries = tokens * row * (2 if l2 else 1) + stats
    if name == "sampled_softmax":
        kept = queries + table + tokens * (count + 1) * (INT32 + FLOAT)
        return LossMemory(kept, tokens * count * (INT32 + FLOAT) + rows * row)
    if name == "full_softmax":
        given = tokens * row + rows * row  # the gradients, made in the forward pass
        kept = given + (tokens * row + stats + rows * 2 * FLOAT if l2 else 0.0)
        return LossMemory(kept, _block_bytes(config, tokens, rows) + rows * row)
    bank = count if name == "shared_bank" else distinct(tokens, config.embedding.rows)
    kept = 2 * queries + bank * (row * (2 if l2 else 1) + INT64 + (2 * FLOAT if l2 else 0)) + tokens * 3 * FLOAT
    return LossMemory(kept, _block_bytes(config, tokens, bank) + 2 * rows * row)


def _block_bytes(config: PlanConfig, positions: float, columns: float) -> float:
    """Of the block of logits that the torch path has at a time; on the CPU it stays in the cache."""
    row = columns * FLOAT
    rows = min(config.loss.chunk_mib * 2.0**20 / row, max(MIN_ROWS, CACHE_MIB * 2.0**20 / row), positions)
    return max(1.0, rows) * row


def _triton_loss(config: PlanConfig, work: Workload) -> LossMemory:
    """The kernels keep queries and a few numbers of each; logits stay in registers."""
    tokens, rows = work.tokens, config.embedding.rows + 1
    kept = tokens * (FLOAT * config.model.dim + 4 * FLOAT)
    if config.loss.name == "full_softmax":
        kept += rows * FLOAT
    narrow = rows * config.model.dim * config.activation_bytes if config.activation_bytes < FLOAT else 0.0
    return LossMemory(kept, narrow + rows * config.model.dim * FLOAT + tokens * FLOAT * config.model.dim)


def _sharded_loss(config: PlanConfig, work: Workload) -> LossMemory:
    """Positions of all GPUs against the rows of this one (``hstu/sharded/losses.py``); all float32."""
    gpus, row, l2 = config.cluster.gpus, FLOAT * config.model.dim, config.model.l2_normalize
    everyone, scored, count = work.tokens * gpus, scored_rows(config, work), config.loss.num_negatives
    fetched = FLOAT * row_width(config)
    kept = everyone * (2 * row + INT64 + 3 * FLOAT + 1)  # all queries, the rows of their labels, numbers
    kept += gpus * 2 * BAGS * INT64  # lengths of the ids' rows, of events and of what is scored
    workspace = 2 * everyone * row + scored * (row + fetched)  # gradients of all that
    if l2:  # own queries and fetched rows before they are normalised; rows of events lie in the same storage
        kept += work.tokens * (row + fetched) + scored * (fetched + 2 * FLOAT)
    if config.loss.name != "sampled_softmax":
        bank = bank_items(config, work)
        again = everyone * row + bank * row if config.torch_path else scored * row
        return LossMemory(kept + again + bank * INT64, workspace)
    width = rectangle_width(everyone, count, gpus)
    kept += scored * row + everyone * (width + 1) * (INT32 + FLOAT if config.torch_path else INT64)
    # Every GPU draws the negatives of all positions and picks its own before the forward pass.
    own = everyone * count / gpus * (INT32 + INT64) if gpus > 1 else 0.0
    drawn = min(everyone * count, MAX_DRAWS) if gpus > 1 else everyone * count
    return LossMemory(kept, workspace, drawn * DRAW_BYTES + own)
