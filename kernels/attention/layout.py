"""Layout of a batch for the CPU path: users grouped by length, pairs of rows block by block.

Legend: B users, L total events, N padded length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.attention.reference import CAUSAL, Mask, visible
from kernels.attention.times import PowerLaw, TimeBuckets

ROW_BLOCK = 64
"""Query rows handled together; their keys are the causal prefix, so about (n + 64) / 2n of the square is computed."""
BLOCK_PAIRS = 160_000
"""Pairs (users x rows x keys) per block: three float32 buffers of that size stay inside a 2 MiB L2 cache."""
MAX_PADDING = 1.12
"""Users share a padded group while its padded events stay within this factor of its real events."""


def lay_out(
    offsets: Tensor, query_time: Tensor | None, key_time: Tensor | None, time_buckets: TimeBuckets | PowerLaw | None,
    mask: Mask, num_targets: Tensor | None,
) -> dict[str, Any]:  # fmt: skip
    """The CPU path's fields of an :class:`kernels.attention.AttentionPlan`, by name; arguments as its own."""
    schedule, rows, slots, order = _group_by_length(offsets)
    fields: dict[str, Any] = {"schedule": schedule, "rows": rows, "slots": slots}
    general = mask != CAUSAL or num_targets is not None
    if time_buckets is None and not general:
        return fields
    lengths = offsets.diff()
    history = lengths if num_targets is None else lengths - num_targets
    times = None if query_time is None or key_time is None else (query_time.double(), key_time.double())
    parts: dict[str, list[Tensor]] = {"buckets": [], "hidden": [], "pair_positions": []}
    first_user = 0
    for group in groups(schedule):
        index = rows[group.slots].view(group.num_users, group.length)
        users = order[first_user : first_user + group.num_users]
        first_user += group.num_users
        length, past = lengths[users][:, None, None], history[users][:, None, None]
        for start, stop, keys in row_blocks(group.length, mask.reaches_forward):
            i, j = torch.arange(start, stop)[None, :, None], torch.arange(keys)[None, None, :]
            if times is not None and time_buckets is not None:
                gap_s = times[0][index[:, start:stop, None]] - times[1][index[:, None, :keys]]
                parts["buckets"].append(time_buckets.of(gap_s).view(-1))
            if general:
                parts["hidden"].append(visible(i, j, length, past, mask).logical_not_().view(-1))
            if num_targets is not None:
                apart = torch.minimum(j, past) - torch.minimum(i, past)
                parts["pair_positions"].append(
                    apart.to(torch.int32).expand(group.num_users, stop - start, keys).reshape(-1)
                )
    if not parts["buckets"] and time_buckets is not None:  # no event at all
        parts["buckets"].append(time_buckets.of(torch.zeros(0, dtype=torch.int64)))
    if not parts["hidden"] and general:
        parts["hidden"].append(torch.zeros(0, dtype=torch.bool))
    if not parts["pair_positions"] and num_targets is not None:
        parts["pair_positions"].append(torch.zeros(0, dtype=torch.int32))
    return {**fields, **{name: torch.cat(part) if part else None for name, part in parts.items()}}


@dataclass(frozen=True)
class Group:
    """Users of similar length, padded to the longest of them."""

    num_users: int
    length: int
    slots: slice
    """Their padded slots."""


def groups(schedule: Tensor) -> Iterator[Group]:
    """The padded groups of a plan's ``schedule`` [G, 2] in order."""
    start = 0
    for num_users, length in schedule.tolist():
        stop = start + num_users * length
        yield Group(num_users, length, slice(start, stop))
        start = stop


def row_blocks(length: int, all_keys: bool = False) -> Iterator[tuple[int, int, int]]:
    """(start, stop, keys) of each block of query rows; its keys are 0 .. keys: all, or the causal prefix."""
    for start in range(0, length, ROW_BLOCK):
        stop = min(start + ROW_BLOCK, length)
        yield start, stop, length if all_keys else stop


def _group_by_length(offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Groups users by length, longest first. Returns schedule [G, 2], rows [slots], slots [L], users in that order."""
    lengths = offsets.diff()
    order = torch.argsort(lengths, descending=True, stable=True)
    sorted_lengths = lengths[order].tolist()
    schedule: list[tuple[int, int]] = []
    index = 0
    while index < len(sorted_lengths) and sorted_lengths[index] > 0:
        longest = sorted_lengths[index]
        most = max(1, BLOCK_PAIRS // (min(longest, ROW_BLOCK) * longest))
        real, count = 0, 0
        while index + count < len(sorted_lengths) and count < most:
            length = sorted_lengths[index + count]
            if length == 0 or (count + 1) * longest > MAX_PADDING * (real + length):
                break
            real, count = real + length, count + 1
        schedule.append((count, longest))
        index += count
    table = torch.tensor(schedule, dtype=torch.int64).view(-1, 2)
    num_users = int(table[:, 0].sum())
    order = order[:num_users]
    padded = table[:, 1].repeat_interleave(table[:, 0])  # [users] padded length of each
    ends = padded.cumsum(0)
    starts = ends - padded
    total = int(padded.sum())
    owner = torch.arange(num_users).repeat_interleave(padded, output_size=total)
    within = torch.arange(total) - starts[owner]
    first, length = offsets[:-1][order], lengths[order]
    rows = first[owner] + torch.minimum(within, length[owner] - 1)
    real_slots = (within < length[owner]).nonzero().squeeze(1)
    slots = torch.empty(int(offsets[-1]), dtype=torch.int64)
    slots[rows[real_slots]] = real_slots
    return table, rows, slots, order
