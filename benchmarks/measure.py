"""Timing, peak memory, and the ceilings of the machine that a measurement is compared with.

On CUDA a call is timed by events on the stream. Where launching takes the CPU longer than the GPU needs to compute,
the stream is first given something to wait for, so that the event time is the device's own; the time per call with
launching is measured beside it (``wall_ms``). Inputs that fit into the L2 cache exist several times and the calls
rotate over them, so that they are read from memory. On the CPU ``perf_counter`` brackets each call; where others use
the machine too, the time that the process computed (``cpu_time``).
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hstu.allocator import give_back_freed_memory

Call = Callable[[], Any]

MIN_CALLS, MAX_CALLS = 5, 200
MAX_SETS = 32
"""Most sets of inputs that calls rotate over."""
CACHE_TURNS = 3
"""All sets together are this many times the L2 cache."""
MAX_WAIT_S = 0.02
"""Longest wait put before a timed call; a call that takes longer to launch is timed with its launches."""
WAIT_HZ = 2.0e9
"""Cycles per second assumed for the wait: at least the clock of the GPUs at hand, so that it lasts long enough."""
CLEAR_PEAK = "5"
"""Written to /proc/self/clear_refs it resets the peak of the resident memory (proc(5))."""


@dataclass(frozen=True)
class Times:
    """Times of one call."""

    ms: float
    """Median."""
    ms_p20: float
    ms_p80: float
    wall_ms: float
    """Mean over calls one after the other, launching included."""
    calls: int


def time_calls(
    calls: Sequence[Call], device: torch.device, warmup_ms: float, time_ms: float, cpu_time: bool = False
) -> Times:
    """Times ``calls`` in turn: the same computation on several sets of inputs.

    cpu_time: on the CPU, by the time that the process computed, all its threads together, instead of the clock.
    """
    clock = time.process_time if cpu_time and device.type == "cpu" else time.perf_counter
    first = _seconds(calls[0], device, clock)  # compiles, allocates
    once = min(first, _seconds(calls[0], device, clock))
    for index in range(_count(warmup_ms, once, 1)):
        calls[index % len(calls)]()
    once = min(once, _seconds(calls[0], device, clock))
    count = _count(time_ms, once, MIN_CALLS)
    if device.type == "cuda":
        times_ms = _event_times(calls, count, once)
    else:
        times_ms = [1e3 * _seconds(calls[i % len(calls)], device, clock) for i in range(count)]
    quantiles = torch.tensor(times_ms, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    p20, median, p80 = (float(x) for x in quantiles)
    return Times(median, p20, p80, _wall_ms(calls, device, count) if device.type == "cuda" else median, count)


def _count(budget_ms: float, once_s: float, least: int) -> int:
    return max(least, min(MAX_CALLS, math.ceil(budget_ms / max(1e3 * once_s, 1e-6))))


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(call: Call, device: torch.device, clock: Callable[[], float]) -> float:
    synchronize(device)
    start = clock()
    call()
    synchronize(device)
    return clock() - start


def _event_times(calls: Sequence[Call], count: int, once_s: float) -> list[float]:
    """Milliseconds of each call between two events."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    calls[0]()
    launch_s = time.perf_counter() - start
    wait = int(1.5 * launch_s * WAIT_HZ) if 0.5 * once_s < launch_s < MAX_WAIT_S else 0
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for index, (begin, end) in enumerate(events):
        if wait:
            torch.cuda._sleep(wait)
        begin.record()
        calls[index % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def _wall_ms(calls: Sequence[Call], device: torch.device, count: int) -> float:
    synchronize(device)
    start = time.perf_counter()
    for index in range(count):
        calls[index % len(calls)]()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start) / count


def cache_bytes(device: torch.device) -> int:
    """Size of the L2 cache of a GPU; 0 on the CPU, where one set of inputs is used."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def num_sets(num_bytes: float, device: torch.device) -> int:
    """How many sets of inputs to rotate over so that none is still in the L2 cache when its turn comes."""
    return max(1, min(MAX_SETS, math.ceil(CACHE_TURNS * cache_bytes(device) / max(num_bytes, 1.0))))


def peak_mib(call: Call, device: torch.device) -> float | None:
    """Peak memory while ``call`` runs beyond what was there before, MiB; None where the system does not tell.

    On the CPU: resident memory of the process, so memory that the allocator held already does not count.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    gc.collect()
    try:
        give_back_freed_memory()
        Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)
        before = _status_kib("VmRSS")
        call()
        return max(0, _status_kib("VmHWM") - before) / 1024
    except (OSError, StopIteration):
        return None


def _status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name + ":")))


# Ceilings


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches on the two simplest jobs, measured in the same run."""

    copy_gb_s: float
    """Device copy of a large array: bytes read plus bytes written."""
    product_tflop_s: float
    """Large square matrix product of random numbers in the dtype of the measurement."""
    dtype: str

    def seconds(self, flops: float, num_bytes: float) -> tuple[float, str]:
        """The least time for this work by the ceilings, and which of them sets it: product or copy."""
        product_s, copy_s = flops / (1e12 * self.product_tflop_s), num_bytes / (1e9 * self.copy_gb_s)
        return (product_s, "product") if product_s > copy_s else (copy_s, "copy")


def measure_ceilings(device: torch.device, dtype: torch.dtype, toy: bool = False, cpu_time: bool = False) -> Ceilings:
    """Measures both; a few hundred milliseconds on a GPU. cpu_time: as of :func:`time_calls`."""
    on_gpu = device.type == "cuda"
    copied_bytes = 2**20 if toy else 2**30 if on_gpu else 2**27
    size = 64 if toy else 8192 if on_gpu and dtype != torch.float32 else 4096 if on_gpu else 1024
    time_ms = 2.0 if toy else 200.0
    source = torch.ones(copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = time_calls([lambda: target.copy_(source)], device, 0.2 * time_ms, time_ms, cpu_time)
    generator = torch.Generator(device=device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
    product = time_calls([lambda: a @ b], device, 0.2 * time_ms, time_ms, cpu_time)
    return Ceilings(2e-6 * copied_bytes / copy.ms, 2e-9 * size**3 / product.ms, str(dtype).removeprefix("torch."))
