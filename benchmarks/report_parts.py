"""The parts of the GPU report: each measures one thing, writes its records, and says what became of it.

A part is a function of the :class:`Context`; it returns an :class:`Outcome`. An exception is a failed part.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import correctness, measure
from benchmarks.bench import make_record, prepare_torch
from benchmarks.config import DTYPES, BenchConfig, GpuReportConfig
from benchmarks.ops import BENCHES, module
from benchmarks.plots import plot_record
from benchmarks.run import OUT_OF_TIME, Row, measure_op
from hstu import report
from hstu.errors import UserError
from kernels._backend import OPS

DONE, PARTIAL, FAILED, SKIPPED = "done", "partial", "failed", "skipped"
"""partial: out of time, the next call goes on; skipped: not possible here, with the reason."""
TEST_FOLDERS = ("tests/kernels", "tests/model", "tests/benchmarks")
"""Where the tests marked gpu are."""
MAX_TEST_PROCESSES = 8
STOP_S = 30.0
"""A process told to stop has this long before it is killed."""
TOY_TIME_MS = 1.0


@dataclass
class Outcome:
    """What became of a part."""

    status: str
    text: str = ""
    """One line for the table."""
    records: list[str] = field(default_factory=list)
    """Names of the files written, records and plots."""
    data: dict[str, Any] = field(default_factory=dict)
    """What a rerun needs to go on."""


@dataclass(frozen=True)
class Context:
    """What every part gets."""

    config: GpuReportConfig
    deadline: float
    """time.monotonic() by which the part should be over."""
    previous: dict[str, Any]
    """``data`` of this part's last, unfinished run; empty otherwise."""

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def device(self) -> torch.device:
        return torch.device(self.config.device)

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Those the kernels take; two at toy size."""
        return [torch.float32, torch.bfloat16] if self.config.toy else list(DTYPES.values())

    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def name(self, text: str) -> str:
        """A record's name; a toy report's says so."""
        return f"{'toy' if self.config.toy else 'gpu'}-{text}"

    def write(self, record: report.Record) -> str:
        """Writes the record and returns its file name. Of one name there is one: of an earlier day is deleted."""
        for old in self.out.glob(f"????-??-??-{record.name}.json"):
            old.unlink()
        return report.write_record(record, self.out).name

    def record(self, name: str, model: str, rows: list[dict[str, Any]], metrics: dict[str, float]) -> report.Record:
        """A kernel record of rows that hstu-bench does not make."""
        return report.Record(
            name=self.name(name), kind="kernel", dataset="random", protocol=None, split_hash=None, model=model,
            seeds=[0], metrics=report.aggregate([metrics]) if metrics else {}, timing={"rows": rows},
            config={"device": self.config.device, "toy": self.config.toy},
        )  # fmt: skip


# Device


def device_part(context: Context) -> Outcome:
    """What the machine is, and its ceilings in every dtype."""
    rows: list[dict[str, Any]] = []
    metrics: dict[str, float] = {}
    for name, dtype in DTYPES.items():
        if dtype not in context.dtypes:
            continue
        ceilings = measure.measure_ceilings(context.device, dtype, context.config.toy)
        rows.append({"dtype": name, "product_tflop_s": ceilings.product_tflop_s, "copy_gb_s": ceilings.copy_gb_s})
        metrics[f"product_tflop_s {name}"] = ceilings.product_tflop_s
    metrics["copy_gb_s"] = max(row["copy_gb_s"] for row in rows)
    record = context.record("device", "device", rows, metrics)
    record.config |= {"facts": device_facts(context.device)}
    products = ", ".join(f"{row['dtype']} {row['product_tflop_s']:.3g}" for row in rows)
    text = f"copy {metrics['copy_gb_s']:,.0f} GB/s, product {products} TFLOP/s"
    return Outcome(DONE, text, [context.write(record)])


def device_facts(device: torch.device) -> dict[str, Any]:
    """Properties of the GPU; threads of the CPU."""
    if device.type != "cuda":
        return {"threads": torch.get_num_threads()}
    p = torch.cuda.get_device_properties(device)
    facts = {
        "name": p.name, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
        "memory_gib": round(p.total_memory / 2**30, 1), "l2_mib": p.L2_cache_size / 2**20, "cuda": torch.version.cuda,
    }  # fmt: skip
    command = ["nvidia-smi", "--query-gpu=clocks.max.sm,clocks.max.mem,power.limit", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        facts["clocks and power limit"] = done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return facts


# Correctness


def correctness_part(context: Context) -> Outcome:
    """Every op against its float64 specification on fresh random inputs."""
    seed = int.from_bytes(os.urandom(4), "little")
    torch.backends.cuda.matmul.allow_tf32 = False
    checks: list[correctness.Check] = []
    for op in OPS:
        checks += correctness.check_op(op, context.device, context.dtypes, seed, real=not context.config.toy)
    failed = [c for c in checks if c.error is not None]
    record = context.record("correctness", "all ops", [asdict(c) for c in checks], {"failed": float(len(failed))})
    record.seeds = [seed]
    text = f"{len(checks) - len(failed)} of {len(checks)} comparisons with float64 hold"
    if failed:
        text += "; " + "; ".join(f"{c.op} {c.case} {c.dtype}: {c.error}" for c in failed[:5])
    return Outcome(FAILED if failed else DONE, text, [context.write(record)])


def tests_part(context: Context) -> Outcome:
    """The tests marked gpu."""
    if importlib.util.find_spec("pytest") is None:
        return Outcome(SKIPPED, "pytest is not installed")
    results = context.out / "parts" / "tests.xml"
    results.unlink(missing_ok=True)
    folders = [str(report.ROOT / folder) for folder in TEST_FOLDERS]
    if context.config.toy:
        folders = [str(report.ROOT / "tests" / "kernels" / "test_sampled_softmax.py")]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={results}"]
    command += ["-o", "addopts="]  # the project's own options want plugins that need not be here
    if importlib.util.find_spec("xdist") is not None and not context.config.toy:
        command += ["-n", str(min(MAX_TEST_PROCESSES, os.cpu_count() or 1))]
    done = run_process([*command, *folders], context.left_s(), cwd=report.ROOT)
    if done is None:
        return Outcome(PARTIAL, OUT_OF_TIME)
    if not results.exists():
        raise RuntimeError(_ended("pytest", done))
    counts, failed = junit_counts(results)
    text = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    record = context.record("tests", "tests", [counts], {})
    bad = bool(failed) or done.returncode not in (0, 5)  # 5: no test was selected
    return Outcome(FAILED if bad else DONE, "; ".join([text, *failed[:5]]), [context.write(record)])


def junit_counts(path: Path) -> tuple[dict[str, int], list[str]]:
    """Tests by outcome, and the names of those that failed, from pytest's junit file."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failed = []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[outcome] += 1
        if outcome == "failed":
            failed.append(f"{case.get('classname')}.{case.get('name')}")
    return counts, failed


def run_process(command: list[str], seconds: float, cwd: Path | None = None,
                environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str] | None:  # fmt: skip
    """Runs a command to its end; told to stop (SIGTERM) when the time is up, and then None is returned."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd, start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(report.ROOT), os.environ.get("PYTHONPATH", "")]),
             **(environment or {})},
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=max(1.0, seconds))
        return subprocess.CompletedProcess(command, process.returncode, output)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.communicate(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        return None
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def _ended(what: str, done: subprocess.CompletedProcess[str]) -> str:
    """What a process that failed said last, in the first line, and the end of all it said."""
    lines = done.stdout.strip().splitlines() or ["no output"]
    return f"{what} ended with {done.returncode}: {lines[-1][:200]}\n{done.stdout[-3000:]}"


# Benchmarks


def bench_part(op: str, name: str, **options: Any) -> Callable[[Context], Outcome]:
    """A part that measures one op; ``options`` are fields of BenchConfig."""

    def part(context: Context) -> Outcome:
        if importlib.util.find_spec(f"benchmarks.ops.{op}") is None:
            return Outcome(SKIPPED, f"no benchmarks/ops/{op}.py")
        config = bench_config(context, op, **options)
        prepare_torch(config)
        known = context.previous.get("rows", [])
        ceilings = measure.measure_ceilings(context.device, DTYPES[config.dtype], context.config.toy)
        rows = measure_op(op, config, ceilings, known, context.deadline, show=lambda line: print(line, flush=True))
        record = make_record(op, config, ceilings, rows)
        record.name = context.name(name.replace("_", "-"))
        record.config["toy"] = context.config.toy
        files = [context.write(record)]
        files += [
            p.name for p in plot_record(record, context.out, files[0].removesuffix(".json"), not config.competitors)
        ]
        late = sum(row.get("absent") == OUT_OF_TIME for row in rows)
        text = f"{sum('ms' in row for row in rows)} measurements{best_line(rows)}"
        if late:
            return Outcome(PARTIAL, f"{text}; {late} left for the next call", files, {"rows": rows})
        return Outcome(DONE, text, files)

    return part


def bench_config(context: Context, op: str, **options: Any) -> BenchConfig:
    """The config of a benchmark part: toy sizes in a toy report, else the options over the report's own."""
    values = {"sizes": "quick", "competitors": False, **options}
    if context.config.toy:
        values |= {"sizes": "toy", "points": "*", "time_ms": TOY_TIME_MS, "warmup_ms": TOY_TIME_MS}
    elif values["sizes"] == "versus":
        wanted = getattr(module(op), "VERSUS", None)
        points = module(op).SIZES["quick"]
        values["sizes"] = points if wanted is None else [p for p in points if p.get("name") in wanted]
    values["competitors"] = values["competitors"] and context.config.competitors
    return BenchConfig(op=op, device=context.config.device, autotune=context.config.autotune,
                       out=str(context.out), **values)  # fmt: skip


def best_line(rows: list[Row]) -> str:
    """The fastest of ours in words."""
    ours = [r for r in rows if "ms" in r and r["implementation"] == "hstu"]
    if not ours:
        return ""
    best = max(ours, key=lambda r: r["share_of_ceiling"])
    return (f"; best {best['point']} {best['pass']}: {100 * best['share_of_ceiling']:.0f} % of the {best['ceiling']} "
            f"ceiling")  # fmt: skip


# Training


def training_part(context: Context) -> Outcome:
    """One run of hstu-train, from the first step to the evaluation of the best checkpoint."""
    config = context.config
    if config.data is None and not config.toy:
        return Outcome(SKIPPED, "data is not set: give the folder with stores/ that holds the prepared ml-1m")
    data = None if config.data is None else Path(config.data)
    if data is not None and not data.is_dir():
        raise UserError(f"data={data.name}: no such folder")
    if data is not None and not config.toy and not list(data.glob("stores/ml-1m-*/meta.json")):
        raise UserError(
            f"data={data.name}: no stores/ml-1m-*/meta.json in it: give the data.root of hstu-prepare data=ml-1m"
        )
    # A run that was told to stop goes on in its folder.
    parts = context.out / "parts"
    resumed = "run" in context.previous and (parts / context.previous["run"] / "checkpoints").exists()
    run = parts / (context.previous["run"] if resumed else f"run-{time.time_ns()}")
    facts = parts / "training-process.json"
    options = ["experiment=ml-1m/hstu", f"data.root={config.data}"]
    if config.toy:
        options = ["experiment=ml-1m/hstu", "data=synthetic", f"data.root={parts / 'data'}", "data.num_users=60",
                   "run.epochs=1", "model.dim=8", "model.qk_dim=4", "model.v_dim=4", "model.max_len=10",
                   "loss.num_negatives=4", "eval.bootstrap=0", "run.threads=1"]  # fmt: skip
    options += [f"run.dir={run}", f"run.device={config.device}", "run.loggers=[]", "run.progress=false"]
    command = [sys.executable, "-m", "benchmarks.train_run", str(facts), *options]
    seconds = min(context.left_s(), 60 * config.training_minutes)
    done = run_process(command, seconds, cwd=context.out, environment={"HSTU_DATA_DIR": ""})
    if done is None:
        return Outcome(PARTIAL, "stopped in time; the next call resumes it", data={"run": run.name})
    if done.returncode != 0:
        raise RuntimeError(_ended("hstu-train", done))
    record = report.run_record(context.name("train-synthetic" if config.toy else "train-ml-1m-hstu"), [run])
    process = json.loads(facts.read_text())
    record.timing |= {k: v for k, v in process.items() if k != "status" and v is not None}
    if resumed:
        record.timing["note"] = "resumed: wall_s is of the last part only"
    text = f"{record.timing['train_s']:.1f} s training and {record.timing['eval_s']:.1f} s evaluation, " \
           f"{1e3 * record.timing['s_per_step']:.2f} ms a step"  # fmt: skip
    if "peak_gpu_mib" in process:
        text += f", {process['peak_gpu_mib']:,.0f} MiB"
    metric = record.metrics.get("hr@10")
    return Outcome(DONE, text + (f", HR@10 {metric['mean']:.4f}" if metric else ""), [context.write(record)])


# Memory


def memory_part(context: Context) -> Outcome:
    """Peak memory of every measured pass, gathered from the records of the other parts."""
    rows = []
    for path in sorted(context.out.glob(f"????-??-??-{context.name('*')}.json")):
        record = report.read_json(path, "delete it and run the report again")
        if record["name"] == context.name("memory"):
            continue
        for row in record["timing"].get("rows", []):
            if row.get("peak_mib") is not None:
                keys = ("point", "pass", "implementation", "dtype", "peak_mib")
                rows.append({"op": record["model"], **{k: row[k] for k in keys}})
        if "peak_gpu_mib" in record["timing"]:
            rows.append({"op": "training", "point": record["name"], "pass": "both", "implementation": "hstu",
                         "dtype": "fp32", "peak_mib": record["timing"]["peak_gpu_mib"]})  # fmt: skip
    if not rows:
        return Outcome(SKIPPED, "no other part has measured memory")
    largest = max(rows, key=lambda r: r["peak_mib"])
    record_file = context.write(context.record("memory", "memory", rows, {}))
    text = f"{len(rows)} peaks; the largest is {largest['peak_mib']:,.0f} MiB ({largest['implementation']} " \
           f"{largest['op']} {largest['point']} {largest['pass']})"  # fmt: skip
    return Outcome(DONE, text, [record_file])


# All parts, in the order in which they are worth having

FP32_POINTS = "ml-*"
"""Points that are measured in float32 too: the published models train in it."""

PARTS: dict[str, Callable[[Context], Outcome]] = {
    "device": device_part,
    "correctness": correctness_part,
    "training": training_part,
    **{f"bench-{op}": bench_part(op, f"bench-{op}") for op in BENCHES},
    "tests": tests_part,
    **{
        f"versus-{op}": bench_part(op, f"versus-{op}", sizes="versus", competitors=True, passes=["forward", "both"])
        for op in OPS
    },
    "bench-layer-fp32": bench_part("layer", "bench-layer-fp32", dtype="fp32", points=FP32_POINTS),
    "bench-attention-fp32": bench_part("attention", "bench-attention-fp32", dtype="fp32", points=FP32_POINTS),
    "memory": memory_part,
}
