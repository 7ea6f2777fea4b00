"""What one op's benchmark is: ``benchmarks/ops/<op>.py``, one module per op of ``kernels._backend.OPS``.

A module defines these names:

    SIZES: dict[str, list[Sizes]]
        By preset (``toy``, ``quick``, ``full``) the points that are timed, each a flat mapping of numbers, strings
        and booleans such as {"name": "ml-1m", "B": 128, "S": 211, "D": 50}. ``toy`` takes a CPU well under a second
        in all; ``quick`` at most a minute on a GPU, the points that decide; ``full`` everything. ``name`` is optional
        and names the point; so is ``lengths``: full or skewed (:func:`make_lengths`).
    VERSUS: list[str]   (optional)
        Names of the ``quick`` points at which the GPU report times the competitors too; without it at all of them.
    DEFAULTS: Sizes
        Value of every size a point leaves out (``hstu-bench op=... 'sizes={B:8}'`` too); a size that is not in here
        is refused.
    make(sizes, device, dtype, generator) -> Problem
        Random inputs on the device for one point, all sizes filled in. Called several times for one point when the
        inputs would fit in a cache, so that the timed calls rotate over several sets of inputs. ``dtype`` is that of
        the activations; ids are int64. The generator lies on the device. Nothing may be cached between calls.
    aot_cases() -> list[AotCase]
        What ``python -m benchmarks.aot`` compiles without a GPU: (name, function) pairs, the function running the
        launchers, forward and backward, on small CPU tensors of the real widths and dtypes. A third entry may be
        :class:`Expect`; without it: no spills, no matrix instruction asked for.

Example (``benchmarks/ops/double.py``):

    SIZES = {"toy": [{"L": 64}], "quick": [{"L": 27_000, "D": 50}], "full": [{"L": 27_000, "D": d} for d in (50, 256)]}
    DEFAULTS = {"L": 1000, "D": 50}

    def make(sizes, device, dtype, generator):
        x = leaf((sizes["L"], sizes["D"]), device, dtype, generator)
        moved = 2 * nbytes(x)
        return Problem(
            Run(lambda: double(x), [x]),
            forward=Work(flops=x.numel(), bytes=moved),
            backward=Work(flops=x.numel(), bytes=moved),
            competitors={"torch": lambda: Run(lambda: x * 2, [x])},
        )
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels._backend import OPS

PRESETS = ("toy", "quick", "full")
BENCHES = (*OPS, "layer", "scoring")
"""What ``op=`` takes: every op, the whole HSTU layer stack, and scoring candidates with a ranking model."""
Sizes = Mapping[str, Any]


class Absent(Exception):
    """Raised by a competitor that cannot run here (not importable, wrong device, too large); says why."""


@dataclass(frozen=True)
class Work:
    """What a pass has to do at least: the same count for every competitor, whatever it really does.

    ``bytes``: inputs read once and outputs written once, no intermediates; a gathered row counts each time it is
    gathered. ``flops``: of the useful products alone (two per multiply-add; masked pairs and padding do not count).
    """

    flops: float
    bytes: float


@dataclass(frozen=True)
class Run:
    """One implementation, ready to run on inputs it holds."""

    forward: Callable[[], Tensor | Sequence[Tensor]]
    """Computes the output. Repeatable."""
    leaves: Sequence[Tensor] = ()
    """What the backward differentiates with respect to; they require grad. Empty: no backward."""


@dataclass(frozen=True)
class Problem:
    """One point with its inputs: the op as a user calls it, its least work, and what a user would pick instead."""

    ours: Run
    forward: Work
    backward: Work | None = None
    """None: the op has no gradient."""
    competitors: Mapping[str, Callable[[], Run]] = field(default_factory=dict)
    """By name, a function that makes the competitor's :class:`Run` (own copies of the inputs where it needs another
    layout). It raises :class:`Absent` with the reason where it cannot run; imports and compilation belong in here."""
    tokens: int | None = None
    """Events that one call handles, where tokens per second mean something."""


@dataclass(frozen=True)
class Expect:
    """What the compiler must have made of an ahead-of-time case."""

    matrix: Sequence[str] = ()
    """Kernels (function names) in which a matrix instruction must be there: wgmma on sm_90, tcgen05 or mma on sm_100,
    mma on sm_80. For bfloat16 and float16 products with tiles of at least 64."""


AotCase = tuple[str, Callable[[], Any]] | tuple[str, Callable[[], Any], Expect]


def module(op: str) -> ModuleType:
    """The benchmark module of an op."""
    return importlib.import_module(f"benchmarks.ops.{op}")


def leaf(shape: Sequence[int], device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal random tensor that requires grad."""
    return torch.randn(tuple(shape), device=device, dtype=dtype, generator=generator).requires_grad_()


def nbytes(*tensors: Tensor) -> int:
    """Bytes of these tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors)


def make_lengths(num_users: int, longest: int, kind: str, generator: torch.Generator) -> Tensor:
    """Lengths [num_users] int64 on the generator's device.

    full: all are ``longest``. skewed: ``longest`` times the square of evenly spaced quantiles, in random order (mean
    a third, median a quarter of the longest, which one user has); the same lengths for every generator.
    """
    if kind == "full":
        return torch.full((num_users,), longest, dtype=torch.int64, device=generator.device)
    if kind != "skewed":
        raise ValueError(f"lengths={kind!r}: expected full or skewed")
    quantiles = torch.arange(1, num_users + 1, dtype=torch.float64, device=generator.device) / num_users
    lengths = (longest * quantiles.square()).ceil().clamp_(1, longest).to(torch.int64)
    return lengths[torch.randperm(num_users, generator=generator, device=generator.device)]


def make_offsets(lengths: Tensor) -> Tensor:
    """[B+1] int64 prefix sums of lengths [B]."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
