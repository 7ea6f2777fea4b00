"""The Triton path of linear_cross_entropy: under the interpreter on the CPU, compiled on CUDA."""

import pytest
import torch

from kernels._backend import set_backend
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from tests.kernels.test_linear_cross_entropy import make, weighted
from tests.oracle import compare

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def triton_backend(auto_backend):
    set_backend("triton")


CASES = [
    pytest.param(37, 19, 10, id="L37-V19-D10"),
    pytest.param(1, 1, 8, id="one-position-one-item"),
    pytest.param(2, 131, 50, id="items-in-many-parts-D50"),
    pytest.param(67, 15, 25, id="one-block-of-items-D25"),
    pytest.param(16, 31, 100, id="whole-blocks-D100"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length, num_items, dim", CASES)
def test_matches_reference(length, num_items, dim, dtype):
    x = make(length, num_items, dim, dtype)
    vacuous = ("output 0", "gradient of queries", "gradient of table") if num_items == 1 else ()
    compare(linear_cross_entropy, linear_cross_entropy_reference, x, vacuous)


@pytest.mark.parametrize("normalize", [True, False])
def test_options_strides_and_int32_labels(normalize):
    x = make(31, 23, 24, ids=torch.int32)
    g = torch.Generator().manual_seed(5)
    x["queries"] = torch.randn(31, 72, generator=g)[:, 24:48]
    x["table"] = torch.randn(24, 40, generator=g)[:, 8:32]
    x["table"][5] *= 1e-3  # below eps
    x["queries"][3] *= 1e-3
    kwargs = {"temperature": 0.7, "l2_normalize": normalize, "eps": 0.5}
    reference = lambda **i: linear_cross_entropy_reference(**i, **kwargs)  # noqa: E731
    compare(lambda **i: linear_cross_entropy(**i, **kwargs), reference, x)
    x["queries"] = torch.randn(31, 48, generator=g)[:, ::2]
    x["table"] = torch.randn(24, 24, generator=g).T
    weights = torch.linspace(0, 1, 31)
    compare(lambda **i: linear_cross_entropy(**i, **kwargs, weights=weights), weighted(reference, weights), x)


def test_large_logits_do_not_overflow():
    table = torch.tensor([[0.0], [1.0], [-1.0]])
    loss = linear_cross_entropy(
        torch.full((1, 1), 1e4), table, torch.tensor([2]), temperature=1.0, l2_normalize=False
    )  # fmt: skip
    assert loss.item() == 2e4


def test_padding_row_takes_no_part_whatever_it_holds():
    x = make(20, 19, 6)
    expected = linear_cross_entropy(**x)
    x["table"][0] = torch.nan
    x["table"].requires_grad_()
    loss = linear_cross_entropy(**x)
    (gradient,) = torch.autograd.grad(loss.sum(), x["table"])
    assert torch.equal(loss, expected)
    assert gradient[0].abs().max() == 0 and gradient[1:].abs().min() > 0


def test_no_positions():
    x = make(0, 5, 4)
    x["queries"].requires_grad_()
    x["table"].requires_grad_()
    loss = linear_cross_entropy(**x)
    loss.sum().backward()
    assert loss.shape == (0,) and x["queries"].grad.shape == (0, 4) and x["table"].grad.abs().max() == 0


def test_small_factors_do_not_vanish_in_float16():
    """A factor of 1e-9, as of a mean over many positions, is below float16: the products are scaled."""
    x = make(37, 19, 10)
    q, e = x["queries"].requires_grad_(), x["table"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = linear_cross_entropy(q, e, x["labels"]).sum()
    one = torch.autograd.grad(loss, (q, e), retain_graph=True)
    small = torch.autograd.grad(loss * 2.0**-30, (q, e))
    assert all(torch.equal(a * 2.0**-30, b) for a, b in zip(one, small, strict=True))


def test_autocast_rounds_the_operands_and_keeps_the_rest():
    x = make(21, 30, 10)
    x = {n: t.half().float() if t.is_floating_point() else t for n, t in x.items()}  # rounding changes nothing more
    q, e = x["queries"].requires_grad_(), x["table"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = linear_cross_entropy(q, e, x["labels"])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, linear_cross_entropy(q.half(), e.half(), x["labels"]))
    gradients = torch.autograd.grad(loss.sum(), (q, e))
    assert [g.dtype for g in gradients] == [torch.float32] * 2


def test_opcheck():
    x = make(2, 7, 16)
    q, e = x["queries"].requires_grad_(), x["table"].requires_grad_()
    ids, log_q = torch.tensor([1, 5, 7]), torch.randn(3)
    for normalize, bank in ((True, (None, None)), (False, (ids, log_q))):
        arguments = (q, e, x["labels"], *bank, None, 20.0, normalize, 1e-6, torch.float32, True)
        torch.library.opcheck(torch.ops.hstu.softmax_blocks.default, arguments)


def test_compile_fullgraph():
    x = make(11, 30, 10)
    weights = torch.rand(11, generator=torch.Generator().manual_seed(0))

    def loss(q, e):
        return linear_cross_entropy(q, e, x["labels"]).sum() + linear_cross_entropy(q, e, x["labels"], weights=weights)

    def both(f):
        q, e = x["queries"].clone().requires_grad_(), x["table"].clone().requires_grad_()
        value = f(q, e)
        return value.detach(), *torch.autograd.grad(value, (q, e))

    for a, b in zip(both(loss), both(torch.compile(loss, fullgraph=True, backend="aot_eager")), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(a.detach().abs().max()))


@pytest.mark.parametrize("change, message", [({"labels": torch.tensor([1, 6])}, "labels range over 1..6")])
def test_errors(change, message):
    arguments = {"queries": torch.ones(2, 3), "table": torch.ones(6, 3), "labels": torch.tensor([1, 2])} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)
    with pytest.raises(ValueError, match="float32, bfloat16 and float16, not torch.float64"):
        linear_cross_entropy(torch.ones(2, 3).double(), torch.ones(6, 3), torch.tensor([1, 2]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length, num_items, dim", [(67, 311, 50), (1, 1_009, 8), (131, 5_003, 256), (300, 1_009, 512)])
def test_cuda_matches_reference(length, num_items, dim, dtype):
    x = {name: t.cuda() for name, t in make(length, num_items, dim, dtype).items()}
    compare(linear_cross_entropy, linear_cross_entropy_reference, x)


@pytest.mark.gpu
def test_cuda_two_runs_are_bit_equal():
    x = {name: t.cuda() for name, t in make(3_000, 2_003, 64, torch.bfloat16).items()}
    q, e = x["queries"].requires_grad_(), x["table"].requires_grad_()
    runs = [torch.autograd.grad(linear_cross_entropy(q, e, x["labels"]).sum(), (q, e)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
