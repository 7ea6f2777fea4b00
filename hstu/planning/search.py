"""The smallest cluster that fits, and what would make a plan fit that does not."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from hstu.planning.config import PlanConfig
from hstu.planning.cost import Step, plan_step
from hstu.planning.memory import Memory, plan_memory
from hstu.planning.tables import is_replicated, num_shards
from hstu.planning.work import Workload

MOST_GPUS = 2**15
"""No larger cluster is looked for."""


@dataclass(frozen=True)
class Plan:
    """One config with what it comes to."""

    config: PlanConfig
    work: Workload
    memory: Memory
    step: Step

    @classmethod
    def of(cls, config: PlanConfig) -> Plan:
        work = Workload.planned(config)
        return cls(config, work, plan_memory(config, work), plan_step(config, work))


def smallest_cluster(config: PlanConfig) -> int | None:
    """Fewest GPUs (whole nodes beyond one) on which the plan fits; None: no number up to ``MOST_GPUS``.

    Shards shrink as GPUs are added, while the queries of all GPUs, which every GPU gets, grow: memory falls to a
    minimum and rises again. So the range in which it falls is found by doubling, then bisected.
    """
    work, node = Workload.planned(config), config.cluster.sheet.gpus_per_node

    def memory(gpus: int) -> Memory:
        return plan_memory(config.with_gpus(gpus), work)

    for gpus in range(1, node):
        if memory(gpus).fits:
            return gpus
    count = 1  # nodes
    while not memory(count * node).fits:
        larger = memory(2 * count * node)
        rising = larger.total >= memory(count * node).total
        if rising or 2 * count * node > MOST_GPUS:
            return _between(config, work, max(1, count // 2), 2 * count)
        count *= 2
    low, high = count // 2, count  # low does not fit, high does
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if memory(middle * node).fits else (middle, high)
    return high * node


def _between(config: PlanConfig, work: Workload, low: int, high: int) -> int | None:
    """Around the minimum of the memory: the first of these numbers of nodes that fits."""
    node = config.cluster.sheet.gpus_per_node
    step = max(1, (high - low) // 64)
    for count in range(low, high + 1, step):
        if count * node <= MOST_GPUS and plan_memory(config.with_gpus(count * node), work).fits:
            return count * node
    return None


@dataclass(frozen=True)
class Mend:
    """A change that would help."""

    option: str
    """As on the command line."""
    plan: Plan

    @property
    def fits(self) -> bool:
        return self.plan.memory.fits


def mends(config: PlanConfig) -> list[Mend]:
    """Single changes that need less memory, those that fit first, then the least memory."""
    table, now = config.embedding, Plan.of(config)
    changes: list[tuple[str, PlanConfig]] = []
    gpus = smallest_cluster(config)
    if gpus is not None and gpus != config.cluster.gpus:
        changes.append((f"cluster.gpus={gpus}", config.with_gpus(gpus)))
    if is_replicated(config):
        options = {"kind": "sharded", "optimizer": "rowwise_adagrad"}
        if table.sharding == "data_parallel":
            options["sharding"] = "row_wise"
        changes.append((_options(options), config.with_table(**options)))
    else:
        for option, value in (("dtype", "float16"), ("optimizer", "rowwise_adagrad"), ("sharding", "row_wise"),
                              ("sharding", "column_wise"), ("placement", "uvm_caching"),
                              ("placement", "uvm")):  # fmt: skip
            cannot = value == "column_wise" and num_shards(config.with_table(sharding=value)) == 1
            if getattr(table, option) != value and not cannot:
                changes.append((_options({option: value}), config.with_table(**{option: value})))
        if table.dtype == "float32" and table.optimizer != "rowwise_adagrad":
            options = {"dtype": "float16", "optimizer": "rowwise_adagrad"}
            changes.append((_options(options), config.with_table(**options)))
    half = config.batch.tokens_per_gpu // 2
    if half >= config.form.tokens_of(config.mean_len + config.form.targets):
        batch = dataclasses.replace(config.batch, tokens_per_gpu=half)
        changes.append((f"batch.tokens_per_gpu={half}", dataclasses.replace(config, batch=batch)))
    if config.ranking is None and config.loss.name in ("sampled_softmax", "full_softmax"):
        loss = dataclasses.replace(config.loss, name="shared_bank", num_negatives=4096)
        changes.append(("loss=shared_bank", dataclasses.replace(config, loss=loss)))
    found = [Mend(option, Plan.of(changed)) for option, changed in changes]
    helping = [m for m in found if m.fits or m.plan.memory.total < 0.99 * now.memory.total]
    return sorted(helping, key=lambda m: (not m.fits, m.plan.step.seconds if m.fits else m.plan.memory.total))


def _options(values: dict[str, str]) -> str:
    return " ".join(f"embedding.{name}={value}" for name, value in values.items())
