"""attention: hand-worked numbers, reference, gradients, compile, errors.

Legend: B users, L total events, N padded length, H heads, A query/key width, V value width.
"""

import math

import pytest
import torch

from kernels.attention import TimeBuckets, attention, make_plan
from kernels.attention.layout import ROW_BLOCK, groups
from kernels.attention.times import MAX_GAP_S
from tests.kernels.attention_cases import BUCKETS, make
from tests.kernels.attention_cases import compare_attention as against


def silu(x):
    return x / (1 + math.exp(-x))


# Hand-worked numbers


def test_two_events_worked_by_hand():
    # N = 2, so w_pos = [w(-1), w(0), w(+1)] by j - i. Gaps: event 0 asks at 7 s of events at 5 s -> 2 s -> bucket 2;
    # event 1 asks at 7 s: 2 s to event 0 -> bucket 2, 0 s to event 1 -> bucket 0.
    one = [1.0, 2.0]
    q = k = v = torch.tensor(one).view(2, 1, 1)
    buckets = TimeBuckets(4, 0.301)
    plan = make_plan(torch.tensor([0, 2]), 2, torch.tensor([7, 7]), torch.tensor([5, 7]), buckets)
    position, time = torch.tensor([[0.1, 0.2, 9.0]]), torch.tensor([[0.5, 9.0, -0.25, 9.0]])
    got = attention(q, k, v, plan, position, time, divisor=2.0)
    first = silu(1 * 1 + 0.2 - 0.25) / 2 * 1
    second = (silu(2 * 1 + 0.1 - 0.25) * 1 + silu(2 * 2 + 0.2 + 0.5) * 2) / 2
    assert got.view(-1).tolist() == pytest.approx([first, second], rel=1e-6)


def test_users_do_not_see_each_other_and_no_event_sees_a_later_one():
    inputs, plan = make([3, 4], position=0, time=0)
    base = attention(**inputs, plan=plan, divisor=7.0)
    changed = {n: x.clone() for n, x in inputs.items()}
    changed["k"][5:] += 1.0
    changed["v"][5:] -= 1.0
    after = attention(**changed, plan=plan, divisor=7.0)
    assert torch.equal(base[:5], after[:5])
    assert (base[5:] != after[5:]).any(dim=-1).all()


def test_published_buckets_and_thresholds():
    gaps = torch.tensor([0, 1, -1, 2, 3, 20, 21, 27, 28, 86_400, 10**12])
    expected = [min(128, math.floor(math.log(min(max(1, abs(g)), MAX_GAP_S)) / 0.301)) for g in gaps.tolist()]
    assert BUCKETS.of(gaps).tolist() == expected
    assert TimeBuckets(10).of(torch.tensor([10**9, 0])).tolist() == [9, 0]
    thresholds = BUCKETS.thresholds()
    assert thresholds[0] == 0 and thresholds[-1] == MAX_GAP_S + 1 and len(thresholds) == BUCKETS.count + 1
    near = (thresholds.long()[:, None] + torch.arange(-2, 3)).clamp(min=0, max=MAX_GAP_S).view(-1)
    near = torch.cat([near, torch.arange(100_000)])
    assert torch.equal(BUCKETS.of(near).long(), torch.bucketize(near, thresholds, right=True) - 1)


# Against the reference: outputs and every gradient

LENGTHS = {
    "one-event": [1],
    "empty-users": [0, 5, 0, 0, 2, 0],
    "block-edges": [ROW_BLOCK - 1, ROW_BLOCK, ROW_BLOCK + 1, 2 * ROW_BLOCK, 2 * ROW_BLOCK + 1],
    "primes": [97, 2, 31, 13, 131],
    "equal": [9] * 20,
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_matches_reference_over_lengths(lengths):
    against(*make(lengths), vacuous=("gradient of position_weight",) if max(lengths) == 0 else ())


@pytest.mark.parametrize("tables", [(0, 0), (1, 0), (0, 1), (1, 1), (2, 2), (1, 2)], ids=str)
def test_matches_reference_over_bias_kinds(tables):
    against(*make([17, 70, 3], heads=2, position=tables[0], time=tables[1]))


@pytest.mark.parametrize("heads, qk, v", [(1, 8, 25), (2, 25, 8), (3, 50, 50), (1, 7, 128)])
def test_matches_reference_over_widths(heads, qk, v):
    against(*make([23, 65, 1], heads, qk, v), scale=qk**-0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_matches_reference_over_dtypes(dtype):
    against(*make([40, 7, 66], heads=2, dtype=dtype))


def test_int32_offsets_and_strided_views_of_a_fused_projection():
    inputs, plan = make([40, 7], heads=2, offsets_dtype=torch.int32)
    fused = torch.cat([inputs[n].flatten(1) for n in "vqk"], dim=1)  # [L, 3 * 16]
    v, q, k = (part.unflatten(1, (2, 8)) for part in fused.split(16, dim=1))
    assert not q.is_contiguous()
    against({**inputs, "q": q, "k": k, "v": v}, plan)


def test_empty_batch():
    inputs, plan = make([0, 0])
    assert attention(**inputs, plan=plan, divisor=1.0).shape == (0, 1, 8)


def test_gradcheck():
    inputs, plan = make([3, 5], qk=3, v=2, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: attention(*x[:3], plan, *x[3:], divisor=4.0), leaves)


def test_two_backwards_are_bit_equal():
    inputs, plan = make([40, 7, 66], heads=2)
    runs = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        attention(*leaves[:3], plan, *leaves[3:], divisor=9.0).square().sum().backward()
        runs.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_compiles_without_graph_breaks():
    inputs, plan = make([40, 7])
    compiled = torch.compile(lambda **x: attention(**x, plan=plan, divisor=9.0), fullgraph=True, backend="aot_eager")
    leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    again = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    got, expected = compiled(**leaves), attention(**again, plan=plan, divisor=9.0)
    assert torch.equal(got, expected)
    got.sum().backward()
    expected.sum().backward()
    assert torch.equal(leaves["time_weight"].grad, again["time_weight"].grad)


def test_opcheck():
    inputs, plan = make([5, 7])
    leaves = {n: x.requires_grad_() for n, x in inputs.items()}
    arguments = (leaves["q"], leaves["k"], leaves["v"], plan.schedule, plan.rows, plan.slots, plan.buckets,
                 None, None, None, leaves["position_weight"], leaves["time_weight"], 9.0, 1.0, False)  # fmt: skip
    torch.library.opcheck(torch.ops.hstu.attention.default, arguments)


# The plan


def test_plan_places_every_row_once_and_bounds_padding():
    lengths = torch.randint(0, 200, (128,), generator=torch.Generator().manual_seed(0)).tolist()
    _, plan = make(lengths)
    slots = torch.arange(sum(lengths))
    assert torch.equal(plan.rows[plan.slots], slots)
    padded = sum(g.num_users * g.length for g in groups(plan.schedule))
    assert sum(lengths) <= padded <= 1.12 * sum(lengths)


# Errors


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.zeros(12, 1, 4)}, "q and k"),
        ({"v": torch.zeros(11, 1, 8)}, "v: expected"),
        ({"v": torch.zeros(12, 1, 8, dtype=torch.float64)}, "one floating dtype"),
        ({"position_weight": torch.zeros(1, 12)}, "position_weight"),
        ({"position_weight": torch.zeros(1, 5)}, "position_weight"),
        ({"position_weight": torch.zeros(2, 19)}, "position_weight"),
        ({"time_weight": torch.zeros(1, 128)}, "time_weight"),
        ({"divisor": 0.0}, "divisor"),
    ],
    ids=["k", "v-rows", "v-dtype", "even-table", "short-table", "table-heads", "buckets", "divisor"],
)
def test_wrong_arguments_are_named(change, message):
    inputs, plan = make([7, 5])
    with pytest.raises(ValueError, match=message):
        attention(**{"divisor": 5.0, **inputs, **change}, plan=plan)


def test_time_table_needs_times_in_the_plan():
    inputs, plan = make([7, 5])
    with pytest.raises(ValueError, match="holds no times"):
        attention(**inputs, plan=make_plan(plan.offsets, 7), divisor=5.0)


def test_plan_refuses_half_given_times_and_wrong_offsets():
    with pytest.raises(ValueError, match="all three or none"):
        make_plan(torch.tensor([0, 2]), 2, query_time=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="offsets"):
        make_plan(torch.tensor([0.0, 2.0]), 2)
