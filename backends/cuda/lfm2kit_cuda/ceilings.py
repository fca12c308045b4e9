"""Measures the ceilings of the device: float32 multiply-adds, and reads of its memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import cupy

from lfm2kit.backend import Ceilings
from lfm2kit_cuda.constants import CEILINGS
from lfm2kit_cuda.device import sm_count
from lfm2kit_cuda.kernels import load_kernel

THREADS, STEPS, REPETITIONS = 512, 4096, 7
READ_BYTES = 2 << 30  # many times any cache


def measure_ceilings() -> Ceilings:
    return Ceilings(_flops_per_second(), _bytes_per_second())


def _flops_per_second() -> float:
    kernel, out = load_kernel("ceilings", "multiply_add"), cupy.zeros(1, cupy.float32)
    ctas = 8 * sm_count()
    seconds = _seconds(lambda: kernel((ctas,), THREADS, out, STEPS, 0.5))
    return 2 * CEILINGS.CHAINS * STEPS * THREADS * ctas / seconds


def _bytes_per_second() -> float:
    kernel, out = load_kernel("ceilings", "read"), cupy.zeros(1, cupy.float32)
    there = cupy.zeros(READ_BYTES // 4, cupy.float32)
    ctas = 8 * sm_count()
    seconds = _seconds(lambda: kernel((ctas,), THREADS, there, out, READ_BYTES // 16))
    return READ_BYTES / seconds


def _seconds(launch: Callable[[], None]) -> float:
    """Return the median time of a launch on the device."""
    times: list[float] = []
    for _ in range(REPETITIONS):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        launch()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(begin, end) / 1e3)
    return statistics.median(times)
