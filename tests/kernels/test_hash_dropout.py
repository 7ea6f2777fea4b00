"""The hashed mask: rate, independence of rows and columns, the words of lowbias32, gradients."""

import pytest
import torch

from kernels._backend import set_backend
from kernels._hash_dropout import _mix, hash_keep, row_dropout


def lowbias32(x):
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x ^= x >> shift
        x = x * factor % 2**32
    return x


def test_words_are_those_of_lowbias32():
    words = [0, 1, 2, 2**31 - 1, 2**31, 2**32 - 1, 123_456_789]
    signed = torch.tensor([w - 2**32 if w >= 2**31 else w for w in words], dtype=torch.int32)
    assert [w % 2**32 for w in _mix(signed.clone()).tolist()] == [lowbias32(w) for w in words]


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_rate_and_independence(rate):
    rows, columns = torch.arange(2_000)[:, None], torch.arange(500)
    keep = hash_keep(rows, columns, rate, 7).double() - (1 - rate)  # 10^6 draws: a deviation of rate(1-rate)/1000
    spread = (rate * (1 - rate)) ** 0.5
    assert abs(keep.mean()) < 5 * spread / 1_000
    assert keep.mean(1).std() == pytest.approx(
        spread / 500**0.5, rel=0.1
    )  # neither a row nor a column is kept more often
    assert keep.mean(0).std() == pytest.approx(spread / 2_000**0.5, rel=0.15)
    products = [keep[:-1] * keep[1:], keep[:, :-1] * keep[:, 1:], keep[:-1, 1:] * keep[1:, :-1],
                keep[:-1, :-1] * keep[1:, 1:] * keep[:-1, 1:] * keep[1:, :-1]]  # fmt: skip
    products += [keep * (hash_keep(rows, columns, rate, 8).double() - (1 - rate))]
    products += [keep * (hash_keep(rows + 2**32, columns, rate, 7).double() - (1 - rate))]
    assert all(abs(p.mean() / spread ** (4 if i == 3 else 2)) < 5 / 990 for i, p in enumerate(products))


def test_a_part_of_a_mask_is_the_part_of_the_mask():
    whole = hash_keep(torch.arange(50)[:, None], torch.arange(30), 0.4, 3)
    rows, columns = torch.tensor([7, 3, 49]), torch.arange(20)
    assert torch.equal(hash_keep(rows[:, None], columns, 0.4, 3), whole[rows, :20])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_row_dropout_of_a_share(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    set_backend(backend)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    x = torch.randn(9, 4, 5, device=device, requires_grad=True)
    rows = torch.arange(9, device=device)
    whole = row_dropout(x, 0.4, 3, rows)
    own = x.detach()[[5, 2]].requires_grad_()
    share = row_dropout(own, 0.4, 3, rows[[5, 2]])
    assert torch.equal(share, whole[[5, 2]]) and not torch.equal(share, row_dropout(own, 0.4, 3, rows[:2]))
    assert 0.2 < (share == 0).double().mean() < 0.7
    whole.sum().backward()
    share.sum().backward()
    assert torch.equal(own.grad, x.grad[[5, 2]]) and torch.allclose(own.grad * own, share)
    assert row_dropout(x, 0.4, None, rows) is x and row_dropout(x, 0.0, 3, rows) is x
