"""The Triton path of sampled_softmax: under the interpreter on the CPU, compiled on CUDA."""

import pytest
import torch

from kernels._backend import set_backend
from kernels._philox import uniform_ids
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.sampled_softmax import bank_softmax, sampled_softmax
from kernels.sampled_softmax.cpu import draw_negatives
from kernels.sampled_softmax.reference import bank_softmax_reference, sampled_softmax_reference
from tests.kernels.test_sampled_softmax import make, make_bank
from tests.oracle import compare

pytest.importorskip("triton")

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def triton_backend(auto_backend):
    set_backend("triton")


CASES = [
    pytest.param(11, 19, 10, 7, id="L11-V19-D10-R7"),
    pytest.param(1, 3, 8, 1, id="one-position"),
    pytest.param(7, 61, 25, 17, id="one-past-the-block-D25"),
    pytest.param(7, 5, 50, 32, id="many-collisions-D50"),
    pytest.param(5, 3_001, 100, 16, id="large-table-D100"),
    pytest.param(5, 1, 16, 5, id="one-item"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length, num_items, dim, negatives", CASES)
def test_matches_reference(length, num_items, dim, negatives, dtype):
    x = make(length, num_items, dim, negatives, dtype)
    vacuous = ("output 0", "gradient of queries", "gradient of table") if num_items == 1 else ()
    compare(sampled_softmax, sampled_softmax_reference, x, vacuous)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "atomics"])
def test_options_match_reference(normalize, deterministic):
    x = make(11, 40, 12, 9)
    x["table"][5] *= 1e-3  # below eps
    x["queries"][3] *= 1e-3
    g = torch.Generator().manual_seed(9)
    offsets = {"log_q": torch.randn(41, generator=g), "label_log_q": torch.randn(11, generator=g)}
    kwargs = {"temperature": 0.7, "l2_normalize": normalize, "eps": 0.5, **offsets}
    reference = lambda **i: sampled_softmax_reference(**i, **kwargs)  # noqa: E731
    compare(lambda **i: sampled_softmax(**i, **kwargs, deterministic=deterministic), reference, x)


def test_strided_views_and_int32_ids():
    x = make(9, 23, 24, 11, ids=torch.int32)
    g = torch.Generator().manual_seed(5)
    x["queries"] = torch.randn(9, 72, generator=g)[:, 24:48]
    x["table"] = torch.randn(24, 40, generator=g)[:, 8:32]
    x["negatives"] = x["negatives"].T.contiguous().T
    x["labels"] = x["labels"].repeat_interleave(2)[::2]
    compare(sampled_softmax, sampled_softmax_reference, x)
    x["queries"] = torch.randn(9, 48, generator=g)[:, ::2]
    x["table"] = torch.randn(24, 24, generator=g).T
    compare(sampled_softmax, sampled_softmax_reference, x)


@pytest.mark.parametrize("num_negatives, seed", [(1, 0), (6, 1), (16, 2**62 + 12_345), (37, 2**62 + 12_345)])
def test_the_kernel_draws_what_torch_draws(num_negatives, seed):
    x = make(5, 30, 8, 1)
    negatives = draw_negatives(5, num_negatives, 30, seed, CPU)
    assert torch.equal(negatives, uniform_ids(5, num_negatives, 30, seed, CPU))
    given = sampled_softmax(x["queries"], x["table"], x["labels"], negatives)
    drawn = sampled_softmax(x["queries"], x["table"], x["labels"], num_negatives=num_negatives, seed=seed)
    assert torch.equal(given, drawn)


# A shared bank

BANK_CASES = [
    pytest.param(19, 17, 10, 23, id="collisions-D10"),
    pytest.param(2, 50, 25, 131, id="items-in-many-parts-D25"),
    pytest.param(41, 60, 50, 1, id="bank-of-one-D50"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("corrected", [True, False], ids=["logq", "plain"])
@pytest.mark.parametrize("length, num_items, dim, size", BANK_CASES)
def test_bank_matches_reference(length, num_items, dim, size, corrected, dtype):
    x, log_q, label_log_q = make_bank(length, num_items, dim, size, dtype)
    kwargs = {"log_q": log_q, "label_log_q": label_log_q} if corrected else {}
    compare(lambda **i: bank_softmax(**i, **kwargs), lambda **i: bank_softmax_reference(**i, **kwargs), x)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "atomics"])
def test_bank_options_match_reference(normalize, deterministic):
    x, log_q, label_log_q = make_bank(19, 20, 12, 21)
    x["table"][5] *= 1e-3  # below eps
    x["queries"][3] *= 1e-3
    options = {"temperature": 0.7, "l2_normalize": normalize, "eps": 0.5}
    kwargs = {"log_q": log_q, "label_log_q": label_log_q, **options}
    reference = lambda **i: bank_softmax_reference(**i, **kwargs)  # noqa: E731
    compare(lambda **i: bank_softmax(**i, **kwargs, deterministic=deterministic), reference, x)


def test_bank_of_the_label_alone():
    x, *_ = make_bank(3, 5, 4, 1)
    x["labels"] = x["bank_ids"].expand(3).clone()
    assert bank_softmax(**x).tolist() == [0.0, 0.0, 0.0]


def test_full_softmax_is_the_bank_of_all_items():
    x, *_ = make_bank(19, 30, 8, 1)
    del x["bank_ids"]
    expected = linear_cross_entropy(**x)
    torch.testing.assert_close(bank_softmax(**x, bank_ids=torch.arange(1, 31)), expected)


# Machinery


def gradients(loss, x):
    q, e = x["queries"].clone().requires_grad_(), x["table"].clone().requires_grad_()
    return torch.autograd.grad(loss(q, e), (q, e))


def test_deterministic_sums_have_no_room_for_overflow():
    """All positions push one item the same way, the largest sum there can be, at gradients of all scales."""
    x = make(5, 2, 4, 3)
    x["labels"][:] = 1
    x["negatives"][:] = 2
    for scale in (1e-30, 1e30):
        loss = lambda q, e, d: (sampled_softmax(q, e, x["labels"], x["negatives"], deterministic=d) * scale).sum()  # noqa: E731, B023
        fixed = gradients(lambda q, e: loss(q, e, True), x)[1]  # noqa: B023
        torch.testing.assert_close(fixed, gradients(lambda q, e: loss(q, e, False), x)[1], rtol=1e-4, atol=1e-5 * scale)  # noqa: B023
    nan = gradients(lambda q, e: loss(q, e, True) * torch.nan, x)[1]
    assert nan.isnan().any()


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "atomics"])
@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "given"])
def test_sparse_gradient_is_the_dense_one(deterministic, drawn):
    x = make(5, 400, 12, 6)
    kwargs = {"num_negatives": 6, "seed": 3} if drawn else {"negatives": x["negatives"]}

    def loss(q, e, sparse):
        return sampled_softmax(q, e, x["labels"], **kwargs, deterministic=deterministic, sparse_grad=sparse).sum()

    dense = gradients(lambda q, e: loss(q, e, False), x)
    sparse = gradients(lambda q, e: loss(q, e, True), x)
    assert torch.equal(sparse[0], dense[0])
    assert sparse[1].is_sparse and sparse[1].is_coalesced() and sparse[1].shape == dense[1].shape
    assert 5 < sparse[1].indices().shape[1] <= 35 and (sparse[1].indices().diff() > 0).all()
    assert torch.equal(sparse[1].to_dense(), dense[1])
    sparse[1].coalesce()


def test_sparse_gradient_is_refused_where_there_is_none():
    x = make(3, 5, 4, 2)
    set_backend("torch")
    with pytest.raises(ValueError, match="sparse_grad=True: expected the Triton path"):
        sampled_softmax(**x, sparse_grad=True)


def test_no_positions():
    x = make(0, 5, 4, 3)
    bank = torch.tensor([1, 2])
    for deterministic in (True, False):
        loss = lambda q, e: sampled_softmax(q, e, x["labels"], x["negatives"], deterministic=deterministic).sum()  # noqa: E731, B023
        loss_bank = lambda q, e: bank_softmax(q, e, x["labels"], bank, deterministic=deterministic).sum()  # noqa: E731, B023
        for function in (loss, loss_bank):
            d_queries, d_table = gradients(function, x)
            assert d_queries.shape == (0, 4) and d_table.abs().max() == 0


def test_padding_row_takes_no_part_whatever_it_holds():
    x = make(9, 9, 6, 5)
    expected = sampled_softmax(**x)
    x["table"][0] = torch.nan
    assert torch.equal(sampled_softmax(**x), expected)
    d_table = gradients(lambda q, e: sampled_softmax(q, e, x["labels"], x["negatives"]).sum(), x)[1]
    assert d_table[0].abs().max() == 0 and d_table.isfinite().all()


def test_autocast_rounds_the_operands_and_keeps_the_rest():
    x = make(9, 30, 10, 6)
    q, e = x["queries"].half().float().requires_grad_(), x["table"].half().float().requires_grad_()
    bank = torch.tensor([3, 4, 4, 9])
    functions = (
        lambda q, e: sampled_softmax(q, e, x["labels"], x["negatives"]),
        lambda q, e: bank_softmax(q, e, x["labels"], bank),
    )
    for function in functions:
        with torch.autocast("cpu", dtype=torch.float16):
            loss = function(q, e)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, function(q.half(), e.half()))
        assert [g.dtype for g in torch.autograd.grad(loss.sum(), (q, e))] == [torch.float32] * 2


def test_mixed_dtypes():
    x = make(9, 30, 10, 6)
    x["queries"] = x["queries"].half()
    compare(sampled_softmax, sampled_softmax_reference, x)


def test_opcheck():
    x = make(2, 7, 16, 4)
    q, e = x["queries"].requires_grad_(), x["table"].requires_grad_()
    options = (4, 3, 20.0, True, 1e-6, torch.float32, False, False)
    for negatives in (x["negatives"], None):
        arguments = (q, e, x["labels"], negatives, torch.randn(8), torch.randn(2), *options)
        torch.library.opcheck(torch.ops.hstu.sampled_softmax_triton.default, arguments)


def test_compile_fullgraph():
    x = make(3, 30, 10, 6)
    bank = torch.tensor([3, 4, 4, 9])

    def loss(q, e):
        sampled = sampled_softmax(q, e, x["labels"], num_negatives=6, seed=2**40)
        return (sampled + bank_softmax(q, e, x["labels"], bank)).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(loss, x), gradients(compiled, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(a.abs().max()))


# The machine with a GPU

GPU_CASES = [
    pytest.param(67, 311, 50, 128, id="D50-R128"),
    pytest.param(67, 61, 25, 61, id="D25-R61"),
    pytest.param(67, 3_001, 256, 128, id="D256-R128"),
    pytest.param(31, 3_001, 64, 512, id="D64-R512"),
    pytest.param(1, 1, 512, 1, id="one-of-everything-D512"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length, num_items, dim, negatives", GPU_CASES)
def test_cuda_matches_reference(length, num_items, dim, negatives, dtype):
    x = {name: t.cuda() for name, t in make(length, num_items, dim, negatives, dtype).items()}
    vacuous = ("output 0", "gradient of queries", "gradient of table") if num_items == 1 else ()
    for deterministic in (True, False):
        op = lambda **i: sampled_softmax(**i, deterministic=deterministic)  # noqa: E731, B023
        compare(op, sampled_softmax_reference, x, vacuous)
    drawn = draw_negatives(length, negatives, num_items, 2**61 + 7, torch.device("cuda"))
    assert torch.equal(drawn.cpu(), uniform_ids(length, negatives, num_items, 2**61 + 7, CPU))
    given = sampled_softmax(x["queries"], x["table"], x["labels"], drawn)
    seeded = sampled_softmax(x["queries"], x["table"], x["labels"], num_negatives=negatives, seed=2**61 + 7)
    assert torch.equal(given, seeded)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length, num_items, dim, size", [(67, 311, 50, 97), (131, 3_001, 256, 1_024), (5, 7, 8, 1)])
def test_cuda_bank_matches_reference(length, num_items, dim, size, dtype):
    x, log_q, label_log_q = make_bank(length, num_items, dim, size, dtype)
    x, log_q, label_log_q = {n: t.cuda() for n, t in x.items()}, log_q.cuda(), label_log_q.cuda()
    for deterministic in (True, False):
        op = lambda **i: bank_softmax(**i, log_q=log_q, label_log_q=label_log_q, deterministic=deterministic)  # noqa: E731, B023
        compare(op, lambda **i: bank_softmax_reference(**i, log_q=log_q, label_log_q=label_log_q), x)


@pytest.mark.gpu
def test_cuda_deterministic_runs_are_bit_equal():
    x = {name: t.cuda() for name, t in make(2_000, 311, 50, 128).items()}
    bank = x["negatives"][:8].flatten()
    for function in (
        lambda q, e: sampled_softmax(q, e, x["labels"], x["negatives"], deterministic=True).sum(),
        lambda q, e: bank_softmax(q, e, x["labels"], bank, deterministic=True).sum(),
    ):
        assert all(torch.equal(a, b) for a, b in zip(gradients(function, x), gradients(function, x), strict=True))
