"""The whole configuration: fields, types, defaults and range checks.

YAML under ``conf/`` only picks values. Hydra composes, :func:`from_dictconfig` turns the result into
these dataclasses, and nothing deeper sees a ``DictConfig``. Unknown keys fail.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

from hstu.config_embedding import EmbeddingConfig
from hstu.config_model import (
    MODELS,
    HSTUConfig,
    ModelConfig,
)
from hstu.config_model import BiasConfig as BiasConfig  # these names belong to this module's interface
from hstu.config_model import FuXiLinearConfig as FuXiLinearConfig
from hstu.config_model import SASRecConfig as SASRecConfig
from hstu.config_model import TransformerConfig as TransformerConfig
from hstu.config_ranking import RankingConfig
from hstu.config_similarity import MixtureConfig as MixtureConfig
from hstu.errors import UserError
from hstu.errors import check as _check
from hstu.errors import one_of as _one_of


@dataclass
class ColumnsConfig:
    """Column names of the user's own log (``data=log``)."""

    user: str = "user"
    """Column with the user id, integer or string."""
    item: str = "item"
    """Column with the item id, integer or string."""
    time: str = "timestamp"
    """Column with the time of the event, in ``time_unit``."""
    action: str | None = None
    """Column with what was done (a rating, an event name, a bit set); stored as ``actions``."""
    values: list[str] = field(default_factory=list)
    """Further numeric columns, stored as float32."""
    features: list[str] = field(default_factory=list)
    """Further categorical columns, coded to int32 (0 = missing) with a map back to the raw values."""
    optional: list[str] = field(default_factory=list)
    """Those of ``action`` and ``values`` that may be empty, stored as NaN. In the others an empty cell is a bad row."""
    numeric: list[str] = field(default_factory=list)
    """Columns of ``items_file`` and ``users_file`` stored as float32 (empty = NaN). The others are text."""

    def __post_init__(self) -> None:
        known = [*([self.action] if self.action is not None else []), *self.values]
        for name in self.optional:
            _check(name in known, "data.columns.optional", name, f"one of the action and values ({', '.join(known)})")


@dataclass
class DataConfig:
    """Which log, how it is read, filtered and split. ``hstu-prepare`` and ``hstu-train`` share it."""

    name: str = "synthetic"
    """Name of the data set; names the store's folder."""
    source: str = "synthetic"
    """Importer: synthetic, movielens-100k, movielens-dat, movielens-csv, amazon-2014, kuairand or log."""
    raw: str | None = None
    """Local file, glob or folder with the raw data. None: ``$HSTU_DATA_DIR/<name>`` if it is there, else download."""
    root: str = "data"
    """Folder under which raw downloads (``raw/``) and prepared stores (``stores/``) lie."""
    url: str | None = None
    """Where to download from."""
    checksum: str | None = None
    """``md5:HEX`` or ``sha256:HEX`` of the downloaded archive."""
    category: str | None = None
    """Amazon 2014 only: category as in the file name ``ratings_<category>.csv``."""
    random_log: bool = False
    """KuaiRand only: also take the log of randomly exposed videos; ``is_rand`` marks its events."""

    # Reading (data=log)
    format: str = "auto"
    """csv, jsonl, parquet, or auto (by file name)."""
    separator: str | None = None
    """CSV separator; None: found from the header line among , ; tab |."""
    header: bool = True
    """CSV: the first line names the columns."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    time_unit: str = "auto"
    """s, ms, us, iso, or auto (by magnitude / type; said in the log)."""
    items_file: str | None = None
    """Optional CSV/Parquet of item attributes (first column: raw item id; ``title`` and others kept)."""
    users_file: str | None = None
    """Optional CSV/Parquet of user attributes (first column: raw user id)."""
    on_bad_row: str = "fail"
    """fail: stop at the first bad row; skip: count it and write it to ``rejects.csv``."""

    # Past one machine
    shards: int | None = None
    """Write the store in so many shards, by a hash of the user, with bounded memory: for logs that do not fit into it.
    None: one store. Take at least as many as there will be ranks; a shard of 10 to 50 million events is handy."""
    memory_mib: int = 1024
    """With ``shards``: working memory of the preparation, in MiB, beside the item vocabulary and the libraries."""

    # Filters
    min_user_events: int = 0
    """Users with fewer events are dropped; 0: none."""
    min_item_events: int = 0
    """Items with fewer events are dropped; 0: none."""
    filter_mode: str = "one-pass"
    """one-pass (PROTOCOL section 1: counted on the raw file, then short users dropped) or iterative (k-core)."""
    dedup: str = "none"
    """none, first, last (one event per user-item pair), or exact (drop identical rows)."""
    max_events: int | None = None
    """Keep only each user's most recent events in the store; None keeps all."""
    max_items: int | None = None
    """Vocabulary cap: rarer items share one rare-item bucket (id = num_items). None: no cap."""

    # Protocol and split
    protocol: str = "reference"
    """Order inside equal timestamps: reference (seeded random permutation) or stable (file order)."""
    protocol_seed: int = 0
    """Seed of the permutation inside equal timestamps."""
    split: str = "leave-last-out"
    """leave-last-out or global-time."""
    split_time: str | None = None
    """global-time only: epoch seconds, ISO date, or a quantile such as ``0.9q``."""
    expected: dict[str, int] = field(default_factory=dict)
    """Published counts (users, items, events), checked when preparing the full original file."""

    # Synthetic process (source=synthetic)
    num_users: int = 3000
    """Synthetic only: users."""
    num_items: int = 200
    """Synthetic only: items."""
    synthetic_seed: int = 0
    """Synthetic only: seed of the process and of the log drawn from it."""

    def __post_init__(self) -> None:
        sources = ("synthetic", "movielens-100k", "movielens-dat", "movielens-csv", "amazon-2014", "kuairand", "log")
        _one_of("data.source", self.source, sources)
        _one_of("data.format", self.format, ("auto", "csv", "jsonl", "parquet"))
        _one_of("data.time_unit", self.time_unit, ("auto", "s", "ms", "us", "iso"))
        _one_of("data.on_bad_row", self.on_bad_row, ("fail", "skip"))
        _one_of("data.filter_mode", self.filter_mode, ("one-pass", "iterative"))
        _one_of("data.dedup", self.dedup, ("none", "first", "last", "exact"))
        _one_of("data.protocol", self.protocol, ("reference", "stable"))
        _one_of("data.split", self.split, ("leave-last-out", "global-time"))
        for name in ("items_file", "users_file"):
            _check(getattr(self, name) is None or self.source == "log", f"data.{name}", getattr(self, name), "data=log")
        _check(not self.random_log or self.source == "kuairand", "data.random_log", True, "a data.source of kuairand")
        for name in ("min_user_events", "min_item_events"):
            _check(getattr(self, name) >= 0, f"data.{name}", getattr(self, name), ">= 0")
        for name in ("max_events", "max_items"):
            value = getattr(self, name)
            _check(value is None or value >= 1, f"data.{name}", value, ">= 1 or null")
        shards = self.shards
        _check(shards is None or self.source != "synthetic", "data.shards", shards,
               "null with data=synthetic, which is made in memory and small")  # fmt: skip
        _check(shards is None or 1 <= shards <= 65536, "data.shards", shards, "1 to 65536 or null")
        _check(self.memory_mib >= 64, "data.memory_mib", self.memory_mib, ">= 64")
        if self.split == "global-time":
            _check(self.split_time is not None, "data.split_time", None, "a time when data.split=global-time")


@dataclass
class LossConfig:
    """Retrieval loss. ``name`` picks the file under ``hstu/model/losses``."""

    name: str = "sampled_softmax"
    """sampled_softmax (fresh uniform negatives per position, published), shared_bank, in_batch, full_softmax."""
    num_negatives: int = 128
    """sampled_softmax: negatives per position (R); shared_bank: bank size (K) per step."""
    temperature: float = 0.05
    """Divides the logits."""
    logq_correction: bool = False
    """shared_bank / in_batch: subtract the log of the sampling probability from the logits."""
    chunk_mib: int = 64
    """full_softmax: memory bound of one block of logits."""
    event_weights: str = "none"
    """none or actions: weight each position by the predicted event's action value over the mean."""

    def __post_init__(self) -> None:
        _one_of("loss.name", self.name, ("sampled_softmax", "shared_bank", "in_batch", "full_softmax"))
        _check(self.num_negatives >= 1, "loss.num_negatives", self.num_negatives, ">= 1")
        _check(self.temperature > 0, "loss.temperature", self.temperature, "> 0")
        _check(self.chunk_mib >= 1, "loss.chunk_mib", self.chunk_mib, ">= 1")
        _one_of("loss.event_weights", self.event_weights, ("none", "actions"))


@dataclass
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 1e-3
    """Learning rate after the warm-up."""
    table_lr: float | None = None
    """Learning rate of embedding tables, with the same schedule; None: ``lr``."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    """Decay rates of the first and second moment."""
    eps: float = 1e-8
    """Added to the denominator of the update."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    table_weight_decay: float | None = None
    """Of embedding tables; None: ``weight_decay``. Ranking models, whose ids are learnt by heart within a few epochs,
    do well with about 1."""
    schedule: str = "constant"
    """constant or cosine (to ``min_lr_fraction`` of lr at the last step), both after warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    min_lr_fraction: float = 0.0
    """cosine only: final rate as a fraction of lr."""
    clip_norm: float | None = None
    """Global gradient norm limit; None: no clipping. With embedding.kind=sharded rows then wait for the norm, as they
    do with ``accumulate_steps`` for the other batches: they move in torch at the end of the step, not in fbgemm's
    backward, which takes longer on a GPU. Gradients of rows are kept till then."""
    accumulate_steps: int = 1
    """Batches per optimizer step."""
    average_decay: float | None = None
    """Decay of an exponential moving average of the weights, such as 0.998; evaluation and the best checkpoint then
    use the average. None: the weights themselves. Every step passes over all weights, large tables included, which
    are held twice; with embedding.kind=sharded each rank averages its part."""

    def __post_init__(self) -> None:
        _check(self.lr > 0, "optim.lr", self.lr, "> 0")
        _check(self.eps > 0, "optim.eps", self.eps, "> 0")
        _check(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, ">= 0")
        _check(self.table_lr is None or self.table_lr > 0, "optim.table_lr", self.table_lr, "> 0 or null")
        decay = self.table_weight_decay
        _check(decay is None or decay >= 0, "optim.table_weight_decay", decay, ">= 0 or null")
        _check(0 <= self.min_lr_fraction <= 1, "optim.min_lr_fraction", self.min_lr_fraction, "in [0, 1]")
        betas_ok = len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)
        _check(betas_ok, "optim.betas", self.betas, "two numbers in [0, 1)")
        _one_of("optim.schedule", self.schedule, ("constant", "cosine"))
        _check(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, ">= 0")
        _check(self.clip_norm is None or self.clip_norm > 0, "optim.clip_norm", self.clip_norm, "> 0 or null")
        _check(self.accumulate_steps >= 1, "optim.accumulate_steps", self.accumulate_steps, ">= 1")
        average = self.average_decay
        _check(average is None or 0 < average < 1, "optim.average_decay", average, "in (0, 1) or null")


@dataclass
class StochasticLengthConfig:
    """Cutting long training sequences to random lengths (Zhai et al. 2024, section 3.2); evaluation is always full."""

    alpha: float | None = None
    """In (1, 2]: with N the longest sequence, one of n > N^(alpha/2) events is cut to N^(alpha/2) of them with
    probability 1 - N^alpha / n^2. 2 cuts nothing; None: off."""
    selection: str = "recent"
    """Events that a cut sequence keeps, in their order: recent (the last), uniform (at random) or recency (at random,
    weighted by age as in the paper's appendix F.1)."""

    def __post_init__(self) -> None:
        alpha = self.alpha
        _check(alpha is None or 1 < alpha <= 2, "run.stochastic_length.alpha", alpha, "in (1, 2] or null")
        _one_of("run.stochastic_length.selection", self.selection, ("recent", "uniform", "recency"))


@dataclass
class RunConfig:
    """The loop: how long, what is saved, what is shown."""

    dir: str | None = None
    """Run folder; None: ``runs/<experiment>/<UTC time>-seed<seed>``. An existing run folder is resumed."""
    epochs: int = 101
    """Passes over the training users."""
    batch_users: int = 128
    """Users per batch; ignored when ``batch_tokens`` is set."""
    batch_tokens: int | None = None
    """Token budget per batch instead of a number of users."""
    reader: str = "draw"
    """draw: every batch is drawn from all users. stream: for a log beyond memory (``data.shards``): each rank reads its
    own shards from front to back through shuffle buffers."""
    buffer_users: int = 65536
    """reader=stream: users (ranking: sequences) in the shuffle buffers of all ranks together, every shard's the same
    part. More mix better; their events are held in memory."""
    stochastic_length: StochasticLengthConfig = field(default_factory=StochasticLengthConfig)
    selection: str = "validation"
    """validation: second-last item held out, best epoch by validation, test reported once.
    reference: only the last item held out, best epoch on test, as the published numbers were made."""
    select_metric: str = "ndcg@10"
    """Metric of the best epoch, such as ``ndcg@10``, ``hr@10`` or ``mrr``."""
    early_stop_evals: int | None = None
    """Stop after so many evaluations without a better ``select_metric``; None: never."""
    eval_every_epochs: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    device: str = "auto"
    """auto, cpu or cuda."""
    ranks: int | None = None
    """Processes that train together on this machine, each on a GPU of its own where there are GPUs. What is trained
    does not depend on their number. None: one, or those that torchrun has started."""
    dense: str = "ddp"
    """With several ranks: ddp (each holds all dense parameters) or fsdp (the encoder's layers lie in parts on them and
    are gathered while they compute, FSDP2: for large models)."""
    max_restarts: int = 3
    """With ``ranks``: how often they are started again, from the last checkpoint, when one of them dies."""
    timeout_s: float = 600.0
    """With several ranks: seconds without a sign of life of one, or of waiting for it, after which it is given up."""
    stop_patience_s: int | None = None
    """With ``ranks``: seconds that they have after SIGTERM or Ctrl-C to save, before they are killed. None: 300; before
    torch 2.13 its launcher gives 30, and takes no other number."""
    precision: str = "float32"
    """float32 or bfloat16 (autocast, CUDA only)."""
    tf32: bool = False
    """Let CUDA use TF32 in float32 products (faster, 10-bit mantissa)."""
    threads: int | None = None
    """torch CPU threads; None: torch's default."""
    deterministic: bool = True
    """Ask torch for deterministic algorithms on CUDA; the CPU path always is."""
    keep_last: int = 2
    """Checkpoints kept besides the best."""
    save_every_steps: int | None = None
    """Steps between checkpoints; None: not by steps."""
    save_every_minutes: float | None = 10.0
    """Minutes between checkpoints; None: not by time."""
    save_every_epochs: int | None = 1
    """Epochs between checkpoints; None: not by epochs, but at the end."""
    save_in_background: bool = True
    """Write checkpoints beside the training, which then stops only to copy its state (one copy more in host memory)."""
    loggers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Any of tensorboard, wandb, mlflow; ``metrics.jsonl`` is always written."""
    log_every_steps: int = 10
    """Steps between lines of ``metrics.jsonl`` and logger points."""
    progress: bool = True
    """Live progress bar; off where the output is no terminal."""

    def __post_init__(self) -> None:
        _check(self.epochs >= 1, "run.epochs", self.epochs, ">= 1")
        _check(self.batch_users >= 1, "run.batch_users", self.batch_users, ">= 1")
        tokens = self.batch_tokens
        _check(tokens is None or tokens >= 1, "run.batch_tokens", tokens, ">= 1 or null")
        _one_of("run.reader", self.reader, ("draw", "stream"))
        _check(self.buffer_users >= 1, "run.buffer_users", self.buffer_users, ">= 1")
        if self.reader == "stream":
            _check(tokens is None, "run.batch_tokens", tokens, "null with run.reader=stream")
        _one_of("run.selection", self.selection, ("validation", "reference"))
        _one_of("run.device", self.device, ("auto", "cpu", "cuda"))
        _one_of("run.dense", self.dense, ("ddp", "fsdp"))
        _one_of("run.precision", self.precision, ("float32", "bfloat16"))
        for name in ("keep_last", "eval_every_epochs", "log_every_steps"):
            _check(getattr(self, name) >= 1, f"run.{name}", getattr(self, name), ">= 1")
        _check(self.max_restarts >= 0, "run.max_restarts", self.max_restarts, ">= 0")
        _check(self.timeout_s > 0, "run.timeout_s", self.timeout_s, "> 0")
        patience = self.stop_patience_s
        _check(patience is None or patience >= 1, "run.stop_patience_s", patience, ">= 1 or null")
        for name in ("save_every_steps", "save_every_epochs", "early_stop_evals", "threads", "ranks"):
            value = getattr(self, name)
            _check(value is None or value >= 1, f"run.{name}", value, ">= 1 or null")
        minutes = self.save_every_minutes
        _check(minutes is None or minutes > 0, "run.save_every_minutes", minutes, "> 0 or null")
        for logger in self.loggers:
            _one_of("run.loggers", logger, ("tensorboard", "wandb", "mlflow"))


@dataclass
class EvalConfig:
    """Full-ranking evaluation (PROTOCOL section 4)."""

    ks: list[int] = field(default_factory=lambda: [1, 5, 10, 50, 100, 200])
    """Cut-offs K of HR@K and NDCG@K."""
    batch_users: int = 512
    """Users scored at once."""
    filter_history: str = "truncated"
    """Seen items removed from the ranking: truncated (the model's input, published), full, or none."""
    bootstrap: int = 1000
    """Bootstrap resamples for the confidence intervals; 0: none."""
    chunk_mib: int = 64
    """Memory bound of one block of scores, in MiB."""
    baselines: bool = True
    """Evaluate the baselines beside the model."""

    def __post_init__(self) -> None:
        _check(len(self.ks) > 0 and all(k >= 1 for k in self.ks), "eval.ks", self.ks, "a list of ranks >= 1")
        _one_of("eval.filter_history", self.filter_history, ("truncated", "full", "none"))
        _check(self.batch_users >= 1, "eval.batch_users", self.batch_users, ">= 1")
        _check(self.bootstrap >= 0, "eval.bootstrap", self.bootstrap, ">= 0")
        _check(self.chunk_mib >= 1, "eval.chunk_mib", self.chunk_mib, ">= 1")


@dataclass
class KernelsConfig:
    """What the ops run on."""

    backend: str = "auto"
    """auto (triton on CUDA where an op has it, else torch), triton or torch; an explicit choice that cannot be met
    raises."""
    autotune: bool = False
    """Time every configuration of a Triton kernel for each new size (seconds each) instead of taking the first. Each
    process goes by its own timing: results then differ in the last bits between runs, and between the ranks of one."""

    def __post_init__(self) -> None:
        _one_of("kernels.backend", self.backend, ("auto", "triton", "torch"))


@dataclass
class PublishedConfig:
    """The published row that this experiment is compared with (PROTOCOL section 5)."""

    source: str = ""
    """Where the number was published."""
    dataset: str = ""
    """``data.name`` it was measured on; shown only beside runs on it."""
    model: str = ""
    """``model.name`` it was measured with; shown only beside that model."""
    similarity: str = "dot"
    """``model.similarity`` it was measured with; shown only beside that similarity."""
    protocol: str = "reference"
    """Protocol it was made by: reference or stable."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metric name -> published value."""


@dataclass
class Config:
    """One experiment."""

    experiment: str = "synthetic"
    """Name of the experiment; names the run folder."""
    seed: int = 0
    """Seed of weights, order of users, negatives and dropout."""
    seeds: list[int] | None = None
    """Several seeds in one command: mean and standard deviation are reported."""
    variants: dict[str, list[str]] = field(default_factory=dict)
    """Name -> overrides such as ``model.bias.time=false``: trained too, shown beside the experiment. ``variants=null``
    leaves out those of the experiment."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=HSTUConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    run: RunConfig = field(default_factory=RunConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    published: PublishedConfig = field(default_factory=PublishedConfig)
    ranking: RankingConfig | None = None
    """Tasks, actions and features of a ranking model; None: retrieval."""

    def __post_init__(self) -> None:
        if self.run.reader == "stream":
            beside = "with run.reader=stream"
            progressive = self.ranking is not None and self.ranking.mode == "progressive"
            _check(not progressive, "ranking.mode", "progressive",
                   f"epochs {beside}, which reads by user; hstu-stream goes through a log in time order")  # fmt: skip
        if self.embedding.kind == "sharded":
            self._check_sharded()
        else:
            self._check_local()
        if self.embedding.optimizer in ("sgd", "adagrad", "rowwise_adagrad"):
            decay = self.optim.table_weight_decay or 0.0
            _check(decay == 0.0, "optim.table_weight_decay", decay,
                   f"0 or null with embedding.optimizer={self.embedding.optimizer}, which has no decay")  # fmt: skip
        if self.model.similarity == "mixture_of_logits":
            beside = "with model.similarity=mixture_of_logits"
            _check(self.ranking is None, "ranking", "a ranking model", f"none {beside}, which retrieves items")
            _check(self.embedding.ids == "exact", "embedding.ids", self.embedding.ids, f"exact {beside}")
            _check(self.loss.name == "sampled_softmax", "loss.name", self.loss.name, f"sampled_softmax {beside}")
            _check(self.loss.temperature == 1.0, "loss.temperature", self.loss.temperature,
                   f"1 {beside}, whose own model.mixture.temperature divides the logits")  # fmt: skip

    def _check_local(self) -> None:
        usual = EmbeddingConfig()
        for name in ("sharding", "tables", "hbm_gib", "ddr_gib"):
            value = getattr(self.embedding, name)
            _check(value == getattr(usual, name), f"embedding.{name}", value,
                   "none with embedding.kind=local, whose tables are whole; take embedding=sharded")  # fmt: skip

    def _check_sharded(self) -> None:
        if self.embedding.pipeline:
            whole = self.ranking is None and self.embedding.sharding_of("item") == "data_parallel"
            _check(not whole, "embedding.pipeline", True, "false with the item table data_parallel, the only table")
            progressive = self.ranking is not None and self.ranking.mode == "progressive"
            _check(not progressive or self.embedding.ids != "managed", "embedding.pipeline", True,
                   "false with ranking.mode=progressive and embedding.ids=managed, which predicts a batch by the rows "
                   "before it and trains on it by those after it")  # fmt: skip
        _check(self.model.similarity == "dot", "model.similarity", self.model.similarity,
               "dot with embedding.kind=sharded")  # fmt: skip


def published_row(config: Config) -> PublishedConfig | None:
    """The published row where it can be compared with a run of ``config``, else None.

    Comparable: the same data set, protocol, model and similarity, the last event held out, seen items of the model's
    input removed from the ranking.
    """
    row, data = config.published, config.data
    ours = (data.name, config.model.name, config.model.similarity, data.protocol)
    same = (row.dataset, row.model, row.similarity, row.protocol) == ours
    usual = data.split == "leave-last-out" and config.eval.filter_history == "truncated"
    return row if row.metrics and same and usual else None


def build(cls: type, values: dict[str, Any], path: str = "") -> Any:
    """Builds dataclass ``cls`` from nested plain values, type-checked by OmegaConf; unknown keys raise UserError."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UserError(f"unknown config key {path}{unknown[0]}: expected one of {', '.join(sorted(known))}")
    try:
        return OmegaConf.to_object(OmegaConf.merge(_schema(cls), values))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        raise UserError(f"config {path}{key}: {str(error).splitlines()[0]}") from None


@functools.cache
def _schema(cls: type) -> Any:
    """Fields and types of a dataclass, for OmegaConf, which copies what it merges into."""
    from omegaconf import OmegaConf

    return OmegaConf.structured(cls)


def from_dict(values: dict[str, Any]) -> Config:
    """Builds a checked :class:`Config` from nested plain values (a composed YAML, a run's ``config.yaml``)."""
    values = dict(values)
    model_values = dict(values.pop("model", None) or {})
    name = model_values.get("name", "hstu")
    _one_of("model.name", name, tuple(MODELS))
    groups = {f.name: f for f in dataclasses.fields(Config)}
    unknown = sorted(set(values) - set(groups))
    if unknown:
        raise UserError(f"unknown config key {unknown[0]}: expected one of {', '.join(sorted(groups))}")
    parts: dict[str, Any] = {"model": build(MODELS[name], model_values, "model.")}
    sections = {
        "data": DataConfig, "loss": LossConfig, "optim": OptimConfig, "embedding": EmbeddingConfig,
        "run": RunConfig,
        "eval": EvalConfig, "kernels": KernelsConfig, "published": PublishedConfig,
    }  # fmt: skip
    for key, cls in sections.items():
        parts[key] = build(cls, dict(values.pop(key, None) or {}), f"{key}.")
    ranking = dict(values.pop("ranking", None) or {})
    parts["ranking"] = build(RankingConfig, ranking, "ranking.") if ranking else None
    seed, seeds = values.get("seed", 0), values.get("seeds")
    _check(isinstance(seed, int) and seed >= 0, "seed", seed, "an integer >= 0")
    ok = seeds is None or (len(seeds) > 0 and all(isinstance(s, int) and s >= 0 for s in seeds))
    _check(ok, "seeds", seeds, "null or a list of integers >= 0")
    variants = {str(k): list(v) for k, v in (values.get("variants") or {}).items()}
    experiment = str(values.get("experiment", "synthetic"))
    return Config(experiment=experiment, seed=seed, seeds=seeds, variants=variants, **parts)


def from_dictconfig(cfg: Any) -> Config:
    """Turns what Hydra composed into a checked :class:`Config`."""
    from omegaconf import OmegaConf

    return from_dict(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested plain values, as written to ``config.yaml`` in the run folder."""
    return dataclasses.asdict(config)
