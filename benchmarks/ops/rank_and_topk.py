"""Benchmark points of ``rank`` and ``topk`` and what a user would pick instead.

Useful work: one product of B x V x D. Bytes: queries and table once.

Legend: B users, D model width, V items, S seen items per user.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops import Absent, AotCase, Expect, Problem, Run, Sizes, Work, nbytes
from kernels.rank_and_topk import rank, topk

SCORES_LIMIT_GIB = 24.0
"""Plain torch holds [B, V] scores: beyond this it is left out."""

_QUICK: list[dict[str, Any]] = [
    {"name": "ml-1m-rank", "B": 1_024, "D": 50, "V": 3_883, "S": 200},
    {"name": "ml-20m-rank", "B": 1_024, "D": 256, "V": 27_278, "S": 200},
    {"name": "ml-20m-top10", "B": 1_024, "D": 256, "V": 27_278, "S": 200, "k": 10},
    {"name": "books-rank", "B": 1_024, "D": 64, "V": 695_762, "S": 50},
]
SIZES: dict[str, list[dict[str, Any]]] = {
    "toy": [
        {"name": "toy-rank", "B": 4, "D": 8, "V": 50, "S": 3},
        {"name": "toy-top5", "B": 4, "D": 8, "V": 50, "S": 3, "k": 5},
    ],
    "quick": _QUICK,
    "full": [
        *_QUICK,
        {"name": "books-top200", "B": 1_024, "D": 64, "V": 695_762, "S": 50, "k": 200},
        {"name": "million-top10", "B": 64, "D": 256, "V": 1_000_000, "S": 200, "k": 10},
    ],
}
VERSUS = ["ml-1m-rank", "ml-20m-rank", "ml-20m-top10"]
DEFAULTS: dict[str, Any] = {"B": 512, "D": 64, "V": 10_000, "S": 100, "k": 0}
"""k: 0 ranks a target, above 0 finds the k best."""


def make(sizes: Sizes, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Problem:
    """Random inputs of one point; see ``benchmarks.ops``."""
    users, width, num_items, seen, k = (sizes[name] for name in ("B", "D", "V", "S", "k"))
    queries = torch.randn(users, width, device=device, dtype=dtype, generator=generator)
    table = torch.randn(num_items + 1, width, device=device, dtype=dtype, generator=generator)
    targets = torch.randint(1, num_items + 1, (users,), device=device, generator=generator)
    seen_ids = torch.randint(1, num_items + 1, (users, seen), device=device, generator=generator)
    offsets = torch.arange(0, users * seen + 1, max(1, seen), device=device)[: users + 1]
    flat = seen_ids.flatten()
    if k:
        ours = Run(lambda: topk(queries, table, k, flat, offsets))
    else:
        ours = Run(lambda: rank(queries, table, targets, flat, offsets))
    return Problem(
        ours,
        forward=Work(2.0 * users * num_items * width, nbytes(queries, table, flat)),
        competitors={"torch": lambda: _torch(queries, table, targets, seen_ids, k)},
        tokens=users,
    )


def _torch(queries: Tensor, table: Tensor, targets: Tensor, seen_ids: Tensor, k: int) -> Run:
    """One product, seen items at minus infinity, then a comparison or topk."""
    if queries.shape[0] * table.shape[0] * 4 > SCORES_LIMIT_GIB * 2**30:
        raise Absent(f"holds [B, V] scores, more than {SCORES_LIMIT_GIB:g} GiB")

    def forward() -> Tensor:
        scores = (F.normalize(queries, dim=-1) @ F.normalize(table, dim=-1).mT).float()
        own = scores.gather(1, targets[:, None])
        scores[:, 0] = -torch.inf
        scores.scatter_(1, seen_ids, -torch.inf)
        if k:
            return scores.topk(k, dim=1).values
        scores.scatter_(1, targets[:, None], own)
        return 1 + (scores > own).sum(dim=1) + 0.5 * ((scores == own).sum(dim=1) - 1)

    return Run(forward)


def aot_cases() -> list[AotCase]:
    """Ahead-of-time cases at the widths of the published models."""
    products = Expect(("_rank_kernel", "_topk_kernel"))
    cases: list[AotCase] = []
    for name, width in (("ml-1m", 50), ("ml-20m", 256)):
        cases.append((f"{name} D{width} bf16", partial(_compile, width, torch.bfloat16, 10), products))
        cases.append((f"{name} D{width} fp32", partial(_compile, width, torch.float32, 10)))
    cases.append(("large D512 fp32 top 1000", partial(_compile, 512, torch.float32, 1_000)))
    return cases


def _compile(width: int, dtype: torch.dtype, k: int) -> None:
    from kernels.rank_and_topk.kernel import rank_fwd, topk_fwd

    queries, table = torch.ones(70, width, dtype=dtype), torch.ones(999, width, dtype=dtype)
    seen, offsets = torch.ones(70, dtype=torch.int64), torch.arange(71)
    rank_fwd(queries, table, torch.ones(70, dtype=torch.int64), seen, offsets, True, 1e-6, 64)
    topk_fwd(queries, table, k, seen, offsets, True, 1e-6, 64)
