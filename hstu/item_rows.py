"""Items on fewer rows than there are: a map from item ids to rows of a table, and the item table that looks through it.

    hash     row = 1 + hash of the id modulo the number of rows; items may share a row, and then share everything
    managed  torchrec's managed collision: each row is one item's, a policy says whose; row 1 is for all other items

Nothing but the table knows of rows: inputs, labels, candidates and recommendations are items. Items that share a row
have the same score, and rank as equals.

Legend: V items, R rows, n ids, L positions, B users, S seen items over all users.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hstu.config import LossConfig
from hstu.config_embedding import EmbeddingConfig
from hstu.data.predicted import Predicted
from hstu.distributed import World
from hstu.embedding import ItemTable
from hstu.errors import UserError
from hstu.feature_tables import has_torchrec

UNKNOWN = 1
"""managed: the row of all items without one of their own."""
_CHUNK_IDS = 1 << 22
_NO_ID = torch.iinfo(torch.int64).max
"""What torchrec keeps in a slot without an item."""


class ItemRows(nn.Module, ABC):
    """A map from items 1..num_items to rows 1..num_live; id 0 (padding) has row 0.

    Attributes:
        num_items: V. num_rows: R.
    """

    def __init__(self, num_items: int, num_rows: int) -> None:
        super().__init__()
        self.num_items, self.num_rows = num_items, num_rows

    @property
    @abstractmethod
    def num_live(self) -> int:
        """Rows 1..num_live are drawn as negatives, summed over and ranked."""

    @abstractmethod
    def rows(self, ids: Tensor) -> Tensor:
        """Rows int64 of ids of any shape, 0..V."""

    @abstractmethod
    def counts(self) -> Tensor:
        """[num_live + 1] float64: items on each row; 0 on row 0."""

    @abstractmethod
    def topk(
        self, table: ItemTable, queries: Tensor, k: int, seen_ids: Tensor, seen_offsets: Tensor, chunk_mib: float
    ) -> tuple[Tensor, Tensor]:
        """Scores and items [B, k], see :meth:`hstu.embedding.ItemTable.topk`. table: of the rows."""

    def for_loss(self, predicted: Predicted) -> Predicted:
        """What of a training step's positions counts, with the rows of their labels."""
        every = self.rows(predicted.every)
        return replace(predicted, labels=predicted.of(every), every=every)


class HashedRows(ItemRows):
    """Rows by a hash of the id. All R rows are live: negatives are drawn over them, whether an item has them or not."""

    def __init__(self, num_items: int, num_rows: int) -> None:
        super().__init__(num_items, num_rows)
        self._counts: Tensor | None = None
        self._items: tuple[Tensor, Tensor] | None = None

    @property
    def num_live(self) -> int:
        return self.num_rows

    def rows(self, ids: Tensor) -> Tensor:
        return torch.where(ids == 0, 0, 1 + hash_rows(ids.long(), self.num_rows))

    def counts(self) -> Tensor:
        if self._counts is None:
            found = torch.zeros(self.num_rows + 1, dtype=torch.int64)
            for ids in _chunks(1, self.num_items + 1):
                found += torch.bincount(self.rows(ids), minlength=self.num_rows + 1)
            self._counts = found.double()
        return self._counts

    def sharing(self) -> tuple[int, float]:
        """Items that share their row with another, and the share of all items that a random hash would leave so."""
        counts = self.counts()
        return self.num_items - int((counts == 1).sum()), 1 - (1 - 1 / self.num_rows) ** (self.num_items - 1)

    def items(self) -> tuple[Tensor, Tensor]:
        """Items [V] int64, row by row, ascending within a row, and offsets [R + 2] of the rows."""
        if self._items is None:
            rows = torch.cat([self.rows(ids) for ids in _chunks(1, self.num_items + 1)])
            ends = self.counts().long().cumsum(0)
            self._items = rows.argsort(stable=True) + 1, torch.cat([ends.new_zeros(1), ends])
        return self._items

    def topk(
        self, table: ItemTable, queries: Tensor, k: int, seen_ids: Tensor, seen_offsets: Tensor, chunk_mib: float
    ) -> tuple[Tensor, Tensor]:
        """Goes through ever more of the best rows, until every user has k unseen items or all rows are through."""
        world: World = getattr(table, "world", World())
        wanted = k
        while True:
            wanted = min(self.num_rows, wanted)
            best, rows = table.topk(queries, wanted, chunk_mib=chunk_mib)
            scores, ids = self._unseen(best, rows, k, seen_ids, seen_offsets, chunk_mib)
            short = (ids == 0).any().long() if ids.numel() else torch.zeros((), dtype=torch.int64, device=ids.device)
            if wanted == self.num_rows or int(world.sum(short)) == 0:
                return scores, ids
            wanted *= 4

    def _unseen(
        self, best: Tensor, rows: Tensor, k: int, seen_ids: Tensor, seen_offsets: Tensor, chunk_mib: float
    ) -> tuple[Tensor, Tensor]:
        """The first k unseen items [B, k] of the rows [B, w], which come best first."""
        items, offsets = (t.to(rows.device) for t in self.items())
        sizes = (offsets[rows + 1] - offsets[rows]) * (rows > 0)  # [B, w]
        users, num_ids = torch.arange(len(rows), device=rows.device), self.num_items + 1
        seen = users.repeat_interleave(seen_offsets.diff()) * num_ids + seen_ids
        found = torch.zeros(len(rows), k, dtype=torch.int64, device=rows.device)
        scores = best.new_full(found.shape, -torch.inf)
        for part in _groups(sizes.sum(dim=1), int(chunk_mib * 2**20 / 64)):
            size = sizes[part].reshape(-1)
            place = torch.arange(int(size.sum()), device=rows.device)
            start = (offsets[rows[part]].reshape(-1) - size.cumsum(0) + size).repeat_interleave(size)
            found_items = items[start + place]
            owner = users[part].repeat_interleave(sizes[part].sum(dim=1))
            keep = ~torch.isin(owner * num_ids + found_items, seen)
            owner, found_items = owner[keep], found_items[keep]
            score = best[part].reshape(-1).repeat_interleave(size)[keep]
            per_user = torch.bincount(owner, minlength=len(rows))
            column = torch.arange(len(owner), device=rows.device) - (per_user.cumsum(0) - per_user)[owner]
            first = column < k
            found[owner[first], column[first]] = found_items[first]
            scores[owner[first], column[first]] = score[first]
        return scores, found


def hash_rows(ids: Tensor, num_rows: int) -> Tensor:
    """[...] int64 in 0..num_rows-1 of ids int64: the upper 63 bits of splitmix64 (:func:`hstu.data.order.mix64`) modulo
    num_rows."""
    z = ids + _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return _shifted(z ^ _shifted(z, 31), 1) % num_rows


def _shifted(z: Tensor, bits: int) -> Tensor:
    """A logical shift to the right of 64 bits, which torch has not."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64)


def _chunks(first: int, stop: int) -> Iterator[Tensor]:
    for start in range(first, stop, _CHUNK_IDS):
        yield torch.arange(start, min(start + _CHUNK_IDS, stop))


def _groups(sizes: Tensor, limit: int) -> Iterator[slice]:
    """Slices of consecutive users whose sizes [B] sum to ``limit`` at most (or of a single user)."""
    ends, start = sizes.cumsum(0).cpu(), 0
    while start < len(sizes):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(torch.searchsorted(ends, before + limit, right=True)))
        yield slice(start, stop)
        start = stop


class ManagedRows(ItemRows):
    """Rows given out, and taken back, by torchrec's ``MCHManagedCollisionModule``, the same on all ranks.

    Every rank has the whole map and updates it with the ids of all ranks, so that it does not depend on their number.
    (torchrec's sharded module gives each rank the ids of a range and as many slots as every other; which ids have a row
    then depends on the number of ranks.) An update is torchrec's own with an eviction interval of 1: torchrec drops its
    history when it is saved, and cuts one longer than that of the first step, so the ids between updates wait here.

    torchrec fills slots from the last but one downwards; row = R - slot makes rows in use contiguous and puts the slot
    for unknown ids first.

    Attributes:
        step: training steps so far. evicted: items that have lost their row so far. waiting: [n] ids since the update.
        since: [4], since it was last told: inputs, those without a row, labels, those without a row.

    Args:
        policy: lfu, lru or distance_lfu. decay: exponent of the distance. every: training steps between updates.

    Raises UserError without torchrec.
    """

    step: Tensor
    evicted: Tensor
    waiting: Tensor
    since: Tensor

    def __init__(self, num_items: int, num_rows: int, policy: str, decay: float, every: int) -> None:
        super().__init__(num_items, num_rows)
        if not has_torchrec():
            raise UserError("embedding.ids=managed: expected torchrec and fbgemm-gpu; see hstu-doctor, or take hash")
        from torchrec.modules import mc_modules

        policies = {
            "lfu": mc_modules.LFU_EvictionPolicy,
            "lru": mc_modules.LRU_EvictionPolicy,
            "distance_lfu": lambda: mc_modules.DistanceLFU_EvictionPolicy(decay_exponent=decay),
        }
        self.every = every
        self.module = mc_modules.MCHManagedCollisionModule(
            zch_size=num_rows, device=torch.device("cpu"), eviction_policy=policies[policy](), eviction_interval=1
        )
        for name, shape in (("step", ()), ("evicted", ()), ("since", (4,)), ("waiting", (0,))):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int64))

    def _apply(self, fn: Any, recurse: bool = True) -> ManagedRows:
        super()._apply(fn, recurse)
        module = self.module
        module._mch_metadata = {name: getattr(module, f"_mch_{name}") for name in module._mch_metadata}
        module._device = module._mch_sorted_raw_ids.device
        return self

    def fit(self, sizes: dict[str, torch.Size]) -> None:
        """Makes room for a state of these sizes, by name, that is about to be read into the buffers."""
        self.waiting = self.waiting.new_zeros(sizes.get("waiting", self.waiting.shape))

    @property
    def num_known(self) -> int:
        """Items with a row."""
        return int(torch.searchsorted(self.module._mch_sorted_raw_ids, _NO_ID))

    @property
    def num_live(self) -> int:
        return 1 + self.num_known

    def items(self) -> Tensor:
        """[R + 1] int64: the item of each row; 0 where there is none, and on rows 0 and 1."""
        ids, slots = self.module._mch_sorted_raw_ids, self.module._mch_remapped_ids_mapping
        known, found = ids != _NO_ID, ids.new_zeros(self.num_rows + 1)
        found[self.num_rows - slots[known]] = ids[known]
        return found

    def rows(self, ids: Tensor) -> Tensor:
        """As by torchrec's ``remap``, whose masks wait for the device."""
        known, slots = self.module._mch_sorted_raw_ids, self.module._mch_remapped_ids_mapping
        wanted = ids.long().contiguous()
        place = torch.searchsorted(known[:-1], wanted)
        found = torch.where(known[place] == wanted, self.num_rows - slots[place], UNKNOWN)
        return torch.where(ids == 0, 0, found)

    def counts(self) -> Tensor:
        live = self.num_live
        found = torch.ones(live + 1, dtype=torch.float64, device=self.waiting.device)
        found[0], found[UNKNOWN] = 0.0, self.num_items - (live - 1)
        return found

    def for_loss(self, predicted: Predicted) -> Predicted:
        """Positions whose label has no row do not count: the row for all others would learn to be the next item of
        everybody, and every one of them would rank above items that are known. To know them waits for the device."""
        found = super().for_loss(predicted)
        known = (found.labels != UNKNOWN).nonzero()[:, 0]
        return found if len(known) == len(found.labels) else found.at(known)

    @torch.no_grad()
    def take_in(self, ids: Tensor) -> Tensor:
        """Counts the ids [n] int64 of a training step, of all ranks; at the first and every ``every`` steps later gives
        rows anew. Returns the rows whose item has changed, int64, ascending."""
        self.waiting = torch.cat([self.waiting, ids])
        due = int(self.step) % self.every == 0
        self.step += 1
        if not due or len(self.waiting) == 0:
            return ids[:0]
        before, module = self.items(), self.module
        module.train()
        module._current_iter = -1  # take the count from the buffer, which may have been read from a checkpoint
        module._input_history_buffer_size = -1  # as long as this history
        module.profile({"item": _jagged(self.waiting)})
        module.evict()
        self.waiting = self.waiting[:0].clone()
        after = self.items()
        if not bool((after[2 : 1 + self.num_live] > 0).all()):
            raise RuntimeError("torchrec's managed collision filled other slots than the last free ones")
        changed = ((before != after) & (before > 0)).nonzero()[:, 0]
        self.evicted += len(changed)
        return changed

    def topk(
        self, table: ItemTable, queries: Tensor, k: int, seen_ids: Tensor, seen_offsets: Tensor, chunk_mib: float
    ) -> tuple[Tensor, Tensor]:
        """Of items with a row: nothing tells the others apart."""
        ends = seen_offsets[1:]
        owner = torch.arange(len(ends), device=ends.device)
        users = torch.cat([owner.repeat_interleave(seen_offsets.diff()), owner])
        hidden = torch.cat([self.rows(seen_ids), torch.full_like(owner, UNKNOWN)])
        hidden = hidden[users.argsort(stable=True)]
        offsets = seen_offsets + torch.arange(len(seen_offsets), device=ends.device)
        scores, rows = table.topk(queries, k, hidden, offsets, chunk_mib)
        return scores, self.items()[rows]


def _jagged(ids: Tensor) -> Any:
    from torchrec.sparse.jagged_tensor import JaggedTensor

    return JaggedTensor(ids, lengths=torch.full((1,), len(ids), device=ids.device))


class MappedTable(ItemTable):
    """An item table whose items lie on the rows of another one.

    Attributes:
        item_rows: the map. rows: the table of the rows, local or sharded.
    """

    def __init__(self, item_rows: ItemRows, rows: ItemTable) -> None:
        super().__init__()
        self.num_items, self.dim, self.l2_normalize = item_rows.num_items, rows.dim, rows.l2_normalize
        self.item_rows, self.rows = item_rows, rows
        rows.num_live = item_rows.num_live

    @property
    def eps(self) -> float:
        return float(self.rows.eps)  # type: ignore[arg-type]

    def _live(self) -> ItemTable:
        self.rows.num_live = self.item_rows.num_live
        return self.rows

    def embeddings(self) -> list[nn.Module]:
        return self.rows.embeddings()

    def for_loss(self, predicted: Predicted) -> tuple[ItemTable, Predicted]:
        return self._live(), self.item_rows.for_loss(predicted)

    def expect(
        self, labels: Tensor, loss: LossConfig, seed: int, rows: Tensor | None = None, every: Tensor | None = None
    ) -> None:
        bank = None if every is None else self.item_rows.rows(every)
        self._live().expect(self.item_rows.rows(labels), loss, seed, rows, bank)

    def lookup(self, ids: Tensor) -> Tensor:
        return self.rows.lookup(self.item_rows.rows(ids))

    def sampled_softmax(
        self, queries: Tensor, labels: Tensor, negatives: Tensor | None = None, num_negatives: int = 128,
        seed: int = 0, temperature: float = 0.05, rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        given = None if negatives is None else self.item_rows.rows(negatives)
        own = self.item_rows.rows(labels)
        return self._live().sampled_softmax(queries, own, given, num_negatives, seed, temperature, rows)

    def bank_softmax(
        self, queries: Tensor, labels: Tensor, bank_ids: Tensor, log_q: Tensor | None = None,
        label_log_q: Tensor | None = None, temperature: float = 0.05,
    ) -> Tensor:  # fmt: skip
        own, bank = self.item_rows.rows(labels), self.item_rows.rows(bank_ids)
        return self._live().bank_softmax(queries, own, bank, log_q, label_log_q, temperature)

    def full_softmax(
        self, queries: Tensor, labels: Tensor, temperature: float = 0.05, chunk_mib: float = 64,
        weights: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Over the rows in use, each once, however many items lie on it."""
        return self._live().full_softmax(queries, self.item_rows.rows(labels), temperature, chunk_mib, weights)

    def rank(
        self, queries: Tensor, targets: Tensor, seen_ids: Tensor | None = None, seen_offsets: Tensor | None = None,
        chunk_mib: float = 64,
    ) -> Tensor:  # fmt: skip
        """Ranks among items: rows are scored once, and count as often as unseen items lie on them."""
        seen_ids, seen_offsets = _given(queries, seen_ids, seen_offsets)
        users = torch.arange(len(queries), device=queries.device).repeat_interleave(seen_offsets.diff())
        pairs = users * (self.num_items + 1) + seen_ids.long()
        pairs = pairs[(seen_ids > 0) & (seen_ids != targets[users])].unique()  # each item once, in the order of users
        users, items = pairs // (self.num_items + 1), pairs % (self.num_items + 1)
        offsets = torch.cat([seen_offsets.new_zeros(1), torch.bincount(users, minlength=len(queries)).cumsum(0)])
        counts = self.item_rows.counts().to(queries.device)
        map_rows = self.item_rows.rows
        return self._live().counted_rank(queries, map_rows(targets), counts, map_rows(items), offsets, chunk_mib)

    def topk(
        self, queries: Tensor, k: int, seen_ids: Tensor | None = None, seen_offsets: Tensor | None = None,
        chunk_mib: float = 64,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        seen_ids, seen_offsets = _given(queries, seen_ids, seen_offsets)
        return self.item_rows.topk(self._live(), queries, k, seen_ids, seen_offsets, chunk_mib)


def _given(queries: Tensor, seen_ids: Tensor | None, seen_offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    if seen_ids is None or seen_offsets is None:
        nothing = torch.zeros(0, dtype=torch.int64, device=queries.device)
        return nothing, torch.zeros(len(queries) + 1, dtype=torch.int64, device=queries.device)
    return seen_ids, seen_offsets


def make_item_rows(num_items: int, embedding: EmbeddingConfig) -> ItemRows | None:
    """The map that ``embedding.ids`` picks; None: every item has its own row."""
    if embedding.ids == "exact":
        return None
    assert embedding.rows is not None
    if embedding.ids == "hash":
        return HashedRows(num_items, embedding.rows)
    return ManagedRows(num_items, embedding.rows, embedding.policy, embedding.policy_decay, embedding.evict_every)
