"""Launchers of the blocked softmax, which ``bank_softmax`` uses too, and how its blocks and splits are chosen.

The kernels are in ``kernels/_softmax_blocks.py``.

Legend: ``L`` positions, ``D`` model width, ``V`` rows of the table, ``K`` items of a bank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._launch import (
    Config,
    config,
    dot_precision,
    interpreting,
    length_bucket,
    num_sms,
    power_of_two,
    select,
    unit_stride,
)
from kernels._rows import finish_fixed, inverse_norms, quantum_of
from kernels._softmax_blocks import (
    _finish_de_kernel,
    _finish_dq_kernel,
    _join_splits_kernel,
    _softmax_blocks_de_kernel,
    _softmax_blocks_dq_kernel,
    _softmax_blocks_fwd_kernel,
)  # fmt: skip

TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
PROGRAMS_PER_SM = 2
"""Programs wanted at a time; fewer blocks than that are split along the other dimension."""
MAX_SPLITS = 64
JOIN_ROWS = 256
FINISH_ELEMENTS = 4096
"""Elements of a tile of the kernel that only reads and writes rows."""

IEEE_CHUNK = 16
"""Columns a product of float32 takes at a time: it holds its operands in registers."""
Blocks = tuple[int, int, int, int]
"""Outer and inner block, warps, pipeline stages."""
Table = dict[int, tuple[Blocks, ...]]
"""By the widest row they are for, in units of two bytes. Compiled for sm_80, sm_90 and sm_100 without spills."""
FWD_BLOCKS: Table = {
    64: ((128, 64, 8, 3), (128, 128, 8, 3), (64, 64, 4, 3)),
    128: ((128, 64, 8, 3), (64, 64, 8, 3), (64, 128, 8, 2)),
    256: ((128, 32, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2)),
    512: ((64, 32, 8, 2), (64, 64, 8, 1), (32, 32, 8, 2)),
    1024: ((32, 16, 8, 2), (16, 16, 8, 2)),
}
GRAD_BLOCKS: Table = {
    64: ((128, 32, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2)),
    128: ((64, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3)),
    256: ((64, 32, 8, 3), (64, 64, 8, 2), (128, 64, 8, 2)),
    512: ((64, 32, 8, 2), (32, 32, 8, 2)),
    1024: ((16, 16, 8, 2), (32, 16, 8, 1)),
}
FWD_BLOCKS_IEEE: Table = {512: ((64, 64, 8, 1), (64, 32, 8, 1)), 1024: ((64, 32, 8, 1), (32, 32, 8, 1))}
GRAD_BLOCKS_IEEE: Table = {512: ((64, 32, 8, 1), (32, 32, 8, 1)), 1024: ((32, 32, 8, 1),), 2048: ((16, 16, 8, 1),)}


@dataclass(frozen=True)
class Problem:
    """What every launch here needs. ``ids`` None: the items are all rows of the table but the first."""

    queries: Tensor
    """[L, D]; read in ``dtype``."""
    table: Tensor
    """[V, D] in ``dtype`` or wider."""
    labels: Tensor
    """[L] int, 1..V - 1."""
    ids: Tensor | None
    """[K] int, 1..V - 1, or None."""
    log_q: Tensor | None
    """[K], with ids."""
    label_log_q: Tensor | None
    """[L]."""
    scale: float
    normalize: bool
    eps: float
    dtype: torch.dtype
    """Of the products' operands."""

    @property
    def num_items(self) -> int:
        """Items the kernels walk over: K, or V with the padding row, which they leave out."""
        return self.table.shape[0] if self.ids is None else self.ids.shape[0]

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments that all three kernels take."""
        return {
            "queries": self.queries, "table": self.table, "labels": self.labels, "ids": self.ids, "log_q": self.log_q,
            "num_items": self.num_items, "length": self.queries.shape[0], "scale": self.scale,
            "D": self.queries.shape[1], "STRIDE_Q": self.queries.stride(0), "STRIDE_E": self.table.stride(0),
            "BANK": self.ids is not None, "NORMALIZE": self.normalize, "LOG_Q": self.log_q is not None,
            "PRECISION": dot_precision(), "DTYPE": TL_DTYPES[self.dtype],
        }  # fmt: skip

    def key(self) -> tuple[Any, ...]:
        """Tuning key."""
        length = self.queries.shape[0]
        return (
            length_bucket(length),
            length_bucket(self.num_items),
            self.queries.shape[1],
            self.dtype,
            dot_precision(),
        )


def problem(queries: Tensor, table: Tensor, labels: Tensor, ids: Tensor | None, log_q: Tensor | None,
            label_log_q: Tensor | None, scale: float, normalize: bool, eps: float,
            dtype: torch.dtype) -> Problem:  # fmt: skip
    """A :class:`Problem` whose tensors have the strides the kernels take."""
    ids, log_q, label_log_q = (None if x is None else x.contiguous() for x in (ids, log_q, label_log_q))
    return Problem(
        unit_stride(queries),
        unit_stride(table),
        labels.contiguous(),
        ids,
        log_q,
        label_log_q,
        scale,
        normalize,
        eps,
        dtype,
    )


def fwd_configs(width: int, dtype: torch.dtype) -> list[Config]:
    """Blocks of positions (outer) and items (inner) of the forward."""
    return _configs(width, dtype, FWD_BLOCKS, FWD_BLOCKS_IEEE)


def grad_configs(width: int, dtype: torch.dtype) -> list[Config]:
    """Blocks of the gradients: the outer dimension's sums [outer, D] stay in registers."""
    return _configs(width, dtype, GRAD_BLOCKS, GRAD_BLOCKS_IEEE)


def _configs(width: int, dtype: torch.dtype, matrix: Table, ieee: Table) -> list[Config]:
    block_d = power_of_two(width)
    slow = dtype == torch.float32 and dot_precision() == "ieee"
    chunk = IEEE_CHUNK if slow else 0
    if interpreting():
        return [config(OUTER=16, INNER=16, BLOCK_D=block_d, CHUNK=chunk)]
    blocks, size = ieee if slow else matrix, block_d * dtype.itemsize // 2
    choices = blocks[min((widest for widest in blocks if widest >= size), default=max(blocks))]
    return [config(w, s, OUTER=outer, INNER=inner, BLOCK_D=block_d, CHUNK=chunk) for outer, inner, w, s in choices]


def _splits(num_outer: int, num_inner: int, c: Config, device: torch.device) -> tuple[int, int]:
    """How many parts the inner dimension is cut into, and the size of a part: a multiple of the inner block."""
    blocks = max(1, triton.cdiv(num_inner, c["INNER"]))
    programs = max(1, triton.cdiv(num_outer, c["OUTER"]))
    wanted = min(MAX_SPLITS, blocks, max(1, PROGRAMS_PER_SM * num_sms(device) // programs))
    per_split = triton.cdiv(blocks, wanted) * c["INNER"]
    return max(1, triton.cdiv(num_inner, per_split)), per_split


def softmax_blocks_fwd(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss [L], log2 of the sum of the exponentials [L], signed inverse norms of the queries [L] and the table [V].

    All float32; the inverse norms are empty without normalisation.
    """
    length, device = p.queries.shape[0], p.queries.device
    loss = torch.empty(length, dtype=torch.float32, device=device)
    lse = torch.empty_like(loss)
    inverse_q = torch.empty(length if p.normalize else 0, dtype=torch.float32, device=device)
    inverse_e = inverse_norms(p.table, p.eps) if p.normalize else torch.empty_like(inverse_q)

    def launch(c: Config) -> None:
        splits, per_split = _splits(length, p.num_items, c, device)
        own = torch.empty_like(loss) if splits > 1 else loss
        parts = loss.new_empty(splits, length) if splits > 1 else lse
        _softmax_blocks_fwd_kernel[(triton.cdiv(length, c["OUTER"]), splits)](
            **p.arguments(), label_log_q=p.label_log_q, inverse_e=inverse_e, own=own, loss=loss, lse=parts,
            inverse_out=inverse_q, per_split=per_split, eps=p.eps, LABEL_LOG_Q=p.label_log_q is not None,
            SPLIT=splits > 1, **_blocks(c, "BLOCK_L", "BLOCK_V"),
        )  # fmt: skip
        if splits > 1:
            rows = 16 if interpreting() else JOIN_ROWS
            _join_splits_kernel[(triton.cdiv(length, rows),)](
                parts, own, loss, lse, length, SPLITS=splits, BLOCK_L=rows
            )

    select("softmax_blocks_fwd", p.key(), fwd_configs(p.queries.shape[1], p.dtype), launch)
    return loss, lse, inverse_q, inverse_e


def _blocks(c: Config, outer: str, inner: str) -> dict[str, int]:
    return {
        outer: c["OUTER"], inner: c["INNER"], "BLOCK_D": c["BLOCK_D"],
        "CHUNK": c["CHUNK"], "num_warps": c.num_warps, "num_stages": c.num_stages,
    }  # fmt: skip


def softmax_blocks_bwd(
    p: Problem, grad: Tensor, loss: Tensor, lse: Tensor, inverse_q: Tensor, inverse_e: Tensor, deterministic: bool,
    query_dtype: torch.dtype, table_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of queries [L, D] and table [V, D]; in these dtypes.

    The whole table's gradient is deterministic as it is; a bank's by integer sums when ``deterministic``.
    """
    bank = p.ids is not None
    fixed = bank and deterministic and p.queries.shape[0] > 0
    quantum = quantum_of(grad, p.queries, p.scale, p.normalize) if fixed else None
    d_table = None
    if bank:
        d_table = torch.zeros(p.table.shape, dtype=torch.int64 if fixed else torch.float32, device=grad.device)
    shared = {
        "inverse_e": inverse_e, "per_quantum": None if quantum is None else quantum[1:], "d_table": d_table,
        "FIXED": fixed,
    }  # fmt: skip
    d_queries = _d_queries(p, grad, loss, lse, inverse_q, query_dtype, shared)
    d_table = _d_table(p, grad, loss, lse, inverse_q, table_dtype, shared)
    if quantum is not None:
        return d_queries, finish_fixed(d_table, quantum, p.table, p.eps, p.normalize, table_dtype)
    return d_queries, d_table.to(table_dtype)


def _finish_rows(block_d: int) -> int:
    return 16 if interpreting() else max(1, FINISH_ELEMENTS // block_d)


def _d_queries(p: Problem, grad: Tensor, loss: Tensor, lse: Tensor, inverse_q: Tensor, dtype: torch.dtype,
               shared: dict[str, Any]) -> Tensor:  # fmt: skip
    """Gradient [L, D]; of a bank also the label's part of ``shared["d_table"]``."""
    length, width = p.queries.shape

    def launch(c: Config) -> Tensor:
        splits, per_split = _splits(length, p.num_items, c, p.queries.device)
        parts = torch.empty(splits, length, width, dtype=torch.float32, device=p.queries.device)
        _softmax_blocks_dq_kernel[(triton.cdiv(length, c["OUTER"]), splits)](
            **p.arguments(), inverse_e=shared["inverse_e"], inverse_q=inverse_q, lse=lse, sums=parts,
            per_split=per_split, **_blocks(c, "BLOCK_L", "BLOCK_V"),
        )  # fmt: skip
        return parts

    parts = select("softmax_blocks_dq", p.key(), grad_configs(width, p.dtype), launch)
    d_queries = torch.empty(length, width, dtype=dtype, device=p.queries.device)
    block_d = power_of_two(width)
    rows = _finish_rows(block_d)
    _finish_dq_kernel[(triton.cdiv(length, rows),)](
        grad, p.queries, p.table, p.labels, inverse_q=inverse_q, loss=loss, sums=parts, d_queries=d_queries, **shared,
        length=length, scale=p.scale, stride_g=grad.stride(0), D=width, STRIDE_Q=p.queries.stride(0),
        STRIDE_E=p.table.stride(0), BANK=p.ids is not None, NORMALIZE=p.normalize, SPLITS=parts.shape[0],
        DTYPE=TL_DTYPES[p.dtype], BLOCK_L=rows, BLOCK_D=block_d,
    )  # fmt: skip
    return d_queries


def _d_table(p: Problem, grad: Tensor, loss: Tensor, lse: Tensor, inverse_q: Tensor, dtype: torch.dtype,
             shared: dict[str, Any]) -> Tensor:  # fmt: skip
    """The items' part: added to ``shared["d_table"]`` of a bank, else the whole gradient [V, D] in ``dtype``."""
    length, width = p.queries.shape
    largest = None
    if p.dtype == torch.float16:
        factors = grad.float() * inverse_q.abs() if p.normalize else grad.float()
        largest = factors.abs().amax() if length else factors.new_zeros(())

    def launch(c: Config) -> Tensor:
        splits, per_split = _splits(p.num_items, length, c, p.queries.device)
        parts = torch.empty(splits, p.num_items, width, dtype=torch.float32, device=p.queries.device)
        _softmax_blocks_de_kernel[(triton.cdiv(p.num_items, c["OUTER"]), splits)](
            grad, **p.arguments(), inverse_e=shared["inverse_e"], inverse_q=inverse_q, loss=loss, lse=lse,
            largest=largest, sums=parts, per_split=per_split, stride_g=grad.stride(0), SCALED=largest is not None,
            **_blocks(c, "BLOCK_V", "BLOCK_L"),
        )  # fmt: skip
        return parts

    parts = select("softmax_blocks_de", p.key(), grad_configs(width, p.dtype), launch)
    if p.ids is None:  # where size and dtype fit, the sums become the gradient in place
        fits = parts.shape[0] == 1 and dtype == torch.float32
        out = parts[0] if fits else torch.empty(p.num_items, width, dtype=dtype, device=p.queries.device)
        shared = shared | {"d_table": out}
    block_d = power_of_two(width)
    rows = _finish_rows(block_d)
    _finish_de_kernel[(triton.cdiv(p.num_items, rows),)](
        p.table, p.ids, largest=largest, sums=parts, **shared, num_items=p.num_items, scale=p.scale, D=width,
        STRIDE_E=p.table.stride(0), BANK=p.ids is not None, NORMALIZE=p.normalize, SCALED=largest is not None,
        SPLITS=parts.shape[0], DTYPE=TL_DTYPES[p.dtype], BLOCK_V=rows, BLOCK_D=block_d,
    )  # fmt: skip
    return shared["d_table"]
