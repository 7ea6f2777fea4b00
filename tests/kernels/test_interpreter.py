"""The tests' faster scan of Triton's interpreter gives what the interpreter's own loop gives."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, not interpreted")


@triton.jit
def _within_run(sum_a, start_a, sum_b, start_b):
    return tl.where(start_b > 0, sum_b, sum_a + sum_b), start_a | start_b


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _scan_kernel(X, Starts, Sums, Seen, Largest, AXIS: tl.constexpr, REVERSE: tl.constexpr):
    at = tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :]
    sums, seen = tl.associative_scan((tl.load(X + at), tl.load(Starts + at)), AXIS, _within_run, reverse=REVERSE)
    tl.store(Sums + at, sums)
    tl.store(Seen + at, seen)
    row = tl.arange(0, 8)
    tl.store(Largest + row, tl.associative_scan(tl.load(X + row), 0, _larger, reverse=REVERSE))


@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("axis", [0, 1], ids=["down", "across"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_scans_by_hand(axis, reverse, dtype):
    g = torch.Generator().manual_seed(0)
    x, starts = torch.randn(4, 8, generator=g).to(dtype), torch.randint(0, 2, (4, 8), generator=g, dtype=torch.int32)
    sums, seen, largest = torch.empty_like(x), torch.empty_like(starts), torch.empty_like(x[0])
    _scan_kernel[(1,)](x, starts, sums, seen, largest, axis, reverse)

    def turned(t: torch.Tensor) -> torch.Tensor:
        """The scanned axis first, in the scan's direction."""
        t = t if axis == 0 else t.T
        return t.flip(0) if reverse else t

    expected, flags = turned(x).clone(), turned(starts).clone()
    for i in range(1, len(expected)):
        expected[i] = torch.where(flags[i] > 0, expected[i], expected[i - 1] + expected[i])
        flags[i] |= flags[i - 1]
    assert torch.equal(turned(sums), expected)
    assert torch.equal(turned(seen), flags)
    row = x[0].flip(0) if reverse else x[0]
    row = row.cummax(0).values
    assert torch.equal(largest, row.flip(0) if reverse else row)
