"""What all layers of one batch share: where each user's rows lie, who sees whom, how far apart in time.

Legend: B users, L query rows in all, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels._backend import choose
from kernels.attention.layout import lay_out
from kernels.attention.layout_delta import DeltaLayout, lay_out_delta
from kernels.attention.reference import CAUSAL, Mask
from kernels.attention.times import MAX_GAP_S, PowerLaw, TimeBuckets
from kernels.jagged import positions_of


@dataclass(frozen=True)
class AttentionPlan:
    """Layout of a jagged batch, computed once and shared by all layers.

    Attributes:
        offsets: [B+1] int64. User b owns query rows offsets[b] .. offsets[b+1].
        max_len: longest user (its keys), int.
        query_time: [L] int64, s. Time at which each row's prediction is asked for, or None.
        key_time: [L] int64, s. Time of each event, or None.
        time_buckets: how gaps become weights, or None.
        mask: who sees whom.
        num_targets: [B] int64. Rows at each user's end that are targets, or None.
        max_query_len: longest user (its query rows), int.
        num_positions: positions that the position bias must reach: the longest user, or fewer where there are targets.
        key_starts, key_lengths: [B] int64. Delta form: user b's keys are rows key_starts[b] .. + key_lengths[b] of k
            and v, and its query rows are the last of that sequence. None: queries and keys are the same rows.
        row_counts: [L] float32. Rows that each query row sees (at least 1), or None.
        schedule: [G, 2] int64 (CPU path). Users and padded length of each group of similar lengths.
        rows: [sum of users x padded length] int64 (CPU path). Row of each padded slot; pads repeat a real row.
        slots: [L] int64 (CPU path). Padded slot of each row.
        buckets: flat int32 or float32 (CPU path). What ``time_buckets.of`` gives for each (query, key) pair, block
            by block.
        hidden: flat bool (CPU path). Pairs that the mask hides, block by block; None: plainly causal.
        pair_positions: flat int32 (CPU path). j - i of each pair, targets at the end of the history; None: no targets.
        delta: units of query rows and of keys (CPU path of the delta form), or None.
        order: [B] int32 (kernel). Users, longest first.
        query_age, key_age: [L] int32, s (kernel). Times counted back from the user's last one.
        thresholds: [buckets+1] int32, s (kernel). Smallest gap of each bucket.
    """

    offsets: Tensor
    max_len: int
    query_time: Tensor | None = None
    key_time: Tensor | None = None
    time_buckets: TimeBuckets | PowerLaw | None = None
    mask: Mask = CAUSAL
    num_targets: Tensor | None = None
    max_query_len: int = 0
    num_positions: int = 0
    key_starts: Tensor | None = None
    key_lengths: Tensor | None = None
    row_counts: Tensor | None = None
    schedule: Tensor | None = None
    rows: Tensor | None = None
    slots: Tensor | None = None
    buckets: Tensor | None = None
    hidden: Tensor | None = None
    pair_positions: Tensor | None = None
    delta: DeltaLayout | None = None
    order: Tensor | None = None
    query_age: Tensor | None = None
    key_age: Tensor | None = None
    thresholds: Tensor | None = None

    @property
    def is_delta(self) -> bool:
        """Whether the queries are only the last rows of the keys' sequences."""
        return self.key_starts is not None


def make_plan(
    offsets: Tensor,
    max_len: int,
    query_time: Tensor | None = None,
    key_time: Tensor | None = None,
    time_buckets: TimeBuckets | PowerLaw | None = None,
    *,
    mask: Mask = CAUSAL,
    num_targets: Tensor | None = None,
    key_starts: Tensor | None = None,
    key_lengths: Tensor | None = None,
    max_query_len: int | None = None,
    count_rows: bool = False,
    num_positions: int | None = None,
) -> AttentionPlan:
    """Lays out a batch for all attention layers.

    On the CPU it also groups users by length and buckets all time gaps (in the delta form at most 4 million of them,
    16 MiB); where the Triton kernel will run it orders users by length and turns times into 32-bit ages.

    Args:
        offsets: [B+1] int32 or int64, ascending from 0. Of the query rows.
        max_len: int, at least the longest user (its keys).
        query_time: [L] int64, s, one per query row; key_time: one per key row. Both or neither.
        time_buckets: how gaps become weights. Needed with times.
        mask: who sees whom.
        num_targets: [B] int32 or int64. The last rows of each user that are targets; None: none.
        key_starts, key_lengths: [B] int32 or int64. Delta form (cached inference), see :class:`AttentionPlan`; both
            or neither. ``key_lengths[b]`` is at least the user's query rows.
        max_query_len: int, at least the longest user's query rows; ``max_len`` when None.
        count_rows: also count the rows each row sees, for ``divisor="row_count"``.
        num_positions: int, with targets: at least the longest history and one, since all targets stand right after it;
            ``max_len`` when None.

    Raises:
        ValueError: shapes, dtypes or the presence of arguments do not fit together; on the CPU also lengths that do
            not fit (targets beyond a user's rows, fewer keys than queries).
    """
    _check_plan_arguments(offsets, query_time, key_time, time_buckets, num_targets, key_starts, key_lengths)
    offsets = offsets.to(torch.int64)
    lengths = offsets.diff()
    longest = max_len if max_query_len is None else max_query_len
    if key_starts is not None and key_lengths is not None:
        key_starts, key_lengths = key_starts.to(torch.int64), key_lengths.to(torch.int64)
    if num_targets is not None:
        num_targets = num_targets.to(torch.int64)
    if offsets.device.type == "cpu":
        _check_lengths_on_cpu(lengths, key_lengths, num_targets, max_len, longest)
    positions = max_len if num_positions is None else num_positions
    plan = AttentionPlan(
        offsets, max_len, query_time, key_time, time_buckets, mask, num_targets, longest, positions,
        key_starts, key_lengths,
    )  # fmt: skip
    if offsets.device.type == "cpu" and lengths.numel() and num_positions is not None:
        _check_positions_on_cpu(plan)
    if count_rows:
        plan = replace(plan, row_counts=_row_counts(plan))
    if offsets.device.type == "cpu" and key_starts is not None and key_lengths is not None:
        times = query_time, key_time, time_buckets
        plan = replace(plan, delta=lay_out_delta(offsets, key_starts, key_lengths, num_targets, *times, mask))
    elif offsets.device.type == "cpu":
        plan = replace(plan, **lay_out(offsets, query_time, key_time, time_buckets, mask, num_targets))
    if choose("attention", offsets.device).backend == "triton":
        plan = _plan_for_kernel(plan)
    return plan


def _check_plan_arguments(offsets: Tensor, query_time: Tensor | None, key_time: Tensor | None, time_buckets: Any,
                          num_targets: Tensor | None, key_starts: Tensor | None,
                          key_lengths: Tensor | None) -> None:  # fmt: skip
    if offsets.dim() != 1 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"offsets: expected [B+1] int32 or int64, got {list(offsets.shape)} {offsets.dtype}")
    given = [query_time is not None, key_time is not None, time_buckets is not None]
    if any(given) and not all(given):
        raise ValueError("query_time, key_time and time_buckets: give all three or none")
    if (key_starts is None) != (key_lengths is None):
        raise ValueError("key_starts and key_lengths: give both or none")
    expected = (offsets.shape[0] - 1,)
    for name, x in (("num_targets", num_targets), ("key_starts", key_starts), ("key_lengths", key_lengths)):
        if x is not None and (tuple(x.shape) != expected or x.dtype not in (torch.int32, torch.int64)):
            raise ValueError(f"{name}: expected {list(expected)} int32 or int64, got {list(x.shape)} {x.dtype}")


def _check_lengths_on_cpu(
    lengths: Tensor, key_lengths: Tensor | None, num_targets: Tensor | None, max_len: int, max_query_len: int
) -> None:
    """On the CPU, where reading is free."""
    keys = lengths if key_lengths is None else key_lengths
    if bool((keys < lengths).any()):
        raise ValueError("key_lengths: a user has fewer keys than query rows; its queries are the last of its keys")
    if keys.numel() and int(keys.max()) > max_len:
        raise ValueError(f"max_len={max_len}: the longest user has {int(keys.max())} rows")
    if lengths.numel() and int(lengths.max()) > max_query_len:
        raise ValueError(f"max_query_len={max_query_len}: the longest user has {int(lengths.max())} query rows")
    if num_targets is not None and bool(((num_targets < 0) | (num_targets > keys)).any()):
        raise ValueError("num_targets: expected 0 .. the user's number of rows")


def _check_positions_on_cpu(plan: AttentionPlan) -> None:
    """On the CPU, where reading is free."""
    keys = plan.offsets.diff() if plan.key_lengths is None else plan.key_lengths
    longest = int(keys.max()) if plan.num_targets is None else int((keys - plan.num_targets).max()) + 1
    if longest > plan.num_positions:
        raise ValueError(f"num_positions={plan.num_positions}: the longest history needs {longest}")


def _query_user(plan: AttentionPlan) -> Tensor:
    """[L] int64: the user of each query row."""
    lengths = plan.offsets.diff()
    users = torch.arange(lengths.shape[0], device=lengths.device)
    return torch.repeat_interleave(users, lengths, output_size=_num_query_rows(plan))


def _positions(plan: AttentionPlan) -> tuple[Tensor, Tensor]:
    """Of each query row, [L] int64: its position in its user's sequence, and the length of the user's history."""
    lengths, user = plan.offsets.diff(), _query_user(plan)
    keys = lengths if plan.key_lengths is None else plan.key_lengths
    history = keys if plan.num_targets is None else keys - plan.num_targets
    return positions_of(plan.offsets, user.shape[0]) + (keys - lengths)[user], history[user]


def sequence_positions(plan: AttentionPlan) -> Tensor:
    """[L] int64: place of each query row in its user's sequence; targets stand right after the history."""
    return torch.minimum(*_positions(plan))


def _num_query_rows(plan: AttentionPlan) -> int:
    """L; known on the host from the times, else read from the offsets."""
    return plan.query_time.shape[0] if plan.query_time is not None else int(plan.offsets[-1])


def _row_counts(plan: AttentionPlan) -> Tensor:
    """[L] float32: how many rows each query row sees, by the mask rule in closed form; at least 1."""
    mask = plan.mask
    i, history = _positions(plan)
    is_target = i >= history
    at = torch.minimum(i, history)
    first = torch.zeros_like(i)
    end = torch.minimum(at + 1, history) if mask.causal else history
    if mask.window:
        limited = torch.ones_like(is_target) if not mask.full_rows else at < history - mask.full_rows
        first = torch.where(limited, (at - mask.window + 1).clamp(min=0), first)
        if not mask.causal:
            end = torch.where(limited, torch.minimum(at + mask.window, history), end)
    prefix = history.clamp(max=mask.contextual)
    count = (end - first).clamp(min=0) + torch.minimum(prefix, first)  # the prefix rows before the window
    count = torch.where(i < prefix, history, count) + is_target
    return count.clamp(min=1).to(torch.float32)


def _plan_for_kernel(plan: AttentionPlan) -> AttentionPlan:
    lengths = plan.offsets.diff() if plan.key_lengths is None else plan.key_lengths
    plan = replace(plan, order=torch.argsort(lengths, descending=True).to(torch.int32))
    if plan.query_time is None or plan.key_time is None or plan.time_buckets is None:
        return plan
    query_age, key_age = _ages(plan, plan.query_time, plan.key_time)
    if isinstance(plan.time_buckets, TimeBuckets):
        plan = replace(plan, thresholds=_thresholds_on(plan.time_buckets, query_age.device))
    return replace(plan, query_age=query_age, key_age=key_age)


@cache
def _thresholds_on(buckets: TimeBuckets, device: torch.device) -> Tensor:
    """Made and copied to the device once, not for every batch; a backward may save it, whatever mode asked first."""
    with torch.inference_mode(False):
        return buckets.thresholds().to(device)


def _ages(plan: AttentionPlan, query_time: Tensor, key_time: Tensor) -> tuple[Tensor, Tensor]:
    """Times of the rows counted back from their user's latest one, int32 s, at most MAX_GAP_S."""
    num_users = plan.offsets.shape[0] - 1
    query_user = _query_user(plan)
    never = torch.iinfo(torch.int64).min // 2
    latest = query_time.new_full((num_users,), never).scatter_reduce_(0, query_user, query_time, "amax")
    key_user = query_user
    if plan.key_starts is not None and plan.key_lengths is not None:
        order = torch.argsort(plan.key_starts)
        row = torch.arange(key_time.shape[0], device=key_time.device)
        slot = torch.searchsorted(plan.key_starts[order], row, right=True)
        key_user = order[(slot - 1).clamp(min=0)]
        within = row - plan.key_starts[key_user]
        owned = (within >= 0) & (within < plan.key_lengths[key_user])
        key_time = torch.where(owned, key_time, never)  # the spare room of a cache may hold anything
    latest.scatter_reduce_(0, key_user, key_time, "amax")
    query_age, key_age = latest[query_user] - query_time, latest[key_user] - key_time
    return query_age.clamp_(max=MAX_GAP_S).to(torch.int32), key_age.clamp_(max=MAX_GAP_S).to(torch.int32)
