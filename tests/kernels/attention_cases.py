"""Inputs, masks and the comparison that the attention tests of all backends share.

Legend: L query rows in all, H heads, A query/key width, V value width, N padded length.
"""

import torch

from kernels.attention import Mask, PowerLaw, TimeBuckets, attention, make_plan
from kernels.attention.reference import attention_reference
from tests.oracle import compare

BUCKETS = TimeBuckets()

MASKS = {
    "causal": Mask(),
    "full": Mask(causal=False),
    "prefix": Mask(contextual=3),
    "window": Mask(window=5),
    "wide-window": Mask(window=37),
    "window-both-sides": Mask(causal=False, window=6),
    "semi-local": Mask(window=4, full_rows=2),
    "window-and-prefix": Mask(window=4, contextual=2),
    "semi-local-and-prefix": Mask(window=20, contextual=5, full_rows=3),
    "both-sides-and-prefix": Mask(causal=False, window=4, contextual=2, full_rows=1),
}


def make(lengths, heads=1, qk=8, v=8, dtype=torch.float32, position=1, time=1, offsets_dtype=torch.int64, seed=0,
         mask=None, num_targets=0, power_law=False, sorted_times=True, device="cpu", buckets=BUCKETS):  # fmt: skip
    """Inputs by name and the plan of a random batch; position, time: tables (0: none)."""
    g = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(offsets_dtype)
    total, longest = int(offsets[-1]), max(lengths)
    # Half of the gaps are short (sessions), half long, so that tiles cross many buckets and few.
    gaps = torch.where(torch.rand(total, generator=g) < 0.5, 60.0, 1e6) * torch.rand(total, generator=g)
    key_time = gaps.long()
    if sorted_times:
        key_time = torch.cat([t.cumsum(0) for t in key_time.split(list(lengths))])
    query_time = key_time + torch.randint(0, 10**5, (total,), generator=g)
    inputs = {
        "q": torch.randn(total, heads, qk, generator=g),
        "k": torch.randn(total, heads, qk, generator=g),
        "v": torch.randn(total, heads, v, generator=g),
    }
    if position:
        inputs["position_weight"] = torch.randn(position, 2 * longest + 5, generator=g)
    kind = PowerLaw() if power_law else buckets
    if time:
        inputs["time_weight"] = torch.randn(time, kind.num_weights, generator=g) * (0.1 if power_law else 1.0)
    targets = torch.tensor([min(num_targets, n) for n in lengths], device=device) if num_targets else None
    plan = make_plan(
        offsets.to(device), longest, query_time.to(device), key_time.to(device), kind, mask=mask or Mask(),
        num_targets=targets, count_rows=True,
    )  # fmt: skip
    return {n: x.to(device, dtype) for n, x in inputs.items()}, plan


def compare_attention(inputs, plan, scale=1.0, vacuous=(), divisor=None, deterministic=None):
    """The public op against the reference: outputs and every gradient."""
    if divisor is None:
        divisor = float(plan.max_len + 11)
    number = {"max_len": float(plan.max_len), "row_count": 1.0}.get(divisor, divisor)
    rows = plan.row_counts if divisor == "row_count" else None

    def op(q, k, v, position_weight=None, time_weight=None):
        return attention(
            q, k, v, plan, position_weight, time_weight, divisor=divisor, scale=scale, deterministic=deterministic
        )

    def reference(q, k, v, position_weight=None, time_weight=None):
        return attention_reference(q, k, v, plan, position_weight, time_weight, number, scale, rows)

    compare(op, reference, inputs, vacuous)


DELTA_USERS = {
    "candidates": [(23, 3, 3), (70, 9, 9), (12, 1, 1)],
    "candidates-and-new-events": [(23, 7, 3), (70, 20, 2), (31, 12, 5)],
    "new-events": [(23, 1, 0), (200, 140, 0), (31, 5, 0), (40, 40, 0)],
    "some-of-the-candidates": [(40, 2, 5), (23, 6, 6)],
    "no-history": [(9, 9, 9), (30, 4, 2), (6, 2, 6)],
    "empty-users": [(12, 0, 0), (20, 3, 3), (0, 0, 0), (21, 2, 2), (5, 0, 2)],
}
"""Keys, query rows and targets of each user."""


def make_delta(users, heads=1, qk=8, v=8, dtype=torch.float32, position=1, time=1, offsets_dtype=torch.int64, seed=0,
               mask=None, power_law=False, one_request_time=False):  # fmt: skip
    """Inputs by name and the plan of a random batch in the delta form, over a cache whose spare room holds NaN."""
    g = torch.Generator().manual_seed(seed)
    lengths, queries, targets = torch.tensor(users).T
    room = lengths + 3
    starts = room.flip(0).cumsum(0).flip(0) - room  # the last user lies first
    total_keys, total, longest = int(room.sum()), int(queries.sum()), int(lengths.max())
    owned = torch.cat([start + torch.arange(n) for start, n in zip(starts.tolist(), lengths.tolist(), strict=True)])
    key_time = torch.zeros(total_keys, dtype=torch.int64)
    key_time[owned] = (torch.rand(owned.shape, generator=g) * 1e6).long().cumsum(0)
    asked_at = int(key_time.max()) + torch.randint(0, 1 if one_request_time else 10**5, (total,), generator=g)
    inputs = {"q": torch.randn(total, heads, qk, generator=g)}
    for name, width in (("k", qk), ("v", v)):
        inputs[name] = torch.full((total_keys, heads, width), float("nan"))
        inputs[name][owned] = torch.randn(len(owned), heads, width, generator=g)
    if position:
        inputs["position_weight"] = torch.randn(position, 2 * longest + 5, generator=g)
    kind = PowerLaw() if power_law else BUCKETS
    if time:
        inputs["time_weight"] = torch.randn(time, kind.num_weights, generator=g) * (0.1 if power_law else 1.0)
    plan = make_plan(
        torch.tensor([0, *queries]).cumsum(0).to(offsets_dtype), longest, asked_at, key_time, kind, mask=mask or Mask(),
        num_targets=targets.to(offsets_dtype), key_starts=starts.to(offsets_dtype),
        key_lengths=lengths.to(offsets_dtype), max_query_len=int(queries.max()), count_rows=True,
    )  # fmt: skip
    return {n: x.to(dtype) for n, x in inputs.items()}, plan
