"""The mask rule of the attention: truth tables, refused combinations, the CPU path under every mask, divisors.

Legend: L query rows in all, H heads.
"""

import math

import pytest
import torch

from kernels.attention import Mask, PowerLaw, TimeBuckets, attention, make_plan
from kernels.attention.reference import attention_reference, visible
from tests.kernels.attention_cases import MASKS, compare_attention, make


def table(length, num_targets, mask):
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    seen = visible(i, j, length, length - num_targets, mask)
    return ["".join("x" if s else "." for s in row) for row in seen.tolist()]


TRUTH = {
    "causal": (4, 0, Mask(), ["x...", "xx..", "xxx.", "xxxx"]),
    "full": (3, 0, Mask(causal=False), ["xxx", "xxx", "xxx"]),
    "two-targets": (5, 2, Mask(), ["x....", "xx...", "xxx..", "xxxx.", "xxx.x"]),
    "full-with-target": (4, 1, Mask(causal=False), ["xxx.", "xxx.", "xxx.", "xxxx"]),
    "only-targets": (3, 3, Mask(), ["x..", ".x.", "..x"]),
    "prefix": (5, 0, Mask(contextual=2), ["xxxxx", "xxxxx", "xxx..", "xxxx.", "xxxxx"]),
    "prefix-and-target": (5, 1, Mask(contextual=1), ["xxxx.", "xx...", "xxx..", "xxxx.", "xxxxx"]),
    "window": (5, 0, Mask(window=2), ["x....", "xx...", ".xx..", "..xx.", "...xx"]),
    "window-both-sides": (4, 0, Mask(causal=False, window=2), ["xx..", "xxx.", ".xxx", "..xx"]),
    # A target stands right after the history: with a window of 2 it sees the last history row and itself.
    "window-and-targets": (6, 2, Mask(window=2), ["x.....", "xx....", ".xx...", "..xx..", "...xx.", "...x.x"]),
    "semi-local": (5, 0, Mask(window=2, full_rows=1), ["x....", "xx...", ".xx..", "..xx.", "xxxxx"]),
    "semi-local-target": (5, 1, Mask(window=1, full_rows=1), ["x....", ".x...", "..x..", "xxxx.", "xxxxx"]),
    "window-and-prefix": (5, 0, Mask(window=1, contextual=1), ["xxxxx", "xx...", "x.x..", "x..x.", "x...x"]),
    "prefix-longer-than-history": (3, 1, Mask(contextual=9), ["xx.", "xx.", "xxx"]),
    "nobody": (0, 0, Mask(), []),
}


@pytest.mark.parametrize("length, num_targets, mask, expected", TRUTH.values(), ids=TRUTH)
def test_truth_table(length, num_targets, mask, expected):
    assert table(length, num_targets, mask) == expected


@pytest.mark.parametrize("num_targets", [0, 3], ids=["no-targets", "targets"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_row_counts_are_what_the_mask_shows(mask, num_targets):
    lengths = [9, 3, 0, 17, 4]
    targets = torch.tensor([min(num_targets, n) for n in lengths])
    plan = make_plan(torch.tensor([0, *lengths]).cumsum(0), 17, mask=mask, num_targets=targets, count_rows=True)
    expected = []
    for n, m in zip(lengths, targets.tolist(), strict=True):
        expected += [max(row.count("x"), 1) for row in table(n, m, mask)]
    assert plan.row_counts.tolist() == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"full_rows": 2}, "full_rows=2 without a window"),
        ({"causal": False, "contextual": 2}, "contextual=2 without causality or window"),
        ({"window": -1}, "window=-1"),
        ({"contextual": -3}, "contextual=-3"),
    ],
)
def test_masks_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Mask(**arguments)


# CPU path against the reference


@pytest.mark.parametrize("num_targets", [0, 2], ids=["no-targets", "targets"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_cpu_path_matches_reference(mask, num_targets):
    compare_attention(*make([23, 70, 0, 5], heads=2, mask=mask, num_targets=num_targets))


@pytest.mark.parametrize("tables", [(2, 2), (2, 0), (0, 2)], ids=str)
def test_cpu_path_with_targets_and_tables_per_head(tables):
    compare_attention(*make([23, 5, 66], heads=2, position=tables[0], time=tables[1], num_targets=3))


@pytest.mark.parametrize("heads", [1, 2], ids=["shared", "per-head"])
def test_power_law_matches_reference(heads):
    compare_attention(*make([23, 5, 66], heads=2, time=heads, power_law=True))


def test_power_law_worked_by_hand():
    # One user, two events at 0 s and 10 s, asked for at their own time. Event 1 sees event 0 over a gap of 10 s.
    plan = make_plan(torch.tensor([0, 2]), 2, torch.tensor([0, 10]), torch.tensor([0, 10]), PowerLaw())
    q = k = torch.zeros(2, 1, 1)
    v = torch.tensor([1.0, 0.0]).view(2, 1, 1)
    out = attention(q, k, v, plan, None, torch.tensor([[0.5, 2.0]]), divisor=1.0)
    score = -0.5 * math.log(11.0) + 2.0
    assert out[1].item() == pytest.approx(score / (1 + math.exp(-score)), rel=1e-6)


@pytest.mark.parametrize("divisor", ["max_len", "row_count"])
def test_divisors_match_reference(divisor):
    compare_attention(*make([23, 5, 66], heads=2, num_targets=2, mask=Mask(window=7)), divisor=divisor)


def test_row_count_divisor_worked_by_hand():
    plan = make_plan(torch.tensor([0, 3]), 3, count_rows=True)
    q = k = torch.ones(3, 1, 1)
    out = attention(q, k, torch.ones(3, 1, 1), plan, divisor="row_count")
    silu = 1 / (1 + math.exp(-1))
    assert out.view(-1).tolist() == pytest.approx([silu] * 3, rel=1e-6)


def test_targets_score_as_if_each_were_alone():
    """M-FALCON: candidates side by side get the outputs that each gets as the only one."""
    inputs, plan = make([12], num_targets=4)
    together = attention(**inputs, plan=plan, divisor=9.0)
    for target in range(8, 12):
        rows = torch.tensor([*range(8), target])
        alone = make_plan(
            torch.tensor([0, 9]), 12, plan.query_time[rows], plan.key_time[rows], plan.time_buckets,
            num_targets=torch.tensor([1]),
        )  # fmt: skip
        part = {n: x[rows] if n in "qkv" else x for n, x in inputs.items()}
        torch.testing.assert_close(attention(**part, plan=alone, divisor=9.0)[8], together[target])


def test_delta_form_equals_the_last_rows_of_the_whole():
    inputs, plan, cached = delta_case()
    whole = attention(**inputs, plan=plan, divisor=9.0)
    q_rows, k, v, delta = cached
    got = attention(inputs["q"][q_rows], k, v, delta, inputs["position_weight"], inputs["time_weight"], divisor=9.0)
    torch.testing.assert_close(got, whole[q_rows])


def delta_case():
    """A whole batch and its last rows as queries over a cache with room to spare."""
    lengths, new, room = [12, 7, 9], [4, 0, 9], 15
    inputs, plan = make(lengths, heads=2, num_targets=3)
    starts = torch.arange(3) * room
    key_rows = torch.cat([start + torch.arange(n) for start, n in zip(starts.tolist(), lengths, strict=True)])
    k, v = (torch.full((3 * room, *inputs[n].shape[1:]), float("nan")) for n in "kv")
    k[key_rows], v[key_rows] = inputs["k"], inputs["v"]
    key_time = torch.zeros(3 * room, dtype=torch.int64)
    key_time[key_rows] = plan.key_time
    ends = torch.tensor(lengths).cumsum(0)
    q_rows = torch.cat([torch.arange(e - m, e) for e, m in zip(ends.tolist(), new, strict=True)])
    delta = make_plan(
        torch.tensor([0, *new]).cumsum(0), 12, plan.query_time[q_rows], key_time, TimeBuckets(),
        num_targets=plan.num_targets, key_starts=starts, key_lengths=torch.tensor(lengths), max_query_len=9,
    )  # fmt: skip
    return inputs, plan, (q_rows, k, v, delta)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_targets": torch.tensor([1, 9])}, "num_targets: expected 0"),
        ({"num_targets": torch.tensor([1])}, r"num_targets: expected \[2\]"),
        ({"num_targets": torch.tensor([1.0, 1.0])}, "num_targets: expected"),
        ({"key_starts": torch.tensor([0, 5])}, "give both or none"),
        ({"key_starts": torch.tensor([0, 5]), "key_lengths": torch.tensor([4, 2])}, "fewer keys than query rows"),
        ({"max_len": 2}, "max_len=2: the longest user has 5 rows"),
        ({"max_query_len": 3}, "max_query_len=3: the longest user has 5 query rows"),
    ],
    ids=["too-many", "shape", "dtype", "half-a-cache", "cache-too-short", "max-len", "max-query-len"],
)
def test_plan_refuses_lengths_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_plan(torch.tensor([0, 5, 8]), **{"max_len": 5, **arguments})


@pytest.mark.parametrize("divisor", ["rows", 0.0, -1.0], ids=str)
def test_unknown_divisors_are_refused(divisor):
    inputs, plan = make([3])
    with pytest.raises(ValueError, match="divisor"):
        attention(**inputs, plan=plan, divisor=divisor)


def test_row_count_divisor_needs_counts():
    inputs, _ = make([3])
    with pytest.raises(ValueError, match="count_rows=True"):
        attention(inputs["q"], inputs["k"], inputs["v"], make_plan(torch.tensor([0, 3]), 3), divisor="row_count")


def test_gradcheck_with_targets_prefix_and_power_law():
    inputs, plan = make([4, 6], qk=3, v=2, dtype=torch.float64, power_law=True, num_targets=2, mask=Mask(contextual=1))
    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: attention(*x[:3], plan, *x[3:], divisor=4.0), leaves)


def test_reference_takes_the_delta_form_gradient():
    inputs, _, (q_rows, k, v, delta) = delta_case()
    k, v = k.nan_to_num().requires_grad_(), v.nan_to_num().requires_grad_()
    attention_reference(inputs["q"][q_rows], k, v, delta, None, None, 9.0).sum().backward()
    assert (k.grad[12:15] == 0).all() and (v.grad[12:15] == 0).all()  # room that no user has filled
    assert (v.grad[:9] != 0).any()
