"""attention on Triton: the launchers against the reference, interpreted without a GPU, compiled with one.

Legend: L query rows in all, H heads, A query/key width, V value width. Interpreted tiles are 16 x 32.
"""

from dataclasses import replace

import pytest
import torch

from kernels._backend import set_backend
from kernels.attention import Mask, TimeBuckets, attention, make_plan
from kernels.attention.reference import attention_reference
from tests.kernels import attention_cases
from tests.kernels.attention_cases import BUCKETS, MASKS, compare_attention
from tests.kernels.test_attention_masks import delta_case
from tests.oracle import compare

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
COARSE = TimeBuckets(16, 1.4)
"""Fewer, wider buckets than published: the interpreter is slow."""
BFLOAT16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)


@pytest.fixture(autouse=True)
def triton_backend(auto_backend):
    set_backend("triton")


def make(*arguments, buckets=COARSE, **options):
    return attention_cases.make(*arguments, buckets=buckets, device=DEVICE, **options)


LENGTHS = {
    "one-event": [1],
    "empty-users": [0, 5, 0, 2, 0],
    "block-edges": [15, 16, 17, 31, 32, 33],
    "primes": [53, 2, 37],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BFLOAT16], ids=str)
def test_matches_reference_over_lengths(lengths, dtype):
    compare_attention(*make(lengths, dtype=dtype))


@pytest.mark.parametrize("tables", [(0, 0), (1, 0), (0, 1), (2, 2), (1, 2)], ids=str)
def test_matches_reference_over_bias_kinds(tables):
    compare_attention(*make([17, 35, 3], heads=2, position=tables[0], time=tables[1]))


@pytest.mark.parametrize("heads, qk, v", [(1, 8, 25), (2, 25, 8), (1, 50, 50), (1, 7, 40)])
def test_matches_reference_over_widths(heads, qk, v):
    compare_attention(*make([23, 34, 1], heads, qk, v), scale=qk**-0.5)


@pytest.mark.parametrize("num_targets", [0, 3], ids=["no-targets", "targets"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_matches_reference_over_masks(mask, num_targets):
    compare_attention(*make([35, 0, 2, 19], mask=mask, num_targets=num_targets))


def test_more_targets_than_a_block_and_users_that_are_only_targets():
    compare_attention(*make([60, 19], num_targets=40))


def test_published_buckets():
    compare_attention(*make([34, 5], buckets=BUCKETS))


@pytest.mark.parametrize("deterministic", [False, True], ids=["any", "fixed"])
def test_both_orders_of_the_table_gradients(deterministic):
    inputs, plan = make([36, 9], heads=2, num_targets=2)
    compare_attention(inputs, plan, deterministic=deterministic)


def test_deterministic_backward_is_bit_equal_over_runs():
    inputs, plan = make([20, 19, 3], heads=2)
    runs = []
    for _ in range(2):
        leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
        attention(**leaves, plan=plan, divisor=9.0, deterministic=True).square().sum().backward()
        runs.append([x.grad for x in leaves.values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("heads", [1, 2], ids=["shared", "per-head"])
def test_power_law(heads):
    compare_attention(*make([23, 5, 36], heads=2, time=heads, power_law=True))


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=False)], ids=["causal", "full"])
def test_times_in_no_order_and_gaps_beyond_68_years(mask):
    inputs, plan = make([23, 36], sorted_times=False, mask=mask)
    key_time = plan.key_time.clone()
    key_time[3] -= 2**40
    plan = make_plan(plan.offsets, plan.max_len, plan.query_time, key_time, plan.time_buckets, mask=mask)
    compare_attention(inputs, plan)


@pytest.mark.parametrize("divisor", ["max_len", "row_count"])
def test_divisors(divisor):
    compare_attention(*make([23, 5, 36], num_targets=2), divisor=divisor)


def test_int32_offsets_and_strided_views_of_a_fused_projection():
    inputs, plan = make([18, 7], heads=2, offsets_dtype=torch.int32)
    fused = torch.cat([inputs[n].flatten(1) for n in "vqk"], dim=1)  # [L, 3 * 16]
    v, q, k = (part.unflatten(1, (2, 8)) for part in fused.split(16, dim=1))
    assert not q.is_contiguous()
    compare_attention({**inputs, "q": q, "k": k, "v": v}, plan)


def test_inputs_whose_last_dimension_is_strided():
    inputs, plan = make([18, 7], heads=2)
    turned = inputs["q"].transpose(1, 2).contiguous().transpose(1, 2)
    assert turned.stride(-1) != 1
    compare_attention({**inputs, "q": turned}, plan)


def test_delta_form():
    inputs, _, (q_rows, k, v, delta) = delta_case()
    # Rows of the cache that no user has filled hold NaN: nothing of them may be read.
    tables = {n: inputs[n] for n in ("position_weight", "time_weight")}
    clean = {"q": inputs["q"][q_rows], "k": k.nan_to_num(), "v": v.nan_to_num(), **tables}

    def op(q, k, v, position_weight, time_weight):
        return attention(q, k, v, delta, position_weight, time_weight, divisor=9.0)

    def reference(q, k, v, position_weight, time_weight):
        return attention_reference(q, k, v, delta, position_weight, time_weight, 9.0)

    compare(op, reference, clean)
    with_nan = op(inputs["q"][q_rows], k, v, *tables.values())
    assert torch.equal(with_nan, op(*clean.values()))


def test_delta_form_with_counts_that_are_columns_of_a_table():
    inputs, _, (q_rows, k, v, delta) = delta_case()
    columns = ("offsets", "key_starts", "key_lengths", "num_targets")
    strided = {name: torch.stack([getattr(delta, name)] * 3, dim=1)[:, 1] for name in columns}
    assert all(x.stride() == (3,) for x in strided.values())
    found, expected = (
        attention(inputs["q"][q_rows], k, v, plan, divisor=9.0) for plan in (replace(delta, **strided), delta)
    )
    assert torch.equal(found, expected)


def test_empty_batch_and_no_users():
    inputs, plan = make([0, 0])
    leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    out = attention(**leaves, plan=plan, divisor=1.0)
    assert out.shape == (0, 1, 8)
    out.sum().backward()
    assert leaves["position_weight"].grad.abs().sum() == 0
    nobody = make_plan(torch.zeros(1, dtype=torch.int64, device=DEVICE), 0)
    assert attention(*[inputs[n] for n in "qkv"], nobody, divisor=1.0).shape == (0, 1, 8)


def test_compiles_without_graph_breaks():
    inputs, plan = make([9, 7], time=1)
    compiled = torch.compile(lambda **x: attention(**x, plan=plan, divisor=9.0), fullgraph=True, backend="aot_eager")
    leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    again = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    got, expected = compiled(**leaves), attention(**again, plan=plan, divisor=9.0)
    assert torch.equal(got, expected)
    got.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(leaves["time_weight"].grad, again["time_weight"].grad)


def test_opcheck():
    inputs, plan = make([5, 7])
    leaves = {n: x.requires_grad_() for n, x in inputs.items()}
    arguments = (
        leaves["q"], leaves["k"], leaves["v"], plan.offsets, plan.order, None, None, None, plan.query_age, plan.key_age,
        plan.thresholds, None, leaves["position_weight"], leaves["time_weight"], 7, 7, [1, 0, 0, 0], 1, 0.301, 9.0, 1.0,
        False,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.hstu.attention_triton.default, arguments)


def test_a_plan_made_for_torch_is_refused():
    set_backend("torch")
    inputs, plan = make([5])
    set_backend("triton")
    with pytest.raises(ValueError, match="made while kernels.backend was torch"):
        attention(**inputs, plan=plan, divisor=9.0)


def test_widths_beyond_256_are_refused():
    plan = make_plan(torch.tensor([0, 1], device=DEVICE), 1)
    q = torch.zeros(1, 1, 257, device=DEVICE)
    with pytest.raises(ValueError, match="takes 1 to 256"):
        attention(q, q, q, plan, divisor=9.0)


def test_float64_is_refused_where_triton_is_asked_for():
    inputs, plan = make([5], dtype=torch.float64)
    with pytest.raises(ValueError, match="float64"):
        attention(**inputs, plan=plan, divisor=9.0)
