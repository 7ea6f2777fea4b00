"""The ranking model: item and action tokens, the retrieval half's encoder, multi-task heads.

Legend: S sequences, L events, T predicted events, P prefix tokens of a sequence, D model width.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hstu.config import ModelConfig
from hstu.config_embedding import EmbeddingConfig
from hstu.config_ranking import RankingConfig
from hstu.data.ranking import RankingData
from hstu.data.ranking_batches import Features, RankingBatch
from hstu.distributed import World
from hstu.embedding import INIT_STD, num_parameters
from hstu.errors import UserError
from hstu.feature_tables import FeatureTables
from hstu.model.encoder import Layout, make_encoder
from hstu.model.heads import RankingHeads
from hstu.model.retrieval import make_table
from hstu.model.shares import reached
from hstu.seeding import derive
from kernels.attention import AttentionPlan
from kernels.jagged import concat_jagged, interleave

DROPOUT_SEED, HEAD_SEED = 1, 3
"""Purpose numbers of a step's seeds."""


@dataclass(frozen=True)
class RankingPlan:
    """What a batch's tokens are like; made from the batch alone, ahead of time."""

    attention: AttentionPlan
    prefix_offsets: Tensor
    """[S+1] int64, of the prefix tokens."""
    predicted: Tensor
    """[T] int64. Token at which each predicted event is asked."""


class RankingModel(nn.Module):
    """Predicts what a user does with an item from the history of items and actions (Zhai et al. 2024, section 2.2).

    interleaved: ``prefix, item_0, action_0, item_1, action_1, ...``, causal; the prediction of event i is made at
    item_i, which sees the prefix, every earlier item and action, and itself.
    fused: ``prefix, item_0 + action_0, ...``, then the predicted events as targets ``item + empty action``, which see
    the prefix, the history and themselves; the prefix sees the history too.

    Args:
        config: the encoder's; ``max_len`` counts events.
        ranking: tasks, actions, features, heads.
        data: the store's sizes (items, codes, action bits).
        priors: see :class:`RankingHeads`.
        embedding: where the tables lie; None: on this rank. Those that are sharded are empty until ``shard``.

    Raises UserError for ``form=fused`` with an encoder that knows no targets.
    """

    def __init__(
        self, config: ModelConfig, ranking: RankingConfig, data: RankingData,
        priors: dict[str, list[float]] | None = None, embedding: EmbeddingConfig | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.ranking, self.num_prefix = config, ranking, data.num_prefix
        self.fused = ranking.form == "fused"
        if self.fused and config.name != "hstu":
            raise UserError(
                f"ranking.form=fused with model.name={config.name}: only hstu knows targets; use interleaved"
            )
        dim = config.dim
        embedding = embedding or EmbeddingConfig()
        sharded, dtype = embedding.kind == "sharded", embedding.dtype
        self.table = make_table(dataclasses.replace(config, l2_normalize=False), data.store.num_items, embedding)
        features = (*data.token_feature_sizes, *data.user_feature_sizes)
        whole = {name for name in features if embedding.sharding_of(name) == "data_parallel"}
        self.item_tables = FeatureTables(data.token_feature_sizes, dim, None, sharded, dtype, whole)
        self.user_tables = FeatureTables(data.user_feature_sizes, dim, None, sharded, dtype, whole)
        self.item_numbers = NumberTokens(len(data.token_number_names), dim)
        self.user_numbers = NumberTokens(len(data.user_number_names), dim)
        self.actions = nn.Parameter(torch.randn(data.num_action_bits, dim) * INIT_STD)
        self.action_token = nn.Parameter(torch.randn(dim) * INIT_STD)
        """interleaved: part of every action token; fused: the empty action."""
        events = config.max_len + ranking.targets if self.fused else 2 * config.max_len
        self.encoder = make_encoder(dataclasses.replace(config, max_len=self.num_prefix + events))
        self.state_norm = nn.LayerNorm(dim)
        self.heads = RankingHeads(dim, ranking.tasks, ranking.head, priors, ranking.calibrate)

    # Tokens

    def item_tokens(self, item_ids: Tensor, features: Features) -> Tensor:
        """[n, D]: item embeddings plus those of their features."""
        x = self.table.lookup(item_ids)
        for embedded in self.item_tables(features):
            x = x + embedded
        return x + self.item_numbers(features.numbers).sum(1) if features.numbers.shape[1] else x

    def looked_up(self, batch: RankingBatch) -> list[tuple[FeatureTables, Features]]:
        """The feature tables, with what of a batch is looked up in them."""
        return [(self.item_tables, batch.item_features), (self.user_tables, batch.user_features)]

    def action_tokens(self, action_bits: Tensor) -> Tensor:
        """[n, D] of bits [n, bits]."""
        return action_bits.to(self.actions.dtype) @ self.actions + (0 if self.fused else self.action_token)

    def prefix_tokens(self, features: Features) -> Tensor:
        """[S * P, D]: the tokens of each sequence's user features, categorical ones first."""
        parts = [*self.user_tables(features), *self.user_numbers(features.numbers).unbind(1)]
        return torch.stack(parts, dim=1).flatten(0, 1)

    def layout(self, batch: RankingBatch) -> Layout:
        """Where the tokens of each sequence lie and when they happen; the prefix happens with the first event."""
        prefix_offsets = self._prefix_offsets(batch)
        times, offsets = batch.timestamps, batch.offsets
        if not self.fused:
            times, offsets = interleave(times, times, offsets)
        if self.num_prefix:
            first = batch.timestamps[batch.offsets[:-1].clamp(max=max(0, len(batch.timestamps) - 1))]
            times, offsets = concat_jagged(
                first.repeat_interleave(self.num_prefix), prefix_offsets, times, offsets
            )  # fmt: skip
        longest = self.num_prefix + batch.max_len * (1 if self.fused else 2)
        num_targets = batch.num_targets if self.fused else None
        return Layout(offsets, longest, times, times, num_targets, self.num_prefix if self.fused else 0)

    def _prefix_offsets(self, batch: RankingBatch) -> Tensor:
        return torch.arange(len(batch.offsets), device=batch.offsets.device) * self.num_prefix

    def plan(self, batch: RankingBatch) -> RankingPlan:
        """Layout of the batch's tokens. Needs no parameters, so a loader thread can make it ahead of time."""
        lengths = batch.offsets.diff()
        sequence = torch.repeat_interleave(
            torch.arange(len(lengths), device=lengths.device), lengths, output_size=batch.item_ids.shape[0]
        )[batch.targets]
        predicted = batch.targets * (1 if self.fused else 2) + (sequence + 1) * self.num_prefix
        return RankingPlan(self.encoder.plan_tokens(self.layout(batch)), self._prefix_offsets(batch), predicted)

    def tokens(self, batch: RankingBatch, plan: RankingPlan) -> tuple[Tensor, Tensor]:
        """All tokens [tokens, D] and, apart, the item tokens [L, D]."""
        items = self.item_tokens(batch.item_ids, batch.item_features)
        actions = self.action_tokens(batch.action_bits)
        if self.fused:
            is_target = torch.zeros(items.shape[0], 1, dtype=torch.bool, device=items.device)
            is_target.index_fill_(0, batch.targets, True)
            x, offsets = items + torch.where(is_target, self.action_token, actions), batch.offsets
        else:
            x, offsets = interleave(items, actions, batch.offsets)
        if self.num_prefix:
            x, _ = concat_jagged(self.prefix_tokens(batch.user_features), plan.prefix_offsets, x, offsets)
        return x, items

    # Predictions

    def outputs(
        self, batch: RankingBatch, plan: RankingPlan | None = None, seed: int | None = None
    ) -> dict[str, Tensor]:
        """Head outputs [T, C] of each task at the predicted events; seed: of all dropout, None in evaluation, drawn by
        ``batch.random_rows`` and ``batch.random_targets``."""
        plan = plan or self.plan(batch)
        x, items = self.tokens(batch, plan)
        encoder_seed = None if seed is None else derive(seed, DROPOUT_SEED)
        states = self.encoder(x, plan.attention, encoder_seed, rows=batch.random_rows)
        head_seed = None if seed is None else derive(seed, HEAD_SEED)
        return self.head_outputs(states[plan.predicted], items[batch.targets], head_seed, batch.random_targets)

    def head_outputs(
        self, states: Tensor, items: Tensor, seed: int | None = None, rows: Tensor | None = None
    ) -> dict[str, Tensor]:
        """states: [T, D] encoder outputs at the asked tokens; items: [T, D] their item tokens; seed, rows: of the
        heads' dropout."""
        scaled = items * math.sqrt(items.shape[1])  # of the size that the encoder's input has
        return self.heads(self.state_norm(states) * scaled, seed, rows)  # type: ignore[no-any-return]

    def predict(self, batch: RankingBatch, plan: RankingPlan | None = None) -> dict[str, Tensor]:
        """Predictions of each task at the predicted events, see :meth:`RankingHeads.predict`."""
        return self.heads.predict(self.outputs(batch, plan))

    def loss(
        self, batch: RankingBatch, seed: int, plan: RankingPlan | None = None, world: World | None = None
    ) -> Tensor:
        """Training loss, a scalar; a function of the parameters, the batch and ``seed``. With several ranks this rank's
        part of it, as of :meth:`hstu.model.retrieval.RetrievalModel.loss`."""
        loss, _ = self.heads.loss(self.outputs(batch, plan, seed), batch.labels, world)
        sharded = [tables for tables in (self.item_tables, self.user_tables) if tables.sharded]
        return reached(loss, self, [self.table, *sharded], batch.num_events, world)

    def tables(self) -> list[nn.Module]:
        """Modules whose parameters are embedding tables of ids."""
        return [*self.table.embeddings(), self.item_tables, self.user_tables]

    def num_parameters(self) -> dict[str, int]:
        """Parameters: ``total``, and ``without_embeddings`` (without item and feature tables)."""
        return num_parameters(self, self.tables())


class NumberTokens(nn.Module):
    """Standardised numbers as vectors: ``number * w + b``; a missing one has a vector of its own."""

    def __init__(self, num_features: int, dim: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.randn(num_features, dim) * INIT_STD)
        self.level = nn.Parameter(torch.randn(num_features, dim) * INIT_STD)
        self.missing = nn.Parameter(torch.randn(num_features, dim) * INIT_STD)

    def forward(self, numbers: Tensor) -> Tensor:
        """numbers: [n, features], NaN where missing. Returns [n, features, D]."""
        absent = torch.isnan(numbers)[..., None]
        present = torch.nan_to_num(numbers)[..., None] * self.slope + self.level
        return torch.where(absent, self.missing, present)
