"""Timing, peak memory, rotating inputs, ceilings."""

import time

import pytest
import torch

from benchmarks import measure

CPU = torch.device("cpu")


def test_times_are_ordered_and_of_the_right_size():
    times = measure.time_calls([lambda: time.sleep(0.002)], CPU, warmup_ms=1, time_ms=20)
    assert 2.0 <= times.ms_p20 <= times.ms <= times.ms_p80
    assert times.calls >= measure.MIN_CALLS
    assert times.ms < 50


def test_calls_rotate_over_the_sets_of_inputs():
    seen = []
    measure.time_calls([lambda i=i: seen.append(i) for i in range(3)], CPU, warmup_ms=0.0, time_ms=0.0)
    timed = seen[-measure.MIN_CALLS :]
    assert timed == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("num_bytes", "cache", "sets"),
    [(10, 0, 1), (200, 100, 2), (100, 100, 3), (1, 100, 32), (301, 100, 1), (0, 100, 32)],
    ids=["cpu", "two", "three", "many", "larger than the cache", "nothing"],
)
def test_number_of_input_sets(monkeypatch, num_bytes, cache, sets):
    monkeypatch.setattr(measure, "cache_bytes", lambda device: cache)
    assert measure.num_sets(num_bytes, CPU) == sets


def test_peak_memory_of_a_large_allocation_is_seen():
    size_mib = 64
    peak = measure.peak_mib(lambda: torch.ones(size_mib * 2**18), CPU)
    if peak is None:
        pytest.skip("this system does not tell the peak of the resident memory")
    assert 0.9 * size_mib < peak < 1.5 * size_mib


def test_ceilings_and_the_time_they_allow():
    found = measure.measure_ceilings(CPU, torch.float32, toy=True)
    assert found.copy_gb_s > 0 and found.product_tflop_s > 0 and found.dtype == "float32"
    ceilings = measure.Ceilings(copy_gb_s=1000.0, product_tflop_s=500.0, dtype="bfloat16")
    assert ceilings.seconds(flops=1e12, num_bytes=1e9) == (pytest.approx(0.002), "product")
    assert ceilings.seconds(flops=1e12, num_bytes=1e10) == (pytest.approx(0.01), "copy")


@pytest.mark.gpu
def test_event_times_on_cuda_exclude_launching():
    device = torch.device("cuda")
    x = torch.ones(16, device=device)

    def many_small() -> None:
        for _ in range(50):
            x.add_(1)

    times = measure.time_calls([many_small], device, 5, 20)
    assert times.ms <= times.wall_ms * 1.1
    assert measure.peak_mib(lambda: torch.empty(2**20, device=device), device) == pytest.approx(4.0, rel=0.01)


def test_cpu_time_does_not_count_waiting():
    times = measure.time_calls([lambda: time.sleep(0.01)], CPU, warmup_ms=0.0, time_ms=0.0, cpu_time=True)
    assert times.ms_p80 < 5.0 and times.ms == times.wall_ms
