"""Measures the points of an op: its passes and its competitors, as flat rows.

One row is one pass of one implementation at one point. ``benchmarks/ops/__init__.py`` says what an op's module gives.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.config import DTYPES, BenchConfig
from benchmarks.measure import Ceilings
from benchmarks.ops import Absent, Problem, Run, Sizes, Work, module
from hstu.errors import UserError
from hstu.report import OURS

Row = dict[str, Any]
OUT_OF_TIME = "not measured: out of time"


def points(op: str, config: BenchConfig) -> list[dict[str, Any]]:
    """The points that the config asks for, every size filled in, ``name`` and ``lengths`` included."""
    bench = module(op)
    if isinstance(config.sizes, str):
        chosen: Sequence[Sizes] = bench.SIZES[config.sizes]
    else:
        chosen = [config.sizes] if isinstance(config.sizes, Mapping) else list(config.sizes)
    found = []
    for sizes in chosen:
        unknown = sorted(set(sizes) - set(bench.DEFAULTS) - {"name", "lengths"})
        if unknown:
            known = ", ".join(sorted({*bench.DEFAULTS, "name", "lengths"}))
            raise UserError(f"sizes of {op}: unknown {unknown[0]}: expected one of {known}")
        full = {**bench.DEFAULTS, **sizes}
        full["name"] = sizes.get("name") or point_name(sizes)
        if fnmatch.fnmatchcase(full["name"], config.points):
            found.append(full)
    names = [p["name"] for p in found]
    if len(set(names)) < len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        raise UserError(f"sizes of {op}: several points are named {twice[0]}: give each a name")
    return found


def point_name(sizes: Sizes) -> str:
    """Name of a point made from its sizes: ``B32-S1024-lengths=skewed``."""
    parts = [f"{k}{v}" if isinstance(v, int) and not isinstance(v, bool) else f"{k}={v}" for k, v in sizes.items()]
    return "-".join(parts) or "default"


def row_key(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """What tells one row of an op from another."""
    return row["point"], row["pass"], row["implementation"], row["dtype"]


def measure_op(
    op: str,
    config: BenchConfig,
    ceilings: Ceilings,
    known: Sequence[Row] = (),
    deadline: float | None = None,
    show: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """All rows of an op.

    Args:
        op: name.
        config: what to measure and how.
        ceilings: of this machine, for the dtype.
        known: rows of an earlier call; what they hold is not measured again.
        deadline: time.monotonic() after which no further point is begun; its rows then say OUT_OF_TIME.
        show: gets a line per measured implementation.
    """
    kept = _finished(known)
    rows: list[Row] = []
    for sizes in points(op, config):
        if sizes["name"] in kept:
            rows += kept[sizes["name"]]
            continue
        rows += _measure_point(op, sizes, config, ceilings, deadline, show)
        if config.torch_device().type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _finished(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by point, without the points that ran out of time."""
    by_point: dict[str, list[Row]] = {}
    for row in rows:
        by_point.setdefault(row["point"], []).append(row)
    return {p: rs for p, rs in by_point.items() if all(r.get("absent") != OUT_OF_TIME for r in rs)}


def _late(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


def _measure_point(op: str, sizes: dict[str, Any], config: BenchConfig, ceilings: Ceilings, deadline: float | None,
                   show: Callable[[str], None]) -> list[Row]:  # fmt: skip
    passes = list(config.passes)
    head = {"point": sizes["name"], "dtype": config.dtype, "device": config.torch_device().type}
    head |= {k: v for k, v in sizes.items() if k != "name"}
    if _late(deadline):
        return [{**head, "pass": p, "implementation": OURS, "absent": OUT_OF_TIME} for p in passes]
    problems = _problems(op, sizes, config)
    rows = []
    for one in passes:
        if one != "forward" and (problems[0].backward is None or not problems[0].ours.leaves):
            continue
        values = _measure_pass([p.ours for p in problems], one, config)
        rows.append(
            {**head, "pass": one, "implementation": OURS, **values, **_rates(problems[0], one, values, ceilings)}
        )
        show(_line(op, rows[-1]))
    if config.competitors:
        for name in problems[0].competitors:
            for row in _competitor_rows(name, problems, passes, config, ceilings, deadline):
                rows.append({**head, **row})
                show(_line(op, rows[-1]))
    return rows


def _problems(op: str, sizes: Sizes, config: BenchConfig) -> list[Problem]:
    """The point's inputs, as often as it takes to keep them out of the cache."""
    device, dtype = config.torch_device(), DTYPES[config.dtype]
    generator = torch.Generator(device=device).manual_seed(config.seed)
    problems: list[Problem] = [module(op).make(sizes, device, dtype, generator)]
    for _ in range(measure.num_sets(problems[0].forward.bytes, device) - 1):
        problems.append(module(op).make(sizes, device, dtype, generator))
    return problems


def _competitor_rows(name: str, problems: Sequence[Problem], passes: Sequence[str], config: BenchConfig,
                     ceilings: Ceilings, deadline: float | None) -> list[Row]:  # fmt: skip
    """Rows of a competitor on the same points; the first pass that cannot be measured is a row with the reason."""
    rows: list[Row] = []
    if _late(deadline):
        return [{"pass": passes[0], "implementation": name, "absent": OUT_OF_TIME}]
    one = passes[0]
    try:
        runs = [problem.competitors[name]() for problem in problems]
        for one in passes:
            if one != "forward" and (problems[0].backward is None or not runs[0].leaves):
                continue
            values = _measure_pass(runs, one, config)
            rows.append({"pass": one, "implementation": name, **values, **_rates(problems[0], one, values, ceilings)})
    except Absent as reason:
        rows.append({"pass": one, "implementation": name, "absent": str(reason)})
    except torch.OutOfMemoryError:
        rows.append({"pass": one, "implementation": name, "absent": "out of memory"})
    except Exception as error:  # a library of others: what it cannot do is a result, not a failure of the run
        lines = str(error).strip().splitlines() or [""]
        absent = f"failed: {type(error).__name__}: {lines[0][:200]}"
        rows.append({"pass": one, "implementation": name, "absent": absent})
    return rows


def _measure_pass(runs: Sequence[Run], one: str, config: BenchConfig) -> dict[str, float | int | None]:
    """Times and peak memory of one pass."""
    device = config.torch_device()
    calls = [_call(run, one) for run in runs]
    times = measure.time_calls(calls, device, config.warmup_ms, config.time_ms, config.cpu_time)
    values: dict[str, float | int | None] = {
        "ms": times.ms, "ms_p20": times.ms_p20, "ms_p80": times.ms_p80, "wall_ms": times.wall_ms, "calls": times.calls,
    }  # fmt: skip
    if config.memory:
        values["peak_mib"] = measure.peak_mib(calls[0], device)
    return values


def _call(run: Run, one: str) -> Callable[[], Any]:
    if one == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return run.forward()

        return forward
    if one == "backward":
        outputs = _differentiable(run.forward())
        upstream = [torch.randn_like(y) for y in outputs]
        return lambda: torch.autograd.grad(outputs, run.leaves, upstream, retain_graph=True, allow_unused=True)
    like = [torch.randn_like(y) for y in _differentiable(run.forward())]
    return lambda: torch.autograd.grad(_differentiable(run.forward()), run.leaves, like, allow_unused=True)


def _differentiable(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return [y for y in outputs if y.requires_grad]


def work(problem: Problem, one: str) -> Work:
    """The least work of a pass."""
    if one == "forward":
        return problem.forward
    assert problem.backward is not None
    if one == "backward":
        return problem.backward
    return Work(problem.forward.flops + problem.backward.flops, problem.forward.bytes + problem.backward.bytes)


def _rates(problem: Problem, one: str, values: Mapping[str, Any], ceilings: Ceilings) -> Row:
    """TFLOP/s and GB/s of the useful work, and the share of what the ceilings allow."""
    least, seconds = work(problem, one), 1e-3 * values["ms"]
    best_s, limit = ceilings.seconds(least.flops, least.bytes)
    row = {
        "tflop_s": 1e-12 * least.flops / seconds,
        "gb_s": 1e-9 * least.bytes / seconds,
        "share_of_ceiling": best_s / seconds,
        "ceiling": limit,
        "flops": least.flops,
        "bytes": least.bytes,
    }
    if problem.tokens is not None:
        row["tokens_per_s"] = problem.tokens / seconds
    return row


def _line(op: str, row: Row) -> str:
    head = f"{op} {row['point']} {row['pass']} {row['implementation']}"
    return f"{head}: {row['absent']}" if "absent" in row else f"{head}: {row['ms']:.4g} ms"
