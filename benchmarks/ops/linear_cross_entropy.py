"""Benchmark points of ``linear_cross_entropy`` and what a user would pick instead.

Useful work: one product of L x V x D forward, two backward (to queries and to items); what is computed again does not
count. Bytes: queries and table once, their gradients once.

Legend: L positions, D model width, V items.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops import Absent, AotCase, Expect, Problem, Run, Sizes, Work, leaf, nbytes
from kernels.linear_cross_entropy import linear_cross_entropy

TEMPERATURE = 0.05
LOGITS_LIMIT_GIB = 24.0
"""Plain torch keeps [L, V] logits: beyond this it is left out."""

_QUICK: list[dict[str, Any]] = [
    {"name": "ml-1m", "L": 20_000, "D": 50, "V": 3_883},
    {"name": "ml-20m", "L": 25_600, "D": 256, "V": 26_744},
    {"name": "books", "L": 6_400, "D": 64, "V": 695_762},
]
SIZES: dict[str, list[dict[str, Any]]] = {
    "toy": [{"name": "toy", "L": 16, "D": 8, "V": 50}],
    "quick": _QUICK,
    "full": [*_QUICK, {"name": "million", "L": 8_192, "D": 512, "V": 1_000_000}],
}
VERSUS = ["ml-1m", "ml-20m"]
DEFAULTS: dict[str, Any] = {"L": 20_000, "D": 64, "V": 10_000}


def make(sizes: Sizes, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Problem:
    """Random inputs of one point; see ``benchmarks.ops``."""
    length, width, num_items = sizes["L"], sizes["D"], sizes["V"]
    queries = leaf((length, width), device, dtype, generator)
    table = leaf((num_items + 1, width), device, dtype, generator)
    labels = torch.randint(1, num_items + 1, (length,), device=device, generator=generator)
    flops, reads = 2.0 * length * num_items * width, nbytes(queries, table, labels)
    return Problem(
        Run(lambda: linear_cross_entropy(queries, table, labels), [queries, table]),
        forward=Work(flops, reads + 4 * length),
        backward=Work(2 * flops, reads + nbytes(queries, table)),
        competitors={"torch": lambda: _torch(queries, table, labels)},
        tokens=length,
    )


def _torch(queries: Tensor, table: Tensor, labels: Tensor) -> Run:
    """Normalise, one product, cross_entropy: the logits are kept."""
    if queries.shape[0] * table.shape[0] * 4 > LOGITS_LIMIT_GIB * 2**30:
        raise Absent(f"keeps [L, V] logits, more than {LOGITS_LIMIT_GIB:g} GiB")
    q, e = (x.detach().clone().requires_grad_() for x in (queries, table))

    def forward() -> Tensor:
        logits = F.normalize(q, dim=-1) @ F.normalize(e[1:], dim=-1).mT / TEMPERATURE
        return F.cross_entropy(logits.float(), labels - 1, reduction="none")

    return Run(forward, [q, e])


def aot_cases() -> list[AotCase]:
    """Ahead-of-time cases at the widths of the published models."""
    products = ("_softmax_blocks_fwd_kernel", "_softmax_blocks_dq_kernel", "_softmax_blocks_de_kernel")
    cases: list[AotCase] = []
    for name, width in (("ml-1m", 50), ("books", 64), ("ml-20m", 256), ("large", 512)):
        cases.append((f"{name} D{width} bf16", partial(_compile, width, torch.bfloat16), Expect(products)))
    for name, width in (("ml-1m", 50), ("ml-20m", 256)):
        cases.append((f"{name} D{width} fp32", partial(_compile, width, torch.float32)))
    return cases


def _compile(width: int, dtype: torch.dtype) -> None:
    from kernels.linear_cross_entropy.kernel import problem, softmax_blocks_bwd, softmax_blocks_fwd

    queries, table = torch.ones(999, width, dtype=dtype), torch.ones(999, width, dtype=dtype)
    labels = torch.ones(999, dtype=torch.int64)
    p = problem(queries, table, labels, None, None, None, 1 / TEMPERATURE, True, 1e-6, dtype)
    softmax_blocks_bwd(p, torch.ones(999), *softmax_blocks_fwd(p), True, dtype, dtype)
