"""Measures what this machine does at best: fused multiply-adds, and reads of main memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lfm2kit_cpu_simd.compiling import kernel
from lfm2kit_cpu_simd.machine import NV, VL
from lfm2kit_cpu_simd.signatures import FLOAT, INT, VECTOR
from lfm2kit_cpu_simd.tile import MR

REPETITIONS = 5
CHAINS = MR * NV  # independent sums, as in the tile: enough to hide an addition's latency
STEPS = 2_000_000
READ_BYTES = 512 * 2**20  # larger than the caches of one core's share; shared ones may hold half


def flops_per_second() -> float:
    """Return the rate of multiply-adds that read no memory, on every thread."""
    threads = numba.get_num_threads()
    seconds = _best(lambda: _multiply_add(STEPS, threads))
    return float(threads * STEPS * 2 * CHAINS * VL) / seconds


def bytes_per_second() -> float:
    """Return the rate of one pass over an array that no cache holds, on every thread."""
    array = np.ones(READ_BYTES // 4, np.float32)
    return READ_BYTES / _best(lambda: _read(array))


def _best(call: Callable[[], Any]) -> float:
    """Return the least seconds of a few calls: a ceiling is what the machine can do undisturbed."""
    seconds = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@intrinsic
def _step(typingctx: Any, sums_at: Any, steps: Any) -> Any:
    """Multiply and add to each of the `CHAINS` vectors at address `sums_at`, `steps` times."""
    signature = types.void(types.intp, types.intp)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = ir.VectorType(ir.FloatType(), VL)
        fmuladd = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fmuladd.v{VL}f32"
        )
        base = builder.inttoptr(args[0], vector.as_pointer())
        places = [builder.gep(base, [ir.IntType(64)(i)]) for i in range(CHAINS)]
        factor = ir.Constant(vector, [1e-9] * VL)
        before = builder.basic_block
        head, after = builder.append_basic_block("head"), builder.append_basic_block("after")
        first = [builder.load(place, align=4) for place in places]
        builder.branch(head)
        builder.position_at_end(head)
        step = builder.phi(ir.IntType(64))
        step.add_incoming(ir.IntType(64)(0), before)
        sums = [builder.phi(vector) for _ in places]
        for phi, value in zip(sums, first, strict=True):
            phi.add_incoming(value, before)
        values = [builder.call(fmuladd, [value, factor, factor]) for value in sums]
        for phi, value in zip(sums, values, strict=True):
            phi.add_incoming(value, head)
        following = builder.add(step, ir.IntType(64)(1))
        step.add_incoming(following, head)
        builder.cbranch(builder.icmp_signed("<", following, args[1]), head, after)
        builder.position_at_end(after)
        for place, value in zip(places, values, strict=True):
            builder.store(value, place, align=4)
        return context.get_dummy_value()

    return signature, codegen


@kernel(types.void(INT, INT), parallel=True)
def _multiply_add(steps: Any, threads: Any) -> None:
    for _thread in numba.prange(threads):
        sums = np.ones((CHAINS, VL), np.float32)
        _step(sums.ctypes.data, steps)


@kernel(FLOAT(VECTOR), parallel=True, fastmath={"reassoc"})
def _read(array: Any) -> Any:
    total = np.float32(0)
    for i in numba.prange(array.shape[0]):
        total += array[i]
    return total
