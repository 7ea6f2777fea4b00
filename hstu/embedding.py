"""Item tables: what losses, evaluation and recommendation ask for, wherever the rows lie.

Nobody who asks assumes that a table is one tensor on this rank. The local table needs torch and our own ops only; one
that is spread over ranks is in ``hstu/sharded/tables.py``.

Legend: ``L`` total events, ``B`` users, ``D`` model width, ``R`` negatives per position, ``K`` items of
a shared bank, ``S`` seen items over all users.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hstu.config import LossConfig
from hstu.counted_rank import counted_rank
from hstu.data.predicted import Predicted
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.rank_and_topk import rank, topk
from kernels.sampled_softmax import bank_softmax, sampled_softmax

INIT_STD = 0.02
"""Item embeddings start as a normal of this width, truncated at two widths (PROTOCOL section 3)."""
NORM_EPS = 1e-6
"""Lower bound of the norm in the L2 normalisation (PROTOCOL section 3)."""


def initial_rows(num_rows: int, dim: int, seed: int) -> Tensor:
    """Initial values [num_rows, dim] by ``seed``, for rows that begin anew; drawn on the CPU."""
    values = torch.empty(num_rows, dim)
    generator = torch.Generator().manual_seed(seed)
    return nn.init.trunc_normal_(values, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD, generator=generator)


def num_parameters(model: nn.Module, tables: Sequence[nn.Module]) -> dict[str, int]:
    """Parameters of a model: ``total``, and ``without_embeddings`` (everything but ``tables``).

    Tables in parts on several ranks have a ``num_weights`` of their own, as this rank's parameters are not all.
    """
    held = [sum(p.numel() for p in table.parameters()) for table in tables]
    rest = sum(p.numel() for p in model.parameters()) - sum(held)
    whole = sum(getattr(table, "num_weights", count) for table, count in zip(tables, held, strict=True))
    return {"total": rest + whole, "without_embeddings": rest}


class ItemTable(nn.Module, ABC):
    """Embeddings of items 1..num_items; id 0 is padding, looks up zeros and is never scored."""

    num_items: int
    num_live: int
    """Ids 1..num_live are drawn, summed over and ranked; fewer than num_items where rows are given as items come."""
    dim: int
    l2_normalize: bool
    """Queries and embeddings are L2-normalised before every dot product (not in :meth:`lookup`)."""

    def embeddings(self) -> list[nn.Module]:
        """Modules whose parameters are embedding tables of ids."""
        return [self]

    def for_loss(self, predicted: Predicted) -> tuple[ItemTable, Predicted]:
        """Of what a training step predicts: the table that the loss scores, and the positions that count, with labels
        that are ids of it."""
        return self, predicted

    def expect(  # noqa: B027
        self, labels: Tensor, loss: LossConfig, seed: int, rows: Tensor | None = None, every: Tensor | None = None
    ) -> None:
        """Says what the step that begins will score, so that one exchange between ranks fetches all of its rows.

        The next :meth:`lookup` is then that of the step's events, and ``loss`` follows, with these arguments: those of
        :class:`hstu.model.losses._mean.Loss`. A table that is whole on this rank needs no telling.
        """

    @abstractmethod
    def lookup(self, ids: Tensor) -> Tensor:
        """Embeddings [..., D] of ids [...] int32 or int64, 0..num_items."""

    @abstractmethod
    def sampled_softmax(
        self, queries: Tensor, labels: Tensor, negatives: Tensor | None = None, num_negatives: int = 128,
        seed: int = 0, temperature: float = 0.05, rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Loss [L] of queries [L, D] against labels [L] and R negatives per position, drawn from ``seed`` or given.

        rows: [L] int64, positions whose random numbers the draws use; None: 0..L-1.
        """

    @abstractmethod
    def bank_softmax(
        self, queries: Tensor, labels: Tensor, bank_ids: Tensor, log_q: Tensor | None = None,
        label_log_q: Tensor | None = None, temperature: float = 0.05,
    ) -> Tensor:  # fmt: skip
        """Loss [L] of queries [L, D] against labels [L] and bank_ids [K]; log_q [K], label_log_q [L] are subtracted."""

    @abstractmethod
    def full_softmax(
        self, queries: Tensor, labels: Tensor, temperature: float = 0.05, chunk_mib: float = 64,
        weights: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Loss [L] over all items; with weights [L] their weighted sum, a scalar."""

    @abstractmethod
    def rank(
        self, queries: Tensor, targets: Tensor, seen_ids: Tensor | None = None, seen_offsets: Tensor | None = None,
        chunk_mib: float = 64,
    ) -> Tensor:  # fmt: skip
        """Exact ranks float64 [B] of targets [B] among all items but the jagged seen_ids [S], seen_offsets [B + 1]."""

    def counted_rank(
        self, queries: Tensor, targets: Tensor, counts: Tensor, seen_ids: Tensor, seen_offsets: Tensor, chunk_mib: float
    ) -> Tensor:  # fmt: skip
        """Ranks float64 [B] where each id stands for counts [num_live + 1] float64 items, as of
        :func:`hstu.counted_rank.counted_rank`."""
        raise NotImplementedError(f"{type(self).__name__} has one item an id")

    @abstractmethod
    def topk(
        self, queries: Tensor, k: int, seen_ids: Tensor | None = None, seen_offsets: Tensor | None = None,
        chunk_mib: float = 64,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Scores and ids [B, k] of the best unseen items; score -inf and id 0 where there are fewer than k."""


class LocalItemTable(ItemTable):
    """One dense table on this rank.

    Args:
        num_items: >= 1.
        dim: D, >= 1.
        l2_normalize: see :class:`ItemTable`.
        eps: > 0. Lower bound of the norm.
        generator: of the initial values; None: torch's default generator.
    """

    def __init__(
        self, num_items: int, dim: int, l2_normalize: bool = True, eps: float = NORM_EPS,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("num_items", num_items), ("dim", dim)):
            if value < 1:
                raise ValueError(f"{name}={value!r}: expected >= 1")
        if not eps > 0:
            raise ValueError(f"eps={eps!r}: expected > 0")
        self.num_items, self.dim, self.l2_normalize, self.eps = num_items, dim, l2_normalize, eps
        self.num_live = num_items
        self.weight = nn.Parameter(torch.empty(num_items + 1, dim))
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Truncated normal values; zeros in the padding row."""
        with torch.no_grad():
            nn.init.trunc_normal_(self.weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD, generator=generator)
            self.weight[0].zero_()

    @property
    def live(self) -> Tensor:
        """The rows of ids 0..num_live."""
        return self.weight if self.num_live == self.num_items else self.weight[: self.num_live + 1]

    def extra_repr(self) -> str:
        return f"num_items={self.num_items}, dim={self.dim}, l2_normalize={self.l2_normalize}"

    def lookup(self, ids: Tensor) -> Tensor:
        """Embeddings [..., D]; padding ids give zeros and no gradient. The gradient is deterministic on the CPU."""
        return nn.functional.embedding(ids, self.weight, padding_idx=0)

    def sampled_softmax(
        self, queries: Tensor, labels: Tensor, negatives: Tensor | None = None, num_negatives: int = 128,
        seed: int = 0, temperature: float = 0.05, rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return sampled_softmax(
            queries, self.live, labels, negatives, num_negatives, seed, temperature, self.l2_normalize, self.eps,
            rows=rows,
        )  # fmt: skip

    def bank_softmax(
        self, queries: Tensor, labels: Tensor, bank_ids: Tensor, log_q: Tensor | None = None,
        label_log_q: Tensor | None = None, temperature: float = 0.05,
    ) -> Tensor:  # fmt: skip
        return bank_softmax(
            queries, self.live, labels, bank_ids, log_q, label_log_q, temperature, self.l2_normalize, self.eps
        )

    def full_softmax(
        self, queries: Tensor, labels: Tensor, temperature: float = 0.05, chunk_mib: float = 64,
        weights: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return linear_cross_entropy(
            queries, self.live, labels, temperature, self.l2_normalize, self.eps, chunk_mib, weights
        )

    def rank(
        self, queries: Tensor, targets: Tensor, seen_ids: Tensor | None = None, seen_offsets: Tensor | None = None,
        chunk_mib: float = 64,
    ) -> Tensor:  # fmt: skip
        return rank(queries, self.live, targets, seen_ids, seen_offsets, self.l2_normalize, self.eps, chunk_mib)

    def counted_rank(
        self, queries: Tensor, targets: Tensor, counts: Tensor, seen_ids: Tensor, seen_offsets: Tensor, chunk_mib: float
    ) -> Tensor:  # fmt: skip
        return counted_rank(
            queries, self.live, targets, counts, seen_ids, seen_offsets, self.l2_normalize, self.eps, chunk_mib
        )

    def topk(
        self, queries: Tensor, k: int, seen_ids: Tensor | None = None, seen_offsets: Tensor | None = None,
        chunk_mib: float = 64,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return topk(queries, self.live, k, seen_ids, seen_offsets, self.l2_normalize, self.eps, chunk_mib)
