"""Public ops: validation and one custom op each. No gradient.

Legend: B users in the batch, D model width, S seen items over all users.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import _common
from kernels._backend import choose
from kernels.rank_and_topk import cpu


def rank(
    queries: Tensor,
    table: Tensor,
    targets: Tensor,
    seen_ids: Tensor | None = None,
    seen_offsets: Tensor | None = None,
    l2_normalize: bool = True,
    eps: float = 1e-6,
    chunk_mib: float = 64,
) -> Tensor:
    """Exact rank of each user's target among all items: 1 + better ones + half of the other equal ones.

    Args:
        queries: [B, D] floating. One encoder output per user.
        table: [num_items + 1, D] floating. Row 0 is padding and never a candidate.
        targets: [B] int32 or int64, 1..num_items. Always a candidate, seen or not.
        seen_ids: [S] int32 or int64, 0..num_items. Items taken out of the ranking, user by user; repeats and 0
            have no effect.
        seen_offsets: [B + 1] int32 or int64. User b's seen items are seen_ids[seen_offsets[b]:seen_offsets[b + 1]].
        l2_normalize: normalise queries and item embeddings first; eps: > 0, lower bound of the norm.
        chunk_mib: > 0. Bound of the scores that exist at a time, in MiB (at least one user's row); on the Triton path
            of what takes their place: a bit per item of each user.

    Returns:
        float64 [B], a multiple of 0.5.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; a score is not finite; on the CPU also ids out of range.

    Autocast has no effect: products are of the inputs as they are, accumulated in float32 (or float64).
    """
    _common.check_queries_and_table(queries, table, "B")
    _common.check_ids("targets", targets, (queries.shape[0],), queries)
    _check_seen(queries, seen_ids, seen_offsets)
    _common.check_positive(eps=eps, chunk_mib=chunk_mib)
    if _on_triton(queries, table):
        queries, table = queries.detach(), table.detach()
        return torch.ops.hstu.rank_triton(queries, table, targets, seen_ids, seen_offsets, l2_normalize, eps, chunk_mib)
    q, e = _common.prepare(queries.detach(), table.detach(), l2_normalize, eps)
    return torch.ops.hstu.rank(q, e, targets, seen_ids, seen_offsets, chunk_mib)


def topk(
    queries: Tensor,
    table: Tensor,
    k: int,
    seen_ids: Tensor | None = None,
    seen_offsets: Tensor | None = None,
    l2_normalize: bool = True,
    eps: float = 1e-6,
    chunk_mib: float = 64,
) -> tuple[Tensor, Tensor]:
    """The k best items of each user that it has not seen, best first.

    Args:
        k: >= 1. The others as in :func:`rank`.

    Returns:
        scores [B, k] float32 (float64 if an input is float64) and ids [B, k] int64; where a user has fewer than k
        candidates, score -inf and id 0. Order among equal scores is not specified.

    Raises:
        ValueError: as :func:`rank`, and k < 1.
    """
    _common.check_queries_and_table(queries, table, "B")
    _check_seen(queries, seen_ids, seen_offsets)
    _common.check_positive(k=k, eps=eps, chunk_mib=chunk_mib)
    if _on_triton(queries, table):
        queries, table = queries.detach(), table.detach()
        return torch.ops.hstu.topk_triton(queries, table, k, seen_ids, seen_offsets, l2_normalize, eps, chunk_mib)
    q, e = _common.prepare(queries.detach(), table.detach(), l2_normalize, eps)
    return torch.ops.hstu.topk(q, e, k, seen_ids, seen_offsets, chunk_mib)


def _on_triton(queries: Tensor, table: Tensor) -> bool:
    """Raises ValueError for an explicit backend that cannot be met."""
    dtype = torch.promote_types(queries.dtype, table.dtype)
    return choose("rank_and_topk", queries.device, dtype).backend == "triton"


def _check_seen(queries: Tensor, seen_ids: Tensor | None, seen_offsets: Tensor | None) -> None:
    if (seen_ids is None) != (seen_offsets is None):
        raise ValueError("seen_ids and seen_offsets: expected both or neither")
    if seen_ids is not None and seen_offsets is not None:
        if seen_ids.ndim != 1:
            raise ValueError(f"seen_ids has shape {list(seen_ids.shape)}: expected [S]")
        _common.check_ids("seen_ids", seen_ids, (seen_ids.shape[0],), queries)
        _common.check_ids("seen_offsets", seen_offsets, (queries.shape[0] + 1,), queries)


def _check_ranges(table: Tensor, seen_ids: Tensor | None, seen_offsets: Tensor | None) -> None:
    if seen_ids is None or seen_offsets is None:
        return
    _common.check_range_on_cpu("seen_ids", seen_ids, table.shape[0] - 1, low=0)
    if seen_offsets.device.type == "cpu":
        first, last = int(seen_offsets[0]), int(seen_offsets[-1])
        if first != 0 or last != seen_ids.shape[0] or bool((seen_offsets.diff() < 0).any()):
            raise ValueError(f"seen_offsets runs from {first} to {last}: expected ascending 0..{seen_ids.shape[0]}")


@torch.library.custom_op("hstu::rank", mutates_args=())
def _rank(queries: Tensor, table: Tensor, targets: Tensor, seen_ids: Tensor | None, seen_offsets: Tensor | None,
          chunk_mib: float) -> Tensor:  # fmt: skip
    _common.check_range_on_cpu("targets", targets, table.shape[0] - 1)
    _check_ranges(table, seen_ids, seen_offsets)
    with _common.no_autocast(queries.device):
        return cpu.rank_torch(queries, table, targets, seen_ids, seen_offsets, chunk_mib)


@_rank.register_fake
def _(queries, table, targets, seen_ids, seen_offsets, chunk_mib):  # type: ignore[no-untyped-def]
    return queries.new_empty(queries.shape[0], dtype=torch.float64)


@torch.library.custom_op("hstu::topk", mutates_args=())
def _topk(queries: Tensor, table: Tensor, k: int, seen_ids: Tensor | None, seen_offsets: Tensor | None,
          chunk_mib: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check_ranges(table, seen_ids, seen_offsets)
    with _common.no_autocast(queries.device):
        return cpu.topk_torch(queries, table, k, seen_ids, seen_offsets, chunk_mib)


@_topk.register_fake
def _(queries, table, k, seen_ids, seen_offsets, chunk_mib):  # type: ignore[no-untyped-def]
    shape = (queries.shape[0], k)
    return queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64)


def _check_finite(values: Tensor) -> None:
    """The one wait for the device, of B values."""
    if not bool(values.isfinite().all()):
        raise ValueError("scores are not finite: queries or table hold NaN, infinite or huge values")


@torch.library.custom_op("hstu::rank_triton", mutates_args=())
def _rank_triton(queries: Tensor, table: Tensor, targets: Tensor, seen_ids: Tensor | None, seen_offsets: Tensor | None,
                 normalize: bool, eps: float, chunk_mib: float) -> Tensor:  # fmt: skip
    from kernels.rank_and_topk.kernel import rank_fwd

    _common.check_range_on_cpu("targets", targets, table.shape[0] - 1)
    _check_ranges(table, seen_ids, seen_offsets)
    ranks = rank_fwd(queries, table, targets, seen_ids, seen_offsets, normalize, eps, chunk_mib)
    _check_finite(ranks)
    return ranks


@_rank_triton.register_fake
def _(queries, table, targets, seen_ids, seen_offsets, normalize, eps, chunk_mib):  # type: ignore[no-untyped-def]
    return queries.new_empty(queries.shape[0], dtype=torch.float64)


@torch.library.custom_op("hstu::topk_triton", mutates_args=())
def _topk_triton(queries: Tensor, table: Tensor, k: int, seen_ids: Tensor | None, seen_offsets: Tensor | None,
                 normalize: bool, eps: float, chunk_mib: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    from kernels.rank_and_topk.kernel import topk_fwd

    _check_ranges(table, seen_ids, seen_offsets)
    scores, ids, poisons = topk_fwd(queries, table, k, seen_ids, seen_offsets, normalize, eps, chunk_mib)
    _check_finite(poisons)
    return scores, ids


@_topk_triton.register_fake
def _(queries, table, k, seen_ids, seen_offsets, normalize, eps, chunk_mib):  # type: ignore[no-untyped-def]
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)
