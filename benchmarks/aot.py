"""Compiles every Triton kernel ahead of time, without a GPU, and reports what the compiler made of it.

``python -m benchmarks.aot`` prints registers, spills, shared memory and matrix instructions per kernel, case and
architecture. The launchers themselves run, on small CPU tensors of the real widths and dtypes; only the launch is
left out, so what is compiled is what a GPU would get (same compile-time sizes, same alignment of arguments).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ARCHS = (80, 90, 100)
"""Compute capabilities times ten: A100, H100 and H200, B200."""
SHARED_LIMIT_KIB = {80: 163, 90: 227, 100: 227}
"""Shared memory one program may take. Source: CUDA C++ programming guide, technical specifications."""


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
    """Inside, a kernel launch compiles for ``arch`` and launches nothing; gives the list of (kernel, compiled)."""
    from kernels._launch import interpreting

    if interpreting():
        raise RuntimeError("TRITON_INTERPRET=1 is set: kernels are interpreted and cannot be compiled here")
    from triton.runtime import JITFunction
    from triton.runtime.driver import driver

    seen: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        seen.append((self.fn.__name__, compiled))
        return compiled

    previous = driver._active
    driver.set_active(_NoGpu(arch))
    JITFunction.run = compile_only
    try:
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


def describe(name: str, arch: int, compiled: Any) -> Compiled:
    """Registers and spills from the compiler, shared memory from Triton, the matrix instruction from the PTX."""
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    registers, spills = _resources(compiled.asm["ptx"], arch)
    sizes = f"warps={metadata.num_warps} stages={metadata.num_stages}"
    return Compiled(name, arch, sizes, registers, spills, metadata.shared, _matrix_instruction(ptx), metadata.num_warps)


def _resources(ptx: str, arch: int) -> tuple[int, int]:
    """Registers per thread and bytes spilled, from ``ptxas -v``."""
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
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", done.stderr))
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr))
    return registers, spills


def compile_launch(arch: int, launch: Callable[[], Any]) -> list[Compiled]:
    """All kernels that ``launch`` launches, compiled for ``arch``; each distinct binary once."""
    with compiling_for(arch) as seen, torch.no_grad():
        launch()
    distinct = {id(compiled): (name, compiled) for name, compiled in seen}
    return [describe(name, arch, compiled) for name, compiled in distinct.values()]
