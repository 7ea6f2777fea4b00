"""``hstu-bench``: times an op, writes a record, prints a table, plots.

    hstu-bench op=attention sizes=quick device=cuda dtype=bf16 pass=both
    hstu-bench op=all sizes=full
    hstu-bench op=attention 'sizes={B:8,H:4,A:64,S:500,rab:true}' record=false
    hstu-bench compare A B [threshold=0.05]      what got faster and slower; exit status 1 when something got slower
    hstu-bench aot [op=attention]                registers, spills, shared memory per kernel and architecture

A or B is a record's file or name. Options: conf/commands/bench.yaml; how to read the output: docs/benchmarks.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.config import DTYPES, BenchConfig, from_options
from benchmarks.measure import Ceilings, measure_ceilings
from benchmarks.ops import module
from benchmarks.run import Row, measure_op
from benchmarks.tables import rows_table
from hstu import report
from hstu.cli import command, run_hydra
from hstu.errors import UserError
from kernels._backend import choose, get_backend, set_backend
from kernels._launch import set_autotune


def prepare_torch(config: BenchConfig) -> None:
    """Threads, backend, tuning; no TF32."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    set_backend(config.backend)
    set_autotune(config.autotune)


def make_record(op: str, config: BenchConfig, ceilings: Ceilings, rows: Sequence[Row]) -> report.Record:
    """The record of one op's rows."""
    device = config.torch_device()
    metrics = report.aggregate([{"copy_gb_s": ceilings.copy_gb_s, "product_tflop_s": ceilings.product_tflop_s}])
    values = report.without_paths({**vars(config), "op": op, "device": device.type})
    values["backend"] = backend_of(op, config)
    if device.type == "cpu":
        values["load_average"] = [round(load, 2) for load in os.getloadavg()]
    return report.Record(
        name=config.name or f"bench-{op.replace('_', '-')}-{device.type}-{config.dtype}",
        kind="scoring" if op == "scoring" else "kernel",
        dataset="random", protocol=None, split_hash=None, model=op, seeds=[config.seed], metrics=metrics,
        timing={"rows": list(rows)}, config=values,
    )  # fmt: skip


def backend_of(op: str, config: BenchConfig) -> str:
    """triton or torch: what ran."""
    name = "attention" if op in ("layer", "scoring") else op
    return choose(name, config.torch_device(), DTYPES[config.dtype]).backend


def run(config: BenchConfig) -> list[report.Record]:
    """Measures what the config asks for; prints, writes, plots."""
    device = config.torch_device()
    if config.name is not None and len(config.ops()) > 1:
        raise UserError(f"name={config.name} with several ops: a record holds one op; leave name out")
    before = get_backend()
    records = []
    try:
        prepare_torch(config)
        ceilings = measure_ceilings(device, DTYPES[config.dtype], config.sizes == "toy", config.cpu_time)
        print(
            f"measured ceilings on {device.type}: copy {ceilings.copy_gb_s:,.0f} GB/s (read plus write), "
            f"product {ceilings.product_tflop_s:,.3g} TFLOP/s ({ceilings.dtype})"
        )
        for op in config.ops():
            if not _has_module(op):
                if len(config.ops()) == 1:
                    raise UserError(f"op={op}: there is no benchmarks/ops/{op}.py")
                print(f"{op}: no benchmarks/ops/{op}.py, left out", file=sys.stderr)
                continue
            rows = measure_op(op, config, ceilings, show=lambda line: print(line, file=sys.stderr))
            if not rows:
                raise UserError(f"points={config.points}: no point of {op} in sizes={config.sizes} fits")
            records.append(make_record(op, config, ceilings, rows))
            _present(records[-1], config)
    finally:
        set_backend(before)
        set_autotune(False)
    return records


def _has_module(op: str) -> bool:
    try:
        module(op)
    except ModuleNotFoundError as error:
        if error.name != f"benchmarks.ops.{op}":
            raise
        return False
    return True


def _present(record: report.Record, config: BenchConfig) -> None:
    print(f"\n{record.model} on {record.machine['gpu'] or record.machine['cpu']}, {config.dtype}, "
          f"backend {record.config['backend']}\n\n{rows_table(record.timing['rows'])}\n")  # fmt: skip
    if not config.record:
        return
    path = report.write_record(record, Path(config.out))
    print(f"written to {path}")
    if config.plots:
        from benchmarks.plots import plot_record

        for plot in plot_record(record, path.parent, path.stem):
            print(f"plotted to {plot}")


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``hstu-bench``."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["compare"]:
        from benchmarks import compare

        return compare.main(words[1:])
    if words[:1] == ["aot"]:
        from benchmarks import aot

        return aot.main(words[1:])
    from omegaconf import OmegaConf

    if words[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0

    def task(cfg: Any) -> None:
        run(from_options(BenchConfig, cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))))

    run_hydra(task, "bench", "commands")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
