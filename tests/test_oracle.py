"""The comparison rule rejects what it must reject."""

import pytest
import torch

from tests.oracle import assert_close, assert_zero_fails, compare


def test_tiny_output_of_zeros_fails():
    truth = torch.full((10,), 1e-12, dtype=torch.float64)
    plain = truth.float()
    assert_close("x", plain.clone(), plain, truth)
    with pytest.raises(AssertionError, match="largest error"):
        assert_close("x", torch.zeros(10), plain, truth)
    assert_zero_fails("x", plain.clone(), plain, truth)


def test_one_wrong_value_among_many_fails():
    truth = torch.ones(10_000, dtype=torch.float64)
    actual = torch.ones(10_000)
    actual[17] += 1e-5
    with pytest.raises(AssertionError, match="largest error"):
        assert_close("x", actual, truth.float(), truth)


def test_error_up_to_twice_plain_torch_passes_and_more_fails():
    truth = torch.ones(100, dtype=torch.float64)
    plain = torch.full((100,), 1.0 + 1e-4)
    assert_close("x", torch.full((100,), 1.0 - 1.9e-4), plain, truth)
    with pytest.raises(AssertionError):
        assert_close("x", torch.full((100,), 1.0 - 2.2e-4), plain, truth)


def test_nan_shape_and_dtype_fail():
    truth = torch.ones(3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="not finite"):
        assert_close("x", torch.full((3,), float("nan")), truth.float(), truth)
    with pytest.raises(AssertionError, match="shape"):
        assert_close("x", torch.ones(4), truth.float(), truth)
    with pytest.raises(AssertionError, match="dtype"):
        assert_close("x", torch.ones(3, dtype=torch.float16), truth.float(), truth)


def test_vacuous_case_is_said():
    zero = torch.zeros(3)
    with pytest.raises(AssertionError, match="vacuous"):
        assert_zero_fails("x", zero, zero, zero.double())


def test_compare_sees_a_wrong_gradient():
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad

    x = torch.randn(5, generator=torch.Generator().manual_seed(0))
    compare(lambda x: x * 2, lambda x: x + x, {"x": x})
    with pytest.raises(AssertionError, match="gradient of x"):
        compare(lambda x: Halved.apply(x), lambda x: x + x, {"x": x})


def test_empty_is_poisoned():
    for x in (
        torch.empty(3),
        torch.empty_like(torch.ones(3)),
        torch.ones(3).new_empty(2),
        torch.empty_strided((2,), (1,)),
    ):
        assert x.isnan().all()
