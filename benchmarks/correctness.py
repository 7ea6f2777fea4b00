"""Every op against its float64 specification on fresh random inputs, in several dtypes, outputs and all gradients.

The cases are those of ``hstu-doctor`` (``hstu/parity.py``: odd widths, empty users) and :data:`REAL`, the same ops at
the sizes of the published models. Truth is ``kernels/<op>/reference.py`` in float64 from the inputs rounded to the
dtype under test; the op may err twice as much as the reference run in that dtype, plus a few units in the last place of
the values' own scale. So a zeroed output fails, however small it is.

Legend: B users, L total events, H heads, A query/key width, V value width, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hstu import parity
from hstu.parity import Case

ULPS = 8
"""Allowed units in the last place of the largest value, beside twice the error of plain torch."""
FACTOR = 2.0


@dataclass(frozen=True)
class Check:
    """Outcome of one case in one dtype: the largest error of each value as a share of the allowed one."""

    op: str
    case: str
    dtype: str
    share: float
    worst: str
    """The value with the largest share."""
    error: str | None
    """Why it failed; None when all is well."""


def _attention(g: torch.Generator, device: torch.device, users: int, heads: int, width: int, longest: int,
               rab: bool) -> Case:  # fmt: skip
    from kernels.attention import TimeBuckets, attention, make_plan
    from kernels.attention.reference import attention_reference

    lengths = torch.randint(0, longest + 1, (users,), generator=g)
    lengths[0] = longest
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    total = int(offsets[-1])
    tensors = [torch.randn(total, heads, width, generator=g).to(device) for _ in range(3)]
    times = torch.randint(0, 10**5, (total,), generator=g).cumsum(0).to(device)
    timing = (times + 60, times, TimeBuckets()) if rab else ()
    plan = make_plan(offsets.to(device), longest, *timing)
    if rab:
        tensors += [torch.randn(1, n, generator=g).to(device) for n in (2 * longest - 1, TimeBuckets().count)]

    def run(q: Tensor, k: Tensor, v: Tensor, position: Tensor | None = None, time: Tensor | None = None) -> Tensor:
        return attention(q, k, v, plan, position, time, divisor=float(longest))

    def specified(
        q: Tensor, k: Tensor, v: Tensor, position: Tensor | None = None, time: Tensor | None = None
    ) -> Tensor:
        return attention_reference(q, k, v, plan, position, time, float(longest))

    name = f"{users} users to {longest}, {heads}x{width}{', bias' if rab else ''}"
    return Case(name, tensors, len(tensors), run, specified)


def _attention_cases(g: torch.Generator, device: torch.device) -> list[Case]:
    shapes = [(16, 1, 50, 211), (16, 2, 25, 211), (8, 4, 64, 211), (16, 4, 16, 61), (3, 2, 128, 1024)]
    return [_attention(g, device, *shape, rab) for shape in shapes for rab in (False, True)]


def _norm_linear_silu(g: torch.Generator, device: torch.device) -> list[Case]:
    from kernels.norm_linear_silu import norm_linear_silu
    from kernels.norm_linear_silu.reference import norm_linear_silu_reference

    shapes = [(2111, 50, 200), (2111, 256, 1024), (1031, 512, 2048)]
    return [
        Case(f"L{rows} D{dim} O{out}", [_draw(g, device, rows, dim), 0.05 * _draw(g, device, dim, out)], 2,
             norm_linear_silu, norm_linear_silu_reference)
        for rows, dim, out in shapes
    ]  # fmt: skip


def _gate_norm_linear(g: torch.Generator, device: torch.device) -> list[Case]:
    from kernels.gate_norm_linear import gate_norm_linear
    from kernels.gate_norm_linear.reference import gate_norm_linear_reference

    cases = []
    for rows, width, dim in ((2111, 50, 50), (2111, 256, 256), (1031, 512, 512)):
        shapes = [(rows, width), (rows, width), (width, dim), (dim,), (rows, dim)]
        tensors = [_draw(g, device, *shape) for shape in shapes]
        tensors[2] *= 0.05
        cases.append(Case(f"L{rows} W{width} D{dim}", tensors, 5, gate_norm_linear, gate_norm_linear_reference))
    return cases


def _draw(g: torch.Generator, device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g).to(device)


def _ids(g: torch.Generator, device: torch.device, high: int, *shape: int) -> Tensor:
    return torch.randint(1, high + 1, shape, generator=g).to(device)


def _sampled_softmax(g: torch.Generator, device: torch.device) -> list[Case]:
    from kernels.sampled_softmax import sampled_softmax
    from kernels.sampled_softmax.reference import sampled_softmax_reference

    cases = []
    for rows, dim, items, drawn in ((1009, 50, 3883, 128), (509, 256, 27_278, 128), (509, 64, 20_011, 512)):
        labels, negatives = _ids(g, device, items, rows), _ids(g, device, items, rows, drawn)
        cases.append(
            Case(
                f"L{rows} D{dim} R{drawn}",
                [_draw(g, device, rows, dim), _draw(g, device, items + 1, dim)],
                2,
                lambda q, e, labels=labels, negatives=negatives: sampled_softmax(q, e, labels, negatives),
                lambda q, e, labels=labels, negatives=negatives: sampled_softmax_reference(q, e, labels, negatives),
            )
        )
    return cases


def _linear_cross_entropy(g: torch.Generator, device: torch.device) -> list[Case]:
    from kernels.linear_cross_entropy import linear_cross_entropy
    from kernels.linear_cross_entropy.reference import linear_cross_entropy_reference

    cases = []
    for rows, dim, items in ((509, 50, 3883), (251, 256, 27_278)):
        labels = _ids(g, device, items, rows)
        cases.append(
            Case(
                f"L{rows} D{dim} items {items}",
                [_draw(g, device, rows, dim), _draw(g, device, items + 1, dim)],
                2,
                lambda q, e, labels=labels: linear_cross_entropy(q, e, labels),
                lambda q, e, labels=labels: linear_cross_entropy_reference(q, e, labels),
            )
        )
    return cases


REAL: dict[str, Callable[[torch.Generator, torch.device], list[Case]]] = {
    "attention": _attention_cases,
    "norm_linear_silu": _norm_linear_silu,
    "gate_norm_linear": _gate_norm_linear,
    "sampled_softmax": _sampled_softmax,
    "linear_cross_entropy": _linear_cross_entropy,
}
"""Cases at the sizes of the published models. Ranks are whole numbers: rank_and_topk is compared in float32 only."""
EXACT = ("rank_and_topk",)
"""Ops whose results are ranks and ids, which a rounding of the scores may change: compared in float32 alone."""


def _values(case: Case, function: Callable[..., Tensor], inputs: Sequence[Tensor], seed: int) -> dict[str, Tensor]:
    """Output and gradients of ``function``, as float64."""
    tensors = [t.detach().clone() for t in inputs]
    for t in tensors[: case.num_grads]:
        t.requires_grad_(True)
    out = function(*tensors)
    values = {"output": out}
    if case.num_grads:
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(inputs[0].dtype).to(out)
        grads = torch.autograd.grad(out, tensors[: case.num_grads], upstream)
        values |= {f"gradient of input {i}": grad for i, grad in enumerate(grads)}
    return {name: value.detach().double().cpu() for name, value in values.items()}


def error_share(value: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    """Largest error of ``value`` (all float64) as a share of the allowed one; inf where it is not finite."""
    if value.shape != truth.shape or not bool(torch.isfinite(value).all()):
        return float("inf")
    if truth.numel() == 0:
        return 0.0
    scale = float(truth.abs().max())
    allowed = FACTOR * float((plain - truth).abs().max()) + ULPS * torch.finfo(dtype).eps * scale
    error = float((value - truth).abs().max())
    return error / allowed if allowed > 0 else (0.0 if error == 0 else float("inf"))


def _check(op: str, case: Case, dtype: torch.dtype, seed: int) -> Check:
    name = str(dtype).removeprefix("torch.")
    try:
        rounded = [t.to(dtype) for t in case.tensors]
        truth = _values(case, case.reference, [t.double() for t in rounded], seed)
        plain = _values(case, case.reference, rounded, seed)
        found = _values(case, case.run, rounded, seed)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return Check(op, case.name, name, float("inf"), "", f"{type(error).__name__}: {lines[0][:200]}")
    shares = {key: error_share(found[key], plain[key], truth[key], dtype) for key in truth}
    worst = max(shares, key=lambda key: shares[key])
    failed = None if shares[worst] <= 1 else f"{worst} is {shares[worst]:.3g} times the allowed error away"
    return Check(op, case.name, name, shares[worst], worst, failed)


def check_op(op: str, device: torch.device, dtypes: Sequence[torch.dtype], seed: int, real: bool = True) -> list[Check]:
    """Runs every case of an op in every dtype; an exception of the op becomes a failed check.

    Args:
        op: name.
        device: where the op runs.
        dtypes: of the inputs.
        seed: of the inputs; a fresh one each time finds more.
        real: also the cases at real sizes.
    """
    generator = torch.Generator().manual_seed(seed)
    cases = parity.CASES[op](generator, device)
    if real and op in REAL:
        cases += REAL[op](generator, device)
    wanted = [torch.float32] if op in EXACT else dtypes
    return [_check(op, case, dtype, seed + 1) for case in cases for dtype in wanted]
