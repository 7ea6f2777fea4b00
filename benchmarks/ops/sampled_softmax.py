"""Benchmark points of ``sampled_softmax`` and ``bank_softmax`` and what a user would pick instead.

Least work, own negatives: each position reads its query, its label's row and R rows, once forward; backward once more,
and adds as many float32 rows to the table's gradient. A bank: the products, as for a full softmax of K items.

Legend: L positions, D model width, R negatives per position, V items, K items of a bank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops import Absent, AotCase, Expect, Problem, Run, Sizes, Work, leaf, nbytes
from kernels.sampled_softmax import bank_softmax, sampled_softmax

TEMPERATURE = 0.05
BACKWARD_FLOPS = 2.0
"""Times the forward's: the logits' gradient goes to queries and to items."""
GATHER_LIMIT_GIB = 24.0
"""Plain torch gathers [L, R, D] and keeps it: beyond this it is left out."""

_QUICK: list[dict[str, Any]] = [
    {"name": "ml-1m", "L": 20_000, "D": 50, "R": 128, "V": 3_883},
    {"name": "ml-20m", "L": 25_600, "D": 256, "R": 128, "V": 26_744},
    {"name": "books", "L": 6_400, "D": 64, "R": 512, "V": 695_762},
    {"name": "bank-ml-20m", "L": 25_600, "D": 256, "V": 26_744, "K": 4_096},
]
SIZES: dict[str, list[dict[str, Any]]] = {
    "toy": [
        {"name": "toy", "L": 16, "D": 8, "R": 4, "V": 50},
        {"name": "toy-bank", "L": 16, "D": 8, "V": 50, "K": 8},
    ],
    "quick": _QUICK,
    "full": [
        *_QUICK,
        {"name": "ml-20m-deterministic", "L": 25_600, "D": 256, "R": 128, "V": 26_744, "deterministic": True},
        {"name": "ml-20m-R512", "L": 25_600, "D": 256, "R": 512, "V": 26_744},
        {"name": "bank-books", "L": 6_400, "D": 64, "V": 695_762, "K": 28_672},
        {"name": "wide", "L": 32_768, "D": 512, "R": 128, "V": 1_000_000},
    ],
}
VERSUS = ["ml-1m", "ml-20m", "bank-ml-20m"]
DEFAULTS: dict[str, Any] = {"L": 20_000, "D": 64, "R": 128, "V": 10_000, "K": 0, "deterministic": False}
"""K above 0: a shared bank of K items instead of own negatives."""


def make(sizes: Sizes, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Problem:
    """Random inputs of one point; see ``benchmarks.ops``."""
    length, width, num_items = sizes["L"], sizes["D"], sizes["V"]
    queries = leaf((length, width), device, dtype, generator)
    table = leaf((num_items + 1, width), device, dtype, generator)
    labels = torch.randint(1, num_items + 1, (length,), device=device, generator=generator)
    # One product per drawn row; a bank's rows are read once.
    rows = sizes["K"] or length * (sizes["R"] + 1)
    pairs = length * (sizes["K"] or sizes["R"] + 1)
    flops = 2.0 * pairs * width
    row_bytes = width * table.element_size()
    reads = nbytes(queries, labels) + rows * row_bytes
    if sizes["K"]:
        bank = torch.randint(1, num_items + 1, (sizes["K"],), device=device, generator=generator)
        ours = Run(
            lambda: bank_softmax(queries, table, labels, bank, deterministic=sizes["deterministic"]), [queries, table]
        )
        competitors: dict[str, Callable[[], Run]] = {"torch": lambda: _torch_bank(queries, table, labels, bank)}
        backward_bytes = reads + nbytes(queries, table)
    else:
        ours = Run(
            lambda: sampled_softmax(
                queries, table, labels, num_negatives=sizes["R"], seed=1, deterministic=sizes["deterministic"]
            ),
            [queries, table],
        )
        competitors = {"torch": lambda: _torch_sampled(queries, table, labels, sizes["R"], generator)}
        backward_bytes = reads + nbytes(queries, table) + rows * width * 4
    return Problem(
        ours,
        forward=Work(flops, reads + 4 * length),
        backward=Work(BACKWARD_FLOPS * flops, backward_bytes),
        competitors=competitors,
        tokens=length,
    )


def _loss(logits: Tensor, own: Tensor) -> Tensor:
    return torch.cat([own[:, None], logits], dim=1).float().logsumexp(dim=1) - own.float()


def _torch_sampled(queries: Tensor, table: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> Run:
    """Draw, look up, normalise, multiply: what a training script does."""
    length, width = queries.shape
    if length * count * width * table.element_size() > GATHER_LIMIT_GIB * 2**30:
        raise Absent(f"gathers [L, R, D], more than {GATHER_LIMIT_GIB:g} GiB")
    q, e = (x.detach().clone().requires_grad_() for x in (queries, table))

    def forward() -> Tensor:
        negatives = torch.randint(1, table.shape[0], (length, count), device=q.device, generator=generator)
        unit_q = F.normalize(q, dim=-1)
        rows = F.normalize(F.embedding(negatives, e), dim=-1)  # [L, R, D]
        own = (unit_q * F.normalize(F.embedding(labels, e), dim=-1)).sum(-1) / TEMPERATURE
        logits = torch.einsum("ld,lrd->lr", unit_q, rows) / TEMPERATURE
        return _loss(logits.masked_fill(negatives == labels[:, None], -torch.inf), own)

    return Run(forward, [q, e])


def _torch_bank(queries: Tensor, table: Tensor, labels: Tensor, bank: Tensor) -> Run:
    q, e = (x.detach().clone().requires_grad_() for x in (queries, table))

    def forward() -> Tensor:
        unit_q = F.normalize(q, dim=-1)
        own = (unit_q * F.normalize(F.embedding(labels, e), dim=-1)).sum(-1) / TEMPERATURE
        logits = unit_q @ F.normalize(F.embedding(bank, e), dim=-1).mT / TEMPERATURE  # [L, K]
        return _loss(logits.masked_fill(bank == labels[:, None], -torch.inf), own)

    return Run(forward, [q, e])


def aot_cases() -> list[AotCase]:
    """Ahead-of-time cases at the widths and counts of the published models."""
    return [
        *(
            (f"{name} {_short(dtype)}", partial(_compile_sampled, width, count, dtype, fixed))
            for name, width, count, fixed in (
                ("ml-1m D50 R128", 50, 128, False),
                ("ml-20m D256 R128", 256, 128, False),
                ("ml-20m D256 R128 deterministic", 256, 128, True),
                ("books D64 R512", 64, 512, False),
                ("large D512 R128", 512, 128, False),
            )
            for dtype in (torch.bfloat16, torch.float32)
            if not (fixed and dtype == torch.float32)
        ),
        *(
            (
                f"{name} bf16, random rows",
                partial(_compile_sampled, width, 128, torch.bfloat16, False, torch.arange(8)),
            )
            for name, width in (("ml-1m D50 R128", 50), ("ml-20m D256 R128", 256))
        ),
        (
            "bank D256 bf16",
            partial(_compile_bank, 256, torch.bfloat16),
            Expect(("_softmax_blocks_fwd_kernel", "_softmax_blocks_dq_kernel", "_softmax_blocks_de_kernel")),
        ),
    ]


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def _compile_sampled(width: int, count: int, dtype: torch.dtype, fixed: bool, rows: torch.Tensor | None = None) -> None:
    from kernels.sampled_softmax.kernel import Draws, finish, sampled_softmax_bwd, sampled_softmax_fwd, touched

    queries, table = torch.ones(8, width, dtype=dtype), torch.ones(99, width, dtype=dtype)
    labels, draws = torch.ones(8, dtype=torch.int64), Draws(None, count, 2**40, rows)
    options: tuple[float, bool, float] = (1 / TEMPERATURE, True, 1e-6)
    _, lse = sampled_softmax_fwd(queries, table, labels, draws, None, None, *options)
    _, sums, quantum = sampled_softmax_bwd(torch.ones(8), queries, table, labels, draws, None, lse, *options, fixed)
    finish(sums, quantum, table, True, 1e-6, dtype)
    touched(labels, draws, 99)


def _compile_bank(width: int, dtype: torch.dtype) -> None:
    from kernels.linear_cross_entropy.kernel import problem, softmax_blocks_bwd, softmax_blocks_fwd

    queries, table = torch.ones(999, width, dtype=dtype), torch.ones(999, width, dtype=dtype)
    labels, ids = torch.ones(999, dtype=torch.int64), torch.ones(500, dtype=torch.int64)
    p = problem(queries, table, labels, ids, torch.ones(500), None, 1 / TEMPERATURE, True, 1e-6, dtype)
    softmax_blocks_bwd(p, torch.ones(999), *softmax_blocks_fwd(p), False, dtype, dtype)
