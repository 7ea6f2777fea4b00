"""The delta form of the attention on the CPU: a few query rows against a long cached history.

Legend: L query rows in all, H heads.
"""

import math

import pytest
import torch

from kernels.attention import Mask, TimeBuckets, attention, cpu_delta, layout_delta, make_plan
from kernels.attention.layout_delta import TABLE_PAIRS, delta_groups
from tests.kernels.attention_cases import DELTA_USERS, MASKS, compare_attention, make_delta

MIXED = DELTA_USERS["candidates-and-new-events"]


def silu(x):
    return x / (1 + math.exp(-x))


def test_a_candidate_and_a_new_event_worked_by_hand():
    # Cache rows 1 and 2 are the history, row 3 the candidate; row 0 is spare. The queries are history row 2 and the
    # candidate, which stands right after the history: j - i is -2, -1 for rows 1, 2 and 0 for itself.
    # All ask at 7 s: gaps of 2 s, 0 s, 0 s, buckets 2, 0, 0.
    k = v = torch.tensor([float("nan"), 1.0, 2.0, 3.0]).view(4, 1, 1)
    q = torch.tensor([0.5, 1.0]).view(2, 1, 1)
    plan = make_plan(
        torch.tensor([0, 2]), 3, torch.tensor([7, 7]), torch.tensor([0, 5, 7, 7]), TimeBuckets(4),
        num_targets=torch.tensor([1]), key_starts=torch.tensor([1]), key_lengths=torch.tensor([3]), max_query_len=2,
    )  # fmt: skip
    position, time = torch.tensor([[0.1, 0.2, 0.3, 9.0, 9.0]]), torch.tensor([[0.5, 9.0, -0.25, 9.0]])
    out = attention(q, k, v, plan, position, time, divisor=2.0)
    event = silu(0.5 * 1 + 0.2 - 0.25) * 1 + silu(0.5 * 2 + 0.3 + 0.5) * 2
    candidate = silu(1 + 0.1 - 0.25) * 1 + silu(2 + 0.2 + 0.5) * 2 + silu(3 + 0.3 + 0.5) * 3
    assert out.view(-1).tolist() == pytest.approx([event / 2, candidate / 2], rel=1e-6)


# Against the reference: outputs and every gradient. Spare rows of the cache hold NaN.


@pytest.mark.parametrize("users", DELTA_USERS.values(), ids=DELTA_USERS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_matches_reference_over_masks(mask, users):
    compare_attention(*make_delta(users, heads=2, mask=mask))


@pytest.mark.parametrize("one_request_time", [False, True], ids=["times-differ", "one-time"])
@pytest.mark.parametrize("tables", [(0, 0), (1, 0), (0, 1), (2, 2), (1, 2)], ids=str)
def test_matches_reference_over_bias_kinds(tables, one_request_time):
    compare_attention(
        *make_delta(MIXED, heads=2, position=tables[0], time=tables[1], one_request_time=one_request_time)
    )


@pytest.mark.parametrize("one_request_time", [False, True], ids=["times-differ", "one-time"])
@pytest.mark.parametrize("heads", [1, 2], ids=["shared", "per-head"])
def test_power_law_matches_reference(heads, one_request_time):
    compare_attention(*make_delta(MIXED, heads=2, time=heads, power_law=True, one_request_time=one_request_time))


@pytest.mark.parametrize("heads, qk, v", [(1, 8, 25), (2, 25, 8), (3, 50, 50)])
def test_matches_reference_over_widths(heads, qk, v):
    compare_attention(*make_delta(MIXED, heads, qk, v), scale=qk**-0.5)


@pytest.mark.parametrize("users", [MIXED, [(70, 9, 4)]], ids=["gathered", "in-place"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_matches_reference_over_dtypes(dtype, users):
    compare_attention(*make_delta(users, heads=2, dtype=dtype))


@pytest.mark.parametrize("divisor", ["max_len", "row_count"])
def test_divisors_match_reference(divisor):
    compare_attention(*make_delta(MIXED, heads=2, mask=Mask(window=7)), divisor=divisor)


@pytest.mark.parametrize("users", [MIXED, [(70, 9, 4)]], ids=["gathered", "in-place"])
def test_int32_offsets_and_strided_caches(users):
    inputs, plan = make_delta(users, heads=2, offsets_dtype=torch.int32)
    cache = torch.stack([inputs["k"], inputs["v"]], dim=2)  # [K, H, 2, 8]
    strided = {**inputs, "k": cache[:, :, 0], "v": cache[:, :, 1], "q": inputs["q"].mT.contiguous().mT}
    assert not any(strided[name].is_contiguous() for name in "qkv")
    compare_attention(strided, plan)


@pytest.mark.parametrize("one_request_time", [False, True], ids=["times-differ", "one-time"])
@pytest.mark.parametrize("mask", [Mask(), Mask(window=20, contextual=3)], ids=["causal", "window-and-prefix"])
def test_small_blocks_match_reference(mask, one_request_time, monkeypatch):
    for name, size in (("ROW_BLOCK", 4), ("MIN_KEYS", 8), ("BLOCK_SCORES", 64), ("SELF_ROWS", 2)):
        monkeypatch.setattr(cpu_delta, name, size)
    compare_attention(*make_delta(MIXED, heads=2, mask=mask, one_request_time=one_request_time))


@pytest.mark.parametrize("power_law", [False, True], ids=["buckets", "power-law"])
@pytest.mark.parametrize("room", [0, 40], ids=["none-kept", "some-kept"])
def test_buckets_that_the_plan_does_not_keep_are_made_per_block(room, power_law, monkeypatch):
    monkeypatch.setattr(layout_delta, "TABLE_PAIRS", room)
    inputs, plan = make_delta([*MIXED, (11, 2, 0)], heads=2, power_law=power_law)
    assert (plan.delta.schedule[:, 4] == 0).any() and bool((plan.delta.schedule[:, 4] > 0).any()) == (room > 0)
    compare_attention(inputs, plan)


def test_users_may_share_cached_rows():
    inputs, plan = make_delta([(30, 4, 2), (30, 3, 3)], heads=2)
    starts = plan.key_starts[:1].repeat(2)
    shared = make_plan(
        plan.offsets, 30, plan.query_time, plan.key_time, plan.time_buckets, num_targets=plan.num_targets,
        key_starts=starts, key_lengths=plan.key_lengths, max_query_len=4,
    )  # fmt: skip
    compare_attention(inputs, shared)


def test_candidates_score_as_if_each_were_alone():
    inputs, plan = make_delta([(40, 6, 6)], heads=2)
    together = attention(**inputs, plan=plan, divisor=9.0)
    for candidate in range(6):
        rows = torch.tensor([*range(34), 34 + candidate])
        alone = make_plan(
            torch.tensor([0, 1]), 40, plan.query_time[candidate : candidate + 1], plan.key_time[rows],
            plan.time_buckets, num_targets=torch.tensor([1]), key_starts=torch.tensor([0]),
            key_lengths=torch.tensor([35]), max_query_len=1,
        )  # fmt: skip
        part = {**inputs, "q": inputs["q"][candidate : candidate + 1], "k": inputs["k"][rows], "v": inputs["v"][rows]}
        torch.testing.assert_close(attention(**part, plan=alone, divisor=9.0)[0], together[candidate])


def test_batch_without_queries():
    inputs, plan = make_delta([(5, 0, 0), (3, 0, 0)])
    leaves = {n: x.requires_grad_() for n, x in inputs.items()}
    out = attention(**leaves, plan=plan, divisor=1.0)
    out.sum().backward()
    assert out.shape == (0, 1, 8) and (leaves["k"].grad == 0).all()


def test_gradcheck():
    inputs, plan = make_delta([(6, 3, 2), (5, 2, 0)], qk=3, v=2, dtype=torch.float64, mask=Mask(contextual=1))
    leaves = [x.nan_to_num().requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: attention(*x[:3], plan, *x[3:], divisor=4.0), leaves)


def test_two_backwards_are_bit_equal():
    inputs, plan = make_delta(MIXED, heads=2)
    runs = []
    for _ in range(2):
        leaves = [x.nan_to_num().requires_grad_() for x in inputs.values()]
        attention(*leaves[:3], plan, *leaves[3:], divisor=9.0).square().sum().backward()
        runs.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_compiles_without_graph_breaks():
    inputs, plan = make_delta(MIXED, heads=2)
    compiled = torch.compile(lambda **x: attention(**x, plan=plan, divisor=9.0), fullgraph=True, backend="aot_eager")
    leaves = {n: x.nan_to_num().requires_grad_() for n, x in inputs.items()}
    again = {n: x.detach().clone().requires_grad_() for n, x in leaves.items()}
    got, expected = compiled(**leaves), attention(**again, plan=plan, divisor=9.0)
    assert torch.equal(got, expected)
    got.sum().backward()
    expected.sum().backward()
    assert torch.equal(leaves["k"].grad, again["k"].grad)


def test_opcheck():
    inputs, plan = make_delta([(8, 3, 2), (7, 2, 0)])
    leaves, delta = {n: x.nan_to_num().requires_grad_() for n, x in inputs.items()}, plan.delta
    arguments = (
        leaves["q"], leaves["k"], leaves["v"], delta.schedule, delta.units, delta.query_rows, delta.key_rows,
        delta.targets, delta.buckets, plan.query_time, plan.key_time, None, leaves["position_weight"],
        leaves["time_weight"], [129.0, 0.301], [1, 0, 0, 0], 9.0, 1.0,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.hstu.attention_delta.default, arguments)


# The plan


def test_every_query_row_is_in_one_unit_or_has_no_history():
    users = DELTA_USERS["no-history"] + MIXED + [(60, 5, 0), (58, 6, 0), (57, 4, 0)]
    delta = make_delta(users)[1].delta
    real = []
    for group in delta_groups(delta.schedule):
        rows = delta.query_rows[group.query_slots].view(group.num_units, group.num_rows)
        counts = delta.units[group.units, layout_delta.NUM_ROWS].tolist()
        real += [
            row for unit, count in zip(rows.tolist(), counts, strict=True) for row in unit[group.num_rows - count :]
        ]
    total, without_history = sum(m for _, m, _ in users), [*range(9), 13, 14]
    assert sorted(real) == [row for row in range(total) if row not in without_history]
    assert delta.schedule[:, 0].max() > 1  # some units share a group


@pytest.mark.parametrize("one_request_time, kept", [(True, 4096), (False, 0)], ids=["one-time", "times-differ"])
def test_plan_of_many_candidates_stays_small(one_request_time, kept):
    """2,048 candidates and 4,096 events: one group of [2048, 4096] pairs; no pairs among candidates."""
    delta = make_delta([(4096 + 2048, 2048, 2048)], one_request_time=one_request_time)[1].delta
    assert 2048 * 4096 > TABLE_PAIRS
    assert delta.schedule.tolist() == [[1, 2048, 4096, 1, int(one_request_time)]]
    assert delta.buckets.numel() == kept + 2048


def test_a_window_leaves_out_the_keys_before_it():
    delta = make_delta([(100, 8, 3)], mask=Mask(window=10))[1].delta
    # History rows 92 .. 96 see 83 .. 96; the candidates, at 97, see 88 .. 96.
    assert delta.schedule[:, :4].tolist() == [[1, 5, 14, 0], [1, 3, 9, 1]]
    assert delta.key_rows.tolist() == [*range(83, 97), *range(88, 97)]
