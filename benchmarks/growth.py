"""Time and memory of preparing and reading a log as it grows. ``python -m benchmarks.growth --millions 3 12 48``

Generated logs with 50 events a user, 200,000 items and one Parquet file per million events, as a daily job of Spark
writes. Each task runs in a process of its own:

prepare   ``hstu-prepare data=log data.shards=S data.memory_mib=M``
one-store the same without shards, for comparison (up to ``--one-store`` million events)
stream    every batch of one epoch made as tensors with ``run.reader=stream``, none trained on
draw      the same with ``run.reader=draw`` on the joined view of the shards
train     the first ``TRAIN_STEPS`` steps of a small HSTU with ``run.reader=stream``: time of these steps without the
          set-up, memory of the whole; per event they are counted as if every user had ``MAX_LEN``

Recorded are the clock's time, the processor time of all threads (what to compare on a machine that others use too), the
peak resident memory and the peak of its anonymous part, which is what no page cache can give back.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hstu.config import Config, DataConfig, HSTUConfig, LossConfig, RunConfig
from hstu.data.batches import EventColumns, TrainBatches
from hstu.data.shard_stream import StreamBatches
from hstu.data.share import Ranks
from hstu.data.splits import make_split
from hstu.distributed import World
from hstu.prepare import prepare
from hstu.progress import Display
from hstu.report import RESULTS, Record, write_record
from hstu.train import Trainer

EVENTS_PER_USER, NUM_ITEMS, EVENTS_PER_FILE = 50, 200_000, 1_000_000
FIRST_TIME_S, DAY_S = 1_700_000_000, 86_400
ID_FACTOR = 2_654_435_761
"""Spreads user ids over 40 bits, so that they are no small integers."""
SHARDS, MEMORY_MIB, THREADS = 16, 512, 2
MAX_LEN, BATCH_USERS, BUFFER_USERS, TRAIN_STEPS = 50, 256, 16_384, 30
TASKS = ("prepare", "one-store", "stream", "draw", "train")
COLOURS = {"prepare": "tab:blue", "one-store": "tab:gray", "stream": "tab:green", "draw": "tab:orange"}
_SAMPLE_S = 0.02
_ROOT = Path(__file__).resolve().parent.parent


def generate(folder: Path, num_events: int, seed: int = 0) -> None:
    """Writes the log: file after file in time order, active users and popular items more often."""
    import polars as pl

    folder.mkdir(parents=True)
    rng, num_users = np.random.default_rng(seed), max(1, num_events // EVENTS_PER_USER)
    for number, start in enumerate(range(0, num_events, EVENTS_PER_FILE)):
        size = min(EVENTS_PER_FILE, num_events - start)
        users = (num_users * rng.random(size) ** 1.5).astype(np.int64) * ID_FACTOR % (1 << 40)
        items = (NUM_ITEMS * rng.random(size) ** 2).astype(np.int64)
        times = np.sort(FIRST_TIME_S + number * DAY_S + rng.integers(0, DAY_S, size))
        frame = pl.DataFrame({"user": users, "item": items, "timestamp": times})
        frame.write_parquet(folder / f"part-{number:05d}.parquet")


# One task, in its own process


def data_config(raw: Path, root: Path, shards: int | None) -> DataConfig:
    """What is prepared; the libraries are loaded before anything is measured, torch too."""
    return DataConfig(name="log", source="log", raw=str(raw), root=str(root), shards=shards, memory_mib=MEMORY_MIB)


def run_task(task: str, raw: Path, root: Path) -> dict[str, Any]:
    """What the task did: ``users``, ``batches`` (made or trained on; 0 for a preparation), times if it took them."""
    if task in ("prepare", "one-store"):
        store = prepare(data_config(raw, root, SHARDS if task == "prepare" else None), quiet=True)
        return {"users": store.num_users, "batches": 0}
    store = prepare(data_config(raw, root, SHARDS), quiet=True)
    make = {"stream": _stream_epoch, "draw": _draw_epoch, "train": _train_steps}[task]
    return {"users": store.num_users, **make(store, root)}


def _stream_epoch(store: Any, root: Path) -> dict[str, Any]:
    run = RunConfig(reader="stream", batch_users=BATCH_USERS, buffer_users=BUFFER_USERS)
    data = StreamBatches(store, MAX_LEN, run, 0, World())
    for step in range(data.num_steps(0)):
        data.share(0, step, Ranks())
    return {"batches": data.num_steps(0)}


def _draw_epoch(store: Any, root: Path) -> dict[str, Any]:
    data = TrainBatches(EventColumns(store), store, make_split(store), MAX_LEN, 0, BATCH_USERS)
    for step in range(data.num_steps(0)):
        data.batch(0, step)
    return {"batches": data.num_steps(0)}


def train_config(root: Path) -> Config:
    return Config(
        experiment="growth",
        model=HSTUConfig(dim=32, num_blocks=2, num_heads=1, qk_dim=32, v_dim=32, max_len=MAX_LEN),
        loss=LossConfig(num_negatives=32),
        run=RunConfig(
            dir=str(root / "run"), batch_users=BATCH_USERS, reader="stream", buffer_users=BUFFER_USERS, loggers=[],
            progress=False, threads=1, device="cpu",
        ),
    )  # fmt: skip


def _train_steps(store: Any, root: Path) -> dict[str, Any]:
    trainer = Trainer(train_config(root), store, root / "run", Display(False))
    clock, cpu = time.perf_counter(), time.process_time()
    for step in range(TRAIN_STEPS):
        trainer._step(trainer._make_input(0, step))
    times = {"clock_s": round(time.perf_counter() - clock, 2), "cpu_s": round(time.process_time() - cpu, 2)}
    return {"batches": TRAIN_STEPS, **times}


class PeakMemory:
    """Highest anonymous resident memory of this process, MiB, looked at every few milliseconds. Linux only."""

    def __init__(self) -> None:
        self.anonymous = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            with open("/proc/self/status", encoding="ascii") as file:
                held = next(line for line in file if line.startswith("RssAnon"))
            self.anonymous = max(self.anonymous, int(held.split()[1]) / 1024)
            time.sleep(_SAMPLE_S)


def measure(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``function`` returns, its time and the peaks of this process. One call a process: peaks never fall."""
    peak, started = PeakMemory(), time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF)
    found = function()
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return {
        "clock_s": round(time.perf_counter() - started, 2), "cpu_s": round(cpu, 2),
        "peak_mib": round(used.ru_maxrss / 1024), "anonymous_mib": round(peak.anonymous), **found,
    }  # fmt: skip


# All tasks


def run_child(task: str, raw: Path, root: Path) -> dict[str, Any]:
    """The row of a task that runs in its own process."""
    command = [sys.executable, "-m", "benchmarks.growth", "--child", task, str(raw), str(root)]
    threads = {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": str(THREADS)}
    environment = {**os.environ, **threads}
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_size(num_events: int, folder: Path, one_store: bool, tasks: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of one size. What lay on disk for it is removed."""
    raw, root = folder / "raw", folder / "root"
    rows = []
    try:
        generate(raw, num_events)
        for task in tasks:
            if task == "one-store" and not one_store:
                continue
            found = run_child(task, raw, folder / "one" if task == "one-store" else root)
            row = {"events": num_events, "task": task, **found}
            row["cpu_us_per_event"] = round(1e6 * found["cpu_s"] / num_events, 3)
            if task == "train":  # some steps, whatever the size: a step is the unit
                row["cpu_us_per_event"] = round(1e6 * found["cpu_s"] / (TRAIN_STEPS * BATCH_USERS * MAX_LEN), 3)
            print(json.dumps(row), flush=True)
            rows.append(row)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Time per event and anonymous memory of each task, smallest to largest log, as one line of a table."""
    sizes = sorted({r["events"] for r in rows})
    found: dict[str, Any] = {"million_events": ", ".join(f"{s / 1e6:g}" for s in sizes)}
    for task in TASKS[:-1]:
        measured = sorted((r for r in rows if r["task"] == task), key=lambda r: r["events"])
        if measured:
            found[f"{task}_cpu_us_per_event"] = ", ".join(f"{r['cpu_us_per_event']:.2f}" for r in measured)
            found[f"{task}_mib"] = ", ".join(str(r["anonymous_mib"]) for r in measured)
    return found


def make_record(rows: list[dict[str, Any]]) -> Record:
    return Record(
        name="growth-sharded", kind="preparation", dataset="generated logs, 50 events a user, 200,000 items",
        protocol="reference", split_hash=None, model="", seeds=[0], metrics={},
        timing=summary(rows),
        config={
            "rows": rows,
            "command": "python -m benchmarks.growth", "shards": SHARDS, "memory_mib": MEMORY_MIB,
            "polars_threads": THREADS, "events_per_file": EVENTS_PER_FILE, "batch_users": BATCH_USERS,
            "buffer_users": BUFFER_USERS, "max_len": MAX_LEN, "train_steps": TRAIN_STEPS,
            "train": {"model": asdict(train_config(Path("run")).model)},
            "load_average": round(os.getloadavg()[0], 1),
        },
    )  # fmt: skip


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Processor time and peak memory over the number of events."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for task, colour in COLOURS.items():
        found = sorted((r for r in rows if r["task"] == task), key=lambda r: r["events"])
        events = [r["events"] / 1e6 for r in found]
        style: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 4, "label": task}
        left.loglog(events, [r["cpu_s"] for r in found], **style)
        middle.semilogx(events, [r["cpu_us_per_event"] for r in found], **style)
        right.semilogx(events, [r["anonymous_mib"] for r in found], **style)
        right.semilogx(events, [r["peak_mib"] for r in found], color=colour, linewidth=1, linestyle=":")
    left.set(title="processor time, s", xlabel="million events")
    middle.set(title="processor time per event, µs", xlabel="million events", ylim=(0, None))
    right.set(title="peak memory, MiB (dotted: with mapped files)", xlabel="million events", ylim=(0, None))
    sizes = sorted({r["events"] / 1e6 for r in rows})
    for panel in (left, middle, right):
        panel.set_xticks(sizes, [f"{s:g}" for s in sizes])
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    left.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of preparing and reading a log as it grows.")
    parser.add_argument("--millions", type=float, nargs="+", default=[3, 12, 48], help="sizes, in million events")
    parser.add_argument("--one-store", type=float, default=50, help="largest size that is also prepared without shards")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--folder", type=Path, default=Path("data/growth"), help="scratch space; 80 bytes an event")
    parser.add_argument("--rows", type=Path, help="rows of earlier runs, JSON lines: read, and added to")
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        task, raw, root = options.child
        print(json.dumps(measure(lambda: run_task(task, Path(raw), Path(root)))))
        return
    rows: list[dict[str, Any]] = []
    if options.rows and options.rows.exists():
        rows = [json.loads(line) for line in options.rows.read_text().splitlines()]
    for millions in options.millions:
        size = int(millions * 1e6)
        folder = options.folder / f"{size}"
        found = measure_size(size, folder, millions <= options.one_store, tuple(options.tasks))
        rows += found
        if options.rows:
            with open(options.rows, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in found)
    if not options.no_record:
        path = write_record(make_record(rows))
        plot(rows, path.with_suffix(".png"))
        print(path, RESULTS)


if __name__ == "__main__":
    main()
