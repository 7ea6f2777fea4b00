"""The one comparison rule of the suite.

An op is compared with its reference run twice: in the dtype of the inputs (*plain*: what plain torch
reaches there) and in float64 on the same rounded inputs (*truth*). The op's error may be at most twice
the error of plain torch, plus a floor of a few ulp of the output's own scale. There is no absolute
tolerance, so an output that is tiny throughout is still checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

FACTOR = 2.0
"""Times the error of plain torch."""
ULPS = 8.0
"""Floor in ulp of the output's own scale."""

Function = Callable[..., Tensor | Sequence[Tensor]]


def assert_close(name: str, actual: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Fails unless ``actual`` is about as near to ``truth`` as ``plain`` is, in the largest and the mean square error.

    actual, plain: any shape, one dtype. truth: same shape, float64.
    """
    assert actual.shape == truth.shape, f"{name}: shape {list(actual.shape)}, expected {list(truth.shape)}"
    assert actual.dtype == plain.dtype, f"{name}: dtype {actual.dtype}, expected {plain.dtype}"
    if truth.numel() == 0:
        return
    wide, truth = actual.detach().double(), truth.detach().double()
    assert torch.isfinite(wide).all(), f"{name}: {int((~torch.isfinite(wide)).sum())} values are not finite"
    error, plain_error = wide - truth, plain.detach().double() - truth
    ulp = torch.finfo(actual.dtype).eps
    for kind, norm in (("largest", lambda x: x.abs().max()), ("root mean square", lambda x: x.square().mean().sqrt())):
        bound = FACTOR * norm(plain_error) + ULPS * ulp * norm(truth)
        got = norm(error)
        assert got <= bound, (
            f"{name}: {kind} error {got:.3e} exceeds {bound:.3e} "
            f"(plain torch {norm(plain_error):.3e}, scale {norm(truth):.3e})"
        )


def assert_zero_fails(name: str, actual: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Fails unless an output of zeros, and one of half the size, would be rejected by :func:`assert_close`."""
    assert truth.detach().abs().max() > 0, f"{name}: the case is vacuous, its true value is zero"
    for factor in (0.0, 0.5):
        with pytest.raises(AssertionError):
            assert_close(name, actual.detach() * factor, plain, truth)


def run(function: Function, inputs: dict[str, Tensor], upstream_seed: int = 0) -> dict[str, Tensor]:
    """Outputs of ``function(**inputs)`` and the gradients of its floating inputs, by name.

    The upstream gradients are random, a function of the seed, and the same for every dtype.
    """
    leaves = {
        name: x.detach().requires_grad_() if x.is_floating_point() else x  # no clone: it would lose gaps between rows
        for name, x in inputs.items()
    }
    outputs = function(**leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    generator = torch.Generator().manual_seed(upstream_seed)
    upstream = [torch.randn(y.shape, generator=generator, dtype=torch.float32).to(y) for y in outputs]
    wrt = {name: x for name, x in leaves.items() if x.is_floating_point()}
    gradients = torch.autograd.grad(outputs, list(wrt.values()), upstream, allow_unused=True)
    result = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    for (name, x), gradient in zip(wrt.items(), gradients, strict=True):
        result[f"gradient of {name}"] = torch.zeros_like(x) if gradient is None else gradient
    return result


def compare(op: Function, reference: Function, inputs: dict[str, Tensor], vacuous: Sequence[str] = ()) -> None:
    """Compares outputs and every gradient of ``op`` with ``reference``, and shows that zeroed ones fail.

    inputs: name to tensor, floating ones in the dtype under test; strides are kept. For float64 the reference
        itself is the truth and only the floor is left.
    vacuous: names of results (``output 0``, ``gradient of x``) whose true value is zero in this case.
    """
    truth = run(reference, {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()})
    plain, actual = run(reference, inputs), run(op, inputs)
    for name in truth:
        assert_close(name, actual[name], plain[name], truth[name])
        if truth[name].numel() > 0 and name not in vacuous:
            assert_zero_fails(name, actual[name], plain[name], truth[name])
