"""How the tables of ids lie on the GPUs: shards and the optimizer's state.

Legend: N GPUs, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hstu.planning.config import DTYPE_BYTES, FLOAT, PlanConfig
from hstu.planning.work import Workload
from hstu.sharded.plan import column_part, state_bytes
from hstu.sharded.width import stored_width


@dataclass(frozen=True)
class Lookup:
    """One table and what a GPU asks of it in a step.

    Attributes:
        name: ``events`` for the item table, else that of the feature.
        of: what is looked up in one exchange with others: events, item (features) or user.
        config: with this table in place of the item table.
        rows: looked up, repeats included.
    """

    name: str
    of: str
    config: PlanConfig
    rows: float


def values_of(config: PlanConfig, work: Workload) -> dict[str, float]:
    """Codes that a GPU looks up in a step, by feature."""
    rows = {"item": work.events, "user": work.users}
    return {table.name: rows[table.of] * table.values for table in config.all_features.tables}


def lookups(config: PlanConfig, work: Workload) -> list[Lookup]:
    """The item table, then those of features."""
    values = values_of(config, work)
    tables = config.all_features.tables
    features = [Lookup(table.name, table.of, config.of_feature(table), values[table.name]) for table in tables]
    return [Lookup("events", "events", config, work.events), *features]


def busiest(tables: Sequence[tuple[PlanConfig, float]]) -> float:
    """Of the GPU that has most to do with the tables, from each table's load on the GPUs that have a shard of it.

    A table that lies on few GPUs is put where the others of that kind are not, as torchrec's planner does.
    """
    everywhere = few = most = 0.0
    for config, load in tables:
        shards, gpus = num_shards(config), config.cluster.gpus
        if is_replicated(config) or shards >= gpus:
            everywhere += load
        else:
            few, most = few + load * shards / gpus, max(most, load)
    return everywhere + max(few, most)


def whole_gradients(config: PlanConfig, work: Workload) -> float:
    """Bytes of the gradients of tables that are whole on every GPU."""
    whole = [lookup.config for lookup in lookups(config, work) if is_replicated(lookup.config)]
    return float(sum((own.embedding.rows + 1) * own.model.dim * FLOAT for own in whole))


def is_replicated(config: PlanConfig) -> bool:
    """Whether every GPU has the whole table, with a gradient as large."""
    return config.embedding.kind == "local" or config.embedding.sharding == "data_parallel"


def row_width(config: PlanConfig) -> int:
    """Columns that a row is stored with, and sent."""
    return config.model.dim if is_replicated(config) else stored_width(config.model.dim)


def num_shards(config: PlanConfig) -> int:
    """GPUs over which the table lies."""
    sharding, gpus = config.embedding.sharding, config.cluster.gpus
    if is_replicated(config) or sharding == "table_wise":
        return 1
    parts = column_parts(config)
    return {"column_wise": parts, "grid": parts * config.cluster.node_size}.get(sharding, gpus)


def column_parts(config: PlanConfig) -> int:
    """Parts that a row is cut into, for the GPUs or, of a grid, for the nodes; 1 where it is not."""
    gpus = config.cluster.gpus
    pieces = {"column_wise": gpus, "grid": gpus // config.cluster.node_size}.get(config.embedding.sharding, 1)
    return row_width(config) // column_part(config.model.dim, pieces) if pieces > 1 else 1


def shard_shape(config: PlanConfig) -> tuple[int, int]:
    """Rows and columns of the largest shard; the padding row counts."""
    parts = column_parts(config)
    return math.ceil((config.embedding.rows + 1) * parts / num_shards(config)), row_width(config) // parts


def table_bytes(config: PlanConfig) -> tuple[float, float]:
    """Rows of the largest shard, and their optimizer's state."""
    rows, columns = shard_shape(config)
    size = float(rows) * columns * DTYPE_BYTES[config.embedding.dtype]
    return size, float(optimizer_bytes(config.embedding.optimizer, rows, columns))


def optimizer_bytes(optimizer: str, rows: int, columns: int) -> int:
    """Of the state of so many rows; float32 for narrow rows too. adamw keeps what adam does."""
    return state_bytes("adam" if optimizer == "adamw" else optimizer, rows, columns)
