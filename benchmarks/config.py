"""Options of the benchmark commands: fields, defaults, checks. The YAML files under ``conf/commands`` pick values."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from benchmarks.ops import BENCHES, PRESETS
from hstu.config import build
from hstu.errors import UserError

T = TypeVar("T")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PASSES = ("forward", "backward", "both")
"""both: forward and backward in one, as in training."""


def _one_of(name: str, got: Any, allowed: Sequence[Any]) -> None:
    if got not in allowed:
        raise UserError(f"{name}={got}: expected one of {', '.join(map(str, allowed))}")


def _positive(name: str, got: float) -> None:
    if not got > 0:
        raise UserError(f"{name}={got}: expected > 0")


@dataclass
class BenchConfig:
    """``hstu-bench``."""

    op: Any = "attention"
    """One op, a list of them, or all."""
    sizes: Any = "quick"
    """A preset (toy, quick, full), one point as a mapping of sizes such as {B:32,S:1024}, or a list of such mappings.
    What a mapping leaves out has the op's default."""
    points: str = "*"
    """Only points of the preset whose name fits this pattern, such as ml-*."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu or cuda."""
    dtype: str = "bf16"
    """bf16, fp16 or fp32, of the activations."""
    passes: list[str] = field(default_factory=lambda: list(PASSES))
    """``pass`` on the command line: forward, backward, both (one after the other in one measurement), or all three."""
    competitors: bool = True
    """Time what a user would pick instead, too."""
    backend: str = "auto"
    """What the op runs on: auto, triton or torch."""
    autotune: bool = False
    """Let every kernel try all its configurations first (seconds each) instead of taking the first."""
    memory: bool = True
    """Measure peak memory."""
    warmup_ms: float = 25.0
    """Calls before the timed ones, ms of the device's time."""
    time_ms: float = 100.0
    """Timed calls of each pass, ms of the device's time; at least 5 calls, at most 200."""
    seed: int = 0
    """Of the random inputs."""
    threads: int | None = None
    """torch CPU threads; null: torch's default."""
    cpu_time: bool = False
    """On the CPU: time that the process computed instead of the clock's, for a machine that others use too."""
    out: str = "benchmarks/results"
    """Folder of the records and plots."""
    name: str | None = None
    """Of the record; null: made from op, device and dtype."""
    record: bool = True
    """Write a record. Off: print only."""
    plots: bool = True
    """Write plots beside the record (needs matplotlib)."""

    def __post_init__(self) -> None:
        if isinstance(self.sizes, str):
            _one_of("sizes", self.sizes, PRESETS)
        for op in self.ops():
            _one_of("op", op, (*BENCHES, "all"))
        _one_of("device", self.device, ("auto", "cpu", "cuda"))
        _one_of("dtype", self.dtype, tuple(DTYPES))
        _one_of("backend", self.backend, ("auto", "triton", "torch"))
        for one in self.passes:
            _one_of("pass", one, (*PASSES, "all"))
        _positive("time_ms", self.time_ms)
        if self.threads is not None:
            _positive("threads", self.threads)

    def ops(self) -> list[str]:
        """The ops that are asked for."""
        names = [self.op] if isinstance(self.op, str) else list(self.op)
        return list(BENCHES) if names == ["all"] else names

    def torch_device(self) -> torch.device:
        """The device that is asked for; UserError where it cannot be had."""
        return find_device(self.device)


@dataclass
class CompareConfig:
    """``hstu-bench compare A B``."""

    a: str = ""
    """Record before: a file, or its name under ``out``."""
    b: str = ""
    """Record after."""
    threshold: float = 0.05
    """Slower by more than this share, beyond the noise of both, is a failure."""
    out: str = "benchmarks/results"
    """Folder in which records are found by name."""

    def __post_init__(self) -> None:
        if self.threshold < 0:
            raise UserError(f"threshold={self.threshold}: expected >= 0")


@dataclass
class AotConfig:
    """``hstu-bench aot``."""

    op: Any = "all"
    """One op, a list of them, or all that have ahead-of-time cases."""
    archs: list[int] = field(default_factory=lambda: [80, 90, 100])
    """Compute capabilities times ten: 80 (A100), 90 (H100, H200), 100 (B200)."""
    cases: str = "*"
    """Only cases whose name fits this pattern."""
    sample: int = 0
    """Only so many cases per op, spread over its list and dealt over the architectures; 0: every case for every one."""
    jobs: int | None = None
    """Processes; null: one per core."""
    out: str | None = None
    """JSON file to write; null: print only."""

    def __post_init__(self) -> None:
        for arch in self.archs:
            _one_of("archs", arch, (80, 90, 100))
        if self.sample < 0:
            raise UserError(f"sample={self.sample}: expected >= 0")
        if self.jobs is not None:
            _positive("jobs", self.jobs)


@dataclass
class GpuReportConfig:
    """``python -m benchmarks.gpu_report``."""

    out: str = ""
    """Folder of the report: records, plots, and ``parts/`` with the state that a rerun resumes from."""
    data: str | None = None
    """Folder with ``stores/``, the prepared ml-1m store in it (data.root of hstu-prepare); null: no training run."""
    minutes: float = 8.0
    """Time of this call. What does not fit is left for the next call."""
    device: str = "cuda"
    """cuda or cpu."""
    toy: bool = False
    """Tiny sizes throughout: proves the report itself; the numbers mean nothing."""
    parts: list[str] = field(default_factory=list)
    """Only these parts; empty: all."""
    refresh: bool = False
    """Do parts again that are finished."""
    competitors: bool = True
    """Time what a user would pick instead, too."""
    autotune: bool = False
    """Let every kernel try all its configurations first (seconds each) instead of taking the first."""
    training_minutes: float = 3.0
    """Most that the training run may take of ``minutes``; it is resumed by the next call."""

    def __post_init__(self) -> None:
        if not self.out:
            raise UserError("out is not set: give a folder, as in out=report")
        _one_of("device", self.device, ("cpu", "cuda"))
        _positive("minutes", self.minutes)
        _positive("training_minutes", self.training_minutes)


def find_device(name: str) -> torch.device:
    """The torch device for auto, cpu or cuda; UserError where CUDA is asked for and absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no CUDA device; use device=cpu")
    return torch.device(name)


def from_options(cls: type[T], options: Mapping[str, Any]) -> T:
    """A checked ``cls`` from what was composed; ``pass`` becomes ``passes``, unknown keys raise UserError."""
    values = dict(options)
    if "pass" in values:
        wanted = values.pop("pass")
        wanted = [wanted] if isinstance(wanted, str) else list(wanted)
        values["passes"] = list(PASSES) if wanted == ["all"] else wanted
    return build(cls, values)  # type: ignore[no-any-return]


def from_arguments(cls: type[T], arguments: Sequence[str]) -> T:
    """A checked ``cls`` from ``name=value`` words, values written as in YAML; for commands without a config file."""
    import yaml

    values: dict[str, Any] = {}
    for word in arguments:
        name, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"option {word!r} cannot be read: expected name=value")
        try:
            values[name] = yaml.safe_load(text) if text[:1] in "[{" or not _path_like(text) else text
        except yaml.YAMLError:
            raise UserError(f"option {word!r} cannot be read: its value is no YAML") from None
    return from_options(cls, values)


def asked(cls: type[T], arguments: Sequence[str] | None, doc: str | None) -> T | None:
    """Options of a command from its words, None: those it was started with; None where they ask for help, ``doc``."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["-h"], ["--help"]):
        print(doc)
        return None
    return from_arguments(cls, words)


def _path_like(text: str) -> bool:
    return "/" in text or text.startswith((".", "~", "*"))
