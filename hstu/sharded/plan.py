"""Where the rows of sharded tables lie: torchrec's planner under the config's constraints, and a refusal that counts.

Legend: R ranks, V rows of a table, D width.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hstu.config import OptimConfig
from hstu.config_embedding import PLANNED, EmbeddingConfig
from hstu.distributed import World
from hstu.errors import UserError
from hstu.feature_tables import table_name
from hstu.host_memory import host_bytes
from hstu.sharded.width import UNIT, is_padded, stored_width
from hstu.table_optim import Rule

GIB = 2**30
RESERVED = 0.15
"""Share of a rank's memory that the planner leaves to the dense part, activations and buffers."""
EMB_OPTIMIZERS = {
    "sgd": "EXACT_SGD", "adagrad": "EXACT_ADAGRAD", "rowwise_adagrad": "EXACT_ROWWISE_ADAGRAD", "adam": "ADAM",
    "rowwise_adam": "PARTIAL_ROWWISE_ADAM",
}  # fmt: skip
"""Names of the optimizers in fbgemm."""
ROWWISE = ("rowwise_adagrad", "rowwise_adam")
FUSED_ON_CPU = ("sgd", "adagrad", "rowwise_adagrad")
"""Those with a fused kernel on the CPU; the others run in torch there, see ``hstu/sharded/kernel.py``."""
TORCHREC_NAMES = {"grid": "grid_shard"}
"""Of shardings that torchrec calls otherwise than the config."""


@dataclass(frozen=True)
class TableShape:
    """A table to be sharded.

    name: as in ``embedding.tables``. lookups: rows that a rank asks for in a step, of each of the table's features.
    averaged: whether it has an average.
    """

    name: str
    num_rows: int
    dim: int
    lookups: tuple[float, ...]
    averaged: bool = False

    @property
    def average_bytes(self) -> int:
        """Of the average, float32."""
        return 4 * self.num_rows * self.dim if self.averaged else 0

    def bytes(self, config: EmbeddingConfig) -> int:
        """With the optimizer's state and the average."""
        return table_bytes(config, self.num_rows, self.dim) + self.average_bytes

    def describe(self, config: EmbeddingConfig) -> str:
        """Name, shape and size with the optimizer's state and the average."""
        stored = f" (stored as {stored_width(self.dim)})" if is_padded(self.dim) else ""
        return f"{self.name} {self.num_rows:,} x {self.dim}{stored} {_gib(self.bytes(config))}"


@contextmanager
def quiet() -> Iterator[None]:
    """torchrec's advice to its own authors, about each table and plan, stays out of the run's output.

    For the set-up only: warnings are switched off in all threads, and switched on again whatever these have set since.
    """
    loggers = [logging.getLogger(name) for name in ("torchrec", "root", "torch.fx._symbolic_trace")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def state_bytes(optimizer: str, num_rows: int, dim: int) -> int:
    """Bytes of an optimizer's state of a whole table; float32."""
    per_row = {"sgd": 0, "adagrad": dim, "rowwise_adagrad": 1, "adam": 2 * dim, "rowwise_adam": dim + 1}
    return 4 * num_rows * per_row[optimizer]


def table_bytes(config: EmbeddingConfig, num_rows: int, dim: int) -> int:
    """Bytes of a whole table, as wide as it is stored, with its optimizer's state."""
    width = stored_width(dim)
    return num_rows * width * getattr(torch, config.dtype).itemsize + state_bytes(config.optimizer, num_rows, width)


def local_size(world: World) -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world.size))


def capacity(config: EmbeddingConfig, world: World) -> int:
    """Bytes of a rank's memory in which its shards lie; on GPUs every rank calls it.

    On GPUs what is free on the rank that has the least: contexts of libraries, columns of events and other programs
    have taken their part. On the CPU the rank's share of the machine's.
    """
    if world.device.type == "cuda":
        if config.hbm_gib is not None:
            return int(config.hbm_gib * GIB)
        return min(world.gather_objects(_free_bytes(world.device)))
    return int(config.ddr_gib * GIB) if config.ddr_gib is not None else host_bytes() // local_size(world)


def _free_bytes(device: torch.device) -> int:
    """Free on the GPU, with what torch keeps of it for tensors to come."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def _describe_room(config: EmbeddingConfig, world: World, size: int) -> str:
    """``size`` as from :func:`capacity`, for messages."""
    is_free = world.device.type == "cuda" and config.hbm_gib is None
    return _gib(size) + (" (free on the GPU of the rank that has the least)" if is_free else "")


def check_device(config: EmbeddingConfig, device: torch.device) -> None:
    """Raises UserError for a dtype that the device does not have."""
    for name in ("dtype", "comm_dtype"):
        if getattr(config, name) == "bfloat16" and device.type != "cuda":
            raise UserError(f"embedding.{name}=bfloat16: expected a CUDA device; take float16 or float32 on the CPU")


def check_memory(config: EmbeddingConfig, world: World, tables: list[TableShape]) -> None:
    """Raises UserError where no plan can fit. Nothing is allocated yet."""
    whole = capacity(config, world)
    room, total = int(whole * (1 - RESERVED)), 0
    for table in tables:
        size = table.bytes(config)
        total += size
        if config.sharding_of(table.name) == "table_wise" and size > room:
            raise UserError(
                f"embedding: table {table.describe(config)} with its optimizer's state, and table_wise puts it on one "
                f"rank, which has {_gib(room)} for tables: take row_wise, or auto"
            )
    if total > room * world.size:
        ranks = "1 rank" if world.size == 1 else f"{world.size} ranks"
        narrower = [] if config.dtype != "float32" else ["embedding.dtype=float16"]
        plainer = [] if config.optimizer in ("sgd", "rowwise_adagrad") else ["embedding.optimizer=rowwise_adagrad"]
        averages = " and averages" if any(table.averaged for table in tables) else ""
        raise UserError(
            f"embedding: the tables need {_gib(total)} ({', '.join(t.describe(config) for t in tables)}; "
            f"{config.dtype}, {config.optimizer}'s state{averages} included), and {ranks} of "
            f"{_describe_room(config, world, whole)} have {_gib(room * world.size)} for tables ({RESERVED:.0%} is kept "
            f"for the rest): take {', '.join([f'at least {-(-total // room)} ranks', *narrower, *plainer])} or a "
            "smaller model.dim"
        )


def _gib(size: int) -> str:
    return f"{size / GIB:,.3g} GiB"


def allowed_shardings(config: EmbeddingConfig, table: TableShape, num_ranks: int, node_size: int = 1) -> list[str]:
    """What the planner may choose from for a table. node_size: ranks of a node.

    fbgemm cannot have a shard without rows: a table whose last row-wise block would be empty is not cut by rows.
    """
    wanted = config.sharding_of(table.name)
    allowed = list(PLANNED) if wanted == "auto" else [wanted]
    if wanted == "auto" and is_padded(table.dim) and config.optimizer in ROWWISE:
        allowed.remove("column_wise")  # one number a row wants one stretch of the gradients
    for sharding, parts in (("row_wise", num_ranks), ("grid", node_size)):
        if -(-table.num_rows // parts) * (parts - 1) >= table.num_rows and parts > 1:
            allowed = [name for name in allowed if name != sharding]
    return allowed or ["table_wise"]


def is_deferred(optim: OptimConfig) -> bool:
    """Whether rows wait for the gradients of all parameters, or of several batches: they then move in torch."""
    return optim.clip_norm is not None or optim.accumulate_steps > 1


def moved_by_fbgemm(config: EmbeddingConfig, device: torch.device, dim: int) -> bool:
    """Whether fbgemm's kernels can move the rows of tables of width ``dim``, else ``hstu/sharded/kernel.py``.

    It has none for rows of bfloat16. Padded rows of row-wise Adam are not fbgemm's, see ``hstu/sharded/width.py``, nor
    those of row-wise Adagrad where they are cut into parts, of which only the last is padded.
    """
    if config.dtype == "bfloat16":
        return False
    in_parts = not {"column_wise", "grid"}.isdisjoint({config.sharding, *config.tables.values()})
    if is_padded(dim) and (config.optimizer == "rowwise_adam" or (config.optimizer in ROWWISE and in_parts)):
        return False
    return device.type == "cuda" or config.optimizer in FUSED_ON_CPU


def moves_in_torch(config: EmbeddingConfig, optim: OptimConfig, device: torch.device, dim: int) -> bool:
    """Whether rows of tables of width ``dim`` move in torch, at the end of a step."""
    return is_deferred(optim) or not moved_by_fbgemm(config, device, dim)


def fused_params(config: EmbeddingConfig, by_fbgemm: bool, lr: float, rule: Rule) -> dict[str, Any]:
    """What fbgemm's kernel is told about the optimizer, which has no state where rows move in torch."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType

    name = EMB_OPTIMIZERS[config.optimizer] if by_fbgemm else "EXACT_SGD"
    params: dict[str, Any] = {
        "optimizer": getattr(EmbOptimType, name), "learning_rate": lr, "eps": rule.eps, "output_dtype": SparseType.FP32,
    }  # fmt: skip
    if config.dtype == "bfloat16":  # fbgemm wants to know the dtype of a cache, be there none, and knows no bfloat16
        params["cache_precision"] = SparseType.FP32
    if config.optimizer in ("adam", "rowwise_adam"):
        params |= {"beta1": rule.betas[0], "beta2": rule.betas[1], "weight_decay": rule.weight_decay}
    return params


def make_sharder(config: EmbeddingConfig, device: torch.device, params: dict[str, Any]) -> Any:
    """torchrec's sharder of EmbeddingCollections, which knows grids too, with the codecs of quantised communication."""
    from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry

    from hstu.sharded.grid import GridSharder

    kind = CommType[{"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}[config.comm_dtype]]
    wanted = QCommsConfig(forward_precision=kind, backward_precision=kind)
    registry = get_qcomm_codecs_registry(wanted, device=device)
    return GridSharder(fused_params=params, qcomm_codecs_registry=registry)


def make_plan(
    model: nn.Module, config: EmbeddingConfig, world: World, sharder: Any, tables: list[TableShape]
) -> Any:  # fmt: skip
    """torchrec's plan for the collections of ``model``, the same on every rank: made on the first.

    Raises UserError, on every rank, where the planner finds none.
    """
    from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
    from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
    from torchrec.distributed.planner.types import PlannerError

    check_device(config, world.device)
    check_memory(config, world, tables)
    constraints, node_size = {}, local_size(world)
    if any(config.sharding_of(table.name) == "grid" for table in tables):
        _check_nodes(world)
    for table in tables:
        wanted = config.sharding_of(table.name)
        allowed = allowed_shardings(config, table, world.size, node_size)
        constraints[table_name(table.name)] = ParameterConstraints(
            sharding_types=[TORCHREC_NAMES.get(name, name) for name in allowed],
            compute_kernels=["fused"],
            min_partition=least_columns(wanted, table.dim, world.size, node_size),
            pooling_factors=list(table.lookups),
        )
    on_gpu, room = world.device.type == "cuda", capacity(config, world)
    averages = sum(table.average_bytes for table in tables) // world.size  # which the planner does not know
    topology = Topology(
        world_size=world.size, local_world_size=node_size, compute_device=world.device.type,
        hbm_cap=room - averages if on_gpu else 0,
        ddr_cap=host_bytes() // node_size if on_gpu else room - averages,
    )  # fmt: skip
    planner = EmbeddingShardingPlanner(
        topology=topology, batch_size=1, constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(RESERVED),
    )  # fmt: skip

    def plan_alone() -> Any:
        try:
            return planner.plan(model, [sharder])
        except (PlannerError, RuntimeError) as error:  # no collective is inside: lost contact is never taken for it
            sizes = ", ".join(table.describe(config) for table in tables)
            line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(
                f"embedding: torchrec's planner finds no place for {sizes} on {world.size} ranks of "
                f"{_describe_room(config, world, room)}: {line}; "
                "take more ranks, a narrower embedding.dtype, or embedding.sharding=auto"
            ) from None

    return world.on_first(plan_alone)


def _check_nodes(world: World) -> None:
    """Raises UserError, on every rank, where nodes have different numbers of ranks."""
    sizes = world.gather_objects(local_size(world))
    if len(set(sizes)) > 1 or world.size % sizes[0]:
        raise UserError(
            f"embedding: grid on {world.size} ranks with LOCAL_WORLD_SIZE={', '.join(map(str, sorted(set(sizes))))}: "
            "expected as many ranks on each node; take row_wise"
        )


def least_columns(sharding: str, dim: int, num_ranks: int, node_size: int) -> int | None:
    """Width of a shard where a table is cut by columns: over the ranks, or in a grid over the nodes; else None.

    node_size: ranks of a node.

    Raises UserError where the width cannot be cut.
    """
    pieces = {"column_wise": num_ranks, "grid": num_ranks // node_size}
    if sharding not in pieces:
        return None
    num_parts = pieces[sharding]
    part = column_part(dim, num_parts)
    if num_parts > 1 and part == stored_width(dim):
        raise UserError(
            f"embedding: {sharding} cuts rows into parts of one width, a multiple of {UNIT}; rows of {part} "
            f"(model.dim={dim}) have none for {num_parts}: take row_wise, or model.dim={stored_width(dim + UNIT)}"
        )
    return part


def column_part(dim: int, size: int) -> int:
    """Least width of a column shard: that of as many shards as ranks, or of fewer where the width is not cut so.

    Shards are of one width, a multiple of 4; of a width such as 52 = 4 x 13 there is one alone.
    """
    width = stored_width(dim)
    parts = next(parts for parts in range(size, 0, -1) if width % (parts * UNIT) == 0)
    return width // parts
