"""``hstu-plan``: memory, communication, time and the smallest cluster of a training that cannot be run here.

    hstu-plan embedding.rows=1e9 embedding.dim=256 embedding.dtype=float16 cluster.gpus=64
    hstu-plan model=sasrec model.num_blocks=4 cluster.gpu=a100 cluster.gpus=16 loss=shared_bank
    hstu-plan ranking=kuairand embedding.rows=1e8 'features={author_id: 1e7}' cluster.gpus=16
    hstu-plan ... out=plan.json          also as JSON

What is in the numbers and how far they can be trusted: docs/plan.md. Options: conf/commands/plan.yaml. Exit status 1
where the plan does not fit.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hstu.cli import command, run_hydra
from hstu.errors import UserError
from hstu.feature_tables import has_torchrec
from hstu.planning.config import GIB, PlanConfig, from_options
from hstu.planning.cost import Transfer, loss_transfers, row_transfers
from hstu.planning.memory import check_model, plan_memory
from hstu.planning.screen import show
from hstu.planning.search import Plan, mends, smallest_cluster
from hstu.planning.sharding import Sharding, plan_sharding
from hstu.planning.tables import is_replicated
from hstu.planning.work import Workload
from hstu.sharded.plan import least_columns

NOT_VALIDATED = (
    "Times are not validated on a GPU for our kernels; what others timed on H100 comes out at 0.5 to 1.5 times the "
    "measured, for the same work (docs/plan.md). Memory is checked on the CPU to 10 %; what a GPU's allocator adds is "
    "in the reserve."
)


def resolve_sharding(config: PlanConfig) -> tuple[PlanConfig, Sharding | None]:
    """The config with the sharding that is planned, and what torchrec's planner says of it."""
    ours = config.with_table(sharding="row_wise") if config.embedding.sharding == "auto" else config
    work = Workload.planned(ours)
    found = plan_sharding(config, work, plan_memory(ours, work))
    if found is not None and found.found and config.embedding.sharding == "auto":
        ours = config.with_shardings(found.sharding, found.features)
    return ours, found


def as_json(plan: Plan, sharding: Sharding | None, smallest: int | None) -> dict[str, Any]:
    """Everything on the screen, as plain values; bytes and seconds."""
    step, memory = plan.step, plan.memory
    both = both_ways(plan)
    return {
        "config": dataclasses.asdict(plan.config),
        "workload": dataclasses.asdict(plan.work),
        "fits": memory.fits,
        "memory": {
            "parts_bytes": {part.name: part.bytes for part in memory.parts},
            "total_bytes": memory.total, "limit_bytes": memory.limit,
            "host_bytes": memory.host, "host_limit_bytes": memory.host_limit,
        },
        "communication": [dataclasses.asdict(t) for t in step.transfers],
        "compute": [dataclasses.asdict(p) for p in step.parts],
        "step_seconds": step.seconds,
        "tokens_per_s": step.tokens_per_s,
        "seconds_by_resource": step.by_resource(),
        "limited_by": step.limited_by if memory.fits else "memory",
        "loss_communication_s": None if both is None else {"queries": total_s(both[0]), "rows": total_s(both[1])},
        "smallest_cluster": smallest,
        "features": [dataclasses.asdict(table) for table in plan.config.all_features.tables],
        "torchrec": None if sharding is None else dataclasses.asdict(sharding),
        "validated_on_gpu": False,
    }  # fmt: skip


def both_ways(plan: Plan) -> tuple[list[Transfer], list[Transfer]] | None:
    """What the loss sends when queries travel (as built), and when rows would; None where nothing is sent."""
    if plan.config.cluster.gpus == 1 or is_replicated(plan.config) or plan.config.ranking is not None:
        return None
    return loss_transfers(plan.config, plan.work), row_transfers(plan.config, plan.work)


def total_s(transfers: Sequence[Transfer]) -> float:
    return sum(t.seconds for t in transfers)


def refusal(plan: Plan) -> str:
    """One line: what is missing."""
    memory, cluster = plan.memory, plan.config.cluster
    if memory.total > memory.limit:
        need, room = memory.total / GIB, memory.limit / GIB
        return (
            f"does not fit: {need:,.1f} GiB on each of {cluster.gpus} GPUs, {room:,.1f} GiB can be used of "
            f"{cluster.sheet.hbm_gib:g} (cluster.reserve={cluster.reserve:g})"
        )
    need, room = memory.host / GIB, memory.host_limit / GIB
    return f"does not fit: {need:,.0f} GiB of host memory on each node, {room:,.0f} GiB are there (cluster.ddr_gib)"


def run(config: PlanConfig) -> int:
    """Plans, prints, writes; 0 where it fits.

    Raises UserError where training would refuse: a similarity with another loss or table, columns that cannot be cut.
    """
    check_model(config)
    if not is_replicated(config):
        least_columns(config.embedding.sharding, config.model.dim, config.cluster.gpus, config.cluster.node_size)
    config, sharding = resolve_sharding(config)
    plan = Plan.of(config)
    smallest = smallest_cluster(config)
    helping = [] if plan.memory.fits else mends(config)
    show(plan, sharding, has_torchrec(), smallest, both_ways(plan), helping, NOT_VALIDATED)
    if config.out is not None:
        write_json(Path(config.out), as_json(plan, sharding, smallest))
    if plan.memory.fits:
        return 0
    print(f"error: {refusal(plan)}", file=sys.stderr)
    return 1


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Raises UserError where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"out={path}: cannot be written ({error.strerror}); choose another place") from None
    print(f"written to {path}")


@command
def main() -> int:
    """Entry point of ``hstu-plan``."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    status = [0]

    def task(cfg: Any) -> None:
        given = tuple(HydraConfig.get().overrides.task)
        status[0] = run(from_options(cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True)), given))

    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
        print(options_text())
        return 0
    run_hydra(task, "commands/plan")
    return status[0]


def options_text() -> str:
    """The YAML file of the options, from the first of them on."""
    from hstu.cli import conf_dir

    text = (conf_dir() / "commands" / "plan.yaml").read_text(encoding="utf-8")
    return text[text.index("embedding:") :]


if __name__ == "__main__":
    raise SystemExit(main())
