"""The ranking model around its encoder: tokens of items, actions and features before it, heads behind it.

Legend: L events of a GPU, T of them predicted, D model width, X experts of a task.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache

import torch

from hstu.config import build
from hstu.config_ranking import RankingConfig
from hstu.data.ranking import num_bits
from hstu.feature_tables import BAGS
from hstu.planning.config import FLOAT, INT64, PlanConfig
from hstu.planning.features import OWNERS
from hstu.planning.tables import is_replicated, row_width, values_of
from hstu.planning.work import Workload

BINARY_LOSS_BYTES = 2 * FLOAT + 1
"""Of a predicted event of a task: its output, its label, whether it has one."""
HEAD_ROWS = 3
"""Float32 rows of width D of a predicted event in front of the heads: the encoder's state, its norm, the item token."""


def action_bits(ranking: RankingConfig) -> int:
    """Width of the action token's input."""
    return sum(num_bits(action) for action in ranking.actions.values()) if ranking.use_actions else 0


def ranking_parameters(config: PlanConfig) -> int:
    """Parameters beside the encoder and the tables: actions, numbers, the norm, the heads."""
    assert config.ranking is not None
    features, dim = config.all_features, config.model.dim
    tokens = action_bits(config.ranking) + 1 + 3 * (features.numbers + features.user_numbers)
    return dim * (tokens + 2) + head_parameters(config)


def head_parameters(config: PlanConfig) -> int:
    """Of the heads, counted on the meta device."""
    return _head_parameters(config.model.dim, json.dumps(dataclasses.asdict(config.ranking)))  # type: ignore[arg-type]


@cache
def _head_parameters(dim: int, text: str) -> int:
    from hstu.model.heads import RankingHeads

    ranking: RankingConfig = build(RankingConfig, json.loads(text))
    with torch.device("meta"):
        return sum(p.numel() for p in RankingHeads(dim, ranking.tasks, ranking.head).parameters())


def batch_bytes(config: PlanConfig, work: Workload) -> float:
    """Items, times, bits, labels and codes of a batch; the places of what is predicted; times of the tokens."""
    assert config.ranking is not None
    features = config.all_features
    each = 2 * INT64 + FLOAT * (action_bits(config.ranking) + features.numbers)
    predicted = 4 * INT64 + FLOAT * len(config.ranking.tasks)
    lengths = work.events * len(features.of("item")) + work.users * len(features.of("user"))
    found = INT64 * (sum(values_of(config, work).values()) + lengths) + work.users * FLOAT * features.user_numbers
    return found + work.tokens * 2 * INT64 + work.events * each + work.predicted * predicted


def token_bytes(config: PlanConfig, work: Workload) -> float:
    """What the tokens keep: features of several values before they are summed, numbers, narrow bits."""
    assert config.ranking is not None
    low, features, values = config.activation_bytes, config.all_features, values_of(config, work)
    found = 0.0
    for owner in OWNERS:
        tables = features.of(owner)
        several = [table for table in tables if table.values != 1.0]
        found += INT64 * sum(values[table.name] for table in several)
        spread = [table for table in tables if not is_replicated(config.of_feature(table))]
        if spread:  # ids and lengths that other GPUs have asked for; values of all tables lie in one storage
            found += sum(values[table.name] * INT64 + config.cluster.gpus * BAGS * INT64 for table in spread)
            several = tables if several else []
        found += FLOAT * row_width(config) * sum(values[table.name] for table in several)
    if not is_replicated(config):
        found += work.events * INT64 + config.cluster.gpus * 2 * BAGS * INT64
    found += (work.events * features.numbers + work.users * features.user_numbers) * (FLOAT + 1)
    if low < FLOAT:
        found += work.events * action_bits(config.ranking) * low
    return found + work.events * config.form.is_fused


def head_bytes(config: PlanConfig, work: Workload) -> float:
    """What the heads and their losses keep of the predicted events."""
    assert config.ranking is not None
    low, dim, head = config.activation_bytes, config.model.dim, config.ranking.head
    tasks = len(config.ranking.tasks)
    per_expert = 2 * sum(head.hidden[:-1]) + head.hidden[-1]  # before SiLU; what enters the next layer
    kept = HEAD_ROWS * FLOAT * dim + 2 * FLOAT + tasks * BINARY_LOSS_BYTES
    kept += sum(FLOAT * 2 * len(task.levels) + INT64 for task in config.ranking.tasks.values() if task.levels)
    experts = head.shared_experts + head.task_experts
    if not experts:
        return work.predicted * (kept + low * (dim + per_expert + head.hidden[-1]))
    networks = head.shared_experts + tasks * head.task_experts
    copies = 1 if low == FLOAT else networks + tasks  # the input is narrowed for each network and gate
    kept += low * (copies * dim + networks * per_expert)
    kept += tasks * ((experts + 1) * head.hidden[-1] * low + experts * FLOAT)  # experts side by side, their mix; gates
    return work.predicted * kept


def head_workspace(config: PlanConfig, work: Workload) -> float:
    """Gradients of the encoder's states, of what the heads get of them, and of the item tokens."""
    dim = FLOAT * config.model.dim
    return work.tokens * dim + work.events * dim + work.predicted * dim


def head_flops(config: PlanConfig, work: Workload) -> float:
    """Products of the heads, forward and backward."""
    return 6.0 * work.predicted * head_parameters(config)
