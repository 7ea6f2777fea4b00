"""norm_linear_silu, gate_norm_linear and the seeded dropout: hand-worked numbers, reference, gradients, errors.

Legend: L total events, D model width, W = H*V gate width.
"""

import math

import pytest
import torch

from kernels._dropout import keep_scale, seeded_dropout
from kernels.gate_norm_linear import gate_norm_linear
from kernels.gate_norm_linear.reference import gate_norm_linear_reference
from kernels.norm_linear_silu import norm_linear_silu
from kernels.norm_linear_silu.reference import norm_linear_silu_reference
from tests.oracle import compare

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def gate_inputs(length, width, dim, dtype=torch.float32):
    return {
        "av": randn(length, width, dtype=dtype),
        "u": randn(length, width, dtype=dtype, seed=1),
        "weight": randn(width, dim, dtype=dtype),
        "bias": randn(dim, dtype=dtype),
        "residual": randn(length, dim, dtype=dtype, seed=2),
    }


def test_norm_linear_silu_by_hand():
    # LayerNorm of (1, 3) is (-1, 1); times the columns (1, 0) and (0, 2): SiLU(-1), SiLU(2).
    got = norm_linear_silu(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]]), eps=1e-12)
    assert got.tolist()[0] == pytest.approx([-1 / (1 + math.e), 2 / (1 + math.exp(-2))], rel=1e-5)


def test_gate_norm_linear_by_hand():
    # LayerNorm of (2, 6) is (-1, 1); gated by (3, 5): (-3, 5); times (1, 1) + bias 0.5 + residual 10 = 12.5.
    got = gate_norm_linear(
        torch.tensor([[2.0, 6.0]]), torch.tensor([[3.0, 5.0]]), torch.ones(2, 1), torch.tensor([0.5]),
        torch.tensor([[10.0]]), eps=1e-12,
    )  # fmt: skip
    assert got.item() == pytest.approx(12.5, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length, dim, out", [(1, 8, 32), (67, 50, 200), (5, 25, 8)])
def test_norm_linear_silu_matches_reference(length, dim, out, dtype):
    inputs = {"x": randn(length, dim, dtype=dtype), "weight": randn(dim, out, dtype=dtype)}
    compare(norm_linear_silu, norm_linear_silu_reference, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout, seed", [(0.0, None), (0.3, 5)], ids=["evaluation", "dropout"])
@pytest.mark.parametrize("length, width, dim", [(1, 8, 8), (67, 50, 25)])
def test_gate_norm_linear_matches_reference(length, width, dim, dropout, seed, dtype):
    compare(
        lambda **x: gate_norm_linear(**x, dropout=dropout, seed=seed),
        lambda **x: gate_norm_linear_reference(**x, dropout=dropout, seed=seed),
        gate_inputs(length, width, dim, dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("silu_columns", [None, (0, 9), (4, 20), (7, 7)], ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norms_and_columns_match_reference(norm, silu_columns, dtype):
    options = {"norm": norm, "silu_columns": silu_columns}
    compare(
        lambda **x: norm_linear_silu(**x, **options),
        lambda **x: norm_linear_silu_reference(**x, **options),
        {"x": randn(31, 25, dtype=dtype) + 1, "weight": randn(25, 20, dtype=dtype)},
    )
    if silu_columns is None:
        compare(
            lambda **x: gate_norm_linear(**x, norm=norm, dropout=0.2, seed=3),
            lambda **x: gate_norm_linear_reference(**x, norm=norm, dropout=0.2, seed=3),
            gate_inputs(31, 25, 20, dtype),
        )


def test_rms_norm_and_linear_columns_by_hand():
    # (3, 4) has root mean square sqrt(12.5); the first column passes through SiLU, the second does not.
    x, weight, size = torch.tensor([[3.0, 4.0]]), torch.eye(2), math.sqrt(12.5)
    got = norm_linear_silu(x, weight, eps=1e-12, norm="rms", silu_columns=(0, 1))
    first = 3 / size
    assert got.tolist()[0] == pytest.approx([first / (1 + math.exp(-first)), 4 / size], rel=1e-5)
    got = gate_norm_linear(x, torch.ones(1, 2), weight, torch.zeros(2), torch.zeros(1, 2), eps=1e-12, norm="rms")
    assert got.tolist()[0] == pytest.approx([3 / size, 4 / size], rel=1e-5)


def test_autocast_sets_the_product_dtype():
    x, weight = randn(31, 25).requires_grad_(), randn(25, 20).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = norm_linear_silu(x, weight)
        exact = norm_linear_silu(x.double(), weight.double())
    assert (y.dtype, exact.dtype) == (torch.bfloat16, torch.float64)
    assert (y.double() - exact).abs().max() < 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert [g.dtype for g in torch.autograd.grad(y.sum(), (x, weight))] == [torch.float32] * 2
    gate = gate_inputs(31, 25, 20)
    with torch.autocast("cpu", torch.bfloat16):
        assert gate_norm_linear(**gate).dtype == torch.float32  # the residual's
        assert gate_norm_linear(**{**gate, "residual": gate["residual"].bfloat16()}).dtype == torch.bfloat16


def test_strided_gate_and_no_events():
    inputs = gate_inputs(9, 8, 4)
    fused = torch.cat([inputs["u"], inputs["u"]], dim=1)
    compare(gate_norm_linear, gate_norm_linear_reference, {**inputs, "u": fused[:, 8:]})
    assert gate_norm_linear(**gate_inputs(0, 8, 4)).shape == (0, 4)
    assert norm_linear_silu(torch.zeros(0, 8), torch.zeros(8, 3)).shape == (0, 3)


def test_gradcheck():
    x, w = randn(4, 3, dtype=torch.float64).requires_grad_(), randn(3, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(norm_linear_silu, (x, w))
    assert torch.autograd.gradcheck(lambda x, w: norm_linear_silu(x, w, norm="rms", silu_columns=(1, 4)), (x, w))
    leaves = [t.requires_grad_() for t in gate_inputs(4, 3, 2, torch.float64).values()]
    assert torch.autograd.gradcheck(lambda *t: gate_norm_linear(*t, dropout=0.4, seed=3, norm="rms"), leaves)
    assert torch.autograd.gradcheck(lambda *t: gate_norm_linear(*t, dropout=0.4, seed=3), leaves)


def test_opcheck_and_compile():
    x, w = randn(4, 3).requires_grad_(), randn(3, 5).requires_grad_()
    torch.library.opcheck(torch.ops.hstu.norm_linear_silu.default, (x, w, 1e-6, False, 0, 5, torch.float32, False))
    inputs = {n: t.requires_grad_() for n, t in gate_inputs(4, 3, 2).items()}
    torch.library.opcheck(
        torch.ops.hstu.gate_norm_linear.default, (*inputs.values(), 1e-6, False, 0.4, 3, torch.float32, False)
    )
    torch.library.opcheck(torch.ops.hstu.seeded_dropout.default, (x, 0.5, 7, False))
    layer = torch.compile(
        lambda **t: gate_norm_linear(**t, dropout=0.4, seed=3), fullgraph=True, backend="aot_eager"
    )  # fmt: skip
    assert torch.equal(layer(**inputs), gate_norm_linear(**inputs, dropout=0.4, seed=3))


def test_dropout_rate_scale_and_seed():
    x = torch.ones(400, 500, requires_grad=True)
    y = seeded_dropout(x, 0.2, 11)
    share = float((y == 0).float().mean())
    assert abs(share - 0.2) < 5 * math.sqrt(0.2 * 0.8 / x.numel())
    assert torch.unique(y).tolist() == pytest.approx([0.0, 1.25], rel=1e-4)
    assert torch.equal(y, seeded_dropout(x, 0.2, 11))
    assert not torch.equal(y, seeded_dropout(x, 0.2, 12))
    y.sum().backward()
    assert torch.equal(x.grad, keep_scale(x.shape, 0.2, 11, x))


def test_no_dropout_in_evaluation():
    x = torch.randn(3, 3)
    assert seeded_dropout(x, 0.5, None) is x
    assert seeded_dropout(x, 0.0, 4) is x


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: norm_linear_silu(torch.zeros(2, 3), torch.zeros(4, 5)), "x \\[L, D\\]"),
        (lambda: norm_linear_silu(torch.zeros(2, 3), torch.zeros(3, 5), eps=0.0), "eps"),
        (lambda: norm_linear_silu(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, 5)), "floating"),
        (lambda: norm_linear_silu(torch.zeros(2, 3), torch.zeros(3, 5), norm="batch"), "norm='batch'"),
        (lambda: norm_linear_silu(torch.zeros(2, 3), torch.zeros(3, 5), silu_columns=(2, 6)), "silu_columns"),
        (lambda: norm_linear_silu(torch.zeros(2, 3), torch.zeros(3, 5), silu_columns=(3, 2)), "silu_columns"),
        (lambda: gate_norm_linear(**gate_inputs(2, 3, 4), norm="batch"), "norm='batch'"),
        (lambda: gate_norm_linear(**gate_inputs(2, 3, 4), eps=0.0), "eps"),
        (lambda: gate_norm_linear(**gate_inputs(2, 3, 4, torch.int64)), "av has dtype"),
        (lambda: gate_norm_linear(**{**gate_inputs(2, 3, 4), "u": torch.zeros(2, 4)}), "av and u"),
        (lambda: gate_norm_linear(**{**gate_inputs(2, 3, 4), "bias": torch.zeros(3)}), "weight"),
        (lambda: gate_norm_linear(**{**gate_inputs(2, 3, 4), "residual": torch.zeros(2, 3)}), "residual"),
        (lambda: gate_norm_linear(**gate_inputs(2, 3, 4), dropout=1.0, seed=1), "dropout"),
        (lambda: seeded_dropout(torch.zeros(2), -0.1, 1), "rate"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
