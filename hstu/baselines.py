"""Two baselines without parameters: most popular items, and transitions from the last item.

Both count training events only and are ranked by the rule and the filter of the models, so they stand in
one table with them. Nothing here is users x catalogue: ranks come from sorted counts.

Legend: ``M`` targets, ``U`` users, ``E`` events, ``S`` seen items of all targets of a block together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from hstu.data.splits import Targets
    from hstu.data.store import SequenceStore

BLOCK_ROWS = 1 << 22
"""Events counted at once."""
BLOCK_SEEN = 2_000_000
"""Seen items held at once while baselines are ranked (about 100 bytes each)."""


def expand(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the ranges ``starts[m] .. ends[m]``, joined: ``(rows int64 [S], offsets int64 [M+1])``."""
    lengths = ends - starts
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths), offsets


def seen_range(
    store: SequenceStore, users: np.ndarray, rows: np.ndarray, filter_history: str, max_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """First and end row of the events whose items are removed from each target's ranking, int64 [M] each.

    filter_history: ``truncated`` (the last ``max_len`` events before the target), ``full`` or ``none``.
    """
    first = np.asarray(store.offsets)[users]
    if filter_history == "none":
        return rows, rows
    return (np.maximum(first, rows - max_len), rows) if filter_history == "truncated" else (first, rows)


def training_rows(store: SequenceStore, train_end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of all training events in order, and the offsets [U+1] of each user's."""
    return expand(np.asarray(store.offsets)[:-1], np.asarray(train_end))


def training_row_blocks(store: SequenceStore, train_end: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of :func:`training_rows` in blocks of whole users, about :data:`BLOCK_ROWS` each."""
    offsets, train_end = np.asarray(store.offsets), np.asarray(train_end)
    cuts = np.searchsorted(offsets, np.arange(0, int(offsets[-1]), BLOCK_ROWS))
    edges = np.unique(np.concatenate([[0], cuts, [len(train_end)]]))
    for first, last in zip(edges[:-1], edges[1:], strict=True):  # users first .. last
        yield expand(offsets[first:last], train_end[first:last])[0]


def popularity(store: SequenceStore, train_end: np.ndarray) -> np.ndarray:
    """Number of training events of each item, int64 [num_items + 1]; row 0 is padding and 0."""
    counts = np.zeros(store.num_items + 1, np.int64)
    for rows in training_row_blocks(store, train_end):
        counts += np.bincount(store.item_ids[rows], minlength=len(counts))
    return counts


class Transitions:
    """Counts of ``last item -> next item`` between neighbouring training events of one user.

    A pair's score orders items by (count after the last item, popularity), so that items never seen after
    the last one are still ranked by popularity instead of being all tied. Scores are dense integer levels.
    """

    def __init__(self, store: SequenceStore, train_end: np.ndarray) -> None:
        self.num_items = store.num_items
        self.popularity = popularity(store, train_end)
        rows, offsets = training_rows(store, train_end)
        items = np.asarray(store.item_ids)[rows].astype(np.int64)
        inside = np.ones(max(len(items) - 1, 0), dtype=bool)
        cuts = offsets[1:-1]  # a pair that crosses from one user to the next is none
        inside[cuts[(cuts > 0) & (cuts < len(items))] - 1] = False
        pairs = items[:-1][inside] * (self.num_items + 1) + items[1:][inside]
        self.pairs, counts = np.unique(pairs, return_counts=True)  # sorted: by last item, then next item
        last, following = np.divmod(self.pairs, self.num_items + 1)
        score = counts * (self.popularity.max(initial=0) + 1) + self.popularity[following]
        self.levels = np.unique(np.concatenate([score, self.popularity[1:]]))
        self.base = len(self.levels) + 1
        self.pair_level = np.searchsorted(self.levels, score)
        self.item_level = np.searchsorted(self.levels, self.popularity)  # row 0: never a candidate
        # Sorted keys answer "how many next items of `last` score above x" by one binary search.
        self.sorted_scored = np.sort(last * self.base + self.pair_level)
        self.sorted_popular = np.sort(last * self.base + self.item_level[following])
        self.sorted_items = np.sort(self.item_level[1:])

    def score(self, last: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Level of each (last, item) pair, int64; the popularity level where the pair was never seen."""
        if len(self.pairs) == 0:
            return self.item_level[items]
        keys = last.astype(np.int64) * (self.num_items + 1) + items
        at = np.minimum(np.searchsorted(self.pairs, keys), len(self.pairs) - 1)
        return np.where(self.pairs[at] == keys, self.pair_level[at], self.item_level[items])

    def above(self, last: np.ndarray, level: np.ndarray, side: str) -> np.ndarray:
        """Number of items above ``level`` (``side='right'``), or at and above it (``'left'``), int64 [M]."""
        last = last.astype(np.int64)

        def after(keys: np.ndarray) -> np.ndarray:
            end = np.searchsorted(keys, (last + 1) * self.base, side="left")
            return end - np.searchsorted(keys, last * self.base + level, side=side)  # type: ignore[call-overload]

        popular = len(self.sorted_items) - np.searchsorted(self.sorted_items, level, side=side)  # type: ignore[call-overload]
        return popular - after(self.sorted_popular) + after(self.sorted_scored)


class MostPopular:
    """The same interface as :class:`Transitions`, without looking at the last item."""

    def __init__(self, store: SequenceStore, train_end: np.ndarray) -> None:
        self.item_level = popularity(store, train_end)
        self.sorted_items = np.sort(self.item_level[1:])

    def score(self, last: np.ndarray, items: np.ndarray) -> np.ndarray:
        return self.item_level[items]

    def above(self, last: np.ndarray, level: np.ndarray, side: str) -> np.ndarray:
        return len(self.sorted_items) - np.searchsorted(self.sorted_items, level, side=side)  # type: ignore[call-overload]


def rank_baseline(
    baseline: MostPopular | Transitions,
    store: SequenceStore,
    targets: Targets,
    filter_history: str = "truncated",
    max_len: int = 200,
) -> np.ndarray:
    """Exact ranks of the targets, float64 [M]: seen items removed, ties counted against the target by half.

    Every target must have at least one event before it.
    """
    item_ids = np.asarray(store.item_ids)
    users, rows = np.asarray(targets.users), np.asarray(targets.rows)
    starts, ends = seen_range(store, users, rows, filter_history, max_len)
    ranks = np.empty(len(rows), dtype=np.float64)
    block = np.cumsum(ends - starts) // BLOCK_SEEN
    for b in np.unique(block):
        m = np.flatnonzero(block == b)
        last, target = item_ids[rows[m] - 1].astype(np.int64), item_ids[rows[m]].astype(np.int64)
        level = baseline.score(last, target)
        higher = baseline.above(last, level, "right")
        equal = baseline.above(last, level, "left") - higher - 1  # without the target itself
        seen_rows, offsets = expand(starts[m], ends[m])
        owner = np.repeat(np.arange(len(m)), np.diff(offsets))  # [S]
        seen = np.unique(owner * (store.num_items + 1) + item_ids[seen_rows])  # each seen item once
        owner, seen = np.divmod(seen, store.num_items + 1)
        owner, seen = owner[seen != target[owner]], seen[seen != target[owner]]
        seen_level = baseline.score(last[owner], seen)
        higher = higher - np.bincount(owner[seen_level > level[owner]], minlength=len(m))
        equal = equal - np.bincount(owner[seen_level == level[owner]], minlength=len(m))
        ranks[m] = 1.0 + higher + 0.5 * equal
    return ranks


def rank_baselines(
    store: SequenceStore, train_end: np.ndarray, targets: Targets, filter_history: str = "truncated", max_len: int = 200
) -> dict[str, np.ndarray]:
    """Ranks of both baselines, by name."""
    return {
        "most popular": rank_baseline(MostPopular(store, train_end), store, targets, filter_history, max_len),
        "last-item transitions": rank_baseline(Transitions(store, train_end), store, targets, filter_history, max_len),
    }
