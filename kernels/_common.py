"""Pieces of plain torch that several ops share.

Shapes: ``L`` total events, ``D`` model width, ``V`` candidate items.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32: what an op accumulates and returns its loss in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def l2_normalize(x: Tensor, eps: float) -> Tensor:
    """x / max(|x|, eps) over the last dimension, differentiable; a zero row stays zero with zero gradient."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=eps)


def prepare(queries: Tensor, table: Tensor, normalize: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Queries and table in the compute dtype, L2-normalised if asked. Differentiable."""
    dtype = compute_dtype(queries, table)
    queries, table = queries.to(dtype), table.to(dtype)
    if normalize:
        return l2_normalize(queries, eps), l2_normalize(table, eps)
    return queries, table


def row_chunks(num_rows: int, rows: int) -> Iterator[slice]:
    """Slices of at most ``rows`` rows (at least one) that cover ``num_rows``."""
    rows = max(1, rows)
    for start in range(0, num_rows, rows):
        yield slice(start, min(start + rows, num_rows))


def rows_within(chunk_mib: float, num_columns: int, dtype: torch.dtype) -> int:
    """How many rows of ``num_columns`` values fit into ``chunk_mib`` MiB; at least one."""
    return max(1, int(chunk_mib * 2**20) // max(1, num_columns * dtype.itemsize))


CACHE_MIB = 2.0
"""A block of this size stays in a CPU core's L2 cache between the passes over it."""
MIN_ROWS = 128
"""Fewer rows a block than this make the products slow, in the cache or not."""


def block_rows(like: Tensor, num_columns: int, chunk_mib: float) -> int:
    """Rows of a block of values like ``like`` [num_rows, ...]: within ``chunk_mib``, on the CPU in the cache too."""
    rows = rows_within(chunk_mib, num_columns, like.dtype)
    if like.device.type == "cpu":
        rows = min(rows, max(MIN_ROWS, rows_within(CACHE_MIB, num_columns, like.dtype)))
    return min(rows, max(1, like.shape[0]))


def operand_dtype(queries: Tensor, table: Tensor) -> torch.dtype:
    """What a Triton loss over a table rounds its operands to: the dtype of autocast where it is on, else their own.

    Both in one dtype: that one; two dtypes: the one that holds both. float64 stays, and runs on torch.
    """
    dtype = torch.promote_types(queries.dtype, table.dtype)
    device = queries.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in ``dtype`` if that is as narrow or narrower, else x itself: a kernel widens what it reads for nothing."""
    return x.to(dtype) if dtype.itemsize <= x.dtype.itemsize else x


def deterministic_or(wanted: bool | None) -> bool:
    """``wanted``; None: what ``torch.use_deterministic_algorithms`` was told."""
    return torch.are_deterministic_algorithms_enabled() if wanted is None else wanted


def no_autocast(device: torch.device) -> torch.autocast:
    """Context that turns autocast off: an op's own products keep the dtype it chose."""
    return torch.autocast(device_type=device.type, enabled=False)


# Checks of cheap facts: rank, shape, dtype, device. No device read.


def check_queries_and_table(queries: Tensor, table: Tensor, rows: str = "L") -> None:
    """Raises ValueError unless queries are [rows, D] and table [num_items + 1, D], floating, on one device."""
    if queries.ndim != 2:
        raise ValueError(f"queries has shape {list(queries.shape)}: expected [{rows}, D]")
    if table.ndim != 2 or table.shape[0] < 2:
        raise ValueError(f"table has shape {list(table.shape)}: expected [num_items + 1, D] with num_items >= 1")
    if queries.shape[1] != table.shape[1]:
        raise ValueError(f"queries has width {queries.shape[1]}, table {table.shape[1]}: expected the same D")
    for name, t in (("queries", queries), ("table", table)):
        if not t.dtype.is_floating_point:
            raise ValueError(f"{name} has dtype {t.dtype}: expected a floating dtype")
    if queries.device != table.device:
        raise ValueError(f"queries is on {queries.device}, table on {table.device}: expected one device")


def check_ids(name: str, ids: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Raises ValueError unless ids has this shape, dtype int32 or int64, and lies on the device of ``like``."""
    if tuple(ids.shape) != shape:
        raise ValueError(f"{name} has shape {list(ids.shape)}: expected {list(shape)}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} has dtype {ids.dtype}: expected int32 or int64")
    if ids.device != like.device:
        raise ValueError(f"{name} is on {ids.device}, queries on {like.device}: expected one device")


def check_positive(**numbers: float) -> None:
    """Raises ValueError for the first number that is not > 0."""
    for name, value in numbers.items():
        if not value > 0:
            raise ValueError(f"{name}={value!r}: expected > 0")


def check_range_on_cpu(name: str, ids: Tensor, num_items: int, low: int = 1) -> None:
    """On the CPU, where reading is free, raises ValueError for ids outside low..num_items."""
    if ids.device.type != "cpu" or ids.numel() == 0:
        return
    lowest, highest = (int(x) for x in torch.aminmax(ids))
    if lowest < low or highest > num_items:
        raise ValueError(f"{name} range over {lowest}..{highest}: expected {low}..{num_items}")
