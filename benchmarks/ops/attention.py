"""Benchmark points of ``attention`` and what a user would pick instead.

Useful work: the causal pairs of every user. Forward ``H n^2 (A + V)`` operations per user of n events, which is
2 H n^2 A for A = V; backward 2.5 times that (five products of which two are computed again). The published CUTLASS
figures count the same way. SDPA and flex_attention normalise with a softmax, so they compute something else; they are
timed because they are what a user would take. With ``C`` the point is cached inference: C candidates of each user
against a history of S events (delta form); its pairs are those of candidates and history, and each with itself.

Legend: B users, L total events, H heads, A query/key width, V value width, S longest user.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops import Absent, AotCase, Expect, Problem, Run, Sizes, Work, leaf, make_lengths, make_offsets, nbytes
from kernels.attention import TimeBuckets, attention, make_plan
from kernels.attention.reference import attention_reference

BACKWARD_FLOPS = 2.5
"""Times the forward's."""
GAP_S = 86_400
"""Gaps between a user's events are drawn below this, s."""

_CUTLASS: list[dict[str, Any]] = [
    {"B": 32, "H": h, "A": a, "S": s} for h, a in ((4, 64), (4, 128), (8, 128)) for s in (1024, 2048, 4096, 8192)
]
_SHORT: list[dict[str, Any]] = [{"B": 512, "H": 4, "A": 128, "S": s} for s in (128, 256, 512)]
_PUBLIC: list[dict[str, Any]] = [
    {"name": "ml-1m", "B": 128, "H": 1, "A": 50, "S": 211},
    {"name": "ml-1m-large", "B": 128, "H": 2, "A": 25, "S": 211},
    {"name": "ml-20m", "B": 128, "H": 4, "A": 64, "S": 211},
    {"name": "ml-20m-large", "B": 128, "H": 8, "A": 32, "S": 211},
    {"name": "books", "B": 128, "H": 4, "A": 16, "S": 61},
    {"name": "books-large", "B": 128, "H": 8, "A": 8, "S": 61},
]
_CACHED: list[dict[str, Any]] = [
    {"name": f"cached-{b}x{s}-C{c}", "B": b, "H": 4, "A": 32, "S": s, "C": c, "lengths": lengths, "rab": True}
    for b, s, c, lengths in (
        *((1, s, c, "full") for s in (256, 1024, 4096) for c in (1, 64, 1024)),
        *((300, 256, c, "skewed") for c in (1, 16)),
    )
]


def _named(sizes: dict[str, Any], lengths: str, rab: bool) -> dict[str, Any]:
    name = sizes.get("name") or "B{B}-{H}x{A}-S{S}".format(**sizes)
    return {**sizes, "name": f"{name}-{lengths}-{'rab' if rab else 'norab'}", "lengths": lengths, "rab": rab}


_QUICK = [_CUTLASS[0], _CUTLASS[1], *_CUTLASS[4:8], *_SHORT, *_PUBLIC]
SIZES: dict[str, list[dict[str, Any]]] = {
    "toy": [
        {"name": "toy-full-norab", "B": 2, "H": 1, "A": 8, "S": 16, "lengths": "full", "rab": False},
        {"name": "toy-skewed-rab", "B": 3, "H": 2, "A": 8, "S": 24, "lengths": "skewed", "rab": True},
        {"name": "toy-cached", "B": 3, "H": 2, "A": 8, "S": 24, "C": 5, "lengths": "skewed", "rab": True},
    ],
    "quick": [
        *(_named(s, "full", rab) for s in _QUICK for rab in (False, True)),
        *(_named(s, "skewed", True) for s in (_CUTLASS[5], _PUBLIC[0], _PUBLIC[2])),
    ],
    "full": [
        _named(s, lengths, rab)
        for s in (*_CUTLASS, *_SHORT, *_PUBLIC)
        for lengths in ("full", "skewed")
        for rab in (False, True)
    ]
    + _CACHED,
}
VERSUS = [
    f"{name}-full-{rab}"
    for name in ("B32-4x128-S1024", "B32-4x128-S4096", "B512-4x128-S256", "ml-1m", "ml-20m", "books")
    for rab in ("norab", "rab")
]
"""Points of ``quick`` at which the GPU report times the competitors: compiling flex_attention takes its time."""
DEFAULTS: dict[str, Any] = {"B": 32, "H": 4, "A": 128, "V": None, "S": 1024, "C": 0, "lengths": "full", "rab": True}
"""V null: as A. C: candidates of each user over a cached history of S; 0: whole sequences. rab: position and time
bias, both with gradients."""


@dataclass(frozen=True)
class Inputs:
    """One point's tensors; the competitors copy what they need."""

    q: Tensor
    k: Tensor
    v: Tensor
    """[L, H, A], [L, H, A], [L, H, V]: views into one [L, ...] projection, as in the layer."""
    position: Tensor | None
    """[1, 2S-1]"""
    time: Tensor | None
    """[1, 129]"""
    offsets: Tensor
    times: Tensor
    """[L] int64, s"""
    longest: int

    @property
    def num_users(self) -> int:
        return self.offsets.shape[0] - 1

    def padded(self, x: Tensor) -> Tensor:
        """[L, H, W] to [B, H, S, W], zeros behind a user's last event."""
        slots = torch.arange(self.longest, device=x.device)
        rows = (self.offsets[:-1, None] + slots).clamp(max=x.shape[0] - 1)  # [B, S]
        real = slots < self.offsets.diff()[:, None]
        return (x.detach()[rows] * real[:, :, None, None].to(x.dtype)).transpose(1, 2)


def make(sizes: Sizes, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Problem:
    """Random inputs of one point; see ``benchmarks.ops``."""
    if sizes["C"]:
        return _make_cached(sizes, device, dtype, generator)
    heads, qk_dim, v_dim, longest = sizes["H"], sizes["A"], sizes["V"] or sizes["A"], sizes["S"]
    lengths = make_lengths(sizes["B"], longest, sizes["lengths"], generator)
    offsets = make_offsets(lengths)
    total = int(offsets[-1])
    projection = leaf((total, heads * (2 * qk_dim + v_dim)), device, dtype, generator)
    q, k, v = projection.detach().split([heads * qk_dim, heads * qk_dim, heads * v_dim], dim=1)
    q, k, v = (x.unflatten(1, (heads, -1)).requires_grad_() for x in (q, k, v))
    gaps_s = torch.randint(0, GAP_S, (total,), device=device, generator=generator)
    times = gaps_s.cumsum(0)  # ascending over the users too, which changes nothing: gaps are within a user
    position = time = None
    if sizes["rab"]:
        position = leaf((1, 2 * longest - 1), device, torch.float32, generator)
        time = leaf((1, TimeBuckets().count), device, torch.float32, generator)
        plan = make_plan(offsets, longest, times + 60, times, TimeBuckets())
    else:
        plan = make_plan(offsets, longest)
    inputs = Inputs(q, k, v, position, time, offsets, times, longest)
    leaves = [x for x in (q, k, v, position, time) if x is not None]
    flops = float(lengths.double().square().sum()) * heads * (qk_dim + v_dim)
    tables = nbytes(*(x for x in (position, time) if x is not None))
    times_bytes = 2 * nbytes(times) if sizes["rab"] else 0
    return Problem(
        Run(lambda: attention(q, k, v, plan, position, time, divisor=float(longest)), leaves),
        forward=Work(flops, nbytes(q, k, v, v) + tables + times_bytes),  # v twice: the output is as large
        backward=Work(BACKWARD_FLOPS * flops, 2 * nbytes(q, k, v) + nbytes(v) + 2 * tables + times_bytes),
        competitors={
            "torch": lambda: _torch(inputs),
            "sdpa": lambda: _sdpa(inputs),
            "flex": lambda: _flex(inputs),
            "reference-triton": lambda: _reference_triton(inputs),
            "cutlass": lambda: _cutlass(inputs),
        },
        tokens=total,
    )


def _make_cached(sizes: Sizes, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Problem:
    """Candidates that ask at one time per user, against keys and values in a cache."""
    heads, qk_dim, v_dim, candidates = sizes["H"], sizes["A"], sizes["V"] or sizes["A"], sizes["C"]
    history = make_lengths(sizes["B"], sizes["S"], sizes["lengths"], generator)
    lengths = history + candidates
    ends, longest = lengths.cumsum(0), sizes["S"] + candidates
    rows, total = sizes["B"] * candidates, int(lengths.sum())
    q = leaf((rows, heads, qk_dim), device, dtype, generator)
    k, v = (leaf((total, heads, width), device, dtype, generator) for width in (qk_dim, v_dim))
    position = time = None
    times: tuple[Any, ...] = (None, None, None)
    if sizes["rab"]:
        position = leaf((1, 2 * longest - 1), device, torch.float32, generator)
        time = leaf((1, TimeBuckets().count), device, torch.float32, generator)
        happened_at = torch.randint(0, GAP_S, (total,), device=device, generator=generator).cumsum(0)
        asked_at = (happened_at[ends - 1] + 60).repeat_interleave(candidates)
        times = asked_at, happened_at, TimeBuckets()
    plan = make_plan(
        torch.arange(sizes["B"] + 1, device=device) * candidates, longest, *times,
        num_targets=torch.full_like(lengths, candidates), key_starts=ends - lengths, key_lengths=lengths,
        max_query_len=candidates,
    )  # fmt: skip
    leaves = [x for x in (q, k, v, position, time) if x is not None]
    flops = 2.0 * candidates * int((history + 1).sum()) * heads * (qk_dim + v_dim)
    read = nbytes(*leaves) + (nbytes(*times[:2]) if sizes["rab"] else 0)
    written = q.element_size() * rows * heads * v_dim

    def run(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Run:
        q, k, v, position, time = [*tensors, None, None][:5]
        return Run(lambda: function(q, k, v, plan, position, time, divisor=float(longest)), tensors)

    return Problem(
        run(attention, leaves),
        forward=Work(flops, read + written),
        backward=Work(BACKWARD_FLOPS * flops, 2 * read + written),
        competitors={"reference": lambda: run(attention_reference, _copies(*leaves))},
        tokens=rows,
    )


# Competitors


def _copies(*tensors: Tensor | None) -> list[Tensor]:
    return [x.detach().contiguous().clone().requires_grad_() for x in tensors if x is not None]


def _bucket(gap_s: Tensor) -> Tensor:
    """The published bucket function in float32, as a score function can write it."""
    buckets = TimeBuckets()
    return (gap_s.abs().clamp(min=1).float().log() / buckets.width).to(torch.int32).clamp(max=buckets.count - 1)


def _padded_times(inputs: Inputs) -> Tensor:
    """[B, S] int64"""
    return inputs.padded(inputs.times[:, None, None].double())[:, 0, :, 0].to(torch.int64)


def _torch(inputs: Inputs) -> Run:
    """Padded batch, scores materialised, as the published research code does; time buckets are made beforehand."""
    num_users, heads, longest = inputs.num_users, inputs.q.shape[1], inputs.longest
    pairs = num_users * longest * longest
    needed = pairs * (6 * heads * inputs.q.element_size() + (12 if inputs.time is not None else 0))
    _check_room(needed, inputs.q.device)
    q, k, v = _copies(*(inputs.padded(x) for x in (inputs.q, inputs.k, inputs.v)))
    rows = torch.arange(longest, device=q.device)
    mask = (rows[None, :] <= rows[:, None]).to(q.dtype)
    if inputs.position is None or inputs.time is None:
        return Run(lambda: (F.silu(q @ k.mT) / longest * mask) @ v, [q, k, v])
    position, time = _copies(inputs.position, inputs.time)
    apart = longest - 1 + rows[None, :] - rows[:, None]
    times = _padded_times(inputs)
    buckets = _bucket(times[:, :, None] + 60 - times[:, None, :])

    def biased() -> Tensor:
        bias = position[0].to(q.dtype)[apart] + time[0].to(q.dtype)[buckets]  # [B, S, S]
        return (F.silu(q @ k.mT + bias[:, None]) / longest * mask) @ v

    return Run(biased, [q, k, v, position, time])


def _check_room(needed: float, device: torch.device) -> None:
    """Raises Absent where the scores of a materialised attention would not fit."""
    room = 0.9 * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2.0**31
    if needed > room:
        raise Absent(f"scores of {needed / 2**30:.0f} GiB do not fit")


def _sdpa(inputs: Inputs) -> Run:
    """Padded causal softmax attention by the flash kernel; it takes no bias."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if inputs.time is not None:
        raise Absent("the flash kernel takes no bias; see the point without")
    if inputs.q.dtype == torch.float32 and inputs.q.device.type == "cuda":
        raise Absent("the flash kernel takes bf16 and fp16")
    q, k, v = _copies(*(inputs.padded(x) for x in (inputs.q, inputs.k, inputs.v)))

    def flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return Run(flash, [q, k, v])


def _flex_plain(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, block_mask=mask)  # type: ignore[return-value]


def _flex_biased(q: Tensor, k: Tensor, v: Tensor, mask: Any, position: Tensor, time: Tensor, times: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    last = q.shape[2] - 1

    def bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + position[last + j - i] + time[_bucket(times[b, i] + 60 - times[b, j])]

    return flex_attention(q, k, v, score_mod=bias, block_mask=mask)  # type: ignore[return-value]


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # one for each shape
    return torch.compile(function, dynamic=False)


def _flex(inputs: Inputs) -> Run:
    """Padded softmax attention, compiled, the bias as a score function; blocks behind a user's end are skipped."""
    if inputs.q.device.type != "cuda":
        raise Absent("compiled for CUDA only")
    from torch.nn.attention.flex_attention import create_block_mask

    q, k, v = _copies(*(inputs.padded(x) for x in (inputs.q, inputs.k, inputs.v)))
    longest, lengths = inputs.longest, inputs.offsets.diff()
    same = bool((lengths == longest).all())

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    def causal_within(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & ((i < lengths[b]) | (j == 0))  # a pad row sees one key, so that no softmax is empty

    users = None if same else inputs.num_users
    mask = create_block_mask(causal if same else causal_within, users, None, longest, longest, device=str(q.device))
    if inputs.position is None or inputs.time is None:
        return Run(lambda: _compiled(_flex_plain)(q, k, v, mask), [q, k, v])
    position, time = _copies(inputs.position[0], inputs.time[0])
    times = _padded_times(inputs)
    return Run(lambda: _compiled(_flex_biased)(q, k, v, mask, position, time, times), [q, k, v, position, time])


def _reference_triton(inputs: Inputs) -> Run:
    """The reference repository's jagged Triton kernel; as released it has no relative bias."""
    if inputs.q.device.type != "cuda":
        raise Absent("needs CUDA")
    try:
        from generative_recommenders.ops.triton.triton_hstu_attention import triton_hstu_mha
    except ImportError as error:
        raise Absent(f"generative_recommenders cannot be imported ({error})") from None
    if inputs.time is not None:
        raise Absent("it has no relative bias; see the point without")
    q, k, v = _copies(inputs.q, inputs.k, inputs.v)
    given: dict[str, Any] = {
        "N": inputs.longest, "max_seq_len": inputs.longest, "alpha": 1.0, "q": q, "k": k, "v": v,
        "seq_offsets": inputs.offsets, "causal": True, "invalid_attn_mask_type": "lower_triangular",
        "attn_scale": torch.tensor(1.0 / inputs.longest, device=q.device), "sort_by_length": True,
    }  # fmt: skip
    arguments = _fitting(triton_hstu_mha, given)
    return Run(lambda: triton_hstu_mha(**arguments), [q, k, v])


def _cutlass(inputs: Inputs) -> Run:
    """fbgemm's CUTLASS HSTU attention. Its rab is a dense [B, H, S, S] tensor, which is made beforehand."""
    if inputs.q.device.type != "cuda":
        raise Absent("needs CUDA")
    try:
        from hstu_attn import hstu_attn_varlen_func
    except ImportError as error:
        raise Absent(f"hstu_attn cannot be imported ({error})") from None
    q, k, v = _copies(inputs.q, inputs.k, inputs.v)
    offsets, longest = inputs.offsets.to(torch.int32), inputs.longest
    given: dict[str, Any] = {
        "q": q, "k": k, "v": v, "cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "seq_offsets_q": offsets,
        "seq_offsets_k": offsets, "max_seqlen_q": longest, "max_seqlen_k": longest, "scaling_seqlen": longest,
        "window_size": (-1, 0), "alpha": 1.0, "target_group_size": 1,
    }  # fmt: skip
    leaves = [q, k, v]
    if inputs.time is not None:
        _check_room(2.5 * inputs.num_users * q.shape[1] * longest**2 * q.element_size(), q.device)
        rab = torch.zeros(inputs.num_users, q.shape[1], longest, longest, dtype=q.dtype, device=q.device)
        given |= {"rab": rab.requires_grad_(), "has_drab": True}
        leaves.append(rab)
    arguments = _fitting(hstu_attn_varlen_func, given)
    return Run(lambda: hstu_attn_varlen_func(**arguments), leaves)


def _fitting(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """Of ``given`` what this version of a foreign function takes; Absent where it wants something else."""
    parameters = inspect.signature(function).parameters
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in given and p.kind != p.VAR_KEYWORD]
    unknown = [n for n in missing if not n.startswith(("seqused", "num_"))]
    if unknown:
        raise Absent(f"this version of {function.__name__} needs {', '.join(unknown)}")
    return {n: given.get(n) for n in parameters if n in given or n in missing}


# Ahead of time

_KERNELS = ["_attention_rows_kernel", "_attention_keys_kernel"]


def _aot(heads: int, width: int, longest: int, dtype: torch.dtype, rab: bool, targets: bool = False,
         deterministic: bool = False) -> Callable[[], Any]:  # fmt: skip
    """Both launchers on two users, forward and backward."""

    def launch() -> None:
        from kernels.attention.kernel import Problem as Launch
        from kernels.attention.kernel import attention_bwd, attention_fwd

        rows = 512
        v, q, k = torch.zeros(rows, 3, heads, width, dtype=dtype).unbind(1)  # views of a fused projection
        ages = torch.zeros(rows, dtype=torch.int32) if rab else None
        problem = Launch(
            q, k, v, torch.tensor([0, 256, 512]), torch.tensor([0, 1], dtype=torch.int32), None, None,
            torch.tensor([8, 8]) if targets else None, ages, ages, TimeBuckets().thresholds() if rab else None, None,
            torch.zeros(1, 2 * longest - 1) if rab else None, torch.zeros(1, 129) if rab else None, longest, longest,
            (1, 0, 0, 0), int(rab), TimeBuckets().width, float(longest), 1.0,
        )  # fmt: skip
        attention_bwd(torch.zeros_like(attention_fwd(problem)), problem, deterministic)

    return launch


def aot_cases() -> list[AotCase]:
    """The public widths with the bias, the long sequences with and without; targets and the ordered backward once."""
    low, needs = torch.bfloat16, Expect(matrix=_KERNELS)
    return [
        ("ml-1m bfloat16", _aot(1, 50, 211, low, True), needs),
        ("ml-20m bfloat16, targets", _aot(4, 64, 211, low, True, targets=True), needs),
        ("books bfloat16", _aot(4, 16, 61, low, True), needs),
        ("4x128 S=4096 bfloat16", _aot(4, 128, 4096, low, True), needs),
        ("4x128 S=4096 bfloat16, no bias", _aot(4, 128, 4096, low, False), needs),
        ("4x128 S=4096 bfloat16, ordered", _aot(4, 128, 4096, low, True, deterministic=True)),
        ("ml-1m float32, ordered", _aot(1, 50, 211, torch.float32, True, deterministic=True)),
    ]
