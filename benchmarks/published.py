"""GPU measurements of HSTU that others have published: what was measured, on what, with which kernels, and where.

Facts and figures only. ``benchmarks/plan_published.py`` predicts them.

Legend: n tokens of a user, T of all, D model width, H heads, A width of a head (query, key and value alike).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

H100_TFLOPS = 989.0
"""Dense bfloat16 peak that the sources divide by."""


@dataclass(frozen=True)
class Source:
    """Where a figure stands.

    Attributes:
        place: repository and path, or address. version: commit, or date of the thread.
    """

    place: str
    version: str
    hardware: str


_RECSYS, _FOLDER = "github.com/NVIDIA/recsys-examples", "examples/hstu/training/benchmark"
_JULY_2026 = "43465aeabf61515e28d74cbb5234ff7c627dcc19 (2026-07-23)"
ANALYSIS = Source(f"{_RECSYS}: {_FOLDER}/PERF_ANALYSIS.md", _JULY_2026, "16 H100 SXM, 2 DGX nodes")
END_TO_END = Source(f"{_RECSYS}: {_FOLDER}/E2E_BENCHMARK.md", f"{_JULY_2026}; run at bc40d89c", ANALYSIS.hardware)
LAYERS = Source(
    f"{_RECSYS}: examples/hstu/benchmark/README.md",
    "4b4bf782be66588eebe95aa890fc0563061e3893 (2025-06-16)",
    "1 H100 SXM",
)
SNAPSHOT = Source(
    f"{_RECSYS}: examples/hstu/benchmark/memory_snapshot.png", "d05bc54ac7c4484541e6dd6efe5063774e6c4389 (2025-10-13)",
    LAYERS.hardware,
)  # fmt: skip
HEATMAP = Source(f"{_RECSYS}: {_FOLDER}/figs/hstu_attn_h100_p10_heatmap.png", _JULY_2026, "1 H100 SXM")
TRITONBENCH = Source(
    "github.com/meta-pytorch/tritonbench/issues/1066; shapes and count of operators/ragged_attention/operator.py",
    "2026-05-12",
    "1 H100",
)
INFERENCE = Source("github.com/meta-recsys/generative-recommenders/issues/530", "2026-05-27", "1 H100 SXM")
ALL_TO_ALL = Source("github.com/NVIDIA/nccl/issues/2169", "2026, NCCL 2.30.4", "4 H100 SXM of one node")
NVLINK = Source("github.com/NVIDIA/nccl-tests/issues/212, answer of a maintainer", "2024-05-06", "8 H100 SXM")
NETWORK = Source("github.com/NVIDIA/nccl-tests/issues/290, answer of a maintainer", "2025-03-03", "2 nodes of H100")


USERS = 32
"""Of a GPU, in all of NVIDIA's measurements."""
ONE_GPU = (
    "embedding.rows=1", "embedding.kind=local", "embedding.optimizer=adamw", "cluster.gpu=h100", "cluster.gpus=1",
)  # fmt: skip
"""Options for a layer or a kernel alone: the smallest table."""


def recsys_tflop(
    lengths: np.ndarray, layers: int, contextual: int = 0, squares: np.ndarray | None = None
) -> dict[str, float]:
    """Work of a step as that repository counts it: causal, backward of attention 2.5 times the forward; D = H A = 1024.

    lengths: [B] tokens of each user. squares: [B] n^2, where lengths are means.
    """
    dim, heads, width = 1024, 4, 256
    squares = lengths**2 if squares is None else squares
    history = squares - 2 * contextual * lengths + contextual**2
    attention = 3.5 * (4 * heads * width * squares - 2 * heads * width * history)
    linear = 3 * 2 * lengths * 4 * heads * width * dim + 3 * 2 * lengths * heads * width * dim
    rest = 2 * lengths * heads * width + lengths * heads * dim
    return {name: layers * float(np.sum(part)) / 1e12
            for name, part in (("linear layers", linear), ("attention", attention), ("rest", rest))}  # fmt: skip


# Attention alone

HEATMAP_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
HEATMAP_MS = {
    64: (0.0292, 0.0563, 0.111, 0.269, 0.747, 2.47, 9.23),
    128: (0.0435, 0.0871, 0.173, 0.41, 1.24, 4.14, 15.9),
    256: (0.0779, 0.16, 0.33, 0.836, 2.61, 9.55, 36.1),
}
"""By width of a head: forward and backward of the CUTLASS kernel, 4 heads, 32 users of equal length; of its samples the
tenth percentile."""


def heatmap_options(width: int, length: int) -> tuple[str, ...]:
    """Of ``hstu-plan``, for one of those shapes."""
    return (
        f"model.dim={4 * width}", "model.num_blocks=1", "model.num_heads=4", f"model.qk_dim={width}",
        f"model.v_dim={width}", f"model.max_len={length}", f"batch.mean_len={length}",
        f"batch.tokens_per_gpu={USERS * length}", *ONE_GPU,
    )  # fmt: skip


def cutlass_share(length: int) -> float:
    """Of the peak, heads of 256, 32 users of equal length."""
    work = recsys_tflop(np.full(USERS, float(length)), 1)["attention"]
    return 1e3 * work / HEATMAP_MS[256][HEATMAP_LENGTHS.index(length)] / H100_TFLOPS


# Whole steps


@dataclass(frozen=True)
class Measured:
    """A step, or a part of one.

    Attributes:
        kernels: of the attention.
        options: of ``hstu-plan``, the nearest to what was measured.
        table_options: instead, for tables and what they send, whose width differs from the model's there.
        parts_ms: by the names of ``plan_published.GROUPS``; what the plan does not know is in ``other_ms``.
        tflop: work by their count, by the same names.
        attention_share: of the peak, that the same attention reached alone, at that length.
        is_step: else forward and backward of a layer alone.
        differences: from what our code would do.
    """

    name: str
    source: Source
    kernels: str
    options: tuple[str, ...]
    total_ms: float
    parts_ms: Mapping[str, float] = field(default_factory=dict)
    other_ms: float = 0.0
    tflop: Mapping[str, float] = field(default_factory=dict)
    table_options: tuple[str, ...] | None = None
    attention_share: float | None = None
    is_step: bool = True
    differences: tuple[str, ...] = ()


_TASKS = ", ".join(f"task{i}: {{}}" for i in range(8))
RANKING = (
    f"+ranking={{tasks: {{{_TASKS}}}, actions: {{action: {{}}}}, head: {{hidden: [512]}}}}",
    "model.num_blocks=8", "model.num_heads=4", "model.qk_dim=256", "model.v_dim=256",
    "model.bias.position=false", "model.bias.time=false",
    "features={user_id: {rows: 5e7, of: user}, user_age: {rows: 100, of: user, sharding: data_parallel}, "
    "item_category_l1: {rows: 50, of: user, sharding: data_parallel}}",
    "embedding.rows=5e7", "embedding.optimizer=adam", "embedding.sharding=row_wise",
    "cluster.gpu=h100", "cluster.gpus=16",
)  # fmt: skip
"""Eight layers of width 1024, four heads of 256; 50 M items, 50 M users, eight tasks."""
PREFIX = 3
"""Tokens of user features."""
RANKING_DIFFERENCES = (
    "rows of 128 numbers that a small network widens to 1024; ours are as wide as the model (planned apart)",
    "an action table of 100 rows; ours makes the action token from bits",
    "weights and the residual stream in bfloat16; ours float32 under autocast",
    "no bias; ours is planned without, but its kernels can have one",
    "keeps the projection of u, v, q, k; ours computes it again in the backward pass",
    "five products for each pair in the attention's backward pass; ours seven",
)
CACHED = ("embedding.placement=uvm_caching", "embedding.cache_fraction=0.1", "embedding.cache_hit_rate=0.95")
"""The share of the lookups that the cache serves follows from their ids: Zipf of exponent 1.05, cut at 50 M. Lookups of
the 5 M most frequent and of the last id, where the rest of the distribution lies: 0.55 + 0.40."""


def _shape(dim: int, longest: float, mean: float, square: float | None = None) -> tuple[str, ...]:
    tokens = USERS * (PREFIX + 2 * mean)
    square_len = () if square is None else (f"batch.mean_square_len={square}",)
    return (f"model.dim={dim}", f"model.max_len={longest}", f"batch.mean_len={mean}",
            f"batch.tokens_per_gpu={round(tokens)}", *square_len)  # fmt: skip


FULL_STEP = Measured(
    name="step, 2,048 events a user", source=ANALYSIS, kernels="CUTLASS",
    options=(*RANKING, *CACHED, *_shape(1024, 2048, 2048)),
    table_options=(*RANKING, *CACHED, *_shape(128, 2048, 2048)),
    total_ms=187.01,
    parts_ms={"linear layers": 33.095 + 8.905, "attention": 79.900, "element-wise": 39.507, "heads": 1.919,
              "embedding": 10.643, "communication": 2.927 + 0.862},
    other_ms=6.185 + 1.217 + 0.248,
    tflop={"linear layers": 26.41 + 6.60, "attention": 30.88}, attention_share=cutlass_share(4096),
    differences=(*RANKING_DIFFERENCES, "tables are hash tables in host memory with a cache"),
)  # fmt: skip


def zipf_lengths(exponent: float, longest: int) -> tuple[float, float]:
    """Mean and mean square of lengths drawn from a Zipf distribution, what is above ``longest`` set to it."""
    n = np.arange(1, longest, dtype=np.float64)
    weight = n**-exponent
    # The whole sum: what is beyond the listed terms by the integral, with the first Euler-Maclaurin terms.
    rest = longest ** (1 - exponent) / (exponent - 1) + 0.5 * longest**-exponent
    total = weight.sum() + rest
    return float((weight @ n + rest * longest) / total), float((weight @ n**2 + rest * longest**2) / total)


ZIPF_MEAN, ZIPF_SQUARE = zipf_lengths(1.2, 4096)


def zipf_tflop() -> dict[str, float]:
    """Expected work of a GPU in a step of the end-to-end benchmark, by their count."""
    mean = PREFIX + 2 * ZIPF_MEAN
    square = PREFIX**2 + 4 * PREFIX * ZIPF_MEAN + 4 * ZIPF_SQUARE
    return recsys_tflop(np.full(USERS, mean), 8, PREFIX, squares=np.full(USERS, square))


def _zipf_step(kernels: str, tflops: float, placement: tuple[str, ...], what: str) -> Measured:
    shape = (4096, ZIPF_MEAN, ZIPF_SQUARE)
    work = zipf_tflop()
    return Measured(
        name="step, Zipf lengths, balanced", source=END_TO_END, kernels=kernels,
        options=(*RANKING, *placement, *_shape(1024, *shape)),
        table_options=(*RANKING, *placement, *_shape(128, *shape)),
        total_ms=1e3 * sum(work.values()) / tflops,
        tflop={name: work[name] for name in ("linear layers", "attention")},
        attention_share=None if kernels == "Triton" else cutlass_share(8192),
        differences=(*RANKING_DIFFERENCES, what, "time from their TFLOP/s and the expected work of their lengths"),
    )  # fmt: skip


ZIPF_STEPS = (
    _zipf_step("Triton", 115.8, ("embedding.placement=uvm",), "tables are hash tables in host memory"),
    _zipf_step("CUTLASS", 302.6, ("embedding.placement=uvm",), "tables are hash tables in host memory"),
    _zipf_step("CUTLASS, cached tables", 308.6, CACHED, "tables are hash tables in host memory with a cache"),
)


# One layer

LAYER_LENGTHS = (1024, 2048, 4096, 8192)
LAYER_MS = {
    "Triton": (6.6515, 16.0452, 44.3293, 137.9320),
    "CUTLASS": (5.8640, 12.9900, 31.7074, 88.3084),
    "CUTLASS, fused": (3.8854, 9.1797, 24.5428, 74.7734),
    "CUTLASS, fused, recomputed": (4.1149, 9.7622, 25.5000, 76.3875),
}
"""Forward and backward of a layer, 32 users of each of these lengths, 4 heads of 256. The Triton kernels are those of
meta-recsys/generative-recommenders, with nothing fused around them; recomputed: norm and SiLU, not the product. (A
chart of October 2025 gives TFLOP/s instead, of work whose count is not certain.)"""
LAYER_OPTIONS = (
    "model.dim=1024", "model.num_blocks=1", "model.num_heads=4", "model.qk_dim=256", "model.v_dim=256",
    *ONE_GPU,
)  # fmt: skip


def layers() -> list[Measured]:
    """Every cell of the table."""
    found = []
    for kernels, times in LAYER_MS.items():
        for length, measured in zip(LAYER_LENGTHS, times, strict=True):
            work = recsys_tflop(np.full(USERS, float(length)), 1)
            shape = (f"model.max_len={length}", f"batch.mean_len={length}", f"batch.tokens_per_gpu={USERS * length}")
            found.append(Measured(
                name=f"layer, {length:,} tokens", source=LAYERS, kernels=kernels, options=(*LAYER_OPTIONS, *shape),
                total_ms=measured, is_step=False,
                tflop={name: work[name] for name in ("linear layers", "attention")},
                differences=RANKING_DIFFERENCES[2:],
            ))  # fmt: skip
    return found


SNAPSHOT_GB = {"nothing fused": 16.2, "fused": 12.2, "fused, recomputed": 10.3}
"""Peak of three such layers, 32 users of 4,096 tokens, forward and backward, GB; read from the figure to 0.1."""
SNAPSHOT_LAYERS, SNAPSHOT_LENGTH = 3, 4096


# Shares of the peaks


@dataclass(frozen=True)
class Share:
    """How much of a peak was reached.

    Attributes:
        option: of ``hstu-plan`` that stands for it. reached: in the unit of ``peak``.
    """

    option: str
    what: str
    kernels: str
    source: Source
    reached: float
    peak: float

    @property
    def share(self) -> float:
        return self.reached / self.peak


def _inference_tflops() -> tuple[float, float]:
    """TFLOP/s of attention and of products: 9.30 ms, of which 39.1 and 39.8 %; five layers, 512 wide, 4 heads of 128.

    32 users with 1,024 events on average and 2,048 candidates each; of the events' distribution only the longest
    (1,972) is known, so it is taken to be flat. The output projection reads u, the attended values and their product.
    """
    users, mean, candidates, tokens, dim = 32, 1024.0, 2048.0, 99e3, 512
    pairs = users * (4 / 3 * mean**2 / 2 + candidates * (mean + 1))
    attention = 5 * 2 * pairs * 4 * (128 + 128)
    products = 5 * 2 * tokens * dim * (4 * 512 + 3 * 512)
    return attention / (0.391 * 9.30e-3) / 1e12, products / (0.398 * 9.30e-3) / 1e12


def triton_attention_tflops(length: int) -> float:
    """At most, of the layers' Triton attention, forward and backward: it takes the time by which that layer is slower
    than the one with CUTLASS attention, and at least what CUTLASS attention took a year later."""
    place = LAYER_LENGTHS.index(length)
    slower_ms = LAYER_MS["Triton"][place] - LAYER_MS["CUTLASS"][place]
    own_ms = HEATMAP_MS[256][HEATMAP_LENGTHS.index(length)]
    return 1e3 * recsys_tflop(np.full(USERS, float(length)), 1)["attention"] / (slower_ms + own_ms)


def shares() -> list[Share]:
    """All of them. TFLOP/s of attention by five products in the backward pass."""
    attention, products = _inference_tflops()
    linear = [("u, v, q, k forward with SiLU", "Triton", 469.99), ("output forward", "cuBLAS", 707.37),
              ("u, v, q, k backward", "cuBLAS", 819.95), ("output backward", "cuBLAS", 759.63)]  # fmt: skip
    found = [Share("linear_fraction", f"{name}, 131,168 tokens, width 1024", kernels, ANALYSIS, value, H100_TFLOPS)
             for name, kernels, value in linear]  # fmt: skip
    found.append(Share("linear_fraction", "products forward, 99,000 tokens, width 512", "Triton", INFERENCE, products,
                       H100_TFLOPS))  # fmt: skip
    found += [
        Share("attention_fraction", "forward, heads of 256, 4,099 tokens", "CUTLASS", ANALYSIS, 561.26, H100_TFLOPS),
        Share("attention_fraction", "backward, heads of 256, 4,099 tokens", "CUTLASS", ANALYSIS, 336.46, H100_TFLOPS),
        Share("attention_fraction", "forward, heads of 128, inference", "Triton", INFERENCE, attention, H100_TFLOPS),
    ]
    found += [
        Share("attention_fraction", f"both, heads of 256, {length:,} tokens, at most", "Triton", LAYERS,
              triton_attention_tflops(length), H100_TFLOPS)
        for length in LAYER_LENGTHS
    ]  # fmt: skip
    found += [
        Share("attention_fraction", f"backward, heads of 128, 256 to 1,024 tokens, {when}", "Triton", TRITONBENCH,
              value, H100_TFLOPS)
        for when, value in (("April 2026", 119.35), ("May 2026", 182.15))
    ]  # fmt: skip
    return [
        *found,
        Share("network_fraction", "all-to-all of 500 MB in a node, GB/s", "NCCL", ALL_TO_ALL, 334.9, 450.0),
        Share("network_fraction", "most of NVLink, GB/s", "NCCL", NVLINK, 370.0, 450.0),
        Share("network_fraction", "most of a card of 400 Gb/s, GB/s", "NCCL", NETWORK, 47.0, 50.0),
    ]
