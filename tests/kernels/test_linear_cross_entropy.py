"""linear_cross_entropy: hand-worked numbers, reference, gradients, compile, memory bound.

Legend: L total events, D model width, V items.
"""

import math

import pytest
import torch

from kernels._common import block_rows
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from tests.oracle import compare

ONE_ROW_MIB = 1e-6
"""A bound that no row fits into: one row at a time."""


def make(length, num_items, dim, dtype=torch.float32, ids=torch.int64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "queries": torch.randn(length, dim, generator=g).to(dtype),
        "table": torch.randn(num_items + 1, dim, generator=g).to(dtype),
        "labels": torch.randint(1, num_items + 1, (length,), generator=g).to(ids),
    }


def weighted(function, weights):
    return lambda **x: (function(**x) * weights.to(x["queries"].device)).sum()


def test_equal_logits_give_log_of_the_catalogue():
    loss = linear_cross_entropy(torch.ones(2, 4), torch.ones(8, 4), torch.tensor([1, 7]))
    assert loss.tolist() == pytest.approx([math.log(7), math.log(7)])


def test_worked_example():
    # Logits of items 1, 2, 3 at temperature 0.5: 2, 4, -2; the padding row's 2000 does not count.
    table = torch.tensor([[1000.0], [1.0], [2.0], [-1.0]])
    loss = linear_cross_entropy(torch.ones(1, 1), table, torch.tensor([1]), temperature=0.5, l2_normalize=False)
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(2) + math.exp(-4))])


def test_large_logits_do_not_overflow():
    table = torch.tensor([[0.0], [1.0], [-1.0]])
    arguments = (torch.full((1, 1), 1e4), table, torch.tensor([2]))
    loss = linear_cross_entropy(*arguments, temperature=1.0, l2_normalize=False)
    total = linear_cross_entropy(*arguments, temperature=1.0, l2_normalize=False, weights=torch.ones(1))
    assert loss.item() == total.item() == 2e4


CASES = [
    pytest.param(37, 19, 10, id="L37-V19-D10"),
    pytest.param(1, 1, 8, id="one-position-one-item"),
    pytest.param(131, 1009, 50, id="L131-V1009-D50"),
    pytest.param(128, 257, 25, id="block-edge-D25"),
]


@pytest.mark.parametrize("chunk_mib", [64, ONE_ROW_MIB], ids=["one-chunk", "row-chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length, num_items, dim", CASES)
def test_op_matches_reference(length, num_items, dim, dtype, chunk_mib):
    x = make(length, num_items, dim, dtype)
    vacuous = ("output 0", "gradient of queries", "gradient of table") if num_items == 1 else ()
    op = lambda **i: linear_cross_entropy(**i, chunk_mib=chunk_mib)  # noqa: E731
    compare(op, linear_cross_entropy_reference, x, vacuous)
    weights = torch.rand(length, generator=torch.Generator().manual_seed(3))
    total = lambda **i: linear_cross_entropy(**i, chunk_mib=chunk_mib, weights=weights)  # noqa: E731
    compare(total, weighted(linear_cross_entropy_reference, weights), x, vacuous)


@pytest.mark.parametrize("normalize", [True, False])
def test_options_strides_and_int32_labels(normalize):
    x = make(31, 23, 24, ids=torch.int32)
    x["queries"] = torch.randn(31, 48, generator=torch.Generator().manual_seed(5))[:, ::2]
    x["table"] = torch.randn(24, 24, generator=torch.Generator().manual_seed(6)).T
    kwargs = {"temperature": 0.7, "l2_normalize": normalize, "eps": 0.5}
    reference = lambda **i: linear_cross_entropy_reference(**i, **kwargs)  # noqa: E731
    compare(lambda **i: linear_cross_entropy(**i, **kwargs), reference, x)
    weights = torch.linspace(0, 1, 31)
    compare(lambda **i: linear_cross_entropy(**i, **kwargs, weights=weights), weighted(reference, weights), x)


def test_gradcheck():
    x = make(5, 7, 3, torch.float64)
    q, e = x["queries"].requires_grad_(), x["table"].requires_grad_()
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q, e: linear_cross_entropy(q, e, x["labels"]), (q, e))
    assert torch.autograd.gradcheck(lambda q, e: linear_cross_entropy(q, e, x["labels"], weights=weights), (q, e))
    assert torch.autograd.gradcheck(lambda q, e: linear_cross_entropy_reference(q, e, x["labels"]), (q, e))


def test_weighted_sum_without_gradients():
    x = make(9, 7, 4)
    weights = torch.rand(9)
    expected = linear_cross_entropy(**x) @ weights
    with torch.no_grad():
        assert linear_cross_entropy(**x, weights=weights).item() == pytest.approx(expected.item())


def test_no_positions():
    x = make(0, 5, 4)
    x["table"].requires_grad_()
    loss = linear_cross_entropy(**x)
    loss.sum().backward()
    assert loss.shape == (0,) and x["table"].grad.abs().max() == 0


def test_padding_row_takes_no_part():
    x = make(20, 9, 6)
    x["table"].requires_grad_()
    for weights in (None, torch.ones(20)):
        loss = linear_cross_entropy(**x, weights=weights).sum()
        (gradient,) = torch.autograd.grad(loss, x["table"])
        assert gradient[0].abs().max() == 0 and gradient[1:].abs().min() > 0


@pytest.mark.parametrize("num_items, chunk_mib", [(100, 1), (5_000, 1), (300_000, 3), (2_000_000, 1)])
def test_blocks_stay_within_the_bound(num_items, chunk_mib):
    rows = block_rows(torch.zeros(10_000, 4), num_items, chunk_mib)
    assert rows >= 1
    assert rows == 1 or rows * num_items * 4 <= chunk_mib * 2**20


def test_opcheck():
    x = make(9, 7, 16)
    q, e = x["queries"].requires_grad_(), x["table"].requires_grad_()
    torch.library.opcheck(torch.ops.hstu.linear_cross_entropy.default, (q, e, x["labels"], 20.0, 1.0))
    torch.library.opcheck(
        torch.ops.hstu.linear_cross_entropy_sum.default, (q, e, x["labels"], torch.rand(9), 20.0, 1.0)
    )


def test_compile_fullgraph():
    x = make(21, 30, 10)
    weights = torch.rand(21, generator=torch.Generator().manual_seed(0))

    def loss(q, e):
        return linear_cross_entropy(q, e, x["labels"]).sum() + linear_cross_entropy(q, e, x["labels"], weights=weights)

    def both(f):
        q, e = x["queries"].clone().requires_grad_(), x["table"].clone().requires_grad_()
        value = f(q, e)
        return value.detach(), *torch.autograd.grad(value, (q, e))

    for a, b in zip(both(loss), both(torch.compile(loss, fullgraph=True, backend="aot_eager")), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(a.detach().abs().max()))


def test_autocast_changes_nothing():
    x = make(21, 30, 10)

    def run():
        q, e = x["queries"].clone().requires_grad_(), x["table"].clone().requires_grad_()
        loss = linear_cross_entropy(q, e, x["labels"])
        total = linear_cross_entropy(q, e, x["labels"], weights=torch.ones(21))
        return loss, total, *torch.autograd.grad(loss.sum() + total, (q, e))

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run()
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param({"queries": torch.ones(4)}, r"queries has shape \[4\]: expected \[L, D\]", id="rank"),
        pytest.param({"labels": torch.tensor([1, 2, 3])}, r"labels has shape \[3\]: expected \[4\]", id="labels"),
        pytest.param({"labels": torch.tensor([1, 2, 3, 6])}, "labels range over 1..6: expected 1..5", id="label-range"),
        pytest.param({"labels": torch.tensor([1, 2, 3, 0])}, "labels range over 0..3: expected 1..5", id="padding"),
        pytest.param({"weights": torch.ones(3)}, r"weights has shape \[3\]: expected \[4\]", id="weights"),
        pytest.param({"temperature": -1.0}, "temperature=-1.0: expected > 0", id="temperature"),
        pytest.param({"chunk_mib": 0}, "chunk_mib=0: expected > 0", id="chunk"),
    ],
)
def test_errors(change, message):
    arguments = {"queries": torch.ones(4, 3), "table": torch.ones(6, 3), "labels": torch.tensor([1, 2, 3, 4])} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)
