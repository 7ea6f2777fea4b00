"""Exact softmax losses over an item table of which no rank has more than its part.

Every rank scores the positions of all ranks against the candidates of its own block of ids. With ``s`` the logit of a
position's label and ``S_r`` the sum of the exponentials of the candidates that rank r scores, rank r makes
``x_r = log(e^s + S_r) - s`` by the ops of one rank, and the loss is ``log(e^s + sum_r S_r) - s = log(1 + sum_r (e^x_r -
1))``, with ``d loss / d x_r = e^(x_r - loss)``. The label's logit is made by the rank of whose block the label is, its
owner: there the label is a row like any other, elsewhere a row of zeros with the logit given.

What ranks send each other: the labels; the queries, and their gradients back; three numbers a position, and one back.

Legend: R ranks, L positions of this rank, P of all ranks, D width, K fetched rows of this rank's block, W candidates of
a position on this rank, M items of a bank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hstu.config import LossConfig
from hstu.distributed import World
from hstu.model.losses.shared_bank import draw_bank
from kernels._common import l2_normalize
from kernels.sampled_softmax import bank_softmax, sampled_softmax
from kernels.sampled_softmax.cpu import draw_negatives

ZEROS, OTHERS = 0, 1
"""Rows in front of the fetched ones, all zeros: the ops' padding, and the label of another rank's block."""
FIRST = 2


@dataclass(frozen=True)
class Positions:
    """The positions of all ranks in a step, those of rank 0 first.

    counts: L of each rank.
    """

    world: World
    counts: tuple[int, ...]

    @classmethod
    def of(cls, world: World, num_own: int) -> Positions:
        """Asks every rank for its number."""
        return cls(world, tuple(world.counts(num_own, world.device)))

    @property
    def own(self) -> slice:
        start = sum(self.counts[: self.world.rank])
        return slice(start, start + self.counts[self.world.rank])

    def gather(self, values: Tensor) -> Tensor:
        """[P, ...] of [L, ...], without gradient."""
        if self.world.size == 1:
            return values
        longest = max(self.counts)
        padded = values.new_zeros(longest, *values.shape[1:])
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in self.counts]
        self.world.enter("gather of positions")
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, self.counts, strict=True)])

    def sum_to_owner(self, values: Tensor) -> Tensor:
        """[L, ...]: the sum over ranks of the rows [P, ...] that are this rank's."""
        if self.world.size == 1:
            return values
        longest = max(self.counts)
        parts = []
        for part in values.split(list(self.counts)):
            padded = values.new_zeros(longest, *values.shape[1:])
            padded[: len(part)] = part
            parts.append(padded)
        total = torch.empty_like(parts[0])
        self.world.enter("sum of positions to their owners")
        dist.reduce_scatter(total, parts)
        return total[: self.counts[self.world.rank]]

    def total(self, values: Tensor, op: Any = None) -> Tensor:
        """Sum over ranks (or another operation) of [P], in place."""
        if self.world.size > 1:
            self.world.enter("sum of positions")
            dist.all_reduce(values, op or dist.ReduceOp.SUM)
        return values


class _Gather(torch.autograd.Function):
    """Rows [P, D] of all ranks; every rank's gradient of a row comes back to its owner."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, positions: Positions) -> Tensor:
        ctx.positions = positions
        return positions.gather(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.positions.sum_to_owner(grad.contiguous()), None


class _Combine(torch.autograd.Function):
    """Loss [L] of this rank's positions from every rank's x [P].

    label_logit: [P], of use at the positions whose label this rank owns: it also is the label's logit on the other
    ranks, and takes the gradient that it has there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, label_logit: Tensor, owned: Tensor, positions: Positions) -> Tensor:
        top = positions.total(x.clone(), dist.ReduceOp.MAX)
        # e^x_r - 1 over e^top, without cancellation where x_r is small and without overflow where it is large.
        total = positions.total(torch.exp(x - top) * -torch.expm1(-x))
        small = top < 1
        loss = torch.where(
            small, torch.log1p(top.clamp(max=1).exp() * total), top + torch.log(torch.exp(-top) + total)
        )  # fmt: skip
        ctx.save_for_backward(x - loss, owned)
        ctx.positions = positions
        return loss[positions.own]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        behind, owned = ctx.saved_tensors
        grad = ctx.positions.gather(grad.contiguous())
        # With respect to the label's logit e^-loss - 1 in all, of which e^-loss - e^(x - loss) is in the owner's op.
        return grad * behind.exp(), torch.where(owned, grad * torch.expm1(behind), 0.0), None, None


@dataclass(frozen=True)
class Scored:
    """What this rank scores in a step, before its rows are there.

    Attributes:
        ids: [K] int64, ascending. Items of this rank's block whose rows it needs.
        labels: [P] int64. Place of each position's label among the rows (``OTHERS`` where another rank owns it).
        candidates: sampled softmax: [P, W] int64, places of its negatives, the rest filled up with its label; a bank:
            [M] int64 places of the bank's items in this block.
        bank: [M] int64, places among the whole bank of its items in this block; None: candidates are not a bank.
    """

    positions: Positions
    ids: Tensor
    labels: Tensor
    candidates: Tensor
    bank: Tensor | None = None


@dataclass(frozen=True)
class Block:
    """The ids first .. stop - 1 that a rank scores; row-wise sharding cuts a table in the same places."""

    first: int
    stop: int

    @classmethod
    def of(cls, num_rows: int, rank: int, size: int) -> Block:
        """Of rank ``rank`` of ``size``; the padding row 0 counts as one of the rows. Late blocks can be empty."""
        rows = -(-num_rows // size)
        return cls(min(rank * rows, num_rows), min((rank + 1) * rows, num_rows))

    def __len__(self) -> int:
        return self.stop - self.first

    def holds(self, ids: Tensor) -> Tensor:
        """Which ids are in it, bool."""
        return (ids >= self.first) & (ids < self.stop)

    def items(self, device: torch.device) -> Tensor:
        """Its ids without the padding row, int64, ascending."""
        return torch.arange(max(1, self.first), max(1, self.stop), device=device)


DRAWS_PER_ROW = 16
"""With so many ids of a block for each of its rows, all rows are fetched: of uniform draws less than 1 in 10^6 is in
vain, and no id has to be looked for."""
MAX_DRAWS = 2**26
"""Every rank draws the negatives of all positions, so many at a time, and keeps those of its own block."""
DENSE_BLOCK = 8
"""A block of up to so many times the ids of a step is marked in a map of its size, a larger one is sorted."""


def pieces_of(length: int, step: int) -> list[slice]:
    """Consecutive slices of at most ``step`` that cover ``length``; an empty one for 0."""
    return [slice(start, min(start + step, length)) for start in range(0, max(1, length), step)]


def find_places(block: Block, parts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Ids [K] int64, ascending, that hold those of ``parts``, ids of ``block``; and their places, from ``FIRST`` on.

    The ids of ``parts`` alone, or, where they are many, the whole block. parts: one-dimensional; places are int64.
    """
    num_ids = sum(part.numel() for part in parts)
    if num_ids >= DRAWS_PER_ROW * len(block):
        ids = block.items(parts[0].device)
        return ids, [part.long() + (FIRST - max(1, block.first)) for part in parts]
    joined = torch.cat([part.long() for part in parts]) - block.first
    if len(block) <= DENSE_BLOCK * num_ids:
        marked = torch.zeros(len(block), dtype=torch.bool, device=joined.device).index_fill_(0, joined, True)
        ids = marked.nonzero()[:, 0]
        places = (marked.cumsum(0) + (FIRST - 1)).index_select(0, joined)
    else:
        ids, places = joined.unique(return_inverse=True)
        places = places + FIRST
    return ids + block.first, list(places.split([part.numel() for part in parts]))


def scored_negatives(positions: Positions, labels: Tensor, negatives: Iterable[Tensor], block: Block) -> Scored:
    """Of a sampled softmax. labels: [P]. negatives: [P, R] in pieces of consecutive positions, the whole in one on a
    single rank; those of other blocks, and the label, are left out."""
    if positions.world.size == 1:  # the op leaves the label out
        (whole,) = negatives
        ids, (own, places) = find_places(block, [labels, whole.reshape(-1)])
        own = own.clone()  # is kept for the backward, and would keep the storage of all places with it
        return Scored(positions, ids, own, places.view(whole.shape))
    start, drawn, row_parts = 0, [], []
    for piece in negatives:
        own_labels = labels[start : start + len(piece), None].to(piece.dtype)
        flat = block.holds(piece).logical_and_(piece != own_labels).view(-1).nonzero()[:, 0]
        drawn.append(piece.reshape(-1).index_select(0, flat))
        row_parts.append(flat.div(piece.shape[1], rounding_mode="floor") + start)
        start += len(piece)
    rows = torch.cat(row_parts)  # [n], ascending
    ids, own, places = _places_and_labels(block, labels, torch.cat(drawn))
    bounds = torch.searchsorted(rows, torch.arange(len(labels) + 1, device=rows.device))  # [P + 1]
    width = max(1, int(bounds.diff().max())) if len(labels) else 1
    candidates = own[:, None].repeat(1, width)  # a label does not count as its own negative
    # Row by row: the n-th of all is the (n - starts[row])-th of its row.
    shift = torch.arange(len(labels), device=rows.device) * width - bounds[:-1]
    target = torch.arange(len(rows), device=rows.device) + shift.index_select(0, rows)
    candidates.view(-1).index_copy_(0, target, places)
    return Scored(positions, ids, own, candidates)


def _places_and_labels(block: Block, labels: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids as of :func:`find_places` for the labels [P] of this block and ``others``, ids of it; the place of every
    label, ``OTHERS`` where another rank owns it; the places of ``others``."""
    owned = block.holds(labels).nonzero()[:, 0]
    ids, (label_places, places) = find_places(block, [labels.index_select(0, owned), others])
    own = torch.full_like(labels, OTHERS, dtype=torch.int64).index_copy_(0, owned, label_places)
    return ids, own, places


def scored_bank(positions: Positions, labels: Tensor, bank_ids: Tensor | None, block: Block) -> Scored:
    """Of a bank that all positions share, or of all items. labels: [P]."""
    if bank_ids is None:
        items = block.items(labels.device)
        bank = items - 1
    else:
        bank = block.holds(bank_ids).nonzero()[:, 0]
        items = bank_ids.index_select(0, bank)
    ids, own, places = _places_and_labels(block, labels, items)
    return Scored(positions, ids, own, places, bank)


def scored_by(
    loss: LossConfig, world: World, labels: Tensor, rows: Tensor | None, num_items: int, seed: int,
    every: Tensor | None = None,
) -> Scored:  # fmt: skip
    """What this rank scores for ``loss`` in a step. labels: [L], rows: [L] int64 or None, every: labels of
    all positions or None, as the loss gets them."""
    block = Block.of(num_items + 1, world.rank, world.size)
    positions = Positions.of(world, len(labels))
    if loss.name == "sampled_softmax":
        assert rows is not None or world.size == 1, "rows: expected where several ranks draw"
        known = labels[:, None] if rows is None else torch.stack([labels.long(), rows], dim=1)
        known = positions.gather(known.long())
        all_rows = None if rows is None else known[:, 1]
        all_labels = known[:, 0]
        step = len(known) if world.size == 1 else MAX_DRAWS // loss.num_negatives
        pieces = (
            draw_negatives(
                len(known[part]), loss.num_negatives, num_items, seed, labels.device,
                None if all_rows is None else all_rows[part],
            )
            for part in pieces_of(len(known), max(1, step))
        )  # fmt: skip
        return scored_negatives(positions, all_labels, pieces, block)
    all_labels = positions.gather(labels.long())
    if loss.name == "full_softmax":
        return scored_bank(positions, all_labels, None, block)
    if loss.name == "shared_bank":
        bank_ids = draw_bank(num_items, loss.num_negatives, seed, labels.device)
    else:
        assert loss.name == "in_batch", loss.name
        bank_ids = (all_labels if every is None else world.gather(every.long())).unique()
    return scored_bank(positions, all_labels, bank_ids, block)


def exact_loss(
    queries: Tensor, rows: Tensor, scored: Scored, temperature: float, normalize: bool, eps: float,
    log_q: Tensor | None = None, label_log_q: Tensor | None = None, chunk_mib: float = 64,
) -> Tensor:  # fmt: skip
    """Loss [L] of this rank's queries [L, D] over the candidates of all ranks.

    rows: [K, D], the embeddings of ``scored.ids``. log_q: of the whole bank; label_log_q: [L]. Both are subtracted from
    logits and have no gradient.
    """
    positions = scored.positions
    dtype = torch.promote_types(torch.promote_types(queries.dtype, rows.dtype), torch.float32)
    queries, rows = queries.to(dtype), rows.to(dtype)
    if normalize:
        queries, rows = l2_normalize(queries, eps), l2_normalize(rows, eps)
    everyone = _Gather.apply(queries, positions) if positions.world.size > 1 else queries  # [P, D]
    table = torch.cat([rows.new_zeros(FIRST, rows.shape[1]), rows])
    owned = scored.labels >= FIRST
    label_logit = (everyone * table[scored.labels]).sum(dim=1) / temperature  # [P], 0 where another rank owns it
    known = positions.total(label_logit.detach().clone())
    given = torch.where(owned, 0.0, -known)
    if label_log_q is not None:
        given = given + positions.gather(label_log_q.to(dtype))
    ops = {"temperature": temperature, "l2_normalize": False, "eps": eps, "label_log_q": given}
    if scored.bank is None:
        x = sampled_softmax(everyone, table, scored.labels, scored.candidates, **ops)  # type: ignore[arg-type]
    elif len(scored.candidates):
        bias = None if log_q is None else log_q[scored.bank].to(dtype)
        x = bank_softmax(everyone, table, scored.labels, scored.candidates, bias, chunk_mib=chunk_mib, **ops)  # type: ignore[arg-type]
    else:
        x = (everyone * 0).sum(dim=1)
    return x if positions.world.size == 1 else _Combine.apply(x, label_logit, owned, positions)  # type: ignore[no-any-return]
