"""Everything that needs a GPU, in one command: ``python -m benchmarks.gpu_report out=FOLDER data=FOLDER [minutes=8]``.

Device facts and measured ceilings; every op against its float64 specification on fresh random inputs; the benchmarks;
one training run of ml-1m/hstu (``data``: a folder with the prepared ``stores/``); memory peaks. Writes records (JSON)
and plots (PNG) into the folder and prints a short table last. It needs neither network, fbgemm, torchrec nor polars.

Each part writes ``FOLDER/parts/NAME.json``; a rerun does what is not finished (``refresh=true``: all of it again). The
parts run in a process of their own: where one fails, even by taking the device down, it is recorded with its traceback
and the others go on. The exit status is 1 when a part failed. ``toy=true device=cpu`` proves the report without a GPU.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from benchmarks.config import GpuReportConfig, from_options
from hstu import report
from hstu.cli import command, run_hydra
from hstu.errors import UserError

GRACE_S = 30.0
"""No part begins another point in the last seconds of a call; what still runs at its end is stopped."""
GRACE_SHARE = 0.1
"""At most this share of a short call."""
DEVICE_BROKEN = 75
"""Exit status of the process that measures when the device no longer answers: a fresh one goes on."""
RUNNING = "running"


def part_file(out: Path, name: str) -> Path:
    """State of a part."""
    return out / "parts" / f"{name}.json"


def read_part(out: Path, name: str) -> dict[str, Any]:
    """State of a part; ``{"status": "not begun"}`` before its first run."""
    try:
        return cast(dict[str, Any], json.loads(part_file(out, name).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {"status": "not begun"}


# The process that measures


def run_part(name: str, config: GpuReportConfig, deadline: float) -> None:
    """Runs one part and writes its state, whatever becomes of it."""
    from benchmarks.report_parts import FAILED, PARTIAL, PARTS, Context, Outcome

    out, started = Path(config.out), time.monotonic()
    before = read_part(out, name)
    previous = before.get("data", {}) if before["status"] in (PARTIAL, RUNNING) and not config.refresh else {}
    report.write_json(part_file(out, name), {**before, "status": RUNNING, "data": previous})
    trace = None
    try:
        outcome = PARTS[name](Context(config, deadline, previous))
    except Exception as error:
        trace = traceback.format_exc()
        lines = str(error).strip().splitlines() or [""]
        outcome = Outcome(FAILED, f"{type(error).__name__}: {lines[0][:300]}")
    state = {**dataclasses.asdict(outcome), "seconds": round(time.monotonic() - started, 2), "commit": report.commit()}
    report.write_json(part_file(out, name), state | ({"traceback": trace} if trace else {}))


def measure(config: GpuReportConfig, names: Sequence[str], deadline: float) -> int:
    """Runs parts one after the other until the deadline; DEVICE_BROKEN when the device stops answering."""
    for name in names:
        if time.monotonic() > deadline:
            return 0
        print(f"== {name}", flush=True)
        run_part(name, config, deadline)
        if read_part(Path(config.out), name)["status"] == "failed" and not _device_answers(config.device):
            return DEVICE_BROKEN
    return 0


def _device_answers(device: str) -> bool:
    import torch

    try:
        return bool(torch.ones(2, device=device).sum().item() == 2.0)
    except RuntimeError:
        return False


# The process that watches


def run_report(config: GpuReportConfig) -> int:
    """Runs what is not finished, then prints the table; returns the exit status."""
    from benchmarks.config import find_device
    from benchmarks.report_parts import PARTS

    unknown = sorted(set(config.parts) - set(PARTS))
    if unknown:
        raise UserError(f"parts: unknown {unknown[0]}: expected {', '.join(PARTS)}")
    find_device(config.device)
    out = Path(config.out).expanduser().resolve()
    (out / "parts").mkdir(parents=True, exist_ok=True)
    (out / "parts" / ".gitignore").write_text("*\n", encoding="utf-8")  # state, not results
    if config.data is not None:
        config = dataclasses.replace(config, data=str(Path(config.data).expanduser().resolve()))
    config = dataclasses.replace(config, out=str(out))
    seconds = 60 * config.minutes
    deadline = time.monotonic() + seconds - min(GRACE_S, GRACE_SHARE * seconds)
    chosen = config.parts or list(PARTS)
    todo = [n for n in chosen if config.refresh or read_part(out, n)["status"] != "done"]
    if "memory" in chosen and todo and "memory" not in todo:
        todo.append("memory")  # gathers what the others measured
    while todo and time.monotonic() < deadline:
        todo = _watch(config, todo, deadline)
    text = summary(out, chosen)
    (out / "summary.md").write_text(text + "\n", encoding="utf-8")
    print("\n" + text)
    return 1 if any(read_part(out, name)["status"] == "failed" for name in chosen) else 0


def _watch(config: GpuReportConfig, names: Sequence[str], deadline: float) -> list[str]:
    """Runs ``names`` in one process; returns those after the part in which it died, [] if it came to its end."""
    options = json.dumps({"config": dataclasses.asdict(config), "parts": list(names), "deadline": deadline})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(report.ROOT), os.environ.get("PYTHONPATH", "")])}
    arguments = [sys.executable, "-m", "benchmarks.gpu_report", "--measure", options]
    started = time.time() - 1.0  # file times are coarse
    process = subprocess.Popen(arguments, env=environment)
    try:
        status: int | None = process.wait(max(1.0, deadline - time.monotonic()) + GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        status = None
    except BaseException:
        process.terminate()
        process.wait()
        raise
    attempted = [n for n in names if _changed_since(part_file(Path(config.out), n), started)]
    if not attempted:  # it could not even begin
        raise RuntimeError(f"the measuring process ended with status {status} before its first part")
    last = attempted[-1]
    state = read_part(Path(config.out), last)
    if state["status"] == RUNNING:  # the process died in it
        why = "took too long and was stopped" if status is None else f"its process ended with status {status}"
        report.write_json(part_file(Path(config.out), last), {**state, "status": "failed", "text": why})
    return [] if status == 0 else list(names[names.index(last) + 1 :])


def _changed_since(path: Path, moment: float) -> bool:
    return path.exists() and path.stat().st_mtime >= moment


# The table


def summary(out: Path, names: Sequence[str]) -> str:
    """The short table: what became of each part, then the targets."""
    from benchmarks.tables import text_table
    from benchmarks.targets import verdicts

    states = {name: read_part(out, name) for name in names}
    parts = [[name, s["status"], f"{s.get('seconds', 0):.0f}", s.get("text", "")] for name, s in states.items()]
    records = {r["name"]: r for r in _records(out)}
    targets = [[v.target, v.measured, v.met] for v in verdicts(records)]
    failed = [f"{name}: {s.get('text', '')}" for name, s in states.items() if s["status"] == "failed"]
    unfinished = [name for name, s in states.items() if s["status"] in ("partial", "not begun")]
    text = [
        text_table(("part", "status", "s", "what"), parts),
        text_table(("target (one H200, bf16)", "measured", "met"), targets),
    ]
    if failed:
        text.append("failed:\n" + "\n".join(f"- {line}" for line in failed))
    if unfinished:
        text.append(f"not finished: {', '.join(unfinished)}; the same command goes on")
    return "\n\n".join(text)


def _records(out: Path) -> list[dict[str, Any]]:
    paths = sorted(out.glob("????-??-??-*.json"))
    return [report.read_json(path, "delete it and run the report again") for path in paths]


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--measure"]:
        options = json.loads(words[1])
        return measure(GpuReportConfig(**options["config"]), options["parts"], options["deadline"])
    from omegaconf import OmegaConf

    statuses: list[int] = []

    def task(cfg: Any) -> None:
        values = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
        statuses.append(run_report(from_options(GpuReportConfig, values)))

    run_hydra(task, "gpu_report", "commands")
    return max(statuses, default=0)


if __name__ == "__main__":
    raise SystemExit(main())
