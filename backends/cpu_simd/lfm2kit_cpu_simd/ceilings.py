"""What this machine gives at best: fused multiply-adds from L1, and reads of main memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types

from lfm2kit_cpu_simd.signatures import FLOAT, INT, OFFSETS, VECTOR
from lfm2kit_cpu_simd.tile import MR, NR, TABLE, call_tile

REPETITIONS = 5
DEPTH = 128  # k of a tile whose panel stays in L1
CALLS = 20_000
READ_BYTES = 512 * 2**20  # larger than the caches of one core's share; shared ones may hold half


def flops_per_second() -> float:
    """The tile on one small panel, over and over, on every thread."""
    threads = numba.get_num_threads()
    seconds = _best(lambda: _multiply_in_cache(CALLS, DEPTH, TABLE, threads))
    return threads * CALLS * 2.0 * MR * NR * DEPTH / seconds


def bytes_per_second() -> float:
    """One pass over an array that no cache holds, on every thread."""
    array = np.ones(READ_BYTES // 4, np.float32)
    return READ_BYTES / _best(lambda: _read(array))


def _best(call: Callable[[], Any]) -> float:
    """The least seconds of a few calls: a ceiling is what the machine can do undisturbed."""
    seconds = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@numba.njit(types.void(INT, INT, OFFSETS, INT), parallel=True, cache=True)
def _multiply_in_cache(calls: Any, depth: Any, table: Any, threads: Any) -> None:
    for _thread in numba.prange(threads):
        x, panel = np.zeros((MR, depth), np.float32), np.zeros((depth, NR), np.float32)
        out = np.empty((MR, NR), np.float32)
        for _ in range(calls):
            call_tile(table[MR], x.ctypes.data, depth, panel.ctypes.data, depth, out.ctypes.data)


@numba.njit(FLOAT(VECTOR), parallel=True, cache=True, fastmath={"reassoc"})
def _read(array: Any) -> Any:
    total = np.float32(0)
    for i in numba.prange(array.shape[0]):
        total += array[i]
    return total
