"""Launchers of the attention kernels: they allocate and launch.

Legend: B users, L query rows in all, K key rows in all, H heads, A query/key width, V value width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kernels._launch import (
    Config,
    config,
    dot_precision,
    interpreting,
    length_bucket,
    near_rows,
    num_sms,
    power_of_two,
    select,
)
from kernels._norm_kernel import sum_partials
from kernels.attention.programs import _attention_keys_kernel, _attention_rows_kernel


class Problem(NamedTuple):
    """Arguments of both launchers, as :func:`kernels.attention.attention` and its plan give them.

    ``mask``: causal, contextual, window, full_rows. ``time_kind``: 0 none, 1 buckets, 2 power law.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    offsets: Tensor
    order: Tensor
    key_starts: Tensor | None
    key_lengths: Tensor | None
    num_targets: Tensor | None
    query_age: Tensor | None
    key_age: Tensor | None
    thresholds: Tensor | None
    row_divisor: Tensor | None
    position_weight: Tensor | None
    time_weight: Tensor | None
    max_len: int
    max_query_len: int
    mask: tuple[int, ...]
    time_kind: int
    bucket_width: float
    divisor: float
    scale: float

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    def block_width(self) -> int:
        """The larger head width, as the kernels pad it."""
        return max(power_of_two(self.q.shape[2]), power_of_two(self.v.shape[2]))

    def compile_time(self, grad: Tensor | None = None) -> dict[str, object]:
        """The sizes and switches that both kernels are compiled for."""
        causal, contextual, window, full_rows = self.mask
        return {
            "A": self.q.shape[2],
            "V_WIDTH": self.v.shape[2],
            "BLOCK_A": power_of_two(self.q.shape[2]),
            "BLOCK_V": power_of_two(self.v.shape[2]),
            "CAUSAL": bool(causal),
            "TARGETS": self.num_targets is not None,
            "CONTEXTUAL": contextual,
            "WINDOW": window,
            "FULL_ROWS": full_rows,
            "DELTA": self.key_starts is not None,
            "POSITION": self.position_weight is not None,
            "TIME": self.time_kind,
            "ROW_DIVISOR": self.row_divisor is not None,
            "FAST": self.q.dtype != torch.float32 and not interpreting(),
            "PRECISION": dot_precision(),
            "ALIGN": self.alignment(grad),
        }

    def alignment(self, grad: Tensor | None) -> int:
        """Elements, a power of two up to 16 bytes' worth: every row of q, k, v and grad starts at a multiple of it."""
        most = 16 // self.q.element_size()
        inputs = (self.q, self.k, self.v, *([] if grad is None else [grad]))
        starts = [n for x in inputs for n in (x.stride(0), x.stride(1), x.storage_offset())]
        return min(most, math.gcd(most, *starts))

    def key(self) -> tuple[object, ...]:
        """What changes the best configuration; the length in powers of two."""
        bias = (self.position_weight is not None, self.time_kind)
        return length_bucket(self.max_len), self.heads, self.q.shape[2], self.v.shape[2], self.q.dtype, bias, self.mask

    def layout(self) -> list[Tensor]:
        """Tensors of the plan in the kernels' order; q stands in where one is absent, the kernel never reads it."""
        given = (
            self.offsets, self.order, self.key_starts, self.key_lengths, self.num_targets, self.query_age,
            self.key_age, self.thresholds, self.row_divisor, self.position_weight, self.time_weight,
        )  # fmt: skip
        return [self.q if x is None else x.contiguous() for x in given]

    def bias_strides(self) -> tuple[int, int]:
        """Entries from one head's table to the next; 0 where heads share it."""
        position, time = self.position_weight, self.time_weight
        return (
            0 if position is None or position.shape[0] == 1 else position.shape[1],
            0 if time is None or time.shape[0] == 1 else time.shape[1],
        )

    def scalars(self) -> tuple[float, float]:
        """Buckets per doubling of the gap, and the last bucket."""
        last = 0 if self.thresholds is None else self.thresholds.shape[0] - 2
        return math.log(2.0) / self.bucket_width, last

    @property
    def position_size(self) -> int:
        """2N-1."""
        return 0 if self.position_weight is None else self.position_weight.shape[1]

    def table_sizes(self) -> tuple[int, int]:
        """Entries of the position and of the time weight."""
        position, time = self.position_weight, self.time_weight
        return 0 if position is None else position.numel(), 0 if time is None else time.numel()

    @property
    def center(self) -> int:
        """Entry of the position table for j = i."""
        return 0 if self.position_weight is None else (self.position_weight.shape[1] - 1) // 2


NUM_SHARED_TABLES = 32
"""Copies of the table gradients that programs add to, against contention. A guess, not measured."""


def rows_configs(problem: Problem) -> list[Config]:
    """For the kernel that walks query rows, forward. The first spills no registers; the rest is for tuning."""
    if interpreting():
        return [config(BLOCK_M=16, BLOCK_N=32)]
    width = problem.block_width()
    if problem.q.dtype == torch.float32:
        return [config(8, 1, BLOCK_M=32, BLOCK_N=32 if width <= 128 else 16)]
    if problem.max_len <= 256 and width <= 64:
        return [config(4, 2, BLOCK_M=64, BLOCK_N=32), config(8, 2, BLOCK_M=64, BLOCK_N=64)]
    if width <= 64:
        return [config(8, 3, BLOCK_M=128, BLOCK_N=64), config(4, 3, BLOCK_M=64, BLOCK_N=64)]
    if width <= 128:
        return [config(8, 2, BLOCK_M=128, BLOCK_N=32), config(8, 2, BLOCK_M=128, BLOCK_N=64),
                config(4, 2, BLOCK_M=64, BLOCK_N=32)]  # fmt: skip
    return [config(8, 2, BLOCK_M=64, BLOCK_N=32), config(8, 2, BLOCK_M=128, BLOCK_N=32)]


def rows_bwd_configs(problem: Problem, deterministic: bool = False) -> list[Config]:
    """The same walk backward: smaller tiles, the tables' gradients need registers.

    deterministic: tiles of 32 rows, which take the smaller matrix instructions; Triton 3.7.1 cannot compile the
    persistent loop around tcgen05 (sm_100), and spills around wgmma.
    """
    if interpreting() or problem.q.dtype == torch.float32:
        return rows_configs(problem)
    if deterministic:
        return [config(8, 2, BLOCK_M=32, BLOCK_N=32), config(4, 2, BLOCK_M=32, BLOCK_N=32)]
    width = problem.block_width()
    small, large = config(8, 2, BLOCK_M=64, BLOCK_N=32), config(8, 2, BLOCK_M=128, BLOCK_N=32)
    return [small, large, config(4, 2, BLOCK_M=64, BLOCK_N=32)] if width <= 128 else [small]


def keys_configs(problem: Problem) -> list[Config]:
    """For the kernel that walks key rows."""
    if interpreting():
        return [config(BLOCK_M=16, BLOCK_N=32)]
    width = problem.block_width()
    if problem.q.dtype == torch.float32:
        return [config(8, 1, BLOCK_M=32 if width <= 64 else 16, BLOCK_N=32)]
    if width <= 64:
        return [config(4, 2, BLOCK_M=32, BLOCK_N=64), config(8, 2, BLOCK_M=64, BLOCK_N=64)]
    if width <= 128:
        return [config(8, 2, BLOCK_M=32, BLOCK_N=64), config(8, 2, BLOCK_M=32, BLOCK_N=128)]
    return [config(8, 2, BLOCK_M=32, BLOCK_N=64)]


def _prepared(problem: Problem) -> Problem:
    tables = [None if w is None else w.contiguous() for w in (problem.position_weight, problem.time_weight)]
    q, k, v = (near_rows(x) for x in (problem.q, problem.k, problem.v))
    return problem._replace(q=q, k=k, v=v, position_weight=tables[0], time_weight=tables[1])


def attention_fwd(problem: Problem) -> Tensor:
    """Output [L, H, V] in v's dtype."""
    return _launch_rows(_prepared(problem), None, False)[0]


def _launch_rows(problem: Problem, grad: Tensor | None, deterministic: bool) -> tuple[Tensor, Tensor]:
    """Output [L, H, V]; or with ``grad`` [L, H, V] the gradient of q [L, H, A].

    And copies [copies, sizes of both tables] of the tables' gradients, to be summed.
    """
    q, k, v = problem.q, problem.k, problem.v
    shape = (q.shape[0], problem.heads, v.shape[2]) if grad is None else q.shape
    num_users = problem.offsets.shape[0] - 1
    sizes = problem.table_sizes() if grad is not None else (0, 0)
    if num_users == 0 or problem.max_query_len == 0 or q.shape[0] == 0:
        return q.new_zeros(shape), q.new_zeros(1, sum(sizes), dtype=torch.float32)
    columns = 1 if problem.time_weight is None or grad is None else problem.time_weight.shape[1]

    def launch(c: Config) -> tuple[Tensor, Tensor]:
        out = q.new_empty(shape)
        num_blocks = triton.cdiv(problem.max_query_len, c["BLOCK_M"])
        num_tasks = num_users * problem.heads * num_blocks
        num_programs = min(num_tasks, 2 * num_sms(q.device)) if deterministic else num_tasks
        copies = num_programs if deterministic else min(num_tasks, NUM_SHARED_TABLES)
        tables = q.new_zeros(copies, sum(sizes), dtype=torch.float32)
        g = out if grad is None else grad
        _attention_rows_kernel[(num_programs,)](
            q, k, v, out, g, tables, tables[:, sizes[0] :], *problem.layout(),
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), out.stride(0),
            out.stride(1), g.stride(0), g.stride(1), *problem.bias_strides(), tables.shape[1], problem.scale,
            1.0 / problem.divisor, problem.center, problem.position_size, *problem.scalars(), problem.heads,
            num_blocks, num_tasks, copies,
            BACKWARD=grad is not None, PERSISTENT=deterministic, BLOCK_T=power_of_two(columns),
            **problem.compile_time(grad), **c.launch(),
        )  # fmt: skip
        return out, tables

    name = "attention_fwd" if grad is None else "attention_bwd_q"
    configs = rows_configs(problem) if grad is None else rows_bwd_configs(problem, deterministic)
    return select(name, (*problem.key(), deterministic), configs, launch)


def attention_bwd(
    grad: Tensor, problem: Problem, deterministic: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v (in their dtypes) and of both tables (float32, empty where there is none).

    Args:
        grad: [L, H, V], of the output.
        deterministic: bit-equal over runs: no sum whose order the hardware chooses. Only the tables' gradients need
            it; without tables every run is.
    """
    problem, grad = _prepared(problem), near_rows(grad)
    sizes = problem.table_sizes()
    dk, dv = _launch_keys(problem, grad)
    dq, copies = _launch_rows(problem, grad, deterministic and sum(sizes) > 0)
    d_position, d_time = (
        problem.q.new_empty((0, 0) if w is None else w.shape, dtype=torch.float32)
        for w in (problem.position_weight, problem.time_weight)
    )
    given = [d for d in (d_position, d_time) if d.numel()]
    if given:
        sum_partials(copies, *given)
    return dq, dk, dv, d_position, d_time


def _launch_keys(problem: Problem, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of k and v."""
    q, k, v = problem.q, problem.k, problem.v
    num_users = problem.offsets.shape[0] - 1
    if num_users == 0 or problem.max_len == 0 or k.shape[0] == 0 or q.shape[0] == 0:
        return torch.zeros_like(k), torch.zeros_like(v)

    def launch(c: Config) -> tuple[Tensor, Tensor]:
        num_blocks = triton.cdiv(problem.max_len, c["BLOCK_N"])
        # Keys of no user (spare room of a cache) have no gradient.
        make = torch.zeros if problem.key_starts is not None else torch.empty
        dk, dv = (make(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
        _attention_keys_kernel[(num_users * problem.heads * num_blocks,)](
            q, k, v, grad, dk, dv, *problem.layout(),
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), grad.stride(0),
            grad.stride(1), dk.stride(0), dk.stride(1), dv.stride(0), dv.stride(1),
            *problem.bias_strides(), problem.scale, 1.0 / problem.divisor, problem.center, *problem.scalars(),
            problem.heads, num_blocks, **problem.compile_time(grad), **c.launch(),
        )  # fmt: skip
        return dk, dv

    return select("attention_bwd_kv", problem.key(), keys_configs(problem), launch)
