"""The retrieval model: item table, encoder, loss.

Legend: B users, L total events, D model width.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from hstu.config import LossConfig, ModelConfig
from hstu.config_embedding import EmbeddingConfig
from hstu.data.batches import Batch
from hstu.distributed import World
from hstu.embedding import NORM_EPS, ItemTable, LocalItemTable, num_parameters
from hstu.item_rows import MappedTable, make_item_rows
from hstu.model.encoder import make_encoder
from hstu.model.losses import make_loss
from hstu.model.mixture import MixtureTable
from hstu.model.shares import reached, several
from hstu.seeding import derive
from kernels.attention import AttentionPlan

DROPOUT_SEED, NEGATIVES_SEED = 1, 2
"""Purpose numbers of a step's seeds."""


class RetrievalModel(nn.Module):
    """Predicts the next item at every event: encoder output against item embeddings, by ``config.similarity``.

    Args:
        config: the encoder's config.
        num_items: vocabulary size; ids are 1..num_items.
        loss: the loss's config; None where only inference is wanted.
        embedding: where the item table lies; None: on this rank. One that is sharded is empty until
            :func:`hstu.sharded.tables.shard`.
    """

    def __init__(
        self, config: ModelConfig, num_items: int, loss: LossConfig | None = None,
        embedding: EmbeddingConfig | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        self.table = make_table(config, num_items, embedding)
        self.encoder = make_encoder(config)
        self.loss_config = loss
        self.loss_fn = make_loss(loss) if loss is not None else None

    def encode(self, batch: Batch, plan: AttentionPlan | None = None, seed: int | None = None) -> Tensor:
        """Queries, as of :meth:`queries`, at every event; seed: of the dropout, drawn by ``batch.random_rows``."""
        plan = plan or self.encoder.plan(batch)
        x = self.encoder(self.table.lookup(batch.item_ids), plan, seed, rows=batch.random_rows)
        return self.queries(x, batch.users, batch.offsets)

    def queries(self, x: Tensor, users: Tensor, offsets: Tensor | None = None) -> Tensor:
        """What the item table scores with, from encoder outputs x [L, D]: [L, D], L2-normalised where the config says
        so; of a mixture of logits as :meth:`hstu.model.mixture.MixtureOfLogits.queries` makes them.

        users: int64, rows of the store (-1: not in it), [B] with offsets [B+1], else [L].
        """
        if isinstance(self.table, MixtureTable):
            if offsets is not None:
                users = users.repeat_interleave(offsets.diff(), output_size=x.shape[0])
            return self.table.mixture.queries(x, users)
        return nn.functional.normalize(x, dim=-1, eps=NORM_EPS) if self.config.l2_normalize else x

    def last(self, batch: Batch) -> Tensor:
        """Queries [B, ...] at each user's last event, without dropout. No user may be empty."""
        return self.encode(batch).index_select(0, batch.offsets[1:] - 1)

    def loss(self, batch: Batch, seed: int, plan: AttentionPlan | None = None, world: World | None = None) -> Tensor:
        """Training loss, a scalar; a function of the parameters, the batch and ``seed``.

        With several ranks ``batch`` is this rank's share, which may be empty, and ``seed`` is the same on all, which
        call this alike. The loss is this rank's part: the parts, and their gradients, sum to those of one rank.

        Positions that do not count are encoded, as others see them, but not scored. Where none does, the loss is 0.

        Raises ValueError for an empty batch on one rank.
        """
        assert self.loss_fn is not None and self.loss_config is not None
        if batch.num_events == 0 and not several(world):
            raise ValueError("batch has no event: expected at least one")
        own_seed = derive(seed, NEGATIVES_SEED)
        table, predicted = self.table.for_loss(batch.predicted())
        labels, every, rows = predicted.labels, predicted.every, predicted.random_rows
        table.expect(labels, self.loss_config, own_seed, rows, every)
        queries = predicted.of(self.encode(batch, plan, derive(seed, DROPOUT_SEED)))
        loss = self.loss_fn(queries, labels, predicted.weights, table, own_seed, rows, world, every)
        return reached(loss, self, self.tables(), batch.num_events, world)

    def tables(self) -> list[nn.Module]:
        """Modules whose parameters are embedding tables of ids."""
        return self.table.embeddings()

    def num_parameters(self) -> dict[str, int]:
        """Parameters: ``total``, and ``without_embeddings`` (everything but the tables of ids)."""
        return num_parameters(self, self.tables())


def make_table(config: ModelConfig, num_items: int, embedding: EmbeddingConfig | None = None) -> ItemTable:
    """The item table that ``config.similarity`` and ``embedding`` pick, over rows for items as they come or not."""
    embedding = embedding or EmbeddingConfig()
    item_rows = make_item_rows(num_items, embedding)
    if item_rows is not None:
        rows = make_table(config, item_rows.num_rows, replace(embedding, ids="exact", rows=None))
        return MappedTable(item_rows, rows)
    if embedding.sharding_of("item") != "data_parallel":
        from hstu.sharded.tables import ShardedItemTable

        return ShardedItemTable(num_items, config.dim, l2_normalize=config.l2_normalize, dtype=embedding.dtype)
    if config.similarity == "mixture_of_logits":
        return MixtureTable(num_items, config.dim, config.mixture)
    return LocalItemTable(num_items, config.dim, l2_normalize=config.l2_normalize)
