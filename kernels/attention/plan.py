"""What all layers of one batch share: where each user's rows lie, which time bucket each pair falls in.

Legend: B users, L total events, N padded length (position table has 2N-1 entries), H heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ROW_BLOCK = 64
"""Query rows handled together; their keys are the causal prefix, so about (n + 64) / 2n of the square is computed."""
BLOCK_PAIRS = 160_000
"""Pairs (users x rows x keys) per block: three float32 buffers of that size stay inside a 2 MiB L2 cache."""
MAX_PADDING = 1.12
"""Users share a padded group while its padded events stay within this factor of its real events."""


@dataclass(frozen=True)
class TimeBuckets:
    """Buckets of a time gap: ``floor(ln(max(1, |gap_s|)) / width)``, the last one open.

    Source of the function: Zhai et al. 2024, reference code (its width, 0.301, looks like log10(2) but divides a
    natural log). With 0.301 and 129 buckets: bucket 0 holds gaps of 0 and 1 s, bucket 10 those of 21 to 27 s,
    bucket 40 those of 2.0 to 2.6 days, bucket 59 those of 1.6 to 2.2 years.
    """

    count: int = 129
    width: float = 0.301
    """In ln(s)."""

    def of(self, gap_s: Tensor) -> Tensor:
        """Bucket of each gap (any shape, int64 or float64, whole s; the sign is dropped): int32, 0 .. count-1."""
        exact = gap_s.to(torch.float64, copy=True)  # whole numbers below 2^53 stay exact
        return exact.abs_().clamp_(1.0, self._last_s).log_().div_(self.width).to(torch.int32)

    @property
    def _last_s(self) -> float:
        """A gap inside the last bucket."""
        return math.exp(min((self.count - 0.5) * self.width, 700.0))

    def thresholds(self) -> Tensor:
        """[count-1] int64, s: smallest whole gap of bucket 1, 2, ...; for kernels, which then need no logarithm.

        Equal to :meth:`of` for gaps below 2^40 s (35,000 years).
        """
        limit = torch.iinfo(torch.int64).max
        steps = (b * self.width for b in range(1, self.count))
        return torch.tensor([math.ceil(math.exp(x)) if x < 62 * math.log(2) else limit for x in steps])


@dataclass(frozen=True)
class AttentionPlan:
    """Layout of a jagged batch, computed once and shared by all layers.

    Attributes:
        offsets: [B+1] int64. User b owns rows offsets[b] .. offsets[b+1].
        max_len: longest user, int.
        query_time: [L] int64, s. Time at which each row's prediction is asked for, or None.
        key_time: [L] int64, s. Time of each event, or None.
        time_buckets: how gaps are bucketed, or None.
        schedule: [G, 2] int64 (CPU path). Users and padded length of each group of similar lengths.
        rows: [sum of users x padded length] int64 (CPU path). Row of each padded slot; pads repeat a real row.
        slots: [L] int64 (CPU path). Padded slot of each row.
        buckets: flat int32 (CPU path). Time bucket of each (query, key) pair, block by block.
    """

    offsets: Tensor
    max_len: int
    query_time: Tensor | None = None
    key_time: Tensor | None = None
    time_buckets: TimeBuckets | None = None
    schedule: Tensor | None = None
    rows: Tensor | None = None
    slots: Tensor | None = None
    buckets: Tensor | None = None


def make_plan(
    offsets: Tensor,
    max_len: int,
    query_time: Tensor | None = None,
    key_time: Tensor | None = None,
    time_buckets: TimeBuckets | None = None,
) -> AttentionPlan:
    """Lays out a batch for all attention layers; on CPU also groups users by length and buckets all time gaps.

    Args:
        offsets: [B+1] int32 or int64, ascending from 0.
        max_len: int, at least the longest user.
        query_time, key_time: [L] int64, s. Both or neither.
        time_buckets: how gaps are bucketed. Needed with times.

    Raises:
        ValueError: shapes, dtypes or the presence of the time arguments do not fit together.
    """
    if offsets.dim() != 1 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"offsets: expected [B+1] int32 or int64, got {list(offsets.shape)} {offsets.dtype}")
    given = [query_time is not None, key_time is not None, time_buckets is not None]
    if any(given) and not all(given):
        raise ValueError("query_time, key_time and time_buckets: give all three or none")
    offsets = offsets.to(torch.int64)
    if offsets.device.type != "cpu":
        return AttentionPlan(offsets, max_len, query_time, key_time, time_buckets)
    schedule, rows, slots = _group_by_length(offsets)
    plan = AttentionPlan(offsets, max_len, query_time, key_time, time_buckets, schedule, rows, slots)
    if query_time is None or key_time is None or time_buckets is None:
        return plan
    parts = []
    query_time, key_time = query_time.to(torch.float64), key_time.to(torch.float64)
    for group in groups(schedule):
        index = rows[group.slots].view(group.num_users, group.length)
        query, key = query_time[index], key_time[index]
        for start, stop in row_blocks(group.length):
            gap_s = query[:, start:stop, None] - key[:, None, :stop]
            parts.append(time_buckets.of(gap_s).view(-1))
    buckets = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int32)
    return AttentionPlan(offsets, max_len, query_time, key_time, time_buckets, schedule, rows, slots, buckets)


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


def row_blocks(length: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of each block of query rows; the keys of a block are 0 .. stop."""
    for start in range(0, length, ROW_BLOCK):
        yield start, min(start + ROW_BLOCK, length)


def _group_by_length(offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Groups users by length, longest first. Returns schedule [G, 2], rows [slots], slots [L]."""
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
    return table, rows, slots
