"""The mixture of logits over a local table: its networks' parameters, what a sampled softmax with it keeps and costs.

Legend: T positions of a GPU, R negatives per position, D model width, P and K components of a query and an item, C
their width, E = P K logits of a pair, G width of the gating networks.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache

import torch

from hstu.config import build
from hstu.config_similarity import MixtureConfig
from hstu.planning.config import FLOAT, INT32, PlanConfig
from hstu.planning.work import Workload
from kernels._common import rows_within

NORM_COPIES = 3.2
"""Float32 copies of an item's components that the backward pass of their norm needs at once (measured)."""


def is_mixture(config: PlanConfig) -> bool:
    """Whether items are scored by a mixture of logits."""
    return config.model.similarity == "mixture_of_logits"


def mixture_parameters(config: PlanConfig) -> int:
    """Of its networks and user vectors, counted on the meta device; 0 without it."""
    return (
        _parameters(config.model.dim, json.dumps(dataclasses.asdict(config.model.mixture))) if is_mixture(config) else 0
    )


@cache
def _parameters(dim: int, text: str) -> int:
    from hstu.model.mixture import MixtureOfLogits

    with torch.device("meta"):
        return sum(p.numel() for p in MixtureOfLogits(build(MixtureConfig, json.loads(text)), dim).parameters())


def query_bytes(config: PlanConfig) -> float:
    """Kept of a position: its norm, the gated unit, components and gating values, the labels' weights."""
    m, dim, low = config.model.mixture, config.model.dim, config.activation_bytes
    num_logits = m.query_components * m.item_components
    kept = dim * (2 * FLOAT + (2 * low if low < FLOAT else 0)) + 2 * FLOAT + 4 * m.hidden_dim * low
    kept += m.query_components * (m.dim * 2 * FLOAT + 2 * FLOAT) + 2 * m.gate_dim * low
    return kept + 3 * num_logits * FLOAT


def _logit_bytes(config: PlanConfig) -> float:
    """Kept of each of a pair's logits: logits, gates, weights before and after dropout."""
    m, low = config.model.mixture, config.activation_bytes
    more = 1 if low < FLOAT else int(m.gate_dropout > 0)
    return low + FLOAT * (3 + more + 2 * (m.softmax_dropout > 0))


def pair_workspace(config: PlanConfig) -> float:
    """Of a pair in the backward pass, when the logits' gates and weights have given back what they kept."""
    m = config.model.mixture
    freed = m.query_components * m.item_components * _logit_bytes(config) + 2 * m.gate_dim * config.activation_bytes
    return max(0.0, NORM_COPIES * m.item_components * m.dim * FLOAT - freed)


def pair_bytes(config: PlanConfig) -> float:
    """Kept of a position and an item."""
    m, dim, low = config.model.mixture, config.model.dim, config.activation_bytes
    num_logits = m.query_components * m.item_components
    kept = float(dim * low * (2 if m.item_dropout or low < FLOAT else 1))
    kept += m.item_components * (m.dim * (FLOAT + low) + 2 * FLOAT)
    kept += 4 * m.gate_dim * low  # the item's and the pair's networks
    kept += num_logits * _logit_bytes(config)
    return kept + INT32 + FLOAT + 1 + 2 * FLOAT * (m.softmax_dropout > 0)


def block_rows(config: PlanConfig) -> int:
    """Positions that are scored at a time."""
    m = config.model.mixture
    floats = 2 * config.model.dim + 2 * m.item_components * m.dim + 4 * m.gate_dim
    floats += 10 * m.query_components * m.item_components
    return rows_within(m.chunk_mib, (config.loss.num_negatives + 1) * floats, torch.float32)


def mixture_memory(config: PlanConfig, work: Workload) -> tuple[float, float]:
    """Kept, and needed while it runs.

    Where positions come in several blocks each is scored again, and of pairs only the ids are kept.
    """
    items = config.loss.num_negatives + 1
    own, rows = work.tokens * query_bytes(config), min(float(block_rows(config)), work.tokens)
    block, needed = rows * items * pair_bytes(config), rows * items * pair_workspace(config)
    if rows >= work.tokens:
        return own + block, max(needed, (config.embedding.rows + 1) * config.model.dim * FLOAT)
    return own + _narrow_weights(config) + work.tokens * items * INT32, block + needed


def _narrow_weights(config: PlanConfig) -> float:
    """Copies of the position's networks that autocast makes."""
    m, dim, low = config.model.mixture, config.model.dim, config.activation_bytes
    if low == FLOAT:
        return 0.0
    unit = m.hidden_dim * (2 * dim + m.query_components * m.dim)
    return low * float(unit + m.gate_dim * (dim + m.query_components * m.item_components))


def mixture_flops(config: PlanConfig, work: Workload) -> float:
    """Products, forward and backward; blocks are scored once more."""
    m, dim = config.model.mixture, config.model.dim
    num_logits = m.query_components * m.item_components
    query = dim * (2 * m.hidden_dim + m.gate_dim) + m.hidden_dim * m.query_components * m.dim + m.gate_dim * num_logits
    item = dim * (m.item_components * m.dim + m.gate_dim) + m.gate_dim * num_logits
    pair = num_logits * (m.dim + 2 * m.gate_dim)
    times = 6.0 if block_rows(config) >= work.tokens else 8.0
    return work.tokens * (6.0 * query + times * (config.loss.num_negatives + 1) * (item + pair))
