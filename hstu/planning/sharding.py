"""The sharding that torchrec's planner picks, without a process group, and its estimate beside our own arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from hstu.config_embedding import PLANNED, SHARDINGS
from hstu.feature_tables import has_torchrec
from hstu.planning.config import FLOAT, GIB, INT64, PlanConfig
from hstu.planning.losses import scored_rows
from hstu.planning.memory import Memory
from hstu.planning.tables import column_parts, is_replicated, lookups, num_shards, row_width, table_bytes
from hstu.planning.work import Workload
from hstu.sharded.plan import TORCHREC_NAMES, quiet

TABLE = "item_table"
TABLE_PARTS = ("table", "table optimizer", "feature tables", "their optimizer")
"""Of our memory, what the planner places."""
KERNELS = {"hbm": "fused", "uvm_caching": "fused_uvm_caching", "uvm": "fused_uvm"}
"""torchrec's names of where rows lie."""


@dataclass(frozen=True)
class Sharding:
    """What torchrec's planner says.

    Attributes:
        found: whether it found a plan.
        sharding: row_wise, column_wise, table_wise or grid; of no meaning where none was found.
        shards: how many.
        hbm_bytes: of the largest shard: rows, optimizer state, and ids and rows on their way.
        ours_bytes: the same by our arithmetic.
        note: why there is no plan, or None.
        features: sharding of each table of features.
    """

    found: bool
    sharding: str
    shards: int = 0
    hbm_bytes: float = 0.0
    ours_bytes: float = 0.0
    note: str | None = None
    features: dict[str, str] = field(default_factory=dict)


def plan_sharding(config: PlanConfig, work: Workload, memory: Memory) -> Sharding | None:
    """Asks torchrec's planner for this table on this cluster; None where there is nothing to shard or no torchrec.

    memory: by our arithmetic; what is not the table's is left out of the memory that the planner may fill.
    """
    if is_replicated(config) or not has_torchrec():
        return None
    from torchrec.distributed.planner.types import PlannerError

    from hstu.sharded.grid import GridSharder

    whole = [lookup.config for lookup in lookups(config, work) if is_replicated(lookup.config)]
    rest = memory.total - sum(part.bytes for part in memory.parts if part.name in TABLE_PARTS)
    rest += sum(sum(table_bytes(own)) for own in whole)
    tables = _asked(config, work)
    free = memory.limit - rest
    if free <= 0:
        return Sharding(False, config.embedding.sharding, note=f"nothing is left for the table: {rest / GIB:.1f} GiB "
                        "are taken by the rest")  # fmt: skip
    with quiet():
        module, planner = _planner(config, free, tables)
        try:
            planner.plan(module, [GridSharder()])
        except PlannerError:
            return Sharding(False, config.embedding.sharding, note=f"no plan in {free / GIB:.1f} GiB a GPU")
    names = {TORCHREC_NAMES.get(name, name): name for name in SHARDINGS}
    options = {option.name: option for option in planner._best_plan}  # torchrec shows it in no other way
    shardings = {name: names[option.sharding_type] for name, option in options.items()}
    hbm = ours = 0.0
    for name, option in options.items():
        fullest = max(option.shards, key=lambda shard: shard.storage.hbm)
        hbm += float(fullest.storage.hbm)
        ours += _our_bytes(tables[name][0].with_table(sharding=shardings[name]), tables[name][1], fullest.size[1])
    item = shardings.pop(TABLE)
    return Sharding(True, item, len(options[TABLE].shards), hbm, ours, features=shardings)


def _asked(config: PlanConfig, work: Workload) -> dict[str, tuple[PlanConfig, list[float]]]:
    """Of each table that is spread: the config with it as the item table, rows that a GPU asks for by feature."""
    found = {}
    for lookup in lookups(config, work):
        if lookup.of == "events":
            scored = [] if config.ranking is not None else [scored_rows(config, work)]
            found[TABLE] = lookup.config, [lookup.rows, *scored]
        elif not is_replicated(lookup.config):
            found[lookup.name] = lookup.config, [lookup.rows]
    return found


def _our_bytes(config: PlanConfig, asked: list[float], columns: int) -> float:
    """Bytes of the largest shard of the item table of ``config``: rows, state, ids and rows on their way."""
    rows, state = table_bytes(config)
    cached = {"hbm": 1.0, "uvm": 0.0}.get(config.embedding.placement, config.embedding.cache_fraction)
    moved = sum(asked) * (INT64 + FLOAT * columns)
    moved *= config.cluster.gpus * column_parts(config) / num_shards(config)  # a shard gets the ids of all GPUs
    return (rows + state) * cached + moved


def _planner(
    config: PlanConfig, free: float, tables: dict[str, tuple[PlanConfig, list[float]]]
) -> tuple[torch.nn.Module, Any]:  # fmt: skip
    """The tables on the meta device, and a planner of the cluster."""
    from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
    from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
    from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
    from torchrec.modules.embedding_modules import EmbeddingCollection
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

    types = {"float32": DataType.FP32, "float16": DataType.FP16, "bfloat16": DataType.BF16}
    cluster, sheet = config.cluster, config.cluster.sheet
    described, constraints = [], {}
    for name, (own, asked) in tables.items():
        table = own.embedding
        described.append(EmbeddingConfig(
            name=name, num_embeddings=table.rows + 1, embedding_dim=row_width(own), data_type=types[table.dtype],
            feature_names=[f"{name}_{index}" for index in range(len(asked))],
        ))  # fmt: skip
        wanted = PLANNED if table.sharding == "auto" else (table.sharding,)
        in_columns = table.sharding in ("column_wise", "grid")
        constraints[name] = ParameterConstraints(
            sharding_types=[TORCHREC_NAMES.get(name, name) for name in wanted], output_dtype=DataType.FP32,
            compute_kernels=[KERNELS[table.placement]], pooling_factors=asked,
            min_partition=row_width(own) // column_parts(own) if in_columns else None,
        )  # fmt: skip
    module = EmbeddingCollection(tables=described, device=torch.device("meta"))
    apply_optimizer_in_backward(_optimizer(config.embedding.optimizer), module.parameters(), {"lr": 0.1})
    per_ms = 1e9 / 1e3
    node = cluster.node_size
    topology = Topology(
        world_size=cluster.gpus, compute_device="cuda", local_world_size=node, hbm_cap=int(free),
        ddr_cap=int(sheet.ddr_gib * GIB / node), hbm_mem_bw=sheet.hbm_gbps * per_ms,
        intra_host_bw=sheet.nvlink_gbps * per_ms, inter_host_bw=sheet.network_gbps * per_ms,
        hbm_to_ddr_mem_bw=sheet.pcie_gbps * per_ms,
    )  # fmt: skip
    planner = EmbeddingShardingPlanner(
        topology=topology, batch_size=1, constraints=constraints, debug=False, stats=[],
        storage_reservation=FixedPercentageStorageReservation(0.0),
    )  # fmt: skip
    return module, planner


def _optimizer(name: str) -> Any:
    """The class whose state torchrec's planner knows; for row-wise Adam that of Adagrad, one moment a number."""
    from torchrec import optim

    return {
        "sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "rowwise_adagrad": optim.RowWiseAdagrad,
        "adam": torch.optim.Adam, "rowwise_adam": torch.optim.Adagrad,
    }[name]  # fmt: skip
