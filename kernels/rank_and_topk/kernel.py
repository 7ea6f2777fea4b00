# mypy: allow-incomplete-defs
"""Exact ranks and the best k in Triton: scores live in registers, a [users, items] matrix never exists.

A score is ``product * inverse_q * inverse_e``: the product of the raw rows, then the inverse norms, always in that
order. The target's score comes from the same product of two tiles as every other (its row is put into a tile of
items, the diagonal is taken), so equal embeddings have equal scores and tie. Seen items are bits, one per item of a
user: repeats set the same bit twice.

Legend: ``B`` users, ``D`` model width, ``S`` seen items over all users, ``V`` rows of the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common import row_chunks
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
from kernels._rows import inverse_norms, inverses, products, read_rows

TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
NOTHING = -(2**63)
"""Key of an item that is no candidate, below every other."""
LARGEST_ID = 2**31 - 1
PROGRAMS_PER_SM = 2
IEEE_CHUNK = 16
"""Columns a product of float32 takes at a time: it holds its operands in registers."""
MARK_BLOCK = 128
KEY_BYTES = 8
MIN_BLOCKS = 4
"""Blocks of items at least per merge: a merge per block would cost more than the scores."""


@triton.jit
def _mark_seen_kernel(seen_ids, seen_offsets, bits, num_rows, words, BLOCK: tl.constexpr):
    """Sets bit id % 32 of word id // 32 of the user's row for every id it has seen, 1..num_rows - 1."""
    user = tl.program_id(0).to(tl.int64)
    first = tl.load(seen_offsets + user).to(tl.int64)
    last = tl.load(seen_offsets + user + 1).to(tl.int64)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK).to(tl.int64)
        ids = tl.load(seen_ids + at, mask=at < last, other=0).to(tl.int64)
        one = (ids * 0 + 1).to(tl.int32) << (ids % 32).to(tl.int32)
        tl.atomic_or(bits + user * words + ids // 32, one, mask=(ids > 0) & (ids < num_rows), sem="relaxed")


@triton.jit
def _scores(
    queries, table, users, inside, items, exist, q, inverse_q, inverse_e, D: tl.constexpr, STRIDE_Q: tl.constexpr,
    STRIDE_E: tl.constexpr, NORMALIZE: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores [users, items] float32; anything where an item does not exist."""
    e = read_rows(table, items, exist, D, STRIDE_E, BLOCK_D, DTYPE)
    score = products(q, e, queries, users, inside, table, items, exist, D, STRIDE_Q, STRIDE_E, CHUNK, PRECISION, DTYPE)
    if NORMALIZE:
        score = score * inverse_q[:, None]
        score = score * inverses(inverse_e, items, exist, True)[0][None, :]
    return score + 0.0  # no negative zeros


@triton.jit
def _candidates(bits, users, inside, items, exist, words, SEEN: tl.constexpr):
    """Which items of the block [users, items] exist and were not seen."""
    candidate = inside[:, None] & exist[None, :]
    if SEEN:
        word = tl.load(bits + users[:, None] * words + (items // 32)[None, :], mask=candidate, other=0)
        candidate = candidate & (((word >> (items % 32).to(tl.int32)[None, :]) & 1) == 0)
    return candidate


@triton.jit(do_not_specialize=["num_users", "num_rows", "per_split", "words"])
def _rank_kernel(
    queries, table, targets, bits, inverse_q, inverse_e, ranks, num_users, num_rows, per_split, words,
    D: tl.constexpr, STRIDE_Q: tl.constexpr, STRIDE_E: tl.constexpr, NORMALIZE: tl.constexpr, SEEN: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds better ones and half of the equal ones to ``ranks`` [B] float64; NaN where a score is not finite."""
    users = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = users < num_users
    q = read_rows(queries, users, inside, D, STRIDE_Q, BLOCK_D, DTYPE)
    own_inverse = inverses(inverse_q, users, inside, NORMALIZE)[0]
    target = tl.load(targets + users, mask=inside, other=0).to(tl.int64)
    against = _scores(
        queries, table, users, inside, target, inside, q, own_inverse, inverse_e, D, STRIDE_Q, STRIDE_E, NORMALIZE,
        CHUNK, PRECISION, DTYPE, BLOCK_D,
    )  # fmt: skip
    at = tl.arange(0, BLOCK)
    own = tl.sum(tl.where(at[:, None] == at[None, :], against, 0.0), axis=1)  # the diagonal: exact
    halves = tl.zeros([BLOCK, BLOCK], tl.int32)
    poison = tl.zeros([BLOCK, BLOCK], tl.float32)
    first = tl.program_id(1).to(tl.int64) * per_split
    for start in range(first, min(first + per_split, num_rows), BLOCK):
        items = start + at.to(tl.int64)
        exist = (items > 0) & (items < num_rows)
        score = _scores(
            queries, table, users, inside, items, exist, q, own_inverse, inverse_e, D, STRIDE_Q, STRIDE_E, NORMALIZE,
            CHUNK, PRECISION, DTYPE, BLOCK_D,
        )  # fmt: skip
        candidate = _candidates(bits, users, inside, items, exist, words, SEEN)
        candidate = candidate & (items[None, :] != target[:, None])
        better = (score > own[:, None]).to(tl.int32) * 2 + (score == own[:, None]).to(tl.int32)
        halves += tl.where(candidate, better, 0)
        poison += tl.where(exist[None, :], score * 0.0, 0.0)  # NaN for NaN and infinities
    count = tl.sum(halves, axis=1).to(tl.float64) * 0.5 + (tl.sum(poison, axis=1) + own * 0.0).to(tl.float64)
    tl.atomic_add(ranks + users, count, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["num_users", "num_rows", "first", "words", "stride_keys"])
def _topk_kernel(
    queries, table, bits, inverse_q, inverse_e, keys, poisons, num_users, num_rows, first, words, stride_keys,
    D: tl.constexpr, STRIDE_Q: tl.constexpr, STRIDE_E: tl.constexpr, NORMALIZE: tl.constexpr, SEEN: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    KEPT: tl.constexpr,
):  # fmt: skip
    """keys [users, blocks * KEPT]: the KEPT largest of each block of items, as (score, smaller id first) in int64."""
    users = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = users < num_users
    q = read_rows(queries, users, inside, D, STRIDE_Q, BLOCK_D, DTYPE)
    own_inverse = inverses(inverse_q, users, inside, NORMALIZE)[0]
    items = first + tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exist = (items > 0) & (items < num_rows)
    score = _scores(
        queries, table, users, inside, items, exist, q, own_inverse, inverse_e, D, STRIDE_Q, STRIDE_E, NORMALIZE,
        CHUNK, PRECISION, DTYPE, BLOCK_D,
    )  # fmt: skip
    poison = tl.sum(tl.where(exist[None, :], score * 0.0, 0.0), axis=1)
    tl.atomic_add(poisons + users, poison, mask=inside, sem="relaxed")
    raw = score.to(tl.int32, bitcast=True)
    ordered = raw ^ ((raw >> 31) & 0x7FFFFFFF)  # orders as the floats do
    key = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - items)[None, :]
    key = tl.where(_candidates(bits, users, inside, items, exist, words, SEEN), key, -0x8000000000000000)
    if KEPT < BLOCK:
        key = tl.topk(key, KEPT, dim=1)
    columns = tl.program_id(1).to(tl.int64) * KEPT + tl.arange(0, KEPT)
    tl.store(keys + users[:, None] * stride_keys + columns[None, :], key, mask=inside[:, None])


def configs(width: int, dtype: torch.dtype) -> list[Config]:
    """Users and items of a block (one number: the target's score is taken from a tile of the same shape)."""
    block_d = power_of_two(width)
    slow = dtype == torch.float32 and dot_precision() == "ieee"
    chunk = IEEE_CHUNK if slow else 0
    if interpreting():
        return [config(BLOCK=16, BLOCK_D=block_d, CHUNK=chunk)]
    wide = block_d * dtype.itemsize > 1024  # two tiles of 128 rows would not fit into shared memory
    choices = ((64, 8, 1), (32, 4, 1)) if slow or wide else ((64, 8, 2), (128, 8, 2), (64, 4, 2))
    return [config(warps, stages, BLOCK=block, BLOCK_D=block_d, CHUNK=chunk) for block, warps, stages in choices]


class _Scorer:
    """Arguments that both kernels take, for one chunk of users at a time."""

    def __init__(self, queries: Tensor, table: Tensor, normalize: bool, eps: float) -> None:
        self.queries, self.table, self.normalize = unit_stride(queries), unit_stride(table), normalize
        self.dtype = torch.promote_types(queries.dtype, table.dtype)
        none = torch.empty(0, dtype=torch.float32, device=table.device)
        self.inverse_q = inverse_norms(self.queries, eps) if normalize else none
        self.inverse_e = inverse_norms(self.table, eps) if normalize else none

    def arguments(self, part: slice, bits: Tensor | None) -> dict[str, Any]:
        queries = self.queries[part]
        return {
            "queries": queries, "table": self.table, "bits": bits,
            "inverse_q": self.inverse_q[part] if self.normalize else self.inverse_q, "inverse_e": self.inverse_e,
            "num_users": queries.shape[0], "num_rows": self.table.shape[0], "words": _words(self.table),
            "D": queries.shape[1], "STRIDE_Q": queries.stride(0), "STRIDE_E": self.table.stride(0),
            "NORMALIZE": self.normalize, "SEEN": bits is not None, "PRECISION": dot_precision(),
            "DTYPE": TL_DTYPES[self.dtype],
        }  # fmt: skip

    def key(self) -> tuple[Any, ...]:
        sizes = length_bucket(self.queries.shape[0]), length_bucket(self.table.shape[0]), self.queries.shape[1]
        return (*sizes, self.dtype, dot_precision())


def _words(table: Tensor) -> int:
    return triton.cdiv(table.shape[0], 32)


def _seen_bits(table: Tensor, part: slice, seen_ids: Tensor | None, seen_offsets: Tensor | None) -> Tensor | None:
    """int32 [users, words] of a chunk of users: bit i is set where item i was seen."""
    if seen_ids is None or seen_offsets is None:
        return None
    users = part.stop - part.start
    bits = torch.zeros(users, _words(table), dtype=torch.int32, device=table.device)
    offsets = seen_offsets.contiguous()[part.start : part.stop + 1]
    block = 16 if interpreting() else MARK_BLOCK
    _mark_seen_kernel[(users,)](
        seen_ids.contiguous(), offsets, bits, table.shape[0], bits.shape[1], BLOCK=block, num_warps=1
    )
    return bits


def _chunks(table: Tensor, num_users: int, bytes_per_user: int, chunk_mib: float) -> Iterator[slice]:
    """Users whose bits and keys together stay within the bound."""
    return row_chunks(num_users, int(chunk_mib * 2**20) // (4 * _words(table) + bytes_per_user))


def rank_fwd(
    queries: Tensor, table: Tensor, targets: Tensor, seen_ids: Tensor | None, seen_offsets: Tensor | None,
    normalize: bool, eps: float, chunk_mib: float,
) -> Tensor:  # fmt: skip
    """Ranks float64 [B]; NaN where a score of the user is not finite."""
    num_users, num_rows = queries.shape[0], table.shape[0]
    scorer = _Scorer(queries, table, normalize, eps)
    targets = targets.contiguous()
    ranks = torch.empty(num_users, dtype=torch.float64, device=queries.device)
    for part in _chunks(table, num_users, 0, chunk_mib):
        arguments = scorer.arguments(part, _seen_bits(table, part, seen_ids, seen_offsets))

        def launch(c: Config, part: slice = part, arguments: dict[str, Any] = arguments) -> None:
            out = ranks[part].fill_(1.0)
            users, blocks = triton.cdiv(out.shape[0], c["BLOCK"]), triton.cdiv(num_rows, c["BLOCK"])
            wanted = min(blocks, max(1, PROGRAMS_PER_SM * num_sms(out.device) // users))
            per_split = triton.cdiv(blocks, wanted) * c["BLOCK"]
            _rank_kernel[(users, triton.cdiv(num_rows, per_split))](
                targets=targets[part], ranks=out, per_split=per_split, **arguments, **c.launch()
            )

        select("rank", scorer.key(), configs(queries.shape[1], scorer.dtype), launch)
    return ranks


def topk_fwd(
    queries: Tensor, table: Tensor, k: int, seen_ids: Tensor | None, seen_offsets: Tensor | None, normalize: bool,
    eps: float, chunk_mib: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Scores [B, k] float32, ids [B, k] int64, and [B] float32: NaN where a score of the user is not finite."""
    num_users, num_rows = queries.shape[0], table.shape[0]
    scorer = _Scorer(queries, table, normalize, eps)
    c = configs(queries.shape[1], scorer.dtype)[0]
    kept = c["BLOCK"] if 2 * k > c["BLOCK"] else power_of_two(k, least=1)
    best = torch.full((num_users, k), NOTHING, dtype=torch.int64, device=queries.device)
    poisons = torch.zeros(num_users, dtype=torch.float32, device=queries.device)
    least = KEY_BYTES * (k + MIN_BLOCKS * kept)
    for part in _chunks(table, num_users, least, chunk_mib):
        arguments = scorer.arguments(part, _seen_bits(table, part, seen_ids, seen_offsets))
        users = part.stop - part.start
        blocks = max(MIN_BLOCKS, int(chunk_mib * 2**20) // (KEY_BYTES * kept * users))
        blocks = min(blocks, triton.cdiv(num_rows, c["BLOCK"]))
        for first in range(0, num_rows, blocks * c["BLOCK"]):
            here = min(blocks, triton.cdiv(num_rows - first, c["BLOCK"]))
            keys = torch.empty(users, here * kept, dtype=torch.int64, device=queries.device)
            _topk_kernel[(triton.cdiv(users, c["BLOCK"]), here)](
                keys=keys, poisons=poisons[part], first=first, stride_keys=here * kept, KEPT=kept, **arguments,
                **c.launch(),
            )  # fmt: skip
            best[part] = torch.cat([best[part], keys], dim=1).topk(k, dim=1).values
    return *_unpacked(best), poisons


def _unpacked(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and ids of keys; -inf and 0 of ``NOTHING``."""
    nothing = keys == NOTHING
    ordered = (keys >> 32).to(torch.int32)
    scores = (ordered ^ ((ordered >> 31) & 0x7FFF_FFFF)).view(torch.float32)
    ids = LARGEST_ID - (keys & 0xFFFF_FFFF)
    return scores.masked_fill(nothing, -torch.inf), ids.masked_fill_(nothing, 0)
