"""What ``hstu-plan`` is told: the table, the cluster, the batch; and the GPUs it knows by name."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hstu.config import LossConfig, OptimConfig, build
from hstu.config_embedding import EmbeddingConfig
from hstu.config_model import MODELS, HSTUConfig, ModelConfig
from hstu.config_ranking import RankingConfig
from hstu.errors import UserError, check, one_of
from hstu.planning.features import FeaturePlanConfig, Features, FeatureTable, plan_features
from hstu.planning.features import from_options as features_from_options

GIB = 2.0**30
FLOAT, INT64, INT32 = 4, 8, 4
"""Bytes."""
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
PLACEMENTS = ("hbm", "uvm_caching", "uvm")


@dataclass(frozen=True)
class Gpu:
    """Data-sheet figures of one GPU and the machine it is usually sold in."""

    hbm_gib: float
    """What torch can use, as its out-of-memory messages tell it ("total capacity"): less than the data sheet's GB."""
    hbm_gbps: float
    """GB/s."""
    peak_tflops: float
    """bfloat16 and float16 matrix products, dense."""
    peak_tflops_fp32: float
    """float32 without TF32."""
    nvlink_gbps: float
    """GB/s one way, to the GPUs of the same node; half of the data sheet's figure, which counts both ways."""
    network_gbps: float
    """GB/s one way, the GPU's share of the node's network cards."""
    pcie_gbps: float
    """GB/s one way, to host memory."""
    ddr_gib: float
    """Host memory of a node."""
    gpus_per_node: int
    source: str


GPUS = {
    "h200": Gpu(139.8, 4800, 989, 67, 450, 50, 64, 2048, 8,
                "NVIDIA H200 SXM data sheet (141 GB; NVLink 900 GB/s both ways); DGX H200: 400 Gb/s a GPU, 2 TB"),
    "h100": Gpu(79.1, 3350, 989, 67, 450, 50, 64, 2048, 8,
                "NVIDIA H100 SXM data sheet (80 GB; NVLink 900 GB/s both ways); DGX H100: 400 Gb/s a GPU, 2 TB"),
    "b200": Gpu(178.4, 8000, 2250, 75, 900, 50, 64, 2048, 8,
                "NVIDIA HGX/DGX B200 data sheet, an eighth (180 GB; NVLink 1.8 TB/s both ways, bf16 4.5 PFLOPS "
                "sparse); DGX B200: 400 Gb/s a GPU, 2 TB"),
    "a100": Gpu(79.1, 2039, 312, 19.5, 300, 25, 32, 2048, 8,
                "NVIDIA A100 80GB SXM data sheet (NVLink 600 GB/s both ways); DGX A100: 200 Gb/s a GPU, 2 TB"),
    "l40s": Gpu(44.4, 864, 362, 91.6, 32, 25, 32, 1024, 8,
                "NVIDIA L40S data sheet (48 GB, ECC on; no NVLink: PCIe 4.0 x16); 200 Gb/s a GPU and 1 TB are "
                "assumed"),
    "cpu": Gpu(32, 20, 0.1, 0.1, 10, 1, 10, 32, 1,
               "a process with a core or two, for trying the planner where there is no GPU; measure and override"),
}  # fmt: skip


@dataclass
class TablePlanConfig:
    """The table of items."""

    rows: int = 0
    """Items, without the padding row; ``1e9`` is understood. With ids=hash or managed the rows that they share."""
    dim: int | None = None
    """Width of a row: another name for ``model.dim``. null: that."""
    kind: str = "sharded"
    """sharded: spread over the GPUs; local: whole on every GPU, with a gradient as large."""
    optimizer: str = "rowwise_adagrad"
    """sgd, adagrad, rowwise_adagrad, adam or rowwise_adam, in the backward pass where sharded; adamw: local only."""
    sharding: str = "auto"
    """auto (torchrec's planner chooses; row_wise without torchrec), table_wise, row_wise, column_wise, grid or
    data_parallel."""
    dtype: str = "float32"
    """Of the stored rows: float32, float16 or bfloat16."""
    comm_dtype: str = "float32"
    """Of the rows and gradients on their way between GPUs: float32, float16 or bfloat16."""
    ids: str = "exact"
    """exact (a row for each item), hash (items share ``rows``) or managed (``rows`` go to the items in use)."""
    policy: str = "lru"
    """managed: as embedding.policy of a run, lru, lfu or distance_lfu."""
    evict_every: int = 1
    """managed: steps between updates of the map."""
    placement: str = "hbm"
    """hbm; uvm_caching: rows in host memory, a cache of them in HBM; uvm: rows in host memory."""
    cache_fraction: float = 0.2
    """uvm_caching: share of the rows that the cache holds (torchrec's default)."""
    cache_hit_rate: float = 0.8
    """uvm_caching: share of the lookups that find their row in the cache. A guess: it depends on the data."""

    def __post_init__(self) -> None:
        check(self.rows >= 1, "embedding.rows", self.rows, ">= 1, as in embedding.rows=1e9")
        check(self.dim is None or self.dim >= 1, "embedding.dim", self.dim, ">= 1 or null")
        self.of_run()  # its own checks
        one_of("embedding.placement", self.placement, PLACEMENTS)
        check(self.kind == "sharded" or self.placement == "hbm", "embedding.placement", self.placement,
              "hbm with embedding.kind=local")  # fmt: skip
        check(self.sharding != "data_parallel" or self.placement == "hbm", "embedding.placement", self.placement,
              "hbm with embedding.sharding=data_parallel")  # fmt: skip
        for name in ("cache_fraction", "cache_hit_rate"):
            check(0 < getattr(self, name) <= 1, f"embedding.{name}", getattr(self, name), "in (0, 1]")

    def of_run(self) -> EmbeddingConfig:
        """The options of a run with these values."""
        shared = ("kind", "optimizer", "sharding", "dtype", "comm_dtype", "ids", "policy", "evict_every")
        rows = None if self.ids == "exact" else self.rows
        return EmbeddingConfig(rows=rows, **{name: getattr(self, name) for name in shared})


@dataclass
class ClusterConfig:
    """The machines. null: what the data sheet of ``gpu`` says."""

    gpu: str = "h200"
    """h200, h100, b200, a100, l40s, or cpu."""
    gpus: int = 8
    """GPUs in all (ranks)."""
    gpus_per_node: int | None = None
    """GPUs that NVLink joins."""
    hbm_gib: float | None = None
    """Memory of a GPU that torch can use, GiB."""
    hbm_gbps: float | None = None
    """Its bandwidth, GB/s (10^9 bytes a second)."""
    nvlink_gbps: float | None = None
    """Between GPUs of a node, GB/s one way."""
    network_gbps: float | None = None
    """Between nodes, GB/s one way for each GPU; a card of 400 Gb/s is 50."""
    pcie_gbps: float | None = None
    """To host memory, GB/s one way."""
    ddr_gib: float | None = None
    """Host memory of a node, GiB."""
    peak_tflops: float | None = None
    """Dense matrix products in ``precision``, TFLOP/s."""
    reserve: float = 0.1
    """Share of the memory that is left alone: CUDA's and NCCL's own, and what the allocator cannot use."""
    linear_fraction: float = 0.5
    """Share of the peak that the products of linear layers reach; what is element-wise between them counts apart."""
    attention_fraction: float = 0.2
    """Share of the peak that attention reaches; the default is what published Triton kernels of HSTU reached in
    training (docs/plan.md)."""
    hbm_fraction: float = 0.6
    """Share of the memory bandwidth that gathers, updates and element-wise work reach."""
    network_fraction: float = 0.7
    """Share of NVLink and network that collectives reach."""
    collective_us: float = 30.0
    """Start of one collective, microseconds."""

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            near = difflib.get_close_matches(str(self.gpu).lower(), GPUS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(
                f"cluster.gpu={self.gpu!r}: {hint}expected one of {', '.join(GPUS)}; for another, take the nearest and "
                "set cluster.hbm_gib, hbm_gbps, peak_tflops, nvlink_gbps and network_gbps"
            )
        check(self.gpus >= 1, "cluster.gpus", self.gpus, ">= 1")
        sheet = {f.name for f in dataclasses.fields(Gpu)} & {f.name for f in dataclasses.fields(self)}
        for name in sorted(sheet):
            value = getattr(self, name)
            check(value is None or value > 0, f"cluster.{name}", value, "> 0 or null")
        check(0 <= self.reserve < 1, "cluster.reserve", self.reserve, "in [0, 1)")
        for name in ("linear_fraction", "attention_fraction", "hbm_fraction", "network_fraction"):
            check(0 < getattr(self, name) <= 1, f"cluster.{name}", getattr(self, name), "in (0, 1]")
        check(self.collective_us >= 0, "cluster.collective_us", self.collective_us, ">= 0")

    @property
    def sheet(self) -> Gpu:
        """The data sheet with what was overridden, but for the peak (see :meth:`PlanConfig.peak_tflops`)."""
        given = {f.name: getattr(self, f.name, None) for f in dataclasses.fields(Gpu) if f.name != "peak_tflops"}
        return dataclasses.replace(GPUS[self.gpu], **{name: value for name, value in given.items() if value})

    @property
    def node_size(self) -> int:
        """GPUs of a node, all where there are fewer."""
        return min(self.sheet.gpus_per_node, self.gpus)


@dataclass
class BatchPlanConfig:
    """One step on one GPU."""

    tokens_per_gpu: int = 32768
    """Tokens in a GPU's part of the batch: events; with ranking both kinds of the interleaved form, and prefixes."""
    mean_len: float | None = None
    """Mean events of a user (ranking: of a sequence; of a fused one, of its history); null: a third of ``max_len``."""
    max_len: int | None = None
    """Longest user: another name for ``model.max_len``. null: that."""
    mean_square_len: float | None = None
    """Mean of the squared lengths, which attention's work goes with; null: that of the flattest distribution with this
    mean and maximum (a truncated geometric one)."""

    def __post_init__(self) -> None:
        check(self.tokens_per_gpu >= 1, "batch.tokens_per_gpu", self.tokens_per_gpu, ">= 1")
        check(self.max_len is None or self.max_len >= 1, "batch.max_len", self.max_len, ">= 1 or null")
        check(self.mean_len is None or self.mean_len >= 1, "batch.mean_len", self.mean_len, ">= 1 or null")


@dataclass
class UpdatePlanConfig:
    """What a step does with the gradients; names and meaning as in a run."""

    clip_norm: float | None = None
    """With sharded tables rows wait for the norm of all gradients, which are kept till then."""
    accumulate_steps: int = 1
    """Batches of ``batch.tokens_per_gpu`` in a step."""
    average_decay: float | None = None
    """A moving average of all weights, tables included, in float32."""

    def __post_init__(self) -> None:
        self.of_run()  # its own checks

    def of_run(self) -> OptimConfig:
        """The options of a run with these values."""
        return OptimConfig(**dataclasses.asdict(self))


@dataclass(frozen=True)
class TokenForm:
    """How events become tokens.

    Attributes:
        prefix: tokens before the events of a sequence. per_event: 2 where item and action take turns.
        targets: events that a sequence of the fused form predicts, beyond its history. is_fused: the fused form.
    """

    prefix: int = 0
    per_event: int = 1
    targets: int = 0
    is_fused: bool = False

    def tokens_of(self, events: Any) -> Any:
        """Tokens of so many events, those predicted included; a number or an array."""
        return self.prefix + self.per_event * events


EVENTS = TokenForm()
"""Retrieval: an event is a token."""


@dataclass
class PlanConfig:
    """All of it."""

    embedding: TablePlanConfig = field(default_factory=TablePlanConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    batch: BatchPlanConfig = field(default_factory=BatchPlanConfig)
    model: ModelConfig = field(default_factory=HSTUConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    precision: str = "bfloat16"
    """As run.precision: bfloat16 (autocast) or float32."""
    out: str | None = None
    """JSON file to write."""
    optim: UpdatePlanConfig = field(default_factory=UpdatePlanConfig)
    ranking: RankingConfig | None = None
    """Tasks, actions and features of a ranking model, which has no ``loss`` over items; None: retrieval."""
    features: dict[str, FeaturePlanConfig] = field(default_factory=dict)
    """ranking: tables of features, by name."""

    def __post_init__(self) -> None:
        check(self.ranking is not None or not self.features, "features", list(self.features),
              "none without a ranking model, as in ranking=kuairand")  # fmt: skip
        if self.form.is_fused and self.model.name != "hstu":
            raise UserError(
                f"ranking.form=fused with model={self.model.name}: only hstu knows targets; use interleaved"
            )
        one_of("precision", self.precision, ("float32", "bfloat16"))
        longest, mean = self.model.max_len, self.mean_len
        check(mean <= longest, "batch.mean_len", mean, f"<= batch.max_len={longest}")
        least = self.form.tokens_of(mean + self.form.targets)
        check(self.batch.tokens_per_gpu >= least, "batch.tokens_per_gpu", self.batch.tokens_per_gpu,
              f"at least one user's tokens, {least:g} with batch.mean_len={mean:g}")  # fmt: skip
        square = self.batch.mean_square_len
        check(square is None or mean**2 <= square <= mean * longest, "batch.mean_square_len", square,
              f"from mean_len^2={mean**2:g} to mean_len * max_len={mean * longest:g}")  # fmt: skip

    @property
    def mean_len(self) -> float:
        return max(1.0, self.model.max_len / 3) if self.batch.mean_len is None else self.batch.mean_len

    @property
    def all_features(self) -> Features:
        """Of the ranking model; of retrieval none."""
        return Features() if self.ranking is None else plan_features(self.ranking, self.features)

    @property
    def form(self) -> TokenForm:
        """How events become tokens."""
        if self.ranking is None:
            return EVENTS
        prefix = self.all_features.num_prefix
        if self.ranking.form == "fused":
            return TokenForm(prefix, 1, self.ranking.targets, True)
        return TokenForm(prefix, 2)

    @property
    def encoder(self) -> ModelConfig:
        """What the encoder is made from: ``max_len`` in tokens; ranking scores no items."""
        if self.ranking is None:
            return self.model
        longest = self.form.tokens_of(self.model.max_len + self.form.targets)
        return dataclasses.replace(self.model, max_len=longest, l2_normalize=False)

    @property
    def peak_tflops(self) -> float:
        """Of dense matrix products in ``precision``."""
        sheet = GPUS[self.cluster.gpu]
        usual = sheet.peak_tflops if self.precision == "bfloat16" else sheet.peak_tflops_fp32
        return usual if self.cluster.peak_tflops is None else self.cluster.peak_tflops

    @property
    def torch_path(self) -> bool:
        """Whether the ops run on plain torch, which keeps more for the backward pass than the Triton kernels."""
        return self.cluster.gpu == "cpu"

    @property
    def activation_bytes(self) -> int:
        """Of one number that a product under autocast gives."""
        return DTYPE_BYTES[self.precision]

    def with_gpus(self, gpus: int) -> PlanConfig:
        """The same on another number of GPUs."""
        return dataclasses.replace(self, cluster=dataclasses.replace(self.cluster, gpus=gpus))

    def of_feature(self, table: FeatureTable) -> PlanConfig:
        """The same with the table of a feature in place of that of items."""
        own: dict[str, Any] = {"ids": "exact"} if table.sharding is None else {"sharding": table.sharding}
        if table.sharding == "data_parallel":
            own |= {"dtype": "float32", "comm_dtype": "float32", "placement": "hbm"}
        return self.with_table(rows=max(1, table.rows - 1), **own)

    def with_shardings(self, item: str, features: Mapping[str, str]) -> PlanConfig:
        """The same with the tables of items and features cut otherwise."""
        given = {name: self.features.get(name, FeaturePlanConfig()) for name in features}
        chosen = {name: dataclasses.replace(table, sharding=features[name]) for name, table in given.items()}
        return dataclasses.replace(self.with_table(sharding=item), features={**self.features, **chosen})

    def with_table(self, **changes: Any) -> PlanConfig:
        """The same with another kind of table."""
        return dataclasses.replace(self, embedding=dataclasses.replace(self.embedding, **changes))


def from_options(options: Mapping[str, Any], given: tuple[str, ...] = ()) -> PlanConfig:
    """A checked config from what was composed.

    given: the options on the command line, so that two names of one thing with different values are refused.
    """
    values = _whole_numbers({k: v for k, v in options.items() if v is not None})
    known = {f.name for f in dataclasses.fields(PlanConfig)}
    if unknown := sorted(set(values) - known):
        raise UserError(f"unknown option {unknown[0]}: expected one of {', '.join(sorted(known))}")
    model = dict(values.get("model") or {})
    name = model.get("name", "hstu")
    one_of("model.name", name, tuple(MODELS))
    ranking = dict(values.get("ranking") or {})
    table, batch = dict(values.get("embedding") or {}), dict(values.get("batch") or {})
    for section, key, values_of in (("embedding", "dim", table), ("batch", "max_len", batch)):
        value = values_of.get(key)
        if value is None:
            continue
        both = any(word.lstrip("+").startswith(f"model.{key}=") for word in given)
        if both and value != model.get(key):
            raise UserError(
                f"{section}.{key}={value} and model.{key}={model.get(key)}: two names of one size, give one"
            )
        model[key] = value
    return PlanConfig(
        embedding=build(TablePlanConfig, table, "embedding."),
        cluster=build(ClusterConfig, dict(values.get("cluster") or {}), "cluster."),
        batch=build(BatchPlanConfig, batch, "batch."),
        model=build(MODELS[name], model, "model."),
        loss=build(LossConfig, dict(values.get("loss") or {}), "loss."),
        optim=build(UpdatePlanConfig, dict(values.get("optim") or {}), "optim."),
        ranking=build(RankingConfig, ranking, "ranking.") if ranking else None,
        features=features_from_options(dict(values.get("features") or {})),
        precision=str(values.get("precision", "bfloat16")),
        out=values.get("out"),
    )


def _whole_numbers(value: Any) -> Any:
    """Floats without a fraction, such as 1e9, as integers; within mappings too."""
    if isinstance(value, Mapping):
        return {key: _whole_numbers(inner) for key, inner in value.items()}
    whole = isinstance(value, float) and math.isfinite(value) and value == int(value)
    return int(value) if whole else value
