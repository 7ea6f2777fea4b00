"""Exact ranks and the best k items where every rank scores its own block of ids.

All ranks take part with the same number of calls, each with its own users, any number of them. Blocks are scored in
pieces of one size on all ranks, so that equal embeddings get equal scores wherever they lie.

Legend: U users of this rank, A of all ranks, D width, C items of a piece, S seen items over all users.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hstu.counted_rank import before
from hstu.distributed import World
from hstu.sharded.losses import Block, Positions
from kernels._common import l2_normalize, no_autocast, rows_within

PIECE = 64
"""Items of a piece are a multiple of this: no product runs into the odd columns at its end."""

Fetch = Callable[[Tensor], Tensor]
"""Embeddings [n, D] of ids [n] int64; every rank comes with as many."""


@dataclass(frozen=True)
class Scoring:
    """How queries meet items. normalize, eps: as of the table. chunk_mib: bound of the scores that exist at a time."""

    world: World
    num_items: int
    normalize: bool
    eps: float
    chunk_mib: float
    fetch: Fetch


@dataclass(frozen=True)
class _Pairs:
    """Users [n] and items [n] int64 of theirs, items ascending. bounds: of each piece among them, on the host."""

    users: Tensor
    items: Tensor
    bounds: list[int]

    def of(self, piece: int, first: int) -> tuple[Tensor, Tensor]:
        """Users and columns of those in the piece of that number, which begins at item ``first``."""
        part = slice(self.bounds[piece], self.bounds[piece + 1])
        return self.users[part], self.items[part] - first


class _Pieces:
    """Scores of all ranks' users against this rank's block, piece by piece.

    Where the targets [U] and the seen items lie among the pieces is read from the device once, so that a piece is made
    without waiting for it.
    """

    def __init__(
        self, how: Scoring, queries: Tensor, targets: Tensor | None, seen_ids: Tensor | None,
        seen_offsets: Tensor | None,
    ) -> None:  # fmt: skip
        world, self.how = how.world, how
        self.users = Positions.of(world, len(queries))
        queries = queries.detach().to(torch.promote_types(queries.dtype, torch.float32))
        self.queries = self.users.gather(l2_normalize(queries, how.eps) if how.normalize else queries)  # [A, D]
        self.block = Block.of(how.num_items + 1, world.rank, world.size)
        longest = -(-(how.num_items + 1) // world.size)
        fitting = rows_within(how.chunk_mib / 2, max(1, len(self.queries)), self.queries.dtype)
        self.size = PIECE * max(1, min(fitting // PIECE, -(-longest // PIECE)))
        self.num_pieces = -(-longest // self.size)
        self.finite = torch.ones((), dtype=torch.bool, device=queries.device)
        self.targets, self.hidden = self._by_piece([self._targets(targets), self._seen(seen_ids, seen_offsets)])

    def _targets(self, targets: Tensor | None) -> tuple[Tensor, Tensor]:
        """Users and their targets, of all ranks."""
        if targets is None:
            return self._nothing()
        everyone = self.users.gather(targets.long())
        return torch.arange(len(everyone), device=everyone.device), everyone

    def _seen(self, seen_ids: Tensor | None, seen_offsets: Tensor | None) -> tuple[Tensor, Tensor]:
        """Users and items that they have seen, of all ranks."""
        if seen_ids is None or seen_offsets is None:
            return self._nothing()
        start = self.users.own.start
        own = torch.arange(start, start + len(seen_offsets) - 1, device=seen_ids.device)
        owners = own.repeat_interleave(seen_offsets.diff(), output_size=len(seen_ids))
        pairs = torch.stack([owners, seen_ids.long()], dim=1)
        users, ids = Positions.of(self.how.world, len(pairs)).gather(pairs).unbind(1)
        return users, ids

    def _nothing(self) -> tuple[Tensor, Tensor]:
        none = torch.zeros(0, dtype=torch.int64, device=self.queries.device)
        return none, none

    def _by_piece(self, pairs: list[tuple[Tensor, Tensor]]) -> list[_Pairs]:
        ends = torch.arange(self.num_pieces + 1, device=self.queries.device) * self.size + self.block.first
        ends = ends.clamp(max=self.block.stop)
        found, bounds = [], []
        for users, items in pairs:
            items, order = items.sort(stable=True)
            found.append((users[order], items))
            bounds.append(torch.searchsorted(items, ends))
        known = torch.stack(bounds).tolist()
        return [_Pairs(users, items, own) for (users, items), own in zip(found, known, strict=True)]

    def __iter__(self) -> Iterator[tuple[int, int, int, Tensor]]:
        """Number, first id, number of ids that count, scores [A, C]; the padding, and what is beyond the block, score
        -inf."""
        block, device = self.block, self.queries.device
        for number in range(self.num_pieces):
            first = block.first + number * self.size
            ids = torch.arange(first, first + self.size, device=device)
            inside = ids < block.stop
            rows = self.how.fetch(torch.where(inside, ids, 0)).to(self.queries.dtype)
            rows = l2_normalize(rows, self.how.eps) if self.how.normalize else rows
            scores = self.queries @ rows.mT  # [A, C]
            self.finite &= torch.isfinite(scores).all()
            scores.masked_fill_(~(inside & (ids > 0)), -torch.inf)
            yield number, first, min(self.size, max(0, block.stop - first)), scores

    def hide(self, number: int, first: int, scores: Tensor) -> None:
        """Takes the seen items out of a piece."""
        scores.index_put_(self.hidden.of(number, first), scores.new_full((1,), -torch.inf))

    def check(self) -> None:
        """Raises ValueError on every rank where a score of any of them was not finite."""
        if int(self.how.world.sum((~self.finite).long())):
            raise ValueError("scores are not finite: queries or table hold NaN, infinite or huge values")


@torch.no_grad()
def sharded_rank(
    how: Scoring, queries: Tensor, targets: Tensor, seen_ids: Tensor | None, seen_offsets: Tensor | None,
    items: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Exact ranks float64 [U] of targets [U], see ``kernels.rank_and_topk.rank``; with items [num_items + 1] float64 on
    each id, see :func:`hstu.counted_rank.counted_rank`."""
    with no_autocast(queries.device):
        pieces = _Pieces(how, queries, targets, seen_ids, seen_offsets)
        kept = list(pieces) if pieces.num_pieces == 1 else None
        target_scores = torch.zeros_like(pieces.queries[:, 0])
        for number, first, _, scores in kept or pieces:
            users, columns = pieces.targets.of(number, first)
            target_scores[users] = scores[users, columns]
        pieces.users.total(target_scores)
        counts = torch.zeros(len(target_scores), dtype=torch.float64, device=queries.device)  # better + equal / 2
        for number, first, size, scores in kept or pieces:
            if items is not None:
                seen = pieces.hidden.of(number, first)
                counts += _items_before(seen, items[first : first + size], scores, target_scores)
                continue
            pieces.hide(number, first, scores)
            own = pieces.targets.of(number, first)  # a candidate that does not count against itself
            scores.index_put_(own, scores.new_full((1,), -torch.inf))
            counts += _count(torch.gt(scores, target_scores[:, None], out=torch.empty_like(scores)))
            counts += 0.5 * _count(torch.eq(scores, target_scores[:, None], out=scores))
        pieces.check()
        ranks = pieces.users.total(counts)[pieces.users.own]
        return ranks + (1.0 if items is None else 0.5)  # counted, the target is among the items of its id


def _items_before(seen: tuple[Tensor, Tensor], items: Tensor, scores: Tensor, target: Tensor) -> Tensor:
    """[A]: items of a piece's ids that come before the target. seen: users and columns. items: [c] of the first ids of
    the piece, those that count."""
    counts = items.new_zeros(scores.shape[1])
    counts[: len(items)] = items
    return before(scores, target, counts, *seen)


def _count(ones: Tensor) -> Tensor:
    """Sums of 0.0 and 1.0 are exact up to 2^24 columns, and faster than of booleans."""
    assert ones.shape[1] <= 2**24, ones.shape
    return ones.sum(dim=1).double()


@torch.no_grad()
def sharded_topk(
    how: Scoring, queries: Tensor, k: int, seen_ids: Tensor | None, seen_offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores and ids [U, k], see ``kernels.rank_and_topk.topk``; k is the same on all ranks."""
    with no_autocast(queries.device):
        pieces = _Pieces(how, queries, None, seen_ids, seen_offsets)
        best = pieces.queries.new_full((len(pieces.queries), k), -torch.inf)
        ids = torch.zeros(best.shape, dtype=torch.int64, device=best.device)
        for number, first, _, scores in pieces:
            pieces.hide(number, first, scores)
            found, columns = scores.topk(min(k, scores.shape[1]), dim=1)
            best, ids = _merge([best, found], [ids, columns + first], k)
        pieces.check()
        if how.world.size > 1:
            size = len(best)
            parts = how.world.gather(best).split(size), how.world.gather(ids).split(size)
            best, ids = _merge(list(parts[0]), list(parts[1]), k)
        best, ids = best[pieces.users.own], ids[pieces.users.own]
        return best, ids.masked_fill(best == -torch.inf, 0)


def _merge(scores: list[Tensor], ids: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    best, places = torch.cat(scores, dim=1).topk(k, dim=1)
    return best, torch.cat(ids, dim=1).gather(1, places)
