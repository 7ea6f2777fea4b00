"""Layout of the delta form for the CPU path: query rows in units, units of similar size in groups.

A unit is what one user's history rows, or its targets, have in common: one run of query rows and one run of the keys
of its history. Both runs are aligned at their ends, where the history ends: with that, position bias and window of a
group are the same for all of its users. A target's own row is no key of a unit; it is taken apart from them.

Legend: B users, L query rows in all, U units, G groups; in a group b units, R padded query rows, K padded keys.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.attention.reference import Mask
from kernels.attention.times import PowerLaw, TimeBuckets

MAX_PADDING = 1.25
"""Units share a group while its padded work stays within this factor of its real work."""
KEY_PAIRS = 24
"""Work of gathering a key row, in pairs."""
GROUP_PAIRS = 4_000
"""Work of a group of its own, in pairs: padding up to it is cheaper than one more group."""
GROUP_KEYS = 2_048
"""Key rows of a group of several units: gathered keys and values of 128 floats each take 2 MiB, as an L2 cache has."""
TABLE_PAIRS = 1 << 22
"""Pairs whose time buckets a plan keeps: 16 MiB, for all layers. The rest are computed block by block in each layer."""
GAP_PAIRS = 1 << 17
"""Pairs whose gaps are turned into buckets together: their float64 intermediates stay in cache."""

Array = np.ndarray[Any, np.dtype[Any]]

NUM_ROWS, NUM_KEYS, HISTORY = range(3)
"""Columns of ``units``."""


@dataclass(frozen=True)
class DeltaLayout:
    """The delta form's units and groups; a part of :class:`kernels.attention.AttentionPlan`.

    Attributes:
        schedule: [G, 5] int64. Units, padded query rows, padded keys, whether they are targets, and how many rows of
            each unit have time buckets of their own: all, 1 where all rows ask at one time, 0 where none are kept.
        units: [U, 3] int64. Query rows, keys and history of each unit, group by group.
        query_rows: [sum of b R] int64. Row of q of each padded slot; pads stand first and repeat a real row.
        key_rows: [sum of b K] int64. Row of k of each padded slot, likewise.
        targets: [2, T] int64. Row of q and row of k of each target that is a query.
        buckets: flat int32 or float32. What ``time_buckets.of`` gives for the pairs of the groups that keep it, [b,
            rows, K] each; then for each target and itself. None: no times.
    """

    schedule: Tensor
    units: Tensor
    query_rows: Tensor
    key_rows: Tensor
    targets: Tensor
    buckets: Tensor | None


@dataclass(frozen=True)
class DeltaGroup:
    """Units of similar size, padded to the largest of them."""

    num_units: int
    num_rows: int
    num_keys: int
    are_targets: bool
    bucket_rows: int
    units: slice
    query_slots: slice
    key_slots: slice
    pairs: slice
    """Its part of the plan's buckets."""


def delta_groups(schedule: Tensor) -> Iterator[DeltaGroup]:
    """The groups of a layout's ``schedule`` [G, 5] in order."""
    unit = query = key = pair = 0
    for b, rows, keys, are_targets, bucket_rows in schedule.tolist():
        ends = unit + b, query + b * rows, key + b * keys, pair + b * bucket_rows * keys
        parts = slice(unit, ends[0]), slice(query, ends[1]), slice(key, ends[2]), slice(pair, ends[3])
        yield DeltaGroup(b, rows, keys, bool(are_targets), bucket_rows, *parts)
        unit, query, key, pair = ends


def lay_out_delta(
    offsets: Tensor, key_starts: Tensor, key_lengths: Tensor, num_targets: Tensor | None, query_time: Tensor | None,
    key_time: Tensor | None, time_buckets: TimeBuckets | PowerLaw | None, mask: Mask,
) -> DeltaLayout:  # fmt: skip
    """Lays out a batch whose queries are the last rows of longer key sequences; arguments as the plan's own.

    In numpy: serving lays out a small batch for each request, and on small arrays its calls cost less than torch's.
    """
    ends, starts, lengths = offsets.numpy()[1:], key_starts.numpy(), key_lengths.numpy()
    num_rows = np.diff(offsets.numpy())
    last = np.zeros_like(num_rows) if num_targets is None else num_targets.numpy()
    asked = np.minimum(num_rows, last)  # targets that are queries
    own = _runs(ends - asked, asked), _runs(starts + lengths - asked, asked)
    # [2B] each: history rows, then targets.
    rows = np.concatenate([num_rows - asked, asked])
    first_row = np.concatenate([ends - num_rows, ends - asked])
    history = np.tile(lengths - last, 2)
    are_targets = np.arange(2 * len(ends)) >= len(ends)
    first_key = np.zeros_like(history)
    if mask.window and not mask.full_rows and not mask.contextual:
        first_at = np.where(are_targets, history, history - rows)
        first_key = np.maximum(first_at - mask.window + 1, 0)
    keys = history - first_key

    groups, order = _group(rows, keys, are_targets)
    padded_rows, padded_keys = np.repeat(groups[:, 1:3], groups[:, 0], axis=0).T  # [U] each
    arrays = (
        groups,
        np.stack([rows, keys, history], axis=1)[order],
        _runs(first_row[order], rows[order], padded_rows),
        _runs((np.tile(starts, 2) + first_key)[order], keys[order], padded_keys),
        np.stack(own),
    )
    schedule, units, query_rows, key_rows, targets = (torch.from_numpy(x) for x in arrays)
    layout = DeltaLayout(schedule, units, query_rows, key_rows, targets, None)
    if query_time is None or key_time is None or time_buckets is None:
        return layout
    return _with_buckets(layout, query_time, key_time, time_buckets)


def _with_buckets(layout: DeltaLayout, query_time: Tensor, key_time: Tensor,
                  kind: TimeBuckets | PowerLaw) -> DeltaLayout:  # fmt: skip
    """Adds the buckets of the groups in order, as far as TABLE_PAIRS reach."""
    schedule, parts, room = layout.schedule.clone(), [], TABLE_PAIRS
    for number, group in enumerate(delta_groups(layout.schedule)):
        asked_at = query_time[layout.query_rows[group.query_slots]].view(group.num_units, group.num_rows)
        if bool((asked_at == asked_at[:, :1]).all()):
            asked_at = asked_at[:, :1]
        pairs = asked_at.numel() * group.num_keys
        if pairs > room:
            continue
        room -= pairs
        schedule[number, 4] = asked_at.shape[1]
        happened_at = key_time[layout.key_rows[group.key_slots]].view(group.num_units, 1, group.num_keys)
        step = max(1, GAP_PAIRS // (group.num_units * group.num_keys))
        gaps = [kind.of(some[:, :, None] - happened_at) for some in asked_at.split(step, dim=1)]
        parts.append((gaps[0] if len(gaps) == 1 else torch.cat(gaps, dim=1)).view(-1))
    q_row, k_row = layout.targets
    parts.append(kind.of(query_time[q_row] - key_time[k_row]))
    return DeltaLayout(schedule, layout.units, layout.query_rows, layout.key_rows, layout.targets, torch.cat(parts))


def _runs(first: Array, count: Array, padded: Array | None = None) -> Array:
    """Rows first .. first + count of each run, behind pads that repeat its first row: [sum of padded, or of count]."""
    padded = count if padded is None else padded
    total = int(padded.sum())
    within = np.arange(total) - np.repeat(padded.cumsum() - count, padded)
    return np.repeat(first, padded) + np.maximum(within, 0)


def _group(rows: Array, keys: Array, are_targets: Array) -> tuple[Array, Array]:
    """Groups units [2B] that have rows and keys, by kind, binary order of magnitude of the rows, and keys.

    Returns [G, 5] (units, most rows, most keys, kind, 0) and the units in the groups' order.
    """
    kind = 64 * are_targets + np.frexp(rows)[1]
    order = np.lexsort((-keys, kind))
    order = order[((rows > 0) & (keys > 0))[order]]
    all_rows, all_keys, kinds = rows[order].tolist(), keys[order].tolist(), kind[order].tolist()
    schedule, first = [], 0
    while first < len(kinds):
        last = bisect_right(kinds, kinds[first])
        count, most_rows = _fitting(all_rows[first:last], all_keys[first:last])
        schedule.append((count, most_rows, all_keys[first], int(kinds[first] >= 64), 0))
        first += count
    return np.array(schedule, dtype=np.int64).reshape(-1, 5), order


def _fitting(rows: list[int], keys: list[int]) -> tuple[int, int]:
    """How many of the first units share a group, and their most rows; keys descend."""
    count, most_rows, real = 1, rows[0], keys[0] * (rows[0] + KEY_PAIRS)
    while count < len(rows) and (count + 1) * keys[0] <= GROUP_KEYS:
        most = max(most_rows, rows[count])
        real_next = real + keys[count] * (rows[count] + KEY_PAIRS)
        padded = (count + 1) * keys[0] * (most + KEY_PAIRS)
        if padded > max(MAX_PADDING * real_next, real_next + GROUP_PAIRS):
            break
        count, most_rows, real = count + 1, most, real_next
    return count, most_rows
