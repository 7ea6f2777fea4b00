"""Deduplication, minimum counts and the vocabulary cap, on bucketed events. numpy only."""

from __future__ import annotations

import numpy as np

from hstu.data.buckets import Buckets, Events
from hstu.data.order import sort_events


def dedup(buckets: Buckets, policy: str) -> int:
    """Drops repeated events in place and returns how many.

    policy: ``first`` / ``last`` keep one event of a user-item pair, by time and then file order; ``exact`` drops
    rows that agree in every column with an earlier row.
    """
    removed = 0
    for b, events in buckets.scan():
        keep = _exact(events) if policy == "exact" else _one_per_pair(events, policy)
        removed += len(events["row"]) - len(keep)
        keep = keep[np.argsort(events["row"][keep])]
        buckets.replace(b, {name: column[keep] for name, column in events.items()})
    return removed


def _one_per_pair(events: Events, policy: str) -> np.ndarray:
    order = sort_events(events["user"], events["time"], events["row"], "stable", 0)
    if policy == "last":
        order = order[::-1]
    pair = (events["user"][order].astype(np.int64) << 32) | events["item"][order]
    return order[np.unique(pair, return_index=True)[1]]


def _exact(events: Events) -> np.ndarray:
    names = [n for n in events if n != "row"]
    columns = [events[n].view(np.int32) if events[n].dtype == np.float32 else events[n] for n in names]
    order = np.lexsort((events["row"], *columns))
    new = np.zeros(len(order), bool)
    new[:1] = True
    for column in columns:
        ordered = column[order]
        new[1:] |= ordered[1:] != ordered[:-1]
    return order[new]


Counts = tuple[np.ndarray, np.ndarray]
"""Events of each user and of each item, int64."""


def count(buckets: Buckets, users: np.ndarray, items: np.ndarray) -> Counts:
    """Counts of the events whose user and item are both alive (boolean masks)."""
    user_counts, item_counts = np.zeros(len(users), np.int64), np.zeros(len(items), np.int64)
    for _, events in buckets.scan("user", "item"):
        alive = users[events["user"]] & items[events["item"]]
        if not alive.all():
            events = {name: column[alive] for name, column in events.items()}
        user_counts += np.bincount(events["user"], minlength=len(users))
        item_counts += np.bincount(events["item"], minlength=len(items))
    return user_counts, item_counts


def minimum_counts(
    buckets: Buckets, counts: Counts, min_user: int, min_item: int, mode: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which users and items stay, and which items are in the vocabulary (boolean masks).

    counts: of the whole log.

    one-pass: rows go whose item or user occurs too rarely in the whole log; the items of what is left are the
    vocabulary; then users left with too few events go (Amazon Books as published).
    iterative: until every user and item has enough (k-core).
    """
    user_counts, item_counts = counts
    users, items = user_counts >= max(min_user, 1), item_counts >= max(min_item, 1)
    if min_user <= 1 and min_item <= 1:
        return users, items, items.copy()
    user_counts, item_counts = count(buckets, users, items)
    if mode == "one-pass":
        return user_counts >= max(min_user, 1), items, item_counts > 0
    while True:
        new_users, new_items = user_counts >= max(min_user, 1), item_counts >= max(min_item, 1)
        if np.array_equal(new_users, users) and np.array_equal(new_items, items):
            return users, items, items.copy()
        users, items = new_users, new_items
        user_counts, item_counts = count(buckets, users, items)


def cap_vocabulary(item_counts: np.ndarray, vocabulary: np.ndarray, max_items: int | None) -> tuple[np.ndarray, int]:
    """[items] int32 final id of every item (0: not in the vocabulary) and the number of ids.

    Ids follow the order of the items. Above ``max_items`` the most frequent max_items - 1 keep an id of their own
    (ties: the earlier item), the rest share the rare-item bucket, id = max_items.
    """
    ids = np.zeros(len(vocabulary), np.int32)
    members = np.flatnonzero(vocabulary)
    if max_items is None or len(members) <= max_items:
        ids[members] = np.arange(1, len(members) + 1)
        return ids, len(members)
    by_count = members[np.argsort(-item_counts[members], kind="stable")]
    own = np.sort(by_count[: max_items - 1])
    ids[members] = max_items
    ids[own] = np.arange(1, max_items)
    return ids, max_items
