"""Compiles every Triton kernel ahead of time, without a GPU, and reports what the compiler made of it.

    python -m benchmarks.aot [op=attention] [archs=[90]] [cases=ml-*] [sample=4] [jobs=4] [out=FILE.json]

(or ``hstu-bench aot``) prints registers, spills, shared memory and matrix instructions per kernel, case and
architecture, and exits 1 where they are not what :func:`findings` asks for. The cases are the ``aot_cases()`` of
``benchmarks/ops/<op>.py``: the launchers themselves run, on small CPU tensors of the real widths and dtypes; only the
launch is left out, so what is compiled is what a GPU would get (same compile-time sizes, same alignment of arguments).
Nothing is cached.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import io
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.config import AotConfig, from_arguments
from benchmarks.ops import Expect, module
from hstu.cli import command
from hstu.errors import UserError
from kernels._backend import OPS

ARCHS = (80, 90, 100)
"""Compute capabilities times ten: A100, H100 and H200, B200."""
SHARED_LIMIT_KIB = {80: 163, 90: 227, 100: 227}
"""Shared memory one program may take. Source: CUDA C++ programming guide, technical specifications."""
FASTEST_MATRIX = {80: "mma", 90: "wgmma", 100: "tcgen05"}
"""Matrix instruction of a 16-bit product whose tile has at least 64 rows."""
WIDE_ROWS = 64
"""Rows of a tile from which the warp-group instructions can be used."""


@dataclass(frozen=True)
class Allowance:
    """A kernel that may spill, and why."""

    kernel: str
    """Function name."""
    spill_bytes: int
    reason: str
    case: str = "*"
    """Pattern of the cases' names."""
    archs: tuple[int, ...] = ARCHS


_CHOSEN_FOR_HOPPER = "block sizes are chosen for sm_90, where it spills nothing; not tuned for other architectures"
ALLOWANCES: tuple[Allowance, ...] = (
    Allowance("_attention_rows_kernel", 512, _CHOSEN_FOR_HOPPER, archs=(80, 100)),
    Allowance("_sampled_softmax_bwd_kernel", 8, "two registers short at a width that is no power of two", archs=(80,)),
    Allowance("_attention_keys_kernel", 1024, _CHOSEN_FOR_HOPPER, archs=(80, 100)),
)
"""The one place for exceptions from "no spills in the default configuration"."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one kernel."""

    kernel: str
    arch: int
    config: str
    registers: int
    """Per thread."""
    spill_bytes: int
    """Per thread: register spills (stores plus loads, as ptxas counts them)."""
    shared_bytes: int
    """Per program, dynamic."""
    matrix: str
    """Matrix instruction of its PTX: wgmma, tcgen05, mma or none."""
    num_warps: int
    wanted: str = "none"
    """The matrix instruction that its products call for: that of FASTEST_MATRIX, mma for small tiles, none."""


class _NoGpu:
    """A driver that names a target and can do nothing else."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling_for(arch: int) -> Iterator[list[Any]]:
    """Inside, a kernel launch compiles for ``arch`` and launches nothing; gives the list of (kernel, compiled, log).

    log: what ptxas said, empty for a kernel that was compiled before.
    """
    from kernels._launch import interpreting

    if interpreting():
        raise RuntimeError("TRITON_INTERPRET=1 is set: kernels are interpreted and cannot be compiled here")
    from triton import knobs
    from triton.runtime import JITFunction
    from triton.runtime.driver import driver

    seen: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        seen.append((self.fn.__name__, compiled, log.getvalue()))
        return compiled

    previous = driver._active
    driver.set_active(_NoGpu(arch))
    JITFunction.run = compile_only
    try:
        with knobs.compilation.scope(), knobs.nvidia.scope():
            knobs.compilation.always_compile = True
            knobs.nvidia.dump_ptxas_log = True
            yield seen
    finally:
        JITFunction.run = run
        driver._active = previous


def _tool(name: str) -> str:
    import triton.backends.nvidia as nvidia

    return str(Path(nvidia.__file__).parent / "bin" / name)


def _matrix_instruction(ptx: str) -> str:
    for name, pattern in (("tcgen05", r"tcgen05\.mma"), ("wgmma", r"wgmma\.mma_async"), ("mma", r"\bmma\.sync")):
        if re.search(pattern, ptx):
            return name
    return "none"


def wanted_matrix(ttir: str, arch: int) -> str:
    """The matrix instruction that the products of a kernel call for, from Triton's first representation of it.

    A product of 16-bit tiles, or of float32 ones at TF32 precision, wants one; of full float32 there is none.
    """
    wanted = "none"
    for rows, dtype, line in re.findall(r"tt\.dot(?=(?:[^\n]*: tensor<(\d+)x\d+x(\w+)>))([^\n]*)", ttir):
        if dtype == "f64" or (dtype == "f32" and "tf32" not in line):
            continue
        if int(rows) >= WIDE_ROWS:
            return FASTEST_MATRIX[arch]
        wanted = "mma"
    return wanted


def describe(name: str, arch: int, compiled: Any, log: str = "") -> Compiled:
    """Registers and spills from the compiler, shared memory from Triton, the matrix instruction from the PTX."""
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    registers, spills = _resources(ptx, arch, log)
    sizes = f"warps={metadata.num_warps} stages={metadata.num_stages}"
    wanted = wanted_matrix(compiled.asm["ttir"], arch)
    return Compiled(
        name, arch, sizes, registers, spills, metadata.shared, _matrix_instruction(ptx), metadata.num_warps, wanted
    )


def _resources(ptx: str, arch: int, log: str) -> tuple[int, int]:
    """Registers per thread and bytes spilled, from the log of ``ptxas -v``; runs it where the log is missing."""
    if not re.search(r"Used \d+ registers", log):
        log = _assemble(ptx, arch)
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", log))
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    return registers, spills


def _assemble(ptx: str, arch: int) -> str:
    ptxas = _tool("ptxas-blackwell") if arch >= 100 and Path(_tool("ptxas-blackwell")).exists() else _tool("ptxas")
    suffix = "a" if arch >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        done = subprocess.run(
            [ptxas, "-v", f"--gpu-name=sm_{arch}{suffix}", str(source), "-o", str(Path(folder) / "kernel.cubin")],
            capture_output=True, text=True,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"ptxas: {done.stderr.strip().splitlines()[0]}")
    return done.stderr


def compile_launch(arch: int, launch: Callable[[], Any]) -> list[Compiled]:
    """All kernels that ``launch`` launches, compiled for ``arch``; each distinct binary once."""
    with compiling_for(arch) as seen, torch.no_grad():
        launch()
    distinct: dict[int, tuple[str, Any, str]] = {}
    for name, compiled, log in seen:
        distinct.setdefault(id(compiled), (name, compiled, log))
    return [describe(name, arch, compiled, log) for name, compiled, log in distinct.values()]


# All cases of all ops


@dataclass(frozen=True)
class Outcome:
    """One case on one architecture."""

    op: str
    case: str
    arch: int
    kernels: list[Compiled]
    seconds: float
    problems: list[str]
    """What is not as it must be; empty: all is well."""


def findings(case: str, arch: int, kernels: Sequence[Compiled], expect: Expect) -> list[str]:
    """What is wrong with the kernels of a case: spills, missing matrix instructions, too much shared memory."""
    found = [] if kernels else ["launches no kernel"]
    for k in kernels:
        allowed = sum(
            a.spill_bytes
            for a in ALLOWANCES
            if a.kernel == k.kernel and arch in a.archs and fnmatch.fnmatchcase(case, a.case)
        )
        if k.spill_bytes > allowed:
            found.append(f"{k.kernel} spills {k.spill_bytes} bytes, allowed are {allowed}")
        if k.shared_bytes > 1024 * SHARED_LIMIT_KIB[arch]:
            found.append(f"{k.kernel} needs {k.shared_bytes / 1024:.1f} KiB shared memory, sm_{arch} has "
                         f"{SHARED_LIMIT_KIB[arch]}")  # fmt: skip
        if not _meets(k.matrix, k.wanted, arch):
            found.append(f"{k.kernel} uses {k.matrix} where its products call for {k.wanted}")
    for name in expect.matrix:
        uses = [k.matrix for k in kernels if k.kernel == name]
        if not uses or "none" in uses:
            found.append(f"{name} must use a matrix instruction and has {uses or 'not been compiled'}")
    return found


def _meets(matrix: str, wanted: str, arch: int) -> bool:
    """mma is enough on sm_100 too, where Triton takes tcgen05 only for some shapes."""
    order = ["none", "mma", "wgmma", "tcgen05"]
    return order.index(matrix) >= order.index("mma" if arch == 100 and wanted == "tcgen05" else wanted)


def run_case(op: str, case: str, arch: int) -> Outcome:
    """Compiles one case; an exception becomes a problem. Runs in a process of its own kind (see :func:`run_all`)."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    kernels: list[Compiled] = []
    try:
        _, launch, expect = _cases(op)[case]
        kernels = compile_launch(arch, launch)
        problems = findings(case, arch, kernels, expect)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        problems = [f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}: {error}"]
    return Outcome(op, case, arch, kernels, time.perf_counter() - started, problems)


def _cases(op: str) -> dict[str, tuple[str, Callable[[], Any], Expect]]:
    bench = module(op)
    if not hasattr(bench, "aot_cases"):
        return {}
    cases = {}
    for name, launch, *expect in bench.aot_cases():
        if name in cases:
            raise UserError(f"aot_cases of {op}: two cases are named {name!r}")
        cases[name] = (name, launch, expect[0] if expect else Expect())
    return cases


def deal(names: Sequence[str], archs: Sequence[int], sample: int) -> list[tuple[str, int]]:
    """What is compiled for which architecture: everything, or ``sample`` cases of which each gets one in turn.

    The first and the last case are in a sample of two or more; sm_90 comes first and most often.
    """
    if not sample or not names:
        return [(name, arch) for name in names for arch in archs]
    count = min(sample, len(names))
    spread = [names[round(i * (len(names) - 1) / max(1, count - 1))] for i in range(count)]
    order = sorted(archs, key=lambda arch: arch != 90)
    return [(name, order[i % len(order)]) for i, name in enumerate(spread)]


def run_all(config: AotConfig, show: Callable[[Outcome], None] = lambda outcome: None) -> list[Outcome]:
    """Compiles what the config asks for, in several processes."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("TRITON_INTERPRET=1 is set: kernels would be interpreted; unset it to compile them")
    ops = [config.op] if isinstance(config.op, str) else list(config.op)
    everything = ops == ["all"]
    for op in () if everything else ops:
        if op not in OPS:
            raise UserError(f"op={op}: expected all or one of {', '.join(OPS)}")
    chosen = [op for op in OPS if everything or op in ops]
    tasks = []
    for op in chosen:
        try:
            names = [name for name in _cases(op) if fnmatch.fnmatchcase(name, config.cases)]
        except ModuleNotFoundError as error:
            if not everything or error.name != f"benchmarks.ops.{op}":
                raise
            continue
        tasks += [(op, name, arch) for name, arch in deal(names, config.archs, config.sample)]
    if not tasks:
        raise UserError(f"op={config.op} cases={config.cases}: no ahead-of-time case")
    jobs = config.jobs or len(os.sched_getaffinity(0))
    outcomes = []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as cache:  # the cache of Triton's files, gone afterwards
        with ProcessPoolExecutor(jobs, context, _use_cache, (cache,)) as pool:
            for outcome in pool.map(run_case, *zip(*tasks, strict=True)):
                show(outcome)
                outcomes.append(outcome)
    return outcomes


def _use_cache(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder


HEAD = ("op", "case", "arch", "kernel", "config", "registers", "spills", "shared KiB", "matrix")


def cells(outcome: Outcome) -> list[list[str]]:
    """Table rows of an outcome under HEAD."""
    return [
        [outcome.op, outcome.case, f"sm_{k.arch}", k.kernel, k.config, str(k.registers), str(k.spill_bytes),
         f"{k.shared_bytes / 1024:.1f}", k.matrix]
        for k in outcome.kernels
    ]  # fmt: skip


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit status is 1 where a case is not as it must be."""
    from benchmarks.tables import text_table
    from hstu import report

    config = from_arguments(AotConfig, sys.argv[1:] if arguments is None else arguments)
    outcomes = run_all(config, lambda o: print(f"{o.op} {o.case} sm_{o.arch}: {o.seconds:.1f} s", file=sys.stderr))
    print(text_table(HEAD, [row for outcome in outcomes for row in cells(outcome)]))
    problems = [f"{o.op} {o.case} sm_{o.arch}: {problem}" for o in outcomes for problem in o.problems]
    print("\n".join(problems) or "no spills beyond what is allowed, all matrix instructions there, memory fits")
    if config.out:
        content = {"versions": report.versions(), "commit": report.commit()}
        report.write_json(Path(config.out), {**content, "outcomes": [dataclasses.asdict(o) for o in outcomes]})
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
