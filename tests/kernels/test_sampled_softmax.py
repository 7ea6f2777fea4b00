"""sampled_softmax and bank_softmax: hand-worked numbers, reference, gradients, compile.

Legend: L total events, D model width, R negatives per position, K items of a bank.
"""

import math

import pytest
import torch

from kernels._common import l2_normalize
from kernels.sampled_softmax import bank_softmax, cpu, sampled_softmax
from kernels.sampled_softmax.reference import bank_softmax_reference, sampled_softmax_reference
from tests.oracle import compare


def make(length, num_items, dim, negatives, dtype=torch.float32, ids=torch.int64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "queries": torch.randn(length, dim, generator=g).to(dtype),
        "table": torch.randn(num_items + 1, dim, generator=g).to(dtype),
        "labels": torch.randint(1, num_items + 1, (length,), generator=g).to(ids),
        "negatives": torch.randint(1, num_items + 1, (length, negatives), generator=g).to(ids),
    }


def make_bank(length, num_items, dim, size, dtype=torch.float32, seed=0):
    x = make(length, num_items, dim, 1, dtype, seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    x["bank_ids"] = torch.randint(1, num_items + 1, (size,), generator=g)
    del x["negatives"]
    return x, torch.randn(size, generator=g), torch.randn(length, generator=g)


# Hand-worked numbers


def test_equal_logits_give_log_of_the_count():
    table = torch.ones(6, 4)
    loss = sampled_softmax(torch.ones(1, 4), table, torch.tensor([2]), torch.tensor([[1, 3, 5]]))
    assert loss.tolist() == pytest.approx([math.log(4)])


def test_worked_example_without_normalisation():
    # Logits: label 1 * 2 / 0.5 = 4, negatives 1 / 0.5 = 2 each: ln(e^4 + 2 e^2) - 4 = ln(1 + 2 e^-2).
    table = torch.tensor([[9.0], [2.0], [1.0]])
    loss = sampled_softmax(
        torch.tensor([[1.0]]), table, torch.tensor([1]), torch.tensor([[2, 2]]), temperature=0.5, l2_normalize=False
    )
    assert loss.tolist() == pytest.approx([math.log(1 + 2 * math.exp(-2))])


def test_negative_equal_to_the_label_does_not_count():
    table = torch.ones(4, 2)
    loss = sampled_softmax(torch.ones(2, 2), table, torch.tensor([1, 2]), torch.tensor([[1, 1, 3], [2, 2, 2]]))
    assert loss.tolist() == pytest.approx([math.log(2), 0.0])


def test_normalisation_uses_cosine_and_the_lower_bound():
    assert l2_normalize(torch.tensor([[3.0, 4.0]]), 1e-6).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)]]
    assert l2_normalize(torch.tensor([[1e-7, 0.0]]), 1e-6)[0, 0].item() == pytest.approx(0.1)
    # cos = 1 for the label, -1 for the negative; temperature 2: ln(1 + e^(-1)).
    table = torch.tensor([[0.0], [5.0], [-0.1]])
    loss = sampled_softmax(torch.tensor([[7.0]]), table, torch.tensor([1]), torch.tensor([[2]]), temperature=2.0)
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-1))])


def test_bank_worked_example_with_corrections():
    # Label logit 1 - 0.5, bank: item 2 with logit 0 - (-1) = 1; item 1 is the label and does not count.
    table = torch.tensor([[0.0], [1.0], [0.0]])
    loss = bank_softmax(
        torch.ones(1, 1), table, torch.tensor([1]), torch.tensor([1, 2]), torch.tensor([3.0, -1.0]),
        torch.tensor([0.5]), temperature=1.0, l2_normalize=False,
    )  # fmt: skip
    assert loss.tolist() == pytest.approx([math.log(math.exp(0.5) + math.exp(1.0)) - 0.5])


# Against the reference

CASES = [
    pytest.param(37, 19, 10, 7, id="L37-V19-D10-R7"),
    pytest.param(1, 3, 8, 1, id="one-position"),
    pytest.param(67, 311, 50, 61, id="L67-V311-D50-R61"),
    pytest.param(67, 61, 50, 61, id="one-item-fewer-than-columns"),
    pytest.param(67, 62, 50, 61, id="as-many-items-as-columns"),
    pytest.param(64, 5, 25, 128, id="many-collisions-D25"),
    pytest.param(13, 70_001, 16, 3, id="large-table"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length, num_items, dim, negatives", CASES)
def test_op_matches_reference(length, num_items, dim, negatives, dtype):
    compare(sampled_softmax, sampled_softmax_reference, make(length, num_items, dim, negatives, dtype))


@pytest.mark.parametrize("normalize", [True, False])
def test_options_match_reference(normalize):
    x = make(29, 40, 12, 9)
    kwargs = {"temperature": 0.7, "l2_normalize": normalize, "eps": 0.5}
    compare(lambda **i: sampled_softmax(**i, **kwargs), lambda **i: sampled_softmax_reference(**i, **kwargs), x)


def test_strided_views_and_int32_ids():
    x = make(31, 23, 24, 11, ids=torch.int32)
    x["queries"] = torch.randn(31, 48, generator=torch.Generator().manual_seed(5))[:, ::2]
    x["table"] = torch.randn(24, 24, generator=torch.Generator().manual_seed(6)).T
    x["negatives"] = x["negatives"].T.contiguous().T
    assert not x["queries"].is_contiguous() and not x["table"].is_contiguous() and not x["negatives"].is_contiguous()
    compare(sampled_softmax, sampled_softmax_reference, x)


def test_blocks_of_the_table_gradient(monkeypatch):
    monkeypatch.setattr(cpu, "_block_elements", lambda num_rows: 50)
    compare(sampled_softmax, sampled_softmax_reference, make(37, 19, 10, 7))


@pytest.mark.parametrize("num_rows", [7, 4_096, 2**15, 300_000])
def test_block_keys_fit(num_rows):
    elements = cpu._block_elements(num_rows)
    bits = (elements - 1).bit_length()
    assert elements >= 2**17
    assert num_rows.bit_length() + bits <= (32 if num_rows <= 2**14 else 64)


def test_transposes_agree():
    ids = torch.randint(0, 50, (1000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    for a, b in zip(cpu._transpose_numpy(ids, 50, 8), cpu._transpose_torch(ids, 50, 8), strict=True):
        assert torch.equal(a.long(), b.long())
    place, rows, offsets = (x.long() for x in cpu._transpose_numpy(ids, 50, 8))
    assert torch.equal(ids[place], ids.sort().values) and torch.equal(rows, place // 8)
    assert torch.equal(offsets, torch.tensor([int((ids < v).sum()) for v in range(50)]))


def test_other_devices_path(monkeypatch):
    """What runs on other devices, run here: dense blocks with a gather, and torch's sort."""
    monkeypatch.setattr(cpu, "_add_products_cpu", cpu._add_products)
    monkeypatch.setattr(cpu, "_transpose_numpy", cpu._transpose_torch)
    compare(sampled_softmax, sampled_softmax_reference, make(37, 19, 10, 7))


@pytest.mark.parametrize("chunk_mib", [64, 1e-4], ids=["one-chunk", "many-chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("corrected", [True, False], ids=["logq", "plain"])
def test_bank_matches_reference(dtype, corrected, chunk_mib):
    x, log_q, label_log_q = make_bank(41, 17, 10, 23, dtype)
    kwargs = {"log_q": log_q, "label_log_q": label_log_q} if corrected else {}
    compare(
        lambda **i: bank_softmax(**i, **kwargs, chunk_mib=chunk_mib),
        lambda **i: bank_softmax_reference(**i, **kwargs), x,
    )  # fmt: skip


def test_bank_of_the_label_alone():
    x, *_ = make_bank(3, 5, 4, 1)
    x["labels"] = x["bank_ids"].expand(3).clone()
    assert bank_softmax(**x).tolist() == [0.0, 0.0, 0.0]


def test_no_positions():
    x = make(0, 5, 4, 3)
    x["queries"].requires_grad_()
    loss = sampled_softmax(**x)
    loss.sum().backward()
    assert loss.shape == (0,) and x["queries"].grad.shape == (0, 4)
    assert bank_softmax(x["queries"], x["table"], x["labels"], torch.tensor([1, 2])).shape == (0,)


def test_padding_row_takes_no_part():
    x = make(20, 9, 6, 5)
    x["table"].requires_grad_()
    loss = sampled_softmax(**x)
    loss.sum().backward()
    assert x["table"].grad[0].abs().max() == 0
    with torch.no_grad():
        x["table"][0] = 1e3
    assert torch.equal(sampled_softmax(**x), loss)


# Negatives


def test_negatives_are_uniform_fresh_and_a_function_of_the_seed():
    device = torch.device("cpu")
    a = cpu.draw_negatives(2_000, 50, 10, 3, device)
    assert a.dtype == torch.int32 and a.shape == (2_000, 50)
    assert torch.equal(a, cpu.draw_negatives(2_000, 50, 10, 3, device))
    assert not torch.equal(a, cpu.draw_negatives(2_000, 50, 10, 4, device))
    assert not torch.equal(a[0], a[1])
    counts = torch.bincount(a.flatten().long(), minlength=11)
    assert counts[0] == 0 and counts.shape == (11,)
    # 100,000 draws, 10,000 expected per item, standard deviation 95: chi-square of 9 degrees below its 0.9999 quantile.
    chi_square = ((counts[1:] - 10_000.0) ** 2 / 10_000.0).sum()
    assert chi_square < 33.7


def test_drawn_equals_given():
    x = make(17, 30, 8, 12)
    drawn = cpu.draw_negatives(17, 12, 30, 99, torch.device("cpu"))
    given = sampled_softmax(x["queries"], x["table"], x["labels"], drawn)
    assert torch.equal(sampled_softmax(x["queries"], x["table"], x["labels"], num_negatives=12, seed=99), given)


# Machinery


def test_gradcheck():
    x = make(5, 7, 3, 4, torch.float64)
    q, e = x["queries"].requires_grad_(), x["table"].requires_grad_()
    assert torch.autograd.gradcheck(lambda q, e: sampled_softmax(q, e, x["labels"], x["negatives"]), (q, e))
    assert torch.autograd.gradcheck(lambda q, e: sampled_softmax_reference(q, e, x["labels"], x["negatives"]), (q, e))


@pytest.mark.parametrize("function", [bank_softmax, bank_softmax_reference])
def test_bank_gradcheck(function):
    x, log_q, label_log_q = make_bank(5, 7, 3, 4, torch.float64)
    q, e = x["queries"].requires_grad_(), x["table"].requires_grad_()
    f = lambda q, e: function(q, e, x["labels"], x["bank_ids"], log_q, label_log_q)  # noqa: E731
    assert torch.autograd.gradcheck(f, (q, e))


def test_opcheck():
    x = make(9, 7, 16, 4)
    q, e = x["queries"].requires_grad_(), x["table"].requires_grad_()
    torch.library.opcheck(torch.ops.hstu.sampled_softmax.default, (q, e, x["labels"], x["negatives"], 20.0))
    torch.library.opcheck(torch.ops.hstu.draw_negatives.default, (x["labels"], 4, 7, 1))
    bank, bias = torch.randn(6, 16, requires_grad=True), torch.randn(6)
    positive = torch.randn(9, requires_grad=True)
    ids = torch.randint(1, 8, (6,))
    torch.library.opcheck(torch.ops.hstu.bank_softmax.default, (q, bank, bias, ids, x["labels"], positive, 20.0, 1.0))


def test_compile_fullgraph():
    x = make(21, 30, 10, 6)
    bank = torch.tensor([3, 4, 4, 9])

    def loss(q, e):
        sampled = sampled_softmax(q, e, x["labels"], num_negatives=6, seed=4)
        return (sampled + bank_softmax(q, e, x["labels"], bank)).sum()

    def both(f):
        q, e = x["queries"].clone().requires_grad_(), x["table"].clone().requires_grad_()
        value = f(q, e)
        return value, *torch.autograd.grad(value, (q, e))

    for a, b in zip(both(loss), both(torch.compile(loss, fullgraph=True, backend="aot_eager")), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(a.detach().abs().max()))


def test_autocast_changes_nothing():
    x = make(21, 30, 10, 6)
    bank = torch.tensor([3, 4, 4, 9])

    def run():
        q, e = x["queries"].clone().requires_grad_(), x["table"].clone().requires_grad_()
        loss = sampled_softmax(q, e, x["labels"], x["negatives"]) + bank_softmax(q, e, x["labels"], bank)
        return loss, *torch.autograd.grad(loss.sum(), (q, e))

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run()
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_same_gradients_for_any_number_of_threads():
    x = make(300, 100, 16, 64)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            q, e = x["queries"].clone().requires_grad_(), x["table"].clone().requires_grad_()
            results.append(torch.autograd.grad(sampled_softmax(q, e, x["labels"], x["negatives"]).sum(), (q, e)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Errors


ONES = torch.ones(12, dtype=torch.int64)


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param({"queries": torch.ones(4)}, r"queries has shape \[4\]: expected \[L, D\]", id="rank"),
        pytest.param({"queries": torch.ones(4, 2)}, "queries has width 2, table 3", id="width"),
        pytest.param({"queries": ONES[:12].view(4, 3)}, "queries has dtype torch.int64", id="dtype"),
        pytest.param({"table": torch.ones(1, 3)}, r"table has shape \[1, 3\]", id="no-items"),
        pytest.param({"labels": ONES[:5]}, r"labels has shape \[5\]: expected \[4\]", id="labels"),
        pytest.param({"labels": torch.ones(4)}, "labels has dtype torch.float32", id="float-labels"),
        pytest.param({"labels": torch.tensor([0, 1, 1, 1])}, "labels range over 0..1: expected 1", id="padding-label"),
        pytest.param({"labels": torch.tensor([6, 1, 1, 1])}, "labels range over 1..6: expected 1..5", id="label-range"),
        pytest.param({"negatives": 6 * ONES[:8].view(4, 2)}, "negatives range over 6..6", id="negative-range"),
        pytest.param({"negatives": 0 * ONES[:8].view(4, 2)}, "negatives range over 0..0", id="padding-negative"),
        pytest.param({"negatives": ONES[:6].view(3, 2)}, r"negatives has shape \[3, 2\]", id="negatives"),
        pytest.param({"negatives": ONES[:0].view(4, 0)}, "num_negatives=0", id="no-negatives"),
        pytest.param({"num_negatives": 0}, "num_negatives=0: expected > 0", id="none-to-draw"),
        pytest.param({"seed": -1}, "seed=-1: expected >= 0", id="seed"),
        pytest.param({"temperature": 0.0}, "temperature=0.0: expected > 0", id="temperature"),
        pytest.param({"eps": 0.0}, "eps=0.0: expected > 0", id="eps"),
    ],
)  # fmt: skip
def test_errors(change, message):
    arguments = {"queries": torch.ones(4, 3), "table": torch.ones(6, 3), "labels": torch.tensor([1, 2, 3, 4])} | change
    with pytest.raises(ValueError, match=message):
        sampled_softmax(**arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param({"bank_ids": torch.ones(2, 2)}, r"bank_ids has shape \[2, 2\]: expected \[K\]", id="bank-rank"),
        pytest.param({"bank_ids": torch.ones(0)}, r"bank_ids has shape \[0\]", id="empty-bank"),
        pytest.param({"bank_ids": torch.tensor([0, 1])}, "bank_ids range over 0..1: expected 1..5", id="bank-range"),
        pytest.param({"labels": torch.tensor([1, 2, 3, 0])}, "labels range over 0..3: expected 1..5", id="label-range"),
        pytest.param({"log_q": torch.ones(3)}, r"log_q has shape \[3\]: expected \[2\]", id="log-q"),
        pytest.param({"label_log_q": torch.ones(3)}, r"label_log_q has shape \[3\]: expected \[4\]", id="label-log-q"),
        pytest.param({"chunk_mib": 0}, "chunk_mib=0: expected > 0", id="chunk"),
    ],
)  # fmt: skip
def test_bank_errors(change, message):
    arguments = {
        "queries": torch.ones(4, 3), "table": torch.ones(6, 3), "labels": torch.tensor([1, 2, 3, 4]),
        "bank_ids": torch.tensor([1, 2]),
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        bank_softmax(**arguments)


# The machine with a GPU


@pytest.mark.gpu
def test_cuda_matches_reference():
    x = {name: t.cuda() for name, t in make(67, 311, 50, 61).items()}
    compare(sampled_softmax, sampled_softmax_reference, x)
