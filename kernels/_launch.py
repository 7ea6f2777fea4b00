"""What the launchers of two or more ops share: configurations, their choice, and facts of the device.

A launcher is a plain function that allocates its outputs and launches. ``configs()`` beside a kernel lists what may
be tried, the best guess first; :func:`select` takes the first one, or, with tuning on, the fastest on this device.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")
_log = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the Triton kernels take; float64 runs on torch."""
NUM_SMS_WITHOUT_GPU = 4
"""Multiprocessors assumed where there is no GPU (Triton's interpreter)."""


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel: its compile-time sizes, warps per program, software pipeline depth."""

    sizes: tuple[tuple[str, int], ...] = ()
    num_warps: int = 4
    num_stages: int = 2

    def __getitem__(self, name: str) -> int:
        return dict(self.sizes)[name]

    def launch(self) -> dict[str, int]:
        """Keyword arguments of the kernel call."""
        return {**dict(self.sizes), "num_warps": self.num_warps, "num_stages": self.num_stages}

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.sizes)
        return f"{sizes} warps={self.num_warps} stages={self.num_stages}"


def config(num_warps: int = 4, num_stages: int = 2, **sizes: int) -> Config:
    """A :class:`Config`; ``sizes`` are the kernel's compile-time block sizes."""
    return Config(tuple(sizes.items()), num_warps, num_stages)


def interpreting() -> bool:
    """Whether kernels run under Triton's interpreter (the variable must be set before triton is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def power_of_two(n: int, least: int = 16) -> int:
    """Smallest power of two that is at least n and ``least`` (16: what a matrix instruction needs)."""
    return max(least, 1 << (n - 1).bit_length())


def length_bucket(n: int) -> int:
    """Lengths that share a tuning result: the power of two at or above n."""
    return 1 << max(n - 1, 0).bit_length()


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """x itself where neighbours of its last dimension lie side by side, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


MAX_ROW_STRIDE = 2**24
"""Elements from one row to the next up to which an offset inside a tile of 128 rows fits into 32 bits."""


def near_rows(x: torch.Tensor) -> torch.Tensor:
    """x of unit stride with rows at most :data:`MAX_ROW_STRIDE` apart: itself, or a contiguous copy."""
    x = unit_stride(x)
    return x if x.shape[0] < 2 or x.stride(0) <= MAX_ROW_STRIDE else x.contiguous()


def dot_precision() -> str:
    """``input_precision`` of float32 products: ieee, or tf32 where torch was asked for it."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


@cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of the device."""
    if device.type != "cuda":
        return NUM_SMS_WITHOUT_GPU
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@dataclass
class _Tuning:
    on: bool = False
    best: dict[tuple[str, Hashable], Config] = field(default_factory=dict)


_tuning = _Tuning()


def set_autotune(on: bool) -> None:
    """Whether :func:`select` times all configurations of a new key (seconds each) or takes the first."""
    _tuning.on = on


def select(kernel: str, key: Hashable, configs: Sequence[Config], launch: Callable[[Config], T]) -> T:
    """Runs ``launch`` with the configuration chosen for (kernel, key) and returns its result.

    Args:
        kernel: name, for the log.
        key: every size that changes the best choice; lengths as :func:`length_bucket`.
        configs: at least one, the best guess first.
        launch: allocates its outputs and launches; must be repeatable.
    """
    if not _tuning.on or len(configs) == 1 or not torch.cuda.is_available():
        return launch(configs[0])
    place = (kernel, key)
    if place not in _tuning.best:
        _tuning.best[place] = _fastest(kernel, key, configs, launch)
    return launch(_tuning.best[place])


def _fastest(kernel: str, key: Hashable, configs: Sequence[Config], launch: Callable[[Config], T]) -> Config:
    from triton import CompilationError
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    times_ms: dict[Config, float] = {}
    for candidate in configs:
        try:
            times_ms[candidate] = do_bench(lambda c=candidate: launch(c), warmup=10, rep=40, return_mode="median")
        except (OutOfResources, CompilationError) as error:
            _log.info("%s %s: %s does not run here: %s", kernel, key, candidate, error)
    if not times_ms:
        raise RuntimeError(f"{kernel} {key}: none of {len(configs)} configurations runs on this device")
    best = min(times_ms, key=lambda c: times_ms[c])
    _log.info("%s %s: %s, %.4f ms", kernel, key, best, times_ms[best])
    return best
