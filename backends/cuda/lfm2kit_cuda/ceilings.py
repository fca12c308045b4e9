"""Measures what the device does at best: multiply-adds of each kind, and reads of its memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import cupy

from lfm2kit_cuda.constants import CEILINGS
from lfm2kit_cuda.device import sm_count
from lfm2kit_cuda.kernels import Kernel, load_kernel

THREADS, STEPS, REPETITIONS = 512, 4096, 7
READ_BYTES = 2 << 30  # many times any cache
TILE_FLOPS = 2 * 16 * 8 * 16  # of an instruction of a warp on tensor cores
GROUP, GROUP_FLOPS = 128, 4 * 2 * 64 * 192 * 16  # a warpgroup's threads, and what its step does


def float32_flops() -> float:
    """Return the operations per second of fused multiply-adds in float32."""
    kernel = load_kernel("ceilings", "multiply_add")
    return _rate(kernel, THREADS, 2 * CEILINGS.CHAINS * THREADS, 0.5)


def tensor_core_flops(mma_type: str) -> float:
    """Return the operations per second of a warp's instruction on tensor cores."""
    kernel = load_kernel("ceilings16", "multiply_add_mma", MMA_TYPE=mma_type)
    return _rate(kernel, THREADS, TILE_FLOPS * CEILINGS.CHAINS * THREADS // 32)


def hopper_flops(mma_type: str) -> float:
    """Return the operations per second of a warpgroup's instruction on Hopper's tensor cores."""
    kernel = load_kernel("ceilings90", "multiply_add_wgmma", MMA_TYPE=mma_type)
    return _rate(kernel, 2 * GROUP, 2 * GROUP_FLOPS)


def bytes_per_second() -> float:
    """Return the rate at which memory is read that no cache holds."""
    kernel, out = load_kernel("ceilings", "read"), cupy.zeros(1, cupy.float32)
    there = cupy.zeros(READ_BYTES // 4, cupy.float32)
    ctas = 8 * sm_count()
    seconds = _seconds(lambda: kernel((ctas,), THREADS, there, out, READ_BYTES // 16))
    return READ_BYTES / seconds


def _rate(kernel: Kernel, threads: int, flops: int, *arguments: float) -> float:
    """Return the operations per second of a kernel whose CTAs do `flops` of them in a step."""
    out, ctas = cupy.zeros(1, cupy.float32), 8 * sm_count()
    return ctas * STEPS * flops / _seconds(lambda: kernel((ctas,), threads, out, STEPS, *arguments))


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
