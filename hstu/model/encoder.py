"""The encoder interface over jagged batches, its shared input stage, and HSTU.

Legend: B users, L total events, N padded length, D model width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hstu.config import HSTUConfig, ModelConfig
from hstu.data.batches import Batch
from hstu.model.bias import time_buckets
from hstu.model.layer import HSTULayer, LayerCache
from hstu.seeding import derive
from kernels._dropout import seeded_dropout
from kernels.attention import AttentionPlan, Mask, make_plan, sequence_positions
from kernels.jagged import add_positions


@dataclass(frozen=True)
class Layout:
    """Where each user's tokens lie and when they happen.

    Attributes:
        offsets: [B+1] int64.
        max_len: longest user.
        timestamps: [L] int64, s.
        request_times: [L] int64, s. When the prediction at each token is asked for.
        num_targets: [B] int64. Tokens at each user's end that are targets, or None.
        contextual: tokens at each user's start that see all of the history.
        key_starts, key_lengths: [B] int64. Cached inference: the tokens are the last of a sequence whose keys lie in
            rows key_starts[b] .. + key_lengths[b] of the caches; then max_len is the longest such sequence.
        key_times: [rows of the caches] int64, s. None: the tokens' own.
        max_tokens: most tokens of one user; None: max_len.
        num_positions: positions that are needed, fewer than max_len where there are targets; None: max_len.
    """

    offsets: Tensor
    max_len: int
    timestamps: Tensor
    request_times: Tensor
    num_targets: Tensor | None = None
    contextual: int = 0
    key_starts: Tensor | None = None
    key_lengths: Tensor | None = None
    key_times: Tensor | None = None
    max_tokens: int | None = None
    num_positions: int | None = None


class Encoder(nn.Module):
    """What every encoder is: a plan from the batch alone, and a map from token embeddings to outputs."""

    name: str
    """``model.name`` that picks it."""

    def plan(self, batch: Batch) -> AttentionPlan:
        """Plan of a batch whose tokens are its events."""
        return self.plan_tokens(Layout(batch.offsets, batch.max_len, batch.timestamps, batch.request_times))

    def plan_tokens(self, layout: Layout) -> AttentionPlan:
        """Plan shared by all layers. Needs no parameters, so a loader thread can make it ahead of time."""
        return make_plan(layout.offsets, layout.max_len)

    def forward(self, events: Tensor, plan: AttentionPlan, seed: int | None, *, rows: Tensor | None = None) -> Tensor:
        """events: [L, D] item embeddings; seed: of all dropout, None in evaluation. Returns [L, D].

        rows: [L] int64. Place of each token in the batch of all ranks, by which dropout is drawn; None: 0..L-1.
        """
        raise NotImplementedError


def layer_seed(seed: int | None, index: int) -> int | None:
    """Dropout seed of one place in the model."""
    return None if seed is None else derive(seed, index)


class InputStage(nn.Module):
    """``Dropout(sqrt(D) E[item] + P[position])`` (PROTOCOL section 3); P is [N, D]."""

    def __init__(self, initial_positions: Tensor, dropout: float) -> None:
        super().__init__()
        self.position = nn.Parameter(initial_positions)
        self.dropout = dropout

    def forward(self, events: Tensor, plan: AttentionPlan, seed: int | None, rows: Tensor | None = None) -> Tensor:
        scale = math.sqrt(events.shape[1])
        if plan.num_targets is not None or plan.is_delta:  # a row's place is not its number in the batch
            x = torch.add(self.position[sequence_positions(plan)], events, alpha=scale)
            return seeded_dropout(x, self.dropout, seed, rows)
        return add_positions(events, self.position, plan.offsets, scale, plan.max_len, self.dropout, seed, rows)


class HSTUEncoder(Encoder):
    """Hierarchical sequential transduction unit layers (Zhai et al. 2024); no norm after the last one."""

    name = "hstu"

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        padded_len = config.max_len + config.extra_slots
        self.request_time = config.bias.request_time
        self.input = InputStage(nn.init.xavier_normal_(torch.empty(padded_len, config.dim)), config.dropout)
        self.layers = nn.ModuleList(HSTULayer(config) for _ in range(config.num_blocks))
        self.time_buckets = time_buckets(config.bias)
        self.mask = Mask(window=config.window, full_rows=config.full_rows)
        self.count_rows = config.divisor == "row_count"

    def plan_tokens(self, layout: Layout) -> AttentionPlan:
        times: tuple[Any, ...] = (None, None, None)
        if self.time_buckets is not None:
            query_time = layout.request_times if self.request_time else layout.timestamps
            key_time = layout.timestamps if layout.key_times is None else layout.key_times
            times = (query_time, key_time, self.time_buckets)
        return make_plan(
            layout.offsets, layout.max_len, *times,
            mask=replace(self.mask, contextual=layout.contextual),
            num_targets=layout.num_targets,
            key_starts=layout.key_starts,
            key_lengths=layout.key_lengths,
            max_query_len=layout.max_tokens,
            num_positions=layout.num_positions,
            count_rows=self.count_rows,
        )  # fmt: skip

    def forward(
        self, events: Tensor, plan: AttentionPlan, seed: int | None, caches: list[LayerCache] | None = None,
        *, rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """caches: one a layer, to be written and, where the plan says so, read (cached inference)."""
        x = self.input(events, plan, layer_seed(seed, 0), rows)
        for index, layer in enumerate(self.layers):
            x = layer(x, plan, layer_seed(seed, index + 1), None if caches is None else caches[index], rows)
        return x


def make_encoder(config: ModelConfig) -> Encoder:
    """The encoder that ``config.name`` names."""
    from hstu.model.fuxi_linear import FuXiLinearEncoder
    from hstu.model.sasrec import SASRecEncoder
    from hstu.model.transformer import TransformerEncoder

    encoders: dict[str, type] = {
        "hstu": HSTUEncoder, "sasrec": SASRecEncoder, "transformer": TransformerEncoder,
        "fuxi_linear": FuXiLinearEncoder,
    }  # fmt: skip
    return encoders[config.name](config)  # type: ignore[no-any-return]
