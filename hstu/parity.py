"""A small numeric check of every op against its specification, on the device at hand; ``hstu-doctor`` prints it.

Truth is ``kernels/<op>/reference.py`` in float64 from the same float32 inputs. An op's error, in outputs and in
every gradient, may be twice that of the reference in float32 plus a few units in the last place of the values' own
scale: a wrong formula, a zeroed output and a broken build all fail.

Legend: B users, L total events, H heads, A query/key width, V value width, D model width, N padded length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

ULPS = 32
"""Allowed units in the last place of the largest value, beside twice the error of plain float32."""
LENGTHS = (5, 0, 1, 17, 64, 3)
"""Events of the users of the test batch: an empty user, one event, a full block of 64 rows."""
NUM_ITEMS = 41
SEED = 20_240_217


@dataclass(frozen=True)
class Case:
    """One op on one set of small inputs.

    ``run`` is the public op, ``reference`` its specification; both take the tensors by position. The first
    ``num_grads`` tensors get gradients.
    """

    name: str
    tensors: list[Tensor]
    num_grads: int
    run: Callable[..., Tensor]
    reference: Callable[..., Tensor]


@dataclass(frozen=True)
class Outcome:
    """Largest error of a case as a share of what is allowed; ``error`` names what failed, None when all is well."""

    op: str
    case: str
    share: float
    error: str | None


def _draw(generator: torch.Generator, device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator).to(device)


def _ids(generator: torch.Generator, device: torch.device, *shape: int) -> Tensor:
    return torch.randint(1, NUM_ITEMS + 1, shape, generator=generator).to(device)


def _attention(g: torch.Generator, device: torch.device) -> list[Case]:
    from kernels.attention import TimeBuckets, attention, make_plan
    from kernels.attention.reference import attention_reference

    heads, qk_dim, v_dim, width = 2, 25, 8, 75
    length = sum(LENGTHS)
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    times = torch.randint(0, 10**6, (length,), generator=g).sort().values
    request = times + 60
    plan = make_plan(offsets.to(device), max(LENGTHS), request.to(device), times.to(device), TimeBuckets())
    q, k = _draw(g, device, length, heads, qk_dim), _draw(g, device, length, heads, qk_dim)
    v = _draw(g, device, length, heads, v_dim)
    position, time = _draw(g, device, 1, 2 * width - 1), _draw(g, device, heads, 129)
    scale = qk_dim**-0.5
    # The last rows of the longest users as queries over the same keys; of the 17 rows, 3 of the 4 are candidates.
    last = [torch.arange(end - rows, end) for end, rows in ((23, 4), (87, 2))]
    cached = make_plan(
        torch.tensor([0, 4, 6], device=device), max(LENGTHS), request[torch.cat(last)].to(device), times.to(device),
        TimeBuckets(), num_targets=torch.tensor([3, 0], device=device), max_query_len=4,
        key_starts=torch.tensor([6, 23], device=device), key_lengths=torch.tensor([17, 64], device=device),
    )  # fmt: skip
    return [
        Case(
            "with position and time bias",
            [q, k, v, position, time],
            5,
            lambda q, k, v, p, t: attention(q, k, v, plan, p, t, divisor=float(width), scale=scale),
            lambda q, k, v, p, t: attention_reference(q, k, v, plan, p, t, float(width), scale),
        ),
        Case(
            "without bias",
            [q, k, v],
            3,
            lambda q, k, v: attention(q, k, v, plan, divisor=float(width), scale=scale),
            lambda q, k, v: attention_reference(q, k, v, plan, None, None, float(width), scale),
        ),
        Case(
            "cached keys, candidates",
            [_draw(g, device, 6, heads, qk_dim), k, v, position, time],
            5,
            lambda q, k, v, p, t: attention(q, k, v, cached, p, t, divisor=float(width), scale=scale),
            lambda q, k, v, p, t: attention_reference(q, k, v, cached, p, t, float(width), scale),
        ),
    ]


def _norm_linear_silu(g: torch.Generator, device: torch.device) -> list[Case]:
    from kernels.norm_linear_silu import norm_linear_silu
    from kernels.norm_linear_silu.reference import norm_linear_silu_reference

    tensors = [_draw(g, device, 37, 50), _draw(g, device, 50, 66)]
    return [Case("", tensors, 2, norm_linear_silu, norm_linear_silu_reference)]


def _gate_norm_linear(g: torch.Generator, device: torch.device) -> list[Case]:
    from kernels.gate_norm_linear import gate_norm_linear
    from kernels.gate_norm_linear.reference import gate_norm_linear_reference

    shapes = [(37, 48), (37, 48), (48, 50), (50,), (37, 50)]
    tensors = [_draw(g, device, *shape) for shape in shapes]
    rows = torch.arange(36, -1, -1, device=device) * 3
    return [
        Case("no dropout", tensors, 5, gate_norm_linear, gate_norm_linear_reference),
        Case(
            "dropout 0.2",
            tensors,
            5,
            partial(gate_norm_linear, dropout=0.2, seed=7),
            partial(gate_norm_linear_reference, dropout=0.2, seed=7),
        ),
        Case(
            "dropout 0.2 by given rows",
            tensors,
            5,
            partial(gate_norm_linear, dropout=0.2, seed=7, rows=rows),
            partial(gate_norm_linear_reference, dropout=0.2, seed=7, rows=rows),
        ),
    ]


def _sampled_softmax(g: torch.Generator, device: torch.device) -> list[Case]:
    from kernels.sampled_softmax import bank_softmax, sampled_softmax
    from kernels.sampled_softmax.cpu import draw_negatives
    from kernels.sampled_softmax.reference import bank_softmax_reference, sampled_softmax_reference

    queries, table = _draw(g, device, 19, 25), _draw(g, device, NUM_ITEMS + 1, 25)
    labels, negatives, bank = _ids(g, device, 19), _ids(g, device, 19, 11), _ids(g, device, 23)
    rows = torch.arange(18, -1, -1, device=device) * 3
    drawn, drawn_by_rows = (draw_negatives(19, 11, NUM_ITEMS, SEED, device, r) for r in (None, rows))
    return [
        Case(
            "own negatives",
            [queries, table],
            2,
            lambda q, e: sampled_softmax(q, e, labels, negatives),
            lambda q, e: sampled_softmax_reference(q, e, labels, negatives),
        ),
        Case(
            "drawn negatives",
            [queries, table],
            2,
            lambda q, e: sampled_softmax(q, e, labels, num_negatives=11, seed=SEED),
            lambda q, e: sampled_softmax_reference(q, e, labels, drawn),
        ),
        Case(
            "drawn negatives by given rows",
            [queries, table],
            2,
            lambda q, e: sampled_softmax(q, e, labels, num_negatives=11, seed=SEED, rows=rows),
            lambda q, e: sampled_softmax_reference(q, e, labels, drawn_by_rows),
        ),
        Case(
            "shared bank",
            [queries, table],
            2,
            lambda q, e: bank_softmax(q, e, labels, bank),
            lambda q, e: bank_softmax_reference(q, e, labels, bank),
        ),
    ]


def _linear_cross_entropy(g: torch.Generator, device: torch.device) -> list[Case]:
    from kernels.linear_cross_entropy import linear_cross_entropy
    from kernels.linear_cross_entropy.reference import linear_cross_entropy_reference

    queries, table, labels = _draw(g, device, 19, 25), _draw(g, device, NUM_ITEMS + 1, 25), _ids(g, device, 19)
    return [
        Case(
            "",
            [queries, table],
            2,
            lambda q, e: linear_cross_entropy(q, e, labels),
            lambda q, e: linear_cross_entropy_reference(q, e, labels),
        )
    ]


def _rank_and_topk(g: torch.Generator, device: torch.device) -> list[Case]:
    from kernels.rank_and_topk import rank, topk
    from kernels.rank_and_topk.reference import rank_reference, topk_reference

    queries, table = _draw(g, device, 7, 25), _draw(g, device, NUM_ITEMS + 1, 25)
    targets, seen = _ids(g, device, 7), _ids(g, device, 21)
    offsets = torch.arange(0, 22, 3, device=device)
    return [
        Case(
            "rank",
            [queries, table],
            0,
            lambda q, e: rank(q, e, targets, seen, offsets),
            lambda q, e: rank_reference(q, e, targets, seen, offsets).to(q.device),
        ),
        Case(
            "ids of the best",
            [queries, table],
            0,
            lambda q, e: topk(q, e, 10, seen, offsets)[1].double(),
            lambda q, e: topk_reference(q, e, 10, seen, offsets)[1].double().to(q.device),
        ),
        Case(
            "scores of the best",
            [queries, table],
            0,
            lambda q, e: topk(q, e, 10, seen, offsets)[0],
            lambda q, e: topk_reference(q, e, 10, seen, offsets)[0],
        ),
    ]


def _jagged(g: torch.Generator, device: torch.device) -> list[Case]:
    from kernels import jagged
    from kernels.jagged import reference

    a_offsets = torch.tensor([0, *LENGTHS]).cumsum(0).to(device)
    b_offsets = torch.tensor([0, *reversed(LENGTHS)]).cumsum(0).to(device)
    length, longest = sum(LENGTHS), max(LENGTHS)
    a, b, table = (_draw(g, device, rows, 25) for rows in (length, length, longest + 2))
    dense = _draw(g, device, len(LENGTHS), longest, 25)

    def on(function: Callable[..., Tensor], *rest: object) -> Callable[..., Tensor]:
        return lambda *tensors: function(*tensors, *rest)

    return [
        Case(
            "interleave",
            [a, b],
            2,
            lambda a, b: jagged.interleave(a, b, a_offsets)[0],
            lambda a, b: reference.interleave_reference(a, b, a_offsets)[0],
        ),
        Case(
            "concat",
            [a, b],
            2,
            lambda a, b: jagged.concat_jagged(a, a_offsets, b, b_offsets)[0],
            lambda a, b: reference.concat_jagged_reference(a, a_offsets, b, b_offsets)[0],
        ),
        Case(
            "split",
            [torch.cat((a, b))],
            1,
            lambda x: jagged.split_jagged(x, a_offsets, b_offsets, length)[1],
            lambda x: reference.split_jagged_reference(x, a_offsets, b_offsets)[1],
        ),
        Case(
            "to dense",
            [a],
            1,
            on(jagged.jagged_to_dense, a_offsets, 20),
            on(reference.jagged_to_dense_reference, a_offsets, 20),
        ),
        Case(
            "to jagged",
            [dense],
            1,
            on(jagged.dense_to_jagged, a_offsets, length),
            on(reference.dense_to_jagged_reference, a_offsets),
        ),
        Case(
            "positions and dropout 0.2",
            [a, table],
            2,
            on(jagged.add_positions, a_offsets, 5.0, longest, 0.2, 7),
            on(reference.add_positions_reference, a_offsets, 5.0, 0.2, 7),
        ),
    ]


CASES: dict[str, Callable[[torch.Generator, torch.device], list[Case]]] = {
    "attention": _attention,
    "norm_linear_silu": _norm_linear_silu,
    "gate_norm_linear": _gate_norm_linear,
    "sampled_softmax": _sampled_softmax,
    "linear_cross_entropy": _linear_cross_entropy,
    "rank_and_topk": _rank_and_topk,
    "jagged": _jagged,
}
"""One entry per op of ``kernels._backend.OPS``."""


def _values(case: Case, function: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients of ``function`` on the case's inputs in ``dtype``, as float64 on the CPU."""
    tensors = [t.to(dtype, copy=True) for t in case.tensors]
    for t in tensors[: case.num_grads]:
        t.requires_grad_(True)
    out = function(*tensors)
    values = {"output": out}
    if case.num_grads:
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(SEED + 1)).to(out)
        grads = torch.autograd.grad(out, tensors[: case.num_grads], cotangent)
        values.update({f"gradient of input {i}": grad for i, grad in enumerate(grads)})
    return {name: value.detach().double().cpu() for name, value in values.items()}


def compare(value: Tensor, truth: Tensor, plain: Tensor) -> float:
    """Error of ``value`` as a share of the allowed error; inf where it is not finite or has another shape."""
    if value.shape != truth.shape or not bool(torch.isfinite(value).all()):
        return float("inf")
    scale = float(truth.abs().max()) if truth.numel() else 0.0
    allowed = 2.0 * float((plain - truth).abs().max()) + ULPS * torch.finfo(torch.float32).eps * scale
    error = float((value - truth).abs().max())
    return error / allowed if allowed > 0 else (0.0 if error == 0 else float("inf"))


def check_op(op: str, device: torch.device) -> list[Outcome]:
    """Runs every case of ``op``; an exception of the op becomes an outcome, it does not come out."""
    generator = torch.Generator().manual_seed(SEED)
    try:
        cases = CASES[op](generator, device)
    except Exception as error:  # a missing op, a build that cannot be loaded
        return [Outcome(op, "", float("inf"), _first_line(error))]
    return [_check(op, case) for case in cases]


def _check(op: str, case: Case) -> Outcome:
    try:
        truth = _values(case, case.reference, torch.float64)
        plain = _values(case, case.reference, torch.float32)
        found = _values(case, case.run, torch.float32)
    except Exception as error:
        return Outcome(op, case.name, float("inf"), _first_line(error))
    shares = {name: compare(found[name], truth[name], plain[name]) for name in truth}
    worst = max(shares, key=lambda name: shares[name])
    failed = None if shares[worst] <= 1.0 else f"{worst} is {shares[worst]:.3g} times the allowed error away"
    return Outcome(op, case.name, shares[worst], failed)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
