"""Config of the embedding tables: on one rank or over all, and the optimizer that moves their rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from hstu.errors import check as _check
from hstu.errors import one_of as _one_of

KINDS = ("local", "sharded")
TABLE_OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad", "adam", "rowwise_adam")
PLANNED = ("table_wise", "row_wise", "column_wise")
"""What torchrec's planner chooses from."""
SHARDINGS = (*PLANNED, "grid", "data_parallel")
IDS = ("exact", "hash", "managed")
POLICIES = ("lru", "lfu", "distance_lfu")


@dataclass
class EmbeddingConfig:
    """Where the tables of ids lie and how they learn."""

    kind: str = "local"
    """local: whole tables on every rank; sharded: torchrec spreads them over the ranks."""
    optimizer: str = "adamw"
    """adamw (local only: that of the other parameters, over all rows), or for the rows that a step touches sgd,
    adagrad, rowwise_adagrad (one number a row), adam or rowwise_adam (one second moment a row), by fbgemm's rules.
    Betas, eps and, for the two Adams, the decay (decoupled, touched rows only) are those of ``optim``."""
    lr: float | None = None
    """Learning rate of the tables, with the schedule of ``optim``; None: ``optim.table_lr`` or ``optim.lr``."""
    sharding: str = "auto"
    """sharded only: auto (torchrec's planner chooses from the next three), table_wise, row_wise, column_wise, grid
    (columns over the nodes, and each part by rows over the ranks of its node) or data_parallel (whole on every rank, in
    float32). With column_wise and grid the row-wise optimizers keep a number for each part of a row. row_wise and grid
    leave a table of few rows, which would give some rank none, on one rank."""
    tables: dict[str, str] = field(default_factory=dict)
    """sharded only: ``sharding`` of single tables by name: ``item``, or a feature (``item.genre``). Not auto."""
    dtype: str = "float32"
    """sharded only: of the stored rows: float32, float16 or bfloat16 (CUDA; fbgemm has no kernels for it, rows then
    move in torch)."""
    comm_dtype: str = "float32"
    """sharded only: of the rows and gradients that ranks send each other: float32, float16 or bfloat16 (CUDA)."""
    pipeline: bool = False
    """sharded only: torchrec's TrainPipelineSparseDist, which sends the ids of the next batches, for all sharded
    tables, to their ranks while this one computes; of use on GPUs. The result is the same."""
    hbm_gib: float | None = None
    """sharded only: GPU memory of a rank that the planner may fill; None: what is free where there is the least."""
    ddr_gib: float | None = None
    """sharded only: host memory of a rank that the planner may fill; None: the machine's, divided by its ranks."""

    ids: str = "exact"
    """Rows of the item table: exact (one for each item), hash (items share ``rows``, by a hash of the id) or managed
    (torchrec's managed collision: ``rows`` go to the items that ``policy`` prefers, the first to all others)."""
    rows: int | None = None
    """hash, managed: rows of the item table, without the padding row."""
    policy: str = "lru"
    """managed: who keeps a row. lru: the last seen; lfu: the most frequent, which never forgets; distance_lfu, between
    the two: the largest count / (updates since last seen) ^ ``policy_decay``."""
    policy_decay: float = 1.0
    """distance_lfu: the exponent; 0 is lfu."""
    evict_every: int = 1
    """managed: training steps between updates of the map, in which new items get rows and old ones lose theirs. An
    update sorts all rows (on one CPU core 0.04 s with 1e5, 0.3 s with 1e6, 6 s with 1e7)."""

    def __post_init__(self) -> None:
        self._check_ids()
        _one_of("embedding.kind", self.kind, KINDS)
        _one_of("embedding.optimizer", self.optimizer, ("adamw", *TABLE_OPTIMIZERS))
        _check(self.lr is None or self.lr > 0, "embedding.lr", self.lr, "> 0 or null")
        _one_of("embedding.sharding", self.sharding, ("auto", *SHARDINGS))
        for name, sharding in self.tables.items():
            _one_of(f"embedding.tables.{name}", sharding, SHARDINGS)
        for name in ("dtype", "comm_dtype"):
            _one_of(f"embedding.{name}", getattr(self, name), ("float32", "float16", "bfloat16"))
        for name in ("hbm_gib", "ddr_gib"):
            value = getattr(self, name)
            _check(value is None or value > 0, f"embedding.{name}", value, "> 0 or null")
        if self.kind == "local":
            _check(not self.pipeline, "embedding.pipeline", True, "false with embedding.kind=local")
            for name in ("dtype", "comm_dtype"):
                _check(getattr(self, name) == "float32", f"embedding.{name}", getattr(self, name),
                       "float32 with embedding.kind=local")  # fmt: skip
        else:
            self._check_whole()
            _check(self.optimizer != "adamw", "embedding.optimizer", self.optimizer,
                   f"one of {', '.join(TABLE_OPTIMIZERS)} with embedding.kind=sharded")  # fmt: skip

    def sharding_of(self, table: str) -> str:
        """``sharding`` of the table ``item`` or of a feature; of local tables data_parallel."""
        return "data_parallel" if self.kind == "local" else self.tables.get(table, self.sharding)

    def _check_whole(self) -> None:
        """What needs rows that are spread."""
        if {self.sharding, *self.tables.values()} == {"data_parallel"}:
            _check(not self.pipeline, "embedding.pipeline", True, "false where all tables are data_parallel")
            for name in ("dtype", "comm_dtype"):
                _check(getattr(self, name) == "float32", f"embedding.{name}", getattr(self, name),
                       "float32 where all tables are data_parallel")  # fmt: skip

    def _check_ids(self) -> None:
        _one_of("embedding.ids", self.ids, IDS)
        _one_of("embedding.policy", self.policy, POLICIES)
        _check(self.policy_decay >= 0, "embedding.policy_decay", self.policy_decay, ">= 0")
        _check(self.evict_every >= 1, "embedding.evict_every", self.evict_every, ">= 1")
        if self.ids == "exact":
            _check(self.rows is None, "embedding.rows", self.rows, "null with embedding.ids=exact, a row for each item")
            return
        least = 1 if self.ids == "hash" else 2
        why = "" if self.ids == "hash" else ", as one is for the items without a row"
        _check(self.rows is not None and self.rows >= least, "embedding.rows", self.rows,
               f">= {least} with embedding.ids={self.ids}{why}")  # fmt: skip
